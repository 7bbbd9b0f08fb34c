"""What users do on a GPU: ordinary calls by name, each against an independent way to the same numbers."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from modeling_mlra.decode_mlra import decode_calls
from modeling_mlra.generation_mlra import captured_decodes
from scripts.loading import load_tokenizer
from tests.models import random_ids, rms_ratio, tiny_model, watched
from tests.paths import DEMO
from tests.tolerances import KERNEL_BF16_RATIO

pytestmark = pytest.mark.gpu
RELEASED_WIDTHS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_size": 96}
FLASH = {
    "flash_attention_2": importlib.util.find_spec("flash_attn_2_cuda"),
    "flash_attention_3": importlib.util.find_spec("flash_attn_interface"),
    "flash_attention_4": importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"),
}
flash = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not module, reason=f"{name} is not installed"))
        for name, module in FLASH.items()
    ],
)


def released_width_model(dtype=torch.bfloat16, **settings):
    """Two layers with the released heads, of 192 columns for keys and 128 for values."""
    sizes = {"num_attention_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 512}
    model = tiny_model("mlra_4", dtype=dtype, **RELEASED_WIDTHS, **sizes, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    return model.cuda()


def padded_inputs():
    ids = random_ids(3, 150).cuda()
    mask = torch.ones_like(ids)
    mask[0, :40] = mask[1, :7] = 0
    return ids, mask


@flash
@pytest.mark.parametrize("is_padded", [False, True])
def test_flash_attention_of_prompts(name, is_padded):
    """Logits as near to float32's as those of torch's own attention."""
    ids, mask = padded_inputs()
    mask = mask if is_padded else torch.ones_like(mask)
    model = released_width_model()
    logits = {}
    for implementation in ("sdpa", name):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
    model = model.float()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        exact = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert rms_ratio(exact, logits[name]) <= 1.2 * rms_ratio(exact, logits["sdpa"])


@flash
def test_flash_attention_in_training(name):
    """Gradients as near to float32's as those of torch's own attention."""
    ids, _ = padded_inputs()
    gradients = {}
    for implementation, dtype in (("eager", torch.float32), ("sdpa", torch.bfloat16), (name, torch.bfloat16)):
        model = released_width_model(dtype).train()
        model.set_attn_implementation(implementation)
        model(ids, labels=ids).loss.backward()
        gradients[implementation] = torch.cat(
            [parameter.grad.flatten().float() for parameter in model.model.layers[0].self_attn.parameters()]
        )
    found = {other: rms_ratio(gradients["eager"], gradients[other]) for other in ("sdpa", name)}
    assert found[name] <= 1.2 * found["sdpa"]


@flash
def test_flash_attention_before_captured_decoding(name):
    """`generate()` with that prefill: the first token of each row as torch's attention gives it; decoding captured."""
    ids, mask = padded_inputs()
    model = released_width_model()
    model.set_attn_implementation(name)
    before = sum(captured_decodes.values())
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert sum(captured_decodes.values()) > before
    model.set_attn_implementation("sdpa")
    assert torch.equal(tokens[:, :151], model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False))


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_cache_decodes(dtype, cache):
    model = tiny_model(dtype=dtype, num_hidden_layers=4).cuda()
    ids = random_ids(2, 9).cuda()
    settings = {"max_new_tokens": 16, "do_sample": False}
    with watched(model):
        expected = model.generate(ids, disable_compile=True, **settings)
    tokens = model.generate(ids, cache_implementation=cache, **settings)
    if (
        dtype == torch.bfloat16
    ):  # rows of another capacity are shared out otherwise, and a near tie may fall either way
        tokens, expected = tokens[:, : 9 + 4], expected[:, : 9 + 4]
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_rows_of_a_device_that_lags_behind(cache):
    """Rows are fetched into memory that an earlier layer may still read from, if nothing waits for it."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=6).cuda()
    ids = random_ids(2, 300).cuda()
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, disable_compile=True, **settings)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: torch.cuda._sleep(2_000_000))
    assert torch.equal(model.generate(ids, cache_implementation=cache, **settings), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_pipeline_takes_the_captured_loop(dtype):
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, device_map="cuda")
    tokenizer = load_tokenizer(DEMO)
    before = sum(captured_decodes.values())
    prompts = ["The sea was", "Once upon a time there lived a"]
    settings = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    texts = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, **settings)
    assert sum(captured_decodes.values()) > before
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").to("cuda")
        plain = model.generate(**ids, max_new_tokens=24, do_sample=False, disable_compile=True)
        expected = tokenizer.decode(plain[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        got = text[0]["generated_text"]
        assert got == expected if dtype == torch.float32 else got[:12] == expected[:12]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_forward(mode):
    """`torch.compile(model)`, as users write it: logits of the plain model, with and without CUDA graphs."""
    model = released_width_model()
    ids, _ = padded_inputs()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.float()
        compiled = torch.compile(model, mode=mode)
        for _ in range(3):
            got = compiled(ids, use_cache=False).logits.float()
    assert rms_ratio(expected, got) < KERNEL_BF16_RATIO * 2


def test_plain_loop_counts_the_triton_kernel():
    """What decodes by the modules runs Triton's kernel, by default."""
    model = released_width_model()
    before = decode_calls["triton"]
    ids, mask = padded_inputs()
    with watched(model):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, disable_compile=True)
    assert decode_calls["triton"] - before == 3 * len(model.model.layers)
