"""The latent cache: what it holds, how it grows, what generation asks of it, and the library's own caches."""

import time

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from modeling_mlra import MLRACache, MLRAForCausalLM
from tests.models import VARIANTS, random_ids, rms_ratio, tiny_config, tiny_model
from tests.tolerances import CACHE_LOGITS_RATIO, QUANTIZED_CACHE_RATIO


def fill(cache, config, length, batch=2, dtype=torch.float32):
    """Random rows [latents | k_rope] for every layer; returns them, [layers, B, 1, T, L*R + E]."""
    rows = torch.randn(config.num_hidden_layers, batch, 1, length, config.cache_row_dim, dtype=dtype)
    for index, row in enumerate(rows):
        cache.update(row[..., : config.kv_lora_rank], row[..., config.kv_lora_rank :], index)
    return rows


def contents(cache, length):
    return torch.stack([torch.cat([layer.keys, layer.values], -1)[:, :, :length] for layer in cache.layers])


@pytest.mark.parametrize("max_cache_len", [None, 40])
def test_holds_rows_and_nothing_else(max_cache_len):
    config = tiny_config("mlra_4", dtype="bfloat16")
    cache = MLRACache(config, max_cache_len=max_cache_len)
    assert len(cache) == 2
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    expected = 2 * (32 + 4) * 2  # layers x row x bytes
    assert cache.bytes_per_token() == expected
    rows = torch.cat([fill(cache, config, length, dtype=torch.bfloat16) for length in (5, 1, 7)], dim=3)
    assert torch.equal(contents(cache, 13), rows)
    assert int(cache.get_seq_length()) == 13
    assert cache.bytes_per_token() == expected
    allocated = {layer.rows.untyped_storage().nbytes() for layer in cache.layers}
    assert sum(allocated) * len(cache) == cache.nbytes
    if max_cache_len:
        assert cache.nbytes == expected * max_cache_len * 2  # batch 2
        assert cache.get_max_length() == max_cache_len and cache.is_compileable
    else:
        assert not cache.is_compileable


