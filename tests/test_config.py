"""MLRAConfig: derived sizes, impossible combinations, and the parameter counts of the released architectures."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from modeling_mlra import MLRAConfig, MLRAForCausalLM
from tests.models import VARIANTS, tiny_config

CONFIGURATION = Path(__file__).parents[1] / "configuration"

RELEASED_PARAMETERS = {  # counted by the authors, embedding counted once
    "mlra_4": 2_873_220_096,
    "mlra_2": 2_872_630_272,
    "gla_4": 2_873_220_096,
    "gla_2": 2_872_630_272,
    "mla": 2_872_052_736,
    "mlra_4_gated": 2_873_220_096,
    "mlra_2_gated": 2_872_630_272,
    "gla_2_gated": 2_872_630_272,
    "mla_gated": 2_872_052_736,
    "mla_double_heads": 2_873_232_384,
    "gla_2_double_heads": 2_873_220_096,
}


@pytest.mark.parametrize("name", RELEASED_PARAMETERS)
def test_parameter_count_of_released_architecture(name):
    config = MLRAConfig.from_json_file(CONFIGURATION / f"{name}.json")
    with torch.device("meta"):
        model = MLRAForCausalLM(config)
    assert model.num_parameters() == RELEASED_PARAMETERS[name]
    assert config.cache_row_dim == 576  # 4.5 head widths of 128
    assert 2 * config.num_key_value_heads * config.head_dim == 576, "a paged row has nothing to spare"


@pytest.mark.parametrize("variant", VARIANTS)
def test_derived_sizes(variant):
    config = tiny_config(variant)
    latents, branches = VARIANTS[variant]
    assert config.num_head_groups == latents // branches
    assert config.latent_head_dim == 32 // latents
    assert config.qk_head_dim == 10
    assert config.cache_row_dim == 36


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_branches", 3, ["num_branches=3", "num_latent_heads=4"]),
        ("num_branches", 0, ["num_branches=0"]),
        ("num_latent_heads", 0, ["num_latent_heads=0"]),
        ("kv_lora_rank", 30, ["kv_lora_rank=30", "num_latent_heads=4"]),
        ("num_attention_heads", 13, ["num_attention_heads=13", "num_branches=2"]),
        ("qk_rope_head_dim", 3, ["qk_rope_head_dim=3"]),
        ("q_lora_rank", -1, ["q_lora_rank=-1"]),
        ("rms_norm_eps", 0.0, ["rms_norm_eps=0.0"]),
        ("attention_dropout", 1.0, ["attention_dropout=1.0"]),
        ("initializer_range", -0.1, ["initializer_range=-0.1"]),
    ],
)
def test_impossible_sizes_are_value_errors_that_name_them(field, value, words):
    with pytest.raises(ValueError) as error:
        tiny_config("mlra_2", **{field: value})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_types_are_checked():
    with pytest.raises(Exception, match="hidden_size"):
        tiny_config(hidden_size="24")


def test_round_trip(tmp_path):
    config = tiny_config("gla_2", attn_output_gate=True, rope_theta=5000.0, latent_scaling=False)
    config.save_pretrained(tmp_path)
    again = MLRAConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert "head_dim" not in json.loads((tmp_path / "config.json").read_text()), "derived sizes are not stored"


def test_trainers_may_ask_any_configuration_for_its_auto_map(tmp_path):
    """TRL's DPO and GRPO read `config.auto_map` of every architecture that the library itself does not name."""
    folder = tmp_path / "plain"
    tiny_config(architectures=["MLRAForCausalLM"]).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("auto_map", None)  # as in a folder without code
    (folder / "config.json").write_text(json.dumps(saved))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert getattr(transformers, config.architectures[0], None) is None
    assert not [name for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM") if name in config.auto_map]
    assert "auto_map" not in config.to_dict() and "auto_map" not in json.loads(config.to_json_string())
    config.auto_map["AutoConfig"] = "configuration_mlra.MLRAConfig"  # as saving with the code does
    assert config.to_dict()["auto_map"] == {"AutoConfig": "configuration_mlra.MLRAConfig"}
    assert MLRAConfig.from_dict(config.to_dict()).auto_map == config.auto_map
    assert not tiny_config().auto_map, "one configuration's map is not another's"
