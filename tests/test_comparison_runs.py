"""Runs of a comparison shared by processes: taken once, killed and gone on with, compiled once an architecture."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from evals import compare
from evals.corpora import token_file_header
from scripts import compare_architectures, comparison_runs, train
from scripts import recipe as recipes
from scripts.cli import locked
from scripts.training_checks import last_checkpoint
from scripts.training_data import PackedBlocks
from scripts.training_speed import count_parameters
from tests.paths import REPOSITORY
from tests.training import TRAINING, recipe, settings, write

END_OF_TEXT = 299


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Token files of documents of different lengths, in a folder."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, documents in (("train", 120), ("heldout", 9)):
        parts = [[END_OF_TEXT, *generator.integers(0, 61, generator.integers(20, 150))] for _ in range(documents)]
        tokens = np.concatenate(parts).astype("<u2")
        (folder / f"{name}.bin").write_bytes(token_file_header(len(tokens)) + tokens.tobytes())
    return folder


def comparison(data: Path, folder: Path, **changes) -> Path:
    """The configuration file of one architecture and two seeds, which saves every other step."""
    changes = {"training__max_steps": 20, "training__save_strategy": "steps", "training__save_steps": 2, **changes}
    content = settings(data, folder / "runs", **changes)
    content |= {"architectures": {"mlra_4": {}}, "seeds": [0, 1]}
    folder.mkdir()
    return write(folder / "compare.json", content)


def results_of(output: Path) -> dict:
    """Runs of an output file without what differs between machines."""
    return json.loads(output.read_text())["results"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict:
    """The runs, uninterrupted in one process."""
    folder = tmp_path_factory.mktemp("whole")
    config = comparison(data, folder / "comparison")
    assert compare_architectures.main([str(config), "--output", str(folder / "whole.json")]) == 0
    assert not list((folder / "comparison").rglob("checkpoint-*"))
    return results_of(folder / "whole.json")


def test_losses_by_document_add_up(whole, data):
    """To the held-out loss of training; each token but the first of the file is counted once."""
    assert list(whole) == ["mlra_4_seed0", "mlra_4_seed1"]
    tokens = np.fromfile(data / "heldout.bin", dtype="<u2", offset=1024)
    starts = [*np.flatnonzero(tokens == END_OF_TEXT), len(tokens)]
    lengths = np.diff(starts)
    lengths[0] -= 1  # nothing predicts the first token
    used = (len(tokens) - 1) // 32 * 32
    for entry in whole.values():
        documents, total = entry["documents"]["heldout"], entry["heldout"]["heldout"]
        assert sum(documents["tokens"]) == total["tokens"] == used
        assert documents["tokens"][:-1] == lengths[:-1].tolist()
        assert sum(documents["nats"]) == pytest.approx(total["loss"] * used, rel=1e-5)


@pytest.mark.distributed
def test_killed_processes_go_on(whole, data, tmp_path):
    """Two processes take a run each; all are killed, and the same command ends with the same numbers."""
    config, output = comparison(data, tmp_path / "comparison"), tmp_path / "results.json"
    command = [sys.executable, "-m", "scripts.compare_architectures", str(config), "--output", str(output)]
    command += ["--devices", "0", "0"]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
    runs = [tmp_path / "comparison/runs" / name for name in whole]
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(last_checkpoint(run) is not None for run in runs):
            break
        time.sleep(0.002)
    killed = process.poll() is None
    signal_group(process)
    assert killed and not output.exists() and not all((run / comparison_runs.RUN_FILE).exists() for run in runs)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = results_of(output)
    assert set(found) == set(whole)
    for name in whole:
        for field in ("curve", "heldout", "documents", "step"):
            assert found[name][field] == whole[name][field], (name, field)
    assert compare_architectures.main([str(config), "--output", str(output)]) == 0  # nothing is left to do
    assert results_of(output) == found


def signal_group(process: subprocess.Popen) -> None:
    """Kill a process and those it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_run_in_other_hands_is_left_to_them(data, tmp_path):
    config, output = comparison(data, tmp_path / "comparison"), tmp_path / "results.json"
    with locked(tmp_path / "comparison/runs/mlra_4_seed0" / comparison_runs.RUN_FILE):
        assert compare_architectures.main([str(config), "--output", str(output)]) == 0
        assert list(results_of(output)) == ["mlra_4_seed1"]


