"""Device code of the linear maps that stream through rings: what the warpgroups of a program do.

One warp copies, two warpgroups compute, each with a ring of its own. Of weights of 8 bits, here always a SwiGLU of one
vector, GROUP products side by side are added up before they are scaled.

Legend: M vectors, K inputs; a tile is ROWS rows by COLUMNS columns of a weight [n, K], a row block ROWS whole rows.
"""

from typing import Any, NamedTuple

from .device_gluon_mlra import gl, gluon
from .device_mlra import triton


class RingTile(NamedTuple):
    """A tile of a weight, STAGES of them in each of the two rings; GROUP numbers of a row share a scale."""

    ROWS: Any
    COLUMNS: Any
    STAGES: Any
    GROUP: Any


class Rings(NamedTuple):
    """Buffers of tiles [2 * STAGES, ROWS, COLUMNS], of a SwiGLU twice as many; the same as the words that are copied;
    and barriers that say which are full and which free."""

    tiles: Any
    words: Any
    full: Any
    empty: Any


class Inputs(NamedTuple):
    """The vectors in shared memory, and the barrier that says they are there."""

    tiles: Any
    full: Any


class Scales(NamedTuple):
    """Of the weight, or of the two of a SwiGLU; None of plain weights."""

    of_first: Any
    of_second: Any


