"""Train several attentions at equal parameter counts, data and steps, and compare their held-out perplexity.

    python -m scripts.compare_architectures configuration/training/compare.json --output evals/results/compare.json
    python -m scripts.compare_architectures configuration/training/compare.json --output … --devices 0 1 2 3
    python -m scripts.compare_architectures configuration/training/compare.json --plan     # sizes only

CONFIG is one of scripts.train with two keys more: `seeds`, and `architectures`, {name: fields unlike `model`'s}.
An architecture with `model_type` "llama" is the library's Llama with the same width, depth, heads and vocabulary.
`model` itself sets the parameter count; the MLP of every other model is made as wide as comes closest to it.

A seed sets a model's initial weights and the order of the data, which is the same for all models. A seed's runs come
before the next seed's, so that a comparison that is stopped is one of fewer seeds; the second seed of an architecture
finds its kernels in the compiler's cache on disk. A finished run is kept in its folder below `training.output_dir` at
once and an unfinished one in its checkpoints, so the same command goes on after --time-budget or an interruption.
--devices starts a process for each GPU named (twice for two on one): each takes the next run that none has taken.
Machines share the work by --only, each with an OUTPUT of its own; --merge brings these together, and trains nothing.
OUTPUT gets all runs, with held-out losses by document for evals.compare; a table and curves are written beside it.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, positive_int, read_json


def check(args: argparse.Namespace) -> None:
    if not args.config.is_file():
        raise UserError(f"no configuration file {args.config}")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.compare_architectures", __doc__)
    parser.add_argument("config", type=Path, help="JSON or YAML file")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="results; .md and .png are written beside it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train these architectures only")
    parser.add_argument(
        "--merge", nargs="+", type=Path, default=[], metavar="FILE.json", help="take runs over from these, no more"
    )
    parser.add_argument("--plan", action="store_true", help="print the matched sizes and stop")
    parser.add_argument("--devices", nargs="+", metavar="N", help="GPUs to train on, a process for each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of the processes of --devices
    parser.add_argument("--time-budget", type=positive_int, metavar="SECONDS", help="save and stop after so long")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of going on from --output")
    args = parser.parse_args(argv)
    outputs = [] if args.worker else [args.output]
    return cli.run("scripts.compare_architectures:compare", args, check, outputs=outputs)


if __name__ == "__main__":
    sys.exit(main())

from transformers import PreTrainedConfig

from evals.common import Results, fingerprint, markdown_table, publish_table
from evals.figures import CAN_DRAW, save_figure, subplots
from scripts.comparison_runs import RUN_FILE, architecture_of, run_workers, work
from scripts.recipe import Recipe, apply_changes, make_recipe, model_config, read_configuration
from scripts.training_speed import count_parameters

TOLERANCE = 0.005  # of parameter counts
MULTIPLES = (8, 4, 2, 1)  # of the MLP width, the first that meets the tolerance
EARLY = 0.1  # share of a curve that the plot leaves out: the first fall would hide everything else
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def architecture_fields(base: dict, base_config: PreTrainedConfig, changes: dict) -> dict:
    """Fields of one architecture, its MLP width still to be matched.

    A Llama gets the fields that it shares with `base`, and heads as wide as the base's values.
    """
    if changes.get("model_type", "mlra") == "mlra":
        return {**base, **changes}
    shared = {name: getattr(base_config, name) for name in SHARED_FIELDS}
    rope = {"rope_type": "default", "rope_theta": base_config.rope_parameters["rope_theta"]}
    return {**shared, "head_dim": base_config.v_head_dim, "rope_parameters": rope, **changes}


def match_width(model: dict, target: int) -> dict:
    """`model` with the `intermediate_size` that brings it closest to `target` parameters.

    Raises:
        UserError: when no width comes within `TOLERANCE`.
    """
    without = count_parameters(model_config({**model, "intermediate_size": 1}))
    per_unit = count_parameters(model_config({**model, "intermediate_size": 2})) - without
    exact = 1 + (target - without) / per_unit
    for multiple in MULTIPLES:
        width = multiple * round(exact / multiple)
        if width > 0 and abs(without + (width - 1) * per_unit - target) <= TOLERANCE * target:
            matched = {**model, "intermediate_size": width}
            assert abs(count_parameters(model_config(matched)) - target) <= TOLERANCE * target
            return matched
    raise UserError(
        f"no MLP width brings {model} to {target:,} parameters: without its MLP it has {without - per_unit:,}"
    )


def plan(content: dict) -> dict[str, dict]:
    """{name: complete model fields} of a configuration's architectures, matched in size.

    Raises:
        UserError: for a base model that is no MLRA, or that no architecture can match.
    """
    base = content["model"]
    if isinstance(base, str):
        if not Path(base).is_file():
            raise UserError(f"model {base} is no architecture file")
        base = read_json(Path(base))
    config = model_config(base)
    if config.model_type != "mlra":
        raise UserError(f"model must be of type mlra, not {config.model_type}")
    target = count_parameters(config)
    return {
        name: match_width(architecture_fields(base, config, changes), target)
        for name, changes in content["architectures"].items()
    }


def cache_numbers(config: PreTrainedConfig, devices: int) -> int:
    """Numbers cached per token, layer and device when the cache is split over `devices`."""
    if config.model_type == "mlra":
        return -(-config.num_latent_heads // devices) * config.latent_head_dim + config.qk_rope_head_dim
    return -(-config.num_key_value_heads // devices) * 2 * config.head_dim


def run_recipe(content: dict, model: dict, name: str, seed: int, source: Path) -> Recipe:
    """The recipe of one run."""
    content = {key: value for key, value in copy.deepcopy(content).items() if key not in ("architectures", "seeds")}
    folder = Path(content["training"]["output_dir"]) / f"{name}_seed{seed}"
    content["training"] |= {"output_dir": str(folder), "seed": seed, "data_seed": seed, "save_total_limit": 1}
    return make_recipe({**content, "model": model}, source)


def read_comparison(args: argparse.Namespace) -> dict:
    content = read_configuration(args.config)
    apply_changes(content, args.set)
    architectures, seeds = content.get("architectures"), content.get("seeds")
    if not isinstance(architectures, dict) or not architectures:
        raise UserError(f"{args.config}: architectures must map names to the fields that differ from model")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{args.config}: seeds must be a list of whole numbers, not {seeds!r}")
    if "model" not in content:
        raise UserError(f"{args.config}: model is missing")
    if args.only:
        unknown = set(args.only) - set(architectures)
        if unknown:
            raise UserError(f"--only {unknown.pop()}: the architectures are {', '.join(architectures)}")
    return content


def summarize(results: Results, names: list[str], corpus: str) -> dict[str, dict]:
    """{architecture: mean, standard deviation and values of the held-out perplexity, and more}, best first."""
    summary = {}
    for name in names:
        runs = [entry for key, entry in results.entries.items() if architecture_of(key) == name]
        if not runs:
            continue
        values = [entry["heldout"][corpus]["perplexity"] for entry in runs]
        summary[name] = {
            "runs": runs,
            "perplexities": values,
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "loss": statistics.mean(entry["heldout"][corpus]["loss"] for entry in runs),
            "train_loss": statistics.mean(last_loss(entry["curve"]) for entry in runs),
        }
    return dict(sorted(summary.items(), key=lambda item: item[1]["mean"]))


def last_loss(curve: list[list[float]]) -> float:
    """Mean training loss over the last tenth of a curve."""
    return statistics.mean(loss for _, loss in curve[-max(1, len(curve) // 10) :])


def report(args: argparse.Namespace, results: Results, models: dict[str, dict], corpus: str, expected: int) -> None:
    """Print and write the table, and draw the curves."""
    summary = summarize(results, list(models), corpus)
    if not summary:
        return
    rows = []
    for name, values in summary.items():
        config = model_config(models[name])
        spread = "" if values["deviation"] is None else f" ± {values['deviation']:.3f}"
        rows.append(
            [
                name,
                f"{count_parameters(config):,}",
                config.intermediate_size,
                f"{cache_numbers(config, 1)} / {cache_numbers(config, 4)}",
                f"{values['train_loss']:.4f}",
                f"{values['loss']:.4f}",
                f"{values['mean']:.3f}{spread}",
                ", ".join(f"{value:.3f}" for value in values["perplexities"]),
            ]
        )
    header = ["model", "parameters", "MLP width", "cache at 1 / 4 devices", "training loss", "held-out loss"]
    header += ["held-out perplexity", "by seed"]
    settings = results.settings
    machines = sorted(
        {
            ", torch ".join(entry["environment"][key] for key in ("device", "torch"))
            for entry in results.entries.values()
        }
    )
    publish_table(
        args.output,
        "Architectures at equal size, data and steps",
        markdown_table(header, rows),
        f"{settings['max_steps']} steps of {settings['blocks_per_step']} x {settings['block_size']} tokens, "
        f"{len(results.entries)} of {expected} runs done. Sorted by mean held-out perplexity; ± is the standard "
        "deviation over seeds (initial weights and order of the data), and a difference of that size says nothing. "
        "Cache: numbers per token, layer and device. Training loss: mean over the last tenth of the steps. Trained on "
        f"{' and '.join(machines)} by `python -m scripts.compare_architectures {args.config}`.",
    )
    if CAN_DRAW:
        draw(args.output, summary, settings["blocks_per_step"] * settings["block_size"])
    else:
        print("no curves drawn: matplotlib is not installed", file=sys.stderr)


def draw(path: Path, summary: dict[str, dict], tokens_per_step: int) -> None:
    """Training and held-out loss against tokens: the mean over seeds, and the range as a band."""
    has_heldout = any(entry["heldout_curve"] for values in summary.values() for entry in values["runs"])
    panels = [("curve", "training loss")] + [("heldout_curve", "held-out loss")] * has_heldout
    figure, axes = subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for index, (name, values) in enumerate(summary.items()):
        for axis, (curve, _) in zip(axes[0], panels, strict=True):
            runs = [dict(map(tuple, entry[curve])) for entry in values["runs"]]
            last = max(runs[0], default=0)
            steps = [step for step in runs[0] if step >= EARLY * last and all(step in other for other in runs)]
            if not steps:
                continue
            tokens = [step * tokens_per_step / 1e6 for step in steps]
            losses = [[other[step] for other in runs] for step in steps]
            style = {"color": f"C{index}", "linestyle": "--" if index >= 10 else "-"}
            axis.plot(tokens, [statistics.mean(loss) for loss in losses], label=name, linewidth=1.2, **style)
            axis.fill_between(
                tokens, [min(x) for x in losses], [max(x) for x in losses], color=style["color"], alpha=0.15
            )
    for axis, (_, label) in zip(axes[0], panels, strict=True):
        axis.set(xlabel="million tokens", ylabel=f"{label}, nats per token")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    save_figure(figure, path)


def shared_settings(models: dict[str, dict], recipe: Recipe) -> dict:
    """What all runs have in common and results depend on: files by their content."""
    return {
        "models": models,
        "max_steps": recipe.training["max_steps"],
        "blocks_per_step": recipe.blocks_per_step,
        "block_size": recipe.data.block_size,
        "training": {
            key: value for key, value in recipe.settings()["training"].items() if key not in ("seed", "data_seed")
        },
        "data": {
            part: [
                f"{Path(name).name} {fingerprint([Path(name)])}" if Path(name).is_file() else name for name in names
            ]
            for part, names in (("train", recipe.data.train), ("heldout", recipe.data.heldout))
        },
    }


def compare(args: argparse.Namespace) -> int:
    deadline = None if args.time_budget is None else time.monotonic() + args.time_budget
    content = read_comparison(args)
    models = plan(content)
    rows = []
    for name, model in models.items():
        config = model_config(model)
        rows.append([name, f"{count_parameters(config):,}", config.intermediate_size, cache_numbers(config, 1)])
    if args.plan:
        print(markdown_table(["model", "parameters", "MLP width", "cache"], rows), end="")
        return 0
    if args.output is None:
        raise UserError("--output is missing: give a file that ends in .json")
    chosen = {name: model for name, model in models.items() if not args.only or name in args.only}
    recipes = {
        f"{name}_seed{seed}": run_recipe(content, model, name, seed, args.config)
        for seed in content["seeds"]
        for name, model in chosen.items()
    }
    first = next(iter(recipes.values()))
    if not first.data.heldout:
        raise UserError(f"{args.config}: data.heldout names no corpus, there would be nothing to compare")
    if "max_steps" not in first.training:
        raise UserError(f"{args.config}: training.max_steps must say how many steps to train")
    settings = shared_settings(models, first)
    if args.worker:
        work(recipes, settings, set(Results(args.output, settings).entries), deadline)
        return 0
    results = Results(args.output, settings, args.overwrite)
    for path in args.merge:
        if not path.is_file():
            raise UserError(f"--merge {path}: no such file")
        for name, entry in Results(path, settings).entries.items():
            if name not in results.entries:
                results.add(name, entry)
    files = {name: Path(recipe.training["output_dir"]) / RUN_FILE for name, recipe in recipes.items()}
    code = 0
    if not args.merge:
        if args.overwrite:
            for file in files.values():
                file.unlink(missing_ok=True)
        try:
            if args.devices:
                code = run_workers(args, deadline)
            else:
                work(recipes, settings, set(results.entries), deadline)
        finally:
            for name, file in files.items():
                if name not in results.entries and file.exists():
                    results.add(name, Results(file, settings).entries[name])
    corpus = Path(first.data.heldout[0].removeprefix("dataset:").split(",")[0]).stem
    report(args, results, models, corpus, len(models) * len(content["seeds"]))
    missing = [name for name in recipes if name not in results.entries]
    if missing:
        print(f"{len(missing)} runs left, next {missing[0]}: the same command goes on", file=sys.stderr)
    return code
