"""The decoding loop for a latent cache on a GPU: a captured step, and a host that never waits for the device.

The library's loop reads a flag from the device at every token and prepares each call in Python, which at this model's
size takes longer than the step itself. This one replays a CUDA graph, keeps inputs in fixed buffers and looks at the
stop flag a few tokens later; whatever was decoded past the end is undone, random state included, so that tokens,
cache and following calls are those of the library's loop. It has the signature of a `custom_generate` function.

A growing cache has rows reserved for the call, and more when they are full. One that the caller neither gave nor asks
for is taken from those that wait with their graphs (`capture_mlra`): a second call of like size captures nothing.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_mlra import MLRACache, ordinary_tensors
from .capture_choice_mlra import Selection, choice_of_logits_alone
from .capture_flags_mlra import LaggedFlags, random_state, restore_random_state
from .capture_mlra import (
    FIRST_CAPACITY,
    GROWTH,
    fingerprint,
    give_back,
    held_with,
    is_plain,
    may_capture,
    size_class,
    take_spare,
)
from .capture_step_mlra import Buffers, CapturedPrefill, DecodingStep
from .device_mlra import on_device
from .library_mlra import CACHE
from .peer_memory_mlra import naming_lost_ranks

FIRST_PREFILL = 16  # tokens of the smallest captured prompt
MAX_PREFILL = 2048  # and of the largest: longer ones keep the GPU busy anyway
MAX_CHOICES = 8  # graphs kept with a cache for ways to choose a token: temperatures and the like

captured_decodes: Counter[str] = Counter()  # how often each kind of step was set up: "fused" or "modules"


def reaches_all_rows(attention_mask: torch.Tensor | None, input_ids: torch.Tensor, cache) -> bool:
    """Whether a mask has a column for every row held after `input_ids`, so that each new token adds one behind them.

    Prompts are given whole, with a mask as wide, or only what the cache does not hold yet.
    """
    width = input_ids.shape[1]
    if attention_mask is None or attention_mask.shape[-1] == width:
        return True
    return attention_mask.shape[-1] >= int(cache.get_seq_length()) + width


def can_capture(model: nn.Module, input_ids, generation_config, model_kwargs: dict, synced_gpus: bool) -> bool:
    """Whether `generate()` takes this loop by itself: one CUDA device, a latent cache, nothing recorded.

    `disable_compile=True` asks for the library's loop.
    """
    cache: Any = model_kwargs.get(CACHE)
    mask = model_kwargs.get("attention_mask")
    return (
        may_capture(model, cache, generation_config)
        and (cache.is_compileable or is_plain(model))
        and (mask is None or mask.ndim == 2)
        and len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1
        and model.config._attn_implementation != "eager"
        and model.model.rotary_emb.rope_type not in ("dynamic", "longrope")
        and generation_config.compile_config is None
        and not generation_config.is_assistant
        and not generation_config.output_attentions
        and not generation_config.output_hidden_states
        and not synced_gpus
        and reaches_all_rows(mask, input_ids, cache)
    )


@torch.no_grad()
@naming_lost_ranks()
def captured_decode(
    model: nn.Module,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus: bool = False,
    streamer=None,
    lag: int = 3,
    **model_kwargs,
):
    """Greedy decoding or sampling as the library's own loop does it, without waiting for the device.

    Args:
        model: an `MLRAForCausalLM`; the cache in `model_kwargs` is an `MLRACache`.
        input_ids: `[B, T]` prompt.
        logits_processor, stopping_criteria, generation_config, streamer: as prepared by `generate()`.
        lag: tokens decoded before a stop flag is looked at.

    Returns:
        `[B, T + new]` token ids, or a `GenerateDecoderOnlyOutput`.

    Raises:
        ValueError: without a latent cache, or without a length limit.
    """
    cache = model_kwargs.get(CACHE)
    if not isinstance(cache, MLRACache):
        raise ValueError("captured decoding needs the latent cache: leave cache_implementation out, or pass 'static'")
    if stopping_criteria.max_length is None:
        raise ValueError("captured decoding needs a length limit: pass max_new_tokens or max_length")
    with on_device(input_ids.device):
        return CapturedLoop(
            model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        ).decode(LaggedFlags(lag, streamer))


class CapturedLoop:
    """One call of `captured_decode`, whose arguments it takes."""

    step: DecodingStep
    buffers: Buffers
    choose: Callable[[int], None]  # decodes and appends a token to sequences of the given length

    def __init__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
        self.model, self.input_ids, self.kwargs = model, input_ids, model_kwargs
        self.config, self.max_length = generation_config, stopping_criteria.max_length
        self.batch, self.length = input_ids.shape
        self.record = generation_config.return_dict_in_generate
        choice = None
        if not (self.record and (generation_config.output_scores or generation_config.output_logits)):
            vocab_size, device = model.config.vocab_size, input_ids.device
            choice = choice_of_logits_alone(logits_processor, stopping_criteria, vocab_size, device)
        self.selection = Selection(generation_config, logits_processor, stopping_criteria, choice)
        self.cache: MLRACache = model_kwargs[CACHE]
        mask = model_kwargs.get("attention_mask")
        self.mask = None if mask is None or mask.all() else mask
        self.rows = self.prompt_rows()
        self.needed = self.rows + self.max_length - self.length
        self.fingerprint = fingerprint(model)
        self.spare = self.reserve_rows()

    def prompt_rows(self) -> int:
        """Cached rows behind the prompt."""
        embeddings = self.kwargs.get("inputs_embeds")
        if embeddings is None:
            return self.length
        return int(self.cache.get_seq_length()) + embeddings.shape[1]

    def reserve_rows(self) -> bool:
        """Make room for the call in a growing cache; whether that is one from those that wait."""
        if self.cache.is_compileable:
            if (most := self.cache.get_max_length()) < self.needed - 1:
                raise ValueError(f"the cache holds {most} tokens, the call may need {self.needed - 1}")
            return False
        capacity = size_class(min(self.needed, self.rows + GROWTH), FIRST_CAPACITY)
        if not self.cache.made_for_call or self.record:
            self.cache.reserve(capacity)
            return False
        self.cache = take_spare(self.model, self.fingerprint, self.batch, capacity)
        self.kwargs[CACHE] = self.cache
        return True

    def positions(self) -> torch.Tensor:
        """RoPE positions of the first tokens to come, `[B]`."""
        position_ids = self.kwargs.get("position_ids")
        if position_ids is None:
            return torch.full((self.batch,), self.rows, device=self.input_ids.device)
        return (position_ids[:, -1] + 1).expand(self.batch)

    def prefill(self) -> torch.Tensor:
        """Logits behind the prompt, `[B, vocab_size]`."""
        captured = self.captured_prefill()
        if captured is None:
            return self.model._prefill(self.input_ids, self.config, self.kwargs).logits[:, -1]
        logits = captured(self.input_ids)
        self.cache.set_seq_length(self.rows)
        return logits

    def prefill_key(self) -> tuple | None:
        """Of the graph of such a prompt; None if it cannot have one."""
        width = size_class(self.length, FIRST_PREFILL)
        takes = self.spare and self.mask is None and self.batch * width <= MAX_PREFILL and width <= self.capacity()
        if not takes or self.kwargs.get("inputs_embeds") is not None or self.config.prefill_chunk_size is not None:
            return None
        return "prefill", width

    def capacity(self) -> int:
        return self.cache.layers[0].rows.shape[2]

    def captured_prefill(self) -> CapturedPrefill | None:
        if not self.cache.layers[0].is_initialized or (key := self.prefill_key()) is None:
            return None
        return held_with(self.cache, self.fingerprint).objects.get(key)

    def set_up(self, former: tuple[DecodingStep, Buffers] | None = None) -> None:
        """Make or find the step and its buffers for the cache as it is, and put them where the call stands."""
        masked = self.mask is not None
        held = held_with(self.cache, self.fingerprint)
        kept = held.objects.get(("step", masked))
        if kept is None:
            with ordinary_tensors():
                step = DecodingStep(self.model, self.cache, self.batch, masked)
                width = step.capacity + 1 if step.is_fused else self.length + max(self.max_length - self.length, 1)
                kept = step, Buffers(self.batch, max(width, self.length + 1), self.input_ids.device)
            if step.is_fused:
                held.objects["step", masked] = kept
        self.step, self.buffers = kept
        captured_decodes["fused" if self.step.is_fused else "modules"] += 1
        if former is None:
            self.step.start(self.rows, self.positions(), self.mask)
            self.buffers.start(self.input_ids)
        else:
            old_step, old_buffers = former
            mask = None if old_step.masks is None else old_step.masks.key_mask[:, : self.rows]
            self.step.start(self.rows, old_step.positions(), mask)
            self.buffers.follow(old_buffers)
        self.choose = self.strategy(held)

    def strategy(self, held) -> Callable[[int], None]:
        """The captured step and choice: one that is kept, if there is one for such a choice."""
        choice = self.selection.choice
        if not self.step.is_fused or choice is None:
            return self.selection.strategy(self.step, self.buffers, choice and choice.ends)
        key = (*self.selection.key, self.mask is not None)
        if key not in held.objects:
            others = [other for other in held.objects if other[0] == key[0]]
            if len(others) == MAX_CHOICES:
                del held.objects[others[0]]
            with ordinary_tensors():
                ends = choice.ends.clone()
            held.objects[key] = ends, self.selection.strategy(self.step, self.buffers, ends, held.replays)
        ends, choose = held.objects[key]
        ends.copy_(choice.ends)
        return choose

    def grow(self) -> None:
        """More rows, when those reserved are full."""
        self.cache.set_seq_length(self.rows)
        former = self.step, self.buffers
        self.cache.reserve(size_class(min(self.needed, self.rows + max(self.rows // 2, GROWTH)), FIRST_CAPACITY))
        self.set_up(former)

    def decode(self, flags: LaggedFlags):
        """Decode until every sequence has ended."""
        device = self.input_ids.device
        logits = self.prefill()
        self.set_up()
        self.selection.select(logits, self.buffers, self.length)
        first, length = self.rows, self.length
        while True:
            length += 1
            flags.add(self.buffers.unfinished, self.buffers.token_ids, random_state(device))
            if flags.read(drain=length >= self.max_length) or length >= self.max_length:
                break
            self.rows = first + length - self.length
            if self.rows > self.step.capacity and not self.cache.is_compileable:
                self.rows -= 1
                self.grow()
            self.choose(length)

        if flags.num_after_stop:
            length -= flags.num_after_stop
            restore_random_state(device, flags.undo_state)
        self.cache.set_seq_length(first + length - self.length - 1)
        if flags.streamer is not None:
            flags.streamer.end()
        return self.result(length)

    def result(self, length: int):
        """What the library's loop returns, of sequences of `length` tokens."""
        sequences = self.buffers.sequences[:, :length].clone()
        if self.spare:
            self.keep()
        if not self.record:
            return sequences
        num_new = length - self.length
        scores, raw_logits = self.selection.scores, self.selection.raw_logits
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if scores is None else tuple(scores[:num_new]),
            logits=None if raw_logits is None else tuple(raw_logits[:num_new]),
            **{CACHE: self.cache},
        )

    def keep(self) -> None:
        """Let the cache wait for the next call, with a graph for prompts like this one."""
        held = held_with(self.cache, self.fingerprint)
        key = self.prefill_key()
        if self.step.is_fused and key is not None and key not in held.objects:
            with ordinary_tensors():
                prefill = CapturedPrefill(self.model, self.cache, self.batch, key[1], held.replays)
            prefill(self.input_ids)
            prefill.replay.prepare()
            held.objects[key] = prefill
        give_back(self.model, self.cache)


__all__ = ["CapturedLoop", "can_capture", "captured_decode", "captured_decodes", "reaches_all_rows"]
