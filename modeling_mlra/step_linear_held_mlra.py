"""Gluon kernel of a linear map of one vector on Hopper GPUs, weights held in registers as tensor cores take them.

What a program does once the kernel in front has ended is on the step's critical path, and there a product of 16 x 16
weights is one instruction of a warp. A program has 16 rows, and each warp columns of its own; weights of 8 bits are
widened before the wait. The vector is rounded to its own dtype after its multiplication by gamma, as in the modules.
The eight columns of a product are equal: their sum over eight is exact.
"""

from typing import Any, NamedTuple

import torch

from .device_gluon_mlra import gl, gluon
from .device_mlra import constants, launch, launch_options, triton
from .step_device_mlra import Machine
from .step_maps_mlra import LinearMap, map_arguments, stacked

ROWS = 16  # of a program: the height of the product
HELD = False  # whether maps go this way
held_linear_kernel: Any = None


class HeldTile(NamedTuple):
    """WIDTH columns of each warp at a time, of which a thread loads KWIDTH in a row; CHAINS sums are independent.
    RELEASE: the kernel behind is released before the weights are asked for (0), after (1), or when they are widened
    (2). The compiler widens behind the wait, in fewer registers, unless it is 2."""

    ROWS: Any
    WIDTH: Any
    KWIDTH: Any
    CHAINS: Any
    RELEASE: Any


