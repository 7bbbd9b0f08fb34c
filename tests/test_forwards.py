"""Captured forwards: the library's own loops give the tokens they give without them."""

import pytest
import torch
from transformers import GenerationConfig

from modeling_mlra import MLRACache, forwards_mlra, generation_hooks_mlra, stepped_mlra
from tests.models import random_ids, rms_ratio, tiny_model
from tests.tolerances import FUSED_FLOAT32_RATIO

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted where there is no GPU
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
WAYS = {
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "beams, padded rows": {"num_beams": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True, "length_penalty": 0.7},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture
def replays(monkeypatch):
    """Captured forwards of float32 models, on a CPU too; the list of the shapes that were replayed."""

    def suits(model, cache, generation_config):
        return isinstance(cache, MLRACache) and not generation_config.disable_compile

    monkeypatch.setattr(forwards_mlra, "suits", suits)
    monkeypatch.setattr(generation_hooks_mlra, "can_capture", lambda *_: False)  # the loop of its own
    monkeypatch.setattr(forwards_mlra, "obstacle", lambda *_: None)
    monkeypatch.setattr(stepped_mlra, "STEPPED_DEVICES", ())  # outside of loops modules run
    seen = []
    own = forwards_mlra.VerifyingStep.__call__
    monkeypatch.setattr(
        forwards_mlra.VerifyingStep, "__call__", lambda self, *args: (seen.append(self.shape), own(self, *args))[1]
    )
    return seen


def small_model(seed: int = 0):
    """Logits scaled down, so that beams and samples have something to choose between."""
    model = tiny_model("mlra_4", num_hidden_layers=1, seed=seed).to(DEVICE)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.2)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_loops_of_the_library(way, replays):
    model = small_model()
    ids = random_ids(1, 4).repeat(1, 3) if way == "prompt lookup" else random_ids(1 + ("rows" in way), 7)
    ids = ids.to(DEVICE)
    if "rows" in way:
        ids[0, :3] = 0
    settings = {"attention_mask": (ids != 0).long(), "max_new_tokens": 5, "do_sample": False, **WAYS[way]}
    results = []
    for captured in (False, True):
        replays.clear()
        torch.manual_seed(0)
        results.append(model.generate(ids, disable_compile=not captured, pad_token_id=0, **settings))
        assert bool(replays) == captured
    assert torch.equal(*results)


@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_several_tokens(padded, replays):
    """One, three and two tokens at a time (padded to four), against a forward of all of them."""
    model = small_model()
    ids = random_ids(2, 12).to(DEVICE)
    ids[0, :3] = 0 if padded else ids[0, :3]
    mask = (ids != 0).long() if padded else None
    cache, logits, start = MLRACache(model.config), [], 0
    with torch.no_grad(), forwards_mlra.captured_forwards(model, cache, GenerationConfig(max_length=20)):
        for end in (6, 7, 10, 12):
            part = mask if mask is None else mask[:, :end]
            logits.append(model(ids[:, start:end], attention_mask=part, cache=cache).logits)
            start = end
    assert replays == [(2, 1), (2, 4), (2, 4)] and cache.get_seq_length() == 12
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
    assert rms_ratio(whole[:, 6:], torch.cat(logits, dim=1)[:, 6:]) < FUSED_FLOAT32_RATIO


class StepOfModules:
    """Stands for the fused step: takes as many tokens, which the modules compute."""

    made: list[tuple[int, int]]
    lengths: set[int]

    def __init__(self, model, cache, num_sequences, tokens_each, masked, siblings=None):
        self.model, self.cache, self.tokens_each = model, cache, tokens_each
        self.made.append((num_sequences, tokens_each))

    def __call__(self, token_ids, rows, position_ids, attention_mask):
        self.lengths.add(token_ids.shape[1])
        assert token_ids.shape[1] <= self.tokens_each and self.cache.get_seq_length() == rows
        active, forwards_mlra._active.forwards = forwards_mlra._active.forwards, ()
        try:
            return self.model(token_ids, attention_mask, position_ids, cache=self.cache).logits
        finally:
            forwards_mlra._active.forwards = active


def test_few_shapes_for_any_number_of_candidates(replays, monkeypatch):
    """Each shape compiles kernels of its own, for seconds; candidates come in every number."""
    made, lengths = [], set()
    monkeypatch.setattr(StepOfModules, "made", made, raising=False)
    monkeypatch.setattr(StepOfModules, "lengths", lengths, raising=False)
    monkeypatch.setattr(forwards_mlra, "VerifyingStep", StepOfModules)
    model = small_model()
    ids = random_ids(1, 9).repeat(1, 3).to(DEVICE)
    settings = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, disable_compile=True, **settings)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=20, **settings), expected)
    assert len(lengths) > 5 and max(lengths) > 16, lengths
    assert len(made) == len(set(made)) <= 4 and {tokens for _, tokens in made} <= {1, 4, 16, 32}


def test_a_narrow_mask_is_left_to_the_modules(replays):
    """What it lacks is padding."""
    model = small_model()
    ids, mask = random_ids(1, 9).to(DEVICE), torch.ones(1, 7, dtype=torch.long, device=DEVICE)
    logits = []
    for compiled in (True, False):
        cache, config = MLRACache(model.config), GenerationConfig(max_length=20, disable_compile=not compiled)
        with torch.no_grad(), forwards_mlra.captured_forwards(model, cache, config):
            model(ids[:, :8], cache=cache)
            logits.append(model(ids[:, 8:], attention_mask=mask, cache=cache).logits)
    assert torch.equal(*logits) and not replays


def test_assisted_generation(replays):
    """A target that verifies and an assistant that drafts, each over its own cache."""
    model, assistant = small_model(), small_model()
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn(assistant.lm_head.weight.shape).to(DEVICE), alpha=0.1)
    ids = random_ids(1, 6).to(DEVICE)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, disable_compile=True)
    assert not replays
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, assistant_model=assistant)
    assert torch.equal(tokens, expected)
    assert {shape[1] == 1 for shape in replays} == {True, False}, "single tokens are drafted, several verified"


def test_a_cache_that_is_given_and_outgrown(replays, monkeypatch):
    """Rows that move while a loop runs, in a cache that is used before and after."""
    monkeypatch.setattr(forwards_mlra, "GROWTH", 0)
    monkeypatch.setattr(forwards_mlra, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(forwards_mlra, "MAX_SEQUENCES", 4)
    model = small_model()
    cache = MLRACache(model.config)
    ids = random_ids(1, 4).repeat(1, 3).to(DEVICE)
    settings = {"do_sample": False, "max_new_tokens": 6}
    first = model.generate(ids, cache=cache, prompt_lookup_num_tokens=2, **settings)
    assert {rows.shape[2] for rows in (layer.rows for layer in cache.layers)} != {4}
    second = model.generate(first, cache=cache, **settings)
    third = model.generate(second, cache=cache, disable_compile=True, **settings)
    assert replays
    settings["max_new_tokens"] = 18
    assert torch.equal(third, model.generate(ids, use_cache=False, **settings))


def test_what_is_recorded_is_not_captured(replays):
    model = small_model()
    ids = random_ids(1, 6).to(DEVICE)
    out = model.generate(
        ids, max_new_tokens=3, num_beams=2, output_hidden_states=True, return_dict_in_generate=True, pad_token_id=0
    )
    assert len(out.hidden_states) == 3 and not replays
