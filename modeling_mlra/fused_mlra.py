"""One decoding step of the whole model in eight kernels per layer, for a few sequences at a time.

Decoding reads every weight once per step and computes almost nothing, so its time is weight bytes over bandwidth plus
what is lost between kernels. Here each program holds its tile of weights in registers before it waits for the kernel
in front of it (programmatic dependent launch), so the memory stays busy across kernels; norms, rotations, the cache
append, gates and residuals ride along, in float32. The parameters are the model's own. (On Hopper large weights can
stream through shared memory instead, `hopper_linear_mlra`.)

    1  [q_a | kv_a | k_rope | gate] = norm(x) W        5  o = alpha_attn * sum over branches of z W_uv, gated
    2  q = norm(q_a) W_qb                              6  x += o W_o
    3  q_latent = q_nope W_uk; RoPE; append the row    7  m = silu(norm(x) W_gate) * (norm(x) W_up)
    4  z = latent_attention(...)                       8  x += m W_down

Under tensor parallelism each rank runs these kernels on its share of latents, heads, MLP and vocabulary. Kernels 6 and
8 then add its part of the product to an equal part of the residual, and an all-reduce behind each gives x.

Legend: M sequences, K and N widths of a linear map, G groups, C branches, L = G * C latents, H heads per group,
R latent, D_N / E / V positionless key, RoPE and value widths.
"""

import torch
from torch import nn

from .hopper_linear_mlra import linear as stream_linear
from .hopper_linear_mlra import streams
from .plans_mlra import device_facts, launch_options
from .tensor_parallel_mlra import (
    gather_output,
    is_parallel,
    local_sizes,
    local_tensor,
    plan_obstacle,
    sum_output,
    tensor_parallel_mesh,
)
from .triton_mlra import partial_results

try:
    import triton
    import triton.language as tl

    from .triton_mlra import _parts_of
except ImportError:
    triton = tl = None

MAX_SEQUENCES = 4  # beyond, the products are no longer free and cuBLAS reads the weights as fast

