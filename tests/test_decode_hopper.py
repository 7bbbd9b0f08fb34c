"""The Hopper kernel as plain Python threads, on rows of 16 bits and of eight, against float64.

Unused rows are NaN. What the hardware adds (layouts, fences, proxies) is left to the tests marked `gpu`.
"""

import itertools

import pytest
import torch

from modeling_mlra import decode_plans_mlra, decode_triton_mlra, device_mlra, rows_mlra
from modeling_mlra.decode_arguments_mlra import DecodeInputs, HopperTile
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.decode_plans_mlra import fits_hopper
from modeling_mlra.device_mlra import DeviceFacts
from modeling_mlra.rows_mlra import RowFormat
from tests import hopper_in_python, tolerances
from tests.models import rms_ratio

pytest.importorskip("triton.experimental.gluon")

# Latents, groups, heads of a latent, query positions, whether two latents may share a program
CASES = {
    "one latent": (1, 1, 33, 1, False),
    "four": (4, 1, 5, 1, False),
    "two in a program": (4, 2, 7, 1, True),
    "several positions": (2, 2, 17, 4, False),
}
ENDS = [600, 0, 129]


def call(
    num_latents,
    groups,
    heads,
    length,
    eight_bits,
    page_size=0,
    masked=False,
    ends=ENDS,
    dtype=torch.float16,
    device="cpu",
):
    """Arguments and options of `latent_attention`, and the same with what the rows stand for. `masked`: with holes and
    padding on the left."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    page_rows = page_size or 64
    batch, rows = len(ends), -(-max(ends) // page_rows) * page_rows
    row_format = RowFormat(num_latents * 128, 64, dtype, num_latents if eight_bits else 0)
    cached = row_format.join(normal(batch, rows, num_latents * 128), normal(batch, rows, 64))
    options = {"kv_end": torch.tensor(ends, dtype=torch.int32, device=device), "scaling": 0.07}
    used = torch.arange(rows, device=device) < options["kv_end"][:, None]
    if masked:
        options["key_mask"] = torch.rand(batch, rows, generator=generator).to(device) > 0.3
        used = used & options["key_mask"]
        if not page_size:  # pages start with a sequence
            options["kv_start"] = torch.arange(batch, dtype=torch.int32, device=device) * 70 % 97
            used = used & (torch.arange(rows, device=device) >= options["kv_start"][:, None])
    cached.view(torch.uint8)[~used] = 255
    queries = normal(batch, length, num_latents, heads, 128), normal(batch, length, groups, heads, 64)
    latents, k_rope, scales = row_format.views(cached, num_latents)
    plain = latents if scales is None else rows_mlra.dequantized(latents, scales, dtype)
    truth = [x.double() for x in (*queries, plain, k_rope)], dict(options)
    if page_size:
        blocks = rows // page_size
        order = torch.randperm(batch * blocks, generator=generator).to(device)
        pool = torch.empty_like(cached).view(-1, page_size, cached.shape[-1])
        pool[order] = cached.view(-1, page_size, cached.shape[-1])
        latents, k_rope, scales = row_format.views(pool.flatten(0, 1), num_latents)
        options |= {"block_table": order.view(batch, blocks).int(), "page_size": page_size}
    return ([*queries, latents, k_rope], options | {"scales": scales}), truth


RELEASED = [
    *((4, 1, 24, length, False) for length in (1, 2, 5)),
    (4, 1, 24, 1, True),
    (4, 2, 12, 1, False),
    (4, 2, 12, 2, True),
    (4, 4, 6, 1, True),
    (2, 1, 24, 1, False),  # ranks of two, of four
    (1, 1, 24, 1, False),
    (1, 1, 64, 1, False),
    (1, 1, 128, 1, False),
]


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of the plans that are launched."""
    launched, found = decode_triton_mlra._launch, []
    monkeypatch.setattr(decode_triton_mlra, "_launch", lambda plan, *x: found.append(plan.tile) or launched(plan, *x))
    return found


@pytest.fixture
def in_python(monkeypatch):
    """A Hopper GPU of a few multiprocessors in plain Python."""
    facts = DeviceFacts(9, hopper=True, nvidia=True, shared_bytes=232_448, shared_per_multiprocessor=233_472)
    monkeypatch.setitem(device_mlra.known_devices, torch.device("cpu"), facts)
    monkeypatch.setattr(decode_triton_mlra, "launch", hopper_in_python.launch)


@pytest.mark.skipif(not device_mlra.INTERPRETED, reason="interprets the kernel that reduces")
@pytest.mark.usefixtures("in_python")
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("options", [{}, {"masked": True}, {"page_size": 64}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention(case, options, eight_bits, tiles, monkeypatch):
    *sizes, paired = CASES[case]
    monkeypatch.setattr(decode_plans_mlra, "PAIRED_ROWS", 0 if paired else 2**40)
    (arguments, given), (truth, of_truth) = call(*sizes, eight_bits, **options)
    result = latent_attention(*arguments, implementation="triton", **given)
    expected = latent_attention(*truth, implementation="torch", **of_truth)
    assert rms_ratio(expected, result) < tolerances.KERNEL_BF16_RATIO
    (tile,) = tiles
    assert isinstance(tile, HopperTile) and (tile.NL == 2) == paired and (tile.WIDE > 0) == eight_bits


@pytest.mark.parametrize("num_latents", [1, 2, 4])
def test_rows_that_bulk_copies_take(num_latents):
    """Rows and each of their parts begin on 16 bytes; what does not goes to the portable kernel."""
    (arguments, options), _ = call(num_latents, 1, 3, 1, True, dtype=torch.bfloat16)
    given = DecodeInputs(*arguments, kv_start=None, key_mask=None, block_table=None, page_size=0, **options)
    assert fits_hopper(given)
    assert not fits_hopper(given._replace(k_rope=given.k_rope.float()))
    assert fits_hopper(given._replace(scales=given.scales.contiguous())) == (num_latents == 4)
    packed = torch.zeros(*given.k_rope.shape[:2], 128 * num_latents + 4, dtype=torch.uint8)
    latents = packed[..., : 128 * num_latents].view(torch.float8_e4m3fn).unflatten(-1, (num_latents, 128))
    assert not fits_hopper(given._replace(latents=latents))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "page_size"),
    [
        *((case, 0) for case in RELEASED),
        *itertools.product(RELEASED[2:4], (64,)),
        *itertools.product(RELEASED[:1], (128, 192, 16)),
    ],
    ids=str,
)
def test_gpu_rows_of_eight_bits(case, page_size, tiles, monkeypatch):
    """Lengths at the edges of tiles and shares: one sequence, sixteen, and these with holes."""
    *sizes, paired = case
    monkeypatch.setattr(decode_plans_mlra, "PAIRED_ROWS", 0 if paired else 2**40)
    many = [1, 63, 64, 65, 127, 128, 129, 0, 5, 700, 1535, 1536, 1000, 384, 2, 640]
    for ends, masked in (([1536], False), ([1], False), (many, False), (many, True)):
        (arguments, given), (truth, of_truth) = call(
            *sizes, eight_bits=True, page_size=page_size, masked=masked, ends=ends, dtype=torch.bfloat16, device="cuda"
        )
        result = latent_attention(*arguments, implementation="triton", settled=masked, **given)
        expected = latent_attention(*truth, implementation="torch", **of_truth)
        assert rms_ratio(expected, result) < tolerances.KERNEL_BF16_RATIO
    on_bulk_copies = device_mlra.device_facts(torch.device("cuda")).hopper and page_size != 16
    assert {isinstance(tile, HopperTile) for tile in tiles} == {on_bulk_copies}
