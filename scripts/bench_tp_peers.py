"""Kernels that MLA is served with elsewhere, as the attention of this package's step; every other kernel stays.

FlashAttention-3 takes one latent as values and the rotary key as keys (`qv`), FlashMLA rows of both in pages of 64.
Both come from operator libraries or packages as `scripts.bench_decode` finds them.
"""

import torch

from modeling_mlra.step_mlra import FusedStep

PAGE = 64  # rows of FlashMLA's pages
LATENT = 512  # FlashMLA's width of a latent, beside a rotary key of 64


def deal_3(shape: torch.Size, heads: int, width: int, value_width: int, kv_end: torch.Tensor) -> torch.Tensor:
    """What FlashAttention-3's programs are dealt, for keys `[B, S, heads, width]`: the same for all layers of a step,
    in front of which servers have it computed."""
    batch, capacity, key_heads, _ = shape
    return torch.ops._vllm_fa3_C.get_scheduler_metadata(
        batch, 1, capacity, heads, key_heads, width, value_width, torch.bfloat16, kv_end,
        None, None, None, None, None, None, 0, False, -1, -1, False, 0, None, 0,
    )  # fmt: skip


def attend_3(query, key, value, query_of_values, kv_end, scaling: float, dealt: torch.Tensor | None):
    """Results `[B, H, value width]` and natural log-sum-exps `[B, H]` for one query position of each sequence.

    Args:
        query: `[B, H, width]`; `query_of_values` `[B, H, value width]` or None, to be multiplied with the values.
        key, value: `[B, S, key heads, ...]`.
    """
    second = None if query_of_values is None else query_of_values[:, None]
    none = [None] * 3
    z, lse = torch.ops._vllm_fa3_C.fwd(
        query[:, None], key, value, None, None, second, None, None, None, None, None, kv_end,
        1, key.shape[1], None, None, None, *none, *none, scaling, False, -1, -1, 0.0, True, dealt, 0, None, 0, None,
        1, 0, None,
    )[:2]  # fmt: skip
    return z[:, 0], lse[:, :, 0]


class FlashAttention3:
    """MLA's attention: results `[B, H, R]` and natural log-sum-exps `[B, H]` over rows `[B, S, R + E]`."""

    def __init__(self, queries: torch.Tensor, rows: torch.Tensor, kv_end: torch.Tensor, scaling: float):
        _, self.heads, self.width = queries.shape
        self.shape, self.kv_end, self.scaling = rows[:, :, None].shape, kv_end, scaling
        self.dealt: torch.Tensor | None = None
        self.deal()

    @staticmethod
    def missing() -> str | None:
        return None if hasattr(torch.ops._vllm_fa3_C, "fwd") else "no _vllm_fa3_C library is here"

    def deal(self) -> None:
        self.dealt = deal_3(self.shape, self.heads, self.shape[3] - self.width, self.width, self.kv_end)

    def __call__(self, latent: torch.Tensor, rope: torch.Tensor, rows: torch.Tensor):
        c, k_rope = rows[:, :, None, : self.width], rows[:, :, None, self.width :]
        return attend_3(rope, k_rope, c, latent, self.kv_end, self.scaling, self.dealt)


class FlashAttention3InTurn(FlashAttention3):
    """The same, with the work dealt out anew in every layer."""

    def deal(self) -> None:
        self.dealt = None


class FlashMLA:
    """The same by FlashMLA. Its schedule is made by the first call, for the lengths of that time."""

    def __init__(self, queries: torch.Tensor, rows: torch.Tensor, kv_end: torch.Tensor, scaling: float):
        batch, capacity, _ = rows.shape
        pages = capacity // PAGE
        self.table = torch.arange(batch * pages, dtype=torch.int32, device=rows.device).view(batch, pages)
        self.kv_end, self.scaling, self.schedule = kv_end, scaling, (None, None)

    @staticmethod
    def missing() -> str | None:
        return None if hasattr(torch.ops._flashmla_C, "dense_decode_fwd") else "no _flashmla_C library is here"

    def deal(self) -> None:
        pass

    def __call__(self, latent: torch.Tensor, rope: torch.Tensor, rows: torch.Tensor):
        query = torch.cat([latent, rope], -1)[:, None]
        z, lse, *self.schedule = torch.ops._flashmla_C.dense_decode_fwd(
            query, rows.view(-1, PAGE, 1, rows.shape[2]), LATENT, self.kv_end, self.table, self.scaling, False,
            *self.schedule, None,
        )  # fmt: skip
        return z[:, 0], lse[:, :, 0]


DEALT, IN_TURN = "FlashAttention-3", "FlashAttention-3, dealt in every layer"
MLA_KERNELS: dict[str, type[FlashAttention3] | type[FlashMLA]] = {
    DEALT: FlashAttention3,
    IN_TURN: FlashAttention3InTurn,
    "FlashMLA": FlashMLA,
}


class PeerStep(FusedStep):
    """A step of MLA, one token a sequence, whose attention is a kernel of `MLA_KERNELS`."""

    def __init__(self, model, cache, counters: torch.Tensor, kernel: str):
        super().__init__(model, cache, counters)
        scaling = model.model.layers[0].self_attn.scaling
        self.kernel = MLA_KERNELS[kernel](self.per_head()[0], cache.layers[0].rows[:, 0], self.kv_end, scaling)

    def per_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Absorbed and rotary queries `[B, H, R]` and `[B, H, E]`."""
        shape = self.num_tokens, self.heads_per_latent, -1
        return self.queries.latent.view(shape), self.queries.rope.view(shape)

    def run_layers(self, rows) -> None:
        self.kernel.deal()
        super().run_layers(rows)

    def attend(self, layer, rows: torch.Tensor) -> torch.Tensor:
        z, _ = self.kernel(*self.per_head(), rows[:, 0])
        return z[:, None, None]
