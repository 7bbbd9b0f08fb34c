"""Decode attention on one GPU: the latent kernel beside FlashAttention-3, FlashMLA and a GQA share (paper, figure 5).

    python -m scripts.bench_decode --output evals/results
    python -m scripts.bench_decode --only pages

Every kernel is checked against a float32 reference first and is not timed if it fails. Times are medians over replays
of a CUDA graph that holds many calls on rotating inputs larger together than the L2 cache. "share" is the fewest bytes
the step must read (the cache once) per second, over the read rate measured in the same run.

FlashAttention-3 is taken from `flash_attn_interface` and FlashMLA from `flash_mla`; --libraries (or the environment
variable MLRA_BENCH_LIBRARIES, separated by ":") names operator libraries `_vllm_fa3_C*.so` and `_flashmla_C*.so`.

The part "pages" times the same rows in one piece and in shuffled pages of 64, 128 and 16 rows, as in serving; "fp8"
times rows of latents in eight bits behind those in 16, and with the kernel that other GPUs run.
"""

import argparse
import datetime
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts import cli
from scripts.cli import UserError


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_decode", __doc__)
    parser.add_argument("--output", type=Path, help="folder for decode_results.json and decode_latency.png")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("figure", "shapes", "throughput", "pages", "fp8"),
        help="parts to run; default all",
    )
    parser.add_argument("--libraries", nargs="*", help="operator libraries to load for the peers")
    args = parser.parse_args(argv)
    return cli.run("scripts.bench_decode:benchmark", args, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch

from modeling_mlra.decode_arguments_mlra import DecodeInputs
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.decode_plans_mlra import decode_plans
from modeling_mlra.decode_reference_mlra import reference_latent_attention
from modeling_mlra.decode_triton_mlra import triton_latent_attention
from modeling_mlra.device_mlra import device_facts
from modeling_mlra.rows_mlra import RowFormat

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
try:
    import flash_attn_interface
except ImportError:
    flash_attn_interface = None
try:
    import flash_mla
except ImportError:
    flash_mla = None

RATIO_LIMIT = 5e-3  # RMS of the difference to the float32 reference over RMS of the reference, bfloat16
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
        return RowFormat(self.latents * self.width, self.rope, torch.bfloat16, scales)

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

    def __init__(self, case: Case, seed: int = 0):
        batch, longest = len(case.lengths), max(case.lengths)
        copies = max(1, min(16, math.ceil(4 * L2_BYTES / case.bytes)))
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

        self.case = case
        self.scaling = (128 + (0 if case.kind == "gqa" else case.rope)) ** -0.5
        self.kv_end = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
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
        rows = torch.empty(batch, size, case.row_format.width, dtype=torch.uint8, device="cuda")
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


def ratio(result: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite where the result is not finite."""
    result = result.float().view_as(reference)
    if not torch.isfinite(result).all():
        return math.inf
    return ((result - reference).norm() / reference.norm()).item()


def time_calls(calls: list[Callable], replays: int = 15) -> float:
    """Median microseconds of one call, from replays of a CUDA graph that holds a few milliseconds of calls in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = _elapsed(lambda: [call() for call in calls])
    repeats = max(1, min(math.ceil(4000 / once), 256 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    samples = [_elapsed(graph.replay) for _ in range(replays)]
    return statistics.median(samples) / (len(calls) * repeats)


def _elapsed(run: Callable) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


# Each maker returns one callable per input set, giving [B, T, heads, width], or raises with the reason it cannot run.


def ours(inputs: Inputs, **options) -> list[Callable]:
    """As the fused step calls it: the cached rows are there before the kernel in front has ended."""

    def call(i):
        *arguments, scales = inputs.latent(i)
        settings = {"kv_end": inputs.kv_end, "scaling": inputs.scaling, "scales": scales, "settled": True} | options
        return lambda: latent_attention(*arguments, implementation="triton", **settings)

    return [call(i) for i in range(len(inputs.rows))]


def portable(inputs: Inputs) -> list[Callable]:
    """`ours` by the kernel that other GPUs run."""
    case, (batch, size, _) = inputs.case, inputs.rows[0].shape
    facts = device_facts(inputs.kv_end.device)
    rows, itemsize = case.queries * case.heads, case.row_format.dtype.itemsize
    scaled = case.row_format.scales > 0
    sizes = rows, case.latents, 1, case.width, case.rope, itemsize, batch * size
    plan = decode_plans(*sizes, hopper=False, facts=facts, scaled=scaled)[0]

    def call(i):
        *arguments, scales = inputs.latent(i)
        given = DecodeInputs(*arguments, inputs.kv_end, None, None, None, 0, inputs.scaling, True, scales)
        return lambda: triton_latent_attention(given, plan)

    return [call(i) for i in range(len(inputs.rows))]


def paged(inputs: Inputs, page_size: int) -> list[Callable]:
    """`ours` on the same rows in shuffled pages of one pool."""
    case, kv_end = inputs.case, inputs.kv_end
    batch, size, elements = inputs.rows[0].shape
    blocks = math.ceil(size / page_size)
    order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0)).cuda()
    table = order.view(batch, blocks).int()
    row_format = RowFormat(case.latents * case.width, case.rope, inputs.rows[0].dtype)

    def call(i):
        rows = torch.nn.functional.pad(inputs.rows[i], (0, 0, 0, blocks * page_size - size), value=math.nan)
        pool = torch.empty_like(rows).view(-1, page_size, elements)
        pool[order] = rows.view(-1, page_size, elements)
        latents, k_rope, _ = row_format.views(pool.view(-1, elements), case.latents)
        arguments = *inputs.latent(i)[:2], latents, k_rope
        pages = {"block_table": table, "page_size": page_size}
        options = {"kv_end": kv_end, "scaling": inputs.scaling, "implementation": "triton", "settled": True} | pages
        return lambda: latent_attention(*arguments, **options)

    return [call(i) for i in range(len(inputs.rows))]


def _fa3(q, k, v, kv_end, scaling, causal):
    if flash_attn_interface is not None:
        return flash_attn_interface.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=kv_end, softmax_scale=scaling, causal=causal
        )
    # vLLM's build of the same kernels: queries and lengths are always given as for variable lengths
    batch, length = q.shape[:2]
    none = [None] * 3
    return torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, None, None, None, None, None, None, kv_end, length, k.shape[1], None, None, None,
        *none, *none, scaling, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
    )[0]  # fmt: skip


