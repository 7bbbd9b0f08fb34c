"""Zero-shot accuracy with lm-evaluation-harness: the paper's seven tasks, or any others.

    python -m evals.downstream --model DIR [--published] [--output results.json]
    python -m evals.downstream --model DIR --local build/tasks                      # evals.local_tasks: no network
    python -m evals.downstream --model DIR --tasks my_task --include-path FOLDER --limit 100
    accelerate launch -m evals.downstream --model DIR                               # data parallel, one copy per GPU
    torchrun --nproc-per-node 4 -m evals.downstream --model DIR --tensor-parallel   # one copy over all GPUs

This is the harness's own `hf` model: `lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True` gives the
same numbers. The tasks are those of evals/tasks/mlra_zero_shot.yaml, each with the paper's metric: acc_norm, and acc
for boolq and winogrande; other tasks show acc_norm, else acc, else their first metric. Prompts get no BOS token and
are cut on the left to the model's context. With --output a rerun goes on after the last finished task.

--published computes as the published numbers were: float32 weights under bfloat16 autocast. Otherwise the model runs
in the type it is stored in.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, blame, check_model_folder, positive_int


def batch_size(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)


def check(args: argparse.Namespace) -> None:
    check_model_folder(args.model)
    if args.limit is not None and not 0 < args.limit < float("inf"):
        raise UserError(f"--limit {args.limit:g} must be positive")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.downstream", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--tasks", nargs="+", help="tasks or groups of the harness (default: the paper's seven)")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--include-path", type=Path, metavar="DIR", help="folder with more tasks")
    folder.add_argument("--local", type=Path, metavar="DIR", help="folder of evals.local_tasks; use no other tasks")
    parser.add_argument("--limit", type=float, help="so many samples per task; below 1, that share of them")
    parser.add_argument(
        "--published", action="store_true", help="numerics of the paper: float32 weights, bfloat16 autocast"
    )
    parser.add_argument("--batch-size", type=batch_size, default="auto", help="sequences at a time, or auto")
    parser.add_argument("--tensor-parallel", action="store_true", help="split the model over torchrun's processes")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write results here; a rerun goes on from it")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of going on from --output")
    parser.add_argument("--paper-row", default="auto", help="row of the paper to print beside, or auto or none")
    args = parser.parse_args(argv)
    return cli.run("evals.downstream:evaluate", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
import yaml
from transformers.distributed.configuration_utils import DistributedConfig

from evals.common import (
    FOLDER,
    PUBLISHED,
    PUBLISHED_NUMERICS,
    Results,
    markdown_table,
    model_fingerprint,
    paper_row,
    publish_table,
)
from scripts.loading import check_weights, load_config, load_model, load_tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError:
    HFLM = None

TABLE = PUBLISHED["zero_shot"]
TASK_FOLDER = FOLDER / "tasks"
GROUP_FILE = TASK_FOLDER / "mlra_zero_shot.yaml"
# Metrics that are shares between 0 and 1, shown in percent; the others, such as perplexities, have units of their own
SHARE = re.compile(r"(^|_)(acc|em|f1|exact_match|pass(@|_at_)\d+)(_|$)")


def find_tasks(names: list[str], include_path: Path | None, local: Path | None = None) -> "TaskManager":
    """A task manager that knows all `names`; the harness's own tasks are read only if a local folder lacks one.

    Args:
        include_path: a folder with more tasks.
        local: one that must have all that evals/tasks has not.

    Raises:
        UserError: for a task that is unknown, or a folder that is not there.
    """
    folders = [TASK_FOLDER]
    for option, folder in (("--include-path", include_path), ("--local", local)):
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"{option} {folder} is no folder")
            folders.append(folder)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if local is not None:
        missing = [name for name in names if name not in manager.all_tasks]
        if missing:
            raise UserError(
                f"{local} has no task {missing[0]}: `python -m evals.local_tasks --output {local}` writes it"
            )
    elif not all(name in manager.all_subtasks for name in names):
        manager = TaskManager(include_path=folders)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"unknown task {unknown[0]}: `lm_eval ls tasks` lists them; --include-path adds a folder")
    return manager


def load_harness_model(args: argparse.Namespace) -> "HFLM":
    """The harness's `hf` model of a folder, on every device that the launcher gave us."""
    options = {"backend": "causal", "batch_size": args.batch_size}
    tokenizer = load_tokenizer(args.model, load_config(args.model).vocab_size)
    if args.published:
        options["mixed_precision_dtype"] = "bfloat16"
    if args.tensor_parallel:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            raise UserError(
                "--tensor-parallel needs several processes: torchrun --nproc-per-node N -m evals.downstream"
            )
        model = load_model(
            args.model, args.published, distributed_config=DistributedConfig(tp_size=world, tp_plan="auto")
        )
        return HFLM(pretrained=model, tokenizer=tokenizer, **options)
    check_weights(args.model)  # the harness loads whatever there is
    with blame(f"{args.model} cannot be loaded"):
        return HFLM(
            pretrained=str(args.model),
            dtype="float32" if args.published else "auto",
            device="cuda" if torch.cuda.is_available() else "cpu",
            **options,
        )


