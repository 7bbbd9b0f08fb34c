"""Conversion of released checkpoints: the authors' logits, complete folders, one clear line for everything wrong."""

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
import yaml
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

import scripts.convert_checkpoint
import scripts.export
from modeling_mlra import MLRAConfig, MLRAForCausalLM
from scripts.convert_checkpoint import main
from scripts.export import export_folder, parameter_shapes
from scripts.model_card import PUBLISHED_PERPLEXITY, render_card
from tests.paths import GOLDEN, GOLDEN_NAMES, REPOSITORY
from tests.released import LATENTS_AND_BRANCHES, Released, oracle_of_released, write_released
from tests.tolerances import MATHEMATICS_ATOL, RELEASED_LOGITS_RTOL, RELEASED_LOSS_RTOL


def convert(*args) -> int:
    return main([str(arg) for arg in args])


def expect_error(capsys, folder: Path, expected: str, *args) -> None:
    """Converting must exit with 2 after one line on stderr that contains `expected`, and leave `folder` as it was."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert convert(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
    assert sorted(folder.rglob("*")) == before


# The authors' numbers


@pytest.fixture(scope="module")
def remote_outputs(converted, run_isolated, tmp_path_factory):
    """{name: (logits, loss, class)} of every golden checkpoint, computed by remote code where no package is."""
    out = tmp_path_factory.mktemp("outputs")
    folders = [converted(name) for name in GOLDEN_NAMES]
    code = """
import json, os, sys
os.environ["HF_HOME"], out, golden, *folders = sys.argv[1:]
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in folders:
    name = os.path.basename(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = load_file(f"{golden}/{name}/expected.safetensors")["input_ids"]
    with torch.no_grad():
        result = model(ids, labels=ids)
    save_file({"logits": result.logits, "loss": result.loss}, f"{out}/{name}.safetensors")
    print(json.dumps([name, type(model).__module__, str(model.dtype)]))
"""
    lines = run_isolated(code, tmp_path_factory.mktemp("home"), out, GOLDEN, *folders).splitlines()
    described = {name: rest for name, *rest in map(json.loads, lines)}
    return {name: (load_file(out / f"{name}.safetensors"), *described[name]) for name in GOLDEN_NAMES}


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_logits_and_loss(remote_outputs, name):
    outputs, module, dtype = remote_outputs[name]
    assert module.startswith("transformers_modules.")
    assert dtype == "torch.float32"
    expected = load_file(GOLDEN / name / "expected.safetensors")
    error = (outputs["logits"] - expected["logits"]).abs().max() / expected["logits"].abs().max()
    assert error <= RELEASED_LOGITS_RTOL
    assert (outputs["loss"] - expected["loss"]).abs() <= RELEASED_LOSS_RTOL * expected["loss"]


def test_golden_count():
    assert len(GOLDEN_NAMES) == 13


@pytest.mark.parametrize("name", [name for name in GOLDEN_NAMES if name != "mlra_4_sharded"])
def test_oracle_agrees_with_the_authors(name):
    """The oracle every other test relies on gives the authors' logits too, from the released files themselves."""
    variant = name.removesuffix("_gated").removesuffix("_no_scale")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    sizes = {key: value for key, value in config.items() if key in Released.__dataclass_fields__}
    released = Released(variant=variant, gated=name.endswith("_gated"), **sizes)
    state = torch.load(GOLDEN / name / "pytorch_model.bin", weights_only=True)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    oracle = oracle_of_released(released, state, scaled=not name.endswith("_no_scale"))
    logits = oracle.forward(expected["input_ids"][0])
    error = (logits - expected["logits"][0]).abs().max() / expected["logits"].abs().max()
    assert error <= RELEASED_LOGITS_RTOL


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "no_scale"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("variant", LATENTS_AND_BRANCHES)
def test_other_sizes_equal_the_oracle(tmp_path, variant, gated, scaled):
    """12 heads, n = 10, latents 48, 24 and 12 wide: hardly a power of two, and no two sizes equal."""
    sizes = Released(variant=variant, gated=gated)
    state = sizes.random_state()
    source = write_released(tmp_path / "source", sizes, state, num_shards=1 if gated else 3)
    assert convert(source, tmp_path / "out", *([] if scaled else ["--no-scale"])) == 0
    model = MLRAForCausalLM.from_pretrained(tmp_path / "out").double()
    ids = torch.tensor([5, 290, 17, 3, 3, 111, 42])
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = oracle_of_released(sizes, state, scaled).forward(ids)
    assert (logits - expected).abs().max() <= MATHEMATICS_ATOL * expected.abs().max()


# What a folder holds


def test_folder_is_complete(converted):
    folder = converted("mlra_2_gated")
    package = REPOSITORY / "modeling_mlra"
    code = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    assert {file.name for file in folder.iterdir()} == code | {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in code:
        assert (folder / name).read_bytes() == (package / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MLRAForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_mlra.MLRAConfig",
        "AutoModel": "modeling_mlra.MLRAModel",
        "AutoModelForCausalLM": "modeling_mlra.MLRAForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_mlra.MLRAForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_mlra.MLRAForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mlra.MLRAForTokenClassification",
    }
    assert (config["num_latent_heads"], config["num_branches"]) == (4, 2)
    assert config["attn_output_gate"] is True and config["latent_scaling"] is True
    assert config["max_position_embeddings"] == 128
    assert len({oct((folder / name).stat().st_mode) for name in ("config.json", "model.safetensors")}) == 1


def test_no_scale_is_written(converted):
    assert json.loads((converted("gla_2_no_scale") / "config.json").read_text())["latent_scaling"] is False


def test_sharded_source_equals_single(converted):
    single, sharded = (load_file(converted(name) / "model.safetensors") for name in ("mlra_4", "mlra_4_sharded"))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(converted, tmp_path, dtype):
    assert convert(GOLDEN / "mla", tmp_path / "out", "--dtype", dtype) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    stored, exact = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted("mla")))
    for name, tensor in exact.items():
        assert torch.equal(stored[name], tensor.to(getattr(torch, dtype)))
    model = MLRAForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)