if gluon is not None and triton is not None:
    from .device_gluon_mlra import mma_v2, program_release, program_wait, reinterpret
    from .step_device_mlra import rms_factor
    from .step_maps_mlra import block_of

    @gluon.jit
    def _widened(tile, DTYPE: gl.constexpr):
        """The numbers that stored weights stand for, but for their scale; where it stands, in front of the wait.

        An e4m3 number's seven bits are those of a bfloat16 whose exponent is 120 short; its NaN becomes 480.
        """
        if tile.dtype == DTYPE or gl.bfloat16 != DTYPE:
            return tile.to(DTYPE)
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, f;
            mov.b32 f, 0x7B807B80;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 c, $2, 0, 0x3424;
            shr.u32 b, a, 4;
            shr.u32 d, c, 4;
            and.b32 b, b, 0x07F007F0;
            and.b32 d, d, 0x07F007F0;
            lop3.b32 a, a, 0x80008000, b, 0xEA;
            lop3.b32 c, c, 0x80008000, d, 0xEA;
            mul.rn.bf16x2 $0, a, f;
            mul.rn.bf16x2 $1, c, f;
            }""",
            "=r,=r,r", [tile], dtype=gl.bfloat16, is_pure=False, pack=4,
        )  # fmt: skip

    @gluon.jit
    def _weight_chunks(w, rows, n, CHUNKS: gl.constexpr, A: gl.constexpr, SHAPE, TILE, num_warps: gl.constexpr):
        """Chunks [warps, ROWS, WIDTH] of a row block's weights, as they are stored."""
        warps = gl.arange(0, num_warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, A)))
        columns = gl.arange(0, TILE.WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, A)))
        warps = gl.expand_dims(gl.expand_dims(warps, 1), 2)
        columns = gl.expand_dims(gl.expand_dims(columns, 0), 1) + warps * TILE.WIDTH
        source = w + (rows.to(gl.int64) * SHAPE.K + columns)
        chunks = ()
        for chunk in gl.static_range(CHUNKS):
            known = (rows < n) & (columns < SHAPE.K - chunk * num_warps * TILE.WIDTH)
            at = source + chunk * num_warps * TILE.WIDTH
            chunks = chunks + (gl.load(at, mask=known, other=0.0, eviction_policy="evict_first"),)  # type: ignore[assignment]
        return chunks

    @gluon.jit
    def _chunk_scales(s, block, n, CHUNKS: gl.constexpr, SUMS: gl.constexpr, SHAPE, TILE, num_warps: gl.constexpr):
        """The scales [warps, ROWS] of each chunk, or of all of them."""
        PER_ROW: gl.constexpr = (SHAPE.K + SHAPE.BLOCK_COLUMNS - 1) // SHAPE.BLOCK_COLUMNS
        warps = gl.expand_dims(gl.arange(0, num_warps, layout=gl.SliceLayout(1, SUMS)), 1)
        rows = gl.expand_dims(gl.arange(0, TILE.ROWS, layout=gl.SliceLayout(0, SUMS)), 0) + block * TILE.ROWS
        scales = ()
        for chunk in gl.static_range(1 if PER_ROW == 1 else CHUNKS):
            column = (chunk * num_warps + warps) * TILE.WIDTH
            at = s + (rows // SHAPE.BLOCK_ROWS * PER_ROW + column // SHAPE.BLOCK_COLUMNS)
            scales = scales + (gl.load(at, mask=(rows < n) & (column < SHAPE.K), other=0.0),)  # type: ignore[assignment]
        return scales

    @gluon.jit
    def held_linear_kernel(x, norm, out, stack, SHAPE, TILE, PDL: gl.constexpr, num_warps: gl.constexpr):
        """16 rows of a linear map of one vector."""
        CHUNKS: gl.constexpr = (SHAPE.K + num_warps * TILE.WIDTH - 1) // (num_warps * TILE.WIDTH)
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
        A: gl.constexpr = gl.DotOperandLayout(0, MMA, TILE.KWIDTH)
        B: gl.constexpr = gl.DotOperandLayout(1, MMA, TILE.KWIDTH)
        SUMS: gl.constexpr = gl.SliceLayout(2, MMA)
        OF_ROW: gl.constexpr = gl.SliceLayout(0, SUMS)
        DTYPE: gl.constexpr = x.data.dtype.element_ty
        weight, n, first, block = block_of(gl.program_id(0), stack, TILE.ROWS)
        rows = gl.arange(0, TILE.ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, A)))
        rows = gl.expand_dims(gl.expand_dims(rows, 0), 2) + block * TILE.ROWS
        if TILE.RELEASE == 0:
            program_release(PDL)
        stored = _weight_chunks(weight[0], rows, n, CHUNKS, A, SHAPE, TILE, num_warps)
        scales = ()
        if SHAPE.BLOCK_COLUMNS > 0:
            scales = _chunk_scales(weight[1], block, n, CHUNKS, SUMS, SHAPE, TILE, num_warps)
        SIZE: gl.constexpr = triton.next_power_of_2(CHUNKS) * num_warps * TILE.WIDTH
        FLAT: gl.constexpr = gl.BlockedLayout([8], [32], [num_warps], [0])
        if SHAPE.NORM:
            columns = gl.arange(0, SIZE, layout=FLAT)
            gamma = gl.load(norm.gamma + columns, mask=columns < SHAPE.K, other=0.0)
        if TILE.RELEASE == 1:
            program_release(PDL)
        weights = ()
        for chunk in gl.static_range(CHUNKS):
            weights = weights + (_widened(stored[chunk], DTYPE),)  # type: ignore[assignment]
        if TILE.RELEASE == 2:
            program_release(PDL)
        target = first + block * TILE.ROWS + gl.arange(0, TILE.ROWS, layout=OF_ROW)
        inside = target < first + n
        program_wait(PDL)
        if SHAPE.RESIDUAL:
            before = gl.load(out.residual + target, mask=inside, other=0.0).to(gl.float32)
        vectors, factor = (), 1.0
        if SHAPE.NORM:
            exact = gl.load(x.data + columns, mask=columns < SHAPE.K, other=0.0).to(gl.float32)
            held = gl.allocate_shared_memory(DTYPE, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            held.store((exact * gamma.to(gl.float32)).to(DTYPE))
            factor = rms_factor(gl.sum(exact * exact, 0), SHAPE.K, norm)
            LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            lines = reinterpret(held, DTYPE, [SIZE // (num_warps * TILE.WIDTH), num_warps, TILE.WIDTH], LINES)
            for chunk in gl.static_range(CHUNKS):
                vectors = vectors + (lines.index(chunk).load(gl.SliceLayout(2, B)),)  # type: ignore[assignment]
        else:
            warps = gl.expand_dims(gl.arange(0, num_warps, layout=gl.SliceLayout(1, gl.SliceLayout(2, B))), 1)
            places = gl.expand_dims(gl.arange(0, TILE.WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, B))), 0)
            for chunk in gl.static_range(CHUNKS):
                column = (chunk * num_warps + warps) * TILE.WIDTH + places
                vectors = vectors + (gl.load(x.data + column, mask=column < SHAPE.K, other=0.0),)  # type: ignore[assignment]
        total = gl.zeros([num_warps, TILE.ROWS, 8], gl.float32, layout=MMA)
        PER_CHAIN: gl.constexpr = (CHUNKS + TILE.CHAINS - 1) // TILE.CHAINS
        for chain in gl.static_range(TILE.CHAINS):
            acc = gl.zeros([num_warps, TILE.ROWS, 8], gl.float32, layout=MMA)
            for place in gl.static_range(PER_CHAIN):
                if chain * PER_CHAIN + place < CHUNKS:
                    vector = gl.expand_dims(vectors[chain * PER_CHAIN + place], 2)
                    vector = vector.broadcast_to([num_warps, TILE.WIDTH, 8])
                    acc = mma_v2(weights[chain * PER_CHAIN + place], vector, acc)
            if SHAPE.BLOCK_COLUMNS > 0:
                acc *= gl.expand_dims(scales[chain if len(scales) > 1 else 0], 2)  # type: ignore[misc]
            total += acc
        y = gl.sum(gl.sum(total, 2), 0) * (factor * 0.125)
        if SHAPE.RESIDUAL:
            y += before * out.share
        gl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=inside)


