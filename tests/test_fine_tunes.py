"""A fine-tune's round trip as users do it: what it added and set survives an export, and generation stops alike."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modeling_mlra import MLRAForCausalLM
from scripts.export import export_model, suppressed_tokens
from scripts.export import main as export
from scripts.generate import main as generate
from tests.models import tiny_model
from tests.paths import DEMO
from tokenization.build import write_tokenizer

peft = pytest.importorskip("peft")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = json.loads((DEMO / "config.json").read_text())["vocab_size"]  # the last one ends a text
CHAT = [{"role": "user", "content": "How do I install it?"}]
LENGTH = 24
ISOLATED = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, chat, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0]
print(json.dumps({"prompt": inputs["input_ids"][0].tolist(), "ids": ids.tolist()}))
"""


def speak(model, ids: torch.Tensor, step: int, token: int) -> None:
    """Make `token` the likeliest after `step` more greedy tokens: its embedding becomes the hidden state there."""
    model.eval()
    with torch.no_grad():
        ids = model.generate(ids, max_new_tokens=step, do_sample=False, eos_token_id=None) if step else ids
        hidden = model.model(ids).last_hidden_state[0, -1]
        rows = model.get_input_embeddings().weight
        rows[token] = hidden * 1.02 * (rows @ hidden).max() / hidden.dot(hidden)  # just the likeliest, there


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The demo model with two tokens more, a merged adapter, a chat template and three end tokens, saved."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).merge_and_unload()
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids("<|im_start|>"), 11]
    speak(model, prompt["input_ids"], 7, end)
    model.config.eos_token_id = model.generation_config.eos_token_id = [WORDS - 1, end, 10]
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.generation_config.cache_implementation = "static"
    model.generation_config.temperature = 0.7  # without do_sample: loads, though it cannot be saved again
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False}))
    tokenizer.save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture(scope="module")
def answer(tuned):
    """(prompt, ids) before the export."""
    tokenizer, model = AutoTokenizer.from_pretrained(tuned), MLRAForCausalLM.from_pretrained(tuned)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0].tolist()
    return inputs["input_ids"][0].tolist(), ids


@pytest.fixture(scope="module")
def exported(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    assert export([str(tuned), str(folder)]) == 0
    return folder


def test_generation_stops_where_it_did(tuned, answer, exported, run_isolated):
    prompt, ids = answer
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<|im_end|>" and 1 < len(ids) - len(prompt) < LENGTH
    found = json.loads(run_isolated(ISOLATED, exported, json.dumps(CHAT), LENGTH))
    assert found == {"prompt": prompt, "ids": ids}


def test_chat_of_the_command_uses_the_template(capsys, tuned, answer, exported, tmp_path):
    prompt, ids = answer
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    reply = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    flags = ["--model", str(exported), "--max-new-tokens", str(LENGTH), "--dtype", "float32"]
    capsys.readouterr()
    assert generate([*flags, "--chat", "--prompt", CHAT[0]["content"]]) == 0
    assert capsys.readouterr().out == reply + "\n"
    (tmp_path / "prompts.txt").write_text(CHAT[0]["content"])
    assert generate([*flags, "--chat", "--batch-file", str(tmp_path / "prompts.txt")]) == 0
    assert json.loads(capsys.readouterr().out)["completion"] == reply
    assert generate([*flags, "--prompt", CHAT[0]["content"]]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith(CHAT[0]["content"]) and reply not in plain


def test_without_a_template_chat_continues_the_text(capsys):
    flags = ["--model", str(DEMO), "--max-new-tokens", "5", "--prompt", "The package"]
    assert generate(flags) == 0
    whole = capsys.readouterr().out
    assert generate([*flags, "--chat"]) == 0
    assert "The package" + capsys.readouterr().out == whole


def test_settings_and_tokenizer_files_survive(tuned, exported):
    own, kept = (json.loads((folder / "generation_config.json").read_text()) for folder in (tuned, exported))
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "cache_implementation", "temperature"):
        assert kept[name] == own[name], name
    assert kept["eos_token_id"] == [WORDS - 1, WORDS + 1, 10] and kept["cache_implementation"] == "static"
    assert kept["suppress_tokens"] == [11, WORDS]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tuned, exported)]
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "vocab_size"):
        assert configs[1][name] == configs[0][name], name
    code = {file.name for file in exported.glob("*.py")} | {"README.md"}
    assert {file.name for file in exported.iterdir()} - code == {file.name for file in tuned.iterdir()} - code
    for name in ("chat_template.jinja", "tokenizer.json", "additional_chat_templates/tools.jinja"):
        assert (exported / name).read_bytes() == (tuned / name).read_bytes()


def test_tokens_added_to_padding_rows_can_be_generated(tmp_path, run_isolated):
    """A vocabulary of 50,304 rows has 47 that only pad it; a fine-tune takes the first two for tokens of its own."""
    first = tiny_model(vocab_size=50304, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256)
    export_model(tmp_path / "first", first, provenance="Made for a test.")
    assert GenerationConfig.from_pretrained(tmp_path / "first").suppress_tokens == [*range(50257, 50304)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    model = MLRAForCausalLM.from_pretrained(tmp_path / "first")
    assert tokenizer.add_tokens(["<think>", "</think>"]) == 2
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    prompt = tokenizer(CHAT[0]["content"], return_tensors="pt")["input_ids"]
    speak(model, prompt, 0, 50258)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert export([str(tmp_path / "tuned"), str(tmp_path / "second")]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "second").suppress_tokens == [*range(50259, 50304)]
    found = json.loads(run_isolated(ISOLATED, tmp_path / "second", json.dumps(CHAT), 1))
    assert found["ids"] == [*prompt[0].tolist(), 50258]


def test_suppressed_tokens(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<a>", "<b>"])  # 50257 and 50258
    assert suppressed_tokens([], None, 50304) == [*range(50257, 50304)]
    assert suppressed_tokens([], tokenizer, 50259) is None
    assert suppressed_tokens([5, 50258], tokenizer, 50260) == [5, 50258, 50259]  # one of the two, on purpose
    assert suppressed_tokens([*range(50257, 50304)], tokenizer, 50304) == [*range(50259, 50304)]
    assert suppressed_tokens([7, *range(50257, 50304)], tokenizer, 50259) == [7]  # cut to the tokenizer's length


def test_tokens_outside_the_model_become_the_tokenizers(tmp_path):
    """A configuration's default names token 50256, whatever the size of the model."""
    shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((DEMO / "config.json").read_text()) | {"eos_token_id": 50256, "pad_token_id": 7}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [50256, 3], "top_k": 9}')
    assert export([str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    stored, settings = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert (stored["eos_token_id"], stored["pad_token_id"]) == (WORDS - 1, 7)
    assert settings["eos_token_id"] == WORDS - 1 and settings["top_k"] == 9 and settings.get("pad_token_id") is None