if triton is not None:

    @triton.jit
    def _wait(PDL: tl.constexpr):
        """Let the kernel behind load its weights, and wait for the one in front."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def _embed_kernel(token_ids, stride, weight, hidden, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        """The embeddings of the tokens, one to a program; the kernel behind loads its weights meanwhile."""
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
    def _linear_kernel(
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
            early = early + (_tile(w, rows, n, i * WIDTH, K, WIDTH),)
            if SWIGLU:
                early_up = early_up + (_tile(w1, rows, n, i * WIDTH, K, WIDTH),)
            if NORM:
                early_gamma = early_gamma + (_columns(gamma, i * WIDTH, K, WIDTH),)
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
                    weights = weights + (_tile(w, rows, n, (i + AHEAD) * WIDTH, K, WIDTH),)
                    if SWIGLU:
                        weights_up = weights_up + (_tile(w1, rows, n, (i + AHEAD) * WIDTH, K, WIDTH),)
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
    def _absorb_kernel(
        q, a, a_stride, kv_first, kv_b, latent_gamma, inv_freq, counters, q_latent, q_rope, cache, cache_b, cache_s,
        alpha_kv, eps, rope_scale,
        M: tl.constexpr, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, R: tl.constexpr, DN: tl.constexpr,
        E: tl.constexpr, V: tl.constexpr, DNP: tl.constexpr, RP: tl.constexpr, RB: tl.constexpr, EP: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """q_latent[m, l, h] = W_uk[l, h]^T q_nope[m], RB columns to a program; the last program of each latent and
        head rotates instead: queries, and for the first head this token's cache row, which it normalises.

        `counters` holds [row, position of each sequence, ...], and is read before the wait: no kernel of the step
        writes it but the last. `a` holds the outputs of kernel 1.
        """
        latent, head = tl.program_id(0) // H, tl.program_id(0) % H
        query_head = (latent // C) * H + head
        if tl.program_id(1) < tl.num_programs(1) - 1:
            depth, columns = tl.arange(0, DNP), tl.program_id(1) * RB + tl.arange(0, RB)
            base = kv_b + (latent * H + head).to(tl.int64) * (DN + V) * R
            mask = (depth < DN)[:, None] & (columns < R)[None, :]
            weight = tl.load(base + depth[:, None] * R + columns[None, :], mask=mask, other=0.0)
            _wait(PDL)
            for m in tl.static_range(M):
                nope = tl.load(q + (m * (L // C) * H + query_head) * (DN + E) + depth, mask=depth < DN, other=0.0)
                z = tl.sum(weight.to(tl.float32) * nope.to(tl.float32)[:, None], axis=0)
                tl.store(q_latent + ((m * L + latent) * H + head) * R + columns, z.to(weight.dtype), mask=columns < R)
        else:
            index, half = tl.arange(0, RP), tl.arange(0, EP)
            gamma = tl.load(latent_gamma + latent * R + index, mask=index < R, other=0.0).to(tl.float32)
            frequency = tl.load(inv_freq + half, mask=half < E // 2, other=0.0)
            new_row = tl.load(counters).to(tl.int64)
            of_query = half < tl.where(latent % C == 0, E // 2, 0)
            of_latent = index < tl.where(head == 0, R, 0)
            of_key = half < tl.where(tl.program_id(0) == 0, E // 2, 0)
            for m in tl.static_range(M):
                angle = tl.load(counters + 1 + m).to(tl.float32) * frequency
                cos, sin = tl.cos(angle) * rope_scale, tl.sin(angle) * rope_scale
                if m == 0:
                    _wait(PDL)
                # All loads first: none then waits for another
                query = q + (m * (L // C) * H + query_head) * (DN + E) + DN + half
                q1, q2 = _halves(query, of_query, E)
                source = a + m * a_stride + kv_first
                c = tl.load(source + latent * R + index, mask=of_latent, other=0.0).to(tl.float32)
                k1, k2 = _halves(source + L * R + half, of_key, E)
                row = cache + m * cache_b + new_row * cache_s
                _rotate(q_rope + (m * (L // C) * H + query_head) * E + half, q1, q2, cos, sin, of_query, E)
                c = c * gamma * (alpha_kv * tl.rsqrt(tl.sum(c * c) / R + eps))
                tl.store(row + latent * R + index, c.to(cache.dtype.element_ty), mask=of_latent)
                _rotate(row + L * R + half, k1, k2, cos, sin, of_key, E)

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
        part, part_lse, first, p_first, first_slot, p, p_last, SLOT: tl.constexpr,
        C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """Partial results of the programs from p on, of one head of each branch: log2-sum-exps [CP, SPLITS] and
        latents [CP, SPLITS, RP]."""
        ps, rank = p + tl.arange(0, SPLITS), tl.arange(0, RP)
        slots = tl.where(ps == p_first, first_slot, 2 * ps).to(tl.int64)
        rows = first[:, None] + slots[None, :] * SLOT
        ok = (tl.arange(0, CP) < C)[:, None] & (ps <= p_last)[None, :]
        lse = tl.load(part_lse + rows, mask=ok, other=float("-inf"))
        latents = tl.load(
            part + (rows * R)[:, :, None] + rank[None, None, :],
            mask=ok[:, :, None] & (rank < R)[None, None, :],
            other=0.0,
        )
        return lse, latents

    @triton.jit(do_not_specialize=["P"])
    def _value_kernel(
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
            first_slot, p_first, p_last = _parts_of(
                m, kv_end, kv_start, M, P, UNIT, MIN_UNITS, BLOCK_B, HAS_START, BIG
            )
            if m == 0:
                _wait(PDL)
            z = tl.zeros([CP, RP], tl.float32)
            top = tl.full([CP], float("-inf"), tl.float32)
            norm = tl.zeros([CP], tl.float32)
            lse, latents = _parts_tile(
                part, part_lse, first, p_first, first_slot, p_first, p_last, L * H, C, R, CP, RP, SPLITS
            )
            for p in tl.range(p_first, p_last + 1, SPLITS):
                next_lse, next_latents = _parts_tile(
                    part, part_lse, first, p_first, first_slot, p + SPLITS, p_last, L * H, C, R, CP, RP, SPLITS
                )
                new_top = tl.maximum(top, tl.max(lse, 1))
                ref = tl.where(new_top == float("-inf"), 0.0, new_top)
                w = tl.exp2(lse - ref[:, None])
                before = tl.exp2(top - ref)
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
    def _choose_kernel(
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


def linear_plan(inner: int, swiglu: bool, residual: bool) -> dict[str, int]:
    """Rows and columns of a program's tile, chosen on an H200 with `python -m scripts.bench_fused`.

    Whole rows are there before the wait where a norm or two weights share the input.
    """
    width = triton.next_power_of_2(inner)
    rows = 4096 // min(1024, width) if residual else (8192 if swiglu else 16384) // width
    if residual or inner <= 3072:
        width = min(1024, width)
    plan = {"ROWS": max(1, rows), "WIDTH": width, "AHEAD": 2 if residual else 3, "num_warps": 4}
    return plan | ({"maxnreg": 88} if not residual and 1024 < inner <= 3072 else {})


def value_plan(programs: int, width: int) -> dict[str, int]:
    """How many partial results of `width` numbers are reduced at once, chosen as above."""
    splits, warps = (2048, 4) if programs <= 16 else (8192, 8)
    return {"SPLITS": max(2, splits // width), "num_warps": warps}


def obstacle(model: nn.Module, num_sequences: int) -> str | None:
    """Why the fused step cannot run this model, or None if it can."""
    config = model.config
    if triton is None:
        return "module triton is not installed"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16 weights, not {model.dtype}"
    if num_sequences > MAX_SEQUENCES:
        return f"it takes up to {MAX_SEQUENCES} sequences, not {num_sequences}"
    if config.hidden_act != "silu":
        return f"it computes the activation 'silu', not {config.hidden_act!r}"
    if model.model.rotary_emb.rope_type in ("dynamic", "longrope"):
        return f"rope_type {model.model.rotary_emb.rope_type!r} changes its frequencies as the sequence grows"
    if config.decode_implementation not in ("auto", "triton"):
        return f"decode_implementation={config.decode_implementation!r} was asked for"
    for name, module in model.named_modules():
        replaced = "forward" in vars(module) and not is_parallel(module)
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            return f"module {name!r} has hooks or a replaced forward (offloading, sharded data parallelism)"
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear and not hasattr(module, "weight"):
            return f"module {name!r} is a {type(module).__name__}, no plain linear layer"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or any(isinstance(module, nn.Linear) and module.bias is not None for module in model.modules()):
        return "its weights are not all of one dtype and without bias"
    return plan_obstacle(model)


class FusedStep:
    """The kernels of one decoding step, bound to a model, a static cache and buffers for `num_sequences` sequences.

    Args:
        model: an `MLRAForCausalLM` that has no `obstacle`; of a tensor-parallel one every rank makes its step.
        cache: a static `MLRACache` that holds the prompt.
        counters: int32 `[1 + 2 * M]`: the cache row to write, then each sequence's RoPE position, then each one's
            number of rows in use, this token's included.
        kv_start, key_mask: as in `latent_attention`.
    """

    def __init__(self, model: nn.Module, cache, counters: torch.Tensor, kv_start=None, key_mask=None):
        config = model.config
        self.model, self.cache, self.counters = model, cache, counters
        self.kv_start, self.key_mask = kv_start, key_mask
        self.num_sequences = (counters.numel() - 1) // 2
        self.mesh = tensor_parallel_mesh(model)
        self.residual_share = 1.0 if self.mesh is None else 1 / self.mesh.size()
        self.local_sizes = local_sizes(model.model.layers[0].self_attn)
        latents, heads_per_latent, groups = self.local_sizes
        heads = groups * heads_per_latent
        self.widths_a = [config.q_lora_rank, latents * config.latent_head_dim, config.qk_rope_head_dim]
        if config.attn_output_gate:
            self.widths_a.append(heads * config.v_head_dim)

        def buffer(width):
            return torch.empty(self.num_sequences, width, dtype=model.dtype, device=counters.device)

        self.hidden, self.a = buffer(config.hidden_size), buffer(sum(self.widths_a))
        self.q, self.q_rope = buffer(heads * config.qk_head_dim), buffer(heads * config.qk_rope_head_dim)
        self.q_latent = buffer(latents * heads_per_latent * config.latent_head_dim)
        self.heads = buffer(heads * config.v_head_dim)
        self.mlp = buffer(local_tensor(model.model.layers[0].mlp.up_proj.weight).shape[0])
        self.logits = buffer(local_tensor(model.lm_head.weight).shape[0])
        self.multiprocessors, self.early, self.hopper = device_facts(counters.device)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[M, vocab_size]` after `token_ids` `[M]`; appends their rows to the cache and counts them."""
        logits = self._logits_after(token_ids)
        self.counters.add_(1)
        return logits

    def choose(self, token_ids, unfinished, pad: int, end_tokens, sequences, column) -> None:
        """The same, and the most likely next token of each sequence, all on the device.

        Args:
            token_ids: int64 `[M]`, replaced by the next ones.
            unfinished: int64 `[M]`, 0 for a sequence that has ended, to which `pad` is appended; updated.
            end_tokens: int64 `[N]`, tokens that end a sequence.
            sequences: int64 `[M, S]`; the tokens go to column `column[m]`, int64 `[M]`, which moves on.
        """
        logits = self._logits_after(token_ids)
        block = min(16384, triton.next_power_of_2(logits.shape[1]))
        _choose_kernel[(self.num_sequences,)](
            logits, logits.shape[1], unfinished, pad, end_tokens, end_tokens.numel(), token_ids,
            sequences, sequences.stride(0), column, self.counters,
            COUNTERS=self.counters.numel(), COUNTERS_P=triton.next_power_of_2(self.counters.numel()),
            ENDS=triton.next_power_of_2(max(1, end_tokens.numel())), BLOCK=block,
            CHUNKS=triton.cdiv(logits.shape[1], block), PDL=self.early, num_warps=16, **launch_options(self.early),
        )  # fmt: skip

    def _logits_after(self, token_ids: torch.Tensor) -> torch.Tensor:
        base = self.model.model
        self._embed(local_tensor(base.embed_tokens.weight), token_ids)
        for layer, cache_layer in zip(base.layers, self.cache.layers, strict=True):
            self._attention(layer, cache_layer.rows)
            self._add(layer.self_attn.o_proj, self.heads)
            mlp, norm = layer.mlp, layer.post_attention_layernorm
            self._linear(self.hidden, [mlp.gate_proj, mlp.up_proj], self.mlp, norm=norm, swiglu=True)
            self._add(mlp.down_proj, self.mlp)
        self._linear(self.hidden, [self.model.lm_head], self.logits, norm=base.norm)
        return self.logits if self.mesh is None else gather_output(self.logits, self.mesh.get_group())

    def _embed(self, weight: torch.Tensor, token_ids: torch.Tensor) -> None:
        """The embedding of each token, from the rank that keeps its row."""
        if self.mesh is None:
            width, block = weight.shape[1], 256
            _embed_kernel[(self.num_sequences, triton.cdiv(width, block))](
                token_ids, token_ids.stride(0), weight, self.hidden,
                WIDTH=width, BLOCK=block, PDL=self.early, num_warps=1,
            )  # fmt: skip
            return
        rows = token_ids - self.mesh.get_local_rank() * weight.shape[0]
        kept = (rows >= 0) & (rows < weight.shape[0])
        torch.index_select(weight, 0, rows.clamp(0, weight.shape[0] - 1), out=self.hidden)
        sum_output(self.hidden.mul_(kept[:, None]), self.mesh.get_group())

    def _add(self, layer, x) -> None:
        """hidden += layer(x), the input features of `layer` split over the ranks."""
        self._linear(x, [layer], self.hidden, residual=self.hidden)
        if self.mesh is not None:
            sum_output(self.hidden, self.mesh.get_group())

    def _linear(self, x, layers, out, norm=None, scale=1.0, swiglu=False, residual=None):
        weights = [local_tensor(layer.weight) for layer in layers]
        one_map = len(weights) == 1 or swiglu
        if self.hopper and one_map and streams(weights, self.num_sequences):
            stream_linear(
                x, weights, out, norm, scale, residual, self.residual_share, self.multiprocessors, self.early
            )
            return
        inner = weights[0].shape[1]
        plan = linear_plan(inner, swiglu, residual is not None)
        sizes = [weight.shape[0] for weight in weights]
        blocks = triton.cdiv(sizes[0], plan["ROWS"]) if swiglu else sum(triton.cdiv(n, plan["ROWS"]) for n in sizes)
        weights += [weights[-1]] * (4 - len(weights))
        sizes += [0] * (4 - len(sizes))
        _linear_kernel[(blocks,)](
            x, x.stride(0), x if norm is None else norm.weight, scale, 0.0 if norm is None else norm.variance_epsilon,
            out if residual is None else residual, self.residual_share, out, out.stride(0), *weights, *sizes,
            K=inner, M=self.num_sequences, NORM=norm is not None, SWIGLU=swiglu,
            RESIDUAL=residual is not None, PDL=self.early, **plan, **launch_options(self.early),
        )  # fmt: skip

    def _attention(self, layer, rows):
        attention = layer.self_attn
        config, batch = attention.config, self.num_sequences
        latents, heads, groups = self.local_sizes
        branches, rank, rope = latents // groups, config.latent_head_dim, config.qk_rope_head_dim
        kv_b, latent_gamma = (local_tensor(m.weight) for m in (attention.kv_b_proj, attention.kv_a_layernorm))
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        first = [attention.q_a_proj, attention.kv_a_proj, attention.k_rope_proj]
        if config.attn_output_gate:
            first.append(attention.g_proj)
        self._linear(self.hidden, first, self.a, norm=layer.input_layernorm)
        self._linear(
            self.a[:, : config.q_lora_rank], [attention.q_b_proj], self.q,
            norm=attention.q_a_layernorm, scale=attention.alpha_q,
        )  # fmt: skip
        padded_rank, padded_nope = triton.next_power_of_2(rank), triton.next_power_of_2(nope)
        columns = min(padded_rank, max(16, 8192 // padded_nope))
        rotary = self.model.model.rotary_emb
        _absorb_kernel[(latents * heads, triton.cdiv(rank, columns) + 1)](
            self.q, self.a, self.a.stride(0), config.q_lora_rank, kv_b, latent_gamma, rotary.inv_freq,
            self.counters, self.q_latent, self.q_rope,
            rows, rows.stride(0), rows.stride(2), attention.alpha_kv, attention.kv_a_layernorm.variance_epsilon,
            rotary.attention_scaling, M=batch, L=latents, C=branches, H=heads, R=rank, DN=nope, E=rope, V=value,
            DNP=padded_nope, RP=padded_rank, RB=columns, EP=triton.next_power_of_2(rope // 2), PDL=self.early,
            num_warps=4, **launch_options(self.early),
        )  # fmt: skip
        parts = self._latent_attention(attention, rows)
        padded_branches = triton.next_power_of_2(branches)
        block = min(triton.next_power_of_2(value), max(4, 16384 // (padded_branches * padded_rank)))
        _value_kernel[(groups * heads, triton.cdiv(value, block))](
            parts.part, parts.lse, *self._lengths(), kv_b,
            self.a[:, sum(self.widths_a[:3]) :], self.a.stride(0), self.heads, attention.alpha_attn, parts.programs,
            M=batch, L=latents, C=branches, H=heads, R=rank, DN=nope, V=value,
            CP=padded_branches, RP=padded_rank, VB=block, GATE=config.attn_output_gate, PDL=self.early,
            **value_plan(parts.programs, padded_branches * padded_rank), **parts.deal, **launch_options(self.early),
        )  # fmt: skip

    def _lengths(self):
        return self.counters[1 + self.num_sequences :], self.kv_start

    def _latent_attention(self, attention, rows):
        """Kernel 4. Older rows and lengths are settled: of what it reads, the kernels in front of it in this step
        write this token's rows only, and no step begins before the one before has ended (`_embed_kernel` is launched
        in the ordinary way)."""
        config, batch = attention.config, self.num_sequences
        latents, heads, groups = self.local_sizes
        split, cached = latents * config.latent_head_dim, rows.squeeze(1)
        return partial_results(
            None,
            self.q_latent.view(batch, 1, latents, heads, -1),
            self.q_rope.view(batch, 1, groups, heads, -1),
            cached[..., :split].unflatten(-1, (latents, -1)),
            cached[..., split:],
            *self._lengths(), self.key_mask, None, 0, attention.scaling, True,
        )  # fmt: skip