def held_plan(linear_map: LinearMap) -> dict[str, int]:
    """Columns of a chunk and warps of a program."""
    return {"WIDTH": 64, "num_warps": 8 if linear_map.inner > 2048 else 4}


def holds(linear_map: LinearMap, dtype: torch.dtype, vectors: int) -> bool:
    """Whether a map can go this way: one vector of 16 bits, rows that fit into registers and are read in whole 16
    bytes, scales of whole chunks."""
    if not HELD or held_linear_kernel is None or vectors != 1 or linear_map.swiglu or linear_map.inner > 4096:
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    itemsize, columns = linear_map.numbers[0].element_size(), linear_map.block[1]
    width = held_plan(linear_map)["WIDTH"]
    return linear_map.inner * itemsize % 16 == 0 and (columns % width == 0 or columns >= linear_map.inner)


def run_held(linear_map: LinearMap, x, out, residual, machine: Machine) -> None:
    """`step_linear_mlra.run` for a map that this kernel `holds`."""
    plan = held_plan(linear_map)
    chunks = triton.cdiv(linear_map.inner, plan["WIDTH"] * plan["num_warps"])
    scaled_chunks = 0 < linear_map.block[1] < linear_map.inner
    plan = {"CHAINS": chunks if scaled_chunks else min(3, chunks), "RELEASE": 2} | plan
    plan |= {"ROWS": ROWS, "KWIDTH": 16 // linear_map.numbers[0].element_size()}
    tile = HeldTile(*(plan.pop(name) for name in HeldTile._fields))
    blocks, stack = stacked(linear_map, ROWS)
    *arguments, shape = map_arguments(linear_map, x, out, residual)
    launch(
        x.device, held_linear_kernel, (blocks,), *arguments, stack,
        SHAPE=shape, TILE=constants(tile), PDL=machine.early, **plan, **launch_options(machine.early),
    )  # fmt: skip
