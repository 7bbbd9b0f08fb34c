"""How the arguments of the decode kernels are grouped; the legend is in `decode_mlra`."""

import functools
import operator
from typing import Any, NamedTuple

import torch


class DecodeInputs(NamedTuple):
    """A call, as `latent_attention` describes it."""

    q_latent: torch.Tensor
    q_rope: torch.Tensor
    latents: torch.Tensor
    k_rope: torch.Tensor
    kv_end: torch.Tensor
    kv_start: torch.Tensor | None
    key_mask: torch.Tensor | None
    block_table: torch.Tensor | None
    page_size: int
    scaling: float
    settled: bool = False
    scales: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Allocated rows of a sequence."""
        return self.latents.shape[1] if self.block_table is None else self.block_table.shape[1] * self.page_size

    def layout(self) -> tuple:
        """What decides how the call runs: calls of one layout differ in contents, scaling and addresses alone."""
        q_latent, q_rope, latents, k_rope = self[:4]
        others = [None if x is None else (x.dtype, x.shape, x.stride()) for x in (*self[4:8], self.scales)]
        return (
            self.page_size, self.settled, q_latent.device, q_latent.dtype, latents.dtype, k_rope.dtype,
            q_latent.shape, q_latent.stride(), q_rope.shape, q_rope.stride(),
            latents.shape, latents.stride(), k_rope.shape, k_rope.stride(), *others,
        )  # fmt: skip

    def on_16_bytes(self) -> bool:
        """Whether all addresses are multiples of 16."""
        addresses = [x.data_ptr() for x in (*self[:8], self.scales) if x is not None]
        return not functools.reduce(operator.or_, addresses) % 16


class Strides(NamedTuple):
    """Of sequences, query positions, latents (of rotary queries: groups) and heads."""

    b: Any
    t: Any
    l: Any  # noqa: E741
    h: Any


class DecodeQueries(NamedTuple):
    """[B, T, L, H, R] and [B, T, G, H, E]."""

    latent: Any
    rope: Any
    strides: Any
    rope_strides: Any


class Cached(NamedTuple):
    """Latents [B, S, L, R] and rotary keys [B, S, E], or pools of rows and the table of pages that says where; of
    latents in eight bits, which come as bytes, the scales [B, S, L]."""

    latents: Any
    k_rope: Any
    c_b: Any
    c_s: Any
    c_l: Any
    k_b: Any
    k_s: Any
    table: Any
    table_b: Any
    scales: Any
    s_b: Any
    s_s: Any


class Pages(NamedTuple):
    """Table [B, pages] that says in which page of a pool each row lies, and its stride of sequences; or nothing."""

    table: Any = None
    b: Any = None


class Visible(NamedTuple):
    """Which cached rows each sequence sees."""

    kv_end: Any
    kv_start: Any
    key_mask: Any
    mask_b: Any


class Results(NamedTuple):
    """Whole results [B, T, L, H, R], and partial ones with their log2-sum-exps."""

    out: Any
    strides: Any
    part: Any
    lse: Any


class DecodeShape(NamedTuple):
    """As in the legend; and what of the calls is decided when the kernel is compiled. SCALED: latents are in eight
    bits."""

    L: Any
    GROUPS: Any
    H: Any
    R: Any
    E: Any
    HAS_MASK: Any
    PAGE: Any
    CAUSAL: Any
    SCALED: Any


class DecodeTile(NamedTuple):
    """NL latents and BM query rows to a program, BN cached rows at a time; R and E padded to powers of two."""

    NL: Any
    BM: Any
    BN: Any
    RP: Any
    EP: Any


class Deal(NamedTuple):
    """How the work is dealt out: rows of a unit, least units of a share, sequences padded to a power of two, whether
    sequences have a first visible row, and whether the counts need 64 bits."""

    UNIT: Any
    MIN_UNITS: Any
    BLOCK_B: Any
    HAS_START: Any
    BIG: Any


class Reduction(NamedTuple):
    """L latents of H heads and width R; BD columns of ROWS query rows, SPLITS partial results at once."""

    L: Any
    H: Any
    R: Any
    ROWS: Any
    BD: Any
    SPLITS: Any


class Segment(NamedTuple):
    """Cached rows lo <= j < hi of a sequence; query row m sees those in front of `limit[m]`."""

    b: Any
    lo: Any
    hi: Any
    limit: Any


class QueryRows(NamedTuple):
    """Position and head of each query row, and whether there is such a row."""

    t: Any
    h: Any
    known: Any


class HopperTile(NamedTuple):
    """NL latents and BM query rows to a program, BN cached rows at a time in STAGES buffers, of which AHEAD are filled
    before the queries are there; OVERLAP: a warpgroup also multiplies during its own softmax. Of latents in eight bits
    WIDE tiles at a time are there in 16. HELD: queries are multiplied out of registers."""

    NL: Any
    BM: Any
    BN: Any
    STAGES: Any
    AHEAD: Any
    OVERLAP: Any
    WIDE: Any = 0
    HELD: Any = False


class Place(NamedTuple):
    """What a program is: B sequences of T positions, at most P shares, of which it has share p, of the latents from
    `latent` and the query rows from `row0` on; S allocated rows of a sequence; `whole` sequences go to the results."""

    B: Any
    T: Any
    P: Any
    S: Any
    whole: Any
    p: Any
    latent: Any
    row0: Any


class Share(NamedTuple):
    """A program's units of work, `first` <= unit < `stop`, from sequence b on; of all sequences the first rows, ends,
    units and running sums of units."""

    starts: Any
    ends: Any
    units: Any
    cum: Any
    b: Any
    first: Any
    stop: Any


class Stretch(NamedTuple):
    """What a share holds of one sequence: the unit after it, whether the sequence starts and ends in it, and its rows
    lo <= j < hi of a sequence that ends at `end`."""

    stop: Any
    from_start: Any
    to_end: Any
    lo: Any
    hi: Any
    end: Any


class Buffers(NamedTuple):
    """Shared memory of queries, rotary queries, latents and rotary keys; which are full, which free to be filled. Of
    latents in eight bits these too, with their scales, and which have been widened to `c`."""

    q: Any
    qr: Any
    c: Any
    k: Any
    full: Any
    empty: Any
    q_full: Any
    c8: Any = None
    scales: Any = None
    widened: Any = None


class OwnQueries(NamedTuple):
    """Of a warpgroup: rotary queries and, where they are held in registers, those of the latent."""

    rope: Any
    latent: Any = None


class Merge(NamedTuple):
    """Where one warpgroup leaves its sums, maxima and weight sums for the other."""

    data: Any
    stats: Any
    full: Any
    empty: Any


class Sums(NamedTuple):
    """Weighted sums of the rows of one latent or two, log2 maxima of the scores, and sums of the weights."""

    acc0: Any
    acc1: Any
    m: Any
    norm: Any


class SegmentTiles(NamedTuple):
    """`count` tiles of the `Stretch` `of` a sequence; the first is the program's tile `g`."""

    g: Any
    count: Any
    of: Any
    limit: Any
    mask_row: Any
    T: Any
    scale_log2: Any
