"""The Hopper kernels of linear maps against float64: as plain Python threads, and on a GPU at released sizes.

What the hardware adds (layouts, fences, the widening of 8 bits in registers) is left to the tests marked `gpu`.
"""

import contextlib

import pytest
import torch
from torch import nn

from modeling_mlra import (
    device_mlra,
    step_linear_mlra,
    step_linear_stream_mlra,
    step_linear_streamed_products_mlra,
)
from modeling_mlra.modeling_mlra import MLRARMSNorm
from modeling_mlra.step_device_mlra import machine_of
from modeling_mlra.step_maps_mlra import LinearMap
from tests import test_fused_weights
from tests.linear_in_python import in_python
from tests.models import rms_ratio
from tests.tolerances import FUSED_FLOAT32_RATIO, KERNEL_BF16_RATIO

pytest.importorskip("triton.experimental.gluon")
DEVICE = test_fused_weights.DEVICE
as_python = pytest.mark.skipif(not device_mlra.INTERPRETED, reason="runs the code of kernels as Python")


def plans(monkeypatch, module, name, **changed):
    plan = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: plan(*arguments) | changed)


def check(maps, x, names, way, limit):
    """Each map goes the way that was asked for, and gives its result."""
    with in_python() if device_mlra.INTERPRETED else contextlib.nullcontext():
        machine = machine_of(torch.device(DEVICE))
        for name in names:
            linear_map, residual, expected = maps[name]
            assert step_linear_mlra.runner_of(linear_map, len(x), machine, x.dtype).__name__ == way, name
            out = torch.full(expected.shape, torch.nan, dtype=x.dtype, device=DEVICE)
            step_linear_mlra.run(linear_map, x, out, machine, residual)
            assert rms_ratio(expected, out.double()) < limit, name


SCALED = {
    "whole": (64, 22, None, ("norm", "swiglu", "residual")),
    "blocks": (96, 20, (16, 32), ("norm", "swiglu", "residual")),
    "rows": (80, 18, (1, 80), ("norm", "swiglu", "residual")),
    "rows in pairs": (72, 22, None, ("residual",)),
    "rows in pairs, blocks": (104, 12, (16, 16), ("residual",)),
    "rows in pairs, a scale each": (40, 14, (1, 40), ("residual",)),
}
"""Name -> K, rows, rows and columns that share a scale, maps."""


@as_python
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("shape", SCALED)
def test_weights_of_8_bits_through_rings(shape, vectors, monkeypatch):
    inner, rows, block, names = SCALED[shape]
    x, maps = test_fused_weights.cases(inner, (rows,), vectors, block, torch.float32)
    monkeypatch.setattr(step_linear_stream_mlra, "SCALED_RING_BYTES", 0)
    plans(monkeypatch, step_linear_stream_mlra, "ring_plan", ROWS=2, COLUMNS=32, STAGES=2)
    check(maps, x, names, "run_as_stream", FUSED_FLOAT32_RATIO)


def plain_cases(inner: int, sizes: tuple[int, ...], vectors: int) -> tuple[torch.Tensor, dict]:
    """bfloat16 vectors, and name -> map of plain weights, residual and float64 result."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)

    norm = MLRARMSNorm(inner, 1e-6).bfloat16().to(DEVICE)
    norm.weight.data.copy_(normal(inner))
    x, before = normal(vectors, inner + 8)[:, :inner], normal(vectors, sum(sizes))
    weights, up = tuple(normal(n, inner) / inner**0.5 for n in sizes), normal(sizes[0], inner) / inner**0.5
    stacked, wide = torch.cat(weights).double(), x.double()
    normed = (wide * norm.weight.double()).bfloat16().double()  # rounded, as products take 16-bit numbers
    normed *= (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gated = nn.functional.silu(normed @ weights[0].double().T) * (normed @ up.double().T)
    return x, {
        "norm": (LinearMap(weights, norm, 0.7), None, 0.7 * normed @ stacked.T),
        "swiglu": (LinearMap((weights[0], up), norm, swiglu=True), None, gated),
        "residual": (LinearMap(weights, residual_share=0.5), before, wide @ stacked.T + 0.5 * before.double()),
    }


@as_python
@pytest.mark.parametrize("vectors", [3, 16])
@pytest.mark.parametrize(
    ("inner", "rows", "splits", "names"),
    [(64, 40, 1, ("norm", "swiglu", "residual")), (104, 150, 1, ("norm", "swiglu")), (136, 70, 3, ("residual",))],
)
def test_products_of_streamed_weights(inner, rows, splits, names, vectors, monkeypatch):
    """Rows and columns that end inside, columns split over programs, one and many turns of the rings."""
    x, maps = plain_cases(inner, (rows,), vectors)
    monkeypatch.setattr(step_linear_streamed_products_mlra, "STREAMED_BYTES", 0)
    plans(monkeypatch, step_linear_streamed_products_mlra, "streamed_plan", COLUMNS=32, STAGES=2, SPLITS=splits)
    check(maps, x, names, "run_as_streamed_products", KERNEL_BF16_RATIO)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [None, (128, 128), "rows"])
@pytest.mark.parametrize(
    ("inner", "rows", "names"),
    [(3072, 9880, ("norm", "swiglu", "residual")), (9880, 3072, ("residual",)), (1048, 66, ("residual",))],
)
def test_gpu_weights_of_8_bits_through_rings(inner, rows, names, block, dtype, monkeypatch):
    block = (1, inner) if block == "rows" else block
    x, maps = test_fused_weights.cases(inner, (rows,), 1, block, dtype)
    monkeypatch.setattr(step_linear_stream_mlra, "SCALED_RING_BYTES", 0)
    check(maps, x, names, "run_as_stream", FUSED_FLOAT32_RATIO if dtype == torch.float32 else KERNEL_BF16_RATIO)


@pytest.mark.gpu
@pytest.mark.parametrize("vectors", [3, 16])
@pytest.mark.parametrize(
    ("inner", "rows", "names"),
    [(3072, 9880, ("norm", "swiglu", "residual")), (9880, 3072, ("residual",)), (1000, 50, ("norm", "swiglu"))],
)
def test_gpu_products_of_streamed_weights(inner, rows, names, vectors, monkeypatch):
    x, maps = plain_cases(inner, (rows,), vectors)
    monkeypatch.setattr(step_linear_streamed_products_mlra, "STREAMED_BYTES", 0)
    check(maps, x, names, "run_as_streamed_products", KERNEL_BF16_RATIO)
