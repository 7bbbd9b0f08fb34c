"""Runs the Hopper kernels of linear maps as plain Python: every warpgroup a thread, on tensors of torch."""

import contextlib
import math
import types
from types import SimpleNamespace
from unittest.mock import patch

import torch

from modeling_mlra import (
    step_device_mlra,
    step_linear_stream_mlra,
    step_linear_streamed_products_mlra,
    step_maps_mlra,
)
from modeling_mlra.device_mlra import DeviceFacts, known_devices
from tests.gluon_in_python import Pointer
from tests.hopper_in_python import CopyEngine, as_pointers, stand_ins

MODULES = {
    "stream_linear_kernel": step_linear_stream_mlra,
    "streamed_product_kernel": step_linear_streamed_products_mlra,
}
HOPPER = DeviceFacts(nvidia=True, hopper=True)


def store(pointer: Pointer, value, mask=None):
    offset, value = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(value))
    wanted = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.broadcast_to(offset.shape)
    assert ((offset >= 0) & (offset < len(pointer.data)))[wanted].all(), "writes outside of a tensor"
    pointer.data[offset[wanted].long()] = value[wanted].to(pointer.data.dtype)


def atomic_add(pointer: Pointer, value, sem):
    before = pointer.data[int(pointer.offset)].clone()
    pointer.data[int(pointer.offset)] += value
    return before


def language_of(engine: CopyEngine, place: tuple, programs: tuple) -> dict:
    """What the code of the kernels is given to see, of the program at `place` in its grid."""
    scope, no_layout = stand_ins(0, engine), lambda *arguments, **options: None
    gl = scope["gl"]
    load = gl.load
    gl.load = lambda pointer, mask=None, other=0, **hints: load(pointer, mask, other)
    gl.store, gl.atomic_add, gl.sum = store, atomic_add, lambda x, axis: x.sum(axis)
    gl.program_id = lambda axis: torch.tensor(place[axis], dtype=torch.int32)
    gl.num_programs = lambda axis: torch.tensor(programs[axis], dtype=torch.int32)
    gl.to_tensor, gl.reshape, gl.permute = torch.tensor, torch.reshape, torch.permute
    gl.split = lambda x: x.unbind(-1)
    gl.inline_asm_elementwise = lambda text, constraints, arguments, dtype, **how: arguments[0].to(dtype)
    gl.BlockedLayout, gl.bfloat16 = no_layout, torch.bfloat16
    tl = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), rsqrt=torch.rsqrt, exp=torch.exp, float32=torch.float32, constexpr=None
    )
    return scope | {"tl": tl, "mma_v2": lambda a, b, acc: acc + a.float() @ b.float()}


def run_program(kernel, arguments, place: tuple, programs: tuple) -> None:
    """One program of the grid, with a copy engine of its own."""
    engine = CopyEngine(seed=sum(place))
    modules = step_device_mlra, step_maps_mlra, MODULES[kernel.__name__]
    scope = {name: value for module in modules for name, value in vars(module).items()}
    scope |= {n: types.FunctionType(f.fn.__code__, scope, n) for n, f in scope.items() if hasattr(f, "fn")}
    scope |= language_of(engine, place, programs)
    try:
        scope[kernel.__name__](*arguments)
    finally:
        engine.close()


def as_descriptor(value):
    """An argument as the kernels have it; of a descriptor also the shape of its blocks."""
    seen = as_pointers(value)
    if hasattr(value, "block_shape"):
        seen.block_shape = value.block_shape
    return seen


def launch(device, kernel, grid, *arguments, **options):
    names = [*kernel.arg_names][len(arguments) :]
    given = [*map(as_descriptor, arguments), *(options.get(name) for name in names)]
    programs = (*grid, 1)[:2]
    for index in range(math.prod(programs)):
        run_program(kernel, given, (index % programs[0], index // programs[0]), programs)


@contextlib.contextmanager
def in_python():
    """Hopper kernels of linear maps run here, and the CPU is taken for such a GPU."""
    with contextlib.ExitStack() as stack:
        for module in MODULES.values():
            stack.enter_context(patch.object(module, "launch", launch))
        stack.enter_context(patch.dict(known_devices, {torch.device("cpu"): HOPPER}))
        yield
