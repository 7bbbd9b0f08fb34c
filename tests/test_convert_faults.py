"""What is wrong with a checkpoint, a flag or a disk: one line, and nothing left behind. The Hub, and memory."""

import errno
import functools
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import scripts.convert_checkpoint
from modeling_mlra import MLRAConfig
from scripts import saved_tensors
from scripts.export import export_folder, parameter_shapes
from tests.conversion import Bomb, convert, expect_error, fail_after
from tests.paths import GOLDEN, REPOSITORY
from tests.released import Released, write_released


def edit_state(folder: Path, edit, file: str = "pytorch_model.bin") -> None:
    state = torch.load(folder / file, weights_only=True)
    edit(state)
    torch.save(state, folder / file)


def edit_json(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def truncate(file: Path, fraction: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * fraction)])


SHARD = "pytorch_model-00002-of-00003.bin"
LAST_SHARD = "pytorch_model-00003-of-00003.bin"
INDEX = "pytorch_model.bin.index.json"
PREFIX = "transformer.h.0.attn."


def pop_all_attention(state):
    for name in [name for name in state if ".attn." in name]:
        state[name.replace(".attn.", ".attn.c_")] = state.pop(name)


PROBLEMS = {  # name: (golden folder, how to spoil it, what the line must say)
    "missing shard": ("mlra_4_sharded", lambda f: (f / SHARD).unlink(), f"missing shard {{folder}}/{SHARD}"),
    "truncated shard": (
        "mlra_4_sharded",
        lambda f: truncate(f / LAST_SHARD, 0.9),
        f"{LAST_SHARD} is truncated or no PyTorch checkpoint",
    ),
    "truncated file": ("mla", lambda f: truncate(f / "pytorch_model.bin", 0.5), "pytorch_model.bin is truncated"),
    "empty file": ("mla", lambda f: truncate(f / "pytorch_model.bin", 0), "pytorch_model.bin is truncated"),
    "text in place of a file": (
        "mla",
        lambda f: (f / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "pytorch_model.bin is truncated or no PyTorch checkpoint",
    ),
    "pickle without tensors": (
        "mla",
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1})),
        "pytorch_model.bin is truncated or no PyTorch checkpoint",
    ),
    "list of tensors": (
        "mla",
        lambda f: torch.save([torch.zeros(2)], f / "pytorch_model.bin"),
        "holds a list instead of a dict of tensors",
    ),
    "not a tensor": (
        "mla",
        lambda f: edit_state(f, lambda s: s.update(step=3)),
        "step is not a floating-point tensor",
    ),
    "no weights": ("mla", lambda f: (f / "pytorch_model.bin").unlink(), "holds neither pytorch_model.bin nor"),
    "missing key": (
        "gla_2",
        lambda f: edit_state(f, lambda s: s.pop("transformer.h.1.mlp.c_proj.weight")),
        "missing key transformer.h.1.mlp.c_proj.weight in {folder}, read as gla_2 with 2 layers",
    ),
    "missing latent norm": (
        "mlra_2",
        lambda f: edit_state(f, lambda s: s.pop("transformer.h.1.attn.kv_a_layernorms.2.weight")),
        "missing key transformer.h.1.attn.kv_a_layernorms.2.weight",
    ),
    "missing head": ("mla", lambda f: edit_state(f, lambda s: s.pop("lm_head.weight")), "missing key lm_head.weight"),
    "gate in one layer only": (
        "mla_gated",
        lambda f: edit_state(f, lambda s: s.pop("transformer.h.1.attn.gated_proj.weight")),
        "missing key transformer.h.1.attn.gated_proj.weight",
    ),
    "unexpected key": (
        "gla_4",
        lambda f: edit_state(f, lambda s: s.update({"transformer.h.0.attn.c_proj.bias": torch.zeros(64)})),
        "unexpected key transformer.h.0.attn.c_proj.bias",
    ),
    "more layers than the config": (
        "mla",
        lambda f: edit_json(f / "config.json", lambda c: c.update(n_layer=1)),
        "unexpected key transformer.h.1.attn.q_a_proj.weight and 11 more",
    ),
    "mis-shaped key": (
        "mlra_4",
        lambda f: edit_state(f, lambda s: s.update({PREFIX + "q_b_proj.weight": torch.zeros(190, 24)})),
        "transformer.h.0.attn.q_b_proj.weight has shape (190, 24), expected (192, 24)",
    ),
    "transposed key": (
        "mla",
        lambda f: edit_state(f, lambda s: s.update({PREFIX + "c_proj.weight": torch.zeros(128, 64)})),
        "transformer.h.0.attn.c_proj.weight has shape (128, 64), expected (64, 128)",
    ),
    "config of another size": (
        "mlra_4",
        lambda f: edit_json(f / "config.json", lambda c: c.update(intermediate_size=100)),
        "transformer.h.0.mlp.c_fc1.weight has shape (112, 64), expected (100, 64)",
    ),
    "unknown layout": ("mla", lambda f: edit_state(f, pop_all_attention), "unknown attention layout: the keys under"),
    "unknown width": (
        "mlra_4",
        lambda f: edit_state(f, lambda s: s.update({PREFIX + "kv_b_proj": torch.zeros(4, 16, 96)})),
        "kv_b_proj has shape (4, 16, 96), its last size must be 256 (mlra_4) or 128 (mlra_2) or 64 (gla_4)",
    ),
    "untied head": (
        "mlra_2",
        lambda f: edit_state(f, lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1})),
        "lm_head.weight differs from transformer.wte.weight",
    ),
    "index names a shard that lacks the key": (
        "mlra_4_sharded",
        lambda f: edit_json(f / INDEX, lambda c: c["weight_map"].update({"layernorm.weight": SHARD})),
        f"places layernorm.weight in {SHARD}, which does not hold it",
    ),
    "key stored twice": (
        "mlra_4_sharded",
        lambda f: edit_state(f, lambda s: s.update({"layernorm.weight": torch.ones(64)}), SHARD),
        "layernorm.weight is stored twice",
    ),
    "index without a map": (
        "mlra_4_sharded",
        lambda f: (f / INDEX).write_text("{}"),
        f"{INDEX} has no weight_map",
    ),
    "broken index": ("mlra_4_sharded", lambda f: truncate(f / INDEX, 0.5), f"{INDEX} is not valid JSON"),
    "no config": ("mla", lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": ("mla", lambda f: truncate(f / "config.json", 0.5), "config.json is not valid JSON"),
    "config without a field": (
        "mla",
        lambda f: edit_json(f / "config.json", lambda c: c.pop("q_lora_rank")),
        "no whole number for q_lora_rank",
    ),
    "biases": ("mla", lambda f: edit_json(f / "config.json", lambda c: c.update(bias=True)), "has bias=True"),
    "impossible sizes": (
        "mlra_4",
        lambda f: edit_json(f / "config.json", lambda c: c.update(kv_lora_rank=66)),
        "kv_lora_rank=66 must be a multiple of num_latent_heads=4",
    ),
    "vocabulary too small": (
        "mla",
        lambda f: edit_json(f / "config.json", lambda c: c.update(vocab_size=100)),
        "vocab_size=100 must be at least 257",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_gets_one_line_and_leaves_nothing(tmp_path, capsys, problem):
    name, spoil, expected = PROBLEMS[problem]
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / name, source)
    spoil(source)
    expect_error(capsys, tmp_path, expected.format(folder=source), source, tmp_path / "out")


def test_pickled_code_is_not_run(tmp_path, capsys):
    """A checkpoint that is a zip archive as PyTorch writes it, whose pickle would create a file."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "mla", source)
    content = (source / "pytorch_model.bin").read_bytes()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as good,
        zipfile.ZipFile(source / "pytorch_model.bin", "w", zipfile.ZIP_STORED) as bad,
    ):
        for member in good.infolist():
            bomb = member.filename.endswith("data.pkl")
            bad.writestr(member, pickle.dumps({"x": Bomb(tmp_path / "exploded")}, 2) if bomb else good.read(member))
    expect_error(capsys, tmp_path, "holds pickled objects other than tensors", source, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_destination_exists(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    for name in ("folder", "file"):
        expect_error(capsys, tmp_path, f"{tmp_path / name} already exists", GOLDEN / "mla", tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"


def test_wrong_arguments(tmp_path, capsys, converted):
    out = tmp_path / "out"
    expect_error(capsys, tmp_path, "the keys and shapes of", GOLDEN / "mlra_4", out, "--variant", "mlra_2")
    expect_error(capsys, tmp_path, "are those of mla_gated", GOLDEN / "mla_gated", out, "--variant", "mla")
    expect_error(capsys, tmp_path, "is no folder", tmp_path / "absent", out)
    expect_error(capsys, tmp_path, "is no folder", GOLDEN / "mla" / "config.json", out)
    expect_error(capsys, tmp_path, "--subfolder, e.g. main/mlra_4", GOLDEN, out)
    expect_error(capsys, tmp_path, "has no subfolder main/none", GOLDEN, out, "--subfolder", "main/none")
    expect_error(capsys, tmp_path, "is a local folder", GOLDEN / "mla", out, "--revision", "main")
    expect_error(capsys, tmp_path, "is already a Transformers folder", converted("mla"), out)
    expect_error(capsys, tmp_path, "could not be had from the Hub (revision main)", "some-org/absent", out)
    for flags in (["--dtype", "int8"], ["--variant", "gqa"]):
        with pytest.raises(SystemExit) as stop:
            convert(GOLDEN / "mla", out, *flags)
        assert stop.value.code == 2


def test_right_variant_is_accepted(tmp_path):
    assert convert(GOLDEN / "mlra_4_gated", tmp_path / "out", "--variant", "mlra_4_gated") == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
    ],
)
def test_nothing_is_left_of_an_interrupted_conversion(tmp_path, capsys, monkeypatch, error, code, message):
    limited = functools.partial(export_folder, max_shard_bytes=100_000)
    monkeypatch.setattr(scripts.convert_checkpoint, "export_folder", limited)
    monkeypatch.setattr(saved_tensors, "save_file", fail_after(2, error))
    assert convert(GOLDEN / "mla", tmp_path / "out") == code
    assert capsys.readouterr().err.endswith(message)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_tensors, "save_file", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        convert(GOLDEN / "mla", tmp_path / "out")
    assert stop.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_full_disk_is_noticed_before_writing(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert convert(GOLDEN / "mla", tmp_path / "out") == 2
    assert "needs 0.0 GB, the disk has 0.0 GB free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_float16_overflow(tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "mla", source)
    edit_state(source, lambda state: state[PREFIX + "c_proj.weight"].mul_(1e7))
    assert convert(source, tmp_path / "out", "--dtype", "float16") == 2
    assert "o_proj.weight has values too large for float16: use bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", "--dtype", "bfloat16") == 0


# The Hub


@pytest.fixture
def hub_repository():
    """A cached Hub repository `some-org/MLRA` with released folders under main/, as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(constants.HF_HUB_CACHE) / "models--some-org--MLRA"
    for name in ("mlra_4_sharded", "gla_2"):
        shutil.copytree(GOLDEN / name, repository / "snapshots" / commit / "main" / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    yield commit
    shutil.rmtree(repository)


def test_source_on_the_hub(tmp_path, capsys, converted, hub_repository):
    for revision in (None, "main", hub_repository):
        out = tmp_path / str(revision)
        flags = ["--revision", revision] if revision else []
        assert convert("some-org/MLRA", out, "--subfolder", "main/mlra_4_sharded", *flags) == 0
        assert (out / "model.safetensors").read_bytes() == (converted("mlra_4") / "model.safetensors").read_bytes()
        assert "`some-org/MLRA`, `main/mlra_4_sharded`" in (out / "README.md").read_text()
    out = tmp_path / "out"
    expect_error(capsys, tmp_path, "e.g. main/mlra_4", "some-org/MLRA", out)
    expect_error(capsys, tmp_path, "has no subfolder main/x", "some-org/MLRA", out, "--subfolder", "main/x")
    expect_error(capsys, tmp_path, "(revision v2)", "some-org/MLRA", out, "--revision", "v2")


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_stays_far_below_the_checkpoint(tmp_path):
    """A 0.2 GB checkpoint in 3 shards; what may be in memory at a time is scaled down alike."""
    sizes = Released("mlra_4", n_layer=12, n_embd=512, intermediate_size=2048, n_head=8, q_lora_rank=128)
    weights = {name: torch.ones(shape) for name, shape in sizes.shapes().items()}
    assert sum(tensor.nbytes for tensor in weights.values()) > 150e6
    write_released(tmp_path / "source", sizes, weights, num_shards=3)
    code = """
import functools, re, sys
import scripts.convert_checkpoint as command, scripts.released
from scripts.export import export_folder
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
command.export_folder = functools.partial(export_folder, max_shard_bytes=16_000_000)
scripts.released.MAPPED_BYTES = 8_000_000
source, out = sys.argv[1:]
before = peak()
for dtype in ("float32", "bfloat16"):
    assert command.main([source, f"{out}/{dtype}", "--dtype", dtype]) == 0
print(peak() - before)
"""
    command = [sys.executable, "-c", code, tmp_path / "source", tmp_path / "out"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 90e6
    for dtype in ("float32", "bfloat16"):
        index = json.loads((tmp_path / "out" / dtype / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(parameter_shapes(MLRAConfig.from_pretrained(tmp_path / "out" / dtype)))
