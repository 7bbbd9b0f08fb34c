"""Gluon kernel of a linear map of few vectors on Hopper GPUs: large weights stream through rings in shared memory.

A matrix times a few vectors takes as long as its weights take to arrive, so all that counts is that the copies never
stop: one program per multiprocessor keeps two rings of bulk tensor copies in flight, and fills them before it waits
for the kernel in front. What the warps of a program do is in `step_linear_rings_mlra`.
"""

from typing import Any

import torch

from .device_gluon_mlra import TensorDescriptor, gl, gluon
from .device_mlra import constants, launch, launch_options, triton
from .step_device_mlra import Machine
from .step_linear_rings_mlra import Inputs, Rings, RingTile, Scales
from .step_maps_mlra import GROUP, LinearMap, map_arguments

# Smaller weights are held in registers as a whole, and are there before a ring has turned
RING_BYTES = 32 * 2**20
RING_SHARED_BYTES = 227 * 2**10
stream_linear_kernel: Any = None

if gluon is not None and triton is not None:
    from .device_gluon_mlra import barrier, fence_async_shared, mbarrier, program_release, reinterpret
    from .step_linear_rings_mlra import fill_rings, multiply_blocks

    @gluon.jit
    def stream_linear_kernel(
        w, w_up, scales, n, x, norm, out,
        SHAPE, TILE, PDL: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """A linear map of one weight, or a SwiGLU of two: every program copies and multiplies its row blocks."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        BUFFERS: gl.constexpr = 2 * TILE.STAGES
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        words = gl.allocate_shared_memory(w.dtype, [BUFFERS * PARTS, TILE.ROWS, w.block_shape[1]], w.layout)
        tiles = words
        if SHAPE.BLOCK_COLUMNS > 0:
            LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            tiles = reinterpret(words, gl.float8e4nv, [BUFFERS * PARTS, TILE.ROWS, TILE.COLUMNS], LINES)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        x_buf = gl.allocate_shared_memory(x.data.dtype.element_ty, [SHAPE.M * TILES, TILE.COLUMNS], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(BUFFERS):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        mbarrier.init(x_full, count=1)
        fence_async_shared()
        barrier()
        program_release(PDL)
        p = gl.program_id(0)
        P = gl.num_programs(0)
        rings = Rings(tiles, words, full, empty)
        inputs = Inputs(x_buf, x_full)
        gl.warp_specialize(
            [
                (multiply_blocks, (rings, inputs, x, norm, out, scales, n, p, P, 0, SHAPE, TILE, PDL)),
                (multiply_blocks, (rings, inputs, x, norm, out, scales, n, p, P, 1, SHAPE, TILE, PDL)),
                (fill_rings, (w, w_up, n, rings, p, P, SHAPE, TILE)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


def ring_plan(itemsize: int, swiglu: bool, vectors: int) -> dict[str, int]:
    """Rings of 64 KB for each of the two warpgroups, of 8 bits 48, chosen on an H200 with
    `python -m scripts.bench_fused`.

    One vector leaves registers for programs of the small kernels around this one.
    """
    plan = {"ROWS": 8, "COLUMNS": 2048 // itemsize // (2 if swiglu else 1), "STAGES": 4, "num_warps": 4}
    if itemsize == 1:
        plan["STAGES"] = 3
    return plan | ({"REGISTERS": 136, "maxnreg": 104} if vectors == 1 else {"REGISTERS": 232, "maxnreg": 168})


def streams(linear_map: LinearMap, vectors: int) -> bool:
    """Whether a map can go, and is worth going, through rings: one weight or the two of a SwiGLU, large, their rows
    fit for bulk copies, the vectors for shared memory. Of weights of 8 bits the two of a SwiGLU, of one vector: single
    ones (down_proj, out) were slower than in registers, more vectors never measured."""
    weights, inner = linear_map.numbers, linear_map.inner
    if stream_linear_kernel is None or linear_map.nbytes < RING_BYTES:
        return False
    if len(weights) > 1 and not linear_map.swiglu:
        return False
    if linear_map.is_scaled and not (linear_map.swiglu and vectors == 1):
        return False
    itemsize = weights[0].element_size()
    plan = ring_plan(itemsize, linear_map.swiglu, vectors)
    rings = 2 * plan["STAGES"] * len(weights) * plan["ROWS"] * plan["COLUMNS"] * itemsize
    held = vectors * triton.cdiv(inner, plan["COLUMNS"]) * plan["COLUMNS"] * max(itemsize, 4 * linear_map.is_scaled)
    return rings + held + 1024 <= RING_SHARED_BYTES and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and inner * itemsize % 16 == 0 for w in weights
    )


def run_as_stream(linear_map: LinearMap, x, out, residual, machine: Machine) -> None:
    """`step_linear_mlra.run` for a few vectors and a map that `streams`. Weights of 8 bits are copied as words of 32:
    a box of a copy has 256 of them at most, and so takes all columns of a tile."""
    weights = linear_map.numbers
    rows = weights[0].shape[0]
    plan = ring_plan(weights[0].element_size(), linear_map.swiglu, x.shape[0]) | {"GROUP": GROUP}
    tile = RingTile(*(plan.pop(name) for name in RingTile._fields))
    words = [w.view(torch.int32) for w in weights] if linear_map.is_scaled else weights
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * words[0].element_size(), rank=2)
    block = [tile.ROWS, tile.COLUMNS * weights[0].element_size() // words[0].element_size()]
    descriptors = [TensorDescriptor(w, list(w.shape), [w.stride(0), 1], block, layout) for w in words]
    scales = Scales(linear_map.scales[0], linear_map.scales[-1])
    *arguments, shape = map_arguments(linear_map, x, out, residual)
    launch(
        x.device, stream_linear_kernel, (min(triton.cdiv(rows, 2 * tile.ROWS), machine.multiprocessors),),
        descriptors[0], descriptors[-1], scales, rows, *arguments,
        SHAPE=shape, TILE=constants(tile), PDL=machine.early, **plan, **launch_options(machine.early),
    )  # fmt: skip
