"""Gluon kernels of the absorbed decode attention for Hopper GPUs: bulk tensor copies and warpgroup matrix products.

They cover what the plain kernel in `decode_triton_mlra` leaves slow on these GPUs, with its legend, division of work
and reduction of partial results; everything they do not cover runs there.
"""

from typing import Any

from .device_gluon_mlra import gl, gluon

rows_kernel: Any = None

if gluon is not None:
    from .device_gluon_mlra import (
        barrier,
        bulk_load,
        fence_async_shared,
        mbarrier,
        program_release,
        program_wait,
        reinterpret,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    @gluon.jit
    def _add(x, y):
        return x + y

    @gluon.jit
    def _share_start(p, total, shares, BIG: gl.constexpr):
        if BIG:
            return (p.to(gl.int64) * total // shares).to(gl.int32)
        return p * total // shares

    @gluon.jit
    def _deal(
        kv_end, kv_start, B, P, p,
        UNIT: gl.constexpr, MIN_UNITS: gl.constexpr, BLOCK_B: gl.constexpr, HAS_START: gl.constexpr,
        BIG: gl.constexpr, WARPS: gl.constexpr,
    ):  # fmt: skip
        """Program p's share: the sequences' first rows, ends, units and running sums of units, its first sequence, and
        its first and one past its last unit."""
        if BLOCK_B == 1:
            ends = gl.load(kv_end)
            starts = ends * 0
            if HAS_START:
                starts = gl.load(kv_start)
            units = gl.maximum((ends - starts + (UNIT - 1)) // UNIT, 1)
            cum = units
            total = units
        else:
            FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
            offs_b = gl.arange(0, BLOCK_B, layout=FLAT)
            ends = gl.load(kv_end + offs_b, mask=offs_b < B, other=0)
            starts = ends * 0
            if HAS_START:
                starts = gl.load(kv_start + offs_b, mask=offs_b < B, other=0)
            units = gl.where(offs_b < B, gl.maximum((ends - starts + (UNIT - 1)) // UNIT, 1), 0)
            cum = gl.associative_scan(units, 0, _add)
            total = gl.sum(units, 0)
        shares = gl.minimum(P, (total + (MIN_UNITS - 1)) // MIN_UNITS)
        mine = gl.minimum(p, shares - 1)
        first_pos = _share_start(mine, total, shares, BIG)
        last_pos = gl.where(p < shares, _share_start(mine + 1, total, shares, BIG), first_pos)
        b = p * 0
        if BLOCK_B > 1:
            b = gl.sum((cum <= first_pos).to(gl.int32), 0)
        return starts, ends, units, cum, b, first_pos, last_pos

    @gluon.jit
    def _segment(
        starts, ends, units, cum, b, pos, last_pos, UNIT: gl.constexpr, BLOCK_B: gl.constexpr, WARPS: gl.constexpr
    ):
        """What a share holds of sequence b from unit `pos` on: the sequence's first unit, the unit after the segment,
        whether the sequence starts and ends in it, and rows lo <= j < hi of a sequence that ends at `end`."""
        if BLOCK_B == 1:
            seq_last = cum
            seq_first = cum - units
            start = starts
            end = ends
        else:
            FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
            here = gl.arange(0, BLOCK_B, layout=FLAT) == b
            seq_last = gl.sum(gl.where(here, cum, 0), 0)
            seq_first = seq_last - gl.sum(gl.where(here, units, 0), 0)
            start = gl.sum(gl.where(here, starts, 0), 0)
            end = gl.sum(gl.where(here, ends, 0), 0)
        stop_pos = gl.minimum(last_pos, seq_last)
        lo = start + (pos - seq_first) * UNIT
        hi = gl.minimum(start + (stop_pos - seq_first) * UNIT, end)
        return stop_pos, pos == seq_first, stop_pos == seq_last, lo, gl.maximum(hi, lo), end

    @gluon.jit
    def _copy_tiles(
        c_desc, k_desc, c_buf, k_buf, full, empty, q_full, kv_end, kv_start, B, T, P, S, p, latent,
        NL: gl.constexpr, R: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
        UNIT: gl.constexpr, MIN_UNITS: gl.constexpr, BLOCK_B: gl.constexpr, HAS_START: gl.constexpr,
        BIG: gl.constexpr, EARLY: gl.constexpr,
    ):  # fmt: skip
        """The copying warp: every tile of the share in turn, as soon as its buffer is free; EARLY: only those with
        rows of the T query positions after the kernel in front.

        The queries would stand in line behind all that is asked for before them, and with them the first product:
        until they are there, only AHEAD tiles are."""
        starts, ends, units, cum, b, pos, last_pos = _deal(
            kv_end, kv_start, B, P, p, UNIT, MIN_UNITS, BLOCK_B, HAS_START, BIG, 1
        )
        first_pos = pos
        g = p * 0
        while pos < last_pos:
            stop_pos, starts_here, ends_here, lo, hi, end = _segment(
                starts, ends, units, cum, b, pos, last_pos, UNIT, BLOCK_B, 1
            )
            for j in range(lo, hi, BN):
                if EARLY:  # noqa: SIM102 (decided at compile time)
                    if j + BN > end - T:
                        program_wait(True)
                if (g == AHEAD) & (pos == first_pos):
                    mbarrier.wait(q_full, 0)
                stage = g % STAGES
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), ((g // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, NL * c_desc.block_type.nbytes + k_desc.block_type.nbytes)
                bulk_load(k_desc, [b * S + j, 0], bar, k_buf.index(stage))
                for k in gl.static_range(NL):
                    bulk_load(c_desc, [b * S + j, (latent + k) * R], bar, c_buf.index(stage * NL + k))
                g += 1
            pos = stop_pos
            b += 1

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
        c_buf, stage, j, end, mask_row,
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
                _zero_rows(c_buf.index(stage * NL + k), kept, LAYOUT)
            fence_async_shared()
            barrier()

    @gluon.jit
    def _scores(
        q_buf, qr_buf, c_buf, k_buf, full, n, zeros, FIRST: gl.constexpr, NL: gl.constexpr, STAGES: gl.constexpr
    ):
        """Starts the products of the queries, those from buffer FIRST on, with tile n, once it is there."""
        stage = n % STAGES
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        s = warpgroup_mma(qr_buf, k_buf.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        for k in gl.static_range(NL):
            s = warpgroup_mma(q_buf.index(FIRST + k), c_buf.index(stage * NL + k).permute((1, 0)), s, is_async=True)
        return s

    @gluon.jit
    def _softmax_step(
        s, m, norm, j, hi, end, limit, mask_row, T, scale_log2,
        BN: gl.constexpr, HAS_MASK: gl.constexpr, CAUSAL: gl.constexpr, S_LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """Scores of rows j.. to weights: the weights, the factor of what came before, the new maxima and sums."""
        offs_n = gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
        if HAS_MASK:
            ok_n = offs_n < hi - j
            ok_n = ok_n & (gl.load(mask_row + j + offs_n, mask=ok_n, other=0) != 0)
            s = gl.where(gl.expand_dims(ok_n, 0), s, float("-inf"))
        if j + BN > hi:
            s = gl.where(gl.expand_dims(offs_n < hi - j, 0), s, float("-inf"))
        if CAUSAL:  # noqa: SIM102 (the outer one is decided at compile time)
            if j + BN > end - T:
                s = gl.where(gl.expand_dims(j + offs_n, 0) < limit, s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
        m_ref = gl.where(m_new == float("-inf"), 0.0, m_new)
        w = gl.exp2(s * scale_log2 - gl.expand_dims(m_ref, 1))
        alpha = gl.exp2(m - m_ref)
        return w, alpha, m_new, norm * alpha + gl.sum(w, 1)

    @gluon.jit
    def _add_values(
        wd, c_buf, stage, acc0, acc1, j, end, mask_row, empty,
        HAS_MASK: gl.constexpr, NL: gl.constexpr, BN: gl.constexpr, S_LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """Adds the weighted rows of a tile, rows j.. of a sequence that ends at `end`, and frees its buffer.

        Those of two latents are added for all query rows: of each sum, the query rows of the other latent are left out
        in the end."""
        _clean_tile(c_buf, stage, j, end, mask_row, HAS_MASK, NL, BN, S_LAYOUT)
        acc0 = warpgroup_mma(wd, c_buf.index(stage * NL), acc0, is_async=True)
        if NL == 2:
            acc1 = warpgroup_mma(wd, c_buf.index(stage * NL + 1), acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(0, deps=(acc0,))
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        return acc0, acc1

    @gluon.jit
    def _attend(
        q_buf, qr_buf, c_buf, k_buf, full, empty, q_full, merge_buf, merge_stats, merge_full, merge_empty,
        q, q_rope, out, part, part_lse, kv_end, kv_start, key_mask, B, T, P, whole, p, latent, row0, scale_log2,
        q_b, q_t, q_l, q_h, qr_b, qr_t, qr_g, qr_h, o_b, o_t, o_l, o_h, mask_b,
        WG: gl.constexpr, SHARE_ROWS: gl.constexpr, OVERLAP: gl.constexpr, NL: gl.constexpr,
        L: gl.constexpr, GROUPS: gl.constexpr, H: gl.constexpr, R: gl.constexpr, E: gl.constexpr,
        BN: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr, MIN_UNITS: gl.constexpr,
        BLOCK_B: gl.constexpr, HAS_START: gl.constexpr, HAS_MASK: gl.constexpr, CAUSAL: gl.constexpr,
        BIG: gl.constexpr, EARLY: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups, with 64 query rows: those of its own on every tile, or (SHARE_ROWS) the
        same rows on every second tile, merged by the first. They overlap each other: one multiplies matrices while the
        other is in its softmax; OVERLAP: each also multiplies during its own.

        With NL = 2 latents, 32 of the rows belong to each; the other's keys meet zeros instead of their queries."""
        S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
        O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
        P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
        S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
        O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
        Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        STEP: gl.constexpr = 2 if SHARE_ROWS else 1
        OFFSET: gl.constexpr = WG if SHARE_ROWS else 0
        dtype: gl.constexpr = q.dtype.element_ty
        M = T * H
        first_row = row0 if SHARE_ROWS else row0 + WG * 64
        ROWS: gl.constexpr = 64 // NL  # of one latent
        FIRST: gl.constexpr = 0 if SHARE_ROWS else WG
        starts, ends, units, cum, b, first_pos, last_pos = _deal(
            kv_end, kv_start, B, P, p, UNIT, MIN_UNITS, BLOCK_B, HAS_START, BIG, 4
        )
        program_wait(EARLY)
        pos = first_pos
        g = p * 0  # tiles of the segments before this one
        segments = p * 0
        while pos < last_pos:
            stop_pos, starts_here, ends_here, lo, hi, end = _segment(
                starts, ends, units, cum, b, pos, last_pos, UNIT, BLOCK_B, 4
            )
            tiles = (hi - lo + (BN - 1)) // BN
            b64 = b.to(gl.int64)
            mask_row = key_mask  # None without a mask
            if HAS_MASK:
                mask_row = key_mask + b64 * mask_b
            if SHARE_ROWS and WG == 1:
                mbarrier.wait(q_full, segments & 1)
            else:
                offs_q = gl.arange(0, 64, layout=gl.SliceLayout(1, Q_LAYOUT))
                offs_m = first_row + offs_q % ROWS
                t = offs_m // H
                h = offs_m % H
                ok_m = gl.expand_dims(offs_m < M, 1)
                offs_d = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(0, Q_LAYOUT)), 0)
                offs_e = gl.expand_dims(gl.arange(0, E, layout=gl.SliceLayout(0, Q_LAYOUT)), 0)
                q_rows = gl.expand_dims(t * q_t + h * q_h, 1)
                qr_rows = gl.expand_dims(t * qr_t + h * qr_h, 1)
                q_base = q + b64 * q_b + latent * q_l
                qr_base = q_rope + b64 * qr_b + (latent // (L // GROUPS)) * qr_g
                for k in gl.static_range(NL):
                    ok = ok_m & gl.expand_dims(offs_q // ROWS == k, 1)
                    q_buf.index(FIRST + k).store(gl.load(q_base + k * q_l + q_rows + offs_d, mask=ok, other=0.0))
                qr_buf.store(gl.load(qr_base + qr_rows + offs_e, mask=ok_m, other=0.0))
                fence_async_shared()
                barrier()
                mbarrier.arrive(q_full, count=1)

            limit = end - (T - 1) + (first_row + gl.arange(0, 64, layout=S_ROWS) % ROWS) // H
            limit = gl.expand_dims(limit, 1)
            acc0 = gl.zeros([64, R], gl.float32, layout=O_LAYOUT)
            acc1 = acc0
            m = gl.full([64], float("-inf"), gl.float32, layout=S_ROWS)
            norm = gl.zeros([64], gl.float32, layout=S_ROWS)
            zeros = gl.zeros([64, BN], gl.float32, layout=S_LAYOUT)
            if OVERLAP:
                # The scores of a tile and the values of the one before are multiplied together, and the values also
                # while the scores are in the softmax
                if tiles > OFFSET:
                    s = _scores(q_buf, qr_buf, c_buf, k_buf, full, g + OFFSET, zeros, FIRST, NL, STAGES)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    w, alpha, m, norm = _softmax_step(
                        s, m, norm, lo + OFFSET * BN, hi, end, limit, mask_row, T, scale_log2,
                        BN, HAS_MASK, CAUSAL, S_LAYOUT,
                    )  # fmt: skip
                    wd = gl.convert_layout(w.to(dtype), P_LAYOUT)
                    for it in range(OFFSET + STEP, tiles, STEP):
                        before = (g + it - STEP) % STAGES
                        if HAS_MASK:
                            _clean_tile(c_buf, before, lo + (it - STEP) * BN, end, mask_row, True, 1, BN, S_LAYOUT)
                        s = _scores(q_buf, qr_buf, c_buf, k_buf, full, g + it, zeros, FIRST, NL, STAGES)
                        acc0 = warpgroup_mma(wd, c_buf.index(before), acc0, is_async=True)
                        s = warpgroup_mma_wait(1, deps=(s,))
                        w, alpha, m, norm = _softmax_step(
                            s, m, norm, lo + it * BN, hi, end, limit, mask_row, T, scale_log2,
                            BN, HAS_MASK, CAUSAL, S_LAYOUT,
                        )  # fmt: skip
                        acc0 = warpgroup_mma_wait(0, deps=(acc0,))
                        barrier()
                        mbarrier.arrive(empty.index(before), count=1)
                        acc0 = acc0 * gl.expand_dims(gl.convert_layout(alpha, O_ROWS), 1)
                        wd = gl.convert_layout(w.to(dtype), P_LAYOUT)
                    last = OFFSET + (tiles - 1 - OFFSET) // STEP * STEP
                    stage = (g + last) % STAGES
                    acc0, acc1 = _add_values(
                        wd, c_buf, stage, acc0, acc1, lo + last * BN, end, mask_row, empty, HAS_MASK, NL, BN, S_LAYOUT
                    )
            else:
                for it in range(OFFSET, tiles, STEP):
                    j = lo + it * BN
                    stage = (g + it) % STAGES
                    s = _scores(q_buf, qr_buf, c_buf, k_buf, full, g + it, zeros, FIRST, NL, STAGES)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    w, alpha, m, norm = _softmax_step(
                        s, m, norm, j, hi, end, limit, mask_row, T, scale_log2,
                        BN, HAS_MASK, CAUSAL, S_LAYOUT,
                    )  # fmt: skip
                    factor = gl.expand_dims(gl.convert_layout(alpha, O_ROWS), 1)
                    acc0 = acc0 * factor
                    if NL == 2:
                        acc1 = acc1 * factor
                    wd = gl.convert_layout(w.to(dtype), P_LAYOUT)
                    acc0, acc1 = _add_values(
                        wd, c_buf, stage, acc0, acc1, j, end, mask_row, empty, HAS_MASK, NL, BN, S_LAYOUT
                    )

            offs_o = gl.arange(0, 64, layout=O_ROWS)
            acc = acc0
            if NL == 2:  # of the products with a latent, those with its own query rows
                acc = gl.where(gl.expand_dims(offs_o < ROWS, 1), acc0, acc1)
            if SHARE_ROWS and WG == 1:
                mbarrier.wait(merge_empty, segments & 1)
                merge_buf.store(acc)
                merge_stats.index(0).store(m)
                merge_stats.index(1).store(norm)
                barrier()
                mbarrier.arrive(merge_full, count=1)
            else:
                m = gl.convert_layout(m, O_ROWS)
                norm = gl.convert_layout(norm, O_ROWS)
                if SHARE_ROWS:
                    barrier()  # the other may write over what was merged before and, with two latents, the queries
                    mbarrier.arrive(merge_empty, count=1)
                    mbarrier.wait(merge_full, segments & 1)
                    m_other = merge_stats.index(0).load(O_ROWS)
                    top = gl.maximum(m, m_other)
                    ref = gl.where(top == float("-inf"), 0.0, top)
                    mine = gl.exp2(m - ref)
                    other = gl.exp2(m_other - ref)
                    norm = norm * mine + merge_stats.index(1).load(O_ROWS) * other
                    acc = acc * gl.expand_dims(mine, 1) + merge_buf.load(O_LAYOUT) * gl.expand_dims(other, 1)
                    m = top
                    barrier()  # with two latents the next queries take the place of what was merged
                z = acc * gl.expand_dims(gl.where(norm > 0, 1.0 / norm, 0.0), 1)
                own = latent + offs_o // ROWS
                offs_o = first_row + offs_o % ROWS
                offs_d = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(0, O_LAYOUT)), 0)
                ok_o = gl.expand_dims(offs_o < M, 1)
                if starts_here & ends_here & (whole != 0):
                    o_rows = gl.expand_dims(own * o_l + (offs_o // H) * o_t + (offs_o % H) * o_h, 1)
                    gl.store(out + b64 * o_b + o_rows + offs_d, z.to(dtype), mask=ok_o)
                else:
                    rows = ((p + b64) * L + own) * M + offs_o
                    gl.store(part + gl.expand_dims(rows, 1) * R + offs_d, z, mask=ok_o)
                    gl.store(part_lse + rows, m + gl.log2(norm), mask=offs_o < M)
            g += tiles
            segments += 1
            pos = stop_pos
            b += 1

    @gluon.jit(do_not_specialize=["B", "P", "S", "whole"])
    def rows_kernel(
        c_desc, k_desc, q, q_rope, out, part, part_lse, kv_end, kv_start, key_mask,
        B, T, P, S, whole, scale_log2,
        q_b, q_t, q_l, q_h, qr_b, qr_t, qr_g, qr_h, o_b, o_t, o_l, o_h, mask_b,
        L: gl.constexpr, GROUPS: gl.constexpr, H: gl.constexpr, R: gl.constexpr, E: gl.constexpr,
        BM: gl.constexpr, NL: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
        UNIT: gl.constexpr, MIN_UNITS: gl.constexpr, BLOCK_B: gl.constexpr, HAS_START: gl.constexpr,
        HAS_MASK: gl.constexpr, CAUSAL: gl.constexpr, BIG: gl.constexpr, PDL: gl.constexpr, SETTLED: gl.constexpr,
        OVERLAP: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """NL latents and BM = 64 or 128 query rows: one copying warp and two computing warpgroups. SETTLED: lengths
        and rows older than the T query positions' are read before the kernel in front has ended."""
        SHARE_ROWS: gl.constexpr = BM == 64
        EARLY: gl.constexpr = PDL and SETTLED
        # A buffer stays with one warpgroup: one that skips tiles would take an older phase for the one it waits for
        gl.static_assert(not SHARE_ROWS or STAGES % 2 == 0)
        gl.static_assert(NL == 1 or (SHARE_ROWS and not OVERLAP))
        dtype: gl.constexpr = q.dtype.element_ty
        Q_COPIES: gl.constexpr = 1 if SHARE_ROWS else 2
        q_buf = gl.allocate_shared_memory(
            dtype, [NL * Q_COPIES, 64, R], gl.NVMMASharedLayout.get_default_for([64, R], dtype)
        )
        qr_buf = gl.allocate_shared_memory(
            dtype, [Q_COPIES, 64, E], gl.NVMMASharedLayout.get_default_for([64, E], dtype)
        )
        c_buf = gl.allocate_shared_memory(dtype, [STAGES * NL, BN, R], c_desc.layout)
        k_buf = gl.allocate_shared_memory(dtype, [STAGES, BN, E], k_desc.layout)
        FLAT_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        MERGE_ROWS: gl.constexpr = 64 if SHARE_ROWS else 16
        MERGE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MERGE_ROWS, R], gl.float32)
        if NL == 2:  # the queries are no longer needed
            merge_buf = reinterpret(q_buf, gl.float32, [1, MERGE_ROWS, R], MERGE_LAYOUT)
        else:
            merge_buf = gl.allocate_shared_memory(gl.float32, [1, MERGE_ROWS, R], MERGE_LAYOUT)
        merge_stats = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT_SHARED)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        merge_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        merge_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1 if SHARE_ROWS else 2)
        mbarrier.init(q_full, count=1 if SHARE_ROWS else 2)
        mbarrier.init(merge_full, count=1)
        mbarrier.init(merge_empty, count=1)
        fence_async_shared()
        barrier()

        LANES: gl.constexpr = L // NL
        lanes = LANES * ((T * H * NL + BM - 1) // BM)
        p = gl.program_id(0) // lanes
        lane = gl.program_id(0) % lanes
        latent = (lane % LANES) * NL
        row0 = (lane // LANES) * BM
        if not SETTLED:
            program_wait(PDL)
        program_release(PDL)
        gl.warp_specialize(
            [
                (
                    _attend,
                    (
                        q_buf, qr_buf.index(0), c_buf, k_buf, full, empty, q_full,
                        merge_buf.index(0), merge_stats, merge_full, merge_empty, q, q_rope, out, part, part_lse,
                        kv_end, kv_start, key_mask,
                        B, T, P, whole, p, latent, row0, scale_log2,
                        q_b, q_t, q_l, q_h, qr_b, qr_t, qr_g, qr_h, o_b, o_t, o_l, o_h, mask_b,
                        0, SHARE_ROWS, OVERLAP, NL, L, GROUPS, H, R, E, BN, STAGES, UNIT, MIN_UNITS, BLOCK_B,
                        HAS_START, HAS_MASK, CAUSAL, BIG, EARLY,
                    ),
                ),
                (
                    _attend,
                    (
                        q_buf, qr_buf.index(Q_COPIES - 1), c_buf, k_buf, full, empty, q_full,
                        merge_buf.index(0), merge_stats, merge_full, merge_empty, q, q_rope, out, part, part_lse,
                        kv_end, kv_start, key_mask,
                        B, T, P, whole, p, latent, row0, scale_log2,
                        q_b, q_t, q_l, q_h, qr_b, qr_t, qr_g, qr_h, o_b, o_t, o_l, o_h, mask_b,
                        1, SHARE_ROWS, OVERLAP, NL, L, GROUPS, H, R, E, BN, STAGES, UNIT, MIN_UNITS, BLOCK_B,
                        HAS_START, HAS_MASK, CAUSAL, BIG, EARLY,
                    ),
                ),
                (
                    _copy_tiles,
                    (
                        c_desc, k_desc, c_buf, k_buf, full, empty, q_full, kv_end, kv_start, B, T, P, S, p, latent,
                        NL, R, BN, STAGES, AHEAD, UNIT, MIN_UNITS, BLOCK_B, HAS_START, BIG, EARLY,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
