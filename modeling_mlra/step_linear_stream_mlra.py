"""Gluon kernel of a linear map of few vectors on Hopper GPUs: large weights stream through rings in shared memory.

A matrix times a few vectors takes as long as its weights take to arrive, so all that counts is that the copies never
stop: one program per multiprocessor keeps two rings of bulk tensor copies in flight, and fills them before it waits
for the kernel in front.

Legend: M vectors, K inputs; a tile is ROWS rows by COLUMNS columns of a weight [n, K], a row block ROWS whole rows.

Bulk copies take rows a multiple of 16 bytes apart. Rows of an odd multiple of 8 bytes are taken in pairs: of the even
rows, and of the odd ones from 8 bytes before they begin, which then meet the vectors SHIFT columns later.
"""

from typing import Any, NamedTuple

import torch

from .device_gluon_mlra import TensorDescriptor, gl, gluon
from .device_mlra import constants, launch, launch_options, triton
from .step_device_mlra import Machine
from .step_maps_mlra import LinearMap, map_arguments

# Smaller weights are held in registers as a whole, and are there before a ring has turned
RING_BYTES = 32 * 2**20
SCALED_RING_BYTES = 2**60  # of weights of 8 bits: none
RING_SHARED_BYTES = 227 * 2**10
stream_linear_kernel: Any = None


class Scales(NamedTuple):
    """Of the weight, or of the two of a SwiGLU, or None; and what the copied words are numbers of."""

    numbers: Any
    of_first: Any
    of_second: Any


class RingTile(NamedTuple):
    """A tile of a weight, STAGES of them in each of the two rings; SHIFT of rows in pairs, else 0; of weights with
    scales, GROUP numbers side by side are added up before they are scaled."""

    ROWS: Any
    COLUMNS: Any
    STAGES: Any
    SHIFT: Any
    GROUP: Any


class Rings(NamedTuple):
    """Buffers of tiles [2 * STAGES * PARTS, ROWS, COLUMNS], the same as words to be copied, and barriers that say
    which are full and which free."""

    tiles: Any
    words: Any
    full: Any
    empty: Any


class Inputs(NamedTuple):
    """The vectors in shared memory, and the barrier that says they are there."""

    tiles: Any
    full: Any


