"""Triton kernels that sum vectors of all ranks, or join them, through each other's memory, in one shot.

Every rank sends its part to all others, and adds up what has arrived, in the order of the ranks. A number travels as
one word of 64 bits, its bits and the number of the exchange it belongs to: stores of a word are not torn, so who reads
the right number has the right bits, and no fence or flag is needed.

    place of a word     (slot, block, sender, number in the block), in the memory of each receiver
    exchange e          of a block writes slot e mod 2; every block counts its own

Two slots are enough. A rank sends e + 2 once it has all of e + 1, which the others send when their kernel of e, and so
all it reads, has ended.
"""

from typing import Any, NamedTuple

import torch

from .device_mlra import INTERPRETED, constants, launch, launch_options, tl, triton
from .step_device_mlra import Machine, Vectors

BLOCK = 128  # numbers to a program: a word to a thread
MOST_RANKS = 8
sum_kernel: Any = None
join_kernel: Any = None


class Inboxes(NamedTuple):
    """int64 words `[2, blocks, ranks, BLOCK]` in the memory of each rank; the last again for ranks there are not."""

    of_0: Any
    of_1: Any
    of_2: Any
    of_3: Any
    of_4: Any
    of_5: Any
    of_6: Any
    of_7: Any


class Channels(NamedTuple):
    """What is this rank's of an exchange: its inbox, int32 `[blocks]` exchanges so far, and int32 `[ranks]` in the
    host's memory, 1 for a rank that was waited for in vain."""

    inbox: Any
    counts: Any
    missing: Any


class ExchangeShape(NamedTuple):
    """This rank's number, the number of ranks, the blocks that a slot has room for, nanoseconds to wait for a rank."""

    RANK: Any
    RANKS: Any
    BLOCKS: Any
    BLOCK: Any
    LIMIT: Any


