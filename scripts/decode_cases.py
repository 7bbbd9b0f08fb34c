"""Shapes of decode attention that `bench_decode` times, and their inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from modeling_mlra.decode_reference_mlra import reference_latent_attention
from modeling_mlra.rows_mlra import RowFormat

DTYPE = torch.bfloat16  # of queries and cached rows
L2_BYTES = 64 * 2**20
CONTEXTS = (131072, 524288, 1048576, 2097152)
THROUGHPUT_CONTEXTS = (1024, 2048, 4096, 8192, 16384)


@dataclass
class Case:
    """One timed shape: `lengths` holds the cached rows of each sequence; `heads` counts query heads per latent.

    `kind` is "latent", "pages" (the same, also in pages), "fp8" (latents in eight bits), "mla" or "gqa".
    """

    name: str
    kind: str
    lengths: list[int] = field(repr=False)
    heads: int
    latents: int = 1
    width: int = 128
    rope: int = 64
    queries: int = 1
    target: float | None = None

    @property
    def row_elements(self) -> int:
        return 2 * self.width if self.kind == "gqa" else self.latents * self.width + self.rope

    @property
    def row_format(self) -> RowFormat:
        scales = self.latents if self.kind == "fp8" else 0
        return RowFormat(self.latents * self.width, self.rope, DTYPE, scales)

    @property
    def bytes(self) -> int:
        """The fewest bytes to read: each cached row once, of bfloat16 but where latents are kept in eight bits."""
        row = self.row_format.nbytes if self.kind == "fp8" else 2 * self.row_elements
        return row * sum(self.lengths)

    @property
    def flops(self) -> int:
        rope = 0 if self.kind == "gqa" else self.rope
        return 2 * sum(self.lengths) * self.queries * self.heads * self.latents * (2 * self.width + rope)


class Inputs:
    """Rotating sets of random bfloat16 queries and caches of one case."""

    def __init__(self, case: Case, seed: int = 0, device: str = "cuda"):
        batch, longest = len(case.lengths), max(case.lengths)
        copies = max(1, min(16, math.ceil(4 * L2_BYTES / case.bytes)))
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, dtype=DTYPE, device=device, generator=generator)

        self.case = case
        self.scaling = (128 + (0 if case.kind == "gqa" else case.rope)) ** -0.5
        self.kv_end = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        size = longest if batch == 1 else math.ceil(longest / 64) * 64
        self.rows = [self.cached(normal, batch, size) for _ in range(copies)]
        for rows in self.rows:
            for b, length in enumerate(case.lengths):  # bytes of 255 are NaN
                rows[b, length:] = {"latent": float("nan"), "pages": float("nan"), "fp8": 255}.get(case.kind, 0)
        self.queries = [
            normal(
                batch, case.queries, case.heads * case.latents, case.width + (0 if case.kind == "gqa" else case.rope)
            )
            for _ in range(copies)
        ]

    def cached(self, normal: Callable, batch: int, size: int) -> torch.Tensor:
        """Random rows `[batch, size, width]`, of which eight bits take more room on the way: some at a time."""
        case = self.case
        if case.kind != "fp8":
            return normal(batch, size, case.row_elements)
        rows = torch.empty(batch, size, case.row_format.width, dtype=torch.uint8, device=self.kv_end.device)
        for part in rows.flatten(0, 1).split(2**18):
            part.copy_(case.row_format.join(normal(len(part), case.row_format.latents), normal(len(part), case.rope)))
        return rows

    def latent(self, i: int):
        """`q_latent, q_rope, latents, k_rope, scales` of set i; all latents form one group."""
        case, rows = self.case, self.rows[i]
        latents, k_rope, scales = case.row_format.views(rows, case.latents)
        queries = self.queries[i].unflatten(2, (case.latents, case.heads))
        return (
            queries[..., : case.width].contiguous(),
            queries[:, :, :1, :, case.width :].contiguous(),
            latents,
            k_rope,
            scales,
        )

    def reference(self, i: int) -> torch.Tensor:
        """float32, one sequence at a time: `[B, T, L * H, width]`."""
        results = []
        for b, length in enumerate(self.case.lengths):
            rows = self.rows[i][b, :length]
            query = self.queries[i][b : b + 1]
            if self.case.kind == "gqa":
                key, value = rows.float().split(self.case.width, dim=-1)
                weights = (query[0].float().flatten(0, 1) @ key.T * self.scaling).softmax(-1)
                results.append((weights @ value).view(1, self.case.queries, -1, self.case.width))
                continue
            q_latent, q_rope, latents, k_rope, scales = (x if x is None else x[b : b + 1] for x in self.latent(i))
            arguments = [q_latent.float(), q_rope.float(), latents[:, :length], k_rope[:, :length]]
            scales = None if scales is None else scales[:, :length]
            z = reference_latent_attention(*arguments, self.kv_end[b : b + 1], scaling=self.scaling, scales=scales)
            results.append(z.flatten(2, 3))
        return torch.cat(results)


def name_length(length: int) -> str:
    return f"{length // 2**20}M" if length % 2**20 == 0 else f"{length // 1024}K"


def figure_cases() -> list[Case]:
    """The paper's figure 5: one device's share at batch 1, 64 query heads."""
    targets = dict(zip(CONTEXTS, (0.70, 0.90, 0.93, 0.96), strict=True))
    cases = []
    for length in CONTEXTS:
        label = name_length(length)
        cases += [
            Case(f"mlra share {label}", "latent", [length], 64, target=targets[length]),
            Case(f"mla {label}", "mla", [length], 64, width=512),
            Case(f"gqa share {label}", "gqa", [length], 8),
        ]
    return cases


def shape_cases() -> list[Case]:
    """The released models' decode on one GPU, batches, ragged batches, and a compute-bound share."""
    ragged = [1024 * (1 + 63 * i // 31) for i in range(32)]
    uniform = [sum(ragged) // 32] * 32
    return [
        Case("mlra_4 2K", "latent", [2048], 24, latents=4),
        Case("mlra_4 128K", "latent", [131072], 24, latents=4, target=0.75),
        Case("mlra_4 1M", "latent", [1048576], 24, latents=4, target=0.90),
        Case("mlra_4 32 x 8K", "latent", [8192] * 32, 24, latents=4, target=0.85),
        Case("mlra_4 ragged 1K-64K", "latent", ragged, 24, latents=4),
        Case("mlra_4 same bytes, uniform", "latent", uniform, 24, latents=4),
        Case("mlra share 128 x 4K", "latent", [4096] * 128, 64),
        Case("mlra share 128 heads 128 x 4K", "latent", [4096] * 128, 128),
    ]


def throughput_cases() -> list[Case]:
    """Attention part of the paper's throughput figure: 128 heads in all, batch 128 over 8 GPUs, one GPU's share."""
    cases = []
    for length in THROUGHPUT_CONTEXTS:
        label = name_length(length)
        cases += [
            Case(f"throughput mlra tp4 {label}", "latent", [length] * 64, 128),
            Case(f"throughput mla dp8 {label}", "mla", [length] * 16, 128, width=512),
            Case(f"throughput gqa tp8 {label}", "gqa", [length] * 128, 16),
        ]
    return cases


def page_cases() -> list[Case]:
    """One rank's share and the released model, alone and in batches, one of them bound by arithmetic."""
    ragged = [1024 * (1 + 63 * i // 31) for i in range(32)]
    shares = [Case(f"mlra share {name_length(length)}", "pages", [length], 64) for length in (2048, 131072, 2097152)]
    released = [(name_length(length), [length]) for length in (2048, 131072, 1048576)]
    released += [("32 x 8K", [8192] * 32), ("ragged 1K-64K", ragged)]
    return [
        *shares,
        *(Case(f"mlra_4 {name}", "pages", lengths, 24, latents=4) for name, lengths in released),
        Case("mlra share 128 heads 128 x 4K", "pages", [4096] * 128, 128),
    ]


def fp8_cases() -> list[Case]:
    """Rows of latents in eight bits, each behind the same case in 16 bits."""
    shapes = {
        "mlra_4 128K": ([131072], 24, 4),
        "mlra_4 1M": ([1048576], 24, 4),
        "mlra_4 16 x 128K": ([131072] * 16, 24, 4),
        "mlra share 128K": ([131072], 64, 1),
        "mlra share 2M": ([2097152], 64, 1),
    }
    return [
        Case(f"{name}{', FP8 rows' if kind == 'fp8' else ''}", kind, lengths, heads, latents=latents)
        for name, (lengths, heads, latents) in shapes.items()
        for kind in ("latent", "fp8")
    ]


PARTS = {
    "figure": figure_cases,
    "shapes": shape_cases,
    "throughput": throughput_cases,
    "pages": page_cases,
    "fp8": fp8_cases,
}
