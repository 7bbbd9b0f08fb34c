"""Decode attention over pages: which of them the Hopper kernel reads, and, marked `gpu`, that it reads them right."""

import itertools

import pytest
import torch

from modeling_mlra import decode_plans_mlra, decode_triton_mlra, device_mlra
from modeling_mlra.decode_arguments_mlra import DecodeInputs, HopperTile
from modeling_mlra.decode_plans_mlra import decode_plans, fits_hopper
from modeling_mlra.device_mlra import DeviceFacts
from tests import tolerances
from tests.decode_inputs import DEVICE, in_pages, inputs, ratio, run

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("no_choice_from_outside")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
# Latents, groups, heads of a latent, width, query positions, whether two latents may share a program
CASES = [
    (4, 1, 24, 128, 1, False),
    (4, 1, 24, 128, 1, True),
    (4, 2, 12, 128, 2, True),
    (4, 4, 6, 128, 1, True),
    (1, 1, 64, 128, 1, False),
    (1, 1, 128, 128, 1, False),  # with 128 query rows a program has tiles of the page's height
    (4, 1, 24, 128, 5, False),
    (2, 2, 12, 256, 1, False),  # too wide for the Hopper kernel
    (1, 1, 24, 512, 1, False),
]
HOPPER = DeviceFacts(132, True, True, 232_448, 233_472, nvidia=True)


def paged_call(page_size=64, num_latents=4, width=128, heads=24, length=1, **options) -> DecodeInputs:
    sizes = (2, length, num_latents, 1, heads, width, 64, 300)
    arguments, kv_end = inputs(*sizes, dtype=torch.bfloat16, ends=[300, 65])
    paged, pages = in_pages(arguments, kv_end, page_size)
    given = {"kv_start": None, "key_mask": None, "scaling": 0.07} | pages | options
    return DecodeInputs(*paged, kv_end=kv_end, **given)


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"page_size": 128}, True),
        ({"page_size": 192}, True),
        ({"page_size": 32}, False),  # a tile would lie in two pages
        ({"page_size": 96}, False),
        ({"kv_start": torch.tensor([3, 0])}, False),  # and here in two
        ({"key_mask": torch.ones(2, 300, dtype=torch.bool)}, True),
        ({"width": 256}, False),
        ({"num_latents": 1}, True),
    ],
)
def test_pages_that_bulk_copies_take(changed, fits):
    call = paged_call(**changed)
    assert fits_hopper(call) == fits
    assert not fits_hopper(call._replace(latents=call.latents.float(), k_rope=call.k_rope.float()))
    assert not fits_hopper(call._replace(k_rope=call.k_rope[:, 1:33])), "not on 16 bytes"


@pytest.mark.parametrize(("page_size", "tile_rows"), [(0, 128), (64, 64), (128, 128), (192, 64), (256, 128)])
def test_tiles_of_many_query_rows_lie_in_one_page(page_size, tile_rows):
    plan = decode_plans(96, 4, 1, 128, 64, 2, 4096, True, HOPPER, page_size)[0]
    assert isinstance(plan.tile, HopperTile) and plan.tile.BM == 128
    assert plan.tile.BN == plan.unit == tile_rows


@pytest.mark.parametrize(("page_size", "kernel"), [(16, "decode_kernel"), (64, "rows_kernel"), (128, "rows_kernel")])
@pytest.mark.parametrize("length", [1, 4])
def test_kernel_and_pages_of_a_launch(page_size, kernel, length, monkeypatch):
    launched = []
    monkeypatch.setattr(
        decode_triton_mlra, "launch", lambda *arguments, **options: launched.append((arguments, options))
    )
    monkeypatch.setitem(device_mlra.known_devices, torch.device("cpu"), HOPPER)
    call = paged_call(page_size, length=length)
    decode_triton_mlra.triton_latent_attention(call)
    (_, started, _, *arguments), options = launched[0]
    assert started is getattr(decode_triton_mlra, kernel)
    page = options["SHAPE"].PAGE
    assert getattr(page, "value", page) == page_size  # in the interpreter a number as it is
    if kernel == "rows_kernel":
        c_desc, k_desc, *_ = arguments
        numbers = call.latents.shape[0]
        assert (c_desc.shape, c_desc.strides) == ([numbers, 4 * 128], [4 * 128 + 64, 1])
        assert (k_desc.shape, k_desc.strides) == ([numbers, 64], [4 * 128 + 64, 1])
        assert page_size % c_desc.block_shape[0] == 0
        pages = next(x for x in arguments if hasattr(x, "table"))
        assert pages.table is call.block_table and pages.b == call.block_table.stride(0)


