"""Triton kernels of the steps `absorb` and `value`, around the attention; `step_mlra` has the steps and the legend.

Each program loads its weights, and whatever else no kernel in front writes, before it waits for the kernel in front
(programmatic dependent launch).
"""

from typing import Any, NamedTuple

from .device_mlra import tl, triton
from .step_device_mlra import padded

absorb_kernel: Any = None
value_kernel: Any = None
product_value_kernel: Any = None


class AttentionShape(NamedTuple):
    """Sizes of this rank's attention, as in the legend; M tokens, T of each sequence. SCALED: latents are cached in
    eight bits."""

    M: Any
    T: Any
    L: Any
    C: Any
    H: Any
    R: Any
    D: Any
    E: Any
    V: Any
    GATE: Any
    SCALED: Any


class AbsorbTile(NamedTuple):
    """Widths padded to powers of two, and RB columns of a latent to a program; M to MP, or 0: one token at a time."""

    MP: Any
    DP: Any
    RP: Any
    RB: Any
    EP: Any


class ValueTile(NamedTuple):
    """VB values to a program, C and R padded to CP and RP; SPLITS partial results are reduced at once."""

    CP: Any
    RP: Any
    VB: Any
    SPLITS: Any


class ProductValueTile(NamedTuple):
    MP: Any
    RP: Any
    VB: Any


class Rope(NamedTuple):
    inv_freq: Any
    scale: Any


class Queries(NamedTuple):
    """What `query` gave, and what `absorb` makes of it: absorbed and rotated."""

    q: Any
    latent: Any
    rope: Any


class Head(NamedTuple):
    """A head of a latent; `query` counts the heads of the rotary queries, which the branches of a group share."""

    latent: Any
    index: Any
    query: Any


class Parts(NamedTuple):
    """Partial results of the attention with their log2-sum-exps, and first and last visible row of each sequence."""

    part: Any
    lse: Any
    kv_end: Any
    kv_start: Any


