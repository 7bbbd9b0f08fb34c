"""The Hopper kernel of linear maps against float64: as plain Python threads, and on a GPU at released sizes.

What the hardware adds (layouts, fences, the widening of 8 bits in registers) is left to the tests marked `gpu`.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

from modeling_mlra import (
    device_mlra,
    step_linear_mlra,
    step_linear_registers_mlra,
    step_linear_stream_mlra,
)
from modeling_mlra.step_device_mlra import machine_of
from modeling_mlra.step_maps_mlra import WHOLE, LinearMap, ScaledWeight
from tests import test_fused_weights
from tests.linear_in_python import in_python
from tests.models import rms_ratio
from tests.quantized import exact
from tests.tolerances import FUSED_FLOAT32_RATIO, KERNEL_BF16_RATIO

pytest.importorskip("triton.experimental.gluon")
DEVICE = test_fused_weights.DEVICE
as_python = pytest.mark.skipif(not device_mlra.INTERPRETED, reason="runs the code of kernels as Python")


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


SHAPES = {
    "whole": (64, 22, None),
    "blocks": (96, 20, (16, 32)),
    "rows": (80, 18, (1, 80)),
    "rows that end inside": (48, 7, (4, 16)),
}
"""Name -> K, rows, rows and columns that share a scale."""


def through_rings(monkeypatch):
    """Small maps too, in tiles that rows and columns end inside."""
    monkeypatch.setattr(step_linear_stream_mlra, "RING_BYTES", 0)
    plan = step_linear_stream_mlra.ring_plan
    small = {"ROWS": 2, "COLUMNS": 32, "STAGES": 2}
    monkeypatch.setattr(step_linear_stream_mlra, "ring_plan", lambda *arguments: plan(*arguments) | small)


@as_python
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_and_up_of_8_bits_through_rings(shape, monkeypatch):
    inner, rows, block = SHAPES[shape]
    x, maps = test_fused_weights.cases(inner, (rows,), 1, block, torch.float32)
    through_rings(monkeypatch)
    check(maps, x, ("swiglu",), "run_as_stream", FUSED_FLOAT32_RATIO)


@as_python
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_weights_through_rings(shape, vectors, monkeypatch):
    inner, rows, block = SHAPES[shape]
    x, maps = test_fused_weights.cases(inner, (rows,), vectors, block, torch.float32)
    plain = {
        name: (replace(linear_map, weights=tuple(exact(w).float() for w in linear_map.weights)), *rest)
        for name, (linear_map, *rest) in maps.items()
    }
    through_rings(monkeypatch)
    check(plain, x, plain, "run_as_stream", FUSED_FLOAT32_RATIO)


RELEASED = {
    # Gate and up projection: rows, columns -> one GPU; a rank of two, which are too small; rows 8 bytes off 16
    "gate and up": ((9880, 3072), True, "run_as_stream"),
    "gate and up on 2 ranks": ((4940, 3072), True, "run_in_registers"),
    "gate and up, rows of no whole vectors": ((9880, 3080), True, "run_in_registers"),
    "down_proj": ((3072, 9880), False, "run_in_registers"),
    "down_proj, as large": ((12288, 9888), False, "run_in_registers"),
    "vocabulary": ((50304, 3072), False, "run_in_registers"),
    "out": ((3072, 3072), False, "run_in_registers"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_which_weights_of_8_bits_go_through_rings(name):
    """At released sizes; never for more vectors than one, nor on other GPUs than Hopper's."""
    shape, swiglu, expected = RELEASED[name]
    weight = ScaledWeight(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(1, 1), (WHOLE, WHOLE))
    linear_map = LinearMap((weight,) * (1 + swiglu), swiglu=swiglu)
    machine = machine_of(torch.device("cpu"))._replace(hopper=True)
    assert step_linear_mlra.runner_of(linear_map, 1, machine).__name__ == expected
    assert step_linear_mlra.runner_of(linear_map, 2, machine).__name__ == "run_in_registers"
    assert step_linear_mlra.runner_of(linear_map, 3, machine).__name__ == "run_as_products"
    assert step_linear_mlra.runner_of(linear_map, 1, machine._replace(hopper=False)).__name__ == "run_in_registers"


@pytest.mark.parametrize(
    ("shape", "vectors", "rows"),
    [((4608, 1024), 1, 8), ((4608, 1024), 2, 16), ((1024, 3072), 1, 4), ((40, 512), 1, 32)],
)
def test_rows_of_programs_of_8_bits(shape, vectors, rows):
    """Query of eight; what was not measured goes by the rule of plain weights."""
    weight = ScaledWeight(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(1, 1), (WHOLE, WHOLE))
    scaled, plain = LinearMap((weight,)), LinearMap((torch.empty(shape, dtype=torch.bfloat16),))
    assert step_linear_registers_mlra.register_plan(scaled, vectors, False)["ROWS"] == rows
    assert step_linear_registers_mlra.register_plan(plain, vectors, False)["ROWS"] == 16384 // max(
        512, 2 ** (shape[1] - 1).bit_length()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [None, (128, 128), "rows"])
@pytest.mark.parametrize(("inner", "rows"), [(3072, 9880), (1040, 66), (2064, 8 * 132 * 2 + 3)])
def test_gpu_gate_and_up_of_8_bits_through_rings(inner, rows, block, dtype, monkeypatch):
    x, maps = test_fused_weights.cases(inner, (rows,), 1, (1, inner) if block == "rows" else block, dtype)
    monkeypatch.setattr(step_linear_stream_mlra, "RING_BYTES", 0)
    limit = FUSED_FLOAT32_RATIO if dtype == torch.float32 else KERNEL_BF16_RATIO
    check(maps, x, ("swiglu",), "run_as_stream", limit)
