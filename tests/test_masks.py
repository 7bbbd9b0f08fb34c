"""Masks that have fewer columns than there are cached rows: what is missing is padding, as in Llama, on every path."""

import os

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from modeling_mlra import MLRACache, generation_hooks_mlra
from modeling_mlra.decode_mlra import ENVIRONMENT_VARIABLE, decode_calls, latent_attention
from modeling_mlra.generation_mlra import can_capture, reaches_all_rows
from modeling_mlra.library_mlra import CACHE
from tests.models import VOCAB_SIZE, random_ids, rms_ratio, tiny_model
from tests.tolerances import CACHE_LOGITS_RATIO

PREFIX, ROOM = 12, 30


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def caches(model) -> list:
    """The library's caches, and for MLRA its own."""
    found = [DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=ROOM)]
    if hasattr(model.config, "cache_row_dim"):
        found += [MLRACache(model.config), MLRACache(model.config, max_cache_len=ROOM)]
    return found


def continuation(model, cache, width: int, columns: int, num_new: int) -> torch.Tensor:
    """Logits behind a prefix, under a mask of `width` columns (one of them 0) filled up with zeros to `columns`."""
    mask = torch.ones(2, width, dtype=torch.long)
    mask[0, 0] = 0
    mask = torch.nn.functional.pad(mask, (0, columns - width))
    with torch.no_grad():
        model(random_ids(2, PREFIX), past_key_values=cache)
        return model(random_ids(2, num_new, seed=5), past_key_values=cache, attention_mask=mask).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("num_new", [1, 3])
def test_a_boolean_mask_of_every_pair_behind_a_prefix(num_new, implementation):
    """`[B, 1, T, S]`, True where a query may attend, gives what its padding mask gives."""
    model = tiny_model("mlra_4", attn_implementation=implementation)
    padding = torch.ones(2, PREFIX + num_new, dtype=torch.long)
    padding[0, :4] = 0
    causal = torch.ones(num_new, PREFIX + num_new).tril(PREFIX).bool()
    logits = []
    for mask in (padding, causal & padding[:, None, None].bool()):
        cache = MLRACache(model.config)
        with torch.no_grad():
            model(random_ids(2, PREFIX), past_key_values=cache, attention_mask=padding[:, :PREFIX])
            new = {"attention_mask": mask, "position_ids": torch.arange(PREFIX, PREFIX + num_new)[None]}
            logits.append(model(random_ids(2, num_new, seed=5), past_key_values=cache, **new).logits)
    assert rms_ratio(*logits) < CACHE_LOGITS_RATIO


