"""What all commands have in common: quick answers, encodings, arguments and text files."""

import io
import json
import os
import subprocess
import sys

import pytest

from evals import downstream, prepare_tokens
from scripts import cli, finetune_lora, generate, prepare_text, train
from scripts import recipe as recipes
from scripts.cli import UserError
from tests.paths import DEMO, REPOSITORY

PROGRAMS = sorted(
    f"{folder}.{file.stem}"
    for folder in ("scripts", "evals")
    for file in (REPOSITORY / folder).glob("*.py")
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)
MISSING = {
    "scripts.generate": ["--model", "none", "--prompt", "a"],
    "scripts.export": ["none", "out"],
    "scripts.convert_checkpoint": ["none", "out"],
    "scripts.finetune_lora": ["--model", "none", "--data", "none", "--output", "out"],
    "scripts.train": ["none.json"],
    "scripts.compare_architectures": ["none.json"],
    "scripts.prepare_text": ["--output", "out", "--folder", "none"],
    "scripts.run_library_suite": ["none"],
    "scripts.serve": ["./none/model"],
    "evals.perplexity": ["--model", "none", "--data", "none.bin"],
    "evals.downstream": ["--model", "none"],
    "evals.local_tasks": ["--output", "out", "--wheel", "none"],
    "evals.compare": ["none.json"],
    "evals.long_context": ["--models", "none", "--data", "none.bin"],
    "evals.equivariance": ["--model", "none"],
    "evals.prepare_tokens": ["--output", "out", "--tokenizer", "none"],
}
QUICK = """
import runpy, sys
for line in sys.stdin.read().splitlines():
    name, *arguments = line.split()
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__")
        code = None
    except SystemExit as stop:
        code = stop.code or 0
    heavy = {"torch", "transformers", "accelerate", "numpy"} & set(sys.modules)
    print(name, code, *heavy, file=sys.__stdout__)
    assert not heavy
"""


