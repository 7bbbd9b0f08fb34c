"""What the copying warps of the Hopper kernel ask for: every row of every sequence once, out of the right page."""

import pytest
import torch

from modeling_mlra.decode_arguments_mlra import DecodeShape, HopperTile, Pages, Place, Visible
from modeling_mlra.decode_plans_mlra import deal_work
from tests.gluon_in_python import Pointer, copy_tiles

pytest.importorskip("triton.experimental.gluon")

ENDS = [700, 64, 0, 129, 384, 5, 1000]
CAPACITY, WIDTH = 1024, 128


def asked_for(ends, page_size, table, rows, paired=False, starts=None, programs=7):
    """Of each program: (buffer, row, column) of its copies."""
    latents = 2 if paired else 1
    tile = HopperTile(NL=latents, BM=64, BN=rows, STAGES=4, AHEAD=3, OVERLAP=False)
    shape = DecodeShape(L=4, GROUPS=1, H=24, R=WIDTH, E=64, HAS_MASK=False, PAGE=page_size, CAUSAL=False, SCALED=False)
    programs, deal = deal_work(len(ends), CAPACITY, 1, programs, rows, 2, starts is not None)
    lengths = torch.tensor(ends, dtype=torch.int32)
    visible = Visible(Pointer(lengths), None if starts is None else Pointer(torch.tensor(starts)), None, 0)
    pages = Pages() if table is None else Pages(Pointer(table), table.stride(0))
    found = []
    for p in range(programs):
        place = Place(len(ends), 1, programs, CAPACITY, 1, torch.tensor(p, dtype=torch.int32), 2, 0)
        found.append(copy_tiles(visible, pages, place, shape, tile, deal))
    return found


def tiles_of(ends, rows, first_row, starts=None):
    """First rows of the tiles that have to be copied; `first_row(b, j)` says where row j of sequence b lies."""
    starts = [0] * len(ends) if starts is None else starts
    return sorted(
        first_row(b, j)
        for b, (start, end) in enumerate(zip(starts, ends, strict=True))
        for j in range(start, end, rows)
    )


@pytest.mark.parametrize("ends", [ENDS, [1000], [0], [1]])
@pytest.mark.parametrize(("page_size", "rows"), [(64, 64), (128, 64), (128, 128), (192, 64)])
@pytest.mark.parametrize("paired", [False, True])
def test_each_tile_comes_once_out_of_its_page(ends, page_size, rows, paired):
    """The table is read nowhere behind a sequence's last page: it ends there, and holds -1 where it cannot end."""
    blocks = max(1, -(-max(ends) // page_size))
    table = torch.randperm(len(ends) * blocks, generator=torch.Generator().manual_seed(0)).int().view(-1, blocks)
    for b, end in enumerate(ends):
        table[b, -(-end // page_size) :] = -1
    asked = [copy for of_program in asked_for(ends, page_size, table, rows, paired) for copy in of_program]
    expected = tiles_of(ends, rows, lambda b, j: int(table[b, j // page_size]) * page_size + j % page_size)
    assert sorted(row for buffer, row, _ in asked if buffer == "k_rope") == expected
    for column in (2 * WIDTH, 3 * WIDTH) if paired else (2 * WIDTH,):
        assert sorted(row for buffer, row, at in asked if (buffer, at) == ("latents", column)) == expected
    assert len(asked) == len(expected) * (3 if paired else 2)


@pytest.mark.parametrize("starts", [None, [3, 0, 0, 100, 1, 5, 640]])
def test_each_tile_comes_once_out_of_one_matrix(starts):
    asked = [copy for of_program in asked_for(ENDS, 0, None, 64, starts=starts) for copy in of_program]
    found = sorted(row for buffer, row, _ in asked if buffer == "k_rope")
    assert found == tiles_of(ENDS, 64, lambda b, j: b * CAPACITY + j, starts)


def test_work_is_shared_evenly():
    """Programs with work have at least two of 16 tiles, and the same number of them up to one."""
    for programs in range(1, 10):
        counts = [len(of_program) // 2 for of_program in asked_for([1000], 0, None, 64, programs=programs)]
        working = [count for count in counts if count]
        assert sum(working) == 16 and len(working) == min(programs, 8)
        assert max(working) - min(working) <= 1
