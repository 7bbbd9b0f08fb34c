"""Gluon kernel of a linear map of several vectors on Hopper GPUs: large weights stream through rings, vectors stay.

One program per multiprocessor keeps its columns of all vectors in shared memory, and streams the rows of its weights
past them through two rings of bulk tensor copies, filled before it waits for the kernel in front. The columns of wide
weights are split over SPLITS programs; the last to arrive at a row block adds up.

Legend: M vectors, padded to 16, K inputs; a tile is 16 rows (of a SwiGLU 8 of each weight) by COLUMNS columns, a
quarter of which each of the four warps of a warpgroup multiplies; a row block is those rows.
"""

from typing import Any, NamedTuple

import torch

from .device_gluon_mlra import TensorDescriptor, gl, gluon
from .device_mlra import constants, launch, launch_options, triton
from .step_device_mlra import Machine, Vectors
from .step_linear_products_mlra import Sums
from .step_maps_mlra import LinearMap, map_arguments

STREAMED_BYTES = 2**60  # smaller weights go another way: all
VECTORS = 16
SHARED_BYTES = 226 * 2**10
streamed_product_kernel: Any = None


class StreamTile(NamedTuple):
    """COLUMNS of a tile, STAGES of them in each of the two rings, TILES to a split of the columns."""

    COLUMNS: Any
    STAGES: Any
    TILES: Any
    SPLITS: Any


class StreamRings(NamedTuple):
    """Buffers of tiles [2 * STAGES, 16, warps, columns], the same as words to be copied, and their barriers."""

    tiles: Any
    words: Any
    full: Any
    empty: Any


class Kept(NamedTuple):
    """This program's columns of the vectors [TILES, 16, warps, columns], the vectors' factors, and a barrier."""

    tiles: Any
    factors: Any
    full: Any


