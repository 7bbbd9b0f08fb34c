"""Triton kernels of a decoding step that read and choose tokens; `step_mlra` has the steps and the legend."""

from typing import Any, NamedTuple

from .device_mlra import tl, triton

embed_kernel: Any = None
choose_kernel: Any = None


class ChoiceTile(NamedTuple):
    """Counters, end tokens and largest scores padded to powers of two; the vocabulary in CHUNKS of BLOCK."""

    COUNTERS: Any
    COUNTERS_P: Any
    ENDS_P: Any
    LARGEST_P: Any
    BLOCK: Any
    CHUNKS: Any


class Ends(NamedTuple):
    """Tokens that end a sequence."""

    tokens: Any
    number: Any


class Draw(NamedTuple):
    """What draws a token instead of taking the most likely one: exponential noise [M, vocab_size], and the `number`
    largest scores [M, number], below whose smallest none is drawn; or nothing of it."""

    noise: Any = None
    largest: Any = None
    number: Any = 0


if triton is not None:
    from .step_device_mlra import wait_for_front

    @triton.jit
    def embed_kernel(
        token_ids, stride, weight, first, rows, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):
        """The embeddings of the tokens, BLOCK numbers to a program; the kernel behind loads its weights meanwhile.

        `weight` holds `rows` rows from token `first` on; other tokens give zeros.
        """
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(token_ids + tl.program_id(0) * stride).to(tl.int64) - first
        kept = tl.where((token >= 0) & (token < rows), WIDTH, 0)  # of this token: all or nothing
        row = tl.load(weight + token * WIDTH + columns, mask=columns < kept, other=0.0)
        tl.store(out + tl.program_id(0) * WIDTH + columns, row.to(out.dtype.element_ty), mask=columns < WIDTH)

    @triton.jit
    def _first_of_the_largest(logits, noise, least, vocab_size, TILE: tl.constexpr):
        """Of the logits, or with exponential `noise` of exp(logit) / noise where that is at least `least`: the largest
        of these is each token as often as its probability says, which are proportional to exp(logit)."""
        index = tl.arange(0, TILE.BLOCK)
        top = tl.full([TILE.BLOCK], float("-inf"), tl.float32)
        at = index
        for i in tl.static_range(TILE.CHUNKS):
            here = i * TILE.BLOCK + index
            score = tl.load(logits + here, mask=here < vocab_size, other=float("-inf")).to(tl.float32)
            if noise is not None:
                drawn = score - tl.log(tl.load(noise + here, mask=here < vocab_size, other=1.0))
                score = tl.where(score < least, float("-inf"), drawn)
            score = tl.where(score != score, float("inf"), score)  # as torch.argmax takes NaN
            at = tl.where(score > top, here, at)
            top = tl.maximum(score, top)
        return tl.min(tl.where(top == tl.max(top, 0), at, vocab_size), 0).to(tl.int64)

    @triton.jit
    def choose_kernel(
        logits, draw, vocab_size, unfinished, pad, ends, token_ids, sequences, column, counters,
        TILE, PDL: tl.constexpr,
    ):  # fmt: skip
        """The first of the most likely tokens of one sequence, or one drawn, or `pad` behind its end; appends it and
        counts."""
        m = tl.program_id(0)
        wait_for_front(PDL)
        noise, least = draw.noise, float("-inf")
        if noise is not None:
            noise += m * vocab_size
        if draw.largest is not None:
            kept = tl.arange(0, TILE.LARGEST_P)
            score = tl.load(draw.largest + m * draw.number + kept, mask=kept < draw.number, other=float("inf"))
            least = tl.min(score.to(tl.float32), 0)
        token = _first_of_the_largest(logits + m * vocab_size, noise, least, vocab_size, TILE)
        going_on = tl.load(unfinished + m)
        token = tl.where(going_on != 0, token, pad)
        end = tl.arange(0, TILE.ENDS_P)
        hit = (tl.load(ends.tokens + end, mask=end < ends.number, other=0) == token) & (end < ends.number)
        tl.store(unfinished + m, tl.where(tl.max(hit.to(tl.int32), 0) != 0, 0, going_on))
        place = tl.load(column + m)
        tl.store(sequences.data + m * sequences.stride + place, token)
        tl.store(column + m, place + 1)
        tl.store(token_ids + m, token)
        if m == 0:
            number = tl.arange(0, TILE.COUNTERS_P)
            count = tl.load(counters + number, mask=number < TILE.COUNTERS, other=0)
            tl.store(counters + number, count + 1, mask=number < TILE.COUNTERS)


def choice_plan(vocab_size: int, num_counters: int, num_ends: int, draw: Draw) -> ChoiceTile:
    power = triton.next_power_of_2
    block = min(16384 if draw.noise is None else 8192, power(vocab_size))  # noise takes registers as well
    ends, largest = power(max(1, num_ends)), power(max(1, draw.number))
    return ChoiceTile(num_counters, power(num_counters), ends, largest, block, triton.cdiv(vocab_size, block))
