"""Forwards of a few new tokens over a growing latent cache, by the fused step instead of the modules.

Within `captured_forwards`, for the library's own loops (beam search, prompt lookup, assisted generation, and an
assistant), they replay a graph. Several tokens of a sequence are verified together, padded to one of a few numbers:
what stands behind them is of no consequence, since nothing attends to it and the next tokens overwrite its rows.

Anybody else's forward of one new token of each sequence starts the same kernels one by one, where nothing looks inside
the model.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .cache_mlra import MLRACache, ordinary_tensors
from .capture_mlra import (
    FIRST_CAPACITY,
    GROWTH,
    Held,
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
from .rows_mlra import RowFormat
from .step_mlra import MAX_SEQUENCES, FusedStep, obstacle
from .tensor_parallel_mlra import tensor_parallel_mesh

# Tokens of a sequence that graphs are made for: each number compiles kernels of its own, for seconds, while up to 16
# tokens wait for the same weights. Candidates come in every number, the fewer the nearer a call is to its end.
TOKEN_CLASSES = 1, 4, 16, 32
MAX_STEPPED = 8  # caches of a model that keep launches, and a few megabytes of buffers each; the oldest go first
STEPPED_DEVICES = ("cuda",)
fused_forwards: Counter[str] = Counter()  # how often the step ran in a forward: as a "graph", or as "launches"
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
        step = FusedStep(model, cache, self.counters, kv_start, key_mask, tokens_each)
        token_ids = self.token_ids.flatten()

        def run() -> torch.Tensor:
            return step.logits_after(token_ids)

        self.run = Launches(run, device) if siblings is None else Replay(run, device, siblings)

    def __call__(
        self,
        token_ids: torch.Tensor,
        rows: int,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits `[B, T, vocab_size]` after `token_ids` `[B, T]`, whose rows follow the `rows` in use."""
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
        return self.run().view(batch, padded, -1)[:, :length].clone()


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
        make_room(self.cache, size_class_of_tokens(input_ids.shape[1]))
        held = held_with(self.cache, self.fingerprint)
        return run_step(self.model, self.cache, held, held.replays, input_ids, attention_mask, position_ids)


def make_room(cache: MLRACache, tokens: int) -> None:
    """Have room for so many more tokens, of rows that nobody has seen."""
    rows, capacity = cache.get_seq_length(), cache.layers[0].rows.shape[2]
    if rows + tokens > capacity:
        cache.reserve(size_class(rows + tokens, FIRST_CAPACITY))
    elif any(layer.is_seen_behind(rows) for layer in cache.layers):
        cache.reserve(capacity)


def run_step(model, cache: MLRACache, held: Held, siblings, input_ids, attention_mask, position_ids) -> torch.Tensor:
    """Logits of new tokens for which there is room, by the step that is held for their shape; they are counted."""
    rows, (batch, length) = cache.get_seq_length(), input_ids.shape
    shape = batch, size_class_of_tokens(length), attention_mask is not None
    # Buffers of launches are freed, and may be given to others, on the stream that they were made on
    stream = torch.cuda.current_stream(input_ids.device) if siblings is None and input_ids.is_cuda else None
    key = "verify", *shape, stream
    if key not in held.objects:
        with ordinary_tensors():
            held.objects[key] = VerifyingStep(model, cache, *shape, siblings)
    with on_device(input_ids.device):
        logits = held.objects[key](input_ids, rows, position_ids, attention_mask)
    cache.set_seq_length(rows + length)
    fused_forwards["launches" if siblings is None else "graph"] += 1
    return logits


class Stepped:
    """What is kept of a model, as it is, for forwards of everybody: which numbers of sequences the fused step takes,
    and with which caches steps have run. It goes with the model: launches keep weights alive."""

    def __init__(self, model_fingerprint: tuple):
        self.fingerprint = model_fingerprint
        self.takes: dict[int, bool] = {}
        self.held: WeakKeyDictionary[MLRACache, Held] = WeakKeyDictionary()

    def held_of(self, cache: MLRACache) -> Held:
        if cache not in self.held and len(self.held) >= MAX_STEPPED:
            del self.held[next(iter(self.held))]
        return held_with(cache, self.fingerprint, self.held)


