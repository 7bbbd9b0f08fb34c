"""Absorbed decode attention by FlashAttention-3's decode entry, in the forms that its published builds take.

Those take keys of up to 64 columns beside values of 256 to 512 (and then `qv`, queries that meet the values), or keys
of 192 and values of 128 (hopper/flash_api.cpp of FlashAttention). So cached rows go there as they are, in one of three
forms: one latent of 128 beside its rotary key is a key of 192 and the value in it; a latent of 256 or 512 is a value;
narrower latents, side by side in a row, are one value together. `decode_mlra` has the legend.
"""

import torch

from .decode_arguments_mlra import DecodeInputs
from .rows_mlra import as_one_row, is_one_row

try:
    import flash_attn_interface
except ImportError:
    flash_attn_interface = None

VALUE_WIDTHS = 256, 512  # from and to, beside which `qv` was compiled
MAX_ROPE_WIDTH = 64  # of the keys then


def flash_form(latents: torch.Tensor, k_rope: torch.Tensor) -> str | None:
    """The form that latents `[..., L, R]` and rotary keys `[..., E]` take: "row", "latents", "joined", or None."""
    if is_one_row(latents, k_rope):
        return "row"
    least, most = VALUE_WIDTHS
    num_latents, width = latents.shape[-2:]
    if k_rope.shape[-1] > MAX_ROPE_WIDTH:
        return None
    if least <= width <= most:
        return "latents"
    side_by_side = latents.stride()[-2:] == (width, 1)
    return "joined" if side_by_side and least <= num_latents * width <= most else None


def flash_obstacle(q_latent, latents, k_rope, kv_start, key_mask) -> str | None:
    """Why FlashAttention-3 cannot run these inputs, or None if it can."""
    if flash_attn_interface is None:
        return "module flash_attn_interface (FlashAttention-3) is not installed; 'triton' needs no such module"
    if q_latent.device.type != "cuda" or q_latent.dtype not in (torch.bfloat16, torch.float16):
        return f"it runs bfloat16 or float16 on CUDA only, not {q_latent.dtype} on {q_latent.device.type}"
    if kv_start is not None or key_mask is not None:
        return "it takes no left padding and no key mask; use 'triton' or 'torch'"
    if latents.dtype != k_rope.dtype:
        return "it takes no latents in eight bits; use 'triton' or 'torch', or cache_row_format='plain'"
    if flash_form(latents, k_rope) is None:
        least, most = VALUE_WIDTHS
        return (
            f"its published builds take {least} to {most} columns of latents beside a rotary key of at most "
            f"{MAX_ROPE_WIDTH}, or one latent of 128 beside its rotary key of 64, not {latents.shape[-2]} of "
            f"{latents.shape[-1]} and {k_rope.shape[-1]}; use 'triton'"
        )
    return None


def flash_latent_attention(inputs: DecodeInputs) -> torch.Tensor:
    """`latent_attention` of inputs that have no `flash_obstacle`.

    Its kernels multiply the unused rows of a tile by zero: these must be finite, as a cache's are. `settled` makes no
    difference: they start when the one in front has ended. Latents in eight bits never come here.
    """
    q_latent, q_rope, latents, k_rope = inputs[:4]
    length, num_latents = q_latent.shape[1:3]
    attend = flash_attn_interface.flash_attn_with_kvcache
    paged = {}
    if inputs.block_table is not None:
        latents, k_rope = (x.unflatten(0, (-1, inputs.page_size)) for x in (latents, k_rope))
        paged = {"page_table": inputs.block_table}
    common = {"cache_seqlens": inputs.kv_end, "softmax_scale": inputs.scaling, "causal": length > 1, **paged}
    form = flash_form(latents, k_rope)
    if form == "row":
        z = attend(torch.cat([q_latent[:, :, 0], q_rope[:, :, 0]], -1), *as_one_row(latents, k_rope), **common)
        return z[:, :, None]
    keys = k_rope[:, :, None]
    q_rope = q_rope.repeat_interleave(num_latents // q_rope.shape[2], dim=2)  # [B, T, L, H, E]
    if form == "latents":
        pairs = zip(q_rope.unbind(2), q_latent.unbind(2), latents.split(1, dim=2), strict=True)
        return torch.stack([attend(rope, keys, c, qv=query, **common) for rope, query, c in pairs], dim=2)
    # Each latent's queries meet zeros instead of the other latents, and of all values its own are kept:
    # L times the products, in which the rows are read once for all of them.
    queries = torch.diag_embed(q_latent.permute(0, 1, 3, 4, 2), dim1=2, dim2=4)  # [B, T, L, H, L, R]
    values = latents.view(*latents.shape[:2], 1, -1)
    z = attend(q_rope.flatten(2, 3), keys, values, qv=queries.flatten(4).flatten(2, 3), **common)
    return z.view(queries.shape).diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3).contiguous()


__all__ = ["flash_form", "flash_latent_attention", "flash_obstacle"]
