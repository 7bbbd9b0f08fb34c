"""Zero-shot evaluation on local tasks: the same numbers from evals.downstream and from the harness's own command."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from evals import downstream
from evals.common import PUBLISHED
from modeling_mlra import MLRAForCausalLM
from tests.paths import REPOSITORY

pytest.importorskip("lm_eval")

TASKS = ("local_choice", "local_likelihood", "local_generation")
ROUNDING = 1e-6  # relative: float32 sums in another order
MODEL = "mlra_2_gated"
WORDS = [
    *("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as"),
    *("with", "his", "they", "at", "be", "this", "from", "have", "or", "by", "one", "had", "not"),
]


def sentence(number: int, words: int) -> str:
    """Some words, always the same ones for a number."""
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 3)) % len(WORDS)] for place in range(words))


def write_task(folder: Path, name: str, rows: list[dict], **settings: object) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"test_split": "test"} | settings))


def metrics(**aggregations: str) -> list[dict]:
    return [{"metric": name, "aggregation": how, "higher_is_better": True} for name, how in aggregations.items()]


@pytest.fixture(scope="module")
def model(converted, tmp_path_factory) -> Path:
    """A golden checkpoint with calmer logits: its own give some tokens a probability of 1e-40."""
    folder = tmp_path_factory.mktemp("model") / MODEL
    shutil.copytree(converted(MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 0.15
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model) -> Path:
    """Three tasks with prompts of very different lengths, some of them longer than the model's context of 128.

    In the last one, every other answer is what the model really generates from the prompt alone.
    """
    folder = tmp_path_factory.mktemp("tasks")
    choices = [
        {
            "question": sentence(number, 3 + 9 * (number % 8)),
            "choices": [sentence(number + other, 1 + (number + other) % 4) for other in range(1, 5)],
            "answer": number % 3,
        }
        for number in range(24)
    ]
    write_task(
        folder,
        "local_choice",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=metrics(acc="mean", acc_norm="mean"),
    )
    texts = [{"text": sentence(number, 2 + 11 * (number % 9)), "end": sentence(number + 3, 4)} for number in range(18)]
    write_task(
        folder,
        "local_likelihood",
        texts,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target=" {{end}}",
        metric_list=metrics(perplexity="perplexity", acc="mean"),
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = MLRAForCausalLM.from_pretrained(model)
    prompts = []
    for number in range(12):
        prompt = sentence(number, 1 + 3 * (number % 6))
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            new = network.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        prompts.append({"prompt": prompt, "answer": answer if number % 2 else "something else"})
    write_task(
        folder,
        "local_generation",
        prompts,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n\n\n\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=metrics(exact_match="mean"),
    )
    return folder


def evaluated(output: Path, model: Path, tasks: Path, *flags: str) -> dict[str, dict[str, float]]:
    """{task: {metric: value, metric_stderr: its standard error}} of evals.downstream."""
    arguments = ["--model", model, "--tasks", *TASKS, "--include-path", tasks, "--output", output, *flags]
    assert downstream.main([str(argument) for argument in arguments]) == 0
    return flat(output)


def flat(output: Path) -> dict[str, dict[str, float]]:
    results = {}
    for name, members in json.loads(output.read_text())["results"].items():
        results[name] = {}
        for metric, numbers in members[name]["metrics"].items():
            results[name] |= {metric: numbers["value"], f"{metric}_stderr": numbers["stderr"]}
    return results


def assert_same(left: dict, right: dict) -> None:
    assert set(left) == set(right) == set(TASKS)
    for task in TASKS:
        assert in_nats(left[task]) == pytest.approx(in_nats(right[task]), rel=ROUNDING), task


def in_nats(metrics: dict[str, float]) -> dict[str, float]:
    """Perplexities, 1e21 of a random model, as what was summed in float32."""
    return {name: math.log(value) if "perplexity" in name else value for name, value in metrics.items()}


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory, model, tasks) -> dict[str, dict[str, float]]:
    """What every other way to run must give: one sequence at a time."""
    return evaluated(tmp_path_factory.mktemp("one") / "results.json", model, tasks, "--batch-size", "1")


def test_the_numbers_mean_something(one_by_one):
    """Else their equality would prove nothing: half the generations are right, likelihoods are not degenerate."""
    assert one_by_one["local_generation"]["exact_match"] == 0.5
    assert one_by_one["local_likelihood"]["perplexity"] > 10
    assert 0 < one_by_one["local_choice"]["acc"] < 1


def test_batch_size_does_not_change_results(tmp_path, model, tasks, one_by_one):
    assert_same(evaluated(tmp_path / "r.json", model, tasks, "--batch-size", "8"), one_by_one)


def test_automatic_batch_size(tmp_path, model, tasks, one_by_one):
    """The default; finding it takes some forward passes, so one task must do."""
    output = tmp_path / "r.json"
    arguments = ["--model", model, "--tasks", TASKS[1], "--include-path", tasks, "--output", output]
    assert downstream.main([str(argument) for argument in arguments]) == 0
    assert in_nats(flat(output)[TASKS[1]]) == pytest.approx(in_nats(one_by_one[TASKS[1]]), rel=ROUNDING)


def test_the_harness_command_gives_the_same(tmp_path, model, tasks, one_by_one, run_isolated):
    """`lm_eval --model hf` on the exported folder alone, with its remote code, for batch sizes 1 and 8."""
    code = """
