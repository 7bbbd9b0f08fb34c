"""The fused step with weights of 8 bits, against the numbers they stand for, in Triton's interpreter or on a GPU."""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from modeling_mlra import step_linear_mlra, step_linear_products_mlra, step_linear_registers_mlra, step_mlra
from modeling_mlra.capture_mlra import is_plain
from modeling_mlra.device_mlra import DeviceFacts
from modeling_mlra.modeling_mlra import MLRARMSNorm
from modeling_mlra.step_device_mlra import machine_of
from modeling_mlra.step_linear_mlra import FEW_VECTORS
from modeling_mlra.step_maps_mlra import LinearMap, scaled, weight_of
from modeling_mlra.step_mlra import obstacle
from scripts.fp8 import fp8_blocks, multiply_plainly, to_fp8, widened
from tests.fused_checks import compare
from tests.models import rms_ratio, tiny_model
from tests.quantized import exact, fp8_copy, scaled_weight
from tests.tolerances import FP8_WEIGHTS_RATIO, FUSED_FLOAT32_RATIO, KERNEL_BF16_RATIO

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where there is one, all of them run on the GPU
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off, and does not round
SMALL = {"ROWS": 4, "WIDTH": 32, "AHEAD": 2}  # tiles that rows and columns end inside


def cases(inner: int, sizes: tuple[int, ...], vectors: int, block, dtype):
    """Vectors, and name -> map, residual and float64 result, of weights that `block` numbers share a scale of."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    def weight(rows):
        spread = torch.linspace(-3, 3, rows)[:, None].exp2() * torch.linspace(-2, 2, inner).exp2()
        numbers = torch.randn(rows, inner, generator=generator) * spread / inner**0.5
        scaled = scaled_weight(numbers, block or (rows, inner))
        return scaled._replace(values=scaled.values.to(DEVICE), scale=scaled.scale.to(DEVICE))

    norm = MLRARMSNorm(inner, 1e-6).to(DEVICE, dtype)
    norm.weight.data.copy_(normal(inner))
    x, weights, up = normal(vectors, inner + 8)[:, :inner], tuple(map(weight, sizes)), weight(sizes[0])
    wide, before = x.double(), normal(vectors, sum(sizes))
    stacked = torch.cat([*map(exact, weights)])
    scaled_x = wide * norm.weight.double()
    if dtype == HALF and vectors > FEW_VECTORS:  # products take 16-bit numbers
        scaled_x = scaled_x.to(dtype).double()
    normed = scaled_x * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gated = nn.functional.silu(normed @ exact(weights[0]).T) * (normed @ exact(up).T)
    return x, {
        "norm": (LinearMap(weights, norm, 0.7), None, 0.7 * normed @ stacked.T),
        "swiglu": (LinearMap((weights[0], up), norm, swiglu=True), None, gated),
        "residual": (LinearMap(weights, residual_share=0.5), before, wide @ stacked.T + 0.5 * before.double()),
    }


SHAPES = {
    "blocks that end inside": (100, (37, 9), (16, 32)),
    "a row each": (72, (20,), (1, 72)),
    "one for all": (40, (21, 8, 3), None),
    "rows of groups": (96, (12, 30), (1, 16)),
    "more rows than a tile": (64, (50, 6), (128, 128)),
}
"""Name -> K, rows of the stacked weights, rows and columns that share a scale."""


@pytest.mark.parametrize(("vectors", "dtype"), [(1, torch.float32), (2, HALF), (5, torch.float32), (5, HALF)])
@pytest.mark.parametrize("shape", SHAPES)
def test_maps_of_8_bit_weights(shape, vectors, dtype, monkeypatch):
    """Against the numbers they stand for, in float64: norm, SwiGLU and residual, of few vectors and of many."""
    inner, sizes, block = SHAPES[shape]
    x, maps = cases(inner, sizes, vectors, block, dtype)
    if DEVICE == "cpu":
        for module, name, small in (
            (step_linear_registers_mlra, "register_plan", SMALL),
            (step_linear_products_mlra, "product_plan", {"WIDTH": 32, "SPLITS": 2}),
        ):
            plan = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, plan=plan, small=small: plan(*a) | small)
    limit = FUSED_FLOAT32_RATIO if dtype == torch.float32 else KERNEL_BF16_RATIO
    machine = machine_of(torch.device(DEVICE))
    for name, (linear_map, residual, expected) in maps.items():
        out = torch.full(expected.shape, torch.nan, dtype=dtype, device=DEVICE)
        step_linear_mlra.run(linear_map, x, out, machine, residual)
        assert rms_ratio(expected, out.double()) < limit, name


@pytest.mark.parametrize(("shape", "block"), [((50, 70), (16, 32)), ((16, 16), (16, 16)), ((5, 9), (5, 9))])
def test_how_weights_become_fp8(shape, block):
    """Against blocks taken one after the other; a block of zeros stays one."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = scaled_weight(weight, block)
    numbers, scale = fp8_blocks(weight, block)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(numbers.float(), expected.values.float())
    assert rms_ratio(weight.double(), exact(scaled(numbers, scale, block))) < FP8_WEIGHTS_RATIO
    numbers, scale = fp8_blocks(torch.zeros(shape), block)
    assert not numbers.float().any()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("block", [(16, 32), (1, 2**30), None])
