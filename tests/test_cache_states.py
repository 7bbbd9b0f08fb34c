"""States of a cache between calls: made in inference mode, assigned by hand, copied, pickled and saved.

What comes after is always compared with a full forward of the same tokens.
"""

import copy
import io
import pickle

import pytest
import torch

from modeling_mlra import MLRACache, generation_hooks_mlra
from modeling_mlra.generation_mlra import captured_decode
from tests.models import random_ids, rms_ratio, tiny_model
from tests.tolerances import CACHE_LOGITS_RATIO

KINDS = {"dynamic": None, "static": 40}


@pytest.fixture(params=KINDS)
def cache(request, model):
    return MLRACache(model.config, max_cache_len=KINDS[request.param])


@pytest.fixture(scope="module")
def model():
    return tiny_model("mlra_2")


def step(model, ids, cache, **kwargs) -> torch.Tensor:
    """Logits of `ids` behind the cache; the cache has them afterwards."""
    return model(ids, past_key_values=cache, **kwargs).logits


def assert_continues(model, cache, past, new=None):
    """The cache stands for `past`: what follows is what a full forward of both gives."""
    new = random_ids(past.shape[0], 4, seed=9) if new is None else new
    with torch.no_grad():
        expected = model(torch.cat([past, new], dim=1), use_cache=False).logits[:, past.shape[1] :]
        pieces = torch.cat([step(model, part, cache) for part in new.split([1, new.shape[1] - 1], dim=1)], dim=1)
    assert rms_ratio(expected, pieces.detach()) < CACHE_LOGITS_RATIO
    assert int(cache.get_seq_length()) == past.shape[1] + new.shape[1]


# Inference mode


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_continues_outside_inference_mode(model, cache, made):
    ids = random_ids(2, 9)
    if made == "inside":
        with torch.inference_mode():
            cache = MLRACache(model.config, max_cache_len=40 if cache.is_compileable else None)
    with torch.inference_mode():
        step(model, ids, cache)
    assert_continues(model, cache, ids)
    more = torch.cat([ids, random_ids(2, 4, seed=9)], dim=1)
    with torch.inference_mode():  # and inside again
        again = random_ids(2, 3, seed=4)
        step(model, again, cache)
    assert_continues(model, cache, torch.cat([more, again], dim=1), random_ids(2, 2, seed=5))


def test_batches_changed_in_inference_mode(model, cache):
    ids = random_ids(2, 9)
    with torch.inference_mode():
        step(model, ids, cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        if not cache.is_compileable:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3]))
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
    assert_continues(model, cache, ids[[1, 1]])


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copied_in_inference_mode(model, cache, way):
    ids = random_ids(2, 9)
    with torch.inference_mode():
        step(model, ids, cache)
        cache = copy.deepcopy(cache) if way == "copy" else pickle.loads(pickle.dumps(cache))
    assert_continues(model, cache, ids)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_second_turn_after_generate_in_inference_mode(model, implementation):
    ids, new = random_ids(2, 9), random_ids(2, 3, seed=4)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode():
        first = model.generate(ids, cache_implementation=implementation, **settings)
    cache = first.past_key_values
    turn = torch.cat([first.sequences, new], dim=1)
    # A static cache of `generate()` has room for its own turn only, so the second one gets a longer cache.
    if cache.is_compileable:
        cache = MLRACache(model.config, max_cache_len=40)
        with torch.inference_mode():
            model.generate(ids, past_key_values=cache, **settings)
    settings = {"attention_mask": torch.ones_like(turn), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(turn, use_cache=False, **settings)
    assert torch.equal(model.generate(turn, past_key_values=cache, **settings), expected)


def test_captured_loop_in_inference_mode_continues_outside(model, monkeypatch):
    """The loop that a GPU runs, here without its graph."""
    monkeypatch.setattr(generation_hooks_mlra, "can_capture", lambda *_: True)
    ids, cache = random_ids(2, 9), MLRACache(model.config, max_cache_len=40)
    assert generation_hooks_mlra.captured_decode is captured_decode
    with torch.inference_mode():
        sequences = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert int(cache.get_seq_length()) == 14
    assert_continues(model, cache, sequences[:, :14])


def test_gradients_behind_a_prefix_from_inference_mode(model):
    ids, new = random_ids(1, 9), random_ids(1, 4, seed=4)
    with torch.inference_mode():
        step(model, ids, cache := MLRACache(model.config))
    plain = MLRACache(model.config)
    with torch.no_grad():
        step(model, ids, plain)
    gradients = []
    for prefix in (cache, plain):
        model.zero_grad()
        step(model, new, prefix).square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.kv_a_proj.weight.grad.clone())
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients)


