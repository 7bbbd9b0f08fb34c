"""Absorbed decode attention in plain torch, which every kernel is held against; `decode_mlra` has the legend."""

import math

import torch

from .rows_mlra import dequantized


def reference_latent_attention(
    q_latent, q_rope, latents, k_rope, kv_end, kv_start=None, key_mask=None, block_table=None, page_size=0,
    scaling=1.0, scales=None,
):  # fmt: skip
    """The plain torch form: any device, dtype, width and query length; differentiable. Returns [B, T, L, H, R].

    Sums are float32 (float64 for float64 inputs). Rows that no query may see are zeroed, so NaN there does not spread.
    """
    batch, length, num_latents, heads, _ = q_latent.shape
    groups = q_rope.shape[2]
    dtype = torch.promote_types(q_latent.dtype, torch.float32)
    if block_table is not None:
        rows = torch.arange(block_table.shape[1] * page_size, device=q_latent.device)
        pages = block_table.long().clamp(min=0)[:, rows // page_size]
        index = (pages * page_size + rows % page_size).clamp(max=latents.shape[0] - 1)
        if scales is None:
            latents = latents[index]
        else:  # torch gathers no numbers of eight bits
            latents, scales = latents.view(torch.uint8)[index].view(latents.dtype), scales[index]
        k_rope = k_rope[index]
    positions = torch.arange(latents.shape[1], device=q_latent.device)
    used = positions < kv_end[:, None]  # [B, S]
    if kv_start is not None:
        used = used & (positions >= kv_start[:, None])
    if key_mask is not None:
        used = used & key_mask[:, : used.shape[1]].bool()
    query = torch.arange(length, device=q_latent.device)
    seen = used[:, None] & (positions <= (kv_end[:, None] - length + query)[..., None])  # [B, T, S]

    latents = latents.to(dtype) if scales is None else dequantized(latents, scales, dtype)
    c = latents.masked_fill(~used[..., None, None], 0).permute(0, 2, 1, 3)  # [B, L, S, R]
    k = k_rope.to(dtype).masked_fill(~used[..., None], 0)  # [B, S, E]
    q = q_latent.to(dtype).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, L, T*H, R]
    rotary = q_rope.to(dtype).permute(0, 2, 1, 3, 4).flatten(1, 3) @ k.transpose(1, 2)  # [B, G*T*H, S]
    rotary = rotary.view(batch, groups, length * heads, -1).repeat_interleave(num_latents // groups, dim=1)
    scores = (q @ c.transpose(2, 3) + rotary).unflatten(2, (length, heads)) * scaling  # [B, L, T, H, S]
    scores = scores.masked_fill(~seen[:, None, :, None], -math.inf)
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
    norm = weights.sum(dim=-1, keepdim=True)
    z = weights.flatten(2, 3) @ c
    z = z.unflatten(2, (length, heads)) / torch.where(norm == 0, 1.0, norm)
    return z.transpose(1, 2).to(q_latent.dtype)
