"""What a user of `generate()` and `generate_batch()` expects beyond greedy decoding (see test_generate)."""

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
    TextIteratorStreamer,
    set_seed,
)
from transformers.utils.import_utils import is_optimum_quanto_available

from modeling_mlra import MLRACache, MLRAConfig, modeling_mlra
from modeling_mlra.decode_mlra import decode_calls
from modeling_mlra.library_mlra import CACHE, cache_of
from modeling_mlra.paged_mlra import exchange_by_table, update_paged
from tests.compiling import compiled_generate, recording_backend
from tests.models import VARIANTS, random_ids, tiny_model

NEW_TOKENS = 10


def greedy(model, ids: torch.Tensor, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """Greedy continuation `[B, new_tokens]` by repeated full forwards."""
    start = ids.shape[1]
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:]


def soften(model):
    """Scale the logits down so that sampling and beams have something to choose between."""
    with torch.no_grad():
        model.model.norm.weight.mul_(0.2)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True, "length_penalty": 0.7},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    ],
    ids=["sampling", "several samples", "beam", "beam sampling", "penalties"],
)
def test_any_cache_decodes_like_none(settings):
    model = soften(tiny_model("mlra_2"))
    ids = random_ids(2, 7)
    ids[0, :2] = 0
    results = {}
    for name in ("none", "latent", "latent static", "library dynamic", "library static"):
        way = {
            "none": {"use_cache": False},
            "latent": {},
            "latent static": {"cache_implementation": "static"},
            "library dynamic": {"cache": DynamicCache(config=model.config)},
            "library static": {"cache": StaticCache(model.config, max_cache_len=7 + NEW_TOKENS)},
        }[name]
        set_seed(0)
        way |= {"attention_mask": (ids != 0).long(), "max_new_tokens": NEW_TOKENS}
        results[name] = model.generate(ids, **settings, **way)
    for name, tokens in results.items():
        assert torch.equal(tokens, results["none"]), name
    assert len({tuple(row) for row in results["none"][:, 7:].tolist()}) > 1


