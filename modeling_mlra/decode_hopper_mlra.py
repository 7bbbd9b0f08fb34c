"""Gluon kernels of the absorbed decode attention for Hopper GPUs: bulk tensor copies and warpgroup matrix products.

They cover what the plain kernel in `decode_plain_mlra` leaves slow on these GPUs, with its legend, division of work
and reduction of partial results; everything they do not cover runs there.
"""

from typing import Any

from .decode_arguments_mlra import Buffers, Merge, OwnQueries, Place, SegmentTiles, Sums
from .device_gluon_mlra import gl, gluon

rows_kernel: Any = None

if gluon is not None:
    from .decode_copies_mlra import copy_tiles, share_of, stretch_of
    from .decode_widening_mlra import widen_tiles
    from .device_gluon_mlra import (
        barrier,
        fence_async_shared,
        mbarrier,
        program_release,
        program_wait,
        reinterpret,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    @gluon.jit
    def _kept(mask_row, j, end, HAS_MASK: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr):
        """Which of the rows j.. of a sequence that ends at `end` are in use, and not left out by the mask."""
        offs = gl.arange(0, BN, layout=LAYOUT)
        kept = offs < end - j
        if HAS_MASK:
            kept = kept & (gl.load(mask_row + j + offs, mask=kept, other=0) != 0)
        return kept

    @gluon.jit
    def _zero_rows(tile_buf, kept, LAYOUT: gl.constexpr):
        tile = tile_buf.load(LAYOUT)
        tile_buf.store(gl.where(gl.expand_dims(kept, 1), tile, gl.zeros_like(tile)))

    @gluon.jit
    def _clean_tile(
        c_buf, first, j, end, mask_row,
        HAS_MASK: gl.constexpr, NL: gl.constexpr, BN: gl.constexpr, S_LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """Overwrites a tile's rows that no query sees: they may hold NaN, which a weight of 0 would spread."""
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        dirty = j + BN > end
        if HAS_MASK:
            dirty = gl.min(_kept(mask_row, j, end, True, BN, gl.SliceLayout(0, S_LAYOUT)).to(gl.int32), 0) == 0
        if dirty:
            kept = _kept(mask_row, j, end, HAS_MASK, BN, gl.SliceLayout(1, LAYOUT))
            for k in gl.static_range(NL):
                _zero_rows(c_buf.index(first + k), kept, LAYOUT)
            fence_async_shared()
            barrier()

    @gluon.jit
    def _latents_of(n, TILE: gl.constexpr):
        """Which place in `buffers.c` holds the latents of tile n."""
        return n % (TILE.WIDE if TILE.WIDE else TILE.STAGES) * TILE.NL

    @gluon.jit
    def _scores(buffers, own, n, zeros, FIRST: gl.constexpr, TILE: gl.constexpr):
        """Starts the products of the queries, those from buffer FIRST on, with tile n, once it is there."""
        stage = n % TILE.STAGES
        mbarrier.wait(buffers.full.index(stage), (n // TILE.STAGES) & 1)
        if TILE.WIDE:
            mbarrier.wait(buffers.widened.index(n % TILE.WIDE), (n // TILE.WIDE) & 1)
        s = warpgroup_mma(own.rope, buffers.k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        for k in gl.static_range(TILE.NL):
            keys = buffers.c.index(_latents_of(n, TILE) + k).permute((1, 0))
            queries = own.latent if TILE.HELD else buffers.q.index(FIRST + k)
            s = warpgroup_mma(queries, keys, s, is_async=True)
        return s

    @gluon.jit
    def _softmax_step(s, m, norm, j, tiles, SHAPE: gl.constexpr, TILE: gl.constexpr, S_LAYOUT: gl.constexpr):
        """Scores of rows j.. to weights: the weights, the factor of what came before, the new maxima and sums."""
        offs_n = gl.arange(0, TILE.BN, layout=gl.SliceLayout(0, S_LAYOUT))
        if SHAPE.HAS_MASK:
            ok_n = offs_n < tiles.of.hi - j
            ok_n = ok_n & (gl.load(tiles.mask_row + j + offs_n, mask=ok_n, other=0) != 0)
            s = gl.where(gl.expand_dims(ok_n, 0), s, float("-inf"))
        if j + TILE.BN > tiles.of.hi:
            s = gl.where(gl.expand_dims(offs_n < tiles.of.hi - j, 0), s, float("-inf"))
        if SHAPE.CAUSAL:  # noqa: SIM102 (the outer one is decided at compile time)
            if j + TILE.BN > tiles.of.end - tiles.T:
                s = gl.where(gl.expand_dims(j + offs_n, 0) < tiles.limit, s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1) * tiles.scale_log2)
        m_ref = gl.where(m_new == float("-inf"), 0.0, m_new)
        w = gl.exp2(s * tiles.scale_log2 - gl.expand_dims(m_ref, 1))
        alpha = gl.exp2(m - m_ref)
        return w, alpha, m_new, norm * alpha + gl.sum(w, 1)

    @gluon.jit
    def _free(buffers, n, TILE: gl.constexpr):
        """Gives the buffer of tile n back: its products are done."""
        barrier()
        mbarrier.arrive(buffers.empty.index(n % TILE.STAGES), count=1)

    @gluon.jit
    def _add_values(
        wd, buffers, it, acc0, acc1, tiles, SHAPE: gl.constexpr, TILE: gl.constexpr, S_LAYOUT: gl.constexpr
    ):
        """Adds the weighted rows of tile `it` of a segment, and frees its buffer.

        Those of two latents are added for all query rows: of each sum, the query rows of the other latent are left out
        in the end."""
        NL: gl.constexpr = TILE.NL
        n = tiles.g + it
        first = _latents_of(n, TILE)
        j = tiles.of.lo + it * TILE.BN
        _clean_tile(buffers.c, first, j, tiles.of.end, tiles.mask_row, SHAPE.HAS_MASK, NL, TILE.BN, S_LAYOUT)
        acc0 = warpgroup_mma(wd, buffers.c.index(first), acc0, is_async=True)
        if NL == 2:
            acc1 = warpgroup_mma(wd, buffers.c.index(first + 1), acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(0, deps=(acc0,))
        _free(buffers, n, TILE)
        return acc0, acc1

    @gluon.jit
    def _load_queries(
        queries, buffers, qr_buf, b64, latent, first_row, M,
        FIRST: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr,
    ):  # fmt: skip
        """Puts the 64 query rows of a warpgroup into shared memory, zeros in place of those of the other latent."""
        Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        ROWS: gl.constexpr = 64 // TILE.NL  # of one latent
        offs_q = gl.arange(0, 64, layout=gl.SliceLayout(1, Q_LAYOUT))
        offs_m = first_row + offs_q % ROWS
        t = offs_m // SHAPE.H
        h = offs_m % SHAPE.H
        ok_m = gl.expand_dims(offs_m < M, 1)
        offs_d = gl.expand_dims(gl.arange(0, SHAPE.R, layout=gl.SliceLayout(0, Q_LAYOUT)), 0)
        offs_e = gl.expand_dims(gl.arange(0, SHAPE.E, layout=gl.SliceLayout(0, Q_LAYOUT)), 0)
        strides = queries.strides
        rope_strides = queries.rope_strides
        q_rows = gl.expand_dims(t * strides.t + h * strides.h, 1)
        qr_rows = gl.expand_dims(t * rope_strides.t + h * rope_strides.h, 1)
        q_base = queries.latent + b64 * strides.b + latent * strides.l
        qr_base = queries.rope + b64 * rope_strides.b + (latent // (SHAPE.L // SHAPE.GROUPS)) * rope_strides.l
        for k in gl.static_range(TILE.NL):
            ok = ok_m & gl.expand_dims(offs_q // ROWS == k, 1)
            q_tile = gl.load(q_base + k * strides.l + q_rows + offs_d, mask=ok, other=0.0)
            buffers.q.index(FIRST + k).store(q_tile)
        qr_buf.store(gl.load(qr_base + qr_rows + offs_e, mask=ok_m, other=0.0))
        fence_async_shared()
        barrier()
        mbarrier.arrive(buffers.q_full, count=1)

    @gluon.jit
    def _attend_overlapped(
        buffers, own, tiles, sums, WG: gl.constexpr,
        SHAPE: gl.constexpr, TILE: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """The scores of a tile and the values of the one before are multiplied together, and the values also while the
        scores are in the softmax; where tiles are widened, the values come first, since their place is waited for."""
        P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
        BN: gl.constexpr = TILE.BN
        STEP: gl.constexpr = 128 // TILE.BM
        OFFSET: gl.constexpr = WG % STEP
        FIRST: gl.constexpr = WG // STEP
        dtype: gl.constexpr = buffers.q.dtype
        acc0, acc1, m, norm = sums
        zeros = gl.zeros([64, BN], gl.float32, layout=S_LAYOUT)
        if tiles.count > OFFSET:
            s = _scores(buffers, own, tiles.g + OFFSET, zeros, FIRST, TILE)
            s = warpgroup_mma_wait(0, deps=(s,))
            w, alpha, m, norm = _softmax_step(s, m, norm, tiles.of.lo + OFFSET * BN, tiles, SHAPE, TILE, S_LAYOUT)
            wd = gl.convert_layout(w.to(dtype), P_LAYOUT)
            for it in range(OFFSET + STEP, tiles.count, STEP):
                before = tiles.g + it - STEP
                values = _latents_of(before, TILE)
                if SHAPE.HAS_MASK:
                    j_before = tiles.of.lo + (it - STEP) * BN
                    _clean_tile(buffers.c, values, j_before, tiles.of.end, tiles.mask_row, True, 1, BN, S_LAYOUT)
                if TILE.WIDE:
                    acc0 = warpgroup_mma(wd, buffers.c.index(values), acc0, is_async=True)
                    s = _scores(buffers, own, tiles.g + it, zeros, FIRST, TILE)
                    acc0 = warpgroup_mma_wait(2, deps=(acc0,))  # the scores are two products
                    _free(buffers, before, TILE)
                    s = warpgroup_mma_wait(0, deps=(s,))
                else:
                    s = _scores(buffers, own, tiles.g + it, zeros, FIRST, TILE)
                    acc0 = warpgroup_mma(wd, buffers.c.index(values), acc0, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                w, alpha, m, norm = _softmax_step(s, m, norm, tiles.of.lo + it * BN, tiles, SHAPE, TILE, S_LAYOUT)
                if not TILE.WIDE:
                    acc0 = warpgroup_mma_wait(0, deps=(acc0,))
                    _free(buffers, before, TILE)
                acc0 = acc0 * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT)), 1)
                wd = gl.convert_layout(w.to(dtype), P_LAYOUT)
            last = OFFSET + (tiles.count - 1 - OFFSET) // STEP * STEP
            acc0, acc1 = _add_values(wd, buffers, last, acc0, acc1, tiles, SHAPE, TILE, S_LAYOUT)
        return Sums(acc0, acc1, m, norm)

    @gluon.jit
    def _attend_in_turn(
        buffers, own, tiles, sums, WG: gl.constexpr,
        SHAPE: gl.constexpr, TILE: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """Scores, softmax and values of one tile after the other."""
        P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
        STEP: gl.constexpr = 128 // TILE.BM
        OFFSET: gl.constexpr = WG % STEP
        FIRST: gl.constexpr = WG // STEP
        acc0, acc1, m, norm = sums
        zeros = gl.zeros([64, TILE.BN], gl.float32, layout=S_LAYOUT)
        for it in range(OFFSET, tiles.count, STEP):
            j = tiles.of.lo + it * TILE.BN
            s = _scores(buffers, own, tiles.g + it, zeros, FIRST, TILE)
            s = warpgroup_mma_wait(0, deps=(s,))
            w, alpha, m, norm = _softmax_step(s, m, norm, j, tiles, SHAPE, TILE, S_LAYOUT)
            factor = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT)), 1)
            acc0 = acc0 * factor
            if TILE.NL == 2:
                acc1 = acc1 * factor
            wd = gl.convert_layout(w.to(buffers.q.dtype), P_LAYOUT)
            acc0, acc1 = _add_values(wd, buffers, it, acc0, acc1, tiles, SHAPE, TILE, S_LAYOUT)
        return Sums(acc0, acc1, m, norm)

    @gluon.jit
    def _give_away(merge, acc, m, norm, segments):
        """Leaves what the second warpgroup has for the first."""
        mbarrier.wait(merge.empty, segments & 1)
        merge.data.store(acc)
        merge.stats.index(0).store(m)
        merge.stats.index(1).store(norm)
        barrier()
        mbarrier.arrive(merge.full, count=1)

    @gluon.jit
    def _merged(merge, acc, m, norm, segments, O_LAYOUT: gl.constexpr):
        """Sums, maxima and weight sums together with those of the second warpgroup."""
        O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
        barrier()  # the other may write over what was merged before and, with two latents, the queries
        mbarrier.arrive(merge.empty, count=1)
        mbarrier.wait(merge.full, segments & 1)
        m_other = merge.stats.index(0).load(O_ROWS)
        top = gl.maximum(m, m_other)
        ref = gl.where(top == float("-inf"), 0.0, top)
        mine = gl.exp2(m - ref)
        other = gl.exp2(m_other - ref)
        norm = norm * mine + merge.stats.index(1).load(O_ROWS) * other
        acc = acc * gl.expand_dims(mine, 1) + merge.data.load(O_LAYOUT) * gl.expand_dims(other, 1)
        barrier()  # with two latents the next queries take the place of what was merged
        return acc, top, norm

    @gluon.jit
    def _store_segment(
        acc, m, norm, offs_o, results, place, first_row, b64, stretch,
        SHAPE: gl.constexpr, TILE: gl.constexpr, O_LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """The result of a sequence that the segment covers, or the program's part of one; rows `offs_o` of 64."""
        ROWS: gl.constexpr = 64 // TILE.NL
        M = place.T * SHAPE.H
        strides = results.strides
        z = acc * gl.expand_dims(gl.where(norm > 0, 1.0 / norm, 0.0), 1)
        own = place.latent + offs_o // ROWS
        offs_o = first_row + offs_o % ROWS
        offs_d = gl.expand_dims(gl.arange(0, SHAPE.R, layout=gl.SliceLayout(0, O_LAYOUT)), 0)
        ok_o = gl.expand_dims(offs_o < M, 1)
        if stretch.from_start & stretch.to_end & (place.whole != 0):
            o_rows = own * strides.l + (offs_o // SHAPE.H) * strides.t + (offs_o % SHAPE.H) * strides.h
            target = results.out + b64 * strides.b + gl.expand_dims(o_rows, 1) + offs_d
            gl.store(target, z.to(results.out.dtype.element_ty), mask=ok_o)
        else:
            places = ((place.p + b64) * SHAPE.L + own) * M + offs_o
            gl.store(results.part + gl.expand_dims(places, 1) * SHAPE.R + offs_d, z, mask=ok_o)
            gl.store(results.lse + places, m + gl.log2(norm), mask=offs_o < M)

    @gluon.jit
    def _attend(
        buffers, merge, queries, visible, results, place, scale_log2,
        WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, DEAL: gl.constexpr, EARLY: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups, with 64 query rows: those of its own on every tile, or (BM = 64) the
        same rows on every second tile, merged by the first. They overlap each other: one multiplies matrices while the
        other is in its softmax; OVERLAP: each also multiplies during its own.

        With NL = 2 latents, 32 of the rows belong to each; the other's keys meet zeros instead of their queries."""
        S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE.BN, 16])
        O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.R, 16])
        S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
        O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
        SHARE_ROWS: gl.constexpr = TILE.BM == 64
        FIRST: gl.constexpr = 0 if SHARE_ROWS else WG  # of the buffers of query rows
        ROWS: gl.constexpr = 64 // TILE.NL  # of one latent
        T = place.T
        M = T * SHAPE.H
        first_row = place.row0 if SHARE_ROWS else place.row0 + WG * 64
        qr_buf = buffers.qr.index(FIRST)
        share = share_of(visible, place.B, place.P, place.p, DEAL, 4)
        program_wait(EARLY)
        b = share.b
        pos = share.first
        g = place.p * 0  # tiles of the segments before this one
        segments = place.p * 0
        while pos < share.stop:
            stretch = stretch_of(share, b, pos, DEAL, 4)
            count = (stretch.hi - stretch.lo + (TILE.BN - 1)) // TILE.BN
            b64 = b.to(gl.int64)
            mask_row = visible.key_mask  # None without a mask
            if SHAPE.HAS_MASK:
                mask_row = visible.key_mask + b64 * visible.mask_b
            if SHARE_ROWS and WG == 1:
                mbarrier.wait(buffers.q_full, segments & 1)
            else:
                _load_queries(queries, buffers, qr_buf, b64, place.latent, first_row, M, FIRST, SHAPE, TILE)
            own = OwnQueries(qr_buf)
            if TILE.HELD:
                Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
                own = OwnQueries(qr_buf.load(Q_LAYOUT), buffers.q.index(FIRST).load(Q_LAYOUT))
            limit = stretch.end - (T - 1) + (first_row + gl.arange(0, 64, layout=S_ROWS) % ROWS) // SHAPE.H
            tiles = SegmentTiles(g, count, stretch, gl.expand_dims(limit, 1), mask_row, T, scale_log2)
            acc = gl.zeros([64, SHAPE.R], gl.float32, layout=O_LAYOUT)
            m = gl.full([64], float("-inf"), gl.float32, layout=S_ROWS)
            sums = Sums(acc, acc, m, gl.zeros([64], gl.float32, layout=S_ROWS))
            if TILE.OVERLAP:
                sums = _attend_overlapped(buffers, own, tiles, sums, WG, SHAPE, TILE, S_LAYOUT, O_LAYOUT)
            else:
                sums = _attend_in_turn(buffers, own, tiles, sums, WG, SHAPE, TILE, S_LAYOUT, O_LAYOUT)
            acc, acc1, m, norm = sums
            offs_o = gl.arange(0, 64, layout=O_ROWS)
            if TILE.NL == 2:  # of the products with a latent, those with its own query rows
                acc = gl.where(gl.expand_dims(offs_o < ROWS, 1), acc, acc1)
            if SHARE_ROWS and WG == 1:
                _give_away(merge, acc, m, norm, segments)
            else:
                m = gl.convert_layout(m, O_ROWS)
                norm = gl.convert_layout(norm, O_ROWS)
                if SHARE_ROWS:
                    acc, m, norm = _merged(merge, acc, m, norm, segments, O_LAYOUT)
                _store_segment(acc, m, norm, offs_o, results, place, first_row, b64, stretch, SHAPE, TILE, O_LAYOUT)
            g += count
            segments += 1
            pos = stretch.stop
            b += 1

    @gluon.jit
    def _barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
        """Of each buffer whether it is full, and free of its READERS; of the queries, and of what is merged."""
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        merge_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        merge_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=READERS)
        mbarrier.init(q_full, count=READERS)
        mbarrier.init(merge_full, count=1)
        mbarrier.init(merge_empty, count=1)
        fence_async_shared()
        barrier()
        return full, empty, q_full, merge_full, merge_empty

    @gluon.jit
    def _eight_bits(c_desc, s_desc, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """Buffers of latents in eight bits and of their scales, and of each tile in 16 whether it is there."""
        c8 = gl.allocate_shared_memory(c_desc.dtype, [TILE.STAGES * TILE.NL, TILE.BN, SHAPE.R], c_desc.layout)
        scales = gl.allocate_shared_memory(gl.float32, [TILE.STAGES, TILE.BN, 4], s_desc.layout)
        widened = gl.allocate_shared_memory(gl.int64, [TILE.WIDE, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(TILE.WIDE):
            mbarrier.init(widened.index(i), count=1)
        return c8, scales, widened

    @gluon.jit
    def _run(
        c_desc, k_desc, s_desc, buffers, merge, queries, visible, results, pages, place, scale_log2,
        SHAPE: gl.constexpr, TILE: gl.constexpr, DEAL: gl.constexpr, EARLY: gl.constexpr,
    ):  # fmt: skip
        """The warps of a program, each group with its work and its registers. Two lists, since the compiler puts
        none together (sums of tuples take no functions, triton 3.6)."""
        if SHAPE.SCALED:
            gl.warp_specialize(
                [
                    (
                        _attend,
                        (buffers, merge, queries, visible, results, place, scale_log2, 0, SHAPE, TILE, DEAL, EARLY),
                    ),
                    (
                        _attend,
                        (buffers, merge, queries, visible, results, place, scale_log2, 1, SHAPE, TILE, DEAL, EARLY),
                    ),
                    (copy_tiles, (c_desc, k_desc, s_desc, buffers, visible, pages, place, SHAPE, TILE, DEAL, EARLY)),
                    (widen_tiles, (buffers, visible, place, SHAPE, TILE, DEAL)),
                ],
                [4, 1, 4],
                [208, 24, 72],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (
                        _attend,
                        (buffers, merge, queries, visible, results, place, scale_log2, 0, SHAPE, TILE, DEAL, EARLY),
                    ),
                    (
                        _attend,
                        (buffers, merge, queries, visible, results, place, scale_log2, 1, SHAPE, TILE, DEAL, EARLY),
                    ),
                    (copy_tiles, (c_desc, k_desc, s_desc, buffers, visible, pages, place, SHAPE, TILE, DEAL, EARLY)),
                ],
                [4, 1],
                [240, 24],
            )  # fmt: skip

    @gluon.jit(do_not_specialize=["B", "P", "S", "whole"])
    def rows_kernel(
        c_desc, k_desc, s_desc, queries, visible, results, pages, B, T, P, S, whole, scale_log2,
        SHAPE, TILE, DEAL, PDL: gl.constexpr, SETTLED: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """NL latents and BM = 64 or 128 query rows: one copying warp and two computing warpgroups, and of latents in
        eight bits a widening one between them. SETTLED: lengths and rows older than the T query positions' are read
        before the kernel in front has ended."""
        NL: gl.constexpr = TILE.NL
        STAGES: gl.constexpr = TILE.STAGES
        R: gl.constexpr = SHAPE.R
        SHARE_ROWS: gl.constexpr = TILE.BM == 64
        EARLY: gl.constexpr = PDL and SETTLED
        gl.static_assert(SHAPE.PAGE % TILE.BN == 0 and not (SHAPE.PAGE and DEAL.HAS_START))  # one page holds a tile
        # A buffer stays with one warpgroup: one that skips tiles would take an older phase for the one it waits for
        gl.static_assert(not SHARE_ROWS or (STAGES % 2 == 0 and TILE.WIDE % 2 == 0))
        gl.static_assert((TILE.WIDE > 0) == SHAPE.SCALED and TILE.WIDE <= STAGES)
        # The tile before still has its place when the scores are waited for
        gl.static_assert(not (TILE.WIDE and TILE.OVERLAP) or TILE.WIDE > 128 // TILE.BM)
        gl.static_assert(NL == 1 or (SHARE_ROWS and not TILE.OVERLAP and not TILE.HELD))
        dtype: gl.constexpr = queries.latent.dtype.element_ty
        Q_COPIES: gl.constexpr = 1 if SHARE_ROWS else 2
        Q_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, R], dtype)
        QR_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, SHAPE.E], dtype)
        q_buf = gl.allocate_shared_memory(dtype, [NL * Q_COPIES, 64, R], Q_SHARED)
        qr_buf = gl.allocate_shared_memory(dtype, [Q_COPIES, 64, SHAPE.E], QR_SHARED)
        C_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE.BN, R], dtype)
        c_buf = gl.allocate_shared_memory(dtype, [(TILE.WIDE if TILE.WIDE else STAGES) * NL, TILE.BN, R], C_SHARED)
        k_buf = gl.allocate_shared_memory(dtype, [STAGES, TILE.BN, SHAPE.E], k_desc.layout)
        FLAT_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        MERGE_ROWS: gl.constexpr = 64 if SHARE_ROWS else 16
        MERGE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MERGE_ROWS, R], gl.float32)
        if NL == 2:  # the queries are no longer needed
            merge_buf = reinterpret(q_buf, gl.float32, [1, MERGE_ROWS, R], MERGE_LAYOUT)
        else:
            merge_buf = gl.allocate_shared_memory(gl.float32, [1, MERGE_ROWS, R], MERGE_LAYOUT)
        merge_stats = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT_SHARED)
        c8_buf = None
        s_buf = None
        widened = None
        if SHAPE.SCALED:
            c8_buf, s_buf, widened = _eight_bits(c_desc, s_desc, SHAPE, TILE)
        full, empty, q_full, merge_full, merge_empty = _barriers(STAGES, 1 if SHARE_ROWS else 2)
        LANES: gl.constexpr = SHAPE.L // NL
        lanes = LANES * ((T * SHAPE.H * NL + TILE.BM - 1) // TILE.BM)
        lane = gl.program_id(0) % lanes
        p = gl.program_id(0) // lanes
        latent = (lane % LANES) * NL
        row0 = (lane // LANES) * TILE.BM
        place = Place(B, T, P, S, whole, p, latent, row0)
        buffers = Buffers(q_buf, qr_buf, c_buf, k_buf, full, empty, q_full, c8_buf, s_buf, widened)
        merge = Merge(merge_buf.index(0), merge_stats, merge_full, merge_empty)
        if not SETTLED:
            program_wait(PDL)
        program_release(PDL)
        _run(
            c_desc, k_desc, s_desc, buffers, merge, queries, visible, results, pages, place, scale_log2,
            SHAPE, TILE, DEAL, EARLY,
        )  # fmt: skip