def test_growth_does_not_copy_the_cache_at_every_token():
    """Appending to 64K rows costs what appending to 1K rows costs; copying would cost 64 times as much."""
    config = tiny_config(num_hidden_layers=1, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = MLRACache(config)
    latents, rope = torch.randn(1, 1, 1, 512), torch.randn(1, 1, 1, 64)
    buffers, medians = set(), {}
    for start in (1_024, 65_536):
        missing = start - cache.get_seq_length()
        cache.update(latents.expand(-1, -1, missing, -1), rope.expand(-1, -1, missing, -1), 0)
        seconds = []
        for _ in range(256):
            began = time.perf_counter()
            cache.update(latents, rope, 0)
            seconds.append(time.perf_counter() - began)
            buffers.add(cache.layers[0].rows.data_ptr())
        medians[start] = sorted(seconds)[128]
    assert medians[65_536] < 5 * medians[1_024], medians
    assert len(buffers) <= 4, "the buffer is reallocated now and then, not at every token"
    assert cache.nbytes < 1.3 * cache.get_seq_length() * cache.bytes_per_token()


@pytest.mark.parametrize("max_cache_len", [None, 16])
def test_batch_operations_and_reset(max_cache_len):
    config = tiny_config()
    cache = MLRACache(config, max_cache_len=max_cache_len)
    rows = fill(cache, config, 6)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(contents(cache, 6), rows[:, [1, 0]])
    if max_cache_len is None:
        cache.batch_repeat_interleave(2)
        assert torch.equal(contents(cache, 6), rows[:, [1, 1, 0, 0]])
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert torch.equal(contents(cache, 6), rows[:, [1, 0]])
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    again = fill(cache, config, 3)
    assert torch.equal(contents(cache, 3), again)


def test_crop():
    config = tiny_config()
    cache = MLRACache(config)
    rows = fill(cache, config, 6)
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    more = fill(cache, config, 1)
    assert torch.equal(contents(cache, 5), torch.cat([rows[:, :, :, :4], more], dim=3))
    with pytest.raises(ValueError, match=r"crop\(3\).*negative"):
        cache.crop(3)
    cache.crop(-50)
    assert cache.get_seq_length() == 0


def test_max_cache_len_is_checked():
    with pytest.raises(ValueError, match="max_cache_len=0"):
        MLRACache(tiny_config(), max_cache_len=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cache_gives_the_logits_of_a_full_forward(variant):
    model = tiny_model(variant)
    ids = random_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    caches = {
        "latent": MLRACache(model.config),
        "latent static": MLRACache(model.config, max_cache_len=30),
        "library dynamic": DynamicCache(config=model.config),
        "library static": StaticCache(model.config, max_cache_len=30),
    }
    with torch.no_grad():
        reference = model(ids, attention_mask=mask, use_cache=False).logits
        for name, cache in caches.items():
            pieces, end = [], 0
            for part in ids.split([9, 1, 1, 4, 6], dim=1):
                end += part.shape[1]
                pieces.append(model(part, attention_mask=mask[:, :end], cache=cache).logits)
            logits = torch.cat(pieces, dim=1)
            real = mask.bool()
            assert rms_ratio(reference[real], logits[real]) < CACHE_LOGITS_RATIO, name
            assert int(cache.get_seq_length()) == 21, name


def test_quantized_cache_of_the_library():
    """Stored through the library's quantized layers; a stand-in quantizer keeps the test free of optional packages."""

    class RoundingLayer(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return torch.round(tensor * 64)

        def _dequantize(self, quantized):
            return quantized / 64

    model = tiny_model()
    cache = Cache(layers=[RoundingLayer(residual_length=4) for _ in range(model.config.num_hidden_layers)])
    ids = random_ids(1, 20)
    with torch.no_grad():
        reference = model(ids).logits
        logits = torch.cat([model(part, cache=cache).logits for part in ids.split([9, 1, 1, 9], 1)], dim=1)
    assert 0 < rms_ratio(reference, logits) < QUANTIZED_CACHE_RATIO


def test_data_parallel_gathers_caches():
    """`torch.nn.DataParallel` calls the type of an output with what iterating over it gives, joined over devices."""
    model = tiny_model("mlra_2")
    ids, new = random_ids(3, 9), random_ids(3, 2, seed=3)
    with torch.no_grad():
        parts = [model(part, use_cache=True).past_key_values for part in ids.split([1, 2])]
        cache = type(parts[0])(
            tuple(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*layers, strict=True))
            for layers in zip(*parts, strict=True)
        )
        expected = model(torch.cat([ids, new], dim=1)).logits[:, 9:]
        assert cache.get_seq_length() == 9 and cache.bytes_per_token() == parts[0].bytes_per_token()
        assert rms_ratio(expected, model(new, past_key_values=cache).logits) < CACHE_LOGITS_RATIO


@pytest.mark.parametrize("max_cache_len", [None, 30])
def test_early_initialization_leaves_the_widths_to_the_model(max_cache_len):
    model = tiny_model("mlra_2")
    cache, ids = MLRACache(model.config, max_cache_len=max_cache_len), random_ids(2, 9)
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    cache.early_initialization(2, heads, width, torch.float32, torch.device("cpu"))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False), expected)


def test_keys_of_heads_are_no_latents():
    """What PEFT's prefix tuning, or a cache of another model, would bring."""
    model, ids = tiny_model("mlra_2"), random_ids(2, 5)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=9)):
        for layer in range(2):
            cache.update(torch.zeros(2, 12, 3, 2), torch.zeros(2, 12, 3, 2), layer)
        with pytest.raises(ValueError, match="keys of 12 heads.*prefix tuning"):
            model(ids, past_key_values=cache)
    prefixed = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="keys of 12 heads.*prefix tuning"):
        prefixed(ids, labels=ids)


def test_looking_at_a_cache_costs_nothing():
    """A forward reads no `keys`, which would have rows copied after every `crop`."""
    model, cache = tiny_model("mlra_2"), MLRACache(tiny_config("mlra_2"))
    with torch.no_grad():
        model(random_ids(1, 9), past_key_values=cache)
        address = cache.layers[0].rows.data_ptr()
        for _ in range(3):
            cache.crop(-3)
            model(random_ids(1, 2), past_key_values=cache)
    assert cache.layers[0].rows.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_token_of_a_loaded_model(dtype, tmp_path):
    """Before the first forward they follow from the configuration, whose dtype is a name where it was loaded."""
    tiny_model("mlra_2", dtype=dtype).save_pretrained(tmp_path)
    model = MLRAForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for cache in (MLRACache(model.config), MLRACache(model.config, max_cache_len=20)):
        before = cache.bytes_per_token()
        with torch.no_grad():
            model(random_ids(1, 3), past_key_values=cache)
        assert before == cache.bytes_per_token() == 2 * 36 * dtype.itemsize
