"""The decoding loop for a static latent cache: a captured step, and a host that never waits for the device.

The library's loop reads a flag from the device at every token and prepares each call in Python, which at this model's
size takes longer than the step itself. This one replays a CUDA graph, keeps inputs in fixed buffers and looks at the
stop flag a few tokens later; whatever was decoded past the end is undone, random state included, so that tokens,
cache and following calls are those of the library's loop. It has the signature of a `custom_generate` function.
"""

from collections import Counter, deque
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_mlra import MLRACache
from .fused_mlra import FusedStep, obstacle
from .library_mlra import CACHE

# Processors and criteria known to read nothing but the logits, or the last token: their choice can be captured.
OF_LOGITS_ALONE = (
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
OF_LAST_TOKEN_ALONE = (EosTokenCriteria, MaxLengthCriteria)

captured_decodes: Counter[str] = Counter()  # how often each kind of step was set up: "fused" or "modules"


def can_capture(model: nn.Module, generation_config, model_kwargs: dict, synced_gpus: bool) -> bool:
    """Whether `generate()` takes this loop by itself: one CUDA device, a static latent cache, nothing recorded."""
    cache = model_kwargs.get(CACHE)
    return (
        model.device.type == "cuda"
        and isinstance(cache, MLRACache)
        and cache.is_compileable
        and not cache.offloading
        and len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1
        and model.config._attn_implementation != "eager"
        and model.model.rotary_emb.rope_type not in ("dynamic", "longrope")
        and not generation_config.disable_compile
        and generation_config.compile_config is None
        and not generation_config.is_assistant
        and not generation_config.output_attentions
        and not generation_config.output_hidden_states
        and not synced_gpus
    )


def choice_of_logits_alone(logits_processor, stopping_criteria, vocab_size: int, device: torch.device):
    """What chooses and ends by logits and last tokens alone, in a form that waits for nothing and can be captured.

    Returns:
        The processors as a list of functions of scores `[B, vocab_size]`, and the tokens that end a sequence; None if
        one of them reads the sequence or is not known to. The length limit is the caller's.
    """
    known = (logits_processor, OF_LOGITS_ALONE), (stopping_criteria, OF_LAST_TOKEN_ALONE)
    if not all(type(item) in classes for items, classes in known for item in items):
        return None
    processors: list[Callable] = []
    for processor in logits_processor:
        if isinstance(processor, SuppressTokensLogitsProcessor):  # looks its tokens up anew each time
            blocked = processor(None, torch.zeros(1, vocab_size, device=device)).isneginf()
            processors.append(lambda scores, blocked=blocked: scores.masked_fill(blocked, -torch.inf))
        else:
            processors.append(partial(processor, None))
    ends = [c.eos_token_id.to(device).flatten() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
    return processors, torch.cat([torch.empty(0, dtype=torch.long, device=device), *ends])


def runs_fused(model: nn.Module, num_sequences: int) -> bool:
    """Whether the fused step takes this model and so many sequences."""
    return model.device.type == "cuda" and obstacle(model, num_sequences) is None


class DecodingStep:
    """The model as a function of token ids `[M]` to next-token logits `[M, vocab_size]`: fused, or its modules.

    Args:
        model: an `MLRAForCausalLM`.
        cache: its static cache, holding the prompt.
        positions: int64 `[M]`, RoPE positions of the next tokens.
        attention_mask: `[M, S]` mask of the S rows held, or None.
    """

    def __init__(self, model: nn.Module, cache: MLRACache, positions: torch.Tensor, attention_mask=None):
        rows = int(cache.get_seq_length())
        key_mask = kv_start = None
        if attention_mask is not None and not attention_mask.all():
            missing = cache.get_max_length() - attention_mask.shape[-1]
            key_mask = nn.functional.pad(attention_mask, (0, missing), value=1).bool()
            kv_start = key_mask.int().argmax(dim=-1).to(torch.int32)
        self.key_mask = key_mask
        self.run: Callable[[torch.Tensor], torch.Tensor]
        if runs_fused(model, positions.shape[0]):
            captured_decodes["fused"] += 1
            in_use = torch.full_like(positions, rows + 1)
            counters = torch.cat([in_use[:1] - 1, positions, in_use]).to(torch.int32)
            self.run = FusedStep(model, cache, counters, kv_start, key_mask)
        else:
            captured_decodes["modules"] += 1
            position_ids = positions[:, None].clone()

            def run(token_ids: torch.Tensor) -> torch.Tensor:
                logits = model(
                    token_ids[:, None],
                    attention_mask=key_mask,
                    position_ids=position_ids,
                    cache=cache,
                    use_cache=True,
                ).logits
                position_ids.add_(1)
                return logits[:, -1]

            self.run = run

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.run(token_ids)


class Replay:
    """A function of fixed buffers, as a CUDA graph from its second call on (plain calls elsewhere)."""

    def __init__(self, function: Callable[[], Any], device: torch.device):
        self.function, self.on_device = function, device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None
        self.num_calls = 0

    def __call__(self) -> Any:
        self.num_calls += 1
        if self.num_calls == 1 or not self.on_device:  # compiles kernels, fills libraries' workspaces
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function()
        self.graph.replay()
        return self.result


class LaggedFlags:
    """Stop flags and tokens on their way to the host, read `lag` steps after they were made."""

    def __init__(self, lag: int, streamer=None):
        self.lag, self.streamer = lag, streamer
        self.pending: deque = deque()
        self.num_after_stop: int | None = None

    def add(self, unfinished: torch.Tensor, tokens: torch.Tensor, undo_state) -> None:
        on_device = unfinished.device.type == "cuda"
        event = torch.cuda.Event() if on_device else None
        unfinished = unfinished.to("cpu", copy=True, non_blocking=on_device)
        kept = None if self.streamer is None else tokens.to("cpu", copy=True, non_blocking=on_device)
        self.pending.append((unfinished, kept, event, undo_state))
        if event is not None:
            event.record()

    def read(self, drain: bool = False) -> bool:
        """Read what is old enough (or all); True once a step had finished every sequence."""
        while self.pending and (drain or len(self.pending) > self.lag):
            unfinished, tokens, event, undo_state = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if self.streamer is not None:
                self.streamer.put(tokens)
            if not unfinished.any():
                self.num_after_stop, self.undo_state = len(self.pending), undo_state
                self.pending.clear()
                return True
        return False


def _random_state(device: torch.device):
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0].get_offset()
    return torch.get_rng_state()


def _restore_random_state(device: torch.device, state) -> None:
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].set_offset(state)
    else:
        torch.set_rng_state(state)


