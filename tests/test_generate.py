"""generate(): every way of decoding gives the tokens of repeated full forwards of each row alone."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from modeling_mlra import MLRACache
from modeling_mlra.decode_mlra import decode_calls
from modeling_mlra.library_mlra import cache_of
from tests.models import VARIANTS, padded_batch, random_ids, tiny_model

NEW_TOKENS = 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_on_a_left_padded_batch(variant):
    model = tiny_model(variant, attn_output_gate=variant == "mlra_4")
    ids, mask, expected = padded_batch(model, NEW_TOKENS)
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
    ids, _, expected = padded_batch(model, NEW_TOKENS)
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
