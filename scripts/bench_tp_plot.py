"""The figure and the tables of `scripts.bench_tp`: time of a token against context, a panel for each batch.

    python -m scripts.bench_tp_plot evals/results/tp_h200_x4.json

Writes the figure beside the file, and prints the tables of docs/tensor_parallel.md. Of every system the best kernel
and number of GPUs counts; the floor is the bytes that a rank of the first one must read, at the GPU's read rate.
"""

import argparse
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, read_json

NAMES = {"mlra_4": "MLRA-4", "mlra_2": "MLRA-2", "mla": "MLA", "gqa": "GQA"}
STYLES = (
    ("C0", "o", "-"),
    ("C1", "s", "-"),
    ("C2", "^", "-"),
    ("C3", "D", "--"),
    ("C4", "v", "--"),
    ("C5", "P", ":"),
    ("C6", "X", ":"),
)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_tp_plot", __doc__)
    parser.add_argument("results", type=Path, help="JSON file of scripts.bench_tp")
    args = parser.parse_args(argv)
    return cli.run("scripts.bench_tp_plot:show", args)


if __name__ == "__main__":
    sys.exit(main())

from evals.figures import CAN_DRAW, save_figure, subplots


def show(args: argparse.Namespace) -> None:
    results = read_json(args.results)
    if not results.get("decode"):
        raise UserError(f"{args.results} holds no decode times")
    for batch in batches(results):
        print(f"{batch} sequences, ms a token\n\n{table(results, batch, token)}\n")
    print(f"One sequence, attention of a layer, us\n\n{table(results, '1', attention)}\n")
    print(f"Share of exchange\n\n{table(results, '1', share)}\n")
    print(f"Cache, GiB a GPU\n\n{table(results, '1', cache)}\n")
    if results.get("projections"):
        print(f"Projections\n\n{projections(results)}\n")
    if CAN_DRAW:
        print(draw(results, args.results))


def label(name: str) -> str:
    base, _, ranks = name.partition("_dcp")
    return NAMES.get(base, base) + (f", DCP{ranks}" if ranks else "")


def cells(results: dict, name: str, batch: str) -> dict[int, dict]:
    """Of each context the fastest cell over numbers of GPUs, or one that says why there is none."""
    found: dict[int, dict] = {}
    for size, by_batch in results["decode"][name].items():
        for context, cell in by_batch.get(batch, {}).items():
            cell = cell | {"size": int(size), "weight_bytes": by_batch["weight_bytes"]}
            best = found.get(int(context), {})
            if cell.get("token_us", float("inf")) <= best.get("token_us", float("inf")):
                found[int(context)] = cell
    return found


def batches(results: dict) -> list[str]:
    every = {batch for sizes in results["decode"].values() for cell in sizes.values() for batch in cell}
    return sorted((batch for batch in every if batch.isdigit()), key=int)


def token(cell: dict) -> str:
    return f"{cell['token_us'] / 1e3:.2f}" if "token_us" in cell else "–"


def attention(cell: dict) -> str:
    times = [t["attend_us_per_layer"] for t in cell.get("kernels", {}).values() if "attend_us_per_layer" in t]
    return f"{min(times):.1f}" if times else "–"


def share(cell: dict) -> str:
    return f"{cell['exchange_share']:.0%}" if "exchange_share" in cell else "–"


def cache(cell: dict) -> str:
    return f"{cell['cache_bytes_allocated'] / 2**30:.2f}" if "cache_bytes_allocated" in cell else "–"


def contexts(results: dict) -> list[int]:
    return sorted({c for name in results["decode"] for batch in batches(results) for c in cells(results, name, batch)})


def table(results: dict, batch: str, shown) -> str:
    columns = contexts(results)
    lines = ["| | " + " | ".join(f"{c // 1024}K" for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in results["decode"]:
        found = cells(results, name, batch)
        row = [shown(found[c]) if c in found else "–" for c in columns]
        lines.append(f"| {label(name)} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def projections(results: dict) -> str:
    lines = ["| | form | both maps of a layer, us | a token, ms |", "|---|---|---|---|"]
    for name, by_size in results["projections"].items():
        for size, by_batch in by_size.items():
            for batch, forms in by_batch.items():
                for form, times in forms.items():
                    if form != "context":
                        where = f"{label(name)}, {size} GPUs, {batch} sequences"
                        timed = f"{times['maps_us_per_layer']:.1f} | {times['token_us'] / 1e3:.3f}"
                        lines.append(f"| {where} | {form} | {timed} |")
    return "\n".join(lines)


def floors(results: dict, name: str, batch: str) -> dict[int, float]:
    """Milliseconds that a rank takes to read its weights and its cached rows once."""
    rate = results["runs"][-1]["read_ceiling_GB_s"]
    if not rate:
        return {}
    found = cells(results, name, batch)
    read = {c: cell["weight_bytes"] + cell["cache_bytes_read"] for c, cell in found.items() if "token_us" in cell}
    return {c: number / rate / 1e6 for c, number in read.items()}


def draw(results: dict, output: Path) -> Path:
    """A panel for each number of sequences, one line per system."""
    shown = batches(results)
    figure, panels = subplots(1, len(shown), figsize=(3.9 * len(shown) + 1.2, 4.0), squeeze=False)
    for panel, batch in zip(panels[0], shown, strict=True):
        for (color, marker, line), name in zip(STYLES, results["decode"], strict=False):
            times = {
                c: cell["token_us"] / 1e3 for c, cell in cells(results, name, batch).items() if "token_us" in cell
            }
            style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.4, "markersize": 5}
            panel.plot([c / 1024 for c in times], list(times.values()), label=label(name), **style)
        first = next(iter(results["decode"]))
        floor = floors(results, first, batch)
        panel.plot(
            [c / 1024 for c in floor], list(floor.values()), "k-", linewidth=0.8, label=f"floor of {label(first)}"
        )
        ticks = [c / 1024 for c in contexts(results)]
        panel.set(
            xscale="log", yscale="log", title=f"{batch} sequence{'s' * (batch != '1')}", xlabel="context, K tokens"
        )
        panel.set_xticks(ticks, [f"{k:g}" for k in ticks])
        panel.minorticks_off()
        low, high = panel.get_ylim()
        steps = [step for step in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= step <= high]
        panel.set_yticks(steps, [f"{step:g}" for step in steps])
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("milliseconds a token of each sequence")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    last = results["runs"][-1]
    figure.suptitle(f"{last['processes']} x {last['gpu']}, {last['dtype']}, {last['date'][:10]}", fontsize=9)
    return save_figure(figure, output)
