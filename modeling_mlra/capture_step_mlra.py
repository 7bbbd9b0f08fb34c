"""A model's forwards as functions of fixed buffers, which a graph can hold: of new tokens, and of a prompt."""

import weakref
from typing import Any

import torch
from torch import nn

from .cache_mlra import MLRACache
from .capture_mlra import Replay
from .masks_mlra import MaskBuffers
from .step_mlra import FusedStep, obstacle


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


__all__ = ["Buffers", "CapturedPrefill", "DecodingStep", "runs_fused"]