def test_sharded_output_loads(tmp_path, converted, monkeypatch):
    limited = functools.partial(export_folder, max_shard_bytes=100_000)
    monkeypatch.setattr(scripts.convert_checkpoint, "export_folder", limited)
    assert convert(GOLDEN / "gla_4", tmp_path / "out") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in files:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            assert names == {name for name, place in index["weight_map"].items() if place == file.name}
            assert len(names) == 1 or sum(stored.get_tensor(name).nbytes for name in names) <= 100_000
    expected = MLRAForCausalLM.from_pretrained(converted("gla_4")).state_dict()
    found = MLRAForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert index["metadata"]["total_size"] == sum(expected[name].nbytes for name in index["weight_map"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_padded_ids_are_never_generated(tmp_path, capsys):
    """With the released vocabulary of 50304, 47 embedding rows have no token; here they have the largest logits."""
    sizes = Released(vocab_size=50304, n_layer=1)
    state = sizes.random_state()
    state["transformer.wte.weight"][50257:] *= 100
    source = write_released(tmp_path / "source", sizes, state)
    assert convert(source, tmp_path / "out") == 0
    assert "note:" not in capsys.readouterr().err
    expected = list(range(50257, 50304))
    assert GenerationConfig.from_pretrained(tmp_path / "out").suppress_tokens == expected
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 50257
    model = MLRAForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer([f"prompt {i}" for i in range(8)], return_tensors="pt", padding=True)
    with torch.no_grad():
        top = model(**inputs).logits[:, -1].argmax(-1)
    assert (top >= 50257).any()
    for do_sample in (False, True):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=do_sample)
        assert ids.max() < 50257


def test_reduced_tokenizer_comes_with_a_note(tmp_path, capsys):
    assert convert(GOLDEN / "mlra_4", tmp_path / "out") == 0
    assert "tokenizer of the first 319 and <|endoftext|>" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("Any text — 任意文本")) == "Any text — 任意文本"
    assert len(tokenizer) == 320 and tokenizer.eos_token_id == 319 and tokenizer.model_max_length == 128
    config = MLRAConfig.from_pretrained(tmp_path / "out")
    assert config.bos_token_id == config.eos_token_id == config.pad_token_id == 319
    assert GenerationConfig.from_pretrained(tmp_path / "out").suppress_tokens is None