def flash_attention_3(inputs: Inputs) -> list[Callable]:
    """The stock 192/128 form on one latent's rows, or 128/128 on a GQA share's."""
    case, width = inputs.case, inputs.case.width
    if flash_attn_interface is None and not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        raise RuntimeError("neither flash_attn_interface nor a _vllm_fa3_C library is here")
    if case.kind != "gqa" and (case.latents, width) != (1, 128):
        raise RuntimeError("the stock build has no form for this shape")

    def call(i):
        rows = inputs.rows[i].unsqueeze(2)
        k, v = (rows[..., :width], rows[..., width:]) if case.kind == "gqa" else (rows, rows[..., :width])
        return lambda: _fa3(inputs.queries[i], k, v, inputs.kv_end, inputs.scaling, case.queries > 1)

    return [call(i) for i in range(len(inputs.rows))]


def flash_mla_decode(inputs: Inputs) -> list[Callable]:
    """FlashMLA on the MLA cache (512 + 64) in pages of 64 rows, scheduler metadata made once, as a model would."""
    case = inputs.case
    if flash_mla is None and not hasattr(torch.ops._flashmla_C, "dense_decode_fwd"):
        raise RuntimeError("neither flash_mla nor a _flashmla_C library is here")
    batch, size, elements = inputs.rows[0].shape
    blocks = size // 64
    table = torch.arange(batch * blocks, dtype=torch.int32, device="cuda").view(batch, blocks)
    state: list = [None, None]
    if flash_mla is not None:
        state = list(flash_mla.get_mla_metadata(inputs.kv_end, case.queries * case.heads, 1))

    def call(i):
        cache = inputs.rows[i].view(-1, 64, 1, elements)

        def run():
            if flash_mla is not None:
                return flash_mla.flash_mla_with_kvcache(
                    inputs.queries[i], cache, table, inputs.kv_end, 512, *state, inputs.scaling, case.queries > 1
                )[0]
            result, _, state[0], state[1] = torch.ops._flashmla_C.dense_decode_fwd(
                inputs.queries[i], cache, 512, inputs.kv_end, table, inputs.scaling, case.queries > 1, *state, None
            )
            return result

        return run

    return [call(i) for i in range(len(inputs.rows))]


KERNELS: dict[str, dict[str, Callable]] = {
    "latent": {"ours": ours, "flash_attention_3": flash_attention_3},
    "pages": {"ours": ours} | {f"ours, pages of {n}": functools.partial(paged, page_size=n) for n in (64, 128, 16)},
    "fp8": {"ours": ours, "portable": portable},
    "mla": {"flash_mla": flash_mla_decode},
    "gqa": {"flash_attention_3": flash_attention_3},
}


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


def read_ceiling() -> float:
    """GB/s of the best of a few plain kernels that read 4 GB and write next to nothing."""
    values = torch.randn(2**30, device="cuda")
    result = torch.empty(2**14, device="cuda")
    best = math.inf
    for block in (2048, 4096, 8192):
        for per_sm in (4, 8):
            grid = (torch.cuda.get_device_properties(0).multi_processor_count * per_sm,)
            call = lambda grid=grid, block=block: _read_kernel[grid](values, result, 2**30, block, num_warps=8)  # noqa: E731
            best = min(best, time_calls([call], replays=7))
    return values.numel() * 4 / best / 1e3