def names_of_runs(monkeypatch) -> list[str]:
    """A list that the runs' names come into, instead of training."""
    names: list[str] = []

    def train_nothing(recipe, **_):
        names.append(Path(recipe.training["output_dir"]).name)
        return dict.fromkeys(comparison_runs.KEPT, 0) | {"finished": True, "seconds": 0, "heldout": {"a": {"loss": 0}}}

    monkeypatch.setattr(comparison_runs, "train_recipe", train_nothing)
    monkeypatch.setattr(comparison_runs, "heldout_documents", lambda recipe: {})
    return names


def test_a_seed_is_finished_before_the_next(data, tmp_path, monkeypatch):
    """Of all architectures, in the order of the configuration, less what is done."""
    config = comparison(data, tmp_path / "comparison")
    content = json.loads(config.read_text())
    write(config, content | {"architectures": {"b": {}, "a": {"num_branches": 1}, "c": {}}, "seeds": [1, 0]})
    taken = names_of_runs(monkeypatch)
    monkeypatch.setattr(comparison_runs, "matmul_rate", lambda device: 1.0)
    monkeypatch.setattr(compare_architectures, "report", lambda *_: None)
    for expected in (["b_seed1", "a_seed1", "c_seed1", "b_seed0", "a_seed0", "c_seed0"], []):
        assert compare_architectures.main([str(config), "--output", str(tmp_path / "results.json")]) == 0
        assert taken == expected
        taken.clear()


def test_seeds_of_an_architecture_are_compiled_once(data, tmp_path):
    """The second seed's model runs the first one's graphs, with its own weights and data."""
    compiled = {"training__torch_compile": True, "training__torch_compile_backend": "aot_eager"}
    torch.compiler.reset()
    for seed, graphs in ((0, 1), (1, 0)):
        counters.clear()
        result = train.train_recipe(recipe(data, tmp_path / f"{seed}", training__seed=seed, **compiled))
        assert counters["stats"]["unique_graphs"] == graphs
    plain = train.train_recipe(recipe(data, tmp_path / "plain", training__seed=1))
    assert [loss for _, loss in result["curve"]] == pytest.approx([loss for _, loss in plain["curve"]], abs=1e-4)


def test_graphs_are_forgotten_between_architectures_only(data, tmp_path, monkeypatch):
    order = names_of_runs(monkeypatch)
    monkeypatch.setattr(torch.compiler, "reset", lambda: order.append("reset"))
    recipes = {name: recipe(data, tmp_path / name) for name in ("a_seed0", "a_seed1", "b_seed0", "b_seed1")}
    comparison_runs.work(recipes, {}, {"b_seed0"}, None)
    assert order == ["a_seed0", "a_seed1", "reset", "b_seed1"]
    comparison_runs.work(recipes, {}, {"b_seed0"}, None)  # all are finished
    assert len(order) == 4


def test_data_come_in_the_same_order_for_all_architectures(data, tmp_path, monkeypatch):
    seen: dict[str, list] = {}

    def watch(name):
        def get(self, index, original=PackedBlocks.__getitem__):
            seen.setdefault(name, []).append(index)
            return original(self, index)

        return get

    for name, given, seed in (("one", {}, 3), ("other", {"model__num_branches": 1}, 3), ("seed", {}, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(PackedBlocks, "__getitem__", watch(name))
            patch.setattr(train, "heldout_loss", lambda *_, **__: {})
            seeds = {"training__seed": seed, "training__data_seed": seed}
            train.train_recipe(recipe(data, tmp_path / name, **given, **seeds))
    assert len(seen["one"]) >= 12 * 8
    assert seen["one"] == seen["other"] != seen["seed"]


def test_second_edition():
    """Nine models of 30.5M parameters whose weights start as strong as the paper's, five evaluations at the end."""
    content = recipes.read_configuration(TRAINING / "compare_30m.json")
    models = compare_architectures.plan(content)
    assert len(models) == 9 and len(content["seeds"]) >= 4
    for name, model in models.items():
        config = recipes.model_config(model)
        assert count_parameters(config) == pytest.approx(30.48e6, rel=0.002), name
        assert config.initializer_range == pytest.approx(0.02 * (3072 / config.hidden_size) ** 0.5, rel=1e-3)
    run = compare_architectures.run_recipe(content, models["gqa"], "gqa", 1, Path("compare_30m.json"))
    args = recipes.training_arguments(run)
    assert (args.seed, args.data_seed) == (1, 1)
    steps = range(args.eval_steps, args.max_steps + 1, int(args.eval_steps))
    evaluated = [step for step in steps if step >= args.eval_delay]
    assert len(evaluated) >= compare.LAST and evaluated[-1] == args.max_steps
    assert args.max_steps * run.blocks_per_step * run.data.block_size > 200e6
