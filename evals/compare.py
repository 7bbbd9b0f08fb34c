"""What a comparison of architectures says: differences of held-out loss from one of them, with intervals.

    python -m evals.compare evals/results/compare.json [--control mla]    # writes compare_intervals.json, .md and .png

RESULTS is the output of scripts.compare_architectures. The analysis, fixed before the runs it is for:

Model. Held-out loss in nats per token = architecture + seed + error, by least squares; a seed is a block, because it
sets the order of the data for all architectures. The F tests of both factors are those of each after the other.
Intervals. Differences from the control with simultaneous 95 % intervals (Dunnett): +- c s sqrt(v), where s is the
residual deviation and c the 95 % point of the largest |t| of all differences, drawn from their joint distribution. An
architecture is called better or worse only if its interval leaves zero out. No other pair is tested.
Text. The same differences on documents drawn with replacement (2,000 times): the middle 95 % says what another text of
this kind would change, for the runs at hand, one architecture at a time.
Checkpoints. The same differences of the mean over the last five evaluations, for chance at the very end of a run.
More runs. The seeds of every architecture at which the half-width would be --half-width, with the deviation found.
"""

import argparse
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, positive_float


def check(args: argparse.Namespace) -> None:
    if not args.results.is_file():
        raise UserError(f"no results file {args.results}: scripts.compare_architectures writes it")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.compare", __doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="output of scripts.compare_architectures")
    parser.add_argument("--control", default="mla", metavar="NAME", help="what the others are compared with")
    parser.add_argument("--corpus", metavar="NAME", help="held-out text (default: the first)")
    parser.add_argument(
        "--half-width", type=positive_float, default=0.006, metavar="NATS", help="of the interval asked"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: RESULTS_intervals.json")
    return cli.run("evals.compare:evaluate", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

import numpy as np

from evals.common import PUBLISHED, commit, markdown_table, publish_table, write_json
from evals.figures import CAN_DRAW, save_figure, subplots
from evals.intervals import LEVEL, MOST_SEEDS, adjusted_p, critical_value, fit, largest_t, resampled, seeds_needed
from evals.plots import read_results

LAST = 5  # evaluations


def paper_difference(name: str, control: str) -> float | None:
    """The paper's difference of mean log-perplexity, if it has both."""
    rows = PUBLISHED["perplexity"]["rows"]

    def plain(text: str) -> str:
        return text.lower().replace("-", "_").replace(" ", "_").replace("(", "").replace(")", "")

    found = {plain(row): np.mean(np.log(values)) for row, values in rows.items()}
    if name not in found or control not in found:
        return None
    return float(found[name] - found[control])


def read_runs(path: Path, corpus: str | None) -> tuple[dict, dict[tuple[str, int], dict], str]:
    """Settings and runs of a results file, and the corpus to use.

    Raises:
        UserError: for anything else, or a corpus that is not there.
    """
    content = read_results(path)
    runs = {}
    for key, entry in content["results"].items():
        name, _, seed = key.rpartition("_seed")
        if not name or not seed.isdigit() or not entry.get("documents"):
            raise UserError(
                f"{path}: {key} is no run with losses by document: scripts.compare_architectures writes it"
            )
        runs[name, int(seed)] = entry
    if not runs:
        raise UserError(f"{path} has no runs")
    corpora = next(iter(runs.values()))["documents"]
    corpus = corpus or next(iter(corpora))
    if corpus not in corpora:
        raise UserError(f"--corpus {corpus}: the held-out texts are {', '.join(corpora)}")
    return content["settings"], runs, corpus


def analyse(runs: dict[tuple[str, int], dict], corpus: str, control: str, target: float) -> dict:
    """Everything that the report shows."""
    losses = {run: entry["heldout"][corpus]["loss"] for run, entry in runs.items()}
    final = fit(losses, control)
    largest = largest_t(final.covariance, final.freedom)
    c = critical_value(largest)
    documents = [entry["documents"][corpus] for entry in runs.values()]
    tokens = np.array(documents[0]["tokens"])
    if any(entry["tokens"] != documents[0]["tokens"] for entry in documents):
        raise UserError(f"the runs were evaluated on different text: {corpus} has other documents in some")
    draws = resampled(np.array([entry["nats"] for entry in documents]), tokens, final.weights)
    tail = (1 - LEVEL) / 2
    text = np.quantile(draws, [tail, 1 - tail], axis=0)
    enough = all(len(entry["heldout_curve"]) >= LAST for entry in runs.values())
    last = None
    if enough:
        means = {
            run: float(np.mean([loss for _, loss in entry["heldout_curve"][-LAST:]])) for run, entry in runs.items()
        }
        last = fit(means, control)
        last_c = critical_value(largest_t(last.covariance, last.freedom))
    widths = c * final.errors
    architectures = len(final.names) + 1
    differences = {}
    for index, name in enumerate(final.names):
        difference, width = float(final.differences[index]), float(widths[index])
        differences[name] = {
            "difference": difference,
            "interval": [difference - width, difference + width],
            "half_width": width,
            "p": float(adjusted_p(final.differences / final.errors, largest)[index]),
            "verdict": "better" if difference + width < 0 else "worse" if difference - width > 0 else "not told apart",
            "documents_interval": text[:, index].tolist(),
            "paper": paper_difference(name, control),
        }
        if last is not None:
            width = float(last_c * last.errors[index])
            mean = float(last.differences[index])
            differences[name] |= {"last_five": mean, "last_five_interval": [mean - width, mean + width]}
    return {
        "control": control,
        "corpus": corpus,
        "runs": len(runs),
        "seeds": sorted({seed for _, seed in runs}),
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
        "mean_loss": {
            name: float(np.mean([loss for (run, _), loss in losses.items() if run == name]))
            for name in dict.fromkeys(name for name, _ in losses)
        },
        "deviation": final.deviation,
        "freedom": final.freedom,
        "critical_value": c,
        "anova": {factor: [x if x == x else None for x in row] for factor, row in final.anova.items()},
        "half_width_asked": target,
        "seeds_needed": seeds_needed(architectures, final.deviation, target),
        "differences": dict(sorted(differences.items(), key=lambda item: item[1]["difference"])),
    }


def report(args: argparse.Namespace, settings: dict, found: dict) -> None:
    """Print and write the tables."""

    def interval(values: list[float]) -> str:
        return f"{values[0]:+.4f} to {values[1]:+.4f}"

    control = found["control"]
    rows = [[control, f"{found['mean_loss'][control]:.4f}", *[""] * 7]]
    for name, values in found["differences"].items():
        rows.append(
            [
                name,
                f"{found['mean_loss'][name]:.4f}",
                f"{values['difference']:+.4f}",
                interval(values["interval"]),
                f"{values['p']:.3f}",
                values["verdict"],
                interval(values["documents_interval"]),
                f"{values['last_five']:+.4f} ({interval(values['last_five_interval'])})"
                if "last_five" in values
                else "",
                f"{values['paper']:+.4f}" if values["paper"] is not None else "",
            ]
        )
    header = ["model", "held-out loss", f"from {control}", "95 %, all at once", "p", "", "95 % over documents"]
    header += [f"mean of last {LAST} evaluations", "paper"]
    anova = markdown_table(
        ["factor", "sum of squares", "degrees", "F", "p"],
        [
            [factor, f"{squares:.3e}", degrees, *("" if x is None else f"{x:.3g}" for x in (ratio, p))]
            for factor, (squares, degrees, ratio, p) in found["anova"].items()
        ],
    )
    half = max(values["half_width"] for values in found["differences"].values())
    needed, seeds = found["seeds_needed"], len(found["seeds"])
    asked = found["half_width_asked"]
    if half <= asked:
        more = f"That is within the {asked:g} asked for."
    elif needed is None:
        more = f"{asked:g} would take more than {MOST_SEEDS} seeds."
    else:
        extra = (needed - seeds) * (len(found["differences"]) + 1)
        more = f"{asked:g} would take {needed} seeds of each architecture, {extra} more runs."
    told = [
        f"{name} {values['verdict']}"
        for name, values in found["differences"].items()
        if "not" not in values["verdict"]
    ]
    notes = (
        f"Nats per token on {found['corpus']} ({found['tokens']:,} tokens, {found['documents']:,} documents); "
        f"{found['runs']} runs, {seeds} seeds, {settings['max_steps']:,} steps of {settings['blocks_per_step']} x "
        f"{settings['block_size']} tokens. Residual deviation {found['deviation']:.4f} on {found['freedom']} degrees "
        f"of freedom, half-width at most {half:.4f}. {more}\n\n"
        f"Told apart from {control}: {', '.join(told) or 'none'}. This holds for models of this size, this text and "
        "this number of steps, at one learning rate for all; it orders no two of the others, and says nothing about "
        "larger models or longer training. The interval over documents is for these runs, one architecture at a time. "
        "The paper's differences are of mean log-perplexity over its seven corpora at 2.9B parameters "
        f"({PUBLISHED['source']}).\n\nLoss = architecture + seed:\n\n{anova}\n"
        f"By `python -m evals.compare {args.results} --control {control}`."
    )
    publish_table(args.output, f"Differences from {control}", markdown_table(header, rows), notes)


def draw(path: Path, found: dict) -> None:
    """The intervals, one line an architecture, in a picture beside `path`."""
    names, values = list(found["differences"]), list(found["differences"].values())
    places = range(len(names))
    figure, axes = subplots(figsize=(8, 0.5 * len(names) + 1.6))
    axes.hlines(
        places,
        *zip(*(value["documents_interval"] for value in values), strict=True),
        color="C1",
        linewidth=7,
        alpha=0.35,
        label="95 % over documents",
    )
    axes.errorbar(
        [value["difference"] for value in values],
        places,
        xerr=[value["half_width"] for value in values],
        fmt="o",
        capsize=3,
        label="last checkpoint, 95 % all at once",
    )
    for key, style, label in (
        ("last_five", {"marker": "|", "s": 200, "color": "C0"}, f"mean of last {LAST} evaluations"),
        ("paper", {"marker": "D", "s": 25, "color": "C3"}, "paper, 2.9B"),
    ):
        known = [(value[key], place) for place, value in enumerate(values) if value.get(key) is not None]
        if known:
            axes.scatter(*zip(*known, strict=True), label=label, zorder=3, **style)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, names)
    axes.margins(y=0.15)
    axes.invert_yaxis()
    axes.set(xlabel=f"held-out loss less that of {found['control']}, nats per token")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    save_figure(figure, path)


def evaluate(args: argparse.Namespace) -> None:
    args.output = args.output or args.results.with_name(f"{args.results.stem}_intervals.json")
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output} must end in .json (table and plot are written beside it)")
    settings, runs, corpus = read_runs(args.results, args.corpus)
    found = analyse(runs, corpus, args.control, args.half_width)
    write_json(args.output, {"command": f"python -m evals.compare {args.results}", "commit": commit(), **found})
    report(args, settings, found)
    if CAN_DRAW:
        draw(args.output, found)
    else:
        print("no intervals drawn: matplotlib is not installed", file=sys.stderr)
