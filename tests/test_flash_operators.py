"""FlashAttention-3's interface over vLLM's operator: a stand-in of the operator's schema, against plain attention."""

import pytest
import torch

from scripts import flash_operators
from tests.flash_package import run_beside_package, write_package
from tests.tolerances import MATHEMATICS_ATOL

SCHEMA = """fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,
Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,
float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,
bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
"""As the library in vLLM 0.26.0's wheel says it."""
NAMES = [part.split()[-1] for part in SCHEMA[SCHEMA.index("(") + 1 : SCHEMA.rindex(")")].split(",")]
UNUSED = {
    "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True, "num_splits": 0,
    "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
}  # fmt: skip


def attention(q, k, v, scale, causal, qv=None):
    """One sequence `[T, H, D]`, `[S, K, D]`, `[S, K, V]`, the queries its last; straight from the definition."""
    result = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for t in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + t + 1 if causal else k.shape[0]
        for h in range(q.shape[1]):
            of_head = h // (q.shape[1] // k.shape[1])
            scores = k[:seen, of_head] @ q[t, h] + (0 if qv is None else v[:seen, of_head] @ qv[t, h])
            result[t, h] = (scores * scale).softmax(0) @ v[:seen, of_head]
    return result


def stand_in(*arguments):
    """The operator, as far as it is used, on one sequence after another."""
    given = dict(zip(NAMES, arguments, strict=True))
    used = {"q", "k", "v", "q_v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k"}
    used |= {"page_table", "softmax_scale", "is_causal"}
    assert {name: given[name] for name in NAMES if name not in used} == dict.fromkeys(set(NAMES) - used) | UNUSED
    q, k, v, qv, scale, causal = (given[n] for n in ("q", "k", "v", "q_v", "softmax_scale", "is_causal"))
    assert given["seqused_k"] is not None or given["cu_seqlens_q"] is not None  # as vLLM compiles it
    if given["cu_seqlens_q"] is not None:
        ends = zip(*(given[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k")), strict=True)
        (a, b), *ends = ends
        parts = []
        for end_q, end_k in ends:
            assert end_q - a <= given["max_seqlen_q"] and end_k - b <= given["max_seqlen_k"]
            parts.append(attention(q[a:end_q], k[b:end_k], v[b:end_k], scale, causal))
            a, b = end_q, end_k
        return [torch.cat(parts)]
    if given["page_table"] is not None:
        k, v = (x[given["page_table"].clamp(min=0).long()].flatten(1, 2) for x in (k, v))
    results = []
    for b, length in enumerate(given["seqused_k"].tolist()):
        own = None if qv is None else qv[b]
        results.append(attention(q[b], k[b, :length], v[b, :length], scale, causal, own))
    return [torch.stack(results)]


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
