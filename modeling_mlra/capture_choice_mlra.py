"""How a captured loop chooses tokens: the library's processors and criteria, inside the graph where they allow it."""

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

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

from .capture_mlra import Replay, size_class
from .capture_step_mlra import Buffers, DecodingStep

# Processors and criteria known to read nothing but the logits, or the last token: their choice can be captured.
OF_LOGITS_ALONE = (
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
OF_LAST_TOKEN_ALONE = (EosTokenCriteria, MaxLengthCriteria)
TOP_PARTS = 64  # that a row is split into to look for its largest numbers


def largest(scores: torch.Tensor, number: int) -> torch.Tensor:
    """The `number` largest of each row of `[M, vocab_size]`, in any order.

    They are found among those of each part of the row, in a few kernels: torch's topk of one long row takes many.
    """
    number, candidates = min(number, scores.shape[-1]), scores
    if scores.shape[-1] >= 2 * TOP_PARTS * number:
        if missing := -scores.shape[-1] % TOP_PARTS:
            candidates = nn.functional.pad(scores, (0, missing), value=-torch.inf)
        candidates = candidates.unflatten(-1, (TOP_PARTS, -1)).topk(number, sorted=False).values.flatten(1)
    return candidates.topk(number, sorted=False).values


def keep_largest(scores: torch.Tensor, number: int, filler: float) -> torch.Tensor:
    """The library's top-k of `[M, vocab_size]`: all below the `number`-th largest of a row become `filler`."""
    return scores.masked_fill(scores < largest(scores, number).amin(dim=-1, keepdim=True), filler)


class Choice(NamedTuple):
    """What chooses and ends by logits and last tokens alone, in a form that waits for nothing and can be captured.

    Attributes:
        processors: functions of scores `[B, vocab_size]`.
        ends: int64 `[N]`, the tokens that end a sequence, filled up with -1.
        key: what a graph of it depends on.
        last_top_k: k, where the last of the processors keeps the k largest scores; else 0.
    """

    processors: list[Callable]
    ends: torch.Tensor
    key: str
    last_top_k: int = 0


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
        elif isinstance(processor, TopKLogitsWarper):
            processors.append(partial(keep_largest, number=processor.top_k, filler=processor.filter_value))
        else:
            processors.append(partial(processor, None))
    ends = [c.eos_token_id.to(device).flatten() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
    ends = torch.cat([torch.empty(0, dtype=torch.long, device=device), *ends])
    ends = nn.functional.pad(ends, (0, size_class(ends.numel(), 8) - ends.numel()), value=-1)
    last_top_k = 0
    for processor in logits_processor[-1:]:
        if isinstance(processor, TopKLogitsWarper) and processor.filter_value == -torch.inf:
            last_top_k = processor.top_k
    return Choice(processors, ends, repr(keys), last_top_k)


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

    def scores_of(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the fused step chooses by, and the largest, of which alone it draws (None: of all): the last top-k."""
        assert self.choice is not None
        top_k = self.choice.last_top_k if self.config.do_sample else 0
        processors = self.choice.processors[:-1] if top_k else self.choice.processors
        if processors:
            logits = reduce(lambda x, processor: processor(x), processors, logits.to(copy=True, dtype=torch.float32))
        return logits, largest(logits, top_k) if top_k else None

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

    def strategy(
        self, step: DecodingStep, buffers: Buffers, ends: torch.Tensor | None, siblings=None
    ) -> Callable[[int], None]:
        """A function of the sequences' length that decodes and chooses their next tokens.

        Behind the graph, where the choice is not known to be capturable; else within it, by the fused step's own
        kernel if there is one.
        """
        device = buffers.token_ids.device
        if self.choice is None:
            forward = Replay(lambda: step(buffers.token_ids), device, siblings)
            return lambda length: self.select(forward(), buffers, length)
        if step.is_fused:
            scores_of = self.scores_of if self.choice.processors else None
            arguments = buffers.token_ids, buffers.unfinished, self.pad, ends, buffers.sequences, buffers.column
            replay = Replay(lambda: step.run.choose(*arguments, scores_of, self.config.do_sample), device, siblings)
        else:
            replay = Replay(lambda: self.select(step(buffers.token_ids), buffers), device, siblings)
        return lambda length: replay()


__all__ = ["Choice", "Selection", "choice_of_logits_alone"]