def run_quickly(lines: list[str], cwd) -> tuple[list[list[str]], str]:
    """(program, exit code, heavy libraries imported) of command lines run one after another in one process."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", QUICK], input="\n".join(lines), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line.split() for line in done.stdout.splitlines()]  # help among them
    return [words for words in printed if words[:1] and words[0] in PROGRAMS], done.stderr


def test_help_needs_no_library(tmp_path):
    """Nor an encoding of the terminal that has every letter."""
    found, err = run_quickly([f"{name} --help" for name in PROGRAMS], tmp_path)
    assert found == [[name, "0"] for name in PROGRAMS] and err == ""


def test_a_missing_folder_is_refused_without_the_libraries(tmp_path):
    found, err = run_quickly([" ".join([name, *arguments]) for name, arguments in MISSING.items()], tmp_path)
    assert found == [[name, "2"] for name in MISSING]
    assert err.count("\n") == len(MISSING) and all(line.startswith("error: ") for line in err.splitlines())
    assert all("none" in line for line in err.splitlines()) and not list(tmp_path.iterdir())


# Encodings and text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_terminals_without_the_letters(monkeypatch, tmp_path, encoding):
    """Text with replacements; JSON lines escape, so nothing is lost there."""
    prompt = "é “日本” 😀"
    (tmp_path / "prompts.txt").write_text(prompt, encoding="utf-8")
    outputs = []
    for flags in (["--prompt", prompt], ["--batch-file", str(tmp_path / "prompts.txt")]):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert generate.main(["--model", str(DEMO), "--max-new-tokens", "2", *flags]) == 0
        stream.flush()
        outputs.append(stream.buffer.getvalue().decode(encoding))
    assert outputs[0].startswith(prompt.encode(encoding, "replace").decode(encoding))
    assert json.loads(outputs[1])["prompt"] == prompt


def test_a_closed_output(monkeypatch, tmp_path):
    """`>&-`: nothing is printed, and that is no error."""
    (tmp_path / "prompts.txt").write_text("a")
    monkeypatch.setattr(sys, "stdout", None)
    for flags in (["--prompt", "a"], ["--batch-file", str(tmp_path / "prompts.txt")]):
        assert generate.main(["--model", str(DEMO), "--max-new-tokens", "1", *flags]) == 0


def test_arguments_in_bytes():
    assert cli.utf8("caf\u00e9") == "caf\u00e9"
    assert cli.utf8(b"caf\xc3\xa9".decode("ascii", "surrogateescape")) == "caf\u00e9"  # a locale without it
    with pytest.raises(SystemExit) as stop:
        generate.main(["--model", str(DEMO), "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")])
    assert stop.value.code == 2


def test_lines_end_at_newlines_alone(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\x0ctwo\u2028three\u0085four\x1cfive\rsix\r\n\nlast\x0b".encode())
    lines = ["one\x0ctwo\u2028three\u0085four\x1cfive\rsix", "", "last\x0b"]
    assert cli.read_lines(file) == lines
    assert generate.main(["--model", str(DEMO), "--batch-file", str(file), "--max-new-tokens", "1"]) == 0
    printed = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in printed] == [lines[0], lines[2]]
    file.write_bytes("\ufeff".encode() + b"a\x0cb\n" * 20)
    train_lines, heldout = finetune_lora.read_examples(file)
    assert (train_lines, heldout) == (["a\x0cb"] * 18, ["a\x0cb"] * 2)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "plain.txt").write_bytes(b"Some text.\r\n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfSome text.\n")
    assert cli.read_text(tmp_path / "plain.txt") == cli.read_text(tmp_path / "marked.txt") == "Some text.\n"


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_recipe_that_is_no_text(capsys, tmp_path, suffix):
    (tmp_path / f"recipe.{suffix}").write_bytes(b'{"model": "\xff"}')
    assert train.main([str(tmp_path / f"recipe.{suffix}")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / f'recipe.{suffix}'} is not UTF-8 text (byte 11)\n"


def test_a_pipe_is_read_once(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"printf 'a\\nb\\n' > {tmp_path / 'pipe'}"])
    assert generate.main(["--model", str(DEMO), "--batch-file", str(tmp_path / "pipe"), "--max-new-tokens", "1"]) == 0
    assert writer.wait() == 0 and len(capsys.readouterr().out.splitlines()) == 2


# Numbers

LORA = ["--model", str(DEMO), "--data", "LICENSE", "--output", "never"]


@pytest.mark.parametrize("value", ["-1", "4294967296", "1.5", "nan"])
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (generate.main, ["--model", str(DEMO), "--prompt", "a"]),
        (finetune_lora.main, LORA),
        (prepare_tokens.main, ["--output", "never"]),
        (prepare_text.main, ["--output", "never"]),
    ],
)
def test_seeds(capsys, program, arguments, value):
    with pytest.raises(SystemExit) as stop:
        program([*arguments, "--seed", value])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", ["nan", "-1", "0", "inf", "fast"])
def test_learning_rates(capsys, value):
    with pytest.raises(SystemExit) as stop:
        finetune_lora.main([*LORA, "--learning-rate", value])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: argument --learning-rate") and value in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "training.seed -1"),
        ({"seed": 2**32}, "training.seed 4294967296"),
        ({"data_seed": 0.5}, "training.data_seed 0.5"),
        ({"learning_rate": float("nan")}, "training.learning_rate nan"),
        ({"learning_rate": -1}, "training.learning_rate -1"),
        ({"learning_rate": "quick"}, "learning_rate 'quick' is no number"),
        ({"weight_decay": float("inf")}, "training.weight_decay inf"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1"),  # targets would be shifted twice
        ({"optim": "nope"}, "nope"),
    ],
)
def test_numbers_of_a_recipe(tmp_path, setting, message):
    content = {"model": {}, "data": {"train": ["a.bin"], "heldout": []}, "blocks_per_step": 1}
    content["training"] = {"output_dir": str(tmp_path), "max_steps": 1, **setting}
    with pytest.raises(UserError, match=message):
        recipes.training_arguments(recipes.make_recipe(content, "test"))


def test_metrics_have_their_own_units(capsys):
    """Shares are shown in percent; a perplexity of 31.4 is not 3,140 %."""
    metrics = {"books": {"word_perplexity": 31.4}, "bits": {"bits_per_byte": 0.93}, "quiz": {"acc_norm": 0.25}}
    entries = {
        task: {task: {"samples": 8, "metrics": {name: {"value": value, "stderr": value / 10}}}}
        for task, values in metrics.items()
        for name, value in values.items()
    }
    results = downstream.Results(None, {})
    results.entries = entries
    settings = {"model": "mine", "numerics": "as stored"}
    arguments = downstream.argparse.Namespace(output=None, limit=None)
    downstream.print_table(arguments, settings, results, [*entries], None)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["task", "metric", "samples", "mine", "stderr"]
    assert rows[2:] == [
        ["books", "word_perplexity", "8", "31.40", "3.14"],
        ["bits", "bits_per_byte", "8", "0.93", "0.09"],
        ["quiz", "acc_norm, %", "8", "25.00", "2.50"],
    ]