if gluon is not None and triton is not None:
    from .device_gluon_mlra import (
        barrier,
        bulk_load,
        fence_async_shared,
        mbarrier,
        mma_v2,
        program_release,
        program_wait,
        reinterpret,
    )
    from .step_device_mlra import rms_factor, swiglu

    @gluon.jit
    def _blocks_of(blocks, first, P):
        """How many of the row blocks first, first + 2 P, ... there are."""
        return (blocks - first + (2 * P - 1)) // (2 * P)

    @gluon.jit
    def _fill_stream(w, w_up, n, rings, p, P, split, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """The copying warp: the tiles of both computing warpgroups, as soon as their buffers are free."""
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        EACH: gl.constexpr = 16 // PARTS
        blocks = (n + EACH - 1) // EACH
        for t in range(0, _blocks_of(blocks, p, P) * TILE.TILES):
            column = (split * TILE.TILES + t % TILE.TILES) * w.block_shape[1]
            for wg in gl.static_range(2):
                block = p + wg * P + (t // TILE.TILES) * (2 * P)
                if block < blocks:
                    stage = wg * TILE.STAGES + t % TILE.STAGES
                    bar = rings.full.index(stage)
                    mbarrier.wait(rings.empty.index(stage), ((t // TILE.STAGES) & 1) ^ 1)
                    mbarrier.expect(bar, PARTS * w.block_type.nbytes)
                    bulk_load(w, [block * EACH, column], bar, rings.words.index(stage * PARTS))
                    if SHAPE.SWIGLU:
                        bulk_load(w_up, [block * EACH, column], bar, rings.words.index(stage * PARTS + 1))

    @gluon.jit
    def _keep_vectors(
        x, norm, kept, first, WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr
    ):
        """Puts half of the vectors, times gamma, into shared memory, and what they are to be multiplied by."""
        WIDTH: gl.constexpr = TILE.COLUMNS // 4
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // WIDTH, WIDTH // 8], [4, 1, 1], [2, 1, 0])
        OF_VECTOR: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
        warps = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
        columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
        m = WG * 8 + gl.arange(0, 8, layout=OF_VECTOR)
        m = gl.expand_dims(gl.expand_dims(m, 1), 2)
        columns = gl.expand_dims(gl.expand_dims(columns, 0), 1) + gl.expand_dims(gl.expand_dims(warps, 0), 2) * WIDTH
        columns = columns + first
        gammas = ()
        if SHAPE.NORM:
            for tile in gl.static_range(TILE.TILES):
                column = columns + tile * TILE.COLUMNS
                gammas = gammas + (gl.load(norm.gamma + column, mask=column < SHAPE.K, other=0.0),)  # type: ignore[assignment]
        program_wait(PDL)
        halves = reinterpret(
            kept.tiles,
            x.data.dtype.element_ty,
            [TILE.TILES * 2, 8, 4, WIDTH],
            gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]),
        )
        values = ()
        for tile in gl.static_range(TILE.TILES):
            known = (m < SHAPE.M) & (columns + tile * TILE.COLUMNS < SHAPE.K)
            value = gl.load(x.data + m * (x.stride * 8) + columns + tile * TILE.COLUMNS, mask=known, other=0.0)
            values = values + (value,)  # type: ignore[assignment]
        squares = gl.zeros([8, 4, WIDTH], gl.float32, layout=LAYOUT)
        for tile in gl.static_range(TILE.TILES):
            value = values[tile]
            if SHAPE.NORM:
                exact = value.to(gl.float32)  # type: ignore[var-annotated]
                squares += exact * exact
                value = (exact * gammas[tile].to(gl.float32)).to(value.dtype)
            halves.index(tile * 2 + WG).store(value)
        if SHAPE.NORM:
            factor = rms_factor(gl.sum(gl.sum(squares, 2), 1), SHAPE.K, norm)
            reinterpret(kept.factors, gl.float32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(WG).store(
                factor
            )

    @gluon.jit
    def _add_up_splits(y, index, sums, block, split, OUT: gl.constexpr, SPLITS: gl.constexpr):
        """Leaves sums [16, 16] of one split; whether it is the last of its row block, and the sums of all then."""
        place = sums.products + block * (SPLITS * 256) + index
        gl.store(place + split * 256, y)
        barrier()  # all of the warpgroup's sums are there before it counts as arrived
        last = gl.atomic_add(sums.arrived + block, 1, sem="acq_rel") == SPLITS - 1
        barrier()
        if last:
            gl.store(sums.arrived + block, 0)
            y = gl.zeros([16, 16], gl.float32, layout=OUT)
            for i in gl.static_range(SPLITS):
                y += gl.load(place + i * 256, cache_modifier=".cg")
        return last, y

    @gluon.jit
    def _store_block(y, kept, out, n, rows, m, OUT: gl.constexpr, SHAPE: gl.constexpr):
        """Stores what a row block gives, from the sums [16, 16] of all its columns."""
        if SHAPE.NORM:
            y = y * gl.expand_dims(kept.factors.load(gl.SliceLayout(0, OUT)), 0)
        if SHAPE.SWIGLU:
            gate, up = gl.split(gl.permute(gl.reshape(y, [2, 8, 16]), (1, 2, 0)))
            y = gl.convert_layout(swiglu(gate, up), OUT)
        target = m * out.stride + rows
        known = (rows < n) & (m < SHAPE.M)
        if SHAPE.RESIDUAL:
            y += gl.load(out.residual + target, mask=known, other=0.0).to(gl.float32) * out.share
        gl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=known)

    @gluon.jit
    def _multiply_stream(
        rings, kept, x, norm, out, sums, n, p, P, split,
        WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups: every second of the program's row blocks, and half of the vectors."""
        EACH: gl.constexpr = 8 if SHAPE.SWIGLU else 16
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
        A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
        B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
        OUT: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
        _keep_vectors(x, norm, kept, split * TILE.TILES * TILE.COLUMNS, WG, SHAPE, TILE, PDL)
        barrier()
        mbarrier.arrive(kept.full, count=1)
        mbarrier.wait(kept.full, 0)
        blocks = (n + EACH - 1) // EACH
        first = p + WG * P
        t = p * 0
        m = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, OUT)), 0)  # also column of the sums
        r = gl.expand_dims(gl.arange(0, EACH, layout=gl.SliceLayout(1, OUT)), 1)
        for turn in range(0, _blocks_of(blocks, first, P)):
            block = first + turn * (2 * P)
            acc = gl.zeros([4, 16, 16], gl.float32, layout=MMA)
            for tile in range(TILE.TILES):
                stage = WG * TILE.STAGES + t % TILE.STAGES
                mbarrier.wait(rings.full.index(stage), (t // TILE.STAGES) & 1)
                weights = rings.tiles.index(stage).permute((1, 0, 2)).load(A)
                fence_async_shared()  # these reads come before the copies that follow into the same buffer
                barrier()
                mbarrier.arrive(rings.empty.index(stage), count=1)
                vectors = kept.tiles.index(tile).permute((1, 2, 0)).load(B)
                acc = mma_v2(weights, vectors, acc)
                t += 1
            y = gl.convert_layout(gl.sum(acc, 0), OUT)
            if TILE.SPLITS > 1:
                last, y = _add_up_splits(y, r * 16 + m, sums, block, split, OUT, TILE.SPLITS)
                if last:
                    _store_block(y, kept, out, n, block * EACH + r, m, OUT, SHAPE)
            else:
                _store_block(y, kept, out, n, block * EACH + r, m, OUT, SHAPE)

    @gluon.jit
    def streamed_product_kernel(
        w, w_up, n, x, norm, out, sums, SHAPE, TILE, PDL: gl.constexpr, num_warps: gl.constexpr
    ):
        """A linear map of one weight, or a SwiGLU of two, of up to 16 vectors."""
        BUFFERS: gl.constexpr = 2 * TILE.STAGES
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        WIDTH: gl.constexpr = TILE.COLUMNS // 4
        DTYPE: gl.constexpr = x.data.dtype.element_ty
        LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        words = gl.allocate_shared_memory(w.dtype, [BUFFERS * PARTS, 16 // PARTS, w.block_shape[1]], w.layout)
        tiles = reinterpret(words, DTYPE, [BUFFERS, 16, 4, WIDTH], LINES)
        vectors = gl.allocate_shared_memory(DTYPE, [TILE.TILES, 16, 4, WIDTH], LINES)
        factors = gl.allocate_shared_memory(gl.float32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(BUFFERS):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        mbarrier.init(x_full, count=2)
        fence_async_shared()
        barrier()
        program_release(PDL)
        p = gl.program_id(0)
        P = gl.num_programs(0)
        split = gl.program_id(1)
        rings = StreamRings(tiles, words, full, empty)
        kept = Kept(vectors, factors, x_full)
        gl.warp_specialize(
            [
                (_multiply_stream, (rings, kept, x, norm, out, sums, n, p, P, split, 0, SHAPE, TILE, PDL)),
                (_multiply_stream, (rings, kept, x, norm, out, sums, n, p, P, split, 1, SHAPE, TILE, PDL)),
                (_fill_stream, (w, w_up, n, rings, p, P, split, SHAPE, TILE)),
            ],
            [4, 1],
            [232, 24],
        )


def streamed_plan(linear_map: LinearMap) -> dict[str, int]:
    """Columns of a tile, buffers of a ring, and over how many programs the columns are split."""
    wide = linear_map.inner > 4096
    return {"COLUMNS": 512, "STAGES": 4 if wide else 3, "SPLITS": 4 if wide else 1, "num_warps": 4, "maxnreg": 168}


def streams_products(linear_map: LinearMap, vectors: int, machine: Machine) -> bool:
    """Whether a map can go, and is worth going, this way: one weight or the two of a SwiGLU, large, of 16 bits, their
    rows fit for bulk copies, the vectors for shared memory."""
    weights, plan = linear_map.numbers, streamed_plan(linear_map)
    if streamed_product_kernel is None or linear_map.nbytes < STREAMED_BYTES or vectors > VECTORS:
        return False
    if (len(weights) > 1 and not linear_map.swiglu) or linear_map.is_scaled or weights[0].element_size() != 2:
        return False
    blocks = triton.cdiv(weights[0].shape[0], 16)
    if plan["SPLITS"] > 1 and (linear_map.norm is not None or linear_map.swiglu or blocks > machine.arrived.numel()):
        return False
    tiles = triton.cdiv(triton.cdiv(linear_map.inner, plan["COLUMNS"]), plan["SPLITS"])
    held = (2 * plan["STAGES"] + tiles) * 16 * plan["COLUMNS"] * 2
    return held + 4096 <= SHARED_BYTES and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and linear_map.inner % 8 == 0 for w in weights
    )


def run_as_streamed_products(linear_map: LinearMap, x, out, residual, machine: Machine) -> None:
    """`step_linear_mlra.run` for several vectors and a map that `streams_products`."""
    weights, plan = linear_map.numbers, streamed_plan(linear_map)
    plan["TILES"] = triton.cdiv(triton.cdiv(linear_map.inner, plan["COLUMNS"]), plan["SPLITS"])
    tile = StreamTile(*(plan.pop(name) for name in StreamTile._fields))
    rows, each = weights[0].shape[0], 8 if linear_map.swiglu else 16
    blocks = triton.cdiv(rows, each)
    room = torch.empty(blocks * tile.SPLITS * 256 if tile.SPLITS > 1 else 1, dtype=torch.float32, device=x.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    words = [weight.view(torch.int32) for weight in weights]
    descriptors = [
        TensorDescriptor(w, list(w.shape), [w.stride(0), 1], [each, tile.COLUMNS // 2], layout) for w in words
    ]
    if x.stride(0) % 8:
        x = x.contiguous()
    _, *arguments, shape = map_arguments(linear_map, x, out, residual)
    vectors = Vectors(x, x.stride(0) // 8)  # read in whole 16 bytes
    launch(
        x.device, streamed_product_kernel,
        (min(triton.cdiv(blocks, 2), machine.multiprocessors // tile.SPLITS), tile.SPLITS),
        descriptors[0], descriptors[-1], rows, vectors, *arguments, Sums(room, room, machine.arrived),
        SHAPE=shape, TILE=constants(tile), PDL=machine.early, **plan, **launch_options(machine.early),
    )  # fmt: skip
