"""Triton kernels of the absorbed decode attention: split over the cached rows, then one reduction over the splits.

Shapes: B sequences, T query positions, L latents in G groups (L / G latents share a group's rotary queries), H heads
per latent, r latent width, e rotary width, S cached rows; M = T * H query rows, row m being head m % H of position m // H.

Work is dealt out on the device. The rows in use, counted in units of UNIT rows and laid end to end over the batch, are
cut into P equal shares, one per program; kv_end is never read by the host, and an allocated but unused tail costs
nothing. A share that covers a whole sequence writes its output; any other writes a normalised partial result with its
log2-sum-exp, which the second kernel reduces. It is launched early and waits on the device where that is supported
(programmatic dependent launch).
"""

import functools
import math
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

if triton is not None:

    @triton.jit
    def _program_wait(PDL: tl.constexpr):
        if PDL:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def _program_release(PDL: tl.constexpr):
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

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
    def _share_of(unit, total, shares, BIG: tl.constexpr):
        """The program that owns a work unit: the largest p with _share_start(p) <= unit."""
        if BIG:
            return (((unit + 1).to(tl.int64) * shares - 1) // total).to(tl.int32)
        return ((unit + 1) * shares - 1) // total

    @triton.jit(do_not_specialize=["B", "P"])
    def decode_kernel(
        q, q_rope, latents, k_rope, out, part, part_lse, kv_end, kv_start, key_mask, table,
        B, T, P, scale_log2,
        q_b, q_t, q_l, q_h, qr_b, qr_t, qr_g, qr_h, c_b, c_s, c_l, k_b, k_s, o_b, o_t, o_l, o_h, mask_b, table_b,
        L: tl.constexpr, GROUPS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
        RP: tl.constexpr, EP: tl.constexpr, NL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        UNIT: tl.constexpr, MIN_UNITS: tl.constexpr, BLOCK_B: tl.constexpr, SWAP: tl.constexpr,
        HAS_START: tl.constexpr, HAS_MASK: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
        BIG: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One share of the rows, for BM query rows and NL latents of one group.

        SWAP puts cached rows on the matrix unit's M side and query rows on its N side (S^T = C Q^T, O^T = C^T P^T):
        fewer padded rows when there are few heads.
        """
        AXIS: tl.constexpr = 0 if SWAP else 1
        LANES: tl.constexpr = L // NL
        PRECISION: tl.constexpr = "ieee" if latents.dtype.element_ty == tl.float32 else "tf32"
        M = T * H
        lanes = LANES * ((M + BM - 1) // BM)
        p = tl.program_id(0) // lanes
        lane = tl.program_id(0) % lanes
        l0 = (lane % LANES) * NL
        offs_m = (lane // LANES) * BM + tl.arange(0, BM)
        offs_d = tl.arange(0, RP)
        offs_e = tl.arange(0, EP)
        t = offs_m // H
        h = offs_m % H
        ok_m = offs_m < M
        ok_d = offs_d < R
        ok_e = offs_e < E

        _program_wait(PDL)
        offs_b = tl.arange(0, BLOCK_B)
        starts, ends, units = _lengths(kv_start, kv_end, offs_b, B, UNIT, HAS_START)
        cum = tl.cumsum(units, 0)
        total = tl.sum(units, 0)
        shares = _shares(total, P, MIN_UNITS)
        _program_release(PDL)
        if p >= shares:
            return
        first_pos = _share_start(p, total, shares, BIG)
        last_pos = _share_start(p + 1, total, shares, BIG)
        pos = first_pos
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
            b64 = b.to(tl.int64)

            q_rows = q + b64 * q_b + t * q_t + h * q_h
            qr_rows = q_rope + b64 * qr_b + t * qr_t + (l0 // (L // GROUPS)) * qr_g + h * qr_h
            if SWAP:
                qr_tile = tl.load(qr_rows[None, :] + offs_e[:, None], mask=ok_e[:, None] & ok_m[None, :], other=0.0)
            else:
                qr_tile = tl.load(qr_rows[:, None] + offs_e[None, :], mask=ok_m[:, None] & ok_e[None, :], other=0.0)
            qs = ()
            accs = ()
            ms = ()
            ls = ()
            for i in tl.static_range(NL):
                if SWAP:
                    q_tile = tl.load(
                        q_rows[None, :] + (l0 + i) * q_l + offs_d[:, None],
                        mask=ok_d[:, None] & ok_m[None, :],
                        other=0.0,
                    )
                    acc = tl.zeros([RP, BM], tl.float32)
                else:
                    q_tile = tl.load(
                        q_rows[:, None] + (l0 + i) * q_l + offs_d[None, :],
                        mask=ok_m[:, None] & ok_d[None, :],
                        other=0.0,
                    )
                    acc = tl.zeros([BM, RP], tl.float32)
                qs = qs + (q_tile,)
                accs = accs + (acc,)
                ms = ms + (tl.full([BM], float("-inf"), tl.float32),)
                ls = ls + (tl.zeros([BM], tl.float32),)

            limit = end - (T - 1) + t  # one past the last row each query row sees
            for j in tl.range(lo, hi, BN):
                offs_n = j + tl.arange(0, BN)
                ok_n = offs_n < hi
                if PAGE:
                    page = tl.load(table + b64 * table_b + offs_n // PAGE, mask=ok_n, other=0)
                    rows = page.to(tl.int64) * PAGE + offs_n % PAGE
                    c_rows = latents + rows * c_s
                    k_rows = k_rope + rows * k_s
                else:
                    rows = offs_n.to(tl.int64)
                    c_rows = latents + b64 * c_b + rows * c_s
                    k_rows = k_rope + b64 * k_b + rows * k_s
                k_tile = tl.load(k_rows[:, None] + offs_e[None, :], mask=ok_n[:, None] & ok_e[None, :], other=0.0)
                if HAS_MASK:
                    seen = ok_n & (tl.load(key_mask + b64 * mask_b + offs_n, mask=ok_n, other=0) != 0)
                else:
                    seen = ok_n
                seen = tl.expand_dims(seen, 1 - AXIS)
                if CAUSAL:
                    seen = seen & (tl.expand_dims(offs_n, 1 - AXIS) < tl.expand_dims(limit, AXIS))
                if SWAP:
                    s_rope = tl.dot(k_tile, qr_tile, input_precision=PRECISION)
                else:
                    s_rope = tl.dot(qr_tile, tl.trans(k_tile), input_precision=PRECISION)
                next_accs = ()
                next_ms = ()
                next_ls = ()
                for i in tl.static_range(NL):
                    c_tile = tl.load(
                        c_rows[:, None] + (l0 + i) * c_l + offs_d[None, :],
                        mask=ok_n[:, None] & ok_d[None, :],
                        other=0.0,
                    )
                    if SWAP:
                        s = tl.dot(c_tile, qs[i], s_rope, input_precision=PRECISION)
                    else:
                        s = tl.dot(qs[i], tl.trans(c_tile), s_rope, input_precision=PRECISION)
                    s = tl.where(seen, s * scale_log2, float("-inf"))
                    m_new = tl.maximum(ms[i], tl.max(s, AXIS))
                    m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
                    w = tl.exp2(s - tl.expand_dims(m_ref, AXIS))
                    alpha = tl.exp2(ms[i] - m_ref)
                    acc = accs[i] * tl.expand_dims(alpha, AXIS)
                    if SWAP:
                        acc = tl.dot(tl.trans(c_tile), w.to(c_tile.dtype), acc, input_precision=PRECISION)
                    else:
                        acc = tl.dot(w.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)
                    next_accs = next_accs + (acc,)
                    next_ms = next_ms + (m_new,)
                    next_ls = next_ls + (ls[i] * alpha + tl.sum(w, AXIS),)
                accs = next_accs
                ms = next_ms
                ls = next_ls

            whole = (pos == seq_first) & (stop_pos == seq_last)
            slot = 2 * p + (pos != first_pos).to(tl.int32)
            for i in tl.static_range(NL):
                inverse = tl.where(ls[i] > 0, 1.0 / ls[i], 0.0)
                z = accs[i] * tl.expand_dims(inverse, AXIS)
                if SWAP:
                    z = tl.trans(z)
                if whole:
                    o_rows = out + b64 * o_b + t * o_t + (l0 + i) * o_l + h * o_h
                    tl.store(
                        o_rows[:, None] + offs_d[None, :],
                        z.to(out.dtype.element_ty),
                        mask=ok_m[:, None] & ok_d[None, :],
                    )
                else:
                    part_rows = (slot * L + l0 + i).to(tl.int64) * M + offs_m
                    tl.store(part_lse + part_rows, ms[i] + tl.log2(ls[i]), mask=ok_m)
                    tl.store(part + part_rows[:, None] * R + offs_d[None, :], z, mask=ok_m[:, None] & ok_d[None, :])
            pos = stop_pos
            b += 1

    @triton.jit(do_not_specialize=["B", "P"])
    def combine_kernel(
        out, part, part_lse, kv_end, kv_start, B, T, P, o_b, o_t, o_l, o_h,
        L: tl.constexpr, H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, UNIT: tl.constexpr,
        MIN_UNITS: tl.constexpr, BLOCK_B: tl.constexpr, SPLITS: tl.constexpr, HAS_START: tl.constexpr,
        BIG: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Reduce the partial results of one query row (program 0) of one sequence (program 1); whole ones are done."""
        b = tl.program_id(1)
        M = T * H
        l = tl.program_id(0) // M  # noqa: E741
        m = tl.program_id(0) % M
        offs_b = tl.arange(0, BLOCK_B)
        starts, ends, units = _lengths(kv_start, kv_end, offs_b, B, UNIT, HAS_START)
        total = tl.sum(units, 0)
        first = tl.sum(tl.where(offs_b < b, units, 0), 0)
        last = first + tl.sum(tl.where(offs_b == b, units, 0), 0) - 1
        shares = _shares(total, P, MIN_UNITS)
        p_first = _share_of(first, total, shares, BIG)
        p_last = _share_of(last, total, shares, BIG)
        _program_wait(PDL)
        if p_first == p_last:
            return
        offs_d = tl.arange(0, RP)
        ok_d = offs_d < R
        acc = tl.zeros([RP], tl.float32)
        top = float("-inf")
        norm = 0.0
        for p0 in tl.range(p_first, p_last + 1, SPLITS):
            ps = p0 + tl.arange(0, SPLITS)
            ok = ps <= p_last
            slots = 2 * ps + (_share_start(ps, total, shares, BIG) < first).to(tl.int32)
            rows = (slots * L + l).to(tl.int64) * M + m
            lse = tl.load(part_lse + rows, mask=ok, other=float("-inf"))
            z = tl.load(part + rows[:, None] * R + offs_d[None, :], mask=ok[:, None] & ok_d[None, :], other=0.0)
            new_top = tl.maximum(top, tl.max(lse, 0))
            ref = tl.where(new_top == float("-inf"), 0.0, new_top)
            w = tl.exp2(lse - ref)
            alpha = tl.exp2(top - ref)
            acc = acc * alpha + tl.sum(z * w[:, None], 0)
            norm = norm * alpha + tl.sum(w, 0)
            top = new_top
        z = acc * tl.where(norm > 0, 1.0 / norm, 0.0)
        row = out + b.to(tl.int64) * o_b + (m // H) * o_t + l * o_l + (m % H) * o_h
        tl.store(row + offs_d, z.to(out.dtype.element_ty), mask=ok_d)


def triton_missing(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel cannot run on such tensors, or None if it can."""
    if triton is None:
        return "module triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 or float32, not {dtype}; use 'torch'"
    if device_type == "cpu" and not INTERPRETED:
        return "Triton needs a GPU; on this CPU use 'torch' (or set TRITON_INTERPRET=1 to run Triton's interpreter)"
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"Triton does not run on {device_type}; use 'torch'"
    return None


@functools.lru_cache
def _device_facts(index: int | None) -> tuple[int, bool]:
    """Number of multiprocessors, and whether kernels can be launched early (programmatic dependent launch)."""
    if index is None:
        return 4, False
    properties = torch.cuda.get_device_properties(index)
    early = torch.version.hip is None and properties.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait")
    return properties.multi_processor_count, early


def decode_plan(rows: int, num_latents: int, groups: int, width: int, rope_width: int, itemsize: int) -> dict:
    """Block sizes for M = `rows` query rows per latent; see evals/results/decode_notes.md for what was measured."""
    padded = max(16, triton.next_power_of_2(width))
    rope_padded = max(16, triton.next_power_of_2(rope_width))
    swap = rows <= 32
    block_m = max(16, triton.next_power_of_2(rows)) if swap else 64
    per_row = (padded + rope_padded) * itemsize
    block_n = 128 if per_row <= 384 else 64 if per_row <= 768 else 32
    return {
        "RP": padded, "EP": rope_padded, "NL": 1, "BM": block_m, "BN": block_n, "UNIT": 32, "MIN_UNITS": 1,
        "SWAP": swap, "num_warps": 4 if block_m * padded <= 64 * 256 else 8, "num_stages": 3 if itemsize == 2 else 2,
        "programs_per_sm": 1,
    }  # fmt: skip


def triton_latent_attention(
    q_latent, q_rope, latents, k_rope, kv_end, kv_start, key_mask, block_table, page_size, scaling, **tuning
):
    """Launch the kernels; arguments as in `latent_attention`, `tuning` overrides entries of `decode_plan`."""
    batch, length, num_latents, heads, width = q_latent.shape
    groups, rope_width = q_rope.shape[2:5:2]
    device = q_latent.device
    q_latent, q_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope))
    latents, k_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (latents, k_rope))
    kv_end = kv_end.to(torch.int32).contiguous()
    kv_start = None if kv_start is None else kv_start.to(torch.int32).contiguous()
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=device)
    rows = length * heads
    plan = decode_plan(rows, num_latents, groups, width, rope_width, latents.element_size()) | tuning
    meta = {k: plan[k] for k in ("UNIT", "MIN_UNITS", "RP")}
    multiprocessors, early = _device_facts(device.index if device.type == "cuda" else None)
    early = early and plan.get("PDL", True)
    lanes = (num_latents // plan["NL"]) * triton.cdiv(rows, plan["BM"])
    programs = max(1, multiprocessors * plan["programs_per_sm"] // lanes)
    meta["BLOCK_B"] = triton.next_power_of_2(batch)
    if block_table is None:
        capacity, c_strides, k_strides = latents.shape[1], latents.stride(), k_rope.stride()
    else:
        capacity = block_table.shape[1] * page_size
        c_strides, k_strides = (0, *latents.stride()), (0, *k_rope.stride())
    total = batch * (triton.cdiv(capacity, plan["UNIT"]) + 1)
    meta |= {"L": num_latents, "H": heads, "R": width, "HAS_START": kv_start is not None}
    meta |= {"BIG": (total + 1) * (programs + 1) >= 2**31, "PDL": early}
    part = torch.empty((2 * programs, num_latents, rows, width), dtype=torch.float32, device=device)
    part_lse = torch.empty((2 * programs, num_latents, rows), dtype=torch.float32, device=device)
    launch = {"launch_pdl": True} if early else {}
    if key_mask is not None:
        key_mask = key_mask if key_mask.stride(-1) == 1 else key_mask.contiguous()
        key_mask = key_mask.view(torch.uint8) if key_mask.dtype == torch.bool else key_mask
    decode_kernel[(programs * lanes,)](
        q_latent, q_rope, latents, k_rope, out, part, part_lse, kv_end, kv_start, key_mask, block_table,
        batch, length, programs, scaling * math.log2(math.e),
        *q_latent.stride()[:4], *q_rope.stride()[:4], *c_strides[:3], *k_strides[:2], *out.stride()[:4],
        0 if key_mask is None else key_mask.stride(0), 0 if block_table is None else block_table.stride(0),
        GROUPS=groups, E=rope_width, EP=plan["EP"], NL=plan["NL"], BM=plan["BM"], BN=plan["BN"], SWAP=plan["SWAP"],
        HAS_MASK=key_mask is not None, PAGE=page_size if block_table is not None else 0, CAUSAL=length > 1,
        num_warps=plan["num_warps"], num_stages=plan["num_stages"], **meta, **launch,
    )  # fmt: skip
    if programs > 1:
        most_splits = min(programs, triton.cdiv(total // batch, plan["MIN_UNITS"]))
        typical = max(2, min(64, triton.next_power_of_2(triton.cdiv(most_splits, batch) + 1)))
        combine_kernel[(num_latents * rows, batch)](
            out, part, part_lse, kv_end, kv_start, batch, length, programs, *out.stride()[:4],
            SPLITS=typical, num_warps=4 if typical > 8 else 1, **meta, **launch,
        )  # fmt: skip
    return out
