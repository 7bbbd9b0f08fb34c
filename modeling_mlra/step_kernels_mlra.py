"""Triton kernels of the fused decoding step, and their tiles; `step_mlra` has the step, its numbering and legend.

Each program loads its weights, and whatever else no kernel in front writes, before it waits for the kernel in front
(programmatic dependent launch).
"""

from typing import Any

import torch

from .device_mlra import tl, triton

embed_kernel: Any = None
linear_kernel: Any = None
absorb_kernel: Any = None
value_kernel: Any = None
choose_kernel: Any = None

if triton is not None:
    from .decode_triton_mlra import _dot, _parts_of, _rescale

    @triton.jit
    def _wait(PDL: tl.constexpr):
        """Let the kernel behind load its weights, and wait for the one in front."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def embed_kernel(token_ids, stride, weight, hidden, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        """The embeddings of the tokens, BLOCK numbers to a program; the kernel behind loads its weights meanwhile."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(token_ids + tl.program_id(0) * stride).to(tl.int64)
        row = tl.load(weight + token * WIDTH + columns, mask=columns < WIDTH, other=0.0)
        tl.store(hidden + tl.program_id(0) * WIDTH + columns, row, mask=columns < WIDTH)

    @triton.jit
    def _block_of(block, w0, w1, w2, w3, n0, n1, n2, n3, ROWS: tl.constexpr):
        """Which of up to four stacked weights a row block lies in: the weight, its rows, the first row, the block."""
        w, n, first = w0, n0, 0
        blocks = tl.cdiv(n0, ROWS)
        if block >= blocks:
            block -= blocks
            w, n, first = w1, n1, n0
            blocks = tl.cdiv(n1, ROWS)
            if block >= blocks:
                block -= blocks
                w, n, first = w2, n2, n0 + n1
                blocks = tl.cdiv(n2, ROWS)
                if block >= blocks:
                    block -= blocks
                    w, n, first = w3, n3, n0 + n1 + n2
        return w, n, first, block

    @triton.jit
    def _tile(w, rows, n, first, K: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH columns from `first` on of some rows of a weight [n, K]."""
        columns = first + tl.arange(0, WIDTH)
        mask = (rows < n)[:, None] & (columns < K)[None, :]
        offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
        return tl.load(w + offsets, mask=mask, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def _columns(x, first, K: tl.constexpr, WIDTH: tl.constexpr):
        columns = first + tl.arange(0, WIDTH)
        return tl.load(x + columns, mask=columns < K, other=0.0)

    @triton.jit
    def linear_kernel(
        x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride,
        w0, w1, w2, w3, n0, n1, n2, n3,
        K: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
        NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """out[m] = [w0; w1; w2; w3] x[m] for row blocks of up to four weights, or silu(w0 x) * (w1 x).

        Rows are read in chunks of WIDTH columns: the first AHEAD before the wait, each later one AHEAD chunks ahead.
        """
        w, n, first, block = w0, n0, 0, tl.program_id(0)
        if not SWIGLU:
            w, n, first, block = _block_of(block, w0, w1, w2, w3, n0, n1, n2, n3, ROWS)
        rows = block * ROWS + tl.arange(0, ROWS)
        CHUNKS: tl.constexpr = (K + WIDTH - 1) // WIDTH
        early, early_up, early_gamma = (), (), ()
        for i in tl.static_range(min(AHEAD, CHUNKS)):
            early = early + (_tile(w, rows, n, i * WIDTH, K, WIDTH),)  # type: ignore[assignment]
            if SWIGLU:
                early_up = early_up + (_tile(w1, rows, n, i * WIDTH, K, WIDTH),)  # type: ignore[assignment]
            if NORM:
                early_gamma = early_gamma + (_columns(gamma, i * WIDTH, K, WIDTH),)  # type: ignore[assignment]
        _wait(PDL)
        for m in tl.static_range(M):
            target = m * out_stride + first + rows
            if RESIDUAL:
                before = tl.load(residual + target, mask=rows < n, other=0.0).to(tl.float32)
            weights, weights_up = early, early_up
            acc = tl.zeros([ROWS, WIDTH], tl.float32)
            if SWIGLU:
                acc_up = tl.zeros([ROWS, WIDTH], tl.float32)
            squares = tl.zeros([WIDTH], tl.float32)
            for i in tl.static_range(CHUNKS):
                if i + AHEAD < CHUNKS:
                    weights = weights + (_tile(w, rows, n, (i + AHEAD) * WIDTH, K, WIDTH),)  # type: ignore[assignment]
                    if SWIGLU:
                        weights_up = weights_up + (_tile(w1, rows, n, (i + AHEAD) * WIDTH, K, WIDTH),)  # type: ignore[assignment]
                row = _columns(x + m * x_stride, i * WIDTH, K, WIDTH).to(tl.float32)
                if NORM:
                    squares += row * row
                    chunk_gamma = early_gamma[i] if i < AHEAD else _columns(gamma, i * WIDTH, K, WIDTH)
                    row *= chunk_gamma.to(tl.float32)
                acc += weights[i].to(tl.float32) * row[None, :]
                if SWIGLU:
                    acc_up += weights_up[i].to(tl.float32) * row[None, :]
            factor = scale
            if NORM:
                factor = scale * tl.rsqrt(tl.sum(squares) / K + eps)
            y = tl.sum(acc, axis=1) * factor
            if SWIGLU:
                y = y * tl.sigmoid(y) * (tl.sum(acc_up, axis=1) * factor)
            if RESIDUAL:
                y += before * residual_share
            tl.store(out + target, y.to(out.dtype.element_ty), mask=rows < n)

    @triton.jit
    def absorb_kernel(
        q, a, a_stride, kv_first, kv_b, latent_gamma, inv_freq, counters, q_latent, q_rope, cache, cache_b, cache_s,
        alpha_kv, eps, rope_scale,
        M: tl.constexpr, T: tl.constexpr, MP: tl.constexpr, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
        R: tl.constexpr, DN: tl.constexpr, E: tl.constexpr, V: tl.constexpr, DNP: tl.constexpr, RP: tl.constexpr,
        RB: tl.constexpr, EP: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """q_latent[m, l, h] = W_uk[l, h]^T q_nope[m], RB columns to a program, token after token or (MP > 0) as one
        matrix product. The last M programs of each latent and head rotate instead, one token each: queries, and for
        the first head this token's cache row, which they normalise. T tokens in a row are of one sequence.

        `counters` holds [row of each sequence's first token, position of each token, ...], and is read before the
        wait: no kernel of the step writes it but the last. `a` holds the outputs of kernel 1.
        """
        latent, head = tl.program_id(0) // H, tl.program_id(0) % H
        query_head = (latent // C) * H + head
        block, rotated = tl.program_id(1), tl.program_id(1) - (tl.num_programs(1) - M)
        if rotated < 0:
            depth, columns = tl.arange(0, DNP), block * RB + tl.arange(0, RB)
            base = kv_b + (latent * H + head).to(tl.int64) * (DN + V) * R
            mask = (depth < DN)[:, None] & (columns < R)[None, :]
            weight = tl.load(base + depth[:, None] * R + columns[None, :], mask=mask, other=0.0)
            _wait(PDL)
            if MP > 0:
                vectors = tl.arange(0, MP)
                of_query = ((vectors * (L // C) * H + query_head) * (DN + E))[:, None] + depth[None, :]
                nopes = tl.load(q + of_query, mask=(vectors < M)[:, None] & (depth < DN)[None, :], other=0.0)
                sums = _dot(nopes, weight, None).to(weight.dtype)
                of_latent = (((vectors * L + latent) * H + head) * R)[:, None] + columns[None, :]
                tl.store(q_latent + of_latent, sums, mask=(vectors < M)[:, None] & (columns < R)[None, :])
            else:
                for m in tl.static_range(M):
                    nope = tl.load(q + (m * (L // C) * H + query_head) * (DN + E) + depth, mask=depth < DN, other=0.0)
                    z = tl.sum(weight.to(tl.float32) * nope.to(tl.float32)[:, None], axis=0)
                    target = q_latent + ((m * L + latent) * H + head) * R + columns
                    tl.store(target, z.to(weight.dtype), mask=columns < R)
        else:
            index, half = tl.arange(0, RP), tl.arange(0, EP)
            gamma = tl.load(latent_gamma + latent * R + index, mask=index < R, other=0.0).to(tl.float32)
            frequency = tl.load(inv_freq + half, mask=half < E // 2, other=0.0)
            place = (tl.load(counters) + rotated % T).to(tl.int64)
            row = cache + (rotated // T).to(tl.int64) * cache_b + place * cache_s
            angle = tl.load(counters + 1 + rotated).to(tl.float32) * frequency
            cos, sin = tl.cos(angle) * rope_scale, tl.sin(angle) * rope_scale
            rotates_query = half < tl.where(latent % C == 0, E // 2, 0)
            keeps_latent = index < tl.where(head == 0, R, 0)
            keeps_key = half < tl.where(tl.program_id(0) == 0, E // 2, 0)
            _wait(PDL)
            # All loads first: none then waits for another
            query = q + (rotated * (L // C) * H + query_head) * (DN + E) + DN + half
            q1, q2 = _halves(query, rotates_query, E)
            source = a + rotated * a_stride + kv_first
            c = tl.load(source + latent * R + index, mask=keeps_latent, other=0.0).to(tl.float32)
            k1, k2 = _halves(source + L * R + half, keeps_key, E)
            _rotate(q_rope + (rotated * (L // C) * H + query_head) * E + half, q1, q2, cos, sin, rotates_query, E)
            c = c * gamma * (alpha_kv * tl.rsqrt(tl.sum(c * c) / R + eps))
            tl.store(row + latent * R + index, c.to(cache.dtype.element_ty), mask=keeps_latent)
            _rotate(row + L * R + half, k1, k2, cos, sin, keeps_key, E)

    @triton.jit
    def _halves(source, mask, E: tl.constexpr):
        """The two halves of a vector that RoPE mixes."""
        x1 = tl.load(source, mask=mask, other=0.0)
        return x1.to(tl.float32), tl.load(source + E // 2, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _rotate(target, x1, x2, cos, sin, mask, E: tl.constexpr):
        tl.store(target, (x1 * cos - x2 * sin).to(target.dtype.element_ty), mask=mask)
        tl.store(target + E // 2, (x2 * cos + x1 * sin).to(target.dtype.element_ty), mask=mask)

    @triton.jit
    def _parts_tile(
        part, part_lse, first, m, p, p_last, SLOT: tl.constexpr,
        C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """Partial results of sequence m by the programs from p on, of one head of each branch: log2-sum-exps
        [CP, SPLITS] and latents [CP, SPLITS, RP]."""
        ps, rank = p + tl.arange(0, SPLITS), tl.arange(0, RP)
        rows = first[:, None] + (ps + m).to(tl.int64)[None, :] * SLOT
        ok = (tl.arange(0, CP) < C)[:, None] & (ps <= p_last)[None, :]
        lse = tl.load(part_lse + rows, mask=ok, other=float("-inf"))
        latents = tl.load(
            part + (rows * R)[:, :, None] + rank[None, None, :],
            mask=ok[:, :, None] & (rank < R)[None, None, :],
            other=0.0,
        )
        return lse, latents

    @triton.jit(do_not_specialize=["P"])
    def value_kernel(
        part, part_lse, kv_end, kv_start, kv_b, gate, gate_stride, out, alpha, P,
        M: tl.constexpr, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, R: tl.constexpr, DN: tl.constexpr,
        V: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, VB: tl.constexpr, GATE: tl.constexpr,
        SPLITS: tl.constexpr, UNIT: tl.constexpr, MIN_UNITS: tl.constexpr, BLOCK_B: tl.constexpr,
        HAS_START: tl.constexpr, BIG: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """out[m, i] = alpha * sum over branches of W_uv[l, i] z[m, l, i], times sigmoid(gate).

        z is reduced from the decode kernel's partial results, SPLITS at once. `kv_end` and `kv_start` are read before
        the wait, as `counters` above.
        """
        query_head = tl.program_id(0)
        first_latent = (query_head // H) * C
        values = tl.program_id(1) * VB + tl.arange(0, VB)
        columns = tl.arange(0, CP * RP)  # of the branches' weights side by side
        latent_head = (first_latent + columns // RP) * H + query_head % H
        rows = latent_head[None, :] * (DN + V) + DN + values[:, None]
        mask = (values < V)[:, None] & ((columns // RP < C) & (columns % RP < R))[None, :]
        weight = tl.load(kv_b + rows.to(tl.int64) * R + (columns % RP)[None, :], mask=mask, other=0.0)
        first = (first_latent + tl.arange(0, CP)) * H + query_head % H
        for m in tl.static_range(M):
            p_first, p_last = _parts_of(m, kv_end, kv_start, M, P, UNIT, MIN_UNITS, BLOCK_B, HAS_START, BIG)
            if m == 0:
                _wait(PDL)
            z = tl.zeros([CP, RP], tl.float32)
            top = tl.full([CP], float("-inf"), tl.float32)
            norm = tl.zeros([CP], tl.float32)
            lse, latents = _parts_tile(part, part_lse, first, m, p_first, p_last, L * H, C, R, CP, RP, SPLITS)
            for p in tl.range(p_first, p_last + 1, SPLITS):
                next_lse, next_latents = _parts_tile(
                    part, part_lse, first, m, p + SPLITS, p_last, L * H, C, R, CP, RP, SPLITS
                )
                new_top = tl.maximum(top, tl.max(lse, 1))
                ref, before = _rescale(top, new_top)
                w = tl.exp2(lse - ref[:, None])
                z = z * before[:, None] + tl.sum(latents * w[:, :, None], 1)
                norm = norm * before + tl.sum(w, 1)
                top = new_top
                lse, latents = next_lse, next_latents
            z = tl.reshape(z * tl.where(norm > 0, alpha / norm, 0.0)[:, None], [CP * RP])
            total = tl.sum(weight.to(tl.float32) * z[None, :], axis=1)
            column = query_head * V + values
            if GATE:
                g = tl.load(gate + m * gate_stride + column, mask=values < V, other=0.0).to(tl.float32)
                total *= tl.sigmoid(g)
            tl.store(out + m * (L // C) * H * V + column, total.to(weight.dtype), mask=values < V)

    @triton.jit
    def choose_kernel(
        logits, vocab_size, unfinished, pad, end_tokens, num_ends, token_ids, sequences, sequence_stride, column,
        counters, COUNTERS: tl.constexpr, COUNTERS_P: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr,
        CHUNKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """The first of the most likely tokens of one sequence, or `pad` behind its end; appends it and counts."""
        m = tl.program_id(0)
        _wait(PDL)
        index = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        at = index
        for i in tl.static_range(CHUNKS):
            here = i * BLOCK + index
            score = tl.load(logits + m * vocab_size + here, mask=here < vocab_size, other=float("-inf")).to(tl.float32)
            score = tl.where(score != score, float("inf"), score)  # as torch.argmax takes NaN
            at = tl.where(score > top, here, at)
            top = tl.maximum(score, top)
        token = tl.min(tl.where(top == tl.max(top, 0), at, vocab_size), 0).to(tl.int64)
        going_on = tl.load(unfinished + m)
        token = tl.where(going_on != 0, token, pad)
        ends = tl.arange(0, ENDS)
        hit = (tl.load(end_tokens + ends, mask=ends < num_ends, other=0) == token) & (ends < num_ends)
        tl.store(unfinished + m, tl.where(tl.max(hit.to(tl.int32), 0) != 0, 0, going_on))
        place = tl.load(column + m)
        tl.store(sequences + m * sequence_stride + place, token)
        tl.store(column + m, place + 1)
        tl.store(token_ids + m, token)
        if m == 0:
            number = tl.arange(0, COUNTERS_P)
            count = tl.load(counters + number, mask=number < COUNTERS, other=0)
            tl.store(counters + number, count + 1, mask=number < COUNTERS)


def stacked(weights: list[torch.Tensor], rows: int, swiglu: bool) -> tuple[int, tuple]:
    """Number of row blocks of up to four stacked weights (of the two of a SwiGLU, side by side), and the weights and
    their numbers of rows as the kernels take them."""
    sizes, spare = [weight.shape[0] for weight in weights], 4 - len(weights)
    blocks = triton.cdiv(sizes[0], rows) if swiglu else sum(triton.cdiv(size, rows) for size in sizes)
    return blocks, (*weights, *weights[-1:] * spare, *sizes, *[0] * spare)


def linear_plan(inner: int, swiglu: bool, residual: bool, vectors: int) -> dict[str, int]:
    """Rows and columns of a program's tile, chosen on an H200 with `python -m scripts.bench_fused`.

    Whole rows are there before the wait where a norm or two weights share the input. Few registers let more of kernel
    1's programs start beside the last one of the layer in front.
    """
    width = triton.next_power_of_2(inner)
    rows = 4096 // min(1024, width) if residual else (8192 if swiglu else 16384) // width
    if residual or inner <= 3072:
        width = min(1024, width)
    plan = {"ROWS": max(1, rows), "WIDTH": width, "AHEAD": 2 if residual else 3, "num_warps": 4}
    return plan | ({"maxnreg": 88} if vectors == 1 and not residual and 1024 < inner <= 3072 else {})


def value_plan(programs: int, width: int) -> dict[str, int]:
    """How many partial results of `width` numbers are reduced at once, chosen as above."""
    splits, warps = (2048, 4) if programs <= 16 else (8192, 8)
    return {"SPLITS": max(2, splits // width), "num_warps": warps}
