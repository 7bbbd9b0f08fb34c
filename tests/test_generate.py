"""generate(): every way of decoding gives the tokens of repeated full forwards of each row alone."""

from functools import partial

import pytest
import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
)

import modeling_mlra.modeling_mlra
from modeling_mlra import MLRACache, generation_mlra
from modeling_mlra.generation_mlra import DecodingStep, captured_decode, captured_decodes, choice_of_logits_alone
from modeling_mlra.kernels_mlra import decode_calls
from modeling_mlra.library_mlra import cache_of
from tests.models import VARIANTS, random_ids, tiny_model

NEW_TOKENS = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for the fused step: its kernels, or their interpreter
ON_A_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []


def padded_batch(model):
    """Ids and mask of three left-padded rows, and the greedy continuation of each row alone without any cache."""
    ids, lengths = random_ids(3, 9), (5, 8, 9)
    mask = torch.zeros_like(ids)
    expected = []
    for row, length in enumerate(lengths):
        mask[row, 9 - length :] = 1
        ids[row, : 9 - length] = 0
        sequence = ids[row : row + 1, 9 - length :]
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                following = model(sequence, use_cache=False).logits[:, -1:].argmax(-1)
            sequence = torch.cat([sequence, following], dim=1)
        expected.append(sequence[0, length:])
    return ids, mask, torch.stack(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_on_a_left_padded_batch(variant):
    model = tiny_model(variant, attn_output_gate=variant == "mlra_4")
    ids, mask, expected = padded_batch(model)
    assert len({tuple(row.tolist()) for row in expected}) == 3
    ways = {
        "default": {},
        "static": {"cache_implementation": "static"},
        "library dynamic": {"cache": DynamicCache(config=model.config)},
        "library static": {"cache": StaticCache(model.config, max_cache_len=30)},
        "given latent static": {"cache": MLRACache(model.config, max_cache_len=30)},
        "no cache": {"use_cache": False},
        "chunked prefill": {"prefill_chunk_size": 4},
        "chunked prefill, static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    }
    for name, settings in ways.items():
        before = decode_calls["torch"]
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
        assert torch.equal(tokens[:, 9:], expected), name
        absorbed_calls = decode_calls["torch"] - before
        if name == "no cache":
            assert absorbed_calls == 0
        else:
            assert absorbed_calls >= 2 * (NEW_TOKENS - 1), f"{name}: decoding did not run the absorbed form"


def test_default_cache_is_the_latent_one():
    model = tiny_model()
    for settings, is_static in (({}, False), ({"cache_implementation": "static"}, True)):
        out = model.generate(random_ids(1, 5), max_new_tokens=4, return_dict_in_generate=True, **settings)
        assert isinstance(cache_of(out), MLRACache)
        assert cache_of(out).is_compileable == is_static
        assert int(cache_of(out).get_seq_length()) == 5 + 4 - 1
    assert isinstance(cache_of(model(random_ids(1, 5), use_cache=True)), MLRACache)


def test_continuing_from_a_cache():
    model = tiny_model()
    ids, _, expected = padded_batch(model)
    cache = MLRACache(model.config)
    first = model.generate(ids[2:], max_new_tokens=5, do_sample=False, cache=cache)
    second = model.generate(first, max_new_tokens=NEW_TOKENS - 5, do_sample=False, cache=cache)
    assert torch.equal(second[0, 9:], expected[2])


def test_padded_vocabulary_is_never_generated():
    """ids beyond the tokenizer's are suppressed through the generation config, greedy and sampling alike."""
    model = tiny_model()
    model.generation_config = GenerationConfig(suppress_tokens=list(range(40, 61)), pad_token_id=0)
    with torch.no_grad():
        model.lm_head.weight[40:] *= 5  # without suppression these win
    assert (model.generate(random_ids(2, 5), max_new_tokens=20, do_sample=False)[:, 5:] < 40).all()
    torch.manual_seed(0)
    assert (model.generate(random_ids(2, 5), max_new_tokens=20, do_sample=True)[:, 5:] < 40).all()


def captured(model, ids, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "cache_implementation": "static", **settings}
    return model.generate(ids, custom_generate=captured_decode, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("recorded", "lag", "kind"),
    [
        *((recorded, lag, "modules") for recorded in (False, True) for lag in (0, 3)),
        pytest.param(False, 3, "fused", marks=ON_A_GPU),
    ],
)
def test_captured_loop_equals_the_library_loop(recorded, lag, kind, do_sample, monkeypatch):
    """Tokens, scores, streamed tokens, cache length and random state, with rows that end early and late.

    `recorded`: with scores and a penalty that reads the sequence, so that tokens are chosen outside the graph. `kind`:
    the model's modules, or the fused step, interpreted, which also chooses the tokens.
    """
    monkeypatch.setattr(generation_mlra, "runs_fused", lambda *_: kind == "fused")

    class Recorder:
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen.append(tokens.flatten().tolist())

        def end(self):
            self.seen.append("end")

    device, small = ("cpu", {}) if kind == "modules" else (DEVICE, {"num_hidden_layers": 1})
    model = tiny_model("mlra_4", **small)
    ids, mask, _ = padded_batch(model)
    model, ids, mask = model.to(device), ids.to(device), mask.to(device)
    new_tokens = NEW_TOKENS if kind == "modules" else 6
    settings = {"do_sample": do_sample, "attention_mask": mask, "pad_token_id": 0, "max_new_tokens": new_tokens}
    settings |= {"temperature": 0.7 if do_sample else None, "suppress_tokens": [3]}
    settings |= {"output_scores": True, "repetition_penalty": 1.3} if recorded else {}
    for row, eos in ((slice(0, 3), None), (slice(2, 3), "fourth"), (slice(0, 3), "several")):
        part, settings["attention_mask"] = ids[row], mask[row]
        torch.manual_seed(0)
        free = model.generate(part, cache_implementation="static", return_dict_in_generate=True, **settings)
        if eos == "fourth":
            eos = free.sequences[0, part.shape[1] + 3].item()
        elif eos == "several":
            eos = free.sequences[:, part.shape[1] + 3].tolist()
        results = []
        for takes_over in (False, True):  # on a GPU it takes over by itself
            monkeypatch.setattr(modeling_mlra.modeling_mlra, "can_capture", lambda *_, takes=takes_over: takes)
            monkeypatch.setattr(modeling_mlra.modeling_mlra, "captured_decode", partial(captured_decode, lag=lag))
            before = captured_decodes[kind]
            torch.manual_seed(0)
            streamer = Recorder() if part.shape[0] == 1 else None
            out = model.generate(
                part, cache_implementation="static", return_dict_in_generate=True, eos_token_id=eos,
                streamer=streamer, **settings,
            )  # fmt: skip
            assert captured_decodes[kind] - before == takes_over
            results.append((out, streamer and streamer.seen, torch.rand(1, device=device)))
        (library, library_stream, library_random), (ours, our_stream, our_random) = results
        assert torch.equal(ours.sequences, library.sequences)
        assert our_stream == library_stream
        assert torch.equal(our_random, library_random), "the random state is that of the tokens kept"
        assert int(cache_of(ours).get_seq_length()) == int(cache_of(library).get_seq_length())
        for our_scores, library_scores in zip(ours.scores or (), library.scores or (), strict=True):
            torch.testing.assert_close(our_scores, library_scores, rtol=1e-4, atol=1e-4)


def test_only_what_reads_logits_alone_is_chosen_inside_the_graph():
    length, device = MaxLengthCriteria(9), torch.device("cpu")
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor([1, 3], device=device), TopKLogitsWarper(2)])
    (suppress, top_k), ends = choice_of_logits_alone(processors, [length, EosTokenCriteria([2, 4])], 5, device)
    scores = torch.tensor([[1.0, 9.0, 2.0, 8.0, 3.0]])
    assert torch.equal(top_k(suppress(scores)), processors(None, scores))
    assert ends.tolist() == [2, 4]
    assert choice_of_logits_alone([], [length], 5, device)[1].tolist() == []
    assert choice_of_logits_alone([RepetitionPenaltyLogitsProcessor(1.3)], [length], 5, device) is None
    assert choice_of_logits_alone([], [length, lambda ids, _: ids[:, 0] == 1], 5, device) is None


def test_captured_loop_continues_from_its_cache():
    model = tiny_model("gla_2")
    ids, _, expected = padded_batch(model)
    cache = MLRACache(model.config, max_cache_len=40)
    settings = {"do_sample": False, "cache": cache, "cache_implementation": None}
    first = captured(model, ids[2:], max_new_tokens=5, **settings)
    second = captured(model, first.sequences, max_new_tokens=NEW_TOKENS - 5, **settings)
    assert torch.equal(second.sequences[0, 9:], expected[2])


def test_a_mask_of_ones_costs_nothing():
    model = tiny_model()
    ids, mask, _ = padded_batch(model)
    cache = MLRACache(model.config, max_cache_len=20)
    with torch.no_grad():
        model(ids, cache=cache)
    positions = torch.full((3,), 9)
    assert DecodingStep(model, cache, positions, torch.ones_like(mask)).key_mask is None
    assert DecodingStep(model, cache, positions, mask).key_mask.shape == (3, 20)


def test_captured_loop_says_what_it_needs():
    model = tiny_model()
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        captured(model, random_ids(1, 4), cache_implementation=None)