if triton is not None:

    @triton.jit
    def _read_kernel(values, result, count, BLOCK: tl.constexpr):
        top = tl.zeros([BLOCK], tl.float32)
        for i in tl.range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK, num_stages=4):
            top = tl.maximum(top, tl.load(values + i + tl.arange(0, BLOCK)))
        tl.store(result + tl.program_id(0), tl.max(top, 0))


def measure(case: Case, ceiling: float) -> list[dict]:
    """One row per kernel: checked against float32, then timed; the reason stands where one cannot run."""
    inputs = Inputs(case)
    reference = inputs.reference(0)
    rows = []
    for name, maker in KERNELS[case.kind].items():
        row = {
            "case": case.name,
            "kernel": name,
            **{k: v for k, v in asdict(case).items() if k not in ("name", "lengths")},
        }
        row |= {"batch": len(case.lengths), "longest": max(case.lengths), "bytes": case.bytes}
        try:
            calls = maker(inputs)
            row["ratio"] = ratio(calls[0](), reference)
            if row["ratio"] >= RATIO_LIMIT:
                row["failed"] = f"float32 check: ratio {row['ratio']:.1e}"
            else:
                micros = time_calls(calls)
                row |= {
                    "us": micros,
                    "share": case.bytes / micros / 1e3 / ceiling,
                    "tflops": case.flops / micros / 1e6,
                }
        except (RuntimeError, NotImplementedError, TypeError) as error:
            row["failed"] = str(error).split("\n")[0][:200]
        rows.append(row)
        if case.kind == "pages" and "us" in row and "us" in rows[0]:
            row["of_one_piece"] = row["us"] / rows[0]["us"]
    return rows


def show(row: dict) -> None:
    if "failed" in row:
        print(f"{row['case']:32} {row['kernel']:18} not timed: {row['failed']}", flush=True)
        return
    target = f"   target {row['target']:.2f}" if row["target"] and row["kernel"] == "ours" else ""
    if "of_one_piece" in row:
        target += f"   {row['of_one_piece']:.3f} of the time in one piece"
    print(
        f"{row['case']:32} {row['kernel']:18} {row['us']:9.2f} us   {row['share']:6.1%} of the read ceiling   "
        f"{row['tflops']:5.0f} TFLOP/s   ratio {row['ratio']:.1e}{target}",
        flush=True,
    )


def plot(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for kind, kernel in sorted({(row["kind"], row["kernel"]) for row in rows if "us" in row}):
        points = [r for r in rows if (r["kind"], r["kernel"]) == (kind, kernel) and "us" in r]
        axes.plot([r["longest"] for r in points], [r["us"] for r in points], marker="o", label=f"{kind}, {kernel}")
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="microseconds", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def load_libraries(paths: list[str] | None = None) -> None:
    """Load operator libraries of the peers; without paths, those of the environment variable."""
    from_environment = [x for x in os.environ.get("MLRA_BENCH_LIBRARIES", "").split(":") if x]
    for library in from_environment if paths is None else paths:
        if not Path(library).is_file():
            raise UserError(f"no operator library at {library}")
        torch.ops.load_library(str(Path(library).resolve()))


def benchmark(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU, and torch sees none")
    if triton is None:
        raise UserError("this benchmark needs triton: pip install triton")
    load_libraries(args.libraries)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    parts = {"figure": figure_cases, "shapes": shape_cases, "throughput": throughput_cases}
    parts |= {"pages": page_cases, "fp8": fp8_cases}
    ceiling = read_ceiling()
    print(f"{torch.cuda.get_device_name()}: read ceiling {ceiling:.0f} GB/s", flush=True)
    results: dict[str, list[dict]] = {}
    for part in args.only or parts:
        results[part] = []
        for case in parts[part]():
            rows = measure(case, ceiling)
            results[part] += rows
            for row in rows:
                show(row)
            torch.cuda.empty_cache()
        if args.output is not None:
            environment = {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "triton": triton.__version__,
                "date": datetime.date.today().isoformat(),
                "command": "python -m scripts.bench_decode " + " ".join(sys.argv[1:]),
                "read_ceiling_gb_s": ceiling,
            }
            path = args.output / "decode_results.json"
            path.write_text(json.dumps({"environment": environment, **results}, indent=1) + "\n")
    if args.output is not None and "figure" in results:
        plot(
            results["figure"],
            args.output / "decode_latency.png",
            f"One device's share, batch 1, {torch.cuda.get_device_name()}",
        )
