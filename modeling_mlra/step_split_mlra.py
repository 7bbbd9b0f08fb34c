"""Maps of the attention that all ranks hold whole, split among them for a step of few tokens.

Ranks that keep branches of one head group hold all of `q_b_proj` and `o_proj` (`tensor_parallel_mlra`). Each may
instead multiply by its share of their rows, at the price of one exchange more per map:

    query   whole: q = c_q W_qb                      split: q = join over ranks of c_q W_qb[rows of the rank]
    out     whole: x = sum over ranks of z_r W_o     split: x = join over ranks of (sum over ranks of z_r) W_o[rows]

The second is the same number: sum_r (z_r W_o) = (sum_r z_r) W_o. A join takes the place of the sum behind `out`.
"""

from typing import NamedTuple

from .tensor_parallel_mlra import tensor_parallel_layout


class Split(NamedTuple):
    """Which of the two maps are split."""

    query: bool = False
    out: bool = False


# By number of ranks; chosen with `torchrun -m scripts.bench_tp --parts projections`
SPLITS: dict[int, Split] = {}


def split_of(config, ranks: int) -> Split:
    """What ranks that exchange through peer memory split, if each keeps branches of all heads and rows divide."""
    layout = tensor_parallel_layout(config, ranks)
    if layout is None or layout.branches != ranks:
        return Split()
    rows = config.num_attention_heads * config.qk_head_dim, config.hidden_size
    wanted = SPLITS.get(ranks, Split())
    return Split(*(asked and number % ranks == 0 for asked, number in zip(wanted, rows, strict=True)))
