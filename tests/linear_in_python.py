"""Runs the Hopper kernel of linear maps as plain Python: every warpgroup a thread, on tensors of torch."""

import contextlib
import types
from types import SimpleNamespace
from unittest.mock import patch

import torch

from modeling_mlra import step_device_mlra, step_linear_rings_mlra, step_linear_stream_mlra, step_maps_mlra
from modeling_mlra.device_mlra import DeviceFacts, known_devices
from tests.gluon_in_python import Pointer
from tests.hopper_in_python import CopyEngine, as_pointers, stand_ins

HOPPER = DeviceFacts(nvidia=True, hopper=True)


def store(pointer: Pointer, value, mask=None):
    offset, value = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(value))
    wanted = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.broadcast_to(offset.shape)
    assert ((offset >= 0) & (offset < len(pointer.data)))[wanted].all(), "writes outside of a tensor"
    pointer.data[offset[wanted].long()] = value[wanted].to(pointer.data.dtype)


def language_of(engine: CopyEngine, program: int, programs: int) -> dict:
    """What the code of the kernel is given to see, of one of so many programs."""
    scope = stand_ins(program, engine)
    gl = scope["gl"]
    gl.store, gl.sum = store, lambda x, axis: x.sum(axis)
    gl.num_programs = lambda axis: torch.tensor(programs, dtype=torch.int32)
    gl.to_tensor, gl.reshape, gl.maximum = torch.tensor, torch.reshape, torch.clamp
    gl.float8e4nv = torch.float8_e4m3fn
    gl.BlockedLayout = lambda *arguments: None
    tl = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), rsqrt=torch.rsqrt, exp=torch.exp, float32=torch.float32, constexpr=None
    )
    return scope | {"tl": tl}


def as_descriptor(value):
    """An argument as the kernels have it; of a descriptor also the shape of its blocks."""
    seen = as_pointers(value)
    if hasattr(value, "block_shape"):
        seen.block_shape = value.block_shape
    return seen


def launch(device, kernel, grid, *arguments, **options):
    """In place of `device_mlra.launch`: one program after the other, with a copy engine of its own."""
    modules = step_device_mlra, step_maps_mlra, step_linear_rings_mlra, step_linear_stream_mlra
    names = [*kernel.arg_names][len(arguments) :]
    for program in range(grid[0]):
        engine = CopyEngine(seed=program)
        scope = {name: value for module in modules for name, value in vars(module).items()}
        scope |= {n: types.FunctionType(f.fn.__code__, scope, n) for n, f in scope.items() if hasattr(f, "fn")}
        scope |= language_of(engine, program, grid[0])
        try:
            scope[kernel.__name__](*map(as_descriptor, arguments), *(options.get(name) for name in names))
        finally:
            engine.close()


@contextlib.contextmanager
def in_python():
    """The Hopper kernel of linear maps runs here, and the CPU is taken for such a GPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(step_linear_stream_mlra, "launch", launch))
        stack.enter_context(patch.dict(known_devices, {torch.device("cpu"): HOPPER}))
        yield
