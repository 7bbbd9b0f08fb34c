"""The mathematics of latent attention: expanded form, absorbed form, and the choice between them.

Shapes: B batch, T queries, S keys, G head groups, C branches per head, L = G * C latents, H heads per group,
R latent width, N / E / V widths of a head's positionless key, RoPE key and value. Latents are group-major: latent
g * C + c is branch c of group g (see `configuration_mlra`). Every size is read off the tensors, so that the same code
runs on one tensor-parallel rank's share.

For latent l and a head i that it serves (paper, eqs. 5-8):
    o_{l,i} = softmax(scaling * (q_nope_i . k_nope_{l,i} + q_rope_i . k_rope)) v_{l,i}
    o_i = alpha_attn * sum_l o_{l,i}
with k_nope_{l,i} = W_uk[l,i] c_l and v_{l,i} = W_uv[l,i] c_l.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .decode_mlra import latent_attention
from .masks_mlra import CacheRows

# A continuation of up to this many tokens runs absorbed. Expanding S cached rows costs S*R*(N+V) per head and latent,
# absorbing costs T*S*(2R - N - V) more in the scores: at R=512, N=V=128 the two are equal at T=170.
MAX_ABSORBED_QUERIES = 64

# Keys and values of the prefix expanded at one time in inference. Few of them, as those of a short prompt, take one
# attention call for all latents: what it copies costs less than more launches. Many run a few heads after another.
MAX_FOLDED_BYTES = 64 * 2**20
MAX_EXPANDED_BYTES = 2 * 2**30

# What scaled_dot_product_attention runs; of the plain mathematics nothing need be kept.
FUSED_ATTENTION = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def fastest_sdpa(query: torch.Tensor, attention_mask: torch.Tensor | None) -> AbstractContextManager:
    """The backend order of torch's scaled_dot_product_attention for keys wider than values, without a mask.

    Its FlashAttention takes equal widths only, and the order it would choose by itself falls to the memory-efficient
    kernel, far slower than cuDNN's on a Hopper GPU (`python -m scripts.bench_generate` times all of them).
    """
    if query.device.type != "cuda" or attention_mask is not None:
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def up_projections(kv_b_weight: torch.Tensor, nope_dim: int, v_dim: int):
    """Split the latent up-projection `[L*H*(N+V), R]` into `W_uk [L*H, N, R]` and `W_uv [L*H, V, R]` (views)."""
    weight = kv_b_weight.view(-1, nope_dim + v_dim, kv_b_weight.shape[-1])  # [L*H, N + V, R]
    return weight.split_with_sizes([nope_dim, v_dim], dim=1)


def branch_sum(head_outputs: torch.Tensor, num_groups: int, alpha: float) -> torch.Tensor:
    """Sum the branches of each head: `[B, T, L, H, V]` to `[B, T, G*H, V]`, scaled by alpha_attn (paper, eq. 8)."""
    batch, queries, latents, heads, v_dim = head_outputs.shape
    summed = head_outputs
    if latents > num_groups:
        summed = head_outputs.view(batch, queries, num_groups, latents // num_groups, heads, v_dim).sum(dim=3)
    summed = summed.reshape(batch, queries, num_groups * heads, v_dim)
    return summed if alpha == 1.0 else summed * alpha


def sum_scaled(terms: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """The sum of the branches of one group, scaled by alpha_attn (paper, eq. 8), added up in float32 or wider."""
    total = terms[0].to(torch.promote_types(terms[0].dtype, torch.float32))
    for term in terms[1:]:
        total = total + term
    return (total * alpha).to(terms[0].dtype)


def key_projection(w_uk: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """`W_uk` `[h, N, R]` beside the identity: `[h, N + E, R + E]`, whose product with `[c | k_rope]` is whole keys."""
    rank = w_uk.shape[-1]
    identity = torch.eye(rope_dim, dtype=w_uk.dtype, device=w_uk.device)
    below = nn.functional.pad(identity, (rank, 0)).expand(len(w_uk), -1, -1)
    return torch.cat([nn.functional.pad(w_uk, (0, rope_dim)), below], dim=1)


def join(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat`, which would copy a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def expanded_attention(
    module: nn.Module,
    query: torch.Tensor,
    latents: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_interface: Callable,
    *,
    gives_weights: bool,
    nope_dim: int,
    v_dim: int,
    scaling: float,
    alpha: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over materialised keys and values.

    Each latent is one attention call, which reads its group's queries and its values where they lie: no branch has a
    copy of the queries, and nothing beside keys and values is kept for the backward pass. A short prompt runs all
    latents in one call instead, and so does training with an interface that gives weights: gradients reach the
    weights of a call, not a joined copy of them.

    Args:
        query: `[B, T, G*H, N + E]`, RoPE applied.
        latents: `[B, S, L, R]`.
        k_rope: `[B, S, E]`, RoPE applied.
        kv_b_weight: `[L*H*(N+V), R]`.
        attention_mask: whatever `attention_interface` takes.
        gives_weights: whether `attention_interface` gives attention weights.

    Returns:
        Head outputs `[B, T, G*H, V]` and, where the interface gives them, attention weights `[B, L*H, T, S]`.
    """
    batch, queries = query.shape[:2]
    num_keys, num_latents, rank = latents.shape[1:]
    heads = kv_b_weight.shape[0] // (num_latents * (nope_dim + v_dim))
    num_groups = query.shape[2] // heads
    branches = num_latents // num_groups

    def expand(c, part):
        """`[B, S, R]` by `[h, N or V, R]`: `[B, S, h, N or V]`."""
        return nn.functional.linear(c, part.flatten(0, 1)).unflatten(-1, part.shape[:2])

    def with_rope(x):
        """`[B, S, n, D]` and the rotary keys behind each: `[B, S, n, D + E]`."""
        return torch.cat([x, k_rope.unsqueeze(2).expand(*x.shape[:3], -1)], dim=-1)

    def attend(query, key, value):
        """Of `[B, T, h, D]`, `[B, S, h, D]` and `[B, S, h, V]`: `[B, T, h, V]`, `[B, h, T, S]`."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return attention_interface(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    bytes_per_head = batch * num_keys * (query.shape[-1] + v_dim) * query.element_size()
    is_inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    with fastest_sdpa(query, attention_mask):
        is_short = num_latents * heads * bytes_per_head <= min(MAX_FOLDED_BYTES, MAX_EXPANDED_BYTES)
        if is_short if is_inference else gives_weights:
            weight = kv_b_weight.view(num_latents, heads * (nope_dim + v_dim), rank)
            # One batched product over latents: [L, B*S, R] x [L, R, H*(N+V)]
            expanded = torch.bmm(latents.flatten(0, 1).transpose(0, 1), weight.transpose(1, 2))
            expanded = expanded.view(num_latents, batch, num_keys, heads, -1).permute(1, 2, 0, 3, 4).flatten(2, 3)
            query = query.view(batch, queries, num_groups, 1, heads, -1).expand(-1, -1, -1, branches, -1, -1)
            k_nope, value = expanded.split([nope_dim, v_dim], dim=-1)
            output, weights = attend(query.flatten(2, 4), with_rope(k_nope), value)
            return branch_sum(output.view(batch, queries, num_latents, heads, v_dim), num_groups, alpha), weights

        step = min(max(MAX_EXPANDED_BYTES // bytes_per_head, 1), heads) if is_inference else heads
        # Unbound and split rather than indexed: the gradients of the parts then come together without sums of zeros
        grouped = query.view(batch, queries, num_groups, heads, -1).unbind(2)
        w_uk, w_uv = up_projections(kv_b_weight, nope_dim, v_dim)
        key_sources = latents
        if not is_inference:  # neither keys nor their gradients are copied, which takes longer than a few FLOPs more
            w_uk = key_projection(w_uk.to(latents.dtype), k_rope.shape[-1])
            key_sources = with_rope(latents)
        w_uk, w_uv = w_uk.chunk(num_latents), w_uv.chunk(num_latents)
        outputs, weights = [], []
        for latent, (c, source) in enumerate(zip(latents.unbind(2), key_sources.unbind(2), strict=True)):
            of_group = grouped[latent // branches].split(step, dim=2)
            pieces = []
            for q, uk, uv in zip(of_group, w_uk[latent].split(step), w_uv[latent].split(step), strict=True):
                key = expand(source, uk)
                pieces.append(attend(q, with_rope(key) if is_inference else key, expand(c, uv)))
            outputs.append(join([piece[0] for piece in pieces], dim=2))  # [B, T, H, V]
            weights += [piece[1] for piece in pieces]
    sums = [sum_scaled(outputs[first : first + branches], alpha) for first in range(0, num_latents, branches)]
    return join(sums, dim=2), None if weights[0] is None else join(weights, dim=1)


def recompute_inputs(attention: Callable, *args) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention(*args)`, whose queries, keys and values are made again in the backward pass instead of kept.

    The attention kernel itself does not run again: its output stays. Kernels that are not torch's own do.
    """
    contexts = partial(create_selective_checkpoint_contexts, FUSED_ATTENTION)
    return checkpoint(attention, *args, use_reentrant=False, context_fn=contexts)


