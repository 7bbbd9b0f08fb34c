"""FlashAttention-3's real operators on a GPU: as decode implementation, and for prompts by the library's interface.

They come from `flash_attn_interface`, or out of vLLM's wheel: an installed vLLM, or the path of its
`vllm_flash_attn/_vllm_fa3_C.abi3.so` in MLRA_BENCH_LIBRARIES. Those are forward only, so training is not tested here.
"""

import pytest
import torch

from modeling_mlra import MLRACache, decode_flash_mlra
from modeling_mlra.decode_mlra import decode_calls, latent_attention
from modeling_mlra.generation_mlra import captured_decodes
from scripts.flash_operators import interface
from tests.decode_inputs import in_pages, inputs, oracle, ratio
from tests.flash_package import run_beside_package, write_package
from tests.models import VARIANTS, random_ids, rms_ratio, tiny_model
from tests.tolerances import KERNEL_BF16_RATIO

pytestmark = pytest.mark.gpu
RELEASED_HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
SHAPES = {  # latents, groups, heads of a latent, latent width
    "mla": (1, 1, 24, 512),
    "gla_2": (2, 2, 12, 256),
    "gla_4": (4, 4, 6, 128),
    "mlra_2": (4, 2, 12, 128),
    "mlra_4": (4, 1, 24, 128),
    "mlra_4 on 2 ranks": (2, 1, 24, 128),
    "mlra_4 on 4 ranks": (1, 1, 24, 128),
}


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch):
    """FlashAttention-3 behind the decode hook."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention-3 takes a Hopper GPU")
    module = interface()
    if module is None:
        pytest.skip("neither flash_attn_interface nor vLLM's _vllm_fa3_C*.so is here")
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", module)


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(shape, length, is_paged):
    """Against float64, lengths of all kinds; unused rows hold what is finite and large."""
    num_latents, groups, heads, width = SHAPES[shape]
    ends = [300, 7, 129, 64]
    arguments, kv_end = inputs(4, length, num_latents, groups, heads, width, 64, 320, torch.bfloat16, ends=ends)
    expected = oracle(*arguments, kv_end, scaling=192**-0.5)
    pages = {}
    if is_paged:
        arguments, pages = in_pages(arguments, kv_end, 64)
        pages["block_table"] = pages["block_table"].cuda()
    arguments[3]._base.nan_to_num_(1e3)
    rows = arguments[3]._base.cuda()  # latents and keys stay views of one row
    latents = rows[..., : num_latents * width].unflatten(-1, (num_latents, width))
    before = decode_calls["flash_attention_3"]
    result = latent_attention(
        *(x.cuda() for x in arguments[:2]), latents, rows[..., num_latents * width :], kv_end=kv_end.cuda(),
        scaling=192**-0.5, implementation="flash_attention_3", **pages,
    )  # fmt: skip
    assert decode_calls["flash_attention_3"] == before + 1
    assert ratio(result, expected) < KERNEL_BF16_RATIO


def released_heads_model(variant, dtype, implementation):
    """Two layers with the released heads and latents."""
    sizes = {"num_attention_heads": 24, "q_lora_rank": 48, "hidden_size": 96}
    model = tiny_model(variant, dtype=dtype, decode_implementation=implementation, **RELEASED_HEADS, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    return model.cuda()


@torch.no_grad()
def step_logits(model, ids, prompt):
    """Logits of every token behind the prompt, a step each, over a static cache with room to spare."""
    cache = MLRACache(model.config, max_cache_len=ids.shape[1] + 70)
    model(ids[:, :prompt], cache=cache)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(prompt, ids.shape[1])]
    return torch.cat(steps, dim=1).float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_a_model(variant):
    """Logits as near to float32's as those of plain torch in bfloat16."""
    ids = random_ids(3, 150).cuda()
    found = {
        name: step_logits(released_heads_model(variant, torch.bfloat16, name), ids, 130)
        for name in ("torch", "flash_attention_3")
    }
    with torch.no_grad():
        exact = released_heads_model(variant, torch.float32, "torch")(ids, use_cache=False).logits[:, 130:]
    assert rms_ratio(exact, found["flash_attention_3"]) <= 1.2 * rms_ratio(exact, found["torch"])


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"disable_compile": True}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation(variant, settings):
    """Captured and not: every token is that of a float32 forward, but where two are nearer than bfloat16 can tell."""
    model = released_heads_model(variant, torch.bfloat16, "flash_attention_3")
    ids = random_ids(3, 30).cuda()
    captures, calls = sum(captured_decodes.values()), decode_calls["flash_attention_3"]
    tokens = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, **settings)
    assert decode_calls["flash_attention_3"] > calls
    assert (sum(captured_decodes.values()) > captures) == ("disable_compile" not in settings)
    with torch.no_grad():
        exact = released_heads_model(variant, torch.float32, "torch")(tokens, use_cache=False).logits[:, 29:-1]
        rounded = released_heads_model(variant, torch.bfloat16, "torch")(tokens, use_cache=False).logits[:, 29:-1]
    chosen = exact.gather(-1, tokens[:, 30:, None])[..., 0]
    noise = 4 * (rounded.float() - exact).pow(2).mean().sqrt()
    assert (chosen >= exact.amax(-1) - noise).all()
    assert (tokens[:, 30:] == exact.argmax(-1)).float().mean() > 0.8


def test_padding_is_refused_by_name():
    model = released_heads_model("mlra_4", torch.bfloat16, "flash_attention_3")
    ids = random_ids(2, 20).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match="takes no left padding"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)


def test_prompts_through_the_library(tmp_path):
    """What `test_gpu_users` asks of every FlashAttention, with this one behind the library's own interface."""
    is_installed = interface().__name__ == "flash_attn_interface"
    package = tmp_path if is_installed else write_package(tmp_path)
    chosen = "flash_attention_3 and not training"
    run = run_beside_package(
        package, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu_users.py", "-k", chosen
    )
    assert run.returncode == 0 and "3 passed" in run.stdout and "skipped" not in run.stdout, run.stdout + run.stderr
