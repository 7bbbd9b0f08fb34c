"""What the host does for a decode attention: how the work is divided, by hand, and that one shape is planned once."""

from typing import Any, NamedTuple

import pytest
import torch

from modeling_mlra import device_mlra
from modeling_mlra.decode_arguments_mlra import Deal, Reduction
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.decode_plans_mlra import deal_work, reduction_plan
from modeling_mlra.device_mlra import constants

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.mark.parametrize(
    ("batch", "capacity", "lanes", "most", "least", "programs", "sequences", "big"),
    [
        (1, 100, 4, 132, 1, 5, 1, False),  # 33 at a time, but there are only 4 units of 32 rows, and one to spare
        (3, 4096, 4, 132, 1, 33, 4, False),  # 11 to a sequence
        (16, 4096, 4, 132, 1, 32, 16, False),  # 2 to a sequence rather than 33
        (1, 1000, 2, 132, 3, 11, 1, False),  # 33 units, 3 to a program
        (1, 2**31, 1, 132, 1, 132, 1, True),  # 2^26 units times 133 programs
        (1, 64, 200, 132, 1, 1, 1, False),  # more tiles than programs
    ],
)
def test_work_divided_by_hand(batch, capacity, lanes, most, least, programs, sequences, big):
    number, deal = deal_work(batch, capacity, lanes, most, 32, least, True)
    assert number == programs
    assert deal == Deal(UNIT=32, MIN_UNITS=least, BLOCK_B=sequences, HAS_START=True, BIG=big)


@pytest.mark.parametrize(
    ("batch", "width", "programs", "grid", "tile", "num_warps"),
    [
        (1, 96, 8, (1, 96, 1), {"SPLITS": 16, "BD": 128, "ROWS": 1}, 4),
        (1, 128, 132, (4, 96, 1), {"SPLITS": 256, "BD": 32, "ROWS": 1}, 8),
        (128, 128, 132, (1, 8, 128), {"SPLITS": 1, "BD": 128, "ROWS": 16}, 4),
    ],
)
def test_reduction_by_hand(batch, width, programs, grid, tile, num_warps):
    expected = grid, Reduction(L=4, H=8, R=width, **tile), num_warps
    assert reduction_plan(batch, 4, 3, 8, width, programs) == expected


def test_a_second_token_is_not_planned_anew(monkeypatch):
    """As many calls as layers and tokens follow, and what a GPU does in one takes less time than planning it."""
    device = torch.device(DEVICE)
    query, rope = torch.zeros(1, 1, 2, 3, 16, device=device), torch.zeros(1, 1, 1, 3, 16, device=device)
    latents, k_rope = torch.zeros(1, 300, 2, 16, device=device), torch.zeros(1, 300, 16, device=device)
    settings: dict = {"scaling": 0.5, "implementation": "triton"}
    planned = []
    for name in ("cdiv", "next_power_of_2"):
        function = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *x, function=function: planned.append(x) or function(*x))
    for cached in (deal_work, reduction_plan):
        cached.cache_clear()
    for end in (200, 201):
        planned.clear()
        latent_attention(query, rope, latents, k_rope, kv_end=torch.full((1,), end, device=device).int(), **settings)
        assert bool(planned) == (end == 200)


class Sizes(NamedTuple):
    A: Any
    B: Any


class OtherSizes(NamedTuple):
    A: Any
    B: Any


def test_constants_are_made_once_for_each_kind(monkeypatch):
    """Tuples of equal numbers are equal, whatever they are called."""
    monkeypatch.setattr(device_mlra, "INTERPRETED", False)
    first, again, other = constants(Sizes(1, 2)), constants(Sizes(1, 2)), constants(OtherSizes(1, 2))
    assert first is again and [x.value for x in first] == [1, 2]
    assert (type(first), type(other)) == (Sizes, OtherSizes)