_stepped: WeakKeyDictionary[nn.Module, Stepped] = WeakKeyDictionary()


def is_step(model: nn.Module, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs) -> bool:
    """Whether a forward is of one new token of each of a few sequences, and asks for nothing but logits."""
    if not isinstance(cache, MLRACache) or cache.is_compileable or cache.offloading or input_ids is None:
        return False
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(input_ids.device.type):
        return False
    if input_ids.device.type not in STEPPED_DEVICES or input_ids.ndim != 2:
        return False
    (batch, length), rows = input_ids.shape, cache.get_seq_length()
    if not all(layer.is_initialized and layer.get_seq_length() == rows for layer in cache.layers):
        return False
    mask_shape = (batch, rows + 1) if attention_mask is None else attention_mask.shape
    return (
        length == 1
        and batch <= MAX_SEQUENCES
        and rows > 0
        and mask_shape == (batch, rows + 1)
        and (position_ids is None or position_ids.ndim == 2)
        and inputs_embeds is None
        and labels is None
        and not is_recording(model, kwargs)
        and model.config._attn_implementation != "eager"
        and _get_current_dispatch_mode() is None  # which counts or traces operations
        and not torch.jit.is_tracing()
        and not (input_ids.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def fits(model: nn.Module, cache: MLRACache, batch: int) -> bool:
    """Whether a cache holds rows of `batch` sequences as this model writes them."""
    config, weight, rows = model.config, model.lm_head.weight, cache.layers[0].rows
    own = RowFormat(config.kv_lora_rank, config.qk_rope_head_dim, weight.dtype)
    if cache.layers[0].scaled_width == config.latent_head_dim:
        own = replace(own, scales=config.num_latent_heads)
    return len(model.model.layers) == config.num_hidden_layers == len(cache.layers) and all(
        layer.rows.shape == (batch, *rows.shape[1:])
        and layer.rows.device == weight.device
        and layer.format == own
        and not layer.rows.requires_grad
        for layer in cache.layers
    )


def stepped_logits(
    model: nn.Module, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs: dict
) -> torch.Tensor | None:
    """Logits of a forward that the fused step takes without a graph, else None."""
    if not is_step(model, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs):
        return None
    now, batch = fingerprint(model), input_ids.shape[0]
    kept = _stepped.get(model)
    if kept is None or kept.fingerprint != now:
        kept = _stepped[model] = Stepped(now)
    if batch not in kept.takes:
        kept.takes[batch] = is_plain(model) and obstacle(model, batch) is None and tensor_parallel_mesh(model) is None
    if not kept.takes[batch]:
        return None
    held = kept.held_of(cache)
    if ("fits", batch) not in held.objects:
        held.objects["fits", batch] = fits(model, cache, batch)
    if not held.objects["fits", batch]:
        return None
    make_room(cache, 1)
    return run_step(model, cache, kept.held_of(cache), None, input_ids, attention_mask, position_ids)


def free_steps(model: nn.Module) -> None:
    """Free what forwards of everybody have kept of this model."""
    _stepped.pop(model, None)


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


def fused_logits(
    model, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs: dict
) -> torch.Tensor | None:
    """Logits of a forward that the fused step takes, as a loop's graph or by itself, else None."""
    if torch.compiler.is_compiling():
        return None
    for forwards in getattr(_active, "forwards", ()):
        if forwards.takes(model, input_ids, attention_mask, cache, inputs_embeds, labels, kwargs):
            return forwards(input_ids, attention_mask, position_ids)
    return stepped_logits(model, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs)


__all__ = ["captured_forwards", "free_steps", "fused_forwards", "fused_logits"]
