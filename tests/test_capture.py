"""The captured decoding loop: that of the library token for token, on every cache, again and again."""

import gc
import weakref
from functools import partial

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
)

from modeling_mlra import MLRACache, capture_mlra, capture_step_mlra, generation_hooks_mlra, generation_mlra
from modeling_mlra.capture_choice_mlra import choice_of_logits_alone
from modeling_mlra.capture_mlra import Replay, fingerprint, size_class
from modeling_mlra.generation_mlra import captured_decode, captured_decodes
from modeling_mlra.library_mlra import CACHE, cache_of
from tests.models import padded_batch, random_ids, tiny_model

NEW_TOKENS = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for the fused step: its kernels, or their interpreter
ON_A_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []


def on_a_gpu(test):
    """Marks a test that runs on the GPU where there is one."""
    return pytest.mark.gpu(test) if ON_A_GPU else test


def captured(model, ids, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "cache_implementation": "static", **settings}
    return model.generate(ids, custom_generate=captured_decode, return_dict_in_generate=True, **settings)


@pytest.fixture
def fused(monkeypatch):
    """The fused step in float32, its kernels interpreted where there is no GPU, and the loop as on a GPU."""
    monkeypatch.setattr(capture_step_mlra, "runs_fused", lambda *_: True)
    monkeypatch.setattr(generation_hooks_mlra, "can_capture", can_capture_anywhere)