@pytest.mark.parametrize("variant", ["mlra_4", "gla_2"])
def test_speculation_does_not_change_the_tokens(variant):
    """As target, as assistant, and with candidates from the prompt; some candidates are accepted and some are not."""
    model = tiny_model(variant)
    assistant = tiny_model(variant, num_hidden_layers=1)
    assistant.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    assistant.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight)
    ids = random_ids(1, 8).repeat(1, 3)
    expected = greedy(model, ids, 20)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    for way in ({"assistant_model": model}, {"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        for cache in (None, MLRACache(model.config)):
            forwards.clear()
            tokens = model.generate(ids, max_new_tokens=20, do_sample=False, cache=cache, **way)
            assert torch.equal(tokens[:, 24:], expected), (list(way), cache)
            if "assistant_model" not in way or way["assistant_model"] is not model:
                assert len(forwards) <= 20
    handle.remove()


def test_crop_then_continue():
    model = tiny_model("mlra_2")
    ids = random_ids(1, 9)
    cache = MLRACache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.crop(-4)
        again = model(ids[:, 5:], cache=cache).logits
        torch.testing.assert_close(again, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_quantized_cache_through_generate():
    """The library's own 4-bit cache, which rounds the prompt at once, decoded as forwards with that cache are."""
    if not is_optimum_quanto_available():
        pytest.skip("the library's quantized cache needs optimum-quanto or hqq")
    model = tiny_model("mlra_4")
    ids = random_ids(1, 6)
    settings = {"backend": "quanto", "nbits": 4, "q_group_size": 4, "residual_length": 4}
    cache = QuantizedCache(config=model.config, **settings)
    following, expected = ids, []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            following = model(following, cache=cache).logits[:, -1:].argmax(-1)
        expected.append(following.item())
    before = decode_calls["torch"]
    out = model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="quantized",
        cache_config=settings,
        return_dict_in_generate=True,
    )
    assert type(cache_of(out)) is QuantizedCache
    assert out.sequences[0, 6:].tolist() == expected
    assert decode_calls["torch"] - before >= 2 * (NEW_TOKENS - 1)


@pytest.mark.parametrize("kind", ["latent", "library's"])
def test_caches_of_others_start_their_kernels_on_the_device_of_the_rows(kind, monkeypatch):
    """Such a kernel (a quantized cache's) is launched on the current device, wherever its tensors are."""
    model = tiny_model()
    entered, updates = [], []
    monkeypatch.setattr(modeling_mlra, "on_device", lambda device: entered.append(device) or nullcontext())
    cache = MLRACache(model.config) if kind == "latent" else DynamicCache(config=model.config)
    update = cache.update
    monkeypatch.setattr(cache, "update", lambda *args: updates.append(len(entered)) or update(*args))
    with torch.no_grad():
        model(random_ids(1, 6), cache=cache)
    layers = len(model.model.layers)
    assert entered == ([] if kind == "latent" else [torch.device("cpu")] * layers)
    assert updates == ([0] * layers if kind == "latent" else list(range(1, layers + 1)))  # each under its guard


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache_is_the_latent_one(implementation):
    """The library fetches layers ahead on a second CUDA stream; without CUDA only the choice of cache can be seen."""
    model = tiny_model()
    ids = random_ids(1, 6)
    if torch.cuda.is_available():
        model = model.cuda()
        tokens = model.generate(ids.cuda(), max_new_tokens=5, do_sample=False, cache_implementation=implementation)
        assert torch.equal(tokens[:, 6:].cpu(), greedy(model.cpu(), ids, 5))
        return
    kwargs = {}
    config = GenerationConfig(cache_implementation=implementation, use_cache=True, num_beams=1, num_return_sequences=1)
    model._prepare_cache_for_generation(config, kwargs, "greedy", 1, 12)
    cache = kwargs[CACHE]
    assert isinstance(cache, MLRACache) and cache.offloading
    assert isinstance(cache, StaticCache) == (implementation == "offloaded_static")


@pytest.mark.parametrize("offloading", [False, True])
def test_no_compiled_steps_with_rows_that_move(offloading):
    """The library compiles every static cache; with an offloaded one that ends the process on a GPU."""
    model = tiny_model()
    compiled = CompileConfig()
    compiled._compile_all_devices = True
    settings = GenerationConfig(compile_config=compiled)
    kwargs = {CACHE: MLRACache(model.config, max_cache_len=8, offloading=offloading)}
    assert model._valid_auto_compile_criteria(kwargs, settings) is not offloading


@pytest.mark.parametrize("is_static", [False, True])
def test_rows_move_to_the_cpu_and_back(is_static):
    model = tiny_model()
    ids = random_ids(2, 8)
    cache = MLRACache(model.config, max_cache_len=8 if is_static else None)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        for layer in cache.layers:
            layer.offload()
            assert layer.keys.data_ptr() == layer.rows.data_ptr()
            layer.prefetch()
        torch.testing.assert_close(
            model(ids[:, 5:], cache=cache).logits, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4
        )


def test_compiled_decoding_with_a_static_cache():
    """One graph without breaks serves every step, through generate() and by hand."""
    model = tiny_model("mlra_2", attn_output_gate=True)
    ids = random_ids(2, 6)
    expected = greedy(model, ids)
    backend, graphs = recording_backend()
    tokens = compiled_generate(model, ids, backend, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens[:, 6:], expected)
    assert len(graphs) == 1

    torch._dynamo.reset()
    graphs.clear()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = MLRACache(model.config, max_cache_len=6 + NEW_TOKENS)
    with torch.no_grad():
        following = model(ids, cache=cache).logits[:, -1:].argmax(-1)
        for step in range(NEW_TOKENS):
            assert torch.equal(following[:, 0], expected[:, step])
            positions = torch.tensor([[6 + step]])
            following = compiled(following, cache=cache, position_ids=positions).logits.argmax(-1)
    assert len(graphs) == 1


def test_streaming():
    model = tiny_model()
    ids = random_ids(1, 5)

    class Tokenizer:
        def decode(self, tokens, **kwargs):
            return "".join(f"{int(token)} " for token in tokens)

    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)
    model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=streamer)
    assert [int(word) for word in "".join(streamer).split()] == greedy(model, ids)[0].tolist()