import sys
from lm_eval.__main__ import cli_evaluate
model, tasks, names, output = sys.argv[1:]
for batch_size in ("1", "8"):
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={model},trust_remote_code=True",
                "--tasks", names, "--include_path", tasks, "--batch_size", batch_size, "--device", "cpu",
                "--output_path", f"{output}/{batch_size}.json"]
    cli_evaluate()
"""
    run_isolated(code, model, tasks, ",".join(TASKS), tmp_path)
    for batch_size in ("1", "8"):
        assert_same(harness_results(tmp_path, batch_size), one_by_one)


def harness_results(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """Metrics by task of the harness's own results file `folder/name_<date>.json`."""
    (file,) = folder.glob(f"{name}_*.json")
    return {
        task: {
            key.replace(",none", ""): value
            for key, value in entry.items()
            if key.endswith(",none") and isinstance(value, (int, float))
        }
        for task, entry in json.loads(file.read_text())["results"].items()
    }


@pytest.mark.distributed
def test_tensor_parallel_gives_the_same(tmp_path, model, tasks, one_by_one):
    """Two ranks, each of which must really hold a part of the attention only."""
    program = tmp_path / "program.py"
    program.write_text("""
import sys
from evals import downstream
load = downstream.load_harness_model
def checked(args):
    harness = load(args)
    weight = harness.model.model.layers[0].self_attn.kv_b_proj.weight
    assert 2 * weight.to_local().numel() == weight.numel(), "not sharded"
    return harness
downstream.load_harness_model = checked
sys.exit(downstream.main())
""")
    command = [program, "--model", model, "--tasks", *TASKS, "--include-path", tasks]
    on_two_ranks(tmp_path, [*command, "--batch-size", "8", "--tensor-parallel", "--output", tmp_path / "r.json"])
    assert_same(flat(tmp_path / "r.json"), one_by_one)


