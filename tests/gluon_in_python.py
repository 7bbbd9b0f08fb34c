"""Runs device functions of the Hopper decode kernel that only count and copy as plain Python, one warp of one thread.

Gluon has no interpreter. A function of a kernel is Python all the same: with stand-ins for the language, on tensors of
torch, `copy_tiles` leaves a list of what it asks the copy engine for.
"""

import types
from types import SimpleNamespace

import torch

from modeling_mlra import decode_copies_mlra


class Pointer:
    """To an element of a flat tensor."""

    def __init__(self, data: torch.Tensor, offset=0):
        self.data, self.offset = data.flatten(), offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)


def load(pointer: Pointer, mask=None, other=0):
    """What lies at `pointer`; as on the device, an element outside of the tensor must be masked."""
    offset = torch.as_tensor(pointer.offset)
    wanted = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    offset, wanted = torch.broadcast_tensors(offset, wanted)
    assert ((offset >= 0) & (offset < len(pointer.data)))[wanted].all(), "reads outside of a tensor"
    return torch.where(wanted, pointer.data[torch.where(wanted, offset, 0)], other)


LANGUAGE = SimpleNamespace(
    load=load,
    arange=lambda start, end, layout: torch.arange(start, end),
    where=lambda condition, x, y: torch.where(torch.as_tensor(condition), x, y),
    minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    sum=lambda x, axis: x.sum(axis),
    associative_scan=lambda x, axis, combine: x.cumsum(axis),
    static_range=range,
    BlockedLayout=lambda *arguments: None,
    int32=torch.int32,
    int64=torch.int64,
)
NUMBER_OF_BYTES = 1  # that a block of a descriptor has, whatever its shape


class Copies:
    """Stands for barriers and the copy engine.

    Attributes:
        asked: (buffer, row, column) of every copy, in order.
    """

    def __init__(self):
        self.asked: list[tuple[str, int, int]] = []
        self.announced = 0
        ring = SimpleNamespace(index=lambda stage: None)
        rings = dict.fromkeys(("full", "empty"), ring)
        self.buffers = SimpleNamespace(
            c=SimpleNamespace(index=lambda place: "latents"), k=SimpleNamespace(index=lambda place: "k_rope"),
            c8=SimpleNamespace(index=lambda place: "latents"), scales=SimpleNamespace(index=lambda place: "scales"),
            q_full=None, **rings,
        )  # fmt: skip
        self.descriptor = SimpleNamespace(block_type=SimpleNamespace(nbytes=NUMBER_OF_BYTES))
        self.barriers = SimpleNamespace(wait=lambda *arguments: None, expect=self._expect)

    def _expect(self, bar, number_of_bytes):
        self.announced += number_of_bytes

    def load(self, descriptor, place, bar, buffer):
        self.announced -= NUMBER_OF_BYTES
        self.asked.append((buffer, *map(int, place)))


def copy_tiles(visible, pages, place, shape, tile, deal, early=False) -> list[tuple[str, int, int]]:
    """What the copying warp of program `place` asks for."""
    copies = Copies()
    stand_ins = {
        "gl": LANGUAGE,
        "mbarrier": copies.barriers,
        "bulk_load": copies.load,
        "program_wait": lambda PDL: None,
    }
    scope = {**vars(decode_copies_mlra), **stand_ins}
    for name in ("_share_start", "share_of", "stretch_of", "_page", "copy_tiles"):
        scope[name] = types.FunctionType(getattr(decode_copies_mlra, name).fn.__code__, scope, name)
    scope["copy_tiles"](*[copies.descriptor] * 3, copies.buffers, visible, pages, place, shape, tile, deal, early)
    assert copies.announced == 0, "a barrier waits for other bytes than come"
    return copies.asked
