"""Rotary settings in every spelling, against Llama's; scores under YaRN, against the library's DeepSeek-V3."""

import copy
import json
import os

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig

from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.decode_mlra import ENVIRONMENT_VARIABLE, decode_calls
from tests.models import random_ids, rms_ratio, tiny_config, tiny_model
from tests.tolerances import CACHE_LOGITS_RATIO

KINDS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0},
    "yarn, original length": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 2.0},
}


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
@pytest.mark.parametrize("name", KINDS)
def test_every_spelling_means_what_it_means_to_llama(name, spelling, tmp_path):
    rope = {spelling: name.split(",")[0], **KINDS[name]}
    calls = [
        {"rope_scaling": rope, "rope_theta": 500000.0},
        {"rope_scaling": rope},
        {"rope_scaling": {**rope, "rope_theta": 7.0}, "rope_theta": 500000.0},
        {"rope_parameters": rope, "rope_theta": 500000.0},
        {"rope_parameters": {**rope, "rope_theta": 7.0}, "rope_theta": 500000.0},
        {"rope_scaling": None, "rope_theta": 500000.0},
        {"rope_scaling": rope, "rope_theta": 500000.0, "original_max_position_embeddings": 16},
        {},
    ]
    thetas = []
    for settings in calls:
        common = {"max_position_embeddings": 128, "hidden_size": 64, "num_attention_heads": 4}
        llama = LlamaConfig(**copy.deepcopy(settings), **common, head_dim=64)
        expected = llama.rope_parameters
        assert MLRAConfig(**copy.deepcopy(settings), **common).rope_parameters == expected, settings
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mlra", **settings, **common}))
        from_file = MLRAConfig.from_pretrained(tmp_path)
        assert from_file.rope_parameters == expected, settings
        from_file.save_pretrained(tmp_path)
        assert MLRAConfig.from_pretrained(tmp_path).rope_parameters == expected, settings
        thetas.append(expected["rope_theta"])
    assert thetas == [500000.0, 10000.0, 7.0, 500000.0, 7.0, 500000.0, 500000.0, 10000.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarm", "factor": 2.0}}, ["rope_type='yarm'", "yarn"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_type='su'", "longrope"]),
        ({"rope_theta": "x"}, ["rope_theta='x'"]),
        ({"rope_theta": 0.0}, ["rope_theta=0.0"]),
        ({"rope_theta": float("nan")}, ["rope_theta=nan"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "qk_rope_head_dim=4"]),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 2, "factor": 2.0}},
            ["short_factor has 1", "qk_rope_head_dim=4 needs 2"],
        ),
    ],
)
def test_what_cannot_be_rotated_is_named(settings, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_library_checks_the_rotated_width(caplog):
    """Its advice about the length of LongRoPE's lists must not be about the paged cache's heads."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2, "factor": 2.0}
    with caplog.at_level("WARNING", logger="transformers"):
        tiny_config(rope_parameters=rope)
    assert "must have length" not in caplog.text


# YaRN as DeepSeek-V3 has it

YARN = {"rope_type": "yarn", "factor": 40.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
MSCALES = {
    "neither": {},
    "both": {"mscale": 1.0, "mscale_all_dim": 1.0},
    "unequal": {"mscale": 1.0, "mscale_all_dim": 0.5},
    "all dimensions only": {"mscale_all_dim": 0.8},
    "zero": {"mscale": 1.0, "mscale_all_dim": 0},
    "explicit tables": {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.3},
    "no extension": {"mscale": 1.0, "mscale_all_dim": 1.0, "factor": 1.0},
    "of another kind": {"rope_type": "linear", "mscale_all_dim": 1.0},
}


def deepseek_of(model, rope: dict) -> DeepseekV3ForCausalLM:
    """The library's DeepSeek-V3 with the weights of an `mla` model without latent scaling: the same function."""
    config = model.config
    deepseek = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{
                name: getattr(config, name)
                for name in (
                    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
                    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "pad_token_id"),
                )
            },
            num_key_value_heads=config.num_attention_heads,
            first_k_dense_replace=config.num_hidden_layers,
            rope_interleave=False,
            rope_parameters=copy.deepcopy(rope),
        )
    ).eval()
    weights = model.state_dict()
    for name in [name for name in weights if name.endswith("kv_a_proj.weight")]:
        rotary = weights.pop(name.replace("kv_a_proj", "k_rope_proj"))
        merged = torch.cat([weights.pop(name), rotary])
        weights[name.replace("kv_a_proj", "kv_a_proj_with_mqa")] = merged
    for name in [name for name in weights if name.endswith("kv_a_layernorm.weight")]:
        weights[name] = weights[name].flatten()
    deepseek.load_state_dict(weights)
    return deepseek


@pytest.mark.parametrize("mscale", MSCALES)
def test_scores_under_yarn_are_those_of_deepseek(mscale, monkeypatch):
    """Every form of attention: eager, sdpa, absorbed in torch and in the Triton kernel."""
    rope = YARN | MSCALES[mscale]
    model = tiny_model("mla", latent_scaling=False, rope_parameters=copy.deepcopy(rope), max_position_embeddings=640)
    deepseek = deepseek_of(model, rope)
    scaling = deepseek.model.layers[0].self_attn.scaling
    assert model.config.score_scaling == pytest.approx(scaling, rel=1e-12)
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = deepseek(ids).logits
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            for kernel in ("torch", "triton"):
                monkeypatch.setitem(os.environ, ENVIRONMENT_VARIABLE, kernel)
                for cache in (MLRACache(model.config), MLRACache(model.config, max_cache_len=24)):
                    before = decode_calls[kernel]
                    logits = [model(part, past_key_values=cache).logits for part in ids.split([19, 1, 3, 1], dim=1)]
                    assert rms_ratio(expected, torch.cat(logits, dim=1)) < CACHE_LOGITS_RATIO
                    assert (decode_calls[kernel] > before) == (implementation == "sdpa")
    plain = tiny_model("mla", latent_scaling=False, rope_parameters={**YARN}, max_position_embeddings=640)
    with torch.no_grad():
        changed = rms_ratio(expected, plain(ids).logits) > 10 * CACHE_LOGITS_RATIO
    assert changed == (mscale not in ("neither", "zero")), "these settings are told apart"


def test_factor_of_the_scores_by_hand():
    """0.1 * ln 40 + 1 = 1.36889, squared 1.87385, times 1 / sqrt(12)."""
    rope = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    assert tiny_config(qk_nope_head_dim=8, rope_parameters=rope).score_scaling == pytest.approx(0.540935, abs=1e-6)
    assert tiny_config(qk_nope_head_dim=8).score_scaling == pytest.approx(0.288675, abs=1e-6)
    model = tiny_model("mlra_4", rope_parameters=rope)
    assert {layer.self_attn.scaling for layer in model.model.layers} == {model.config.score_scaling}


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_casting_a_model_rounds_no_frequency(cast, tmp_path):
    """The logits of a cast model are those of one loaded in that dtype."""
    tiny_model().save_pretrained(tmp_path)
    model = cast(MLRAForCausalLM.from_pretrained(tmp_path))
    loaded = MLRAForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = random_ids(1, 100)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
