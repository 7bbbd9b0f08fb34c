"""Split over several ranks: tokens, and how many of them the cache holds by vLLM's own count of blocks."""

import pytest

from tests.serving.conftest import CACHE_BYTES
from tests.serving.models import RELEASED, ask, continuations, saved_model, tokens


@pytest.mark.parametrize("ranks, row", [(1, 576), (2, 320), (4, 192)])
def test_released_widths(ranks, row, tmp_path, start):
    """mlra_4: of 4 latents of 128 and a RoPE key of 64, a rank keeps 4, 2 or 1 latents and the key."""
    model = saved_model(tmp_path, **RELEASED)
    engine = start(tmp_path, tensor_parallel_size=ranks, max_num_batched_tokens=64)
    cache = engine.llm_engine.vllm_config.cache_config
    bytes_per_token = model.config.num_hidden_layers * row * 4
    assert cache.num_gpu_blocks == CACHE_BYTES // (cache.block_size * bytes_per_token)
    assert tokens(ask(engine)) == continuations(model)


@pytest.mark.parametrize("variant", ["mla", "mlra_2"])
def test_two_ranks(variant, tmp_path, start):
    """Ranks that share the one latent and split its heads, and ranks that split head groups; gated."""
    model = saved_model(tmp_path, variant, attn_output_gate=True)
    engine = start(tmp_path, tensor_parallel_size=2)
    assert tokens(ask(engine)) == continuations(model)


def test_pipeline(tmp_path, start):
    """Three layers on two ranks; compiled, because the CPU build does not prepare a second rank otherwise."""
    model = saved_model(tmp_path, num_hidden_layers=3)
    engine = start(tmp_path, pipeline_parallel_size=2, enforce_eager=False)
    assert tokens(ask(engine)) == continuations(model)