if triton is not None:
    from .step_device_mlra import wait_for_front

    _INTERPRETED = tl.constexpr(INTERPRETED)

    @triton.jit
    def store_words(places, words):
        """Whole words, for other devices to see."""
        if _INTERPRETED:
            tl.store(places, words)
        else:
            tl.inline_asm_elementwise(
                "st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0;", "=r,l,l", [places, words],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip

    @triton.jit
    def _nanoseconds(polls):
        """The time on a clock; interpreted, a poll takes one."""
        if _INTERPRETED:
            return polls
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def _end_of_work():
        """Ends the process's work on the device once the host can see what was stored: nothing computed from sums that
        are not whole is ever read."""
        if not _INTERPRETED:
            tl.inline_asm_elementwise("membar.sys; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            tl.debug_barrier()
            tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def _place(block, sender, count, SHAPE: tl.constexpr):
        slot = count & 1
        return ((slot * SHAPE.BLOCKS + block) * SHAPE.RANKS + sender) * SHAPE.BLOCK + tl.arange(0, SHAPE.BLOCK)

    @triton.jit
    def publish(part, block, count, inboxes, SHAPE: tl.constexpr):
        """Send a block's numbers [BLOCK] to the inboxes of all other ranks; they, as words."""
        bits = part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        words = (count.to(tl.int64) << 32) | bits
        place = _place(block, SHAPE.RANK, count, SHAPE)
        for step in tl.static_range(1, SHAPE.RANKS):  # not all to the same one at a time
            store_words(inboxes[(SHAPE.RANK + step) % SHAPE.RANKS] + place, words)
        return words

    @triton.jit
    def _received(own, block, count, inbox, SHAPE: tl.constexpr):
        """What is there of each rank's words, this one's own among them; and how many are not there yet."""
        words = ()
        late = tl.zeros([SHAPE.BLOCK], tl.int32)
        for sender in tl.static_range(SHAPE.RANKS):
            here = own
            if sender != SHAPE.RANK:
                here = tl.load(inbox + _place(block, sender, count, SHAPE), volatile=True)
            words = words + (here,)  # type: ignore[assignment]
            late += not_of(here, count)
        return words, tl.sum(late, 0)

    @triton.jit
    def not_of(words, count):
        """1 for each word that does not belong to this exchange."""
        return ((words >> 32).to(tl.int32) != count).to(tl.int32)

    @triton.jit
    def await_all(own, block, count, channels, SHAPE: tl.constexpr):
        """The words of ranks 0, 1, ..., once they are all there; the process ends here if a rank has not sent its own
        within LIMIT."""
        words, late = _received(own, block, count, channels.inbox, SHAPE)
        polls = 0
        start = _nanoseconds(polls)
        while late > 0:
            words, late = _received(own, block, count, channels.inbox, SHAPE)
            polls += 1
            if (late > 0) & (_nanoseconds(polls) - start > SHAPE.LIMIT):
                for sender in tl.static_range(SHAPE.RANKS):
                    tl.store(channels.missing + sender, 1, mask=tl.sum(not_of(words[sender], count), 0) > 0)
                _end_of_work()
                late = 0
        return words

    @triton.jit
    def numbers_of(words):
        return words.to(tl.int32).to(tl.float32, bitcast=True)

    @triton.jit
    def exchanged(places, known, inboxes, channels, SHAPE: tl.constexpr, PDL: tl.constexpr):
        """The words of all ranks for a block of numbers, of which this rank's own, at `places`, are sent."""
        block = tl.program_id(0)
        wait_for_front(PDL)
        count = tl.load(channels.counts + block, cache_modifier=".cg") + 1
        part = tl.load(places, mask=known, other=0.0).to(tl.float32)
        words = await_all(publish(part, block, count, inboxes, SHAPE), block, count, channels, SHAPE)
        tl.store(channels.counts + block, count)
        return words

    @triton.jit
    def sum_kernel(parts, out, number, inboxes, channels, SHAPE, PDL: tl.constexpr):
        """out = the sum over ranks 0, 1, ..., in this order and in float32, BLOCK numbers to a program."""
        index = tl.program_id(0) * SHAPE.BLOCK + tl.arange(0, SHAPE.BLOCK)
        words = exchanged(parts + index, index < number, inboxes, channels, SHAPE, PDL)
        total = tl.zeros([SHAPE.BLOCK], tl.float32)
        for sender in tl.static_range(SHAPE.RANKS):
            total += numbers_of(words[sender])
        tl.store(out + index, total.to(out.dtype.element_ty), mask=index < number)

    @triton.jit
    def join_kernel(parts, out, number, width, inboxes, channels, SHAPE, PDL: tl.constexpr):
        """out[m] = [part[m] of rank 0, part[m] of rank 1, ...], parts of `width` numbers."""
        index = tl.program_id(0) * SHAPE.BLOCK + tl.arange(0, SHAPE.BLOCK)
        row, column = index // width, index % width
        words = exchanged(parts.data + row * parts.stride + column, index < number, inboxes, channels, SHAPE, PDL)
        place = row * (SHAPE.RANKS * width) + column
        for sender in tl.static_range(SHAPE.RANKS):
            here = numbers_of(words[sender]).to(out.dtype.element_ty)
            tl.store(out + place + sender * width, here, mask=index < number)


class Exchange:
    """Sums and joins vectors of ranks that see each other's memory, all of which call it in the same order.

    Args:
        rank: this one.
        inboxes: of each rank, int64 zeros `inbox_shape(numbers, ranks)`, in its memory and within reach of this one.
        missing: int32 zeros `[ranks]` in the host's memory, within reach of the device.
        limit: nanoseconds to wait for another rank.
        held: what is to stay as long as the memory is in use.
    """

    def __init__(self, rank: int, inboxes: list[torch.Tensor], missing: torch.Tensor, limit: int, held=None):
        _, blocks, ranks, block = inboxes[rank].shape
        counts = torch.zeros(blocks, dtype=torch.int32, device=inboxes[rank].device)
        self.inboxes = Inboxes(*inboxes, *inboxes[-1:] * (MOST_RANKS - ranks))
        self.channels = Channels(inboxes[rank], counts, missing)
        self.shape = ExchangeShape(rank, ranks, blocks, block, limit)
        self.held = held

    def sum(self, parts: torch.Tensor, out: torch.Tensor, machine: Machine) -> None:
        """out = the sum of all ranks' `parts`, the same bits on each.

        Args:
            parts: `[M, width]`, contiguous, that `holds`.
            out: the same of any dtype.
        """
        self._launch(sum_kernel, machine, parts, out, parts.numel())

    def join(self, parts: torch.Tensor, out: torch.Tensor, machine: Machine) -> None:
        """out `[M, ranks * width]` = the `parts` `[M, width]` of all ranks side by side; own ones may lie in `out`."""
        self._launch(join_kernel, machine, Vectors(parts, parts.stride(0)), out, parts.numel(), parts.shape[1])

    def holds(self, parts: torch.Tensor) -> bool:
        """Whether there is room for so many numbers."""
        return parts.numel() <= self.shape.BLOCKS * self.shape.BLOCK

    def _launch(self, kernel, machine: Machine, parts, out: torch.Tensor, number: int, *arguments) -> None:
        launch(
            out.device, kernel, (triton.cdiv(number, self.shape.BLOCK),),
            parts, out, number, *arguments, self.inboxes, self.channels,
            SHAPE=constants(self.shape), PDL=machine.early, num_warps=4, **launch_options(machine.early),
        )  # fmt: skip

    def missing(self) -> list[int]:
        """Ranks that were waited for in vain."""
        return self.channels.missing.nonzero().flatten().tolist()


def inbox_shape(numbers: int, ranks: int) -> tuple[int, int, int, int]:
    """Of an inbox for sums of up to so many numbers."""
    return 2, triton.cdiv(numbers, BLOCK), ranks, BLOCK