if gluon is not None and triton is not None:
    from .device_gluon_mlra import barrier, bulk_load, fence_async_shared, mbarrier, program_wait
    from .step_device_mlra import rms_factor, swiglu
    from .step_maps_mlra import widen

    @gluon.jit
    def _share(blocks, first, P):
        """How many of the row blocks first, first + 2 P, ... there are."""
        return (blocks - first + (2 * P - 1)) // (2 * P)

    @gluon.jit
    def fill_rings(w, w_up, n, rings, p, P, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """The copying warp: the tiles of both computing warpgroups, as soon as their buffers are free."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
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
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
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
    def _add_scaled_tile(
        sums, scales, rings, inputs, stage, tile,
        LAYOUT: gl.constexpr, SUMS: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr,
    ):  # fmt: skip
        """The same of weights of 8 bits: sums [ROWS, groups] of groups of products, times their scales."""
        weights = ()
        for part in gl.static_range(2):
            weights = weights + (rings.tiles.index(stage * 2 + part).load(LAYOUT),)  # type: ignore[assignment]
        fence_async_shared()  # these reads come before the copies that follow into the same buffers
        barrier()
        mbarrier.arrive(rings.empty.index(stage), count=1)
        row = inputs.tiles.index(tile).load(gl.SliceLayout(0, LAYOUT))
        row = gl.expand_dims(row.to(gl.float32), 0)
        added = ()
        for part in gl.static_range(2):
            products = gl.reshape(widen(weights[part]) * row, [TILE.ROWS, TILE.COLUMNS // TILE.GROUP, TILE.GROUP])
            of_groups = gl.convert_layout(gl.sum(products, 2), SUMS)
            if SHAPE.BLOCK_COLUMNS < SHAPE.K:
                of_groups *= scales[part]
            added = added + (sums[part] + of_groups,)  # type: ignore[assignment]
        return added

    @gluon.jit
    def _group_scales(scales, rows, n, tile, LAYOUT: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """Of both weights the scales [ROWS, groups] of a tile's groups of columns."""
        PER_ROW: gl.constexpr = (SHAPE.K + SHAPE.BLOCK_COLUMNS - 1) // SHAPE.BLOCK_COLUMNS
        groups = gl.arange(0, TILE.COLUMNS // TILE.GROUP, layout=gl.SliceLayout(0, LAYOUT))
        columns = gl.maximum(tile * TILE.COLUMNS + groups * TILE.GROUP, 0)  # known to be: divisions are then shifts
        known = gl.expand_dims(rows < n, 1) & gl.expand_dims(columns < SHAPE.K, 0)
        offsets = gl.expand_dims(rows // SHAPE.BLOCK_ROWS * PER_ROW, 1)
        offsets = offsets + gl.expand_dims(columns // SHAPE.BLOCK_COLUMNS, 0)
        of_first = gl.load(scales.of_first + offsets, mask=known, other=0.0)
        return of_first, gl.load(scales.of_second + offsets, mask=known, other=0.0)

    @gluon.jit
    def _row_sum(sums, of_rows, rows, n, SHAPE: gl.constexpr):
        """The sums of whole rows, times their scales unless those of groups were in there."""
        y = gl.sum(sums, 1)
        if SHAPE.BLOCK_COLUMNS >= SHAPE.K:
            y *= gl.load(of_rows + rows // SHAPE.BLOCK_ROWS, mask=rows < n, other=0.0)
        return y

    @gluon.jit
    def _store(y, m: gl.constexpr, rows, n, out, SHAPE: gl.constexpr):
        target = m * out.stride + rows
        if SHAPE.RESIDUAL:
            y += gl.load(out.residual + target, mask=rows < n, other=0.0).to(gl.float32) * out.share
        gl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=rows < n)

    @gluon.jit
    def _multiply_plain(
        rings, inputs, out, n, first, P, WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr
    ):  # fmt: skip
        """The row blocks first, first + 2 P, ..."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        t = first * 0
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
                _store(y, m, rows, n, out, SHAPE)

    @gluon.jit
    def _multiply_scaled(
        rings, inputs, out, scales, n, first, P, WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr
    ):  # fmt: skip
        """The same of weights of 8 bits. Scales are asked for a tile ahead, those of whole rows last."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        GROUPS: gl.constexpr = TILE.COLUMNS // TILE.GROUP
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, TILE.GROUP], [1, 32], [4, 1], [1, 0])
        SUMS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        t = first * 0
        index = gl.arange(0, TILE.ROWS, layout=gl.SliceLayout(1, SUMS))
        of_tile = ()
        if SHAPE.BLOCK_COLUMNS < SHAPE.K:
            of_tile = _group_scales(scales, first * TILE.ROWS + index, n, t, SUMS, SHAPE, TILE)
        for block in range(0, _share((n + TILE.ROWS - 1) // TILE.ROWS, first, P)):
            rows = (first + block * (2 * P)) * TILE.ROWS + index
            none = gl.zeros([TILE.ROWS, GROUPS], gl.float32, layout=SUMS)
            sums = none, none
            for tile in range(TILES):
                stage = WG * TILE.STAGES + t % TILE.STAGES
                ahead = of_tile
                if SHAPE.BLOCK_COLUMNS < SHAPE.K:
                    last = (tile + 1) // TILES
                    behind = rows + last * (2 * P * TILE.ROWS)
                    ahead = _group_scales(scales, behind, n, tile + 1 - last * TILES, SUMS, SHAPE, TILE)
                mbarrier.wait(rings.full.index(stage), (t // TILE.STAGES) & 1)
                sums = _add_scaled_tile(sums, of_tile, rings, inputs, stage, tile, LAYOUT, SUMS, SHAPE, TILE)
                of_tile = ahead
                t += 1
            gate = _row_sum(sums[0], scales.of_first, rows, n, SHAPE)
            up = _row_sum(sums[1], scales.of_second, rows, n, SHAPE)
            _store(swiglu(gate, up), 0, rows, n, out, SHAPE)

    @gluon.jit
    def multiply_blocks(
        rings, inputs, x, norm, out, scales, n, p, P,
        WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups: every second of the program's row blocks. The first one also takes the
        vectors in."""
        if WG == 0:
            _take_inputs(x, norm, inputs, SHAPE, TILE, PDL)
            barrier()
            mbarrier.arrive(inputs.full, count=1)
        else:
            program_wait(PDL)
            mbarrier.wait(inputs.full, 0)
        if SHAPE.BLOCK_COLUMNS > 0:
            _multiply_scaled(rings, inputs, out, scales, n, p + WG * P, P, WG, SHAPE, TILE)
        else:
            _multiply_plain(rings, inputs, out, n, p + WG * P, P, WG, SHAPE, TILE)