def can_capture_anywhere(model, input_ids, generation_config, model_kwargs, synced_gpus) -> bool:
    """As `can_capture`, with or without a GPU."""
    return not generation_config.disable_compile and isinstance(model_kwargs.get(CACHE), MLRACache)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("recorded", "lag", "kind", "implementation"),
    [
        *((recorded, 3, "modules", "static") for recorded in (False, True)),
        *((recorded, lag, "modules", None) for recorded in (False, True) for lag in (0, 3)),
        pytest.param(False, 3, "fused", "static", marks=ON_A_GPU),
        pytest.param(False, 3, "fused", None, marks=ON_A_GPU),
    ],
)
def test_captured_loop_equals_the_library_loop(recorded, lag, kind, implementation, do_sample, monkeypatch):
    """Tokens, scores, streamed tokens, cache length and random state, with rows that end early and late.

    `recorded`: with scores and a penalty that reads the sequence, so that tokens are chosen outside the graph. `kind`:
    the model's modules, or the fused step, interpreted, which also chooses the tokens.
    """
    monkeypatch.setattr(capture_step_mlra, "runs_fused", lambda *_: kind == "fused")

    class Recorder:
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen.append(tokens.flatten().tolist())

        def end(self):
            self.seen.append("end")

    device, small = ("cpu", {}) if kind == "modules" else (DEVICE, {"num_hidden_layers": 1})
    model = tiny_model("mlra_4", **small)
    ids, mask, _ = padded_batch(model, NEW_TOKENS)
    model, ids, mask = model.to(device), ids.to(device), mask.to(device)
    new_tokens = NEW_TOKENS if kind == "modules" else 6
    settings = {"do_sample": do_sample, "attention_mask": mask, "pad_token_id": 0, "max_new_tokens": new_tokens}
    settings |= {"temperature": 0.7 if do_sample else None, "suppress_tokens": [3]}
    settings |= {"output_scores": True, "repetition_penalty": 1.3} if recorded else {}
    for row, eos in ((slice(0, 3), None), (slice(2, 3), "fourth"), (slice(0, 3), "several")):
        part, settings["attention_mask"] = ids[row], mask[row]
        monkeypatch.setattr(generation_hooks_mlra, "can_capture", lambda *_: False)
        torch.manual_seed(0)
        free = model.generate(part, use_cache=False, return_dict_in_generate=True, **settings)
        if eos == "fourth":
            eos = free.sequences[0, part.shape[1] + 3].item()
        elif eos == "several":
            eos = free.sequences[:, part.shape[1] + 3].tolist()
        results = []
        for takes_over in (False, True):  # on a GPU it takes over by itself
            monkeypatch.setattr(generation_hooks_mlra, "can_capture", lambda *_, takes=takes_over: takes)
            monkeypatch.setattr(generation_hooks_mlra, "captured_decode", partial(captured_decode, lag=lag))
            before = captured_decodes[kind]
            torch.manual_seed(0)
            streamer = Recorder() if part.shape[0] == 1 else None
            out = model.generate(
                part, cache_implementation=implementation, return_dict_in_generate=True, eos_token_id=eos,
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
    choice = choice_of_logits_alone(processors, [length, EosTokenCriteria([2, 4])], 5, device)
    suppress, top_k = choice.processors
    scores = torch.tensor([[1.0, 9.0, 2.0, 8.0, 3.0]])
    assert torch.equal(top_k(suppress(scores)), processors(None, scores))
    assert choice.ends.tolist() == [2, 4, *[-1] * 6]
    assert set(choice_of_logits_alone([], [length], 5, device).ends.tolist()) == {-1}
    keys = [choice_of_logits_alone(p, [length], 5, device).key for p in (processors, [TopKLogitsWarper(3)], [])]
    assert len(set(keys)) == 3
    assert choice_of_logits_alone([RepetitionPenaltyLogitsProcessor(1.3)], [length], 5, device) is None
    assert choice_of_logits_alone([], [length, lambda ids, _: ids[:, 0] == 1], 5, device) is None


@pytest.mark.parametrize("room", [40, None], ids=["static", "growing"])
def test_captured_loop_continues_from_its_cache(room):
    model = tiny_model("gla_2")
    ids, _, expected = padded_batch(model, NEW_TOKENS)
    cache = MLRACache(model.config, max_cache_len=room)
    settings = {"do_sample": False, "cache": cache, "cache_implementation": None}
    first = captured(model, ids[2:], max_new_tokens=5, **settings)
    second = captured(model, first.sequences, max_new_tokens=3, **settings)
    third = model.generate(second.sequences, max_new_tokens=NEW_TOKENS - 8, do_sample=False, cache=cache)
    assert torch.equal(third[0, 9:], expected[2])
    assert int(cache.get_seq_length()) == 9 + NEW_TOKENS - 1


def test_captured_loop_says_what_it_needs():
    model = tiny_model()
    with pytest.raises(ValueError, match="needs the latent cache"):
        captured(model, random_ids(1, 4), cache_implementation=None, use_cache=False)
    with pytest.raises(ValueError, match="holds 6 tokens, the call may need 15"):
        captured(model, random_ids(1, 4), cache_implementation=None, cache=MLRACache(model.config, max_cache_len=6))


@pytest.mark.parametrize("vocab_size", [61, 1 << 13, 8200])
@pytest.mark.parametrize("kept", [1, 7, 50])
def test_top_k_is_that_of_the_library(vocab_size, kept):
    """Ties, rows with fewer finite scores than are kept and rows of one score included."""
    scores = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(0))
    scores[1] = scores[1].round()
    scores[2, 3:] = -torch.inf
    scores[3] = 0.5
    scores[4, 40:60] = 9.0  # all in one part of the row
    warper = TopKLogitsWarper(kept)
    choice = choice_of_logits_alone(LogitsProcessorList([warper]), [], vocab_size, scores.device)
    (found,) = (processor(scores) for processor in choice.processors)
    assert torch.equal(found, warper(None, scores.clone()))


def test_size_classes():
    assert [size_class(size, 16) for size in (0, 16, 17, 24, 25, 33, 49, 65)] == [16, 16, 24, 24, 32, 48, 64, 96]
    for size in range(1, 5000, 7):
        assert size <= size_class(size, 256) <= max(256, size * 3 / 2)


@pytest.mark.parametrize("kind", ["modules", pytest.param("fused", marks=ON_A_GPU)])
def test_reserved_rows_grow_when_they_are_full(kind, monkeypatch):
    """In the middle of a call, left-padded rows and all."""
    monkeypatch.setattr(capture_step_mlra, "runs_fused", lambda *_: kind == "fused")
    monkeypatch.setattr(generation_mlra, "GROWTH", 2)
    monkeypatch.setattr(generation_mlra, "FIRST_CAPACITY", 4)
    model = tiny_model("mlra_2", num_hidden_layers=1)
    ids, mask, expected = padded_batch(model, NEW_TOKENS)
    model, ids, mask = (x.to(DEVICE if kind == "fused" else "cpu") for x in (model, ids, mask))
    before = captured_decodes[kind]
    out = captured(model, ids, attention_mask=mask, do_sample=False, cache_implementation=None)
    assert captured_decodes[kind] - before > 1
    assert torch.equal(out.sequences[:, 9:].cpu(), expected)
    assert cache_of(out).layers[0].rows.shape[2] >= 9 + NEW_TOKENS - 1


