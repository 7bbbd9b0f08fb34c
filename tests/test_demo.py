"""The demo checkpoint: its card's perplexity, its text, and what only a model with real statistics can show."""

import copy
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantizedCache, QuantoConfig
from transformers.utils import is_bitsandbytes_available, is_optimum_quanto_available

from evals.corpora import read_token_file
from evals.downstream import main as downstream
from evals.perplexity import main as perplexity
from modeling_mlra import MLRAForCausalLM
from modeling_mlra.library_mlra import cache_of
from scripts import finetune_lora, generate
from tests.paths import DEMO, HELDOUT, REPOSITORY
from tests.tolerances import DEMO_LAST_WORDS_RTOL, DEMO_PERPLEXITY_RTOL

BLOCK = json.loads((DEMO / "config.json").read_text())["max_position_embeddings"]
SAMPLE = ("openbookqa", "hellaswag", "lambada_openai")
LINES = REPOSITORY / "configuration" / "training" / "devils_dictionary.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> MLRAForCausalLM:
    return MLRAForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    """Blocks of held-out text, 2,048 tokens together, `[…, BLOCK]`."""
    return torch.from_numpy(read_token_file(HELDOUT)[:2048].astype("int64")).view(-1, BLOCK)


@torch.no_grad()
def loss(model, blocks: torch.Tensor, **settings) -> float:
    return model(blocks, labels=blocks, use_cache=False, **settings).loss.item()


# The card


def test_perplexity_is_that_of_the_card(tmp_path):
    output = tmp_path / "perplexity.json"
    assert perplexity(["--model", str(DEMO), "--data", str(HELDOUT), "--output", str(output)]) == 0
    measured = json.loads(output.read_text())["results"][HELDOUT.stem]
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    sentence = rf"`{HELDOUT.stem}` \(([\d,]+) predicted, blocks of {BLOCK}\): ([\d.]+),"
    tokens, stated = re.search(sentence, card).groups()
    assert int(tokens.replace(",", "")) == measured["tokens"] == 8192
    assert measured["perplexity"] == pytest.approx(float(stated), rel=DEMO_PERPLEXITY_RTOL)


def test_zero_shot_figures_of_the_sample(tmp_path):
    """Those of the results file, for 60 questions of three tasks; a near tie may fall the other way."""
    pytest.importorskip("lm_eval")
    output = tmp_path / "sample.json"
    arguments = ["--model", str(DEMO), "--local", "evals/sample", "--tasks", *SAMPLE, "--batch-size", "16"]
    assert downstream([*arguments, "--output", str(output)]) == 0
    measured, stated = (
        json.loads(file.read_text()) for file in (output, REPOSITORY / "evals" / "results" / "sample_demo.json")
    )
    assert measured["settings"] == stated["settings"]  # the same weights
    for name in SAMPLE:
        (found,), (expected,) = (content["results"][name].values() for content in (measured, stated))
        assert found["samples"] == expected["samples"] == 60
        for metric, value in expected["metrics"].items():
            tolerance = {"rel": DEMO_LAST_WORDS_RTOL} if metric == "perplexity" else {"abs": 1.01 / 60}
            assert found["metrics"][metric]["value"] == pytest.approx(value["value"], **tolerance), (name, metric)


def test_folder_is_plain_and_small():
    """Configuration, weights, tokenizer and card: the code comes from the package."""
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in DEMO.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    assert "auto_map" not in json.loads((DEMO / "config.json").read_text())
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 24e6
    assert MLRAForCausalLM.from_pretrained(DEMO).dtype == torch.bfloat16


# Its text


