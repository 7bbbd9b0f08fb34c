"""Weights of 8 bits through the library: folders, quantisation while loading, and what the fused step makes of it."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Linear

from modeling_mlra.capture_mlra import fingerprint, is_plain
from modeling_mlra.generation_mlra import captured_decodes
from modeling_mlra.step_maps_mlra import ScaledWeight, format_of, weight_of
from modeling_mlra.step_mlra import obstacle
from scripts import export
from scripts.fp8 import linear_names
from scripts.loading import load_model
from tests.fused_checks import compare
from tests.models import random_ids, rms_ratio, tiny_model
from tests.quantized import as_on_a_gpu, exact, fp8_copy, scaled_weight
from tests.tolerances import FUSED_BFLOAT16_RATIO, FUSED_FLOAT32_RATIO

SIZES = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 200, "q_lora_rank": 128, "kv_lora_rank": 128}


@pytest.fixture
def on_a_gpu():
    with as_on_a_gpu():
        yield


@pytest.fixture
def plain():
    return tiny_model(dtype=torch.bfloat16, **SIZES)


@pytest.fixture
def folder(plain, tmp_path):
    """The model as `scripts.export --fp8` writes it."""
    plain.save_pretrained(tmp_path / "plain")
    assert export.main([str(tmp_path / "plain"), str(tmp_path / "fp8"), "--fp8"]) == 0
    return tmp_path / "fp8"


def equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        x.dtype == second[name].dtype and torch.equal(x.float(), second[name].float()) for name, x in first.items()
    )


def test_exported_folder(plain, folder, on_a_gpu, tmp_path):
    """FP8 layers of the weights' numbers, which the step takes, and which go to a folder and back as they are."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert "linear layers as FP8" in (folder / "README.md").read_text()
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert obstacle(model, 1) is None
    for name in linear_names(plain):
        layer, weight = model.get_submodule(name), plain.get_submodule(name).weight
        assert type(layer) is FP8Linear
        expected = scaled_weight(weight, tuple(weight.shape))
        assert torch.equal(exact(weight_of(layer)), exact(expected)), name
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert equal(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_exported_folder_without_a_gpu(plain, folder):
    """The library gives the layers the numbers that the weights stand for, in 16 bits or, where asked, in 32."""
    assert {parameter.dtype for parameter in load_model(folder, dtype=torch.float32).parameters()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name in linear_names(plain):
        weight = plain.get_submodule(name).weight
        expected = exact(scaled_weight(weight.detach(), tuple(weight.shape))).bfloat16()
        assert torch.equal(model.get_submodule(name).weight, expected), name
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert 0 < rms_ratio(plain(ids).logits.float(), model(ids).logits.float()) < 0.2


def test_a_quantised_folder_is_not_exported_again(folder, tmp_path, capsys):
    assert export.main([str(folder), str(tmp_path / "again")]) == 2
    assert "holds quantised weights" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_quantised_while_loading(on_a_gpu, tmp_path):
    """By blocks that divide the weights, but for some layers: the step takes both side by side."""
    tiny_model(dtype=torch.bfloat16, **SIZES | {"intermediate_size": 128}).save_pretrained(tmp_path)
    settings = FineGrainedFP8Config(modules_to_not_convert=["lm_head", "q_b_proj", "k_rope_proj", "o_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert obstacle(model, 1) is None
    assert is_plain(model)
    assert type(attention.q_b_proj) is nn.Linear
    assert format_of(weight_of(attention.q_a_proj)) == (torch.float8_e4m3fn, (128, 128))
    assert format_of(weight_of(mlp.down_proj)) == (torch.float8_e4m3fn, (128, 128))
    # What newer versions make of weights that their blocks do not divide
    mlp.down_proj.weight = nn.Parameter(torch.zeros(256, 128, dtype=torch.bfloat16))
    assert format_of(weight_of(mlp.down_proj)) == (torch.bfloat16, (0, 0))
    assert obstacle(model, 1) is None
    assert is_plain(model)


class RowScaled(torch.Tensor):
    """Stands for torchao's `Float8Tensor`: looks like the weight that `qdata`, `scale` and `block_size` stand for."""

    @staticmethod
    def __new__(cls, qdata, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype, device=qdata.device)

    def __init__(self, qdata, scale, dtype):
        self.qdata, self.scale, self.block_size = qdata, scale, [1, qdata.shape[1]]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, function
        return cls(args[0].qdata, args[0].scale, args[0].dtype)


def with_scaled_rows(model: nn.Module) -> nn.Module:
    """The model with a scale for each row of its linear layers' weights, and a copy that has the numbers."""
    copy = tiny_model(num_attention_heads=4).to(model.device)
    for name in linear_names(model):
        weight = model.get_submodule(name).weight
        small = scaled_weight(weight.detach(), (1, weight.shape[1]))
        weight.data.copy_(exact(small))
        copy.get_submodule(name).weight = nn.Parameter(RowScaled(small.values, small.scale, weight.dtype), False)
    return copy


def test_rows_that_torchao_scales():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = compare("mlra_4", device, quantise=with_scaled_rows)
    assert max(result["logits"], result["rows"]) < FUSED_FLOAT32_RATIO


@pytest.mark.gpu
def test_gpu_generate_runs_fused(on_a_gpu):
    """With the cache that generate() makes itself; prompts by the numbers that the weights stand for."""
    plain = tiny_model("mlra_4", dtype=torch.bfloat16, **SIZES).cuda()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.2)
    small, ids = fp8_copy(plain, (128, 128)), random_ids(2, 9).cuda()
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    before = captured_decodes["fused"]
    expected, seen = plain.generate(ids, **settings), small.generate(ids, **settings)
    assert captured_decodes["fused"] == before + 2
    same = (expected.sequences == seen.sequences).all(0).cumprod(0).sum().item() - ids.shape[1]
    assert same > 1
    for step in range(same):
        assert rms_ratio(expected.logits[step].float(), seen.logits[step].float()) < FUSED_BFLOAT16_RATIO
    for _ in range(2):
        assert torch.equal(small.generate(ids, **settings | {"output_logits": False}).sequences, seen.sequences)


def test_graphs_follow_the_tensors_that_torchao_keeps():
    layer = (model := with_scaled_rows(tiny_model(num_attention_heads=4))).model.layers[0].mlp.up_proj
    assert isinstance(weight_of(layer), ScaledWeight)
    before = fingerprint(model)
    assert fingerprint(model) == before
    layer.weight.qdata = layer.weight.qdata.clone()
    assert fingerprint(model) != before
