"""Triton kernels of the absorbed decode attention: split over the cached rows, then one reduction over the splits.

Shapes: B sequences, T query positions, L latents in G groups (L / G latents share a group's rotary queries), H heads
per latent, r latent width, e rotary width, S cached rows; M = T * H query rows, row m is
head m % H of position m // H.

Work is dealt out on the device. The rows in use, counted in units of UNIT rows and laid end to end over the batch, are
cut into P equal shares, one per program; kv_end is never read by the host, and an allocated but unused tail costs
nothing. A share that covers a whole sequence writes its output; any other writes a normalised partial result with its
log2-sum-exp, which the second kernel reduces. It is launched early and waits on the device where that is supported
(programmatic dependent launch).
"""

import math
from dataclasses import dataclass

import torch

from .decode_arguments_mlra import (
    Cached,
    Deal,
    DecodeQueries,
    DecodeShape,
    DecodeTile,
    QueryRows,
    Results,
    Segment,
    Strides,
    Visible,
)
from .decode_hopper_mlra import rows_kernel
from .decode_plans_mlra import deal_work, decode_plans, fits_hopper, reduction_plan
from .device_gluon_mlra import TensorDescriptor, gl
from .device_mlra import cannot_be_built, constants, device_facts, launch, launch_options, tl, triton

