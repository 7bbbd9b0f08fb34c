"""What a model folder must hold: every command that loads one refuses the same things, with one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from evals import downstream, equivariance, perplexity
from scripts import convert_checkpoint, export, finetune_lora, generate, serve, train
from tests.paths import DEMO, GOLDEN, HELDOUT

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture
def copy(tmp_path):
    """`copy(edit)`: the demo folder, changed by `edit(folder)`."""

    def make(edit):
        folder = tmp_path / "model"
        shutil.copytree(DEMO, folder)
        edit(folder)
        return folder

    return make


def fields(file: str, **changes):
    """An edit of a JSON file."""

    def edit(folder):
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    return edit


def weights(change):
    """An edit of the weights: `change(state)` gives the new ones."""

    def edit(folder):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return edit


def index(change):
    """Weights in several files, and an edit of their index."""

    def edit(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="5MB")
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(content["weight_map"])
        file.write_text(json.dumps(content))

    return edit


def content(file: str, data: bytes):
    return lambda folder: (folder / file).write_bytes(data)


def without(state: dict, part: str) -> dict:
    return {name: tensor for name, tensor in state.items() if part not in name}


def refusal(capsys, program, *arguments) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert program([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err and output.out == ""
    last = output.err.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]
    assert last.startswith("error: "), output.err
    return last


MISFITS = {
    "a layer is missing": (weights(lambda s: without(s, ".3.")), "model.layers.3.input_layernorm.weight is missing"),
    "the tied embedding is missing": (weights(lambda s: without(s, EMBEDDING)), f"{EMBEDDING} is missing"),
    "the tied embeddings differ": (weights(lambda s: s | {"lm_head.weight": s[EMBEDDING] * 2}), "ties them"),
    "a tensor too many": (weights(lambda s: s | {"score.weight": torch.ones(2)}), "score.weight has no place"),
    "a wrong shape": (weights(lambda s: s | {NORM: torch.ones(7)}), f"{NORM} is (7,), not (384,)"),
    "nine layers": (fields("config.json", num_hidden_layers=9), "model.layers.6.input_layernorm.weight is missing"),
    "five layers": (fields("config.json", num_hidden_layers=5), "model.layers.5.input_layernorm.weight has no place"),
    "another width": (fields("config.json", q_lora_rank=64), "not (64"),
    "untied": (fields("config.json", tie_word_embeddings=False), "lm_head.weight is missing"),
    "half an index": (index(lambda m: [m.pop(name) for name in [*m][::2]]), "does not place"),
    "one file of an index": (index(lambda m: [m.pop(n) for n, f in [*m.items()] if "1-of" not in f]), "is missing"),
    "a number in an index": (index(lambda m: m.update({NORM: 7})), f"places {NORM} in 7"),
    "a file that is not there": (index(lambda m: m.update({NORM: "none.safetensors"})), "missing shard"),
    "truncated": (lambda f: content("model.safetensors", b"\x08\0\0\0\0\0\0\0{")(f), "is truncated"),
    "config.json: no JSON": (content("config.json", b"{"), "config.json is not valid JSON"),
    "config.json: a list": (content("config.json", b"[]"), "config.json holds no JSON object"),
    "config.json: no UTF-8": (content("config.json", b"\xff\xfe"), "config.json is not UTF-8"),
    "hidden_size": (fields("config.json", hidden_size="abc"), "'abc'"),
    "dtype": (fields("config.json", dtype="bfloat17"), "bfloat17"),
    "dtype of whole numbers": (fields("config.json", dtype="int8"), "dtype 'int8' is none of float32"),
    "hidden_act": (fields("config.json", hidden_act="silly"), "hidden_act 'silly'"),
    "rope_type": (fields("config.json", rope_parameters={"rope_type": "nope", "rope_theta": 1e4}), "'nope'"),
    "rope_theta": (fields("config.json", rope_parameters={"rope_type": "default", "rope_theta": "x"}), "'x'"),
    "generation: no JSON": (content("generation_config.json", b"{"), "generation_config.json is not valid JSON"),
    "generation: words": (fields("generation_config.json", eos_token_id="abc"), "eos_token_id 'abc'"),
    "generation: a list of words": (fields("generation_config.json", eos_token_id=["a"]), "eos_token_id ['a']"),
    "generation: unknown": (fields("generation_config.json", cache_implementation="nope"), "nope"),
}
TOKENIZERS = {
    "broken": (content("tokenizer.json", b"{"), "tokenizer of"),
    "no UTF-8": (content("tokenizer.json", b"\xff"), "tokenizer of"),
    "settings": (content("tokenizer_config.json", b"{x"), "tokenizer of"),
    "settings: a list": (content("tokenizer_config.json", b"[1]"), "tokenizer of"),
    "its vocabulary is gone": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "template": (content("chat_template.jinja", b"{% for"), "chat template of"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused(capsys, copy, tmp_path, name):
    edit, message = MISFITS[name]
    folder, output = copy(edit), tmp_path / "out"
    assert message in refusal(capsys, generate.main, "--model", folder, "--prompt", "a", "--max-new-tokens", "1")
    assert message in refusal(capsys, export.main, folder, output)
    assert message in refusal(capsys, perplexity.main, "--model", folder, "--data", HELDOUT, "--block-size", "512")
    assert not output.exists()


def test_every_command_that_loads_uses_the_one_loader(capsys, copy, tmp_path):
    folder = copy(MISFITS["a layer is missing"][0])
    (tmp_path / "lines.txt").write_text("some words in a line\n" * 40)
    recipe = {
        "model": str(folder),
        "data": {"train": [str(HELDOUT)], "heldout": [], "block_size": 64},
        "blocks_per_step": 1,
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for program, arguments in (
        (finetune_lora.main, ["--model", folder, "--data", tmp_path / "lines.txt", "--output", tmp_path / "lora"]),
        (train.main, [tmp_path / "recipe.json"]),
        (equivariance.main, ["--model", folder]),
        (downstream.main, ["--model", folder, "--tasks", "mlra_demo", "--limit", "1"]),
        (serve.main, [folder]),
    ):
        assert "model.layers.3.input_layernorm.weight is missing" in refusal(capsys, program, *arguments)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_cannot_be_read(capsys, copy, tmp_path, name):
    edit, message = TOKENIZERS[name]
    folder = copy(edit)
    assert message in refusal(capsys, export.main, folder, tmp_path / "out") and not (tmp_path / "out").exists()
    line = refusal(capsys, generate.main, "--model", folder, "--prompt", "a", "--max-new-tokens", "1")
    assert message in line or "has no tokenizer.json" in line


def test_a_tokenizer_larger_than_the_model(capsys, copy, tmp_path):
    def grow(folder):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens(["<one>", "<two>"])
        tokenizer.save(str(folder / "tokenizer.json"))

    folder = copy(grow)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    message = f"has {rows + 2} tokens, the model {rows} embedding rows"
    assert message in refusal(capsys, generate.main, "--model", folder, "--prompt", "a")
    assert message in refusal(capsys, export.main, folder, tmp_path / "out")
    assert message in refusal(capsys, perplexity.main, "--model", folder, "--data", folder / "README.md")


def test_a_tied_embedding_under_its_other_name_is_the_same_model(capsys, copy):
    """What `save_pretrained` writes has one of the two; other tools write both, or the other."""
    arguments = ["--prompt", "The capital", "--max-new-tokens", "4"]
    assert generate.main(["--model", str(DEMO), *arguments]) == 0
    expected = capsys.readouterr().out
    for change in (
        lambda s: s | {"lm_head.weight": s[EMBEDDING].clone()},
        lambda s: without(s, EMBEDDING) | {"lm_head.weight": s[EMBEDDING]},
    ):
        folder = copy(weights(change))
        assert generate.main(["--model", str(folder), *arguments]) == 0
        assert capsys.readouterr().out == expected
        shutil.rmtree(folder)


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_export_names_weights_that_are_no_numbers(capsys, copy, tmp_path, value, name):
    def spoil(state):
        state["model.layers.2.self_attn.kv_a_proj.weight"][3, 4:6] = value
        return state

    folder, output = copy(weights(spoil)), tmp_path / "out"
    line = refusal(capsys, export.main, folder, output)
    assert "model.layers.2.self_attn.kv_a_proj.weight has 2 of 49,152 values" in line and name in line
    assert not output.exists()
    assert export.main([str(folder), str(output), "--allow-nonfinite"]) == 0
    written = load_file(output / "model.safetensors")["model.layers.2.self_attn.kv_a_proj.weight"]
    assert (~torch.isfinite(written)).sum() == 2


def test_beams_cannot_be_streamed(capsys, copy, tmp_path):
    folder = copy(fields("generation_config.json", num_beams=2))
    line = refusal(capsys, generate.main, "--model", folder, "--prompt", "a")
    assert "num_beams = 2" in line and "--batch-file" in line
    (tmp_path / "prompts.txt").write_text("a\n")
    flags = ["--model", str(folder), "--batch-file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "2"]
    assert generate.main(flags) == 0


def released(folder, change):
    """A released checkpoint with other weights."""
    shutil.copytree(GOLDEN / "mla", folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_proj.weight", "transformer.wte.weight"])
def test_conversion_names_weights_that_are_no_numbers(capsys, tmp_path, name):
    def spoil(state):
        for tied in {name, "lm_head.weight"} if "wte" in name else {name}:
            state[tied] = state[tied].clone()
            state[tied][2, 3] = float("nan")

    folder = released(tmp_path / "released", spoil)
    ours = EMBEDDING if "wte" in name else "model.layers.1.mlp.down_proj.weight"
    assert f"{ours} has 1 of " in refusal(capsys, convert_checkpoint.main, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert_checkpoint.main([str(folder), str(tmp_path / "out"), "--allow-nonfinite"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")[ours].isnan().sum() == 1


def test_conversion_of_an_index_that_is_none(capsys, tmp_path):
    shutil.copytree(GOLDEN / "mla", tmp_path / "released")
    weight_map = {"transformer.wte.weight": 7, "lm_head.weight": "pytorch_model.bin"}
    (tmp_path / "released" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    line = refusal(capsys, convert_checkpoint.main, tmp_path / "released", tmp_path / "out")
    assert "places transformer.wte.weight in 7, which is no file name" in line