def test_progress_and_result_are_shown(tmp_path, capsys):
    assert convert(GOLDEN / "mlra_2", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out'}\n"
    assert "mlra_2, 2 layers" in err and "Writing weights: 100%" in err


def test_training_leftovers_are_never_read(tmp_path):
    shutil.copytree(GOLDEN / "mlra_4_sharded", tmp_path / "source")
    for name in ("optimizer.pt", "process_state_rank_0.pt"):
        (tmp_path / "source" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert convert(tmp_path / "source", tmp_path / "out") == 0
    assert not (tmp_path / "exploded").exists()
    assert not list((tmp_path / "out").glob("*.pt"))


def test_missing_parents_of_the_destination(tmp_path, capsys, monkeypatch):
    assert convert(GOLDEN / "mla", tmp_path / "a" / "b" / "out") == 0
    shutil.rmtree(tmp_path / "a")
    monkeypatch.setattr(scripts.export, "save_file", fail_after(0, OSError(errno.ENOSPC, "No space left on device")))
    assert convert(GOLDEN / "mla", tmp_path / "a" / "b" / "out") == 2
    assert list(tmp_path.iterdir()) == []


# The model card


@pytest.mark.parametrize("variant", sorted(PUBLISHED_PERPLEXITY))
def test_card_of_a_released_model(variant):
    config = MLRAConfig(**json.loads((REPOSITORY / "configuration" / f"{variant}.json").read_text()))
    card = render_card(config, torch.bfloat16, "From the authors.", released=True, license_id="unknown")
    assert "$" not in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "unknown" and front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation" and "mlra" in front["tags"]
    assert "## Results published by the authors" in card
    assert all(f"{value:.3f}" in card for value in PUBLISHED_PERPLEXITY[variant])
    assert "arXiv 2603.02188" in card and "@inproceedings{liu2026multi" in card
    assert "states no licence" in card
    assert "2,87" in card and "576 numbers" in card and "47 embedding rows have no token" in card


def test_card_quotes_nothing_for_other_models(converted):
    assert "published by the authors" not in (converted("mlra_4") / "README.md").read_text()
    config = MLRAConfig()
    own = render_card(config, torch.float32, "Trained here.", released=False, license_id="apache-2.0")
    assert "published by the authors" not in own and "states no licence" not in own
    assert yaml.safe_load(own.split("---\n")[1])["license"] == "apache-2.0"
    unscaled = MLRAConfig(latent_scaling=False)
    card = render_card(unscaled, torch.float32, "From the authors.", released=True, license_id="unknown")
    assert "published by the authors" not in card and "ablation without scaling" in card


def test_card_cache_table():
    """Per device, in units of 128 numbers: the table of the paper."""
    expected = {"mla": (4.5, 4.5, 4.5, 4.5), "gla_2": (4.5, 2.5, 2.5, 2.5), "mlra_4": (4.5, 2.5, 1.5, 1.5)}
    for variant, row in expected.items():
        config = MLRAConfig(**json.loads((REPOSITORY / "configuration" / f"{variant}.json").read_text()))
        card = render_card(config, torch.float32, "", released=True, license_id="unknown")
        assert "| numbers | " + " | ".join(str(int(value * 128)) for value in row) + " |" in card


# Everything that can be wrong


class Bomb:
    """Unpickling it creates the file `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def fail_after(calls: int, error: BaseException):
    """A `save_file` that raises `error` once it has worked `calls` times."""
    count = iter(range(calls + 1))

    def save(*args, **kwargs):
        if next(count) == calls:
            raise error
        return original(*args, **kwargs)

    original = scripts.export.save_file
    return save


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
    monkeypatch.setattr(scripts.export, "save_file", fail_after(2, error))
    assert convert(GOLDEN / "mla", tmp_path / "out") == code
    assert capsys.readouterr().err.endswith(message)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.export, "save_file", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
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