# Assignment


def snapshot(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def restore(cache, parts, length):
    for layer, (keys, values) in zip(cache.layers, parts, strict=True):
        layer.keys, layer.values = keys, values
    if cache.is_compileable:
        cache.set_seq_length(length)


def test_snapshot_and_restore(model, cache):
    ids = random_ids(2, 9)
    with torch.no_grad():
        step(model, ids, cache)
        kept = snapshot(cache)
        step(model, random_ids(2, 5, seed=3), cache)
        restore(cache, kept, 9)
    assert int(cache.get_seq_length()) == 9
    assert_continues(model, cache, ids)
    restore(cache, kept, 9)  # the snapshot itself is as it was
    assert_continues(model, cache, ids, random_ids(2, 3, seed=8))


def test_restore_into_another_cache(model, cache):
    ids = random_ids(2, 9)
    with torch.no_grad():
        step(model, ids, cache)
        kept = snapshot(cache)
        other = MLRACache(model.config, max_cache_len=40 if cache.is_compileable else None)
        if cache.is_compileable:
            with pytest.raises(ValueError, match="empty static latent cache"):
                other.layers[0].keys = kept[0][0]
            step(model, random_ids(2, 2), other)
        restore(other, kept, 9)
    assert_continues(model, other, ids)


def test_dynamic_rows_sliced_selected_and_joined_by_hand(model):
    ids = random_ids(3, 9)
    cache, other = MLRACache(model.config), MLRACache(model.config)
    with torch.no_grad():
        step(model, ids, cache)
        step(model, ids[:1], other)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :6], layer.values[:, :, :6]
    assert cache.get_seq_length() == 6
    for layer in cache.layers:
        layer.values = layer.values[[2, 0]]
        layer.keys = layer.keys[[2, 0]]
    for layer, joined in zip(cache.layers, other.layers, strict=True):
        layer.keys = torch.cat([layer.keys, joined.keys[:, :, :6]])
        layer.values = torch.cat([layer.values, joined.values[:, :, :6]])
    assert_continues(model, cache, ids[[2, 0, 0], :6])


def test_one_part_changed(model, cache):
    """Rotary keys of zero: the logits of a cache whose rows have zeros there."""
    ids = random_ids(2, 9)
    expected = copy.deepcopy(cache)
    with torch.no_grad():
        for held in (cache, expected):
            step(model, ids, held)
        for layer, changed in zip(cache.layers, expected.layers, strict=True):
            layer.values = torch.zeros_like(layer.values)
            changed.rows[..., 32:] = 0
        new = random_ids(2, 2, seed=4)
        assert torch.equal(step(model, new, cache), step(model, new, expected))
    assert rms_ratio(model(torch.cat([ids, new], 1)).logits[:, 9:], step(model, new, cache)) > 0.01


def test_rows_seen_before_a_crop_are_not_overwritten(model):
    """Views kept without a copy, then `crop`, other tokens, and back: as with the library's dynamic cache."""
    ids, cache = random_ids(2, 9), MLRACache(model.config)
    with torch.no_grad():
        step(model, ids, cache)
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        cache.crop(-4)
        step(model, random_ids(2, 6, seed=3), cache)
        restore(cache, kept, 9)
    assert_continues(model, cache, ids)


