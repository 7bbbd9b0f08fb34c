"""What cannot be served is refused in one line that names it, when the engine starts."""

import pytest
from vllm.engine.arg_utils import EngineArgs

from mlra_vllm.checks import check_supported
from modeling_mlra import MLRAConfig
from tests.serving.models import saved_model

ROPE = {"rope_theta": 10000.0, "factor": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    saved_model(path)
    return path


@pytest.fixture
def settings(folder):
    """`settings(**arguments)`: what the engine would hand to the model."""
    return lambda **arguments: EngineArgs(str(folder), skip_tokenizer_init=True, **arguments).create_engine_config()


def refusal(vllm_config) -> str:
    with pytest.raises(ValueError) as error:
        check_supported(vllm_config)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_engine_with_fp8_cache(folder, start):
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8_e5m2' is not supported for MLRA: give one of"):
        start(folder, kv_cache_dtype="fp8_e5m2")


def test_plain_settings_pass(settings):
    check_supported(settings())
    for name in ("bfloat16", "fp8"):
        check_supported(settings(kv_cache_dtype=name))
    check_supported(settings(hf_overrides={"rope_parameters": {**ROPE, "rope_type": "linear"}}))


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism(name, settings):
    given = settings()
    setattr(given.parallel_config, name, 2)
    assert refusal(given).startswith(f"{name}=2 is not supported for MLRA")


def test_sliding_window(settings):
    assert refusal(settings(hf_overrides={"sliding_window": 32})).startswith("sliding_window=32 is not supported")


def test_rotation_that_depends_on_the_batch(settings):
    half = MLRAConfig.from_pretrained(settings().model_config.model).qk_rope_head_dim // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half, "original_max_position_embeddings": 64}
    for kind, extra in (("dynamic", {}), ("longrope", factors)):
        given = settings(hf_overrides={"rope_parameters": {**ROPE, **extra, "rope_type": kind}})
        assert refusal(given).startswith(f"rope_type='{kind}' is not supported in vLLM")


def test_speculation(settings):
    given = settings(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})
    assert refusal(given).startswith("speculative decoding is not supported")


def test_adapters_over_several_ranks(settings):
    given = settings(enable_lora=True)
    check_supported(given)
    given.parallel_config.tensor_parallel_size = 2
    assert refusal(given).startswith("LoRA with tensor_parallel_size=2 is not supported")


def test_ranks_that_cannot_share(folder, start, monkeypatch):
    """Twelve heads over five ranks: refused before a weight is read."""
    monkeypatch.setattr("mlra_vllm.model.get_tensor_model_parallel_world_size", lambda: 5)
    with pytest.raises(ValueError, match="tensor parallel size 5 cannot split .* sizes that work: 1, 2, 4"):
        start(folder)
