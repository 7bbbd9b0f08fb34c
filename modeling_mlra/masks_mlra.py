"""What a query may attend to: rows of the cache for the absorbed form, the library's masks for the expanded one.

Shapes: B batch, T new tokens, S cached rows, the new ones included.
"""

from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache

from .decode_mlra import asked_implementation
from .library_mlra import causal_mask


class CacheRows(NamedTuple):
    """Which cache rows the absorbed form may read, for each sequence of the batch.

    Args:
        kv_end: `[B]` int32, rows in use, those of the T queries included.
        kv_start: `[B]` int32, first row that is no padding, or None for 0.
        key_mask: `[B, any number of rows]` bool, rows that may be attended to, or None for all; others may not.
        row_table: `[B, pages]` int32, which pages of one shared pool hold the rows of each sequence, else None.
        page_size: rows of a page; with 1 the table says where each row lies.
    """

    kv_end: torch.Tensor
    kv_start: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    row_table: torch.Tensor | None = None
    page_size: int = 1


def cache_rows(
    attention_mask: torch.Tensor | None, kv_end: torch.Tensor | int, batch: int, device: torch.device
) -> CacheRows:
    """The cache rows that a batch may read: up to `kv_end`, less what a mask of any width leaves out or lacks."""
    if isinstance(kv_end, torch.Tensor):
        kv_end = kv_end.to(torch.int32).expand(batch)
    else:
        kv_end = torch.full((batch,), kv_end, dtype=torch.int32, device=device)
    if attention_mask is None:
        return CacheRows(kv_end)
    key_mask = attention_mask.to(torch.bool)
    return CacheRows(kv_end, key_mask.int().argmax(dim=-1).to(torch.int32), key_mask)


def hides_no_row(attention_mask: torch.Tensor, kv_end: torch.Tensor | int) -> bool:
    """Whether a mask lets all `kv_end` rows be read, as the library's loop gives it for prompts without padding.

    Waits for the device; False where that is impossible, while tracing or in a graph.
    """
    if torch.compiler.is_compiling() or (attention_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    used = attention_mask[:, : int(kv_end)]
    return used.shape[1] == int(kv_end) and bool(used.all())


class MaskBuffers:
    """Which rows may be attended to, in buffers of fixed address for captured steps.

    Attributes:
        key_mask: `[M, capacity]` bool; rows still to come may be.
        kv_start: `[M]` int32, first row that is no padding.
    """

    def __init__(self, num_sequences: int, capacity: int, device: torch.device):
        self.key_mask = torch.ones(num_sequences, capacity, dtype=torch.bool, device=device)
        self.kv_start = torch.zeros(num_sequences, dtype=torch.int32, device=device)

    def set(self, attention_mask: torch.Tensor) -> None:
        """Take the mask `[M, S]` of the S rows there are."""
        self.key_mask.fill_(True)
        self.key_mask[:, : attention_mask.shape[-1]] = attention_mask.bool()
        self.kv_start.copy_(self.key_mask.int().argmax(dim=-1))


def make_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
    past_length: torch.Tensor | int,
    absorbed: bool,
):
    """What the new tokens may attend to, as the form of attention that runs takes it.

    Args:
        attention_mask: `[B, S + T]`, or a 4D mask of the library.
        position_ids: as for `dense_mask`.

    Returns:
        For the absorbed form the rows to read or, with eager attention or a 4D mask, numbers to add to its scores; for
        the expanded form that of `dense_mask`.
    """
    batch, length = inputs_embeds.shape[:2]
    if absorbed and config._attn_implementation != "eager" and (attention_mask is None or attention_mask.ndim == 2):
        kv_end = past_length + length
        takes_no_mask = asked_implementation(config.decode_implementation) == "flash_attention_3"
        if takes_no_mask and attention_mask is not None and hides_no_row(attention_mask, kv_end):
            attention_mask = None
        return cache_rows(attention_mask, kv_end, batch, inputs_embeds.device)
    mask = dense_mask(config, inputs_embeds, attention_mask, cache, position_ids, past_length)
    return additive(mask, inputs_embeds.dtype) if absorbed else mask


def dense_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
    past_length: torch.Tensor | int,
):
    """The mask that the attention interface takes, no wider than the keys it covers.

    Without a prefix, attention runs over the new tokens alone, whatever length a static cache has.

    Args:
        position_ids: the caller's, or None where positions just count on: only given ones can separate documents.
    """
    length = inputs_embeds.shape[1]
    has_prefix = isinstance(past_length, torch.Tensor) or past_length > 0
    if config._attn_implementation == "sdpa" and attention_mask is None and position_ids is None and not has_prefix:
        return None  # causal by the kernel's own flag; the library, while compiling, would make a [T, T] mask instead
    is_static = cache is not None and cache.is_compileable
    if is_static and not has_prefix:
        cache = DynamicCache()
        attention_mask = None if attention_mask is None else attention_mask[..., :length]
    mask = causal_mask(config, inputs_embeds, attention_mask, cache, position_ids)
    if is_static and isinstance(mask, torch.Tensor) and not torch.compiler.is_compiling():
        mask = mask[..., : int(past_length) + length]
    return mask


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as numbers to add to scores; any other mask as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