def absorbed_attention(
    module: nn.Module,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latents: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_weight: torch.Tensor,
    rows: CacheRows | torch.Tensor | None,
    eager_attention: Callable,
    *,
    nope_dim: int,
    v_dim: int,
    scaling: float,
    alpha: float,
    implementation: str,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in the latent space: no key or value is materialised, each latent is one multi-query attention.

    W_uk moves to the query side and W_uv behind the weighted sum of latents (specification, "absorbed decode").

    Args:
        q_nope: `[B, T, G*H, N]`.
        q_rope: `[B, T, G*H, E]`, RoPE applied.
        latents: `[B, S, L, R]`; may hold more rows than are in use. `[S, L, R]` with a row table.
        k_rope: `[B, S, E]`, RoPE applied. `[S, E]` with a row table.
        kv_b_weight: `[L*H*(N+V), R]`.
        rows: the rows to read, or an additive mask `[B, 1, T, S]` (or None), which runs `eager_attention`.
        scales: of latents in eight bits, as in `latent_attention`; with `CacheRows` only.

    Returns:
        Head outputs `[B, T, G*H, V]` and, with an additive mask, attention weights `[B, L*H, T, S]`.
    """
    batch, queries, num_heads, _ = q_nope.shape
    num_latents, rank = latents.shape[-2:]
    heads = kv_b_weight.shape[0] // (num_latents * (nope_dim + v_dim))
    num_groups = num_heads // heads
    branches = num_latents // num_groups
    w_uk, w_uv = up_projections(kv_b_weight, nope_dim, v_dim)
    q_nope = q_nope.view(batch, queries, num_groups, heads, -1)
    q_rope = q_rope.view(batch, queries, num_groups, heads, -1)

    # q_latent[l, i] = W_uk[l, i]^T q_nope[i], batched over (l, i): [L*H, B*T, N] x [L*H, N, R]
    if branches > 1:
        q_nope = q_nope.unsqueeze(3).expand(-1, -1, -1, branches, -1, -1)
    q_nope = q_nope.reshape(batch * queries, num_latents * heads, nope_dim).transpose(0, 1)
    q_latent = torch.bmm(q_nope, w_uk).transpose(0, 1)
    q_latent = q_latent.reshape(batch, queries, num_latents, heads, rank)

    weights = None
    if isinstance(rows, CacheRows):
        z = latent_attention(
            q_latent,
            q_rope,
            latents,
            k_rope,
            kv_end=rows.kv_end,
            kv_start=rows.kv_start,
            key_mask=rows.key_mask,
            scaling=scaling,
            implementation=implementation,
            block_table=rows.row_table,
            page_size=rows.page_size if rows.row_table is not None else 0,
            scales=scales,
        )
    else:
        # Heads become query rows of their latent's multi-query attention: [B, L, H*T, R + E] against [B, L, S, R + E]
        q_rope = q_rope.unsqueeze(3).expand(-1, -1, -1, branches, -1, -1).flatten(2, 3)
        folded = torch.cat([q_latent, q_rope], dim=-1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        values = latents.transpose(1, 2)
        keys = torch.cat([values, k_rope[:, None].expand(-1, num_latents, -1, -1)], dim=-1)
        mask = rows if rows is None else rows.repeat(1, 1, heads, 1)
        z, weights = eager_attention(module, folded, keys, values, mask, scaling=scaling)  # [B, H*T, L, R]
        z = z.view(batch, heads, queries, num_latents, rank).permute(0, 2, 3, 1, 4)
        weights = weights.view(batch, num_latents * heads, queries, -1)

    z = z.reshape(batch * queries, num_latents * heads, rank).transpose(0, 1)
    output = torch.bmm(z, w_uv.transpose(1, 2)).transpose(0, 1)  # [B*T, L*H, V]
    return branch_sum(output.reshape(batch, queries, num_latents, heads, v_dim), num_groups, alpha), weights