def on_two_ranks(folder: Path, command: list) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(launcher + command, cwd=folder, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
def test_the_harness_command_takes_tensor_parallelism(tmp_path, model, tasks, one_by_one):
    arguments = f"pretrained={model},trust_remote_code=True,tp_plan=auto"
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", ",".join(TASKS)]
    command += ["--include_path", tasks, "--batch_size", "8", "--device", "cpu"]
    on_two_ranks(tmp_path, [*command, "--output_path", tmp_path / "two.json"])
    assert_same(harness_results(tmp_path, "two"), one_by_one)


def test_published_numerics(tmp_path, model, tasks, one_by_one):
    published = evaluated(tmp_path / "r.json", model, tasks, "--batch-size", "8", "--published")
    perplexity = published["local_likelihood"]["perplexity"]
    assert perplexity != one_by_one["local_likelihood"]["perplexity"]
    assert perplexity == pytest.approx(one_by_one["local_likelihood"]["perplexity"], rel=0.1)
    assert (
        json.loads((tmp_path / "r.json").read_text())["settings"]["numerics"] == "float32 weights, bfloat16 autocast"
    )


def test_interrupted_runs_go_on_after_the_last_finished_task(tmp_path, model, tasks, one_by_one, monkeypatch, capsys):
    output = tmp_path / "r.json"
    command = ["--model", model, "--tasks", *TASKS, "--include-path", tasks, "--output", output, "--batch-size", "8"]
    command = [str(part) for part in command]
    done = []
    evaluate_task = downstream.evaluate_task

    def interrupted(harness, manager, name, limit):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(name)
        return evaluate_task(harness, manager, name, limit)

    monkeypatch.setattr(downstream, "evaluate_task", interrupted)
    assert downstream.main(command) == 130
    assert list(flat(output)) == [TASKS[0]]
    done.clear()
    monkeypatch.setattr(downstream, "evaluate_task", lambda *args: done.append(args[2]) or evaluate_task(*args))
    capsys.readouterr()
    assert downstream.main(command) == 0
    assert done == list(TASKS[1:])
    assert f"{TASKS[0]}: already in" in capsys.readouterr().err
    assert_same(flat(output), one_by_one)

    monkeypatch.setattr(downstream, "load_harness_model", lambda args: pytest.fail("nothing is left to do"))
    assert downstream.main(command) == 0
    assert downstream.main([*command, "--limit", "2"]) == 2
    assert "limit = None" in capsys.readouterr().err


def test_limit_and_table(tmp_path, model, tasks, capsys):
    arguments = ["--model", model, "--tasks", *TASKS[:2], "--include-path", tasks, "--limit", "4", "--batch-size", "8"]
    assert downstream.main([str(part) for part in arguments]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["task", "metric", "samples", f"{MODEL}, %", "stderr"]
    assert [row[:3] for row in rows[2:]] == [["local_choice", "acc_norm", "4"], ["local_likelihood", "acc", "4"]]


def test_table_of_the_papers_tasks(tmp_path, capsys):
    """The paper's metric for each task, percentages, the paper's row and the average over the seven."""
    entries = {
        task: {task: {"samples": 10, "metrics": {m: {"value": v, "stderr": 0.01} for m, v in numbers.items()}}}
        for task, numbers in zip(
            PUBLISHED["zero_shot"]["tasks"],
            [{"acc": 0.9, "acc_norm": 0.1 * index} for index in range(1, 8)],
            strict=True,
        )
    }
    results = downstream.Results(None, {"model": "mine", "numerics": "as stored"})
    results.entries = entries
    arguments = downstream.argparse.Namespace(output=tmp_path / "r.json", limit=None)
    downstream.print_table(arguments, results.settings, results, list(entries), "MLRA-4")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["task", "metric", "samples", "mine, %", "stderr", "paper, MLRA-4"]
    assert [row[1] for row in rows[2:9]] == ["acc_norm"] * 3 + ["acc", "acc_norm", "acc", "acc_norm"]
    assert [row[3] for row in rows[2:9]] == ["10.00", "20.00", "30.00", "90.00", "50.00", "90.00", "70.00"]
    assert [row[5] for row in rows[2:9]] == ["67.63", "41.38", "43.00", "61.74", "62.16", "61.48", "74.48"]
    assert rows[9] == ["average of the seven", "", "", "51.43", "", "58.84"]


def test_the_group_is_the_papers_tasks():
    group = yaml.safe_load(downstream.GROUP_FILE.read_text())
    assert group["group"] == "mlra_zero_shot"
    assert group["task"] == list(PUBLISHED["zero_shot"]["tasks"])
    assert [task["column"] for task in PUBLISHED["zero_shot"]["tasks"].values()] == PUBLISHED["zero_shot"]["columns"]


def test_the_harness_knows_the_group_and_its_metrics():
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / name for name in ("arc", "openbookqa", "super_glue", "hellaswag", "winogrande", "piqa")]
    manager = lm_eval.tasks.TaskManager(include_path=[*folders, downstream.TASK_FOLDER], include_defaults=False)
    assert "mlra_zero_shot" in manager.all_groups
    files = {"arc_easy": "arc/arc_easy", "boolq": "super_glue/boolq/default", "winogrande": "winogrande/default"}
    files |= {name: f"{name}/{name}" for name in ("openbookqa", "hellaswag", "piqa")} | {
        "arc_challenge": "arc/arc_easy"
    }
    for task, entry in PUBLISHED["zero_shot"]["tasks"].items():
        assert task in manager.all_subtasks
        text = (own / f"{files[task]}.yaml").read_text()
        assert f"metric: {entry['metric']}\n" in text
        assert ("acc_norm" in text) == (entry["metric"] == "acc_norm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--model": "nowhere"}, "no folder nowhere"),
        ({"--include-path": "nowhere"}, "--include-path nowhere is no folder"),
        ({"--limit": "0"}, "--limit 0 must be positive"),
        ({"--output": "results.txt"}, "must end in .json"),
        ({"--paper-row": "MHA"}, "--paper-row MHA"),
        ({"--tensor-parallel": ""}, "torchrun --nproc-per-node"),
    ],
)
def test_wrong_arguments(model, tasks, capsys, flags, message):
    arguments = {"--model": model, "--tasks": TASKS[0], "--include-path": tasks} | flags
    capsys.readouterr()
    assert downstream.main([str(part) for pair in arguments.items() for part in pair if part != ""]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_wrong_tasks(model, tasks, tmp_path, capsys, monkeypatch):
    everything = downstream.TaskManager
    monkeypatch.setattr(  # the harness's own tasks take long to read
        downstream,
        "TaskManager",
        lambda include_path, **kwargs: everything(include_path=include_path, include_defaults=False),
    )
    command = ["--model", str(model), "--include-path", str(tasks), "--tasks"]
    capsys.readouterr()
    assert downstream.main([*command, "nonsense"]) == 2
    assert "error: unknown task nonsense" in capsys.readouterr().err
    write_task(tmp_path, "no_data", [], output_type="loglikelihood", doc_to_text="a", doc_to_target="b")
    (tmp_path / "no_data.jsonl").unlink()
    command[3] = str(tmp_path)
    assert downstream.main([*command, "no_data"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: task no_data cannot be run: ") and "no_data.jsonl" in line


def test_without_the_harness(model, monkeypatch, capsys):
    monkeypatch.setattr(downstream, "HFLM", None)
    assert downstream.main(["--model", str(model)]) == 2
    assert "pip install 'mlra[eval]'" in capsys.readouterr().err
