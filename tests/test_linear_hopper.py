"""The Hopper kernel of linear maps against float64: as plain Python threads, and on a GPU at released sizes.

What the hardware adds (layouts, fences, the widening of 8 bits in registers) is left to the tests marked `gpu`.
"""

import contextlib

import pytest
import torch

from modeling_mlra import (
    device_mlra,
    step_linear_mlra,
    step_linear_stream_mlra,
)
from modeling_mlra.step_device_mlra import machine_of
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
            assert step_linear_mlra.runner_of(linear_map, len(x), machine).__name__ == way, name
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