def batching_config(**settings) -> ContinuousBatchingConfig:
    """A small paged cache; the page size had another name before transformers 5.19."""
    if "page_size" not in inspect.signature(ContinuousBatchingConfig).parameters:
        settings["block_size"] = settings.pop("page_size")
    return ContinuousBatchingConfig(**settings)


@pytest.mark.parametrize(
    ("variant", "implementation"), [*((variant, "sdpa") for variant in VARIANTS), ("mlra_2", "eager")]
)
def test_continuous_batching(variant, implementation):
    """More requests than fit at once, prompts cut over several batches; decoding runs absorbed, each request alone."""
    odd_row = {"kv_lora_rank": 32, "qk_rope_head_dim": 6} if variant == "mla" else {}
    model = tiny_model(variant, attn_output_gate=variant == "mlra_2", **odd_row)
    model.set_attn_implementation(implementation)
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 17, 9, 30, 1, 22)]
    expected = [greedy(model, torch.tensor([prompt]))[0].tolist() for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    pages, page_size = 24, 4
    assert sum(len(prompt) + NEW_TOKENS for prompt in prompts) > pages * page_size
    before = decode_calls["torch"]
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=batching_config(page_size=page_size, num_blocks=pages, max_batch_tokens=16),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert decode_calls["torch"] - before >= 2 * NEW_TOKENS


def test_paged_cache_costs_one_row_per_token():
    for kv_lora_rank, rope_dim in ((512, 64), (32, 6), (32, 4), (30, 4)):
        config = MLRAConfig(kv_lora_rank=kv_lora_rank, qk_rope_head_dim=rope_dim, num_latent_heads=2, num_branches=1)
        per_token = 2 * config.num_key_value_heads * config.head_dim
        assert config.cache_row_dim <= per_token < config.cache_row_dim + 4 * config.num_key_value_heads


def test_rows_by_block_table():
    """Decoding by block table: each newest row lands in its page, and every request reads its own rows in order."""
    heads, head_dim, page_size, width = 2, 2, 2, (5, 2)
    config = SimpleNamespace(num_key_value_heads=heads, head_dim=head_dim, cache_row_format="plain")
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2, 7, page_size, heads, head_dim, generator=generator)
    untouched = pool.clone()
    table = torch.tensor([[3, 5, -1], [6, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    lengths = [3, 2, 0]
    rows = pool.flatten(3)  # [2, pages, page size, half a row]
    before = [torch.cat([rows[0, pages], rows[1, pages]], -1).flatten(0, 1) for pages in ([3, 5], [6])]
    latents, k_rope = (torch.randn(1, 3, size, generator=generator) for size in width)

    class Paged:
        def update(self, key_states, value_states, layer_idx, kwargs):
            assert layer_idx == 1
            kwargs.update(k_cache=pool[0], v_cache=pool[1], block_table=table)
            kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"]["full_attention"]
            kwargs["max_length_k"] = 1
            return key_states, value_states

    kwargs = {
        "cu_seq_lens_k": {"full_attention": torch.tensor([0, 3, 5, 5])},
        "max_length_k": {"full_attention": 1},
        "max_length_q": 1,
        "block_table": table[None],
        "read_index": [],
        "write_index": [],
        "is_causal": True,
    }
    stored_latents, stored_rope, rows = update_paged(Paged(), latents, k_rope, 1, config, kwargs)
    assert rows.kv_end.tolist() == lengths and rows.row_table is None
    assert set(kwargs) == {"cu_seq_lens_k", "max_length_k", "max_length_q", "is_causal"}
    stored = torch.cat([stored_latents, stored_rope], -1)
    for request in (0, 1):
        new_row = torch.cat([latents[0, request], k_rope[0, request]])
        expected = torch.cat([before[request][: lengths[request] - 1, : sum(width)], new_row[None]])
        assert torch.equal(stored[request, : lengths[request]], expected)
    changed = (pool != untouched).flatten(3).any(-1).any(0).nonzero().tolist()
    assert changed == [[0, 0], [5, 0], [6, 1]], "a request that only fills up the batch writes to page 0"
    assert exchange_by_table(pool[0], pool[1], torch.zeros(3, 8), table, torch.tensor(lengths)).shape == (3, 6, 8)