def evaluate_task(harness: "HFLM", manager: "TaskManager", name: str, limit: float | None) -> dict[str, dict] | None:
    """{task: its metrics} of one task, or of the members of a group; None in all processes but the first.

    Raises:
        UserError: when the task's data cannot be had.
    """
    with blame(f"task {name} cannot be run"):
        outcome = simple_evaluate(model=harness, tasks=[name], task_manager=manager, limit=limit, log_samples=False)
    if outcome is None:
        return None
    tasks = {}
    for task, measured in outcome["results"].items():
        metrics = {
            key.partition(",")[0]: {"value": value, "stderr": measured.get(key.replace(",", "_stderr,"))}
            for key, value in measured.items()
            if "," in key and "_stderr," not in key and isinstance(value, (int, float))
        }
        if metrics:
            samples = outcome["n-samples"].get(task, {}).get("effective")
            tasks[task] = {"samples": samples, "metrics": metrics}
    return tasks


def headline(task: str, metrics: dict) -> str:
    """The metric to show for a task."""
    if task in TABLE["tasks"]:
        return TABLE["tasks"][task]["metric"]
    return next((name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics)))


def evaluate(args: argparse.Namespace) -> None:
    if HFLM is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'mlra[eval]'")
    config = load_config(args.model)
    row = paper_row(config, args.paper_row, TABLE["rows"])
    names = list(dict.fromkeys(args.tasks or yaml.safe_load(GROUP_FILE.read_text(encoding="utf-8"))["task"]))
    settings = {
        "model": args.model.resolve().name,
        "model_fingerprint": model_fingerprint(args.model),
        "numerics": PUBLISHED_NUMERICS if args.published else "as stored",
        "limit": args.limit,
    }
    results = Results(args.output, settings, args.overwrite)
    todo = [name for name in names if name not in results.entries]
    for name in (name for name in names if name in results.entries):
        print(f"{name}: already in {args.output}", file=sys.stderr)
    if todo:
        manager = find_tasks(todo, args.include_path, args.local)
        harness = load_harness_model(args)
        # Every process has read the file by now, so that all of them do the same tasks.
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        for name in todo:
            tasks = evaluate_task(harness, manager, name, args.limit)
            if tasks is not None:
                results.add(name, tasks)
    if int(os.environ.get("RANK", "0")) == 0:
        print_table(args, settings, results, names, row)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def print_table(args: argparse.Namespace, settings: dict, results: Results, names: list[str], row: str | None) -> None:
    """One line per task, with the paper's number where it has one; averages where all seven tasks are there."""
    published = dict(zip(TABLE["columns"], TABLE["rows"][row], strict=True)) if row is not None else {}
    lines, values = [], {}
    shown = {task: headline(task, entry["metrics"]) for name in names for task, entry in results.entries[name].items()}
    all_percent = all(SHARE.search(metric) for metric in shown.values())
    for name in names:
        for task, entry in results.entries[name].items():
            metric = shown[task]
            scale, unit = (100, ", %") if SHARE.search(metric) else (1, "")
            measured = [scale * x if isinstance(x, (int, float)) else None for x in entry["metrics"][metric].values()]
            values[task] = measured[0]
            cells = [f"{x:.2f}" if x is not None else "" for x in measured]
            known = published.get(TABLE["tasks"].get(task, {}).get("column"))
            label = metric if all_percent else metric + unit
            lines.append([task, label, entry["samples"], *cells, f"{known:.2f}" if known is not None else ""])
    if set(TABLE["tasks"]) <= set(values):
        mean = sum(values[task] for task in TABLE["tasks"]) / len(TABLE["tasks"])
        known = f"{TABLE['average'][row]:.2f}" if row is not None else ""
        lines.append(["average of the seven", "", "", f"{mean:.2f}", "", known])
    model = settings["model"] + ", %" * all_percent
    header = ["task", "metric", "samples", model, "stderr", f"paper, {row}" if row else "paper"]
    if row is None:
        header, lines = header[:-1], [line[:-1] for line in lines]
    notes = f"Zero-shot with lm-evaluation-harness; numerics: {settings['numerics']}."
    if args.limit is not None:
        notes += f" At most {args.limit:g} samples per task."
    if row is not None:
        notes += f" Paper: {PUBLISHED['source']}."
    publish_table(args.output, "Zero-shot accuracy", markdown_table(header, lines), notes)
