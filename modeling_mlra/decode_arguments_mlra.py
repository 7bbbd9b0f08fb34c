"""How the arguments of the decode kernels are grouped; the legend is in `decode_mlra`."""

from typing import Any, NamedTuple


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
    """Latents [B, S, L, R] and rotary keys [B, S, E], or pools of rows and the table of pages that says where."""

    latents: Any
    k_rope: Any
    c_b: Any
    c_s: Any
    c_l: Any
    k_b: Any
    k_s: Any
    table: Any
    table_b: Any


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
    """As in the legend; and what of the calls is decided when the kernel is compiled."""

    L: Any
    GROUPS: Any
    H: Any
    R: Any
    E: Any
    HAS_MASK: Any
    PAGE: Any
    CAUSAL: Any


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
