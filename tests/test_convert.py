"""Conversion of released checkpoints: the authors' logits, complete folders, one clear line for everything wrong."""

import errno
import functools
import json
import pickle
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

import scripts.convert_checkpoint
from modeling_mlra import MLRAConfig, MLRAForCausalLM
from scripts import saved_tensors
from scripts.export import export_folder
from scripts.model_card import PUBLISHED_PERPLEXITY, render_card
from tests.conversion import Bomb, convert, fail_after
from tests.paths import GOLDEN, GOLDEN_NAMES, REPOSITORY
from tests.released import LATENTS_AND_BRANCHES, Released, oracle_of_released, write_released
from tests.tolerances import MATHEMATICS_ATOL, RELEASED_LOGITS_RTOL, RELEASED_LOSS_RTOL


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
    monkeypatch.setattr(saved_tensors, "save_file", fail_after(0, OSError(errno.ENOSPC, "No space left on device")))
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


@pytest.mark.parametrize("file", ["hub_card.md", "README.md"])
def test_quoted_times_are_those_of_the_results(file):
    """Of attention over one device's share; only cards of models with such a share quote them."""
    rows = json.loads((REPOSITORY / "evals" / "results" / "decode_peers_h200.json").read_text())["figure"]
    ours = [row for row in rows if "against_mla" in row]
    ratios, times = [row["against_mla"] for row in ours], [row["us"] for row in ours]
    config = MLRAConfig(**json.loads((REPOSITORY / "configuration" / "mlra_4.json").read_text()))
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    if file == "hub_card.md":
        text = render_card(config, torch.bfloat16, "", released=False, license_id="apache-2.0")
        other = MLRAConfig(**json.loads((REPOSITORY / "configuration" / "mla.json").read_text()))
        assert "FlashMLA" not in render_card(other, torch.bfloat16, "", released=False, license_id="apache-2.0")
    text = " ".join(text.split())
    assert f"{times[0]:.0f} µs at 128K tokens and {times[-1]:.0f} at 2M, {min(ratios):.1f} to" in text
    assert f"to {max(ratios):.1f} times" in text


def test_card_cache_table():
    """Per device, in units of 128 numbers: the table of the paper."""
    expected = {"mla": (4.5, 4.5, 4.5, 4.5), "gla_2": (4.5, 2.5, 2.5, 2.5), "mlra_4": (4.5, 2.5, 1.5, 1.5)}
    for variant, row in expected.items():
        config = MLRAConfig(**json.loads((REPOSITORY / "configuration" / f"{variant}.json").read_text()))
        card = render_card(config, torch.float32, "", released=True, license_id="unknown")
        assert "| numbers | " + " | ".join(str(int(value * 128)) for value in row) + " |" in card
