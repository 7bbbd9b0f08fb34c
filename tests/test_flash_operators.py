"""FlashAttention-3's interface over vLLM's operator: a stand-in of the operator's schema, against plain attention."""

import pytest
import torch

from scripts import flash_operators
from tests.flash_package import run_beside_package, write_package
from tests.flash_stand_in import SCHEMA, attention, stand_in
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
    q, k, v = tensors((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 3))
    expected = torch.stack([attention(q[b], k[b], v[b], 6**-0.5, causal) for b in range(2)])
    torch.testing.assert_close(
        flash_operators.flash_attn_func(q, k, v, causal=causal), expected, atol=MATHEMATICS_ATOL, rtol=0
    )


def test_sequences_one_behind_another():
    q, k, v = tensors((6, 4, 6), (9, 4, 6), (9, 4, 3))
    offsets = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 6], [0, 3, 9])]
    result = flash_operators.flash_attn_varlen_func(q, k, v, *offsets, 4, 6, softmax_scale=0.3, causal=True)
    expected = torch.cat([attention(q[:2], k[:3], v[:3], 0.3, True), attention(q[2:], k[3:], v[3:], 0.3, True)])
    torch.testing.assert_close(result, expected, atol=MATHEMATICS_ATOL, rtol=0)


@pytest.mark.parametrize("is_paged", [False, True])
def test_rows_of_a_cache(is_paged):
    q, qv, k, v = tensors((2, 2, 4, 6), (2, 2, 4, 8), (2, 12, 1, 6), (2, 12, 1, 8))
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


def test_gradients_are_refused():
    q, k, v = tensors((1, 2, 1, 4), (1, 2, 1, 4), (1, 2, 1, 4))
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
