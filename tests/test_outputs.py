"""What commands leave behind: nothing after a signal or a failure, and all that another command has finished."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from evals import perplexity
from scripts import cli, convert_checkpoint, export, finetune_lora, prepare_text, saved_tensors, train
from scripts.cli import UserError, locked
from tests.paths import DEMO, GOLDEN, HELDOUT, REPOSITORY

# Signals


@pytest.mark.parametrize(("number", "code"), [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_leave_nothing_behind(monkeypatch, tmp_path, number, code):
    """Nor does a second one that comes while the first is cleaned up after."""
    number = getattr(signal, number)
    rmtree = shutil.rmtree

    def again(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGHUP if number != signal.SIGINT else 0)
        rmtree(*args, **kwargs)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(shutil, "rmtree", again)
        (next(tmp_path.glob(".out.partial")) / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), number)

    monkeypatch.setattr(saved_tensors, "save_file", interrupted)
    try:
        found = export.main([str(DEMO), str(tmp_path / "out")])
    except SystemExit as stop:
        found = stop.code
    assert found == code and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_nohup_stays_in_force():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.run(lambda _: os.kill(os.getpid(), signal.SIGHUP), argparse.Namespace()) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(("number", "code"), [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_the_libraries_are_imported(tmp_path, number, code):
    """Libraries import each other with all errors caught, so an exception could be lost."""
    (tmp_path / "library.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{number})\n    [None for _ in range(1000)]\n"
        "except BaseException:\n    pass\ndef body(args):\n    print('went on')\n"
    )
    program = "from argparse import Namespace; from scripts.cli import run; exit(run('library:body', Namespace()))"
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "interrupted\n")


def test_a_signal_that_comes_back_as_another_error(capsys):
    def body(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except SystemExit as error:
            raise KeyError("half an import") from error

    assert cli.run(body, argparse.Namespace()) == 143
    assert capsys.readouterr().err == "interrupted\n"


# Several commands on one output


def test_a_lock_ends_with_its_process(tmp_path):
    output = tmp_path / "new" / "results.json"
    code = (
        "import sys, time; from pathlib import Path; from scripts.cli import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, output], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another command is writing"), locked(output):
        pass
    holder.kill()
    holder.wait()
    with locked(output):
        output.write_text("{}")
    assert [file.name for file in output.parent.iterdir()] == ["results.json"]


def test_folders_made_for_a_lock_go_again(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "other").touch()  # of another command
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "other"]


def test_a_second_evaluation_is_refused_and_the_first_loses_nothing(monkeypatch, capsys, tmp_path):
    shutil.copy(HELDOUT, tmp_path / "other.bin")
    output = tmp_path / "results.json"
    flags = ["--model", str(DEMO), "--block-size", "512", "--max-tokens", "512", "--output", str(output), "--data"]
    total_loss, codes = perplexity.total_loss, []

    def and_another(*arguments, **options):
        if not codes:
            codes.append(None)
            codes.append(perplexity.main([*flags, str(tmp_path / "other.bin")]))
        return total_loss(*arguments, **options)

    monkeypatch.setattr(perplexity, "total_loss", and_another)
    assert perplexity.main([*flags, str(HELDOUT)]) == 0
    assert codes == [None, 2] and f"another command is writing {output}" in capsys.readouterr().err
    assert [*json.loads(output.read_text())["results"]] == ["heldout_sample"]
    assert perplexity.main([*flags, str(tmp_path / "other.bin")]) == 0  # and goes on from it
    assert [*json.loads(output.read_text())["results"]] == ["heldout_sample", "other"]


def test_every_output_is_locked(capsys, tmp_path):
    output = tmp_path / "out"
    recipe = {
        "model": str(DEMO),
        "data": {"train": [str(HELDOUT)], "heldout": [], "block_size": 64},
        "blocks_per_step": 1,
        "training": {"output_dir": str(output), "max_steps": 1},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    programs = {
        export: [DEMO, output],
        convert_checkpoint: [GOLDEN / "mla", output],
        finetune_lora: ["--model", DEMO, "--data", REPOSITORY / "LICENSE", "--output", output],
        train: [tmp_path / "recipe.json"],
        prepare_text: ["--output", output, "--folder", tmp_path],
    }
    before = sorted(tmp_path.iterdir())
    with locked(output):
        for program, arguments in programs.items():
            assert program.main([str(argument) for argument in arguments]) == 2, program
            assert f"another command is writing {output}" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_export_leaves_the_work_of_others(monkeypatch, tmp_path):
    """Both make the folder `build`; the one that fails must not take it away."""

    def fails(*args, **kwargs):
        (tmp_path / "build" / "finished").write_text("of another command")
        raise OSError("No space left on device")

    monkeypatch.setattr(saved_tensors, "save_file", fails)
    assert export.main([str(DEMO), str(tmp_path / "build" / "out")]) == 2
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["finished"]


def test_what_a_killed_export_left_is_replaced(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    assert export.main([str(DEMO), str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