def test_what_fp8_layers_stand_for(block, monkeypatch):
    monkeypatch.setattr(FP8Linear, "forward", FP8Linear.forward)
    model = nn.Sequential(nn.Linear(70, 50, bias=False))
    to_fp8(model, block)
    expected, x = exact(weight_of(model[0])).float(), torch.randn(3, 70)
    assert torch.equal(widened(model[0], torch.float32), expected)
    multiply_plainly()
    assert torch.equal(model(x), x @ expected.T)


BLOCKS = {"blocks": (16, 16), "a scale for each": None, "some kept": (16, 16)}
KEPT = {"some kept": ("lm_head", "k_rope_proj", "o_proj", "layers.1.mlp.down_proj")}


@pytest.mark.parametrize(
    ("variant", "batch", "blocks"),
    [("mlra_4", 2, "blocks"), ("mlra_2", 1, "some kept"), ("mla", 4, "a scale for each"), ("mlra_4", 3, "some kept")],
)
def test_step_of_fp8_layers_equals_the_modules_of_their_numbers(variant, batch, blocks):
    """Of a model in float32: what is left is the order of the sums."""
    result = compare(
        variant, DEVICE, batch, lambda model: fp8_copy(model, BLOCKS[blocks], KEPT.get(blocks, ("lm_head",))),
        attn_output_gate=variant == "mlra_2",
    )  # fmt: skip
    assert result["counters"]
    assert max(result["logits"], result["rows"]) < FUSED_FLOAT32_RATIO


def test_which_weights_the_step_takes(monkeypatch):
    model = fp8_copy(tiny_model(dtype=torch.bfloat16).to(DEVICE), (16, 16))
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert obstacle(model, 1) is None
    assert is_plain(model)

    def trouble(layer, **changed):
        with patch.multiple(layer, **changed):
            return obstacle(model, 1)

    scale = mlp.gate_proj.weight_scale_inv
    assert "layers.1.mlp.gate_proj' has scales of torch.bfloat16" in trouble(
        mlp.gate_proj, weight_scale_inv=nn.Parameter(scale.bfloat16())
    )
    assert "(1, 2) for blocks of 16 x 16 of 20 x 24" in trouble(
        mlp.gate_proj, weight_scale_inv=nn.Parameter(scale[:1].clone())
    )
    assert "every 12 columns" in trouble(mlp.gate_proj, block_size=(16, 12))
    assert "different formats" in trouble(
        mlp.gate_proj, block_size=(32, 16), weight_scale_inv=nn.Parameter(scale[:1].clone())
    )
    assert "torch.float16, neither torch.bfloat16 nor float8" in trouble(
        attention.o_proj, weight=nn.Parameter(torch.zeros(24, 60, dtype=torch.float16))
    )
    assert "q_a_proj' has a bias" in trouble(attention.q_a_proj, bias=nn.Parameter(torch.zeros(10)))
    with patch.object(step_mlra, "tensor_parallel_mesh", lambda model: object()):
        assert "q_a_proj of layer 0 has scales for blocks of weights" in obstacle(model, 1).replace("self_attn.", "")
        assert obstacle(fp8_copy(tiny_model(dtype=torch.bfloat16).to(DEVICE), None), 1) is None
    monkeypatch.setattr(step_mlra, "device_facts", lambda device: DeviceFacts(float8=False))
    assert "capability 8.9" in obstacle(model, 1)
    assert obstacle(tiny_model(dtype=torch.bfloat16).to(DEVICE), 1) is None