@pytest.fixture
def plans_used(monkeypatch):
    """The plans that are launched."""
    launch, used = decode_triton_mlra._launch, []
    monkeypatch.setattr(decode_triton_mlra, "_launch", lambda plan, *x: used.append(plan) or launch(plan, *x))
    return used


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "page_size"), [*itertools.product(CASES, (64, 128)), (CASES[0], 16), (CASES[0], 192), (CASES[5], 192)]
)
def test_gpu_shuffled_pages(case, page_size, plans_used, monkeypatch):
    """Ragged sequences, some of whole pages, one empty; NaN in unused pages and rows; -1 in the rest of the table."""
    num_latents, groups, heads, width, length, paired = case
    monkeypatch.setattr(decode_plans_mlra, "PAIRED_ROWS", 0 if paired else 2**40)
    ends = [700, 64, 0, 129, 384, 5, 1000]
    sizes = (len(ends), length, num_latents, groups, heads, width, 64, 1000)
    arguments, kv_end = inputs(*sizes, dtype=torch.bfloat16, ends=ends)
    mask = torch.rand(len(ends), 1000, generator=torch.Generator().manual_seed(1)) > 0.2
    holes = [*arguments[:2], *(x.clone() for x in arguments[2:])]
    for rows in holes[2:]:
        rows[~mask] = float("nan")
    for used, options in ((arguments, {}), (holes, {"key_mask": mask, "settled": True})):
        paged, pages = in_pages(used, kv_end, page_size)
        expected = run([x.double() for x in used], kv_end, "torch", scaling=0.07, **options)
        result = run(paged, kv_end, "triton", scaling=0.07, **options, **pages)
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO
    hopper = device_mlra.device_facts(torch.device(DEVICE)).hopper
    on_bulk_copies = hopper and page_size % 64 == 0 and width == 128
    assert {isinstance(plan.tile, HopperTile) for plan in plans_used} == {on_bulk_copies}


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [24, 64])
def test_gpu_graph_follows_lengths_and_tables(heads):
    """As in serving: a captured step reads tables and lengths that change between replays, padding of length 0 too."""
    arguments, kv_end = inputs(4, 1, 4, 1, heads, 128, 64, 2048, dtype=torch.bfloat16)
    paged, pages = in_pages(arguments, kv_end, 64)
    q_latent, q_rope, latents, k_rope = (x.cuda() for x in paged)
    table, kv_end = pages["block_table"].cuda(), kv_end.cuda()
    options = {"scaling": 0.07, "page_size": 64, "block_table": table, "kv_end": kv_end}
    run_once = lambda **others: decode_triton_mlra.triton_latent_attention(  # noqa: E731
        DecodeInputs(q_latent, q_rope, latents, k_rope, kv_start=None, key_mask=None, **options | others)
    )
    run_once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run_once()
    for ends, order in (([2048, 100, 0, 64], [0, 1, 2, 3]), ([1, 2047, 640, 0], [3, 1, 0, 2])):
        kv_end.copy_(torch.tensor(ends, dtype=torch.int32))
        table.copy_(pages["block_table"][order])
        graph.replay()
        rows = [x[order].double() for x in arguments[2:]]
        queries = [x.double() for x in arguments[:2]]
        expected = run([*queries, *rows], kv_end.cpu(), "torch", scaling=0.07)
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO
