"""Decode attention: the torch form and the Triton kernel against an independent float64 oracle.

Triton runs in its interpreter here, so that no GPU is needed; tests marked `gpu` run the real kernels.
"""

import pytest
import torch

from modeling_mlra import decode_plans_mlra, decode_triton_mlra
from modeling_mlra.decode_arguments_mlra import DecodeInputs, DecodeTile
from modeling_mlra.decode_mlra import decode_calls, latent_attention
from modeling_mlra.decode_plans_mlra import DecodePlan
from modeling_mlra.decode_reference_mlra import reference_latent_attention
from tests import tolerances
from tests.decode_inputs import DEVICE, FP32_RATIO, in_pages, inputs, oracle, ratio, run

pytest.importorskip("triton")

STRUCTURES = {"mla": (1, 1), "gla_2": (2, 1), "gla_4": (4, 1), "mlra_2": (4, 2), "mlra_4": (4, 4)}
pytestmark = [pytest.mark.usefixtures("no_choice_from_outside")]
if DEVICE == "cuda":  # where there is one, all of them run on the GPU
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh results and partial results start as NaN: whatever the kernel does not write shows."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(decode_triton_mlra.torch, "empty", poisoned_empty)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_structures_ragged_with_nan_tail(structure, implementation, poisoned):
    num_latents, branches = STRUCTURES[structure]
    arguments, kv_end = inputs(4, 1, num_latents, num_latents // branches, 3, 16, 16, 70, ends=[63, 1, 0, 37])
    result = run(arguments, kv_end, implementation, scaling=0.2)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO
    assert result[2].eq(0).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_query_lengths_are_causal(length, implementation, poisoned):
    arguments, kv_end = inputs(2, length, 4, 2, 3, 16, 16, 45, ends=[45, max(length, 3)])
    result = run(arguments, kv_end, implementation, scaling=0.3)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.3)) < FP32_RATIO


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_padding_and_holes(implementation, poisoned):
    arguments, kv_end = inputs(3, 2, 4, 1, 3, 16, 16, 50, ends=[50, 41, 20])
    kv_start = torch.tensor([0, 17, 20], dtype=torch.int32)  # the last sees nothing at all
    key_mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    for rows in arguments[2:]:
        rows[~key_mask] = float("nan")
    expected = oracle(*arguments, kv_end, kv_start, key_mask, scaling=0.2)
    result = run(arguments, kv_end, implementation, kv_start=kv_start, key_mask=key_mask, scaling=0.2)
    assert ratio(result, expected) < FP32_RATIO
    assert result[2].eq(0).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(("heads", "width", "rope"), [(24, 16, 16), (5, 24, 8), (1, 48, 20), (40, 16, 16)])
def test_sizes_that_are_no_powers_of_two(heads, width, rope, implementation, poisoned):
    arguments, kv_end = inputs(1, 1, 2, 1, heads, width, rope, 37)
    result = run(arguments, kv_end, implementation, scaling=0.2)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, implementation):
    arguments, kv_end = inputs(2, 1, 4, 1, 3, 32, 16, 150, dtype=dtype, ends=[150, 77])
    result = run(arguments, kv_end, implementation, scaling=0.15)
    assert result.dtype == dtype
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.15)) < tolerances.KERNEL_BF16_RATIO


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_paged_rows(page_size, implementation, poisoned):
    arguments, kv_end = inputs(2, 2, 4, 1, 3, 16, 16, 42, ends=[42, 9])
    paged, options = in_pages(arguments, kv_end, page_size)
    result = run(paged, kv_end, implementation, scaling=0.2, **options)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


def test_large_scores_do_not_overflow():
    arguments, kv_end = inputs(1, 1, 1, 1, 2, 16, 16, 90)
    arguments = (arguments[0] * 100, *arguments[1:])
    for implementation in ("torch", "triton"):
        result = run(arguments, kv_end, implementation, scaling=1.0)
        assert ratio(result, oracle(*arguments, kv_end, scaling=1.0)) < FP32_RATIO


