"""Caches whose rows are of eight bits, beside plain caches of latents that the oracle rounds: whatever happens to
both, what follows is the same to the accuracy of float32."""

import copy
import io
import pickle

import pytest
import torch
from transformers import GenerationConfig

from modeling_mlra import MLRACache, modeling_mlra
from modeling_mlra.cache_mlra import MLRADynamicCache
from modeling_mlra.capture_mlra import fingerprint, give_back, held_with, take_spare
from modeling_mlra.generation_mlra import captured_decodes
from tests.compiling import compiled_generate, recording_backend
from tests.fp8_oracle import rounded, rounded_cache
from tests.models import padded_batch, random_ids, rms_ratio, tiny_model
from tests.test_features_generation import batching_config
from tests.tolerances import FP8_ROWS_RATIO, FUSED_FLOAT32_RATIO

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model():
    return tiny_model("mlra_2", cache_row_format="fp8")


def saved(cache):
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def cropped(cache):
    cache.crop(-4)
    return cache


def reordered(cache):
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    return cache


def repeated(cache):
    cache.batch_repeat_interleave(2)
    return cache


def selected(cache):
    cache.batch_select_indices(torch.tensor([2, 0]))
    return cache


def moved(cache):
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    return cache


def reserved(cache):
    cache.reserve(700)
    return cache


def assigned(cache):
    """Parts seen before a crop put back after it, as a snapshot is."""
    parts = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    if not cache.is_compileable:
        cache.crop(-3)
    for layer, (keys, values) in zip(cache.layers, parts, strict=True):
        if cache.is_compileable:
            layer.rows.zero_()
        layer.values, layer.keys = values, keys
    return cache


def started_again(cache):
    cache.reset()
    return cache


CHANGES = {
    "dynamic": (
        copy.deepcopy, saved, cropped, reordered, repeated, selected, moved, reserved, assigned, started_again,
    ),
    "static": (copy.deepcopy, saved, reordered, moved, assigned, started_again),
}  # fmt: skip


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, changes in CHANGES.items() for change in (*changes, pickled)]
)
def test_changed_caches_go_on_alike(model, kind, change):
    ids = random_ids(3, 9)
    logits = []
    for cache in (MLRACache(model.config, 40 if kind == "static" else None), rounded_cache(model.config)):
        with torch.no_grad():
            for part in ids.split([6, 1, 2], dim=1):
                model(part, cache=cache)
            if cache.layers[0].scaled_width:
                assert cache.layers[0].rows.dtype == torch.uint8
            cache = change(cache)
            batch = 3 if change in (started_again,) else cache.layers[0].rows.shape[0]
            new = random_ids(batch, 5, seed=3)
            logits.append(torch.cat([model(part, cache=cache).logits for part in new.split([3, 1, 1], dim=1)], dim=1))
    assert rms_ratio(logits[1], logits[0]) < FUSED_FLOAT32_RATIO


def test_a_fixed_cache_goes_on_over_the_same_rows(model):
    ids, logits = random_ids(2, 12), []
    for fixes in (False, True):
        cache = MLRACache(model.config)
        cache.reserve(20)
        with torch.no_grad():
            model(ids[:, :9], cache=cache)
            fixed = cache.fixed() if fixes else cache
            logits.append(model(ids[:, 9:], cache=fixed).logits)
        assert fixed.layers[0].rows is cache.layers[0].rows and fixed.layers[0].scaled_width == 8
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_keys_assigned_again_make_the_same_rows(model):
    cache = MLRACache(model.config)
    with torch.no_grad():
        model(random_ids(2, 9), cache=cache)
    before = [layer.rows[:, :, :9].clone() for layer in cache.layers]
    assigned(cache)
    for layer, rows in zip(cache.layers, before, strict=True):
        read = [layer.format.read(layer.format.split(x)[0]) for x in (layer.rows[:, :, :9], rows)]
        torch.testing.assert_close(*read, rtol=3e-7, atol=0)
        assert layer.keys.dtype == layer.values.dtype == torch.float32


def test_gathered_by_data_parallel_they_are_plain(model):
    """`torch.nn.DataParallel` makes a cache of keys and values alone: of what the rows held, in 16 or 32 bits."""
    ids, new = random_ids(3, 9), random_ids(3, 2, seed=3)
    with torch.no_grad():
        parts = [model(part, use_cache=True).past_key_values for part in ids.split([1, 2])]
        gathered = MLRADynamicCache(
            tuple(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*layers, strict=True))
            for layers in zip(*parts, strict=True)
        )
        expected = MLRACache(model.config)
        model(ids, cache=expected)
        for layer, other in zip(gathered.layers, expected.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys)
            assert layer.rows.dtype == torch.float32
        assert model(new, cache=gathered).logits.isfinite().all()


