"""Captured forwards for the library's own loops: beam search, prompt lookup, assisted generation, and an assistant.

Within `captured_forwards`, a forward of a few new tokens over the loop's growing latent cache replays the fused step.
Several tokens of a sequence are verified together, padded to one of a few numbers: what stands behind them is of no
consequence, since nothing attends to it and the next tokens overwrite its rows.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .cache_mlra import MLRACache, ordinary_tensors
from .capture_mlra import (
    FIRST_CAPACITY,
    GROWTH,
    Replay,
    fingerprint,
    held_with,
    is_plain,
    may_capture,
    size_class,
)
from .device_mlra import Launches, on_device
from .library_mlra import is_recording
from .masks_mlra import MaskBuffers
from .peer_memory_mlra import naming_lost_ranks
from .step_mlra import MAX_SEQUENCES, FusedStep, obstacle

# Tokens of a sequence that graphs are made for: each number compiles kernels of its own, for seconds, while up to 16
# tokens wait for the same weights. Candidates come in every number, the fewer the nearer a call is to its end.
TOKEN_CLASSES = 1, 4, 16, 32
fused_forwards: Counter[str] = Counter()  # how often the step ran: as a "graph", "launches", "layers" of them
_active = threading.local()


class VerifyingStep:
    """The fused step for `tokens_each` tokens of each of `num_sequences` sequences, on fixed buffers: as a graph that
    shares memory with its `siblings`, or without them launch by launch."""

    def __init__(
        self, model: nn.Module, cache: MLRACache, num_sequences: int, tokens_each: int, masked: bool, siblings=None
    ):
        rows = cache.layers[0].rows
        device, self.shape = rows.device, (num_sequences, tokens_each)
        self.token_ids = torch.zeros(self.shape, dtype=torch.long, device=device)
        self.counters = torch.zeros(1 + num_sequences * (tokens_each + 1), dtype=torch.int32, device=device)
        self.masks = MaskBuffers(num_sequences, rows.shape[2], device) if masked else None
        kv_start, key_mask = (self.masks.kv_start, self.masks.key_mask) if self.masks else (None, None)
        self.step = step = FusedStep(model, cache, self.counters, kv_start, key_mask, tokens_each)
        flat_ids = self.token_ids.flatten()

        def run() -> torch.Tensor:
            return step.logits_after(flat_ids)

        self.run = Launches(run, device) if siblings is None else Replay(run, device, siblings)

    def start(
        self,
        token_ids: torch.Tensor,
        rows: int,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        """Take the inputs: `token_ids` `[B, T]`, whose rows follow the `rows` in use."""
        (batch, padded), length = self.shape, token_ids.shape[1]
        positions = self.counters[1 : 1 + batch * padded].view(self.shape)
        if position_ids is None:
            position_ids = torch.arange(rows, rows + length, device=token_ids.device)
        positions[:, :length] = position_ids
        self.counters[0] = rows
        self.counters[1 + batch * padded :] = rows + padded
        self.token_ids[:, :length] = token_ids
        if self.masks is not None:
            self.masks.set(attention_mask)

    def __call__(self, token_ids: torch.Tensor, rows: int, position_ids, attention_mask) -> torch.Tensor:
        """Logits `[B, T, vocab_size]` after tokens as of `start`."""
        self.start(token_ids, rows, position_ids, attention_mask)
        return self.run().view(*self.shape, -1)[:, : token_ids.shape[1]].clone()


class CapturedForwards:
    """Replays the forwards of one loop; `None` for one that it does not take."""

    def __init__(self, model: nn.Module, cache: MLRACache):
        self.model, self.cache, self.fingerprint = model, cache, fingerprint(model)
        self.fuses: dict[int, bool] = {}

    def takes(self, model, input_ids, attention_mask, cache, inputs_embeds, labels, kwargs: dict) -> bool:
        """Whether a forward of these arguments is one of this loop's steps."""
        if model is not self.model or cache is not self.cache or inputs_embeds is not None or labels is not None:
            return False
        rows, length = cache.get_seq_length(), input_ids.shape[1]
        if rows == 0 or (attention_mask is not None and attention_mask.shape[1:] != (rows + length,)):
            return False  # what a narrower mask lacks is padding, which the buffers' rows to come are not
        tokens = input_ids.shape[0] * size_class_of_tokens(length)
        if tokens > MAX_SEQUENCES or is_recording(model, kwargs):
            return False
        if tokens not in self.fuses:
            self.fuses[tokens] = obstacle(model, tokens) is None
        return self.fuses[tokens]

    def __call__(self, input_ids, attention_mask, position_ids) -> torch.Tensor:
        batch, length = input_ids.shape
        rows, padded = self.cache.get_seq_length(), size_class_of_tokens(length)
        make_room(self.cache, padded)
        masked = attention_mask is not None
        held = held_with(self.cache, self.fingerprint)
        key = "verify", batch, padded, masked
        if key not in held.objects:
            with ordinary_tensors():
                held.objects[key] = VerifyingStep(self.model, self.cache, batch, padded, masked, held.replays)
        with on_device(input_ids.device):
            logits = held.objects[key](input_ids, rows, position_ids, attention_mask)
        self.cache.set_seq_length(rows + length)
        fused_forwards["graph"] += 1
        return logits


def make_room(cache: MLRACache, tokens: int) -> None:
    """Have room for so many more tokens, of rows that nobody has seen."""
    rows, capacity = cache.get_seq_length(), cache.layers[0].rows.shape[2]
    if rows + tokens > capacity:
        cache.reserve(size_class(rows + tokens, FIRST_CAPACITY))
    elif any(layer.is_seen_behind(rows) for layer in cache.layers):
        cache.reserve(capacity)


def size_class_of_tokens(tokens: int) -> int:
    """How many `tokens` of a sequence are padded to; more than the largest class are left as they are."""
    return next((size for size in TOKEN_CLASSES if size >= tokens), tokens)


def suits(model: nn.Module, cache: Any, generation_config) -> bool:
    """Whether a loop's forwards can be captured: on a GPU, over a growing latent cache, by plain modules."""
    return may_capture(model, cache, generation_config) and not cache.is_compileable and is_plain(model)


@contextmanager
def captured_forwards(model: nn.Module, cache: Any, generation_config) -> Iterator[None]:
    """Context in which the model's forwards over `cache` replay graphs, where that `suits`."""
    if not suits(model, cache, generation_config):
        yield
        return
    cache.reserve(size_class(min(generation_config.max_length, GROWTH) + MAX_SEQUENCES, FIRST_CAPACITY))
    outer = getattr(_active, "forwards", ())
    _active.forwards = (*outer, CapturedForwards(model, cache))
    try:
        with naming_lost_ranks():
            yield
    finally:
        _active.forwards = outer


def captured_logits(
    model, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs: dict
) -> torch.Tensor | None:
    """Logits of a forward that a loop's graph takes, else None."""
    for forwards in getattr(_active, "forwards", ()):
        if forwards.takes(model, input_ids, attention_mask, cache, inputs_embeds, labels, kwargs):
            return forwards(input_ids, attention_mask, position_ids)
    return None


__all__ = ["VerifyingStep", "captured_forwards", "captured_logits", "fused_forwards", "make_room"]