def test_what_does_not_fit_is_named(model, cache):
    ids = random_ids(2, 9)
    with torch.no_grad():
        step(model, ids, cache)
    layer = cache.layers[0]
    for part in (layer.values, layer.keys[0], torch.cat([layer.keys] * 2, dim=1), None):
        with pytest.raises(ValueError, match="keys of shape .* do not fit"):
            layer.keys = part
    if cache.is_compileable:
        with pytest.raises(ValueError, match=r"values of shape .* takes \[2, 1, 40, 4\]"):
            layer.values = layer.values[:, :, :9]
    else:
        layer.keys = layer.keys[:, :, :5]
        for use in (
            layer.get_seq_length,
            lambda: step(model, ids, cache),
            lambda: layer.crop(-1),
            lambda: cache.nbytes,
        ):
            with pytest.raises(ValueError, match=r"keys .*5.* and values .*9.* do not belong together"):
                use()
        layer.values = layer.values[:, :, :5]
        assert layer.get_seq_length() == 5


def test_another_batch(model):
    ids, cache = random_ids(2, 9), MLRACache(model.config)
    with torch.no_grad():
        step(model, ids, cache)
        with pytest.raises(ValueError, match="holds 2 sequences, and these tokens are of 1"):
            step(model, ids[:1], cache)
    cache.reset()
    assert_continues(model, cache, ids[:1, :0], ids[:1])
    cache.reset()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert step(half, ids[:, :3], cache).dtype == torch.bfloat16 and cache.layers[0].keys.dtype == torch.bfloat16


# Copies and files


def saved_bytes(cache, how) -> int:
    file = io.BytesIO()
    torch.save(cache, file) if how == "torch.save" else pickle.dump(cache, file)
    return file.tell()


def reloaded(cache, how):
    if how == "deepcopy":
        return copy.deepcopy(cache)
    file = io.BytesIO()
    if how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_files_hold_the_rows_in_use(how):
    model = tiny_model("mlra_2", kv_lora_rank=256, max_position_embeddings=512)
    ids = random_ids(1, 400)
    overhead = 8000
    for max_cache_len in (None, 500):
        cache = MLRACache(model.config, max_cache_len=max_cache_len)
        empty = saved_bytes(cache, how)
        assert empty < overhead
        with torch.no_grad():
            step(model, ids[:, :390], cache)
            for token in ids[:, 390:].split(1, dim=1):
                step(model, token, cache)
        assert 0 <= saved_bytes(cache, how) - 400 * cache.bytes_per_token() < overhead
        if max_cache_len is None:
            cache.crop(-395)
            assert 0 <= saved_bytes(cache, how) - 5 * cache.bytes_per_token() < overhead
            cache.reset()
            assert saved_bytes(cache, how) < overhead


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_go_their_own_ways(how, dtype, cache):
    model = tiny_model("mlra_2", dtype=dtype)
    ids = random_ids(2, 9)
    untouched = reloaded(cache, how)
    assert_continues(model, untouched, ids[:, :0], ids)
    with torch.no_grad():
        step(model, ids, cache)
        other = reloaded(cache, how)
        step(model, random_ids(2, 5, seed=3), cache)  # does not reach the copy
    assert_continues(model, other, ids)
    assert type(other) is type(cache) and other.is_compileable == cache.is_compileable
    assert int(cache.get_seq_length()) == 14
    if cache.is_compileable:
        assert other.get_max_length() == 40 and other.layers[0].keys.shape[2] == 40
    else:
        other.crop(-4)
        assert_continues(model, reloaded(other, how), ids)


def test_shallow_copy_of_a_layer_is_independent(model, cache):
    ids = random_ids(2, 9)
    with torch.no_grad():
        step(model, ids, cache)
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in other.layers:
            layer.cumulative_length = copy.copy(getattr(layer, "cumulative_length", None))
        step(model, random_ids(2, 3, seed=3), cache)
    assert_continues(model, other, ids)
