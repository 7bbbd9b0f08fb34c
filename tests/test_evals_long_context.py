"""Loss by position and copying, against plain loops and models made to be known."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals import long_context
from evals.corpora import read_token_file, token_file_header
from scripts import recipe as recipes
from tests.paths import DEMO, HELDOUT
from tests.training import LLAMA, MODEL


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs of two architectures, one with two seeds, and a token file."""
    root = tmp_path_factory.mktemp("runs")
    for seed, (name, fields) in enumerate({"mlra_seed0": MODEL, "mlra_seed1": MODEL, "llama_seed0": LLAMA}.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            recipes.model_config(fields | ({"qk_rope_head_dim": 32} if fields is MODEL else {}))
        )
        for parameter in model.parameters():  # with output projections at zero, positions would not matter
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name / "final")
    tokens = np.random.default_rng(0).integers(0, 299, 1300).astype("<u2")
    (root / "data.bin").write_bytes(token_file_header(len(tokens)) + tokens.tobytes())
    return root


def run(folders, output, *flags: str) -> dict:
    models = [str(folder) for folder in sorted(folders.glob("*/final"))]
    arguments = ["--models", *models, "--data", str(folders / "data.bin"), "--output", str(output), "--copies", "2"]
    assert long_context.main([*arguments, *flags]) == 0
    return json.loads(output.read_text())["results"]


def test_spans_double():
    assert long_context.spans(2048) == [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert long_context.spans(600) == [(0, 256), (256, 512), (512, 600)]
    assert long_context.spans(64) == [(0, 64)]


@pytest.mark.parametrize("factor", [None, 10.0])
def test_losses_are_those_of_a_plain_loop(factor, folders, tmp_path):
    """Beyond the context of 64, with and without YaRN: the library reads it from the saved configuration."""
    found = run(folders, tmp_path / "results.json", "--length", "600", *(["--yarn", str(factor)] if factor else []))
    assert set(found) == {"mlra_seed0", "mlra_seed1", "llama_seed0"}
    tokens = torch.from_numpy(read_token_file(folders / "data.bin").astype(np.int64))
    for name in ("mlra_seed1", "llama_seed0"):
        shutil.copytree(folders / name / "final", tmp_path / name)
        if factor:
            config = json.loads((tmp_path / name / "config.json").read_text())
            config["rope_parameters"] |= {"rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 64}
            config["max_position_embeddings"] = 640
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        losses = []
        for start in (0, 600):
            logits = model(tokens[None, start : start + 600]).logits[0].log_softmax(-1)
            losses.append([-logits[place, tokens[start + place + 1]].item() for place in range(600)])
        mean = np.mean(losses, axis=0)
        for (first, last, loss), (begin, end) in zip(
            found[name]["positions"], [(0, 256), (256, 512), (512, 600)], strict=True
        ):
            assert (first, last) == (begin, end) and loss == pytest.approx(mean[begin:end].mean(), abs=1e-4)
    table = (tmp_path / "results.md").read_text()
    two = [found[f"mlra_seed{seed}"]["positions"][2][2] for seed in (0, 1)]
    assert f" {np.mean(two):.4f} ± {np.std(two, ddof=1):.4f} " in table and "| llama" in table
    assert ("YaRN by 10" if factor else "as trained") in table


def test_yarn_changes_losses_and_reruns_go_on(folders, tmp_path, capsys):
    plain = run(folders, tmp_path / "plain.json", "--length", "64")
    other = run(folders, tmp_path / "yarn.json", "--length", "64", "--yarn", "4")
    for name in plain:
        assert plain[name]["positions"][0][2] != pytest.approx(other[name]["positions"][0][2], abs=1e-5)
        assert plain[name]["context"] == other[name]["context"] == 64 and set(plain[name]["copying"]) == {"16"}
    capsys.readouterr()
    assert run(folders, tmp_path / "plain.json", "--length", "64") == plain
    assert capsys.readouterr().err.count("already in") == 3


class Copier(torch.nn.Module):
    """Predicts what came `distance` tokens before the next one, surely."""

    def __init__(self, distance: int):
        super().__init__()
        self.distance = distance
        self.config = type("Config", (), {"vocab_size": 50})

    def forward(self, input_ids, use_cache):
        places = torch.arange(input_ids.shape[1]) + 1 - self.distance
        guess = input_ids[:, places.clamp(min=0)]
        return type("Output", (), {"logits": 100.0 * torch.nn.functional.one_hot(guess, 50)})


def test_copying_of_a_model_that_copies():
    perfect = long_context.copying(Copier(16), 16, 8, torch.device("cpu"))
    assert perfect == {"accuracy": 1.0, "loss": pytest.approx(0, abs=1e-6)}
    wrong = long_context.copying(Copier(15), 16, 8, torch.device("cpu"))
    assert wrong["accuracy"] < 0.2 and wrong["loss"] > 50


def test_last_words_are_those_of_a_plain_loop(tmp_path, monkeypatch):
    """Texts of different lengths in batches, words of several tokens and after two spaces."""
    texts = ["The function returns the number of elements", "It was the", "A dictionary of unquestionableness"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO), AutoTokenizer.from_pretrained(DEMO)
    greedy = model.generate(**tokenizer("It was the", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    texts += [tokenizer.decode(greedy[0]).rpartition(" ")[0].rstrip()]  # ends in what the model puts first
    texts += ["Two  spaces", *(f"{'of the ' * count}package" for count in range(1, 5))]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(long_context, "TEXTS_AT_ONCE", 3)
    flags = ["--models", str(DEMO), "--data", str(HELDOUT), "--length", "64", "--max-tokens", "64", "--copies", "1"]
    assert long_context.main([*flags, "--last-words", str(file), "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["results"][DEMO.name]["last_words"]
    right, losses, counts = [], [], []
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        given = len(tokenizer(text[: text.rstrip().rindex(" ")].rstrip())["input_ids"])
        logits = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        places = range(given, len(tokens))
        losses.append(-sum(logits[place - 1, tokens[place]].item() for place in places))
        right.append(all(logits[place - 1].argmax() == tokens[place] for place in places))
        counts.append(len(places))
    assert max(counts) > 2 and 0 < sum(right) < len(right)
    assert found["accuracy"] == sum(right) / len(texts)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=0.02)
    assert f" {100 * found['accuracy']:.2f} |" in (tmp_path / "found.md").read_text()


def test_refusals(folders, tmp_path, capsys):
    (tmp_path / "words.jsonl").write_text('{"text": "two words"}\n{"text": "one"}\n')
    one = str(folders / "llama_seed0/final")
    data = ["--data", str(folders / "data.bin")]
    for arguments, message in (
        (["--models", one, *data, "--length", "9000"], "shorter than a block of 9000"),
        (["--models", one, one, *data, "--length", "64"], "two of the models are called llama_seed0"),
        (["--models", one, "--data", str(tmp_path / "none.bin")], "no token file"),
        (["--models", "nowhere", *data], "no folder nowhere"),
        (["--models", one, *data, "--length", "64", "--last-words", str(tmp_path / "none")], "no file"),
        (
            ["--models", one, *data, "--length", "64", "--last-words", str(tmp_path / "words.jsonl")],
            "line 2 has no last",
        ),
        (["--models", one, *data, "--length", "64", "--last-words", str(folders / "data.bin")], "text"),
    ):
        assert long_context.main(arguments) == 2
        assert message in capsys.readouterr().err
