"""generate(): every way of decoding gives the tokens of repeated full forwards of each row alone."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from modeling_mlra import MLRACache
from modeling_mlra.kernels_mlra import decode_calls
from tests.models import VARIANTS, random_ids, tiny_model

NEW_TOKENS = 12


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
        "library dynamic": {"past_key_values": DynamicCache(config=model.config)},
        "library static": {"past_key_values": StaticCache(model.config, max_cache_len=30)},
        "given latent static": {"past_key_values": MLRACache(model.config, max_cache_len=30)},
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
        assert isinstance(out.past_key_values, MLRACache)
        assert out.past_key_values.is_compileable == is_static
        assert int(out.past_key_values.get_seq_length()) == 5 + 4 - 1
    assert isinstance(model(random_ids(1, 5), use_cache=True).past_key_values, MLRACache)


def test_continuing_from_a_cache():
    model = tiny_model()
    ids, _, expected = padded_batch(model)
    cache = MLRACache(model.config)
    first = model.generate(ids[2:], max_new_tokens=5, do_sample=False, past_key_values=cache)
    second = model.generate(first, max_new_tokens=NEW_TOKENS - 5, do_sample=False, past_key_values=cache)
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