if gluon is not None and triton is not None:
    from .device_gluon_mlra import (
        barrier,
        bulk_load,
        fence_async_shared,
        mbarrier,
        program_release,
        program_wait,
        reinterpret,
    )
    from .step_device_mlra import rms_factor, swiglu
    from .step_maps_mlra import widen

    @gluon.jit
    def _share(blocks, first, P):
        """How many of the row blocks first, first + 2 P, ... there are."""
        return (blocks - first + (2 * P - 1)) // (2 * P)

    @gluon.jit
    def _fill_rings(w, w_up, n, rings, p, P, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """The copying warp: the tiles of both computing warpgroups, as soon as their buffers are free."""
        TILES: gl.constexpr = (SHAPE.K + TILE.SHIFT + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU or TILE.SHIFT > 0 else 1
        blocks = (n + TILE.ROWS - 1) // TILE.ROWS
        for t in range(0, _share(blocks, p, P) * TILES):
            column = (t % TILES) * w.block_shape[1]
            for wg in gl.static_range(2):
                block = p + wg * P + (t // TILES) * (2 * P)
                if block < blocks:
                    stage = wg * TILE.STAGES + t % TILE.STAGES
                    bar = rings.full.index(stage)
                    mbarrier.wait(rings.empty.index(stage), ((t // TILE.STAGES) & 1) ^ 1)
                    mbarrier.expect(bar, PARTS * w.block_type.nbytes)
                    bulk_load(w, [block * TILE.ROWS, column], bar, rings.words.index(stage * PARTS))
                    if PARTS == 2:
                        up = rings.words.index(stage * PARTS + 1)
                        bulk_load(w_up, [block * TILE.ROWS, column], bar, up)

    @gluon.jit
    def _take_inputs(x, norm, inputs, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr):
        """Puts the vectors, normalised, into shared memory, in their own dtype as the modules do."""
        TILES: gl.constexpr = (SHAPE.K + TILE.SHIFT + TILE.COLUMNS - 1) // TILE.COLUMNS
        offs = gl.arange(0, TILE.COLUMNS, layout=gl.BlockedLayout([TILE.COLUMNS // 128], [32], [4], [0]))
        gammas = ()
        if SHAPE.NORM:
            for tile in gl.static_range(TILES):
                column = tile * TILE.COLUMNS + offs
                gammas = gammas + (gl.load(norm.gamma + column, mask=column < SHAPE.K, other=0.0),)  # type: ignore[assignment]
        program_wait(PDL)
        for m in gl.static_range(SHAPE.M):
            values = ()
            squares = gl.to_tensor(0.0)
            for tile in gl.static_range(TILES):
                column = tile * TILE.COLUMNS + offs
                value = gl.load(x.data + m * x.stride + column, mask=column < SHAPE.K, other=0.0)
                if SHAPE.NORM:
                    value = value.to(gl.float32)
                    squares = squares + value * value
                    value *= gammas[tile].to(gl.float32)
                values = values + (value,)  # type: ignore[assignment]
            if SHAPE.NORM:
                factor = rms_factor(gl.sum(squares, 0), SHAPE.K, norm)
            for tile in gl.static_range(TILES):
                value = values[tile]
                if SHAPE.NORM:
                    value *= factor
                inputs.tiles.index(m * TILES + tile).store(value.to(x.data.dtype.element_ty))
                if TILE.SHIFT > 0:
                    column = tile * TILE.COLUMNS + offs - TILE.SHIFT
                    later = (column >= 0) & (column < SHAPE.K)
                    value = gl.load(x.data + m * x.stride + column, mask=later, other=0.0)
                    inputs.tiles.index((SHAPE.M + m) * TILES + tile).store(value)

    @gluon.jit
    def _add_tile(accs, rings, inputs, stage, tile, LAYOUT: gl.constexpr, SHAPE: gl.constexpr, TILES: gl.constexpr):
        """Adds the products of a tile of the ring, which is free again once it is in registers, with all vectors."""
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        weight = rings.tiles.index(stage * PARTS).load(LAYOUT)
        weight_up = weight
        if SHAPE.SWIGLU:
            weight_up = rings.tiles.index(stage * PARTS + 1).load(LAYOUT)
        fence_async_shared()  # these reads come before the copies that follow into the same buffers
        barrier()
        mbarrier.arrive(rings.empty.index(stage), count=1)
        sums = ()
        for m in gl.static_range(SHAPE.M):
            row = inputs.tiles.index(m * TILES + tile).load(gl.SliceLayout(0, LAYOUT)).to(gl.float32)
            row = gl.expand_dims(row, 0)
            sums = sums + (accs[m * PARTS] + widen(weight) * row,)  # type: ignore[assignment]
            if SHAPE.SWIGLU:
                sums = sums + (accs[m * PARTS + 1] + widen(weight_up) * row,)  # type: ignore[assignment]
        return sums

    @gluon.jit
    def _group_scales(scales, rows, n, tile, LAYOUT: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """Of each part the scales [ROWS, groups] of a tile's groups of columns."""
        PER_ROW: gl.constexpr = (SHAPE.K + SHAPE.BLOCK_COLUMNS - 1) // SHAPE.BLOCK_COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU or TILE.SHIFT > 0 else 1
        groups = gl.arange(0, TILE.COLUMNS // TILE.GROUP, layout=gl.SliceLayout(0, LAYOUT))
        of_part = ()
        for part in gl.static_range(PARTS):
            columns, row, source = tile * TILE.COLUMNS + groups * TILE.GROUP, rows, scales.of_first
            if SHAPE.SWIGLU and part == 1:
                source = scales.of_second
            elif TILE.SHIFT > 0:
                columns, row = columns - part * TILE.SHIFT, rows * 2 + part
            columns = gl.maximum(columns, 0)
            known = gl.expand_dims(rows < n, 1) & gl.expand_dims(columns < SHAPE.K, 0)
            offsets = gl.expand_dims(row // SHAPE.BLOCK_ROWS * PER_ROW, 1)
            offsets = offsets + gl.expand_dims(columns // SHAPE.BLOCK_COLUMNS, 0)
            of_part = of_part + (gl.load(source + offsets, mask=known, other=0.0),)  # type: ignore[assignment]
        return of_part

    @gluon.jit
    def _add_scaled_tile(
        accs, scales, rings, inputs, stage, tile,
        LAYOUT: gl.constexpr, SUMS: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr,
    ):  # fmt: skip
        """The same of weights of 8 bits: sums [ROWS, groups] of groups of products, times their scales."""
        TILES: gl.constexpr = (SHAPE.K + TILE.SHIFT + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU or TILE.SHIFT > 0 else 1
        weights = ()
        for part in gl.static_range(PARTS):
            weights = weights + (rings.tiles.index(stage * PARTS + part).load(LAYOUT),)  # type: ignore[assignment]
        fence_async_shared()  # these reads come before the copies that follow into the same buffers
        barrier()
        mbarrier.arrive(rings.empty.index(stage), count=1)
        sums = ()
        for m in gl.static_range(SHAPE.M):
            for part in gl.static_range(PARTS):
                place = ((part if TILE.SHIFT > 0 else 0) * SHAPE.M + m) * TILES + tile
                row = inputs.tiles.index(place).load(gl.SliceLayout(0, LAYOUT))
                products = widen(weights[part]) * gl.expand_dims(row.to(gl.float32), 0)
                products = gl.reshape(products, [TILE.ROWS, TILE.COLUMNS // TILE.GROUP, TILE.GROUP])
                of_groups = gl.convert_layout(gl.sum(products, 2), SUMS)
                if SHAPE.BLOCK_COLUMNS < SHAPE.K:
                    of_groups *= scales[part]
                sums = sums + (accs[m * PARTS + part] + of_groups,)  # type: ignore[assignment]
        return sums

    @gluon.jit
    def _row_scale(scales, rows, n, part: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """The scale of each whole row of a part."""
        row, source = rows, scales.of_first
        if SHAPE.SWIGLU and part == 1:
            source = scales.of_second
        elif TILE.SHIFT > 0:
            row = rows * 2 + part
        return gl.load(source + row // SHAPE.BLOCK_ROWS, mask=rows < n, other=0.0)

    @gluon.jit
    def _multiply_scaled_blocks(
        rings, inputs, x, norm, out, scales, n, p, P,
        WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """`_multiply_blocks` of weights of 8 bits. Scales are asked for a tile ahead, those of whole rows last."""
        TILES: gl.constexpr = (SHAPE.K + TILE.SHIFT + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU or TILE.SHIFT > 0 else 1
        GROUPS: gl.constexpr = TILE.COLUMNS // TILE.GROUP
        DOWN: gl.constexpr = min(4, TILE.ROWS)  # warps
        EACH: gl.constexpr = 16 // TILE.GROUP
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [1, 32], [DOWN, 4 // DOWN], [1, 0])
        SUMS: gl.constexpr = gl.BlockedLayout([1, EACH], [1, 32], [DOWN, 4 // DOWN], [1, 0])
        if WG == 0:
            _take_inputs(x, norm, inputs, SHAPE, TILE, PDL)
            barrier()
            mbarrier.arrive(inputs.full, count=1)
        else:
            program_wait(PDL)
            mbarrier.wait(inputs.full, 0)
        first = p + WG * P
        t = p * 0
        index = gl.arange(0, TILE.ROWS, layout=gl.SliceLayout(1, SUMS))
        of_tile = ()
        if SHAPE.BLOCK_COLUMNS < SHAPE.K:
            of_tile = _group_scales(scales, first * TILE.ROWS + index, n, t, SUMS, SHAPE, TILE)
        for block in range(0, _share((n + TILE.ROWS - 1) // TILE.ROWS, first, P)):
            rows = (first + block * (2 * P)) * TILE.ROWS + index
            accs = ()
            for _part in gl.static_range(SHAPE.M * PARTS):
                accs = accs + (gl.zeros([TILE.ROWS, GROUPS], gl.float32, layout=SUMS),)  # type: ignore[assignment]
            for tile in range(TILES):
                stage = WG * TILE.STAGES + t % TILE.STAGES
                ahead = of_tile
                if SHAPE.BLOCK_COLUMNS < SHAPE.K:
                    last = (tile + 1) // TILES
                    behind = rows + last * (2 * P * TILE.ROWS)
                    ahead = _group_scales(scales, behind, n, tile + 1 - last * TILES, SUMS, SHAPE, TILE)
                mbarrier.wait(rings.full.index(stage), (t // TILE.STAGES) & 1)
                accs = _add_scaled_tile(accs, of_tile, rings, inputs, stage, tile, LAYOUT, SUMS, SHAPE, TILE)
                of_tile = ahead
                t += 1
            for m in gl.static_range(SHAPE.M):
                ys = ()
                for part in gl.static_range(PARTS):
                    y = gl.sum(accs[m * PARTS + part], 1)
                    if SHAPE.BLOCK_COLUMNS >= SHAPE.K:
                        y *= _row_scale(scales, rows, n, part, SHAPE, TILE)
                    ys = ys + (y,)  # type: ignore[assignment]
                if SHAPE.SWIGLU:
                    ys = (swiglu(ys[0], ys[1]),)  # type: ignore[assignment, misc]
                for part in gl.static_range(2 if TILE.SHIFT > 0 else 1):
                    y = ys[part]
                    target = m * out.stride + (rows * 2 + part if TILE.SHIFT > 0 else rows)
                    if SHAPE.RESIDUAL:
                        y += gl.load(out.residual + target, mask=rows < n, other=0.0).to(gl.float32) * out.share
                    gl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=rows < n)

    @gluon.jit
    def _multiply_blocks(
        rings, inputs, x, norm, out, n, p, P,
        WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups: every second of the program's row blocks. The first one also takes the
        vectors in."""
        TILES: gl.constexpr = (SHAPE.K + TILE.SHIFT + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU or TILE.SHIFT > 0 else 1
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        if WG == 0:
            _take_inputs(x, norm, inputs, SHAPE, TILE, PDL)
            barrier()
            mbarrier.arrive(inputs.full, count=1)
        else:
            program_wait(PDL)
            mbarrier.wait(inputs.full, 0)
        first = p + WG * P
        t = p * 0
        for block in range(0, _share((n + TILE.ROWS - 1) // TILE.ROWS, first, P)):
            accs = ()
            for _part in gl.static_range(SHAPE.M * PARTS):
                accs = accs + (gl.zeros([TILE.ROWS, TILE.COLUMNS], gl.float32, layout=LAYOUT),)  # type: ignore[assignment]
            for tile in range(TILES):
                stage = WG * TILE.STAGES + t % TILE.STAGES
                mbarrier.wait(rings.full.index(stage), (t // TILE.STAGES) & 1)
                accs = _add_tile(accs, rings, inputs, stage, tile, LAYOUT, SHAPE, TILES)
                t += 1
            rows = (first + block * (2 * P)) * TILE.ROWS + gl.arange(0, TILE.ROWS, layout=gl.SliceLayout(1, LAYOUT))
            for m in gl.static_range(SHAPE.M):
                y = gl.sum(accs[m * PARTS], 1)
                if SHAPE.SWIGLU:
                    y = swiglu(y, gl.sum(accs[m * PARTS + 1], 1))
                target = m * out.stride + rows
                if SHAPE.RESIDUAL:
                    y += gl.load(out.residual + target, mask=rows < n, other=0.0).to(gl.float32) * out.share
                gl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=rows < n)

    @gluon.jit
    def stream_linear_kernel(
        w, w_up, scales, n, x, norm, out,
        SHAPE, TILE, PDL: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """A linear map of one weight, or a SwiGLU of two: every program copies and multiplies its row blocks."""
        TILES: gl.constexpr = (SHAPE.K + TILE.SHIFT + TILE.COLUMNS - 1) // TILE.COLUMNS
        BUFFERS: gl.constexpr = 2 * TILE.STAGES
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU or TILE.SHIFT > 0 else 1
        words = gl.allocate_shared_memory(w.dtype, [BUFFERS * PARTS, TILE.ROWS, w.block_shape[1]], w.layout)
        tiles = words
        DTYPE: gl.constexpr = scales.numbers.dtype.element_ty
        if w.dtype != DTYPE:
            LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            tiles = reinterpret(words, DTYPE, [BUFFERS * PARTS, TILE.ROWS, TILE.COLUMNS], LINES)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        WAYS: gl.constexpr = 2 if TILE.SHIFT > 0 else 1
        x_buf = gl.allocate_shared_memory(x.data.dtype.element_ty, [WAYS * SHAPE.M * TILES, TILE.COLUMNS], FLAT)
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
        if SHAPE.BLOCK_COLUMNS > 0:
            gl.warp_specialize(
                [
                    (_multiply_scaled_blocks, (rings, inputs, x, norm, out, scales, n, p, P, 0, SHAPE, TILE, PDL)),
                    (_multiply_scaled_blocks, (rings, inputs, x, norm, out, scales, n, p, P, 1, SHAPE, TILE, PDL)),
                    (_fill_rings, (w, w_up, n, rings, p, P, SHAPE, TILE)),
                ],
                [4, 1],
                [REGISTERS, 24],
            )
        else:
            gl.warp_specialize(
                [
                    (_multiply_blocks, (rings, inputs, x, norm, out, n, p, P, 0, SHAPE, TILE, PDL)),
                    (_multiply_blocks, (rings, inputs, x, norm, out, n, p, P, 1, SHAPE, TILE, PDL)),
                    (_fill_rings, (w, w_up, n, rings, p, P, SHAPE, TILE)),
                ],
                [4, 1],
                [REGISTERS, 24],
            )


def ring_plan(itemsize: int, swiglu: bool, vectors: int, shift: int = 0) -> dict[str, int]:
    """Rings of 64 KB for each of the two warpgroups, chosen on an H200 with `python -m scripts.bench_fused`.

    One vector leaves registers for programs of the small kernels around this one.
    """
    plan = {"ROWS": 8, "COLUMNS": 2048 // itemsize // (2 if swiglu else 1), "STAGES": 4, "num_warps": 4}
    plan["WORD"] = 4 if itemsize == 1 else itemsize  # bytes
    if shift:
        plan |= {"ROWS": 4, "COLUMNS": 1024, "STAGES": 8}
    return plan | ({"REGISTERS": 136, "maxnreg": 104} if vectors == 1 else {"REGISTERS": 232, "maxnreg": 168})


def shift_of(linear_map: LinearMap) -> int:
    """How many columns later the vectors meet odd rows, where rows are taken in pairs, else 0."""
    itemsize = linear_map.numbers[0].element_size()
    return 8 // itemsize if linear_map.inner * itemsize % 16 else 0


def streams(linear_map: LinearMap, vectors: int) -> bool:
    """Whether a map can go, and is worth going, through rings: one weight or the two of a SwiGLU, large, their rows
    fit for bulk copies, the vectors for shared memory."""
    weights, inner, scaled = linear_map.numbers, linear_map.inner, linear_map.is_scaled
    if stream_linear_kernel is None or linear_map.nbytes < (SCALED_RING_BYTES if scaled else RING_BYTES):
        return False
    if len(weights) > 1 and not linear_map.swiglu:
        return False
    itemsize, shift = weights[0].element_size(), shift_of(linear_map)
    if shift and (len(weights) > 1 or linear_map.norm is not None or weights[0].shape[0] % 2 or not scaled):
        return False
    plan = ring_plan(itemsize, linear_map.swiglu, vectors, shift)
    parts = 2 if shift else len(weights)
    rings = 2 * plan["STAGES"] * parts * plan["ROWS"] * plan["COLUMNS"] * itemsize
    tiles = triton.cdiv(inner + shift, plan["COLUMNS"])
    held = vectors * tiles * plan["COLUMNS"] * (4 if scaled else itemsize) * (2 if shift else 1)
    return rings + held + 1024 <= RING_SHARED_BYTES and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and inner * itemsize % (8 if shift else 16) == 0 for w in weights
    )


def _parts(weights, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two weights that share a tile's place, or twice the only one; of rows in pairs the even ones, and the odd
    ones from `shift` numbers before they begin."""
    if not shift:
        return weights[0], weights[-1]
    (n, inner), (weight,) = weights[0].shape, weights
    odd_at = weight.storage_offset() + inner - shift
    return (
        weight.as_strided((n // 2, inner), (2 * inner, 1)),
        weight.as_strided((n // 2, inner + shift), (2 * inner, 1), odd_at),
    )


def run_as_stream(linear_map: LinearMap, x, out, residual, machine: Machine) -> None:
    """`step_linear_mlra.run` for a few vectors and a map that `streams`."""
    weights, shift = linear_map.numbers, shift_of(linear_map)
    parts = _parts(weights, shift)
    itemsize, rows = weights[0].element_size(), parts[0].shape[0]
    plan = ring_plan(itemsize, linear_map.swiglu, x.shape[0], shift)
    plan |= {"SHIFT": shift, "GROUP": 8 if shift else 16}
    word = plan.pop("WORD")
    tile = RingTile(*(plan.pop(name) for name in RingTile._fields))
    if word != itemsize:  # copied in one box, of 256 words at most: the rows of a tile then lie one behind the other
        assert tile.COLUMNS * itemsize <= 256 * word, f"{tile.COLUMNS} columns in words of {word} bytes"
        parts = tuple(part.view(torch.int64 if word == 8 else torch.int32) for part in parts)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * word, rank=2)
    block = [tile.ROWS, tile.COLUMNS * itemsize // word]
    descriptors = [TensorDescriptor(w, list(w.shape), [w.stride(0), 1], block, layout) for w in parts]
    scales = Scales(weights[0], linear_map.scales[0], linear_map.scales[-1])
    *arguments, shape = map_arguments(linear_map, x, out, residual)
    launch(
        x.device, stream_linear_kernel, (min(triton.cdiv(rows, 2 * tile.ROWS), machine.multiprocessors),),
        *descriptors, scales, rows, *arguments,
        SHAPE=shape, TILE=constants(tile), PDL=machine.early, **plan, **launch_options(machine.early),
    )  # fmt: skip
