"""What a captured loop learns late: stop flags and tokens, read a few steps after they were made, and how to undo."""

from collections import deque

import torch


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


def random_state(device: torch.device):
    """Where the device's random numbers stand; on a GPU read without waiting for it."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0].get_offset()
    return torch.get_rng_state()


def restore_random_state(device: torch.device, state) -> None:
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].set_offset(state)
    else:
        torch.set_rng_state(state)


__all__ = ["LaggedFlags", "random_state", "restore_random_state"]