WAYS = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "prefill in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_as_over_rounded_latents(model, way):
    """The configuration alone turns `generate()` to eight bits, in every way it decodes."""
    ids, settings = random_ids(1 if way == "prompt lookup" else 2, 9), {"max_new_tokens": NEW_TOKENS}
    settings |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(ids, **settings, **WAYS[way])
    others = {name: value for name, value in WAYS[way].items() if name != "cache_implementation"}
    expected = model.generate(ids, past_key_values=rounded_cache(model.config), **settings, **others)
    assert result.past_key_values.layers[0].rows.dtype == torch.uint8
    assert torch.equal(result.sequences, expected.sequences)
    assert rms_ratio(torch.stack(expected.logits), torch.stack(result.logits)) < FUSED_FLOAT32_RATIO


def test_left_padded_batch(model):
    ids, mask, _ = padded_batch(model, 1)
    settings = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = model.generate(ids, past_key_values=rounded_cache(model.config), **settings)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_compiled_steps_over_a_static_cache(model):
    """One graph without breaks, as of plain rows."""
    ids, settings = random_ids(2, 6), {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = model.generate(ids, **settings)
    backend, graphs = recording_backend()
    tokens = compiled_generate(model, ids, backend, **settings)
    assert torch.equal(tokens, expected) and len(graphs) == 1


def test_a_call_takes_no_waiting_cache_of_another_format(model):
    made = fingerprint(model)
    cache = take_spare(model, made, batch=1, capacity=256)
    model(random_ids(1, 5), cache=cache)
    held_with(cache, made)
    give_back(model, cache)
    assert take_spare(model, fingerprint(model), batch=1, capacity=256) is cache
    give_back(model, cache)
    model.config.cache_row_format = "plain"
    try:
        other = take_spare(model, fingerprint(model), batch=1, capacity=256)
    finally:
        model.config.cache_row_format = "fp8"
    assert other is not cache and other.layers[0].scaled_width is None


@pytest.mark.parametrize("variant", ["mlra_4", "gla_2"])
def test_continuous_batching(variant, monkeypatch):
    """Against plain rows of latents that are rounded on their way to the pages, and pages of fewer bytes."""
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 17, 9)]
    update = modeling_mlra.update_paged

    def tokens(row_format: str) -> list[list[int]]:
        outputs = tiny_model(variant, cache_row_format=row_format).generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=batching_config(page_size=4, num_blocks=24, max_batch_tokens=16),
            progress_bar=False,
        )
        return [output.generated_tokens for output in outputs.values()]

    def update_rounded(cache, latents, k_rope, layer_idx, config, kwargs):
        return update(cache, rounded(latents, config.latent_head_dim), k_rope, layer_idx, config, kwargs)

    in_eight_bits = tokens("fp8")
    monkeypatch.setattr(modeling_mlra, "update_paged", update_rounded)
    assert tokens("plain") == in_eight_bits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_captured_steps_write_and_read_them(dtype):
    """float32 runs the modules in the graph and gives the tokens of the plain loop; bfloat16 runs fused, and in the
    cache that comes back rows of prompt and steps alike are what `update` makes of latents."""
    model = tiny_model("mlra_4", dtype=dtype, cache_row_format="fp8").to("cuda")
    ids, settings = random_ids(2, 9).to("cuda"), {"max_new_tokens": 24, "do_sample": False}
    kind, before = "fused" if dtype == torch.bfloat16 else "modules", dict(captured_decodes)
    result = model.generate(ids, return_dict_in_generate=True, **settings)
    assert captured_decodes[kind] == before.get(kind, 0) + 1
    assert torch.equal(model.generate(ids, **settings), result.sequences)
    if dtype == torch.float32:
        assert torch.equal(model.generate(ids, disable_compile=True, **settings), result.sequences)
    cache = MLRACache(model.config)
    with torch.no_grad():
        for part in result.sequences[:, :-1].split([9, *[1] * 23], dim=1):
            model(part, cache=cache)
    for layer, other in zip(result.past_key_values.layers, cache.layers, strict=True):
        assert layer.rows.dtype == torch.uint8
        assert rms_ratio(other.keys.float(), layer.keys.float()) < FP8_ROWS_RATIO


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static", "static"])
def test_gpu_offloaded_rows(implementation):
    model = tiny_model("mlra_2", cache_row_format="fp8").to("cuda")
    ids, settings = random_ids(2, 9).to("cuda"), {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation=implementation, **settings), expected)