@pytest.mark.parametrize("programs_per_sm", [1, 5])
@pytest.mark.parametrize(("latents", "rows"), [(1, 16), (2, 16), (4, 32)])
def test_every_split_of_the_work(latents, rows, programs_per_sm, poisoned):
    """Shares that start and end inside sequences, whole sequences between them, more programs than units."""
    arguments, kv_end = inputs(5, 1, 4, 1, 3, 16, 16, 64, ends=[64, 3, 0, 40, 17])
    tile = DecodeTile(NL=latents, BM=rows, BN=16, RP=16, EP=16)
    plan = DecodePlan(tile, unit=8, programs_per_sm=programs_per_sm * 4)
    moved = [x.to(DEVICE) for x in (*arguments, kv_end)]
    call = DecodeInputs(*moved, kv_start=None, key_mask=None, block_table=None, page_size=0, scaling=0.2)
    result = decode_triton_mlra.triton_latent_attention(call, plan)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_settled_rows_give_the_same_result(implementation):
    """On Hopper GPUs with a row that the kernel right in front has written."""
    size = (1, 1, 1, 1, 64, 128, 64, 5000) if DEVICE == "cuda" else (2, 1, 4, 1, 3, 16, 16, 20)
    arguments, kv_end = inputs(*size, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    arguments = [x.to(DEVICE) for x in arguments]
    expected = run(arguments, kv_end, implementation, scaling=0.2)
    newest = [x[:, -1].clone() for x in arguments[2:]]
    for _ in range(5):
        for rows, row in zip(arguments[2:], newest, strict=True):
            rows[:, -1] = float("nan")
            rows[:, -1] = row
        assert torch.equal(run(arguments, kv_end, implementation, scaling=0.2, settled=True), expected)


def test_reference_is_differentiable_and_float64():
    arguments, kv_end = inputs(1, 2, 2, 1, 2, 8, 4, 6, dtype=torch.float64)
    arguments = [x.clone().requires_grad_() for x in arguments]

    def attend(*x):
        return latent_attention(*x, kv_end=kv_end, scaling=0.2)

    assert torch.autograd.gradcheck(attend, arguments)
    assert (attend(*arguments) - oracle(*arguments, kv_end, scaling=0.2)).abs().max() < tolerances.MATHEMATICS_ATOL


# --- the operator ---


def operator_arguments():
    arguments, kv_end = inputs(2, 2, 4, 2, 3, 16, 16, 20, ends=[20, 11])
    moved = [x.to(DEVICE) for x in arguments]
    return (*moved, kv_end.to(DEVICE), None, None, None, 0, 0.2)


def test_operator_is_well_formed():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.mlra.latent_attention_triton.default, operator_arguments(), test_utils=checks)


@pytest.mark.parametrize("implementation", ["auto", "torch", "triton"])
def test_compiles_without_graph_breaks(implementation):
    arguments, kv_end = inputs(2, 1, 4, 1, 3, 16, 16, 20, ends=[20, 11])

    def attend(*x):
        return latent_attention(*x, kv_end=kv_end, scaling=0.2, implementation=implementation)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    before = decode_calls["triton"]
    if DEVICE == "cpu":
        assert ratio(compiled(*arguments), oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO
        assert (decode_calls["triton"] > before) == (implementation == "triton")


# --- the real thing ---


@pytest.mark.gpu
@pytest.mark.parametrize(("num_latents", "heads"), [(1, 64), (4, 24), (1, 128), (4, 3)])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_gpu_shapes(num_latents, heads, length):
    arguments, kv_end = inputs(3, length, num_latents, 1, heads, 128, 64, 700, torch.bfloat16, ends=[700, 65, 16])
    mask = torch.rand(3, 700, generator=torch.Generator().manual_seed(1)) > 0.2
    holes = [x.clone() for x in arguments]
    for rows in holes[2:]:
        rows[~mask] = float("nan")
    for options in ({}, {"key_mask": mask, "kv_start": torch.tensor([3, 0, 0], dtype=torch.int32)}):
        used = holes if options else arguments
        exact = [x.double() for x in used]
        expected = reference_latent_attention(
            *exact, kv_end, options.get("kv_start"), options.get("key_mask"), scaling=0.07
        )
        result = run(used, kv_end, "triton", scaling=0.07, **options)
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(("num_latents", "groups", "heads", "length"), [(4, 1, 24, 1), (4, 1, 5, 6), (4, 2, 12, 2)])
def test_gpu_two_latents_in_one_program(batch, num_latents, groups, heads, length, monkeypatch):
    monkeypatch.setattr(decode_plans_mlra, "PAIRED_ROWS", 0)
    ends = [700 - 7 * b for b in range(batch)]
    arguments, kv_end = inputs(batch, length, num_latents, groups, heads, 128, 64, 700, torch.bfloat16, ends=ends)
    mask = torch.rand(batch, 700, generator=torch.Generator().manual_seed(1)) > 0.2
    holes = [x.clone() for x in arguments]
    for rows in holes[2:]:
        rows[~mask] = float("nan")
    for options in ({}, {"key_mask": mask, "kv_start": torch.arange(batch, dtype=torch.int32)}):
        used = holes if options else arguments
        expected = run([x.double() for x in used], kv_end, "torch", scaling=0.07, **options)
        result = run(used, kv_end, "triton", scaling=0.07, **options)
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO


@pytest.mark.gpu
def test_gpu_captures_into_a_cuda_graph_and_follows_kv_end():
    arguments, _ = inputs(2, 1, 4, 1, 24, 128, 64, 4096, torch.bfloat16)
    arguments = [x.cuda() for x in arguments]
    kv_end = torch.tensor([100, 4000], dtype=torch.int32, device="cuda")
    latent_attention(*arguments, kv_end=kv_end, scaling=0.07)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = latent_attention(*arguments, kv_end=kv_end, scaling=0.07)
    for ends in ([100, 4000], [4096, 1], [0, 777]):
        kv_end.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        exact = [x.double() for x in arguments]
        expected = reference_latent_attention(*exact, kv_end, scaling=0.07).cpu()
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO
