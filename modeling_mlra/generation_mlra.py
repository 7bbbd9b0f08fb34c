"""The decoding loop for a latent cache on a GPU: a captured step, and a host that never waits for the device.

The library's loop reads a flag from the device at every token and prepares each call in Python, which at this model's
size takes longer than the step itself. This one replays a CUDA graph, keeps inputs in fixed buffers and looks at the
stop flag a few tokens later; whatever was decoded past the end is undone, random state included, so that tokens,
cache and following calls are those of the library's loop. It has the signature of a `custom_generate` function.

A growing cache has rows reserved for the call, and more when they are full. One that the caller neither gave nor asks
for is taken from those that wait with their graphs (`capture_mlra`): a second call of like size captures nothing.
"""

import weakref
from collections import Counter, deque
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

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

from .cache_mlra import MLRACache, ordinary_tensors
from .capture_mlra import (
    FIRST_CAPACITY,
    GROWTH,
    Replay,
    fingerprint,
    give_back,
    held_with,
    is_plain,
    may_capture,
    size_class,
    take_spare,
)
from .device_mlra import on_device
from .library_mlra import CACHE
from .masks_mlra import MaskBuffers
from .step_mlra import FusedStep, obstacle

# Processors and criteria known to read nothing but the logits, or the last token: their choice can be captured.
OF_LOGITS_ALONE = (
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
OF_LAST_TOKEN_ALONE = (EosTokenCriteria, MaxLengthCriteria)

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


class Choice(NamedTuple):
    """What chooses and ends by logits and last tokens alone, in a form that waits for nothing and can be captured.

    Attributes:
        processors: functions of scores `[B, vocab_size]`.
        ends: int64 `[N]`, the tokens that end a sequence, filled up with -1.
        key: what a graph of it depends on.
    """

    processors: list[Callable]
    ends: torch.Tensor
    key: str


def choice_of_logits_alone(
    logits_processor, stopping_criteria, vocab_size: int, device: torch.device
) -> Choice | None:
    """The choice in captured form; None if part of it reads the sequence or is not known. The length limit is the
    caller's."""
    known = (logits_processor, OF_LOGITS_ALONE), (stopping_criteria, OF_LAST_TOKEN_ALONE)
    if not all(type(item) in classes for items, classes in known for item in items):
        return None
    processors: list[Callable] = []
    keys: list = []
    for processor in logits_processor:
        settings = vars(processor).items()
        keys += [type(processor), *((name, v.tolist() if isinstance(v, torch.Tensor) else v) for name, v in settings)]
        if isinstance(processor, SuppressTokensLogitsProcessor):  # looks its tokens up anew each time
            blocked = processor(None, torch.zeros(1, vocab_size, device=device)).isneginf()
            processors.append(lambda scores, blocked=blocked: scores.masked_fill(blocked, -torch.inf))
        else:
            processors.append(partial(processor, None))
    ends = [c.eos_token_id.to(device).flatten() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
    ends = torch.cat([torch.empty(0, dtype=torch.long, device=device), *ends])
    ends = nn.functional.pad(ends, (0, size_class(ends.numel(), 8) - ends.numel()), value=-1)
    return Choice(processors, ends, repr(keys))


def runs_fused(model: nn.Module, num_sequences: int) -> bool:
    """Whether the fused step takes this model and so many sequences."""
    return model.device.type == "cuda" and obstacle(model, num_sequences) is None


class DecodingStep:
    """The model as a function of token ids `[M]` to next-token logits `[M, vocab_size]`: fused, or its modules.

    Args:
        model: an `MLRAForCausalLM`; kept alive by the caller.
        cache: its latent cache with rows reserved for what is to come, holding the prompt; kept alive by the caller.
        num_sequences: M.
        masked: whether some rows may not be attended to.
    """

    def __init__(self, model: nn.Module, cache: MLRACache, num_sequences: int, masked: bool):
        self.is_fused = runs_fused(model, num_sequences)
        rows = cache.layers[0].rows
        self.capacity, device = rows.shape[2], rows.device
        self.masks = MaskBuffers(num_sequences, self.capacity, device) if masked else None
        key_mask, kv_start = (self.masks.key_mask, self.masks.kv_start) if self.masks else (None, None)
        self.run: Any
        if self.is_fused:
            # the row to write, then each sequence's position, then each one's number of rows in use
            self.counters = torch.zeros(1 + 2 * num_sequences, dtype=torch.int32, device=device)
            self.run = FusedStep(model, cache, self.counters, kv_start, key_mask)
            return
        fixed, position_ids = cache.fixed(), torch.zeros(num_sequences, 1, dtype=torch.long, device=device)
        self.fixed, self.position_ids = fixed, position_ids

        def run(token_ids: torch.Tensor) -> torch.Tensor:
            logits = model(
                token_ids[:, None],
                attention_mask=key_mask,
                position_ids=position_ids,
                cache=fixed,
                use_cache=True,
            ).logits
            position_ids.add_(1)
            return logits[:, -1]

        self.run = run

    def start(self, rows: int, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Set what differs from call to call.

        Args:
            rows: rows in use.
            positions: int64 `[M]`, RoPE positions of the next tokens.
            attention_mask: `[M, rows]`, given if and only if the step is masked.
        """
        if attention_mask is not None:
            assert self.masks is not None
            self.masks.set(attention_mask)
        if self.is_fused:
            in_use = torch.full_like(positions, rows + 1)
            self.counters.copy_(torch.cat([in_use[:1] - 1, positions, in_use]))
        else:
            self.fixed.set_seq_length(rows)
            self.position_ids.copy_(positions[:, None])

    def positions(self) -> torch.Tensor:
        """int64 `[M]`, RoPE positions of the next tokens."""
        return self.counters[1:].chunk(2)[0].long() if self.is_fused else self.position_ids[:, 0]

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.run(token_ids)


class Buffers:
    """What a captured step reads and writes beside the cache, for M sequences of up to `width` tokens.

    Attributes:
        token_ids: int64 `[M]`, the newest tokens.
        unfinished: int64 `[M]`, 0 for sequences that have ended.
        sequences: int64 `[M, width]`.
        column: int64 `[M, 1]`, where in `sequences` the next tokens go.
    """

    def __init__(self, num_sequences: int, width: int, device: torch.device):
        self.token_ids = torch.zeros(num_sequences, dtype=torch.long, device=device)
        self.unfinished = torch.ones_like(self.token_ids)
        self.sequences = torch.zeros(num_sequences, width, dtype=torch.long, device=device)
        self.column = torch.zeros_like(self.token_ids)[:, None]

    def start(self, token_ids: torch.Tensor) -> None:
        """Begin behind the tokens `[M, T]`."""
        self.unfinished.fill_(1)
        self.column.fill_(token_ids.shape[1])
        self.sequences[:, : token_ids.shape[1]] = token_ids

    def follow(self, other: "Buffers") -> None:
        """Go on where `other`, no wider than this, stands."""
        for name in ("token_ids", "unfinished", "column"):
            getattr(self, name).copy_(getattr(other, name))
        self.sequences[:, : other.sequences.shape[1]] = other.sequences


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


class Selection:
    """How the next tokens are chosen, appended and counted; inside the graph where `choice` allows it."""

    def __init__(self, generation_config, logits_processor, stopping_criteria, choice: Choice | None):
        self.config, self.choice = generation_config, choice
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        record = generation_config.return_dict_in_generate
        self.scores: list | None = [] if record and generation_config.output_scores else None
        self.raw_logits: list | None = [] if record and generation_config.output_logits else None
        self.pad = int(generation_config._pad_token_tensor) if self.has_eos else 0
        self.key: tuple = ()
        if choice is not None:
            self.key = ("choose", generation_config.do_sample, self.pad, choice.ends.numel(), choice.key)

    def process(self, scores: torch.Tensor, sequences: torch.Tensor | None = None) -> torch.Tensor:
        if self.choice is None:
            return self.logits_processor(sequences, scores)
        return reduce(lambda scores, processor: processor(scores), self.choice.processors, scores)

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Of which the next token is the largest."""
        if not self.config.do_sample:
            return scores
        # torch.multinomial's draw, without its check of the probabilities, which would wait for the device
        probabilities = nn.functional.softmax(scores, dim=-1)
        return probabilities / torch.empty_like(probabilities).exponential_(1)

    def scores_of(self, logits: torch.Tensor) -> torch.Tensor:
        """What the fused step takes the largest of."""
        return self.weigh(self.process(logits.to(copy=True, dtype=torch.float32)))

    def select(self, logits: torch.Tensor, buffers: Buffers, length: int = 0) -> None:
        """Choose tokens from logits `[M, vocab_size]` behind sequences of `length` tokens."""
        next_logits = logits.to(copy=True, dtype=torch.float32)
        next_scores = self.process(next_logits, buffers.sequences[:, :length])
        if self.scores is not None:
            self.scores.append(next_scores)
        if self.raw_logits is not None:
            self.raw_logits.append(next_logits)
        tokens = torch.argmax(self.weigh(next_scores), dim=-1)
        if self.has_eos:
            tokens = tokens * buffers.unfinished + self.pad * (1 - buffers.unfinished)
        buffers.sequences.scatter_(1, buffers.column, tokens[:, None])
        buffers.column.add_(1)
        if self.choice is None:
            stopped = self.stopping_criteria(buffers.sequences[:, : length + 1], None)
        else:
            stopped = (tokens[:, None] == self.choice.ends).any(-1)
        buffers.unfinished.mul_(~stopped)
        buffers.token_ids.copy_(tokens)

    def advance(
        self, step: DecodingStep, buffers: Buffers, ends: torch.Tensor | None, siblings=None
    ) -> Callable[[int], None]:
        """A function of the sequences' length that decodes and chooses their next tokens."""
        device = buffers.token_ids.device
        if self.choice is None:
            forward = Replay(lambda: step(buffers.token_ids), device, siblings)
            return lambda length: self.select(forward(), buffers, length)
        if step.is_fused:
            scores_of = self.scores_of if self.choice.processors or self.config.do_sample else None
            arguments = buffers.token_ids, buffers.unfinished, self.pad, ends, buffers.sequences, buffers.column
            replay = Replay(lambda: step.run.choose(*arguments, scores_of), device, siblings)
        else:
            replay = Replay(lambda: self.select(step(buffers.token_ids), buffers), device, siblings)
        return lambda length: replay()


class CapturedPrefill:
    """The forward of a prompt without padding, as a graph for all prompts of up to `width` tokens.

    The tokens behind the prompt are of no consequence: nothing attends to them, and decoding overwrites their rows.
    """

    def __init__(self, model: nn.Module, cache: MLRACache, num_sequences: int, width: int, siblings):
        owner, fixed = weakref.ref(model), cache.fixed()
        token_ids = torch.zeros(num_sequences, width, dtype=torch.long, device=model.device)
        last = torch.zeros(1, dtype=torch.long, device=model.device)

        def run() -> torch.Tensor:
            fixed.set_seq_length(0)
            model: Any = owner()
            return model(token_ids, cache=fixed, use_cache=True, logits_to_keep=last).logits[:, 0]

        self.token_ids, self.last, self.replay = token_ids, last, Replay(run, model.device, siblings)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[M, vocab_size]` behind the prompt `[M, T]`, T up to `width`, whose rows go to the cache."""
        self.token_ids[:, : token_ids.shape[1]] = token_ids
        self.last.fill_(token_ids.shape[1] - 1)
        return self.replay()


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
        return CapturedCall(
            model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        ).decode(LaggedFlags(lag, streamer))


class CapturedCall:
    """One call of `captured_decode`, whose arguments it takes."""

    step: DecodingStep
    buffers: Buffers
    advance: Callable[[int], None]

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

    def captured_prefill(self) -> "CapturedPrefill | None":
        if not self.cache.layers[0].is_initialized or (key := self.prefill_key()) is None:
            return None
        return held_with(self.cache, self.fingerprint).objects.get(key)

    def set_up(self, former: "tuple[DecodingStep, Buffers] | None" = None) -> None:
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
        self.advance = self.find_advance(held)

    def find_advance(self, held) -> Callable[[int], None]:
        """The captured step and choice: one that is kept, if there is one for such a choice."""
        choice = self.selection.choice
        if not self.step.is_fused or choice is None:
            return self.selection.advance(self.step, self.buffers, choice and choice.ends)
        key = (*self.selection.key, self.mask is not None)
        if key not in held.objects:
            others = [other for other in held.objects if other[0] == key[0]]
            if len(others) == MAX_CHOICES:
                del held.objects[others[0]]
            with ordinary_tensors():
                ends = choice.ends.clone()
            held.objects[key] = ends, self.selection.advance(self.step, self.buffers, ends, held.replays)
        ends, advance = held.objects[key]
        ends.copy_(choice.ends)
        return advance

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
            flags.add(self.buffers.unfinished, self.buffers.token_ids, _random_state(device))
            if flags.read(drain=length >= self.max_length) or length >= self.max_length:
                break
            self.rows = first + length - self.length
            if self.rows > self.step.capacity and not self.cache.is_compileable:
                self.rows -= 1
                self.grow()
            self.advance(length)

        if flags.num_after_stop:
            length -= flags.num_after_stop
            _restore_random_state(device, flags.undo_state)
        self.cache.set_seq_length(first + length - self.length - 1)
        if flags.streamer is not None:
            flags.streamer.end()
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
