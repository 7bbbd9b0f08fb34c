"""FlashAttention-3's interface over vLLM's operator: a stand-in of the operator's schema, against plain attention."""

from unittest.mock import MagicMock

import pytest
import torch

from modeling_mlra import MLRACache, decode_flash_mlra, decode_mlra
from modeling_mlra.generation_mlra import captured_decode
from scripts import flash_operators
from tests.flash_package import run_beside_package, write_package
from tests.flash_stand_in import SCHEMA, attention, stand_in
from tests.models import random_ids, tiny_model
from tests.tolerances import MATHEMATICS_ATOL


@pytest.fixture(scope="module", autouse=True)
def operator():
    if flash_operators.has_operators():
        pytest.skip("the real operator is here, which takes no CPU's tensors")
    library = torch.library.Library(flash_operators.LIBRARY, "FRAGMENT")
    library.define(SCHEMA.replace("Tensor!", "Tensor"))
    library.impl("fwd", stand_in, "CompositeExplicitAutograd")
    assert flash_operators.has_operators()
    yield
    library._destroy()


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_prompts(causal):
    q, k, v = tensors((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 8))
    expected = torch.stack([attention(q[b], k[b], v[b], 16**-0.5, causal) for b in range(2)])
    torch.testing.assert_close(
        flash_operators.flash_attn_func(q, k, v, causal=causal), expected, atol=MATHEMATICS_ATOL, rtol=0
    )


def test_sequences_one_behind_another():
    q, k, v = tensors((6, 4, 16), (9, 4, 16), (9, 4, 8))
    offsets = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 6], [0, 3, 9])]
    result = flash_operators.flash_attn_varlen_func(q, k, v, *offsets, 4, 6, softmax_scale=0.3, causal=True)
    expected = torch.cat([attention(q[:2], k[:3], v[:3], 0.3, True), attention(q[2:], k[3:], v[3:], 0.3, True)])
    torch.testing.assert_close(result, expected, atol=MATHEMATICS_ATOL, rtol=0)


@pytest.mark.parametrize("is_paged", [False, True])
def test_rows_of_a_cache(is_paged):
    q, qv, k, v = tensors((2, 2, 4, 16), (2, 2, 4, 256), (2, 12, 1, 16), (2, 12, 1, 256))
    lengths = torch.tensor([11, 5], dtype=torch.int32)
    expected = torch.stack([attention(q[b], k[b, :n], v[b, :n], 0.3, True, qv[b]) for b, n in enumerate((11, 5))])
    paged = {}
    if is_paged:
        table = torch.tensor([[4, 1, 3], [0, 5, -1]], dtype=torch.int32)
        pages = table[:, :, None].clamp(min=0)
        pools = [torch.full((6, 4, 1, x.shape[-1]), torch.nan, dtype=x.dtype) for x in (k, v)]
        for pool, x in zip(pools, (k, v), strict=True):
            for b, i in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
                pool[pages[b, i, 0]] = x[b, 4 * i : 4 * i + 4]
        (k, v), paged = pools, {"page_table": table}
    result = flash_operators.flash_attn_with_kvcache(
        q, k, v, qv=qv, cache_seqlens=lengths, softmax_scale=0.3, causal=True, **paged
    )
    torch.testing.assert_close(result, expected, atol=MATHEMATICS_ATOL, rtol=0)


def test_what_is_not_in_order_is_copied():
    """Lengths expanded from one, columns that are no rows: the module takes them, the operator does not."""
    q, qv, k, v = tensors((2, 2, 4, 16), (2, 2, 4, 256), (2, 12, 1, 16), (2, 12, 1, 256))
    expected = torch.stack([attention(q[b], k[b, :9], v[b, :9], 0.3, True, qv[b]) for b in range(2)])
    q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    lengths = torch.tensor([9], dtype=torch.int32).expand(2)
    assert not lengths.is_contiguous() and q.stride(-1) != 1
    result = flash_operators.flash_attn_with_kvcache(
        q, k, v, qv=qv, cache_seqlens=lengths, softmax_scale=0.3, causal=True
    )
    torch.testing.assert_close(result, expected, atol=MATHEMATICS_ATOL, rtol=0)


RELEASED_HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}


@pytest.fixture
def behind_the_hook(monkeypatch):
    """The stand-in as decode implementation; of its obstacles all but the device and its 16 bits."""
    on_gpu = MagicMock(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    refuses = decode_flash_mlra.flash_obstacle
    monkeypatch.setattr(decode_mlra, "flash_obstacle", lambda query, *others: refuses(on_gpu, *others))
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", flash_operators)


@pytest.mark.usefixtures("behind_the_hook", "no_choice_from_outside")
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"custom_generate": captured_decode}])
@pytest.mark.parametrize("variant", ["mla", "mlra_4"])
def test_generation(variant, settings):
    """Under a mask of no padding, as tokenizers give it; by the library's loop and by ours."""
    model, plain = (
        tiny_model(variant, decode_implementation=name, **RELEASED_HEADS) for name in ("flash_attention_3", "torch")
    )
    ids, calls = random_ids(3, 6), decode_mlra.decode_calls["flash_attention_3"]
    settings = {"max_new_tokens": 4, "do_sample": False} | settings
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert decode_mlra.decode_calls["flash_attention_3"] >= calls + 3 * model.config.num_hidden_layers
    assert tokens.equal(plain.generate(ids, **settings))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="takes no left padding and no key mask"):
        model.generate(ids, attention_mask=mask, **settings)


@torch.no_grad()
@pytest.mark.usefixtures("behind_the_hook", "no_choice_from_outside")
@pytest.mark.parametrize("room", [None, 9])
def test_masks(room):
    """One that hides none of the rows in use is none; others are refused."""
    model = tiny_model("mlra_4", decode_implementation="flash_attention_3", **RELEASED_HEADS)
    ids = random_ids(2, 7)

    def step(mask=None):
        cache = MLRACache(model.config, max_cache_len=room)
        model(ids[:, :6], cache=cache)
        return model(ids[:, 6:], cache=cache, attention_mask=mask).logits

    expected, mask = step(), torch.ones(2, 9, dtype=torch.long)
    mask[:, 7:] = 0  # rows that are not in use
    for told in (mask, mask[:, :7]):
        assert step(told).equal(expected)
    mask[1, 0] = 0
    for told in (mask, mask[:, :7], mask[:1, :6].expand(2, -1)):
        with pytest.raises(ValueError, match="takes no left padding and no key mask"):
            step(told)


def test_gradients_are_refused():
    q, k, v = tensors((1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8))
    with pytest.raises(NotImplementedError, match="no backward pass"):
        flash_operators.flash_attn_func(q.requires_grad_(), k, v)
    with torch.no_grad():
        flash_operators.flash_attn_func(q, k, v)


def test_library_finds_the_package(tmp_path):
    """By the module and its distribution's metadata, as it finds the real one (where there is a GPU)."""
    code = (
        "import transformers.utils.import_utils as u; u.is_torch_cuda_available = lambda: True;"
        "print(u.is_flash_attn_3_available(), u.is_flash_attn_2_available(), u.is_flash_attn_4_available())"
    )
    found = run_beside_package(write_package(tmp_path), "-c", code)
    assert found.stdout.split() == ["True", "False", "False"], found.stderr