def test_sentences_of_english_words(tmp_path, capsys):
    """What it makes up has the words of prose, many of them, and does not go round in circles."""
    heads = [
        "It was a dark night, and the old man",
        "The captain looked at the sea, and",
        "When the morning came, the",
    ]
    heads += [
        "“I do not know,” said the young lady,",
        "In the year after the war, the king",
        "She opened the letter and",
    ]
    (tmp_path / "heads").write_text("\n".join(heads), encoding="utf-8")
    flags = ["--batch-file", str(tmp_path / "heads"), "--max-new-tokens", "80", "--temperature", "0.7", "--seed", "1"]
    assert generate.main(["--model", str(DEMO), *flags]) == 0
    texts = [json.loads(line)["completion"].lower() for line in capsys.readouterr().out.splitlines()]
    words = [re.findall(r"[a-z]{2,}", text) for text in texts]
    vocabulary = json.loads((REPOSITORY / "tokenization" / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    common = {
        token[1:].lower() for token in vocabulary if token.startswith("Ġ")
    }  # of GPT-2, which learned from the web
    every = sum(words, [])
    assert len(every) > 40 * len(heads) and len(set(every)) > 120, texts
    assert sum(word in common for word in every) > 0.95 * len(every), texts
    triples = [triple for found in words for triple in zip(found, found[1:], found[2:], strict=False)]
    assert len(set(triples)) > 0.75 * len(triples), texts
    assert sum(bool({"he", "she", "his", "her", "they"} & set(found)) for found in words) > len(heads) / 2, texts


def test_order_of_the_context_matters(model, blocks):
    """Far more than the frequencies of tokens has been learned."""
    shuffled = blocks[:, torch.randperm(BLOCK, generator=torch.Generator().manual_seed(0))]
    assert loss(model, shuffled) > loss(model, blocks) + 2


# What rounding, quantization, speculation and long contexts do to a trained model


def test_every_branch_is_used(model, blocks):
    exact = loss(model, blocks)
    for latent in range(model.config.num_latent_heads):
        cut = copy.deepcopy(model)
        width = model.config.latent_head_dim
        with torch.no_grad():
            for layer in cut.model.layers:
                layer.self_attn.kv_a_proj.weight[latent * width : (latent + 1) * width] = 0
        assert loss(cut, blocks) > exact + 0.1, latent


def test_rounding_of_weights(model, blocks):
    rounded = MLRAForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    assert loss(rounded, blocks[:1]) == pytest.approx(loss(model, blocks[:1]), abs=0.01)


@pytest.mark.parametrize(
    ("library", "bits", "cost"), [("bitsandbytes", 8, 0.03), ("quanto", 8, 0.03), ("quanto", 4, 0.3)]
)
def test_quantized_weights(library, bits, cost, model, blocks):
    """Nats per token that quantization costs, at most."""
    if not (is_bitsandbytes_available() if library == "bitsandbytes" else is_optimum_quanto_available()):
        pytest.skip(f"{library} is not installed")
    settings = QuantoConfig(weights=f"int{bits}") if library == "quanto" else BitsAndBytesConfig(load_in_8bit=True)
    small = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    assert 0 < abs(loss(small, blocks[:1]) - loss(model, blocks[:1])) < cost


def test_quantized_cache(model, blocks):
    """The second half of a block after the first, cached in 4 bits."""
    if not is_optimum_quanto_available():
        pytest.skip("the library's quantized cache needs optimum-quanto or hqq")
    first, second = blocks[:, : BLOCK // 2], blocks[:, BLOCK // 2 :]
    losses = {}
    for name, settings in {"exact": None, "4 bit": {"backend": "quanto", "nbits": 4, "q_group_size": 16}}.items():
        cache = settings and QuantizedCache(config=model.config, residual_length=1, **settings)
        with torch.no_grad():
            cache = cache_of(model(first, cache=cache, use_cache=True))
            losses[name] = model(second, labels=second, cache=cache).loss.item()
            losses["nothing"] = loss(model, second)
    assert 0 < abs(losses["4 bit"] - losses["exact"]) < (losses["nothing"] - losses["exact"]) / 3


def test_speculation_saves_forwards(model, tokenizer):
    """Text that repeats itself is looked up in the prompt: same tokens in fewer forwards."""
    text = "The function returns the number of elements in the list. " * 3 + "The function returns"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    tokens = model.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=5)
    handle.remove()
    assert torch.equal(tokens, expected)
    assert len(forwards) < 0.7 * (expected.shape[1] - ids.shape[1])


def test_yarn_reads_beyond_the_trained_context(blocks):
    """Twice the trained context: YaRN loses less than plain extrapolation on the second half."""
    text = blocks.view(-1, 2 * BLOCK)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": BLOCK, "rope_theta": 10000.0}
    changes = {"plain": {}, "yarn": {"rope_parameters": yarn, "max_position_embeddings": 2 * BLOCK}}
    losses = {}
    for name, changed in changes.items():
        model = MLRAForCausalLM.from_pretrained(DEMO, dtype=torch.float32, **changed)
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[:, BLOCK:-1]
        losses[name] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, BLOCK + 1 :].flatten()).item()
    assert losses["yarn"] < losses["plain"] - 0.02


# Fine-tuning


def test_lora_on_the_lines_of_the_example(tmp_path, capsys):
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(LINES.read_text().splitlines(keepends=True)[:120]))
    arguments = ["--model", str(DEMO), "--data", str(lines), "--output", str(tmp_path / "adapter"), "--steps", "12"]
    arguments += ["--block-size", "96", "--batch-size", "4", "--prompt", "LAWYER, n."]
    assert finetune_lora.main(arguments) == 0
    result = json.loads((tmp_path / "adapter" / finetune_lora.RESULT_FILE).read_text())
    assert result["after"]["held out"] < result["before"]["held out"] - 0.2
    printed = capsys.readouterr().out
    assert result["continuation"]["before"] != result["continuation"]["after"]
    assert all(" ".join(text.split()) in printed for text in result["continuation"].values())
