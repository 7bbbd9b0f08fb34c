"""Decode attention on one GPU: the latent kernel beside FlashAttention-3, FlashMLA and a GQA share (paper, figure 5).

    python -m scripts.bench_decode --output evals/results
    python -m scripts.bench_decode --only pages

Every kernel is checked against a float32 reference first and is not timed if it fails. Times are medians over replays
of a CUDA graph that holds many calls on rotating inputs larger together than the L2 cache. "share" is the fewest bytes
the step must read (the cache once) per second, over the read rate measured in the same run.

FlashAttention-3 is taken from `flash_attn_interface` and FlashMLA from `flash_mla`; --libraries (or the environment
variable MLRA_BENCH_LIBRARIES, separated by ":") names operator libraries `_vllm_fa3_C*.so` and `_flashmla_C*.so`.
MLA's time is that of the fastest: FlashMLA, or FlashAttention-3's form for it (64 + 512). FlashAttention-4 has neither
that form nor shares of a sequence on Hopper GPUs.

The part "pages" times the same rows in one piece and in shuffled pages of 64, 128 and 16 rows, as in serving; "fp8"
times rows of latents in eight bits behind those in 16, and with the kernel that other GPUs run.
"""

import argparse
import datetime
import json
import math
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from scripts import cli
from scripts.cli import UserError

PART_NAMES = "figure", "shapes", "throughput", "pages", "fp8"


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_decode", __doc__)
    parser.add_argument("--output", type=Path, help="folder for decode_results.json and decode_latency.png")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PART_NAMES,
        help="parts to run; default all",
    )
    parser.add_argument("--libraries", nargs="*", help="operator libraries to load for the peers")
    parser.add_argument("--commit", help="what to call the commit where there is no repository")
    args = parser.parse_args(argv)
    return cli.run("scripts.bench_decode:benchmark", args, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch

from evals.common import commit
from scripts.decode_cases import PARTS, Case, Inputs
from scripts.decode_peers import KERNELS
from scripts.flash_operators import load_libraries
from scripts.gpu_times import read_ceiling, time_calls, triton

RATIO_LIMIT = 5e-3  # RMS of the difference to the float32 reference over RMS of the reference, bfloat16


def ratio(result: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite where the result is not finite."""
    result = result.float().view_as(reference)
    if not torch.isfinite(result).all():
        return math.inf
    return ((result - reference).norm() / reference.norm()).item()


def measure(case: Case, ceiling: float, only: Collection[str] | None = None) -> list[dict]:
    """One row per kernel, or those named: checked against float32, then timed; the reason where one cannot run."""
    inputs = Inputs(case)
    reference = inputs.reference(0)
    rows = []
    for name, maker in KERNELS[case.kind].items():
        if only is not None and name not in only:
            continue
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


def compare_with_mla(rows: list[dict]) -> list[str]:
    """Note beside each share of MLRA the fastest kernel on MLA of as many heads, sequences and tokens in the run, and
    how many times longer it takes; what was noted, in words."""
    lines = []
    for row in rows:
        same = [other for other in rows if all(other[k] == row[k] for k in ("heads", "batch", "longest", "queries"))]
        peers = [other for other in same if other["kind"] == "mla" and "us" in other]
        if (row["kind"], row["kernel"], row["latents"]) != ("latent", "ours", 1) or "us" not in row or not peers:
            continue
        fastest = min(peers, key=lambda other: other["us"])
        row |= {"mla_peer": fastest["kernel"], "against_mla": fastest["us"] / row["us"]}
        lines.append(f"{row['case']:32} {row['against_mla']:.2f}x as fast as {fastest['kernel']} on {fastest['case']}")
    return lines


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


def benchmark(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU, and torch sees none")
    if triton is None:
        raise UserError("this benchmark needs triton: pip install triton")
    load_libraries(args.libraries)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    ceiling = read_ceiling()
    print(f"{torch.cuda.get_device_name()}: read ceiling {ceiling:.0f} GB/s", flush=True)
    results: dict[str, list[dict]] = {}
    for part in args.only or PARTS:
        results[part] = []
        for case in PARTS[part]():
            rows = measure(case, ceiling)
            results[part] += rows
            for row in rows:
                show(row)
            torch.cuda.empty_cache()
        for line in compare_with_mla(results[part]):
            print(line, flush=True)
        if args.output is not None:
            environment = {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "triton": triton.__version__,
                "commit": args.commit or commit(),
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
