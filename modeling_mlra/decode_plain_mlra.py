"""The portable Triton kernel of the absorbed decode attention: one share of the cached rows a program.

Shapes: B sequences, T query positions, L latents in G groups (L / G latents share a group's rotary queries), H heads
per latent, r latent width, e rotary width, S cached rows; M = T * H query rows, row m is
head m % H of position m // H. `decode_deal_mlra` deals out the work.
"""

from .decode_arguments_mlra import QueryRows, Segment
from .device_mlra import tl, triton

if triton is not None:
    from .decode_deal_mlra import lengths, share_start, shares_of
    from .device_triton_mlra import dot, from_e4m3, program_release, program_wait, rescale

    @triton.jit
    def _cache_offsets(table_row, j, n, ok, stride, PAGE: tl.constexpr):
        """Element offsets of cached rows j + n: a 64-bit tile base, and row offsets relative to it."""
        if PAGE:
            page = tl.load(table_row + (j + n) // PAGE, mask=ok, other=0)
            return 0, (page.to(tl.int64) * PAGE + (j + n) % PAGE) * stride
        else:  # its types differ, so the compiler must not come here too
            return tl.cast(j, tl.int64) * stride, n * stride

    @triton.jit
    def _in_words(stride, tensor, SCALED: tl.constexpr):
        """A stride of `tensor`, which the compiler is shown to be of whole 32-bit words, as rows of bytes are."""
        if SCALED:
            numbers = 32 // tensor.dtype.element_ty.primitive_bitwidth
            return stride // numbers * numbers
        return stride

    @triton.jit
    def _softmax_step(s, seen, m, scale_log2, AXIS: tl.constexpr):
        """Scores to weights against the running maximum (log2 units): weights, factor of what came before, maximum."""
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, AXIS) * scale_log2)
        m_ref, alpha = rescale(m, m_new)
        return tl.exp2(s * scale_log2 - tl.expand_dims(m_ref, AXIS)), alpha, m_new

    @triton.jit
    def _rows_segment(
        q, qr, c, k, scales, mask_row, table_row, queries, cached, rows, segment, scale_log2,
        SHAPE: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """One latent, BM query rows as rows of the matrix product. Returns sums [BM, RP], log2 maxima, weight sums."""
        offs_d = tl.arange(0, TILE.RP)
        offs_e = tl.arange(0, TILE.EP)
        ok_d = offs_d < SHAPE.R
        ok_e = offs_e < SHAPE.E
        q_rows = rows.t * queries.strides.t + rows.h * queries.strides.h
        qr_rows = rows.t * queries.rope_strides.t + rows.h * queries.rope_strides.h
        ok_m = rows.known[:, None]
        q_tile = tl.load(q + q_rows[:, None] + offs_d[None, :], mask=ok_m & ok_d[None, :], other=0.0)
        qr_tile = tl.load(qr + qr_rows[:, None] + offs_e[None, :], mask=ok_m & ok_e[None, :], other=0.0)
        acc = tl.zeros([TILE.BM, TILE.RP], tl.float32)
        m = tl.full([TILE.BM], float("-inf"), tl.float32)
        norm = tl.zeros([TILE.BM], tl.float32)
        offs = tl.arange(0, TILE.BN)
        c_s = _in_words(cached.c_s, c, SHAPE.SCALED)
        k_s = _in_words(cached.k_s, k, SHAPE.SCALED)
        for j in tl.range(segment.lo, segment.hi, TILE.BN):
            ok_n = offs < segment.hi - j
            k_base, k_rows = _cache_offsets(table_row, j, offs, ok_n, k_s, SHAPE.PAGE)
            c_base, c_rows = _cache_offsets(table_row, j, offs, ok_n, c_s, SHAPE.PAGE)
            if SHAPE.HAS_MASK:  # rows that are left out may hold NaN, which a weight of 0 would spread
                ok_n = ok_n & (tl.load(mask_row + j + offs, mask=ok_n, other=0) != 0)
            k_tile = tl.load(
                k + k_base + (k_rows[:, None] + offs_e[None, :]), mask=ok_n[:, None] & ok_e[None, :], other=0.0
            )
            c_tile = tl.load(
                c + c_base + (c_rows[:, None] + offs_d[None, :]), mask=ok_n[:, None] & ok_d[None, :], other=0
            )
            if SHAPE.SCALED:
                s_base, s_rows = _cache_offsets(table_row, j, offs, ok_n, cached.s_s, SHAPE.PAGE)
                scale = tl.load(scales + s_base + s_rows, mask=ok_n, other=0.0)
                c_tile = from_e4m3(c_tile, scale[:, None], k_tile.dtype)
            seen = ok_n[None, :]
            if SHAPE.CAUSAL:
                seen = seen & (offs[None, :] < segment.limit[:, None] - j)
            s = dot(qr_tile, tl.trans(k_tile), None)
            s = dot(q_tile, tl.trans(c_tile), s)
            w, alpha, m = _softmax_step(s, seen, m, scale_log2, 1)
            norm = norm * alpha + tl.sum(w, 1)
            acc = dot(w.to(c_tile.dtype), c_tile, acc * alpha[:, None])
        return acc, m, norm

    @triton.jit
    def _latents_segment(
        q, qr, c, k, scales, mask_row, table_row, queries, cached, rows, segment, scale_log2,
        SHAPE: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """NL latents as a batched product: with NL warps, each has its own latent and never meets another, and the
        rotary keys are read once for all. For few query rows. Returns as `_rows_segment`, with a leading [NL].
        """
        NL: tl.constexpr = TILE.NL
        offs_d = tl.arange(0, TILE.RP)
        offs_e = tl.arange(0, TILE.EP)
        ok_d = offs_d < SHAPE.R
        ok_e = offs_e < SHAPE.E
        latent = tl.arange(0, NL)
        ok_q = rows.known[None, :, None]
        q_rows = (rows.t * queries.strides.t + rows.h * queries.strides.h)[None, :]
        q_rows = q_rows + (latent * queries.strides.l)[:, None]
        qr_rows = (rows.t * queries.rope_strides.t + rows.h * queries.rope_strides.h)[None, :]
        qr_rows = tl.broadcast_to(qr_rows, [NL, TILE.BM])
        q_tile = tl.load(q + q_rows[:, :, None] + offs_d[None, None, :], mask=ok_q & ok_d[None, None, :], other=0.0)
        qr_tile = tl.load(qr + qr_rows[:, :, None] + offs_e[None, None, :], mask=ok_q & ok_e[None, None, :], other=0.0)
        acc = tl.zeros([NL, TILE.BM, TILE.RP], tl.float32)
        m = tl.full([NL, TILE.BM], float("-inf"), tl.float32)
        norm = tl.zeros([NL, TILE.BM], tl.float32)
        offs = tl.arange(0, TILE.BN)
        c_s = _in_words(cached.c_s, c, SHAPE.SCALED)
        k_s = _in_words(cached.k_s, k, SHAPE.SCALED)
        for j in tl.range(segment.lo, segment.hi, TILE.BN):
            ok_n = offs < segment.hi - j
            k_base, k_rows = _cache_offsets(table_row, j, offs, ok_n, k_s, SHAPE.PAGE)
            c_base, c_rows = _cache_offsets(table_row, j, offs, ok_n, c_s, SHAPE.PAGE)
            if SHAPE.HAS_MASK:
                ok_n = ok_n & (tl.load(mask_row + j + offs, mask=ok_n, other=0) != 0)
            k_tile = tl.load(
                k + k_base + (k_rows[:, None] + offs_e[None, :]), mask=ok_n[:, None] & ok_e[None, :], other=0.0
            )
            k_tile = tl.broadcast_to(tl.reshape(k_tile, [1, TILE.BN, TILE.EP]), [NL, TILE.BN, TILE.EP])
            c_tile = tl.load(
                c + c_base + ((c_rows[None, :] + (latent * cached.c_l)[:, None])[:, :, None] + offs_d[None, None, :]),
                mask=ok_n[None, :, None] & ok_d[None, None, :],
                other=0,
            )
            if SHAPE.SCALED:
                s_base, s_rows = _cache_offsets(table_row, j, offs, ok_n, cached.s_s, SHAPE.PAGE)
                of_latent = s_rows[None, :] + latent[:, None]
                ok_s = tl.broadcast_to(ok_n[None, :], of_latent.shape)
                scale = tl.load(scales + s_base + of_latent, mask=ok_s, other=0.0)
                c_tile = from_e4m3(c_tile, scale[:, :, None], k_tile.dtype)
            seen = ok_n[None, None, :]
            if SHAPE.CAUSAL:
                seen = seen & (offs[None, None, :] < segment.limit[None, :, None] - j)
            s = dot(qr_tile, tl.permute(k_tile, (0, 2, 1)), None)
            s = dot(q_tile, tl.permute(c_tile, (0, 2, 1)), s)
            w, alpha, m = _softmax_step(s, seen, m, scale_log2, 2)
            norm = norm * alpha + tl.sum(w, 2)
            acc = dot(w.to(c_tile.dtype), c_tile, acc * alpha[:, :, None])
        return acc, m, norm

    @triton.jit
    def _attend_segment(
        queries, cached, visible, rows, segment, l0, scale_log2, SHAPE: tl.constexpr, TILE: tl.constexpr
    ):
        """Sums [NL, BM, RP], log2 maxima and weight sums of the latents from l0 on over a segment."""
        b64 = segment.b.to(tl.int64)
        mask_row = visible.key_mask + b64 * visible.mask_b if SHAPE.HAS_MASK else visible.key_mask
        table_row = cached.table + b64 * cached.table_b if SHAPE.PAGE else cached.table
        group = l0 // (SHAPE.L // SHAPE.GROUPS)
        q_base = queries.latent + b64 * queries.strides.b + l0 * queries.strides.l
        qr_base = queries.rope + b64 * queries.rope_strides.b + group * queries.rope_strides.l
        c_base = cached.latents + b64 * _in_words(cached.c_b, cached.latents, SHAPE.SCALED) + l0 * cached.c_l
        k_base = cached.k_rope + b64 * _in_words(cached.k_b, cached.k_rope, SHAPE.SCALED)
        s_base = cached.scales + b64 * cached.s_b + l0 if SHAPE.SCALED else cached.scales
        if TILE.NL == 1:
            acc, m, norm = _rows_segment(
                q_base, qr_base, c_base, k_base, s_base, mask_row, table_row, queries, cached, rows, segment,
                scale_log2, SHAPE, TILE,
            )  # fmt: skip
            acc = acc[None]
            m = m[None]
            norm = norm[None]
        else:
            acc, m, norm = _latents_segment(
                q_base, qr_base, c_base, k_base, s_base, mask_row, table_row, queries, cached, rows, segment,
                scale_log2, SHAPE, TILE,
            )  # fmt: skip
        return acc, m, norm

    @triton.jit
    def _store_segment(
        acc, m, norm, results, rows, b, l0, p, offs_m, M, complete, SHAPE: tl.constexpr, TILE: tl.constexpr
    ):
        """The result of a sequence that the segment covers, or program p's part of one."""
        z = acc * tl.where(norm > 0, 1.0 / norm, 0.0)[:, :, None]
        b64 = b.to(tl.int64)
        latent = l0 + tl.arange(0, TILE.NL)
        offs_d = tl.arange(0, TILE.RP)
        ok = rows.known[None, :, None] & (offs_d < SHAPE.R)[None, None, :]
        strides = results.strides
        if complete:
            o_rows = (rows.t * strides.t + rows.h * strides.h)[None, :] + (latent * strides.l)[:, None]
            o_base = results.out + b64 * strides.b
            tl.store(o_base + o_rows[:, :, None] + offs_d[None, None, :], z.to(results.out.dtype.element_ty), mask=ok)
        else:
            places = ((p + b64) * SHAPE.L + latent[:, None]) * M + offs_m[None, :]
            known = tl.broadcast_to(rows.known[None, :], places.shape)
            tl.store(results.lse + places, m + tl.log2(norm), mask=known)
            tl.store(results.part + (places * SHAPE.R)[:, :, None] + offs_d[None, None, :], z, mask=ok)

    @triton.jit(do_not_specialize=["B", "P", "whole"])
    def decode_kernel(
        queries, cached, visible, results, B, T, P, whole, scale_log2, SHAPE, TILE, DEAL, PDL: tl.constexpr
    ):  # fmt: skip
        """One share of the cached rows, for BM query rows of NL latents of a group; `whole` sequences go to `out`."""
        LANES: tl.constexpr = SHAPE.L // TILE.NL
        UNIT: tl.constexpr = DEAL.UNIT
        M = T * SHAPE.H
        lanes = LANES * ((M + TILE.BM - 1) // TILE.BM)
        p = tl.program_id(0) // lanes
        lane = tl.program_id(0) % lanes
        l0 = (lane % LANES) * TILE.NL
        offs_m = (lane // LANES) * TILE.BM + tl.arange(0, TILE.BM)
        rows = QueryRows(offs_m // SHAPE.H, offs_m % SHAPE.H, offs_m < M)

        program_wait(PDL)
        offs_b = tl.arange(0, DEAL.BLOCK_B)
        starts, ends, units = lengths(visible.kv_start, visible.kv_end, offs_b, B, UNIT, DEAL.HAS_START)
        cum = tl.cumsum(units, 0)
        total = tl.sum(units, 0)
        shares = shares_of(total, P, DEAL.MIN_UNITS)
        program_release(PDL)
        if p >= shares:
            return
        pos = share_start(p, total, shares, DEAL.BIG)
        last_pos = share_start(p + 1, total, shares, DEAL.BIG)
        b = tl.sum((cum <= pos).to(tl.int32), 0)
        while pos < last_pos:
            here = offs_b == b
            seq_last = tl.sum(tl.where(here, cum, 0), 0)
            seq_first = seq_last - tl.sum(tl.where(here, units, 0), 0)
            start = tl.sum(tl.where(here, starts, 0), 0)
            end = tl.sum(tl.where(here, ends, 0), 0)
            stop_pos = tl.minimum(last_pos, seq_last)
            lo = start + (pos - seq_first) * UNIT
            hi = tl.minimum(start + (stop_pos - seq_first) * UNIT, end)
            segment = Segment(b, lo, hi, end - (T - 1) + rows.t)
            acc, m, norm = _attend_segment(queries, cached, visible, rows, segment, l0, scale_log2, SHAPE, TILE)
            complete = (pos == seq_first) & (stop_pos == seq_last) & (whole != 0)
            _store_segment(acc, m, norm, results, rows, b, l0, p, offs_m, M, complete, SHAPE, TILE)
            pos = stop_pos
            b += 1