class Counted:
    """How often each kind of graph was made: those of steps and choices, and those of prompts."""

    def __init__(self, monkeypatch):
        self.steps, self.prompts = [], []
        for name, made in (("DecodingStep", self.steps), ("CapturedPrefill", self.prompts)):
            kind = getattr(generation_mlra, name)
            counting = type(name, (kind,), {"__init__": self.counting(kind, made)})
            monkeypatch.setattr(generation_mlra, name, counting)

    def counting(self, kind, made):
        def __init__(self, *args, **kwargs):
            made.append(weakref.ref(self))
            kind.__init__(self, *args, **kwargs)

        return __init__


@on_a_gpu
def test_later_calls_use_the_graphs_of_earlier_ones(fused, monkeypatch):
    """Other lengths, end tokens and prompts of the same classes; weights changed in place; each call right."""
    model = tiny_model("mlra_4", num_hidden_layers=1)
    expected_of = {}
    for length, new_tokens in ((5, 4), (7, 6), (9, 3)):
        ids = random_ids(1, length, seed=length)
        expected_of[length] = ids, model.generate(ids, max_new_tokens=new_tokens, do_sample=False, use_cache=False)
    model = model.to(DEVICE)
    made = Counted(monkeypatch)
    for _ in range(2):
        for ids, expected in expected_of.values():
            end = expected[0, ids.shape[1] + 1].item()
            settings = {"max_new_tokens": expected.shape[1] - ids.shape[1], "do_sample": False, "pad_token_id": 0}
            assert torch.equal(model.generate(ids.to(DEVICE), **settings).cpu(), expected)
            ended = model.generate(ids.to(DEVICE), eos_token_id=end, **settings).cpu()
            length = ids.shape[1] + 1 + expected[0, ids.shape[1] :].tolist().index(end)
            assert torch.equal(ended, expected[:, :length])
    assert (len(made.steps), len(made.prompts)) == (1, 1)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    ids = expected_of[7][0].to(DEVICE)
    changed = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(changed, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    assert not torch.equal(changed[:, 7:].cpu(), expected_of[7][1][:, 7:11])
    assert len(made.steps) == 1


@on_a_gpu
def test_a_cache_that_is_asked_for_leaves_with_its_graphs(fused, monkeypatch):
    model = tiny_model("mlra_4", num_hidden_layers=1).to(DEVICE)
    ids = random_ids(1, 5).to(DEVICE)
    made = Counted(monkeypatch)
    settings = {"max_new_tokens": 4, "do_sample": False}
    first, second = (model.generate(ids, return_dict_in_generate=True, **settings) for _ in range(2))
    assert cache_of(first) is not cache_of(second) and len(made.steps) == 2
    rows = [layer.rows[:, :, :8].clone() for layer in cache_of(first).layers]
    model.generate(ids, **settings)
    assert all(torch.equal(a, b.rows[:, :, :8]) for a, b in zip(rows, cache_of(first).layers, strict=True))
    longer = model.generate(first.sequences, cache=cache_of(first), **settings)
    assert torch.equal(longer, model.generate(first.sequences, use_cache=False, **settings))
    assert len(made.steps) == 3, "the turn that goes on uses the step of the first"


@on_a_gpu
def test_what_is_kept_is_freed_with_the_model_and_bounded(fused, monkeypatch):
    model = tiny_model("mlra_4", num_hidden_layers=1).to(DEVICE)
    made = Counted(monkeypatch)
    for batch in (1, 2, 3):
        model.generate(random_ids(batch, 5).to(DEVICE), max_new_tokens=3, do_sample=False)
    waiting = capture_mlra._spare[model]
    assert [cache.layers[0].rows.shape[0] for cache in waiting] == [1, 2, 3]
    most = sum(cache.nbytes for cache in waiting[1:])
    monkeypatch.setattr(capture_mlra, "spare_bytes", lambda _: most)
    model.generate(random_ids(1, 5).to(DEVICE), max_new_tokens=3, do_sample=False)
    assert [cache.layers[0].rows.shape[0] for cache in waiting] == [3, 1], "the one not used for longest is gone"
    rows = [weakref.ref(cache.layers[0].rows) for cache in waiting]
    del waiting[1:]
    assert rows[1]() is None
    gc.disable()
    try:
        del model, waiting
        assert [ref() for ref in rows] == [None, None] and [ref() for ref in made.steps] == [None] * 3
    finally:
        gc.enable()


@on_a_gpu
def test_what_is_kept_can_be_freed(fused):
    model = tiny_model("mlra_4", num_hidden_layers=1).to(DEVICE)
    model.generate(random_ids(1, 5).to(DEVICE), max_new_tokens=3, do_sample=False)
    rows = [weakref.ref(cache.layers[0].rows) for cache in capture_mlra._spare[model]]
    model.free_graphs()
    assert [ref() for ref in rows] == [None]
    model.free_graphs()


def test_fingerprint_sees_what_a_graph_depends_on(monkeypatch):
    model = tiny_model()
    seen = [fingerprint(model)]
    assert fingerprint(model) == seen[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert fingerprint(model) == seen[0], "in place"

    def differs():
        seen.append(fingerprint(model))
        assert len({hash(mark) for mark in seen}) == len(seen)

    with torch.autocast("cpu", torch.bfloat16):
        differs()
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    differs()
    hook.remove()
    assert fingerprint(model) == seen[0]
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone())
    differs()
    model.resize_token_embeddings(64)
    differs()
    model.to(torch.float64)
    differs()
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    differs()
    model.config.decode_implementation = "torch"
    differs()
    monkeypatch.setenv("MLRA_DECODE", "torch")
    differs()


def test_only_plain_models_are_captured_unasked():
    model = tiny_model()
    assert capture_mlra.is_plain(model)
    hook = model.model.register_forward_hook(lambda *_: None)
    assert not capture_mlra.is_plain(model)
    hook.remove()
    model.model.layers[0].mlp.up_proj = type("Quantized", (torch.nn.Linear,), {})(2, 3)
    assert not capture_mlra.is_plain(model)


@pytest.mark.gpu
def test_replay_equals_the_function(caplog):
    x = torch.arange(4.0, device="cuda")
    replay = Replay(lambda: x.mul_(2).sum(), x.device)
    assert [replay().item() for _ in range(4)] == [12.0, 24.0, 48.0, 96.0]
    waiting = Replay(lambda: x.sum().item(), x.device)
    with caplog.at_level("WARNING"):
        assert [waiting() for _ in range(3)] == [96.0] * 3
    assert caplog.text.count("cannot be captured") == 1
    assert replay().item() == 192.0


@pytest.mark.gpu
def test_mixed_calls(fused):
    """Lengths, batches, padding, ends, sampling, returned caches at random: the library's tokens, flat memory."""
    model = tiny_model("mlra_2", num_hidden_layers=1).to("cuda")
    generator = torch.Generator().manual_seed(0)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=generator))

    allocated = []
    for call in range(1000):
        ids = random_ids(1 + below(4), 1 + below(60), seed=call).cuda()
        mask = torch.ones_like(ids)
        if below(3) == 0:
            mask[0, : below(ids.shape[1])] = 0
        settings = {"max_new_tokens": 1 + below(8), "do_sample": below(3) == 0, "pad_token_id": 0}
        settings |= {"attention_mask": mask, "eos_token_id": [below(61) for _ in range(below(3))] or None}
        if settings["do_sample"]:
            settings |= {"temperature": 0.5 + below(3) / 2, "top_k": [0, 5][below(2)]}
        settings |= {"return_dict_in_generate": below(4) == 0}
        tokens = []
        for compiled in (True, False):
            torch.manual_seed(call)
            out = model.generate(ids, disable_compile=not compiled, **settings)
            tokens.append(out.sequences if settings["return_dict_in_generate"] else out)
        assert torch.equal(*tokens), (call, settings)
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[500:]) <= 1.02 * max(allocated[200:500])
