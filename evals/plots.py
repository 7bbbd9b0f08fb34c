"""Plots of the results: cache per device, and perplexity beside the paper's.

python -m evals.plots --cache evals/results/cache_tables.json      # writes cache_tables.png beside it
python -m evals.plots --perplexity results.json [more.json …]      # writes results.png beside the first
"""

import argparse
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, read_json


def check(args: argparse.Namespace) -> None:
    if args.cache is None and not args.perplexity:
        raise UserError("nothing to plot: give --cache or --perplexity")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.plots", __doc__)
    parser.add_argument("--cache", type=Path, metavar="FILE.json", help="results of evals.cache_tables")
    parser.add_argument("--perplexity", type=Path, nargs="+", metavar="FILE.json", help="results of evals.perplexity")
    return cli.run("evals.plots:evaluate", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

from evals.common import PUBLISHED
from evals.figures import CAN_DRAW, save_figure, subplots

CONTEXTS = [2**power for power in range(15, 22)]  # tokens, 32K to 2M
CONTEXT_DEVICES = "4"
PAPER_ROWS = ("MLRA-4", "MLA", "GQA")


def read_results(path: Path) -> dict:
    """A results file of another evaluation.

    Raises:
        UserError: when it is missing or something else.
    """
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"{path} is no results file of these evaluations: {error}") from error
    if not isinstance(content.get("results"), dict):
        raise UserError(f"{path} is no results file of these evaluations")
    return content


def plot_cache(path: Path) -> Path:
    """Cache against devices and against context, from the results of evals.cache_tables."""
    content = read_results(path)
    if "sizes" not in content:
        raise UserError(f"{path} is no results file of evals.cache_tables")
    sizes, results = content["sizes"], content["results"]
    figure, (by_devices, by_context) = subplots(1, 2, figsize=(10, 4))
    lines = distinct({name: [share["numbers"] for share in row.values()] for name, row in results.items()})
    for index, (label, numbers) in enumerate(lines.items()):
        devices = list(next(iter(results.values())))
        widths = [number / sizes["head_width"] for number in numbers]
        style = {"color": f"C{index}", "marker": "os^Dvp"[index % 6], "label": label}
        by_devices.plot(devices, widths, **style)
        bytes_per_token = numbers[devices.index(CONTEXT_DEVICES)] * sizes["bytes_per_number"] * sizes["layers"]
        by_context.plot(CONTEXTS, [context * bytes_per_token / 2**30 for context in CONTEXTS], **style)
    by_devices.set(xlabel="devices", ylabel="head widths per token, layer and device", yscale="log")
    by_devices.set_yticks([1.5, 2.5, 4.5, 8, 16], ["1.5", "2.5", "4.5", "8", "16"])
    by_devices.minorticks_off()
    by_devices.set_title("Cache against devices")
    by_context.set(xlabel="context, tokens", ylabel="GiB per device", xscale="log", yscale="log")
    by_context.set_xticks(CONTEXTS, [f"{c // 2**20}M" if c >= 2**20 else f"{c // 2**10}K" for c in CONTEXTS])
    by_context.minorticks_off()
    by_context.set_title(f"Cache against context, {sizes['layers']} layers, bfloat16, {CONTEXT_DEVICES} devices")
    for axes in (by_devices, by_context):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return save_figure(figure, path)


def distinct(lines: dict[str, list]) -> dict[str, list]:
    """The lines without repetition: equal ones share a label."""
    merged: dict[tuple, list[str]] = {}
    for name, values in lines.items():
        merged.setdefault(tuple(values), []).append(name)
    return {", ".join(names): list(values) for values, names in merged.items()}


def plot_perplexity(paths: list[Path]) -> Path:
    """Bars of perplexity by corpus, one group of bars per corpus, the paper's models behind the measured ones."""
    bars: dict[str, dict[str, float]] = {}
    for path in paths:
        content = read_results(path)
        try:
            values = {corpus: entry["perplexity"] for corpus, entry in content["results"].items()}
            bars[content["settings"]["model"]] = values
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no results file of evals.perplexity") from error
    corpora = list(dict.fromkeys(corpus for values in bars.values() for corpus in values))
    table = PUBLISHED["perplexity"]
    for row in PAPER_ROWS:
        known = dict(zip(table["columns"], table["rows"][row], strict=True))
        if set(known) & set(corpora):
            bars[f"paper, {row}"] = known
    figure, axes = subplots(figsize=(max(5, 0.45 * len(corpora) * len(bars) + 1), 4))
    width = 0.8 / len(bars)
    for index, (label, values) in enumerate(bars.items()):
        places = [(place, corpus) for place, corpus in enumerate(corpora) if corpus in values]
        drawn = axes.bar(
            [place - 0.4 + width * (index + 0.5) for place, _ in places],
            [values[corpus] for _, corpus in places],
            width,
            label=label,
            alpha=0.5 if label.startswith("paper") else 1.0,
        )
        axes.bar_label(drawn, fmt="{:.4g}", fontsize="x-small", padding=2)
    highest = max(value for values in bars.values() for value in values.values())
    axes.set(ylabel="perplexity", yscale="log" if highest > 100 else "linear")
    axes.set_xticks(range(len(corpora)), corpora)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(y=0.1)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    return save_figure(figure, paths[0])


def evaluate(args: argparse.Namespace) -> None:
    if not CAN_DRAW:
        raise UserError("matplotlib is not installed: pip install 'mlra[eval]'")
    if args.cache is not None:
        print(plot_cache(args.cache))
    if args.perplexity:
        print(plot_perplexity(args.perplexity))