if triton is not None:
    from .decode_deal_mlra import parts_of
    from .device_triton_mlra import dot, rescale, scale_of, to_e4m3
    from .step_device_mlra import rms_factor, wait_for_front
    from .step_maps_mlra import widen

    @triton.jit
    def absorb_kernel(
        queries, down, kv_first, kv_b, norm, rope, counters, slots, cache,
        SHAPE, TILE, PDL: tl.constexpr,
    ):  # fmt: skip
        """q_latent[m, l, h] = W_uk[l, h]^T q_nope[m], RB columns to a program. The last M programs of each latent and
        head rotate instead, one token each: queries, and for the first head this token's cache row, which they
        normalise. T tokens in a row are of one sequence.

        `counters` holds [row of each sequence's first token, position of each token, ...], and is read before the
        wait: no kernel of the step writes it but the last. `down` holds what that step gave, the latents of the cache
        from column `kv_first` on. With `slots`, where in a pool of rows each token's goes (below 0: to row 0),
        `counters` holds the tokens' positions alone.
        """
        latent, index = tl.program_id(0) // SHAPE.H, tl.program_id(0) % SHAPE.H
        head = Head(latent, index, (latent // SHAPE.C) * SHAPE.H + index)
        block, token = tl.program_id(1), tl.program_id(1) - (tl.num_programs(1) - SHAPE.M)
        if token < 0:
            _absorb(queries, kv_b, head, block, SHAPE, TILE, PDL)
        else:
            places = counters, slots
            _rotate_and_append(queries, down, kv_first, norm, rope, places, cache, head, token, SHAPE, TILE, PDL)

    @triton.jit
    def _absorb(queries, kv_b, head, block, SHAPE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr):
        """Token after token or (MP > 0) as one matrix product."""
        HEADS: tl.constexpr = SHAPE.L // SHAPE.C * SHAPE.H
        R: tl.constexpr = SHAPE.R
        D: tl.constexpr = SHAPE.D
        depth, columns = tl.arange(0, TILE.DP), block * TILE.RB + tl.arange(0, TILE.RB)
        base = kv_b + (head.latent * SHAPE.H + head.index).to(tl.int64) * (D + SHAPE.V) * R
        mask = (depth < D)[:, None] & (columns < R)[None, :]
        weight = tl.load(base + depth[:, None] * R + columns[None, :], mask=mask, other=0.0)
        wait_for_front(PDL)
        if TILE.MP > 0:
            vectors = tl.arange(0, TILE.MP)
            of_query = ((vectors * HEADS + head.query) * (D + SHAPE.E))[:, None] + depth[None, :]
            known = (vectors < SHAPE.M)[:, None]
            nopes = tl.load(queries.q + of_query, mask=known & (depth < D)[None, :], other=0.0)
            sums = dot(nopes, weight, None).to(weight.dtype)
            of_latent = (((vectors * SHAPE.L + head.latent) * SHAPE.H + head.index) * R)[:, None] + columns[None, :]
            tl.store(queries.latent + of_latent, sums, mask=known & (columns < R)[None, :])
        else:
            for m in tl.static_range(SHAPE.M):
                source = queries.q + (m * HEADS + head.query) * (D + SHAPE.E) + depth
                nope = tl.load(source, mask=depth < D, other=0.0)
                z = tl.sum(widen(weight) * nope.to(tl.float32)[:, None], axis=0)
                target = queries.latent + ((m * SHAPE.L + head.latent) * SHAPE.H + head.index) * R + columns
                tl.store(target, z.to(weight.dtype), mask=columns < R)

    @triton.jit
    def _rotate_and_append(
        queries, down, kv_first, norm, rope, places, cache, head, token,
        SHAPE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """A token's rotary query of one head; the first head also appends its latent, the first of all its key."""
        HEADS: tl.constexpr = SHAPE.L // SHAPE.C * SHAPE.H
        R: tl.constexpr = SHAPE.R
        D: tl.constexpr = SHAPE.D
        E: tl.constexpr = SHAPE.E
        index, half = tl.arange(0, TILE.RP), tl.arange(0, TILE.EP)
        gamma = tl.load(norm.gamma + head.latent * R + index, mask=index < R, other=0.0).to(tl.float32)
        frequency = tl.load(rope.inv_freq + half, mask=half < E // 2, other=0.0)
        counters, slots = places
        POSITIONS: tl.constexpr = 1 if slots is None else 0  # the first of them among the counters
        if slots is None:
            place = (tl.load(counters) + token % SHAPE.T).to(tl.int64)
        else:
            place = tl.maximum(tl.load(slots + token), 0)
        sequence = (token // SHAPE.T).to(tl.int64)
        row = cache.latents + sequence * cache.c_b + place * cache.c_s + head.latent * cache.c_l
        k_row = cache.k_rope + sequence * cache.k_b + place * cache.k_s
        angle = tl.load(counters + POSITIONS + token).to(tl.float32) * frequency
        cos, sin = tl.cos(angle) * rope.scale, tl.sin(angle) * rope.scale
        rotates_query = half < tl.where(head.latent % SHAPE.C == 0, E // 2, 0)
        keeps_latent = index < tl.where(head.index == 0, R, 0)
        keeps_key = half < tl.where(tl.program_id(0) == 0, E // 2, 0)
        wait_for_front(PDL)
        # All loads first: none then waits for another
        query = queries.q + (token * HEADS + head.query) * (D + E) + D + half
        q1, q2 = _halves(query, rotates_query, E)
        source = down.data + token * down.stride + kv_first
        c = tl.load(source + head.latent * R + index, mask=keeps_latent, other=0.0).to(tl.float32)
        k1, k2 = _halves(source + SHAPE.L * R + half, keeps_key, E)
        _rotate(queries.rope + (token * HEADS + head.query) * E + half, q1, q2, cos, sin, rotates_query, E)
        c = c * gamma * rms_factor(tl.sum(c * c), R, norm)
        c = c.to(cache.k_rope.dtype.element_ty)
        if SHAPE.SCALED:
            c = c.to(tl.float32)
            scale, inverse = scale_of(tl.max(tl.abs(c)))
            scale_row = cache.scales + sequence * cache.s_b + place * cache.s_s + head.latent
            tl.store(scale_row, scale, mask=head.index == 0)
            tl.store(row + index, to_e4m3(c * inverse), mask=keeps_latent)
        else:
            tl.store(row + index, c, mask=keeps_latent)
        _rotate(k_row + half, k1, k2, cos, sin, keeps_key, E)

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
    def _parts_tile(parts, first, m, p, p_last, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """Partial results of sequence m by the programs from p on, of one head of each branch: log2-sum-exps
        [CP, SPLITS] and latents [CP, SPLITS, RP]."""
        ps, rank = tl.arange(0, TILE.SPLITS) + p, tl.arange(0, TILE.RP)
        rows = first[:, None] + (ps + m).to(tl.int64)[None, :] * (SHAPE.L * SHAPE.H)
        ok = (tl.arange(0, TILE.CP) < SHAPE.C)[:, None] & (ps <= p_last)[None, :]
        lse = tl.load(parts.lse + rows, mask=ok, other=float("-inf"))
        latents = tl.load(
            parts.part + (rows * SHAPE.R)[:, :, None] + rank[None, None, :],
            mask=ok[:, :, None] & (rank < SHAPE.R)[None, None, :],
            other=0.0,
        )
        return lse, latents

    @triton.jit
    def _merged_parts(parts, first, m, p_first, p_last, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """The partial results of sequence m added up, SPLITS at once: latents [CP, RP] and their weight sums [CP]."""
        z = tl.zeros([TILE.CP, TILE.RP], tl.float32)
        top = tl.full([TILE.CP], float("-inf"), tl.float32)
        norm = tl.zeros([TILE.CP], tl.float32)
        lse, latents = _parts_tile(parts, first, m, p_first, p_last, SHAPE, TILE)
        for p in tl.range(p_first, p_last + 1, TILE.SPLITS):
            next_lse, next_latents = _parts_tile(parts, first, m, p + TILE.SPLITS, p_last, SHAPE, TILE)
            new_top = tl.maximum(top, tl.max(lse, 1))
            ref, before = rescale(top, new_top)
            w = tl.exp2(lse - ref[:, None])
            z = z * before[:, None] + tl.sum(latents * w[:, :, None], 1)
            norm = norm * before + tl.sum(w, 1)
            top = new_top
            lse, latents = next_lse, next_latents
        return z, norm

    @triton.jit(do_not_specialize=["P"])
    def value_kernel(
        parts, P, kv_b, gate, out, alpha,
        SHAPE, TILE, DEAL, PDL: tl.constexpr,
    ):  # fmt: skip
        """out[m, i] = alpha * sum over branches of W_uv[l, i] z[m, l, i], times sigmoid(gate).

        z is merged from the partial results of at most P programs. `kv_end` and `kv_start` are read before the wait,
        as `counters` above.
        """
        H: tl.constexpr = SHAPE.H
        V: tl.constexpr = SHAPE.V
        RP: tl.constexpr = TILE.RP
        query_head = tl.program_id(0)
        first_latent = (query_head // H) * SHAPE.C
        values = tl.program_id(1) * TILE.VB + tl.arange(0, TILE.VB)
        columns = tl.arange(0, TILE.CP * RP)  # of the branches' weights side by side
        latent_head = (first_latent + columns // RP) * H + query_head % H
        rows = latent_head[None, :] * (SHAPE.D + V) + SHAPE.D + values[:, None]
        mask = (values < V)[:, None] & ((columns // RP < SHAPE.C) & (columns % RP < SHAPE.R))[None, :]
        weight = tl.load(kv_b + rows.to(tl.int64) * SHAPE.R + (columns % RP)[None, :], mask=mask, other=0.0)
        first = (first_latent + tl.arange(0, TILE.CP)) * H + query_head % H
        for m in tl.static_range(SHAPE.M):
            p_first, p_last = parts_of(m, parts.kv_end, parts.kv_start, SHAPE.M, P, DEAL)
            if m == 0:
                wait_for_front(PDL)
            z, norm = _merged_parts(parts, first, m, p_first, p_last, SHAPE, TILE)
            z = tl.reshape(z * tl.where(norm > 0, alpha / norm, 0.0)[:, None], [TILE.CP * RP])
            total = tl.sum(widen(weight) * z[None, :], axis=1)
            column = query_head * V + values
            if SHAPE.GATE:
                g = tl.load(gate.data + m * gate.stride + column, mask=values < V, other=0.0).to(tl.float32)
                total *= tl.sigmoid(g)
            tl.store(out + m * (SHAPE.L // SHAPE.C) * H * V + column, total.to(out.dtype.element_ty), mask=values < V)

    @triton.jit
    def product_value_kernel(z, kv_b, gate, out, alpha, SHAPE, TILE, PDL: tl.constexpr):
        """As `value_kernel`, of all tokens at once and from whole results z [M, L, H, R]."""
        H: tl.constexpr = SHAPE.H
        R: tl.constexpr = SHAPE.R
        V: tl.constexpr = SHAPE.V
        query_head = tl.program_id(0)
        values = tl.program_id(1) * TILE.VB + tl.arange(0, TILE.VB)
        m, rank = tl.arange(0, TILE.MP), tl.arange(0, TILE.RP)
        first = (query_head // H * SHAPE.C) * H + query_head % H  # of the latents and heads of the branches, H apart
        weights = ()
        for c in tl.static_range(SHAPE.C):
            rows = (first + c * H) * (SHAPE.D + V) + SHAPE.D + values
            mask = (values < V)[:, None] & (rank < R)[None, :]
            tile = tl.load(kv_b + (rows.to(tl.int64) * R)[:, None] + rank[None, :], mask=mask, other=0.0)
            weights = weights + (tile,)  # type: ignore[assignment]
        wait_for_front(PDL)
        acc = tl.zeros([TILE.VB, TILE.MP], tl.float32)
        for c in tl.static_range(SHAPE.C):
            rows = m * SHAPE.L * H + first + c * H
            mask = (m < SHAPE.M)[:, None] & (rank < R)[None, :]
            latents = tl.load(z + (rows * R)[:, None] + rank[None, :], mask=mask, other=0.0)
            acc = dot(weights[c], tl.trans(latents), acc)
        y = acc * alpha
        column = query_head * V + values
        mask = (values < V)[:, None] & (m < SHAPE.M)[None, :]
        if SHAPE.GATE:
            gates = tl.load(gate.data + (m * gate.stride)[None, :] + column[:, None], mask=mask, other=0.0)
            y *= tl.sigmoid(gates.to(tl.float32))
        target = out + (m * (SHAPE.L // SHAPE.C) * H * V)[None, :] + column[:, None]
        tl.store(target, y.to(out.dtype.element_ty), mask=mask)


def absorb_plan(shape: AttentionShape, one_by_one: bool) -> AbsorbTile:
    rank, depth = (max(16, triton.next_power_of_2(width)) for width in (shape.R, shape.D))
    columns = min(rank, max(16, 8192 // depth))
    return AbsorbTile(0 if one_by_one else padded(shape.M), depth, rank, columns, triton.next_power_of_2(shape.E // 2))


def value_plan(shape: AttentionShape, programs: int) -> tuple[ValueTile, int]:
    """Tile and warps for the partial results of so many programs, chosen on an H200 with
    `python -m scripts.bench_fused`."""
    branches, rank = triton.next_power_of_2(shape.C), max(16, triton.next_power_of_2(shape.R))
    block = min(64, triton.next_power_of_2(shape.V), max(4, 16384 // (branches * rank)))
    numbers, warps = (2048, 4) if programs <= 16 else (8192, 8)
    return ValueTile(branches, rank, block, max(2, numbers // (branches * rank))), warps


def product_value_plan(shape: AttentionShape) -> ProductValueTile:
    block = max(16, min(32, triton.next_power_of_2(shape.V)))
    return ProductValueTile(padded(shape.M), max(16, triton.next_power_of_2(shape.R)), block)
