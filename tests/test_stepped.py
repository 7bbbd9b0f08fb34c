"""Forwards of everybody: one new token of each sequence runs the fused step where nothing looks inside the model."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from modeling_mlra import MLRACache, capture_mlra, forwards_mlra, step_mlra, stepped_mlra
from modeling_mlra.cache_mlra import MLRADynamicLayer
from modeling_mlra.capture_mlra import is_plain
from modeling_mlra.forwards_mlra import fused_forwards
from tests.models import random_ids, rms_ratio, tiny_model, watched
from tests.tolerances import FUSED_BFLOAT16_RATIO, FUSED_FLOAT32_RATIO

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted where there is no GPU
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture
def stepping(monkeypatch):
    """Steps of float32 models, on a CPU too."""
    monkeypatch.setattr(stepped_mlra, "STEPPED_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(stepped_mlra, "obstacle", lambda *_, **__: None)


class StepOfNothing:
    """Stands for the fused step where it only counts whether one is taken."""

    def __init__(self, model, cache, num_sequences, tokens_each, masked, siblings=None):
        self.vocab_size = model.config.vocab_size

    def __call__(self, token_ids, rows, position_ids, attention_mask):
        return torch.zeros(*token_ids.shape, self.vocab_size, device=token_ids.device)


@pytest.fixture
def counting(stepping, monkeypatch):
    monkeypatch.setattr(stepped_mlra, "VerifyingStep", StepOfNothing)


def small_model(**settings):
    return tiny_model("mlra_4", num_hidden_layers=1, **settings).to(DEVICE)


def counted(function, kind: str = "launches"):
    """What a function gives, and how many steps of a kind ran in it; of the other kinds none."""
    before = fused_forwards.copy()
    result, ran = function(), fused_forwards - before
    assert ran.keys() <= {kind}
    return result, ran[kind]


@torch.no_grad()
def token_by_token(model, ids, mask=None, prompt=7, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens behind a prompt, one at a time, and the rows of all."""
    cache, logits = MLRACache(model.config), []
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        inputs = dict(settings)
        if mask is not None:
            inputs |= {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        logits.append(model(ids[:, start:end], cache=cache, **inputs).logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(logits[1:], dim=1), torch.stack([layer.rows[:, :, : ids.shape[1]] for layer in cache.layers])


@pytest.mark.parametrize("padded", [False, True])
def test_a_loop_of_ones_own(padded, stepping, monkeypatch):
    """Logits and rows of the modules, over rows that move when they are full."""
    monkeypatch.setattr(forwards_mlra, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(MLRADynamicLayer, "min_growth", 1)
    model = small_model()
    ids, mask = random_ids(2, 10).to(DEVICE), None
    if padded:
        ids[0, :3] = 0
        mask = (ids != 0).long()
    with watched(model):
        expected, steps = counted(lambda: token_by_token(model, ids, mask))
    assert steps == 0
    grown = []
    grow = MLRADynamicLayer._grow
    monkeypatch.setattr(MLRADynamicLayer, "_grow", lambda self, n: (grown.append(n), grow(self, n))[1])
    got, steps = counted(lambda: token_by_token(model, ids, mask))
    assert steps == 3 and grown[1:] == [12]
    assert max(map(rms_ratio, expected, got)) < FUSED_FLOAT32_RATIO


def test_the_loop_of_the_library(stepping):
    """Without graphs, where they were declined."""
    model = small_model()
    ids = random_ids(2, 6).to(DEVICE)
    settings = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    with watched(model):
        expected = model.generate(ids, **settings)
    tokens, steps = counted(lambda: model.generate(ids, **settings))
    assert steps == 3 and torch.equal(tokens, expected)


class CountsOperations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def forward_hook(model):
    return model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def global_hook(model):
    return torch.nn.modules.module.register_module_forward_hook(lambda *_: None)


def replaced_forward(model):
    layer = model.model.layers[0].mlp
    layer.forward = layer.forward
    return SimpleNamespace(remove=lambda: layer.__dict__.pop("forward"))


def wrapped_layer(model):
    class Wrapped(torch.nn.Linear):
        pass

    layer, before = model.model.layers[0].mlp.down_proj, torch.nn.Linear
    layer.__class__ = Wrapped
    return SimpleNamespace(remove=lambda: setattr(layer, "__class__", before))


def eager(model):
    model.set_attn_implementation("eager")
    return SimpleNamespace(remove=lambda: model.set_attn_implementation("sdpa"))


def training(model):
    model.train()
    return SimpleNamespace(remove=model.eval)


WATCHERS = [forward_hook, global_hook, replaced_forward, wrapped_layer, eager, training]
CONTEXTS = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
    "operations": CountsOperations,
}
ARGUMENTS = {
    "attentions": lambda ids: {"output_attentions": True},
    "labels": lambda ids: {"labels": ids},
    "narrow mask": lambda ids: {"attention_mask": torch.ones(2, 6, dtype=torch.long, device=ids.device)},
    "4D mask": lambda ids: {"attention_mask": torch.ones(2, 1, 1, 8, dtype=torch.bool, device=ids.device)},
    "two tokens": lambda ids: {"input_ids": ids.repeat(1, 2)},
}


@torch.no_grad()
def behind_a_prompt(model, cache, **arguments):
    ids = random_ids(2, 8).to(DEVICE)
    with watched(model):
        model(ids[:, :7], cache=cache)
    return model(**{"input_ids": ids[:, 7:], "cache": cache, **arguments})


@pytest.mark.parametrize("watch", WATCHERS)
def test_whatever_looks_inside_runs_the_modules(watch, counting):
    """And as soon as it is gone, steps again."""
    model = small_model()
    for present in (False, True, False):
        watcher = watch(model) if present else None
        try:
            _, steps = counted(lambda: behind_a_prompt(model, MLRACache(model.config)))
        finally:
            if watcher is not None:
                watcher.remove()
        assert steps == (not present)


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_that_run_the_modules(name, counting):
    model = small_model()
    ids = random_ids(2, 8).to(DEVICE)
    for present in (False, True):
        cache = MLRACache(model.config)
        with torch.no_grad(), watched(model):
            model(ids[:, :7], cache=cache)
        with torch.no_grad(), CONTEXTS[name]() if present else torch.no_grad():
            _, steps = counted(lambda cache=cache: model(ids[:, 7:], cache=cache))
        assert steps == (not present)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_forwards_that_ask_for_more(name, counting):
    model = small_model()
    arguments = ARGUMENTS[name](random_ids(2, 1).to(DEVICE))
    assert counted(lambda: behind_a_prompt(model, MLRACache(model.config), **arguments))[1] == 0
    assert counted(lambda: behind_a_prompt(model, MLRACache(model.config)))[1] == 1, "and do not stay in the way"
    assert is_plain(model)


@torch.no_grad()
def test_layers_that_are_looked_at(stepping):
    """Hidden states, a hook that changes what a layer gives, one inside of a layer: the other layers run fused."""
    model = tiny_model("mlra_4", num_hidden_layers=3).to(DEVICE)
    ids = random_ids(2, 11).to(DEVICE)
    hooks = [
        model.model.layers[0].register_forward_hook(lambda module, inputs, output: 0.5 * output),
        model.model.layers[1].self_attn.register_forward_hook(lambda *_: None),
        model.model.norm.register_forward_pre_hook(lambda *_: None),
    ]
    seen = {}
    for kind in ("modules", "layers"):
        cache, logits, states = MLRACache(model.config), [], []
        model(ids[:, :7], cache=cache)
        for t, arguments in ((7, {"output_hidden_states": True}), (8, {})):
            model.config.output_hidden_states = t == 8
            token = {"input_ids": ids[:, t : t + 1], "cache": cache, **arguments}
            with watched(model) if kind == "modules" else nullcontext():
                out, steps = counted(lambda token=token: model(**token), kind)
            assert steps == (kind == "layers")
            logits.append(out.logits)
            states.append(torch.stack(out.hidden_states))
        rows = torch.stack([layer.rows[:, :, :9] for layer in cache.layers])
        seen[kind] = torch.stack(logits), torch.stack(states), rows
        assert [layer.get_seq_length() for layer in cache.layers] == [9] * 3
    assert max(map(rms_ratio, seen["modules"], seen["layers"])) < FUSED_FLOAT32_RATIO
    assert stepped_mlra._stepped[model].takes[2] == ({0, 2}, False)
    model.config.output_hidden_states = False
    for hook in hooks:
        hook.remove()
    assert counted(lambda: model(ids[:, 9:10], cache=cache))[1] == 1


def test_layers_whose_arguments_are_changed(counting):
    model = small_model()
    model.model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    assert counted(lambda: behind_a_prompt(model, MLRACache(model.config)))[1] == 0


def test_what_recording_leaves_behind_is_no_obstacle():
    """Once asked for hidden states, the library leaves hooks on layers for good."""
    model = small_model(dtype=torch.float16)
    model(random_ids(1, 3).to(DEVICE), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    assert is_plain(model) and step_mlra.obstacle(model, 1) is None
    with watched(model):
        assert not is_plain(model) and "hooks" in step_mlra.obstacle(model, 1)


def test_caches_of_other_kinds(counting):
    model = small_model()
    for cache in (MLRACache(model.config, max_cache_len=20), DynamicCache(config=model.config)):
        assert counted(lambda cache=cache: behind_a_prompt(model, cache))[1] == 0
    longer, wider = small_model(), tiny_model("mlra_4", num_hidden_layers=2).to(DEVICE)
    cache = MLRACache(longer.config)
    behind_a_prompt(longer, cache)
    one_more = random_ids(2, 1).to(DEVICE)
    with torch.no_grad():
        with pytest.raises(IndexError):
            wider(one_more, cache=cache)
        with pytest.raises(ValueError, match="sequences"):
            longer(one_more.repeat(2, 1), cache=cache)


def test_weights_that_change(stepping):
    """In place, by other memory and by another parameter: the next step reads them."""
    model = small_model()
    ids = random_ids(1, 12).to(DEVICE)
    cache, layer = MLRACache(model.config), model.model.layers[0].mlp.up_proj

    def twice():
        layer.weight.mul_(2)

    def moved():
        layer.weight.data = layer.weight.data.clone().neg_()

    def replaced():
        layer.weight = torch.nn.Parameter(layer.weight.data * 0.5)

    with torch.no_grad():
        model(ids[:, :7], cache=cache)
        for index, change in enumerate((lambda: None, lambda: None, twice, moved, replaced), start=7):
            change()
            logits, steps = counted(lambda index=index: model(ids[:, index : index + 1], cache=cache).logits)
            cache.crop(-1)
            with watched(model):
                expected = model(ids[:, index : index + 1], cache=cache).logits
            assert steps == 1 and rms_ratio(expected, logits) < FUSED_FLOAT32_RATIO


def test_rows_that_were_seen_stay(stepping):
    """Keys seen before a `crop` are not written to after it."""
    model = small_model()
    cache = MLRACache(model.config)
    behind_a_prompt(model, cache)
    seen = cache.layers[0].keys
    before = seen.clone()
    cache.crop(-1)
    with torch.no_grad():
        assert counted(lambda: model(torch.full((2, 1), 3, device=DEVICE), cache=cache))[1] == 1
    assert torch.equal(seen, before) and not torch.equal(cache.layers[0].keys, before)


def test_few_caches_keep_their_launches(counting, monkeypatch):
    """Those of the newest; none of a model that is gone, or was asked to free them."""
    monkeypatch.setattr(stepped_mlra, "MAX_STEPPED", 2)
    model = small_model()
    caches = [MLRACache(model.config) for _ in range(3)]
    for cache in caches:
        behind_a_prompt(model, cache)
    kept = stepped_mlra._stepped[model].held
    assert list(kept) == caches[1:]
    model.free_graphs()
    assert model not in stepped_mlra._stepped
    behind_a_prompt(model, caches[0])
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model, kept
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_a_model_that_its_own_hooks_hold_is_freed(stepping):
    """Layers run fused, and a closure of a hook refers to the model."""
    model = small_model()
    model.model.layers[0].register_forward_hook(lambda *_, model=model: None)
    cache = MLRACache(model.config)
    ids = random_ids(1, 8).to(DEVICE)
    model(ids[:, :7], cache=cache)
    assert counted(partial(model, ids[:, 7:], cache=cache), "layers")[1] == 1
    owner = weakref.ref(model)
    del model
    gc.collect()
    assert owner() is None


def test_modules_are_looked_for_once(monkeypatch):
    """And anew when one of them is replaced, added or copied."""
    model, looked = small_model(), []
    modules_of = capture_mlra.modules_of
    monkeypatch.setattr(capture_mlra, "modules_of", lambda model: looked.append(model) or modules_of(model))
    fingerprint = capture_mlra.fingerprint
    seen = [fingerprint(model), fingerprint(model)]
    assert seen[0] == seen[1] and len(looked) == 1
    for change in (
        lambda: setattr(model.model.layers[0].mlp, "down_proj", torch.nn.Linear(20, 24, bias=False, device=DEVICE)),
        lambda: model.model.layers[0].mlp.down_proj.add_module("adapter", torch.nn.Linear(2, 2)),
        lambda: setattr(model.model, "norm", copy.deepcopy(model.model.norm)),
    ):
        change()
        seen.append(fingerprint(model))
    assert len(looked) == 4 and len(set(seen)) == 4
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = fingerprint(other)
        assert before not in seen
        other.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
        assert fingerprint(other) != before
    assert fingerprint(model) == seen[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
def test_gpu_steps_in_bfloat16(batch):
    """By themselves, in float32's neighbourhood as the modules are."""
    model = tiny_model("mlra_4", dtype=torch.bfloat16, num_attention_heads=4).cuda()
    ids = random_ids(batch, 12).cuda()
    with watched(model):
        expected, steps = counted(lambda: token_by_token(model, ids))
    assert steps == 0
    got, steps = counted(lambda: token_by_token(model, ids))
    assert steps == 5
    assert max(map(rms_ratio, expected, got)) < FUSED_BFLOAT16_RATIO


@pytest.mark.gpu
def test_gpu_steps_on_streams_and_threads():
    """Each thread on a stream of its own, over its own cache."""
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model("mlra_4", dtype=torch.bfloat16, num_attention_heads=4).cuda()

    def decode(seed: int):
        ids = random_ids(1, 40, seed=seed).cuda()
        with torch.cuda.stream(torch.cuda.Stream()):
            logits = token_by_token(model, ids)[0]
            torch.cuda.current_stream().synchronize()
        return logits

    alone = [decode(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(decode, range(4)))
    assert all(map(torch.equal, alone, together))


def test_threads_with_caches_of_their_own(counting):
    """More caches in turn than a model keeps launches for, on several threads: none loses what another one drops."""
    model, errors, ran = small_model(), [], []
    ids = random_ids(1, 3).to(DEVICE)
    switch_interval = sys.getswitchinterval()

    def decode():
        try:
            with torch.no_grad():
                caches = [MLRACache(model.config) for _ in range(stepped_mlra.MAX_STEPPED)]
                for cache in caches:
                    model(ids, cache=cache)
                for _ in range(60):
                    for cache in caches:
                        model(ids[:, :1], cache=cache)
                ran.extend(cache.get_seq_length() for cache in caches)
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=decode) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch_interval)
    assert not errors and ran == [63] * len(ran) and len(ran) == 4 * stepped_mlra.MAX_STEPPED
