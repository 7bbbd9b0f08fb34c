"""Models on other GPUs than the current one, on two GPUs, in two threads, and under autocast."""

import copy
import threading

import pytest
import torch
from transformers import QuantizedCache

from modeling_mlra.generation_mlra import captured_decodes
from tests.models import random_ids, tiny_model

TWO = torch.cuda.device_count() > 1
pytestmark = pytest.mark.gpu
two_gpus = [pytest.mark.two_gpus, pytest.mark.skipif(not TWO, reason="one GPU")]
NEW_TOKENS = 16
DTYPES = [torch.float32, torch.bfloat16]
QUANTIZED = {"backend": "quanto", "nbits": 4, "q_group_size": 4, "residual_length": 4}
CACHES = {
    "dynamic": lambda config: {},
    "static": lambda config: {"cache_implementation": "static"},
    "quantized": lambda config: {"cache": QuantizedCache(config=config, **QUANTIZED)},
    "offloaded": lambda config: {"cache_implementation": "offloaded"},
}
HALVES = {f"model.layers.{layer}": layer // 2 for layer in range(4)}
HALVES |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0}


def model_of(dtype, variant="mlra_4", **settings):
    return tiny_model(variant, dtype=dtype, num_hidden_layers=4, **settings)


def tokens_of(model, device=0, cache="dynamic"):
    """On the CPU. Its stream alone is waited for: while another thread captures, CUDA waits for no whole device."""
    settings = CACHES[cache](model.config)
    ids = random_ids(2, 9, seed=23).to(f"cuda:{device}")
    tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **settings)
    return tokens.cpu()


def same(tokens, expected, dtype) -> bool:
    """float32 exactly; in bfloat16 a near tie may fall either way, and the row with it from there on."""
    if dtype == torch.float32:
        return torch.equal(tokens, expected)
    return (tokens == expected).float().mean().item() > 0.8


def split(model, tmp_path, how):
    model.save_pretrained(tmp_path)
    options = {"device_map": HALVES}
    if how == "auto":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        options = {"device_map": "auto", "max_memory": {0: int(0.6 * size), 1: 4 * size}}
    return type(model).from_pretrained(tmp_path, dtype=model.dtype, **options).eval()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("how", ["middle", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
class TestTwo:
    pytestmark = two_gpus

    def test_device_map(self, dtype, how, cache, tmp_path):
        """Twenty calls: a kernel on the wrong stream is a race, and gives the right tokens now and then."""
        model = model_of(dtype)
        expected = tokens_of(copy.deepcopy(model).to("cuda:0"), cache=cache)
        there = split(model, tmp_path, how)
        assert len(set(there.hf_device_map.values())) == 2, there.hf_device_map
        for call in range(20):
            assert same(tokens_of(there, cache=cache), expected, dtype), f"call {call}"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
class TestSecond:
    pytestmark = two_gpus

    def test_whole_model_while_the_first_is_current(self, dtype, cache):
        model = model_of(dtype)
        expected = tokens_of(copy.deepcopy(model).to("cuda:0"), cache=cache)
        there = model.to("cuda:1")
        before = sum(captured_decodes.values())
        for _ in range(3):
            assert torch.cuda.current_device() == 0
            assert same(tokens_of(there, 1, cache=cache), expected, dtype)
        assert torch.cuda.current_device() == 0
        assert (sum(captured_decodes.values()) > before) == (cache in ("dynamic", "static"))


def in_threads(*work):
    """Runs the functions at the same time; raises what one of them raised."""
    results, errors = [None] * len(work), []

    def run(index, function):
        try:
            results[index] = [function() for _ in range(4)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("devices", [(0, 0), pytest.param((0, 1), marks=two_gpus)])
def test_two_threads_on_two_models(devices, dtype, cache):
    variants = zip(("mlra_4", "gla_2"), devices, strict=True)
    models = [model_of(dtype, variant).to(f"cuda:{device}") for variant, device in variants]
    work = [lambda m=m, d=d: tokens_of(m, d, cache=cache) for m, d in zip(models, devices, strict=True)]
    expected = [function() for function in work]
    for tokens, alone in zip(in_threads(*work), expected, strict=True):
        assert all(same(some, alone, dtype) for some in tokens)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_on_one_model(dtype, cache):
    model = model_of(dtype).to("cuda:0")
    expected = tokens_of(model, cache=cache)
    for tokens in in_threads(*[lambda: tokens_of(model, cache=cache)] * 2):
        assert all(same(some, expected, dtype) for some in tokens)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype, cache):
    """The tokens of repeated full forwards under the same autocast, up to the first near tie."""
    model = model_of(dtype).to("cuda:0")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        tokens = tokens_of(model, cache=cache)
        sequence = random_ids(2, 9, seed=23).cuda()
        clear = torch.ones(2, dtype=torch.bool)
        for place in range(9, 9 + NEW_TOKENS):
            logits = model(sequence, use_cache=False).logits[:, -1].float()
            first, second = logits.topk(2, dim=-1).values.unbind(-1)
            clear &= (first - second > 0.1 * logits.std()).cpu()
            chosen = logits.argmax(-1)
            if cache != "quantized":
                assert torch.equal(tokens[clear, place], chosen.cpu()[clear]), f"token {place - 9}"
            sequence = torch.cat([sequence, chosen[:, None]], dim=1)
    assert tokens.shape == (2, 9 + NEW_TOKENS)