@pytest.mark.parametrize(("width", "num_new"), [(2, 3), (5, 1), (PREFIX, 3), (PREFIX + 1, 3), (PREFIX + 1, 1)])
def test_missing_columns_are_padding(width, num_new, llama, monkeypatch):
    full = PREFIX + num_new
    for implementation in ("eager", "sdpa"):
        llama.set_attn_implementation(implementation)
        for cache, same in zip(caches(llama), caches(llama), strict=True):
            expected = continuation(llama, same, width, full, num_new)
            assert rms_ratio(expected, continuation(llama, cache, width, width, num_new)) < CACHE_LOGITS_RATIO
    model = tiny_model("mlra_2", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    expected = continuation(model, MLRACache(model.config), width, full, num_new)
    if width < full:
        other = continuation(model, MLRACache(model.config), full, full, num_new)
        assert rms_ratio(other, expected) > 0.01, "the missing columns matter"
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for kernel in ("torch", "triton"):
            monkeypatch.setitem(os.environ, ENVIRONMENT_VARIABLE, kernel)
            before = decode_calls[kernel]
            for cache in caches(model)[2 if kernel == "triton" else 0 :]:
                result = continuation(model, cache, width, width, num_new)
                assert rms_ratio(expected, result) < CACHE_LOGITS_RATIO, (implementation, kernel, type(cache))
            assert (decode_calls[kernel] > before) == (implementation == "sdpa")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_kernels_take_masks_of_any_width(implementation, paged):
    """Beyond the mask lies memory that says "visible"; the rows there are not to be seen."""
    generator = torch.Generator().manual_seed(0)
    q_latent, q_rope = (
        torch.randn(2, 1, 4, 3, 16, generator=generator),
        torch.randn(2, 1, 1, 3, 16, generator=generator),
    )
    rows = torch.randn(2, 24, 4 * 16 + 16, generator=generator)
    latents, k_rope = rows[..., :64].unflatten(-1, (4, 16)), rows[..., 64:]
    kv_end = torch.tensor([24, 15], dtype=torch.int32)
    options = {"kv_end": kv_end, "scaling": 0.3, "implementation": implementation}
    pages = {}
    if paged:
        latents, k_rope = latents.flatten(0, 1), k_rope.flatten(0, 1)
        pages = {"block_table": torch.arange(6, dtype=torch.int32).view(2, 3), "page_size": 8}
    memory = torch.ones(2, 64, dtype=torch.bool)
    memory[0, 3] = False
    for width in (1, 7, 14, 23, 24, 40):
        keep = memory.clone()
        keep[:, width:] = False
        seen = [[j for j in range(int(kv_end[b])) if keep[b, j]] for b in range(2)]
        result = latent_attention(q_latent, q_rope, latents, k_rope, key_mask=memory[:, :width], **options, **pages)
        for b in range(2):
            c, r = rows[b, seen[b], :64].unflatten(-1, (4, 16)), rows[b, seen[b], 64:]
            scores = torch.einsum("lhr,slr->lhs", q_latent[b, 0], c) + torch.einsum("he,se->hs", q_rope[b, 0, 0], r)
            expected = torch.einsum("lhs,slr->lhr", (0.3 * scores).softmax(-1), c)
            torch.testing.assert_close(result[b, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [PREFIX + 2, PREFIX, 5, 2])
def test_generate_with_a_narrow_mask(width, monkeypatch):
    """Static caches as dynamic ones; the captured loop, whose mask does not move, leaves it to the library's."""
    model = tiny_model("mlra_2")
    ids = random_ids(2, PREFIX + 2)
    positions = torch.arange(PREFIX + 2)[None].expand(2, -1)
    mask = torch.ones(2, width, dtype=torch.long)
    mask[0, 0] = 0  # the library drops masks of ones
    results, asked = [], []

    def recording(*arguments):
        asked.append(reaches_all_rows(arguments[3].get("attention_mask"), arguments[1], arguments[3][CACHE]))
        return False

    monkeypatch.setattr(generation_hooks_mlra, "can_capture", recording)
    for cache in caches(model):
        with torch.no_grad():
            model(ids[:, :10], past_key_values=cache)
        settings = {"attention_mask": mask, "position_ids": positions, "max_new_tokens": 5, "do_sample": False}
        results.append(model.generate(ids, past_key_values=cache, **settings))
    assert all(torch.equal(results[0], result) for result in results[1:])
    assert asked == [width == PREFIX + 2] * 4


def test_which_masks_reach_all_rows():
    cache = MLRACache(tiny_model().config, max_cache_len=ROOM)
    tiny_model()(random_ids(2, 10), past_key_values=cache)
    mask = torch.ones(2, ROOM)
    for width, num_ids, expected in (
        (12, 12, True),  # the whole sequence
        (12, 2, True),  # what is new, and a mask of everything
        (11, 2, False),
        (5, 12, False),
        (14, 0, True),  # embeddings instead of ids
    ):
        assert reaches_all_rows(mask[:, :width], random_ids(2, num_ids), cache) == expected
    assert reaches_all_rows(None, random_ids(2, 3), cache)
    assert can_capture.__module__ == reaches_all_rows.__module__