if triton is not None:
    from .device_triton_mlra import dot, program_release, program_wait, rescale

    @triton.jit
    def _lengths(kv_start, kv_end, offs, B, UNIT: tl.constexpr, HAS_START: tl.constexpr):
        """First row, one past the last row, and number of work units (at least one) of the sequences `offs`."""
        end = tl.load(kv_end + offs, mask=offs < B, other=0)
        start = tl.load(kv_start + offs, mask=offs < B, other=0) if HAS_START else tl.zeros_like(end)
        units = tl.maximum((end - start + (UNIT - 1)) // UNIT, 1)
        return start, end, tl.where(offs < B, units, 0)

    @triton.jit
    def _shares(total, P, MIN_UNITS: tl.constexpr):
        """How many programs get work."""
        return tl.minimum(P, (total + (MIN_UNITS - 1)) // MIN_UNITS)

    @triton.jit
    def _share_start(p, total, shares, BIG: tl.constexpr):
        """First work unit of program p: floor(p * total / shares)."""
        if BIG:
            return (p.to(tl.int64) * total // shares).to(tl.int32)
        return p * total // shares

    @triton.jit
    def parts_of(
        b, kv_end, kv_start, B, P,
        UNIT: tl.constexpr, MIN_UNITS: tl.constexpr, BLOCK_B: tl.constexpr, HAS_START: tl.constexpr, BIG: tl.constexpr,
    ):  # fmt: skip
        """Which programs, first and last, have a share of sequence b. Program p leaves its partial result at p + b."""
        offs_b = tl.arange(0, BLOCK_B)
        _, _, units = _lengths(kv_start, kv_end, offs_b, B, UNIT, HAS_START)
        total = tl.sum(units, 0)
        shares = _shares(total, P, MIN_UNITS)
        first = tl.sum(tl.where(offs_b < b, units, 0), 0)
        last = first + tl.sum(tl.where(offs_b == b, units, 0), 0) - 1
        if BIG:
            p_first = (((first + 1).to(tl.int64) * shares - 1) // total).to(tl.int32)
            p_last = (((last + 1).to(tl.int64) * shares - 1) // total).to(tl.int32)
        else:
            p_first = ((first + 1) * shares - 1) // total
            p_last = ((last + 1) * shares - 1) // total
        return p_first, p_last

    @triton.jit
    def _cache_offsets(table_row, j, n, ok, stride, PAGE: tl.constexpr):
        """Element offsets of cached rows j + n: a 64-bit tile base, and row offsets relative to it."""
        if PAGE:
            page = tl.load(table_row + (j + n) // PAGE, mask=ok, other=0)
            return 0, (page.to(tl.int64) * PAGE + (j + n) % PAGE) * stride
        else:  # its types differ, so the compiler must not come here too
            return tl.cast(j, tl.int64) * stride, n * stride

    @triton.jit
    def _softmax_step(s, seen, m, scale_log2, AXIS: tl.constexpr):
        """Scores to weights against the running maximum (log2 units): weights, factor of what came before, maximum."""
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, AXIS) * scale_log2)
        m_ref, alpha = rescale(m, m_new)
        return tl.exp2(s * scale_log2 - tl.expand_dims(m_ref, AXIS)), alpha, m_new

    @triton.jit
    def _rows_segment(
        q, qr, c, k, mask_row, table_row, queries, cached, rows, segment, scale_log2,
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
        for j in tl.range(segment.lo, segment.hi, TILE.BN):
            ok_n = offs < segment.hi - j
            k_base, k_rows = _cache_offsets(table_row, j, offs, ok_n, cached.k_s, SHAPE.PAGE)
            c_base, c_rows = _cache_offsets(table_row, j, offs, ok_n, cached.c_s, SHAPE.PAGE)
            if SHAPE.HAS_MASK:  # rows that are left out may hold NaN, which a weight of 0 would spread
                ok_n = ok_n & (tl.load(mask_row + j + offs, mask=ok_n, other=0) != 0)
            k_tile = tl.load(
                k + k_base + (k_rows[:, None] + offs_e[None, :]), mask=ok_n[:, None] & ok_e[None, :], other=0.0
            )
            c_tile = tl.load(
                c + c_base + (c_rows[:, None] + offs_d[None, :]), mask=ok_n[:, None] & ok_d[None, :], other=0.0
            )
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
        q, qr, c, k, mask_row, table_row, queries, cached, rows, segment, scale_log2,
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
        for j in tl.range(segment.lo, segment.hi, TILE.BN):
            ok_n = offs < segment.hi - j
            k_base, k_rows = _cache_offsets(table_row, j, offs, ok_n, cached.k_s, SHAPE.PAGE)
            c_base, c_rows = _cache_offsets(table_row, j, offs, ok_n, cached.c_s, SHAPE.PAGE)
            if SHAPE.HAS_MASK:
                ok_n = ok_n & (tl.load(mask_row + j + offs, mask=ok_n, other=0) != 0)
            k_tile = tl.load(
                k + k_base + (k_rows[:, None] + offs_e[None, :]), mask=ok_n[:, None] & ok_e[None, :], other=0.0
            )
            k_tile = tl.broadcast_to(tl.reshape(k_tile, [1, TILE.BN, TILE.EP]), [NL, TILE.BN, TILE.EP])
            c_tile = tl.load(
                c + c_base + ((c_rows[None, :] + (latent * cached.c_l)[:, None])[:, :, None] + offs_d[None, None, :]),
                mask=ok_n[None, :, None] & ok_d[None, None, :],
                other=0.0,
            )
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
        c_base = cached.latents + b64 * cached.c_b + l0 * cached.c_l
        k_base = cached.k_rope + b64 * cached.k_b
        if TILE.NL == 1:
            acc, m, norm = _rows_segment(
                q_base, qr_base, c_base, k_base, mask_row, table_row, queries, cached, rows, segment, scale_log2,
                SHAPE, TILE,
            )  # fmt: skip
            acc = acc[None]
            m = m[None]
            norm = norm[None]
        else:
            acc, m, norm = _latents_segment(
                q_base, qr_base, c_base, k_base, mask_row, table_row, queries, cached, rows, segment, scale_log2,
                SHAPE, TILE,
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
        queries, cached, visible, results, B, T, P, whole, scale_log2,
        SHAPE, TILE, DEAL, PDL: tl.constexpr,
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
        starts, ends, units = _lengths(visible.kv_start, visible.kv_end, offs_b, B, UNIT, DEAL.HAS_START)
        cum = tl.cumsum(units, 0)
        total = tl.sum(units, 0)
        shares = _shares(total, P, DEAL.MIN_UNITS)
        program_release(PDL)
        if p >= shares:
            return
        pos = _share_start(p, total, shares, DEAL.BIG)
        last_pos = _share_start(p + 1, total, shares, DEAL.BIG)
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

    @triton.jit(do_not_specialize=["B", "P"])
    def combine_kernel(
        out, part, part_lse, kv_end, kv_start, B, T, P, o_b, o_t, o_l, o_h,
        L: tl.constexpr, H: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr, MIN_UNITS: tl.constexpr,
        BLOCK_B: tl.constexpr, HAS_START: tl.constexpr, BIG: tl.constexpr,
        ROWS: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Reduce the partial results of ROWS query rows of one latent and sequence, BD columns; whole ones are done.

        Many splits: one query row, SPLITS at once. Few (SPLITS = 1): ROWS query rows, one split after the other.
        """
        b = tl.program_id(2)
        M = T * H
        blocks = (M + ROWS - 1) // ROWS
        l = tl.program_id(1) // blocks  # noqa: E741
        m0 = tl.program_id(1) % blocks * ROWS
        offs_d = tl.program_id(0) * BD + tl.arange(0, BD)
        ok_d = offs_d < R
        o_base = out + b.to(tl.int64) * o_b + l * o_l
        program_release(PDL)
        p_first, p_last = parts_of(b, kv_end, kv_start, B, P, UNIT, MIN_UNITS, BLOCK_B, HAS_START, BIG)
        program_wait(PDL)
        if p_first == p_last:
            return
        if SPLITS == 1:
            m = m0 + tl.arange(0, ROWS)
            ok_m = m < M
            ok = ok_m[:, None] & ok_d[None, :]
            acc = tl.zeros([ROWS, BD], tl.float32)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            for p in tl.range(p_first, p_last + 1):
                rows = ((p + b) * L + l).to(tl.int64) * M + m
                lse = tl.load(part_lse + rows, mask=ok_m, other=float("-inf"))
                z = tl.load(part + (rows * R)[:, None] + offs_d[None, :], mask=ok, other=0.0)
                new_top = tl.maximum(top, lse)
                ref, alpha = rescale(top, new_top)
                w = tl.exp2(lse - ref)
                acc = acc * alpha[:, None] + z * w[:, None]
                norm = norm * alpha + w
                top = new_top
            z = acc * tl.where(norm > 0, 1.0 / norm, 0.0)[:, None]
            o_rows = (m // H) * o_t + (m % H) * o_h
            tl.store(o_base + o_rows[:, None] + offs_d[None, :], z.to(out.dtype.element_ty), mask=ok)
        else:
            acc = tl.zeros([BD], tl.float32)
            top = float("-inf")
            norm = 0.0
            for p0 in tl.range(p_first, p_last + 1, SPLITS):
                ps = p0 + tl.arange(0, SPLITS)
                ok = ps <= p_last
                rows = ((ps + b) * L + l).to(tl.int64) * M + m0
                lse = tl.load(part_lse + rows, mask=ok, other=float("-inf"))
                z = tl.load(part + (rows * R)[:, None] + offs_d[None, :], mask=ok[:, None] & ok_d[None, :], other=0.0)
                new_top = tl.maximum(top, tl.max(lse, 0))
                ref, alpha = rescale(top, new_top)
                w = tl.exp2(lse - ref)
                acc = acc * alpha + tl.sum(z * w[:, None], 0)
                norm = norm * alpha + tl.sum(w, 0)
                top = new_top
            z = acc * tl.where(norm > 0, 1.0 / norm, 0.0)
            tl.store(o_base + (m0 // H) * o_t + (m0 % H) * o_h + offs_d, z.to(out.dtype.element_ty), mask=ok_d)


@dataclass
class PartialResults:
    """What the decode kernel leaves of shares that do not cover a whole sequence, for a second kernel to reduce.

    Attributes:
        part: float32 `[programs + B - 1, L, M, r]`, normalised, at `program + sequence`: with sequences laid end to
            end, this grows from each share of a sequence to the next.
        lse: float32 `[programs + B - 1, L, M]`, log2-sum-exp of the weights behind each.
        programs: number of shares at most.
        deal: constants of the division of work, for `parts_of`.
    """

    part: torch.Tensor
    lse: torch.Tensor
    programs: int
    deal: dict


_fitting_plans: dict[tuple, int | Exception] = {}  # which of the plans for a kernel can be built, or why none


def triton_latent_attention(q_latent, q_rope, latents, k_rope, kv_end, kv_start, *arguments, **tuning) -> torch.Tensor:
    """Run both kernels; arguments as in `latent_attention`. `tuning` overrides entries of `decode_plan`."""
    batch, length, num_latents, heads, width = q_latent.shape
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    kv_end = kv_end.to(torch.int32).contiguous()
    kv_start = None if kv_start is None else kv_start.to(torch.int32).contiguous()
    parts = partial_results(out, q_latent, q_rope, latents, k_rope, kv_end, kv_start, *arguments, **tuning)
    if parts.programs > 1:
        rows, early = length * heads, device_facts(out.device).early
        grid, reduction = reduction_plan(batch, num_latents, rows, parts.programs, width)
        launch(
            out.device, combine_kernel, grid,
            out, parts.part, parts.lse, kv_end, kv_start, batch, length, parts.programs, *out.stride()[:4],
            L=num_latents, H=heads, R=width, PDL=early, **reduction, **parts.deal, **launch_options(early),
        )  # fmt: skip
    return out


def partial_results(
    out, q_latent, q_rope, latents, k_rope, kv_end, kv_start, key_mask, block_table, page_size, scaling,
    settled=False, **tuning,
) -> PartialResults:  # fmt: skip
    """Run the decode kernel with the best plan that fits; arguments as in `latent_attention`, lengths in int32.

    Args:
        out: like `q_latent`, takes the results of sequences that one share covers; None leaves these as a part too.

    Raises:
        Exception: of the last plan, if none can be built for the device (`cannot_be_built`); at once the next time.
    """
    batch, length, num_latents, heads, width = q_latent.shape
    groups, rope_width = q_rope.shape[2:5:2]
    q_latent, q_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope))
    latents, k_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (latents, k_rope))
    facts = device_facts(q_latent.device)
    hopper = facts.hopper and rows_kernel is not None and fits_hopper(latents, k_rope, block_table)
    capacity = latents.shape[1] if block_table is None else block_table.shape[1] * page_size
    plans = decode_plans(
        length * heads, num_latents, groups, width, rope_width, latents.element_size(), batch * capacity, hopper, facts
    )
    if tuning:
        plans = tuple(plan | tuning for plan in plans)
    arguments = (
        out, q_latent, q_rope, latents, k_rope, kv_end, kv_start, key_mask, block_table, page_size, scaling,
        capacity, settled,
    )  # fmt: skip
    given = (kv_start is None, key_mask is None, page_size, length > 1, settled)
    key = (q_latent.device, latents.dtype, num_latents, groups, heads, width, rope_width, given, *plans[0].values())
    index = _fitting_plans.get(key, 0)
    while not isinstance(index, Exception):
        try:
            result = _launch(plans[index], *arguments)
        except Exception as error:
            if not cannot_be_built(error):
                raise
            index = index + 1 if index + 1 < len(plans) else error
            continue
        _fitting_plans[key] = index
        return result
    _fitting_plans[key] = index
    raise index


def _launch(
    plan, out, q_latent, q_rope, latents, k_rope, kv_end, kv_start, key_mask, block_table, page_size, scaling,
    capacity, settled,
):  # fmt: skip
    batch, length, num_latents, heads, width = q_latent.shape
    groups, rope_width = q_rope.shape[2:5:2]
    device, rows = q_latent.device, length * heads
    facts = device_facts(device)
    whole, out = int(out is not None), q_latent if out is None else out
    c_strides, k_strides = latents.stride(), k_rope.stride()
    if block_table is not None:
        c_strides, k_strides = (0, *c_strides), (0, *k_strides)
    lanes = (num_latents // plan["NL"]) * -(-rows // plan["BM"])
    programs, deal = deal_work(
        batch, capacity, lanes, facts.multiprocessors * plan["programs_per_sm"], plan["UNIT"], plan["MIN_UNITS"],
        kv_start is not None,
    )  # fmt: skip
    slots = programs + batch - 1
    part = torch.empty((slots, num_latents, rows, width), dtype=torch.float32, device=device)
    part_lse = torch.empty((slots, num_latents, rows), dtype=torch.float32, device=device)
    if key_mask is not None:
        key_mask = key_mask if key_mask.stride(-1) == 1 else key_mask.contiguous()
        key_mask = key_mask.view(torch.uint8) if key_mask.dtype == torch.bool else key_mask
    mask_stride = 0 if key_mask is None else key_mask.stride(0)
    scale_log2 = scaling * math.log2(math.e)
    queries = DecodeQueries(q_latent, q_rope, Strides(*q_latent.stride()[:4]), Strides(*q_rope.stride()[:4]))
    visible = Visible(kv_end, kv_start, key_mask, mask_stride)
    results = Results(out, Strides(*out.stride()[:4]), part, part_lse)
    options = {"PDL": facts.early, "num_warps": plan["num_warps"]} | launch_options(facts.early)
    if plan["kernel"] == "plain":
        page = page_size if block_table is not None else 0
        shape = DecodeShape(num_latents, groups, heads, width, rope_width, key_mask is not None, page, length > 1)
        tile = DecodeTile(*(plan[name] for name in DecodeTile._fields))
        table_stride = 0 if block_table is None else block_table.stride(0)
        cached = Cached(latents, k_rope, *c_strides[:3], *k_strides[:2], block_table, table_stride)
        launch(
            device, decode_kernel, (programs * lanes,),
            queries, cached, visible, results,
            batch, length, programs, whole, scale_log2,
            SHAPE=constants(shape), TILE=constants(tile), DEAL=constants(Deal(**deal)),
            num_stages=plan["num_stages"], **options,
        )  # fmt: skip
    else:
        numbers = {
            "L": num_latents, "H": heads, "R": width, "GROUPS": groups, "E": rope_width,
            "HAS_MASK": key_mask is not None, "CAUSAL": length > 1,
        }  # fmt: skip
        numbers |= {k: plan[k] for k in ("NL", "BM", "BN")} | deal | options
        launch(
            device, rows_kernel, (programs * lanes,),
            _rows_descriptor(latents, plan["BN"], width), _rows_descriptor(k_rope, plan["BN"], rope_width),
            q_latent, q_rope, out, part, part_lse, kv_end, kv_start, key_mask,
            batch, length, programs, capacity, whole, scale_log2,
            *q_latent.stride()[:4], *q_rope.stride()[:4], *out.stride()[:4], mask_stride,
            STAGES=plan["num_stages"], AHEAD=plan["AHEAD"], OVERLAP=plan["OVERLAP"], SETTLED=settled, **numbers,
        )  # fmt: skip
    return PartialResults(part, part_lse, programs, deal)


def _rows_descriptor(tensor: torch.Tensor, block_rows: int, block_columns: int):
    """A bulk-copy descriptor of cached rows [B, S, ...] as a matrix of B * S rows."""
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    block = [block_rows, block_columns]
    shape = [tensor.shape[0] * tensor.shape[1], tensor[0, 0].numel()]
    return TensorDescriptor(
        tensor, shape, [tensor.stride(1), 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype)
    )
