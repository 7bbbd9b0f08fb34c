"""Continuous batching: latent rows in the library's paged cache, which keeps a key and a value of one shape per token.

A row `[c_0 … c_{L-1} | k_rope]` is kept as its two halves, a "key" and a "value" of the configuration's
`num_key_value_heads` and `head_dim`, so a token costs L*R + E numbers (rounded up at sizes that do not divide).

Shapes: the batch is one packed sequence of T new tokens of N requests; S rows are read, the T new ones included;
L latents, R latent width, E RoPE width, W half of a row = heads * head_dim.
"""

import torch
from torch import nn

from .library_mlra import update_pages
from .masks_mlra import CacheRows
from .rows_mlra import RowFormat, scaled_width


def update_paged(
    cache, latents: torch.Tensor, k_rope: torch.Tensor, layer_idx: int, config, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor, CacheRows | None]:
    """Store the new rows and read all rows of the requests at hand.

    Args:
        cache: the library's `PagedAttentionCache`.
        latents: `[1, T, L*R]`.
        k_rope: `[1, T, E]`, RoPE applied.
        config: gives W as the cache was built; narrower rows (a tensor-parallel rank's) are padded with zeros.
        kwargs: what the library passes to attention functions; becomes what one without a paged cache takes.

    Returns:
        Latents `[1, S, L*R]` (as they are kept) and RoPE keys `[1, S, E]` and, where every request has one new token,
        the rows of each request (else None). With a block table the rows come apart by request: `[N, S, L*R]` and
        `[N, S, E]`.

    Raises:
        ValueError: see `update_pages`.
    """
    heads, half = config.num_key_value_heads, config.num_key_value_heads * config.head_dim
    row_format = RowFormat.of(latents, k_rope, scaled_width(config))
    row = row_format.join(latents, k_rope).view(k_rope.dtype)  # bytes go as numbers of the cache's dtype
    row = nn.functional.pad(row, (0, 2 * half - row.shape[-1]))
    new_keys, new_values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in row.split(half, dim=-1))
    keys, values = update_pages(cache, new_keys, new_values, layer_idx, kwargs)
    block_table, _, _ = (kwargs.pop(name, None) for name in ("block_table", "read_index", "write_index"))
    lengths = kwargs["cu_seq_lens_k"].diff().to(torch.int32)  # [N]

    if block_table is not None:
        rows = exchange_by_table(kwargs.pop("k_cache"), kwargs.pop("v_cache"), row[0], block_table, lengths)
        return *row_format.split(rows.view(row_format.element)), CacheRows(lengths)
    rows = torch.cat([keys.reshape(1, -1, half), values.reshape(1, -1, half)], dim=-1)
    by_request = None
    if kwargs["max_length_q"] == 1 and len(lengths) == latents.shape[1]:
        first = kwargs["cu_seq_lens_k"][:-1, None]
        places = first + torch.arange(kwargs["max_length_k"], device=first.device)
        by_request = CacheRows(lengths, row_table=places.to(torch.int32))
    return *row_format.split(rows.view(row_format.element)), by_request


def exchange_by_table(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    new_rows: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Write each request's newest row into its last page, then read all its pages.

    Args:
        k_cache: `[pages, page size, heads, head_dim]`; `v_cache` alike. Page 0 belongs to no request.
        new_rows: `[N, 2 * W]`.
        block_table: `[N, blocks]` page numbers, -1 where there is none.
        lengths: `[N]` rows of each request with the new one; 0 marks a request that only fills up the batch.

    Returns:
        `[N, blocks * page size, 2 * W]`; rows from a request's length on are arbitrary.
    """
    page_size, half = k_cache.shape[1], k_cache.shape[2] * k_cache.shape[3]
    pages = block_table.long().clamp(min=0)
    last = (lengths.long() - 1).clamp(min=0)[:, None]
    place = pages.gather(1, last // page_size) * page_size + last % page_size
    place = torch.where(lengths > 0, place.squeeze(1), 0)
    for cached, new in zip((k_cache, v_cache), new_rows.split(half, dim=-1), strict=True):
        cached.view(-1, half).index_copy_(0, place, new)
    return torch.cat([cached[pages].flatten(3).flatten(1, 2) for cached in (k_cache, v_cache)], dim=-1)


__all__ = ["exchange_by_table", "update_paged"]
