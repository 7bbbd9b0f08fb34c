"""The layers of a decoding step over pages, between embedding and last norm; nothing here is vLLM's.

What is in front of the layers and behind them is the server's: its embedding, its vocabulary, its choice of tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from modeling_mlra.rows_mlra import RowFormat
from modeling_mlra.step_mlra import FusedStep


class PagedTokens(NamedTuple):
    """One new token of each of M sequences, and where their rows lie in a pool of pages.

    Attributes:
        positions: `[M]`, integers, their RoPE positions.
        slots: int64 `[M]`, the pool's row that each goes to; what is below 0 goes to row 0.
        kv_end: int32 `[M]`, rows in use, the new one included; 0 where there is no sequence.
        block_table, page_size: as in `latent_attention`.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    kv_end: torch.Tensor
    block_table: torch.Tensor
    page_size: int


class PagedStep(FusedStep):
    """The kernels of a step's layers, bound to a model and to buffers for M tokens of as many sequences.

    Args:
        model: an `MLRAForCausalLM` that has no `obstacle`, of which its layers and its rotary embedding are used, with
            this rank's weights. It is not kept alive by its step.
        row_format: of the pools.
        num_sequences: M.
        ranks: how many ranks share the layers.
        sum_over_ranks: gives the sum of all ranks' tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        row_format: RowFormat,
        num_sequences: int,
        ranks: int = 1,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.kv_start = self.key_mask = None
        self.residual_share, self.sum_over_ranks = 1 / ranks, sum_over_ranks
        self.bind(model, row_format, model.model.rotary_emb.inv_freq.device, num_sequences)

    def __call__(  # type: ignore[override]
        self, hidden: torch.Tensor, pools: Sequence[torch.Tensor], tokens: PagedTokens
    ) -> torch.Tensor:
        """Hidden states `[M, d]` behind the layers; appends the tokens' rows to the pools.

        Args:
            hidden: `[M, d]`, the embeddings; overwritten.
            pools: each layer's rows `[rows, width]`.
        """
        self.hidden, self.tokens = hidden, tokens
        self.counters, self.slots = tokens.positions, tokens.slots
        self.block_table, self.page_size = tokens.block_table, tokens.page_size
        self.run_layers(pools)
        return self.hidden

    @property
    def kv_end(self) -> torch.Tensor:
        return self.tokens.kv_end

    def sum_hidden(self) -> None:
        if self.sum_over_ranks is not None:
            self.hidden = self.sum_over_ranks(self.hidden)
