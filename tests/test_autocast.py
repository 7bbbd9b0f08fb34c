"""Decoding under torch.autocast gives the tokens of repeated full forwards under the same autocast."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_mlra import MLRACache, decode_triton_mlra
from modeling_mlra.decode_mlra import decode_calls, latent_attention
from tests.models import random_ids, rms_ratio, tiny_model
from tests.tolerances import KERNEL_BF16_RATIO

NEW_TOKENS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
CACHES = {
    "dynamic": lambda config: {},
    "static": lambda config: {"cache": MLRACache(config, max_cache_len=20)},
    "library dynamic": lambda config: {"cache": DynamicCache(config=config)},
    "library static": lambda config: {"cache": StaticCache(config, max_cache_len=20)},
}


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_every_cache(dtype, implementation):
    pytest.importorskip("triton")
    model = tiny_model("mlra_4", dtype=dtype, decode_implementation=implementation, num_hidden_layers=1).to(DEVICE)
    ids = random_ids(2, 9, seed=23).to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        expected = ids
        for _ in range(NEW_TOKENS):
            logits = model(expected, use_cache=False).logits[:, -1].float()
            first, second = logits.topk(2, dim=-1).values.unbind(-1)
            assert (first - second > 0.06 * logits.std()).all(), "no tie that rounding could decide"
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        for name, cache in CACHES.items():
            assert torch.equal(model.generate(ids, **settings, **cache(model.config)), expected), name
            before = decode_calls[implementation]  # where nothing is captured or compiled, calls are counted
            tokens = model.generate(ids, disable_compile=True, **settings, **cache(model.config))
            assert torch.equal(tokens, expected), name
            assert decode_calls[implementation] > before, name


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_queries_and_rows_of_different_dtypes(implementation, monkeypatch):
    """One dtype inside, that of the latents; the result is in the queries'."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 1, 4, 3, 16), (2, 1, 1, 3, 16), (2, 20, 4, 16), (2, 20, 16)
    q_latent, q_rope, latents, k_rope = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    options = {"kv_end": torch.tensor([20, 7], dtype=torch.int32, device=DEVICE), "scaling": 0.2}
    exact = latent_attention(q_latent.bfloat16().float(), q_rope, latents, k_rope.half().float(), **options)
    mixed = q_latent.bfloat16(), q_rope, latents, k_rope.half()
    launch, seen = decode_triton_mlra._launch, set()

    def recording(plan, inputs, out):
        seen.update(tensor.dtype for tensor in (out, *inputs[:4]))
        return launch(plan, inputs, out)

    monkeypatch.setattr(decode_triton_mlra, "_launch", recording)
    result = latent_attention(*mixed, implementation=implementation, **options)
    assert seen == ({torch.float32} if implementation == "triton" else set())  # the interpreter would mix them
    assert result.dtype == torch.bfloat16
    assert rms_ratio(exact, result.float()) < KERNEL_BF16_RATIO