@torch.no_grad()
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
        model: an `MLRAForCausalLM`; the cache in `model_kwargs` is a static `MLRACache`.
        input_ids: `[B, T]` prompt.
        logits_processor, stopping_criteria, generation_config, streamer: as prepared by `generate()`.
        lag: tokens decoded before a stop flag is looked at.

    Returns:
        `[B, T + new]` token ids, or a `GenerateDecoderOnlyOutput`.

    Raises:
        ValueError: without a static latent cache, or without a length limit.
    """
    cache = model_kwargs.get(CACHE)
    if not isinstance(cache, MLRACache) or not cache.is_compileable:
        raise ValueError("captured decoding needs a static latent cache: pass cache_implementation='static'")
    max_length = stopping_criteria.max_length
    if max_length is None:
        raise ValueError("captured decoding needs a length limit: pass max_new_tokens or max_length")
    device, (batch, length) = input_ids.device, input_ids.shape
    record = generation_config.return_dict_in_generate
    scores: list | None = [] if record and generation_config.output_scores else None
    raw_logits: list | None = [] if record and generation_config.output_logits else None
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor
    unfinished = torch.ones(batch, dtype=torch.long, device=device)
    sequences = torch.cat([input_ids, input_ids.new_zeros(batch, max(max_length - length, 1))], dim=1)
    flags = LaggedFlags(lag, streamer)

    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    logits = outputs.logits[:, -1]
    del outputs
    prompt_rows = int(cache.get_seq_length())
    position_ids = model_kwargs.get("position_ids")
    if position_ids is None:
        positions = torch.full((batch,), prompt_rows, device=device)
    else:
        positions = (position_ids[:, -1] + 1).expand(batch)
    token_ids = torch.zeros(batch, dtype=torch.long, device=device)
    column = torch.full((batch, 1), length, device=device)  # where the next tokens go
    alone = None  # else the choice of a token is captured with the step
    if scores is None and raw_logits is None:
        alone = choice_of_logits_alone(logits_processor, stopping_criteria, logits.shape[-1], device)

    processors = [lambda scores: logits_processor(sequences[:, :length], scores)] if alone is None else alone[0]

    def process(next_logits: torch.Tensor) -> torch.Tensor:
        return reduce(lambda scores, processor: processor(scores), processors, next_logits)

    def weigh(scores: torch.Tensor) -> torch.Tensor:
        """Of which the next token is the largest."""
        if not generation_config.do_sample:
            return scores
        # torch.multinomial's draw, without its check of the probabilities, which would wait for the device
        probabilities = nn.functional.softmax(scores, dim=-1)
        return probabilities / torch.empty_like(probabilities).exponential_(1)

    def select(logits: torch.Tensor) -> None:
        next_logits = logits.to(copy=True, dtype=torch.float32)
        next_scores = process(next_logits)
        if scores is not None:
            scores.append(next_scores)
        if raw_logits is not None:
            raw_logits.append(next_logits)
        tokens = torch.argmax(weigh(next_scores), dim=-1)
        if has_eos:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        sequences.scatter_(1, column, tokens[:, None])
        column.add_(1)
        if alone is None:
            stopped = stopping_criteria(sequences[:, : length + 1], None)
        else:
            stopped = (tokens[:, None] == alone[1]).any(-1)
        unfinished.mul_(~stopped)
        token_ids.copy_(tokens)

    step = DecodingStep(model, cache, positions, model_kwargs.get("attention_mask"))
    forward = Replay(lambda: step(token_ids), device)
    fused = step.run if isinstance(step.run, FusedStep) else None
    advance: Callable[[], Any]
    if alone is None:
        advance = lambda: select(forward())  # noqa: E731
    elif fused is None:
        advance = Replay(lambda: select(step(token_ids)), device)
    else:
        plain = not processors and not generation_config.do_sample
        scores_of = None if plain else lambda logits: weigh(process(logits.to(copy=True, dtype=torch.float32)))
        choice = unfinished, int(pad) if has_eos else 0, alone[1], sequences, column, scores_of
        advance = Replay(lambda: fused.choose(token_ids, *choice), device)
    select(logits)
    while True:
        length += 1
        flags.add(unfinished, token_ids, _random_state(device))
        if flags.read(drain=length >= max_length) or length >= max_length:
            break
        advance()

    if flags.num_after_stop:
        length -= flags.num_after_stop
        _restore_random_state(device, flags.undo_state)
    cache.set_seq_length(prompt_rows + length - input_ids.shape[1] - 1)
    if streamer is not None:
        streamer.end()
    sequences = sequences[:, :length]
    if not record:
        return sequences
    num_new = length - input_ids.shape[1]
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=None if scores is None else tuple(scores[:num_new]),
        logits=None if raw_logits is None else tuple(raw_logits[:num_new]),
        **{CACHE: cache},
    )
