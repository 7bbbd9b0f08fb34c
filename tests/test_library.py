"""The versions of transformers: both names of the cache, no deprecation warning of ours, one file that knows them."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers

from modeling_mlra import (
    MLRACache,
    MLRAForCausalLM,
    MLRAForQuestionAnswering,
    MLRAForSequenceClassification,
    MLRAForTokenClassification,
    MLRAModel,
)
from modeling_mlra.library_mlra import cache_of, is_paged
from tests.models import VOCAB_SIZE, random_ids, tiny_model
from tests.paths import REPOSITORY

HEADS = [
    MLRAForCausalLM,
    MLRAForQuestionAnswering,
    MLRAForSequenceClassification,
    MLRAForTokenClassification,
    MLRAModel,
]


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_forward_takes_the_cache_by_either_name(model_class, name):
    model = tiny_model(model_class=model_class)
    ids = random_ids(1, 9)
    cache = MLRACache(model.config)
    with torch.no_grad():
        first = model(ids[:, :6], **{name: cache})
        assert cache.get_seq_length() == 6
        again = model(ids[:, 6:], **{name: cache})
        whole = model(ids)
    if model_class in (MLRAForCausalLM, MLRAModel):
        assert cache_of(first) is cache and cache_of(again) is cache
    last = again[0] if model_class is MLRAForSequenceClassification else again[0][:, -1]
    expected = whole[0] if model_class is MLRAForSequenceClassification else whole[0][:, -1]
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_layers_take_the_cache_by_either_name(name):
    """As other code calls them that runs the layers one by one."""
    model = tiny_model(model_class=MLRAModel)
    hidden = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    tables = model.rotary_emb(hidden, torch.arange(3)[None])
    for part in (model.layers[0], model.layers[0].self_attn):
        cache = MLRACache(model.config)
        part(hidden, position_embeddings=tables, **{name: cache})
        assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_takes_the_cache_by_either_name(name):
    model = tiny_model()
    ids = random_ids(1, 6)
    cache = MLRACache(model.config)
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, **{name: cache})
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_old_name_warns_where_llama_does(model_class, name):
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
    )
    warned = []
    for model in (llama, tiny_model(model_class=model_class)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(random_ids(1, 3), **{name: transformers.DynamicCache(config=model.config)})
        caught = [warning for warning in caught if "`past_key_values` is deprecated" in str(warning.message)]
        assert all(warning.category is FutureWarning for warning in caught)
        warned.append(bool(caught))
    assert warned[1] == warned[0]


def test_two_caches_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="give the cache once"):
        model(random_ids(1, 3), cache=MLRACache(model.config), past_key_values=MLRACache(model.config))


def test_outputs_carry_what_this_version_reads():
    model = tiny_model()
    outputs = model(random_ids(1, 3), use_cache=True)
    expected = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
    assert expected in outputs and isinstance(outputs[expected], MLRACache)
    assert isinstance(outputs.past_key_values, MLRACache), "readable until 5.40"


def test_paged_caches_are_told_apart_by_type():
    assert is_paged(object())
    assert not is_paged(None)
    assert not is_paged(MLRACache(tiny_model().config))
    with pytest.raises(ValueError, match="a tuple of keys and values is no cache"):
        tiny_model()(random_ids(1, 3), cache=((None, None),))


EVERY_CALL = """
import sys, torch, transformers
from transformers import DynamicCache, GenerationConfig, Trainer, TrainingArguments
from modeling_mlra import MLRACache, MLRAForCausalLM, MLRAForSequenceClassification
from modeling_mlra.library_mlra import CACHE
from tests.models import VOCAB_SIZE, random_ids, tiny_config
from tests.test_features_generation import batching_config

def make(model_class):
    if sys.argv[1] == "mlra":
        return model_class(tiny_config()).eval()
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "intermediate_size": 20}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"), None) | {"pad_token_id": 0}
    model_class = getattr(transformers, model_class.__name__.replace("MLRA", "Llama"))
    return model_class(transformers.LlamaConfig(**sizes, **tokens)).eval()

model, ids = make(MLRAForCausalLM), random_ids(2, 6)
cache = MLRACache(model.config) if sys.argv[1] == "mlra" else DynamicCache()
model(ids, **{CACHE: cache})
model(ids[:, :1], **{CACHE: cache})
model(ids, labels=ids, attention_mask=torch.ones_like(ids))
greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
for way in (
    {}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False},
    {"prefill_chunk_size": 3}, {"return_dict_in_generate": True, "output_scores": True}, {"do_sample": True},
):
    model.generate(ids, **{**greedy, **way})
model.generate(ids[:1], **greedy, prompt_lookup_num_tokens=2)
model.generate(ids[:1], **greedy, assistant_model=make(MLRAForCausalLM))
model.generate_batch(
    inputs=[ids[0].tolist()], generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0),
    continuous_batching_config=batching_config(page_size=4, num_blocks=16, max_batch_tokens=16), progress_bar=False,
)
make(MLRAForSequenceClassification)(ids)
rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 6)]
settings = TrainingArguments("OUT", max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
Trainer(model=model.train(), args=settings, train_dataset=rows, eval_dataset=rows).train()
print("all ran")
"""


def test_no_call_of_ours_is_deprecated(tmp_path):
    """Beside the same calls of Llama, which warn where the library calls itself by an old name."""
    code = EVERY_CALL.replace("OUT", str(tmp_path))
    warnings = {}
    for name in ("llama", "mlra"):
        result = subprocess.run(
            [sys.executable, "-W", "always", "-c", code, name],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONHASHSEED": "0"},
        )  # fmt: skip
        assert "all ran" in result.stdout, result.stderr[-3000:]
        lines = (result.stdout + result.stderr).splitlines()
        warnings[name] = {
            line for line in lines if re.search("deprecat|will be removed|removed in", line, re.IGNORECASE)
        }
    assert not warnings["mlra"] - warnings["llama"]


def test_one_file_knows_the_versions():
    """No other shipped file names a version of the library, or catches the want of a name in it."""
    for file in sorted((REPOSITORY / "modeling_mlra").glob("*.py")):
        if file.name == "library_mlra.py":
            continue
        text = file.read_text()
        assert not re.search(r"transformers (<|>|=|5\.)", text), file.name
        assert not re.search(r"try:\n\s+(from|import) transformers", text), file.name


def test_tested_versions_are_stated():
    """README and pyproject.toml name the oldest and the newest version that the tests run on."""
    pinned = re.search(r"^transformers==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    project = (REPOSITORY / "pyproject.toml").read_text()
    floor = re.search(r'"transformers>=([\d.]+)",  # tested up to ([\d.]+)', project)
    assert floor and floor[2] == pinned
    assert f"transformers {floor[1]} to {pinned}" in " ".join((REPOSITORY / "README.md").read_text().split())
