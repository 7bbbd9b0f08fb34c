"""With which tiles the decode kernels run; evals/results/decode_notes.md has what was measured."""

import functools
from typing import NamedTuple

import torch

from .decode_arguments_mlra import Deal, DecodeInputs, DecodeTile, HopperTile, Reduction
from .device_mlra import DeviceFacts, triton

# With so many cached rows, four latents or more wait for the L2 cache of an H200, out of which each reads the rotary
# keys: two in one program then share them (up to 64 wide, so that four tiles fit). With fewer, that costs more at both
# ends of a program than it saves.
PAIRED_ROWS = 3 * 2**17
TILE_ROWS = 64  # cached rows of a tile of the Hopper kernel; twice as many suit many query rows better


class DecodePlan(NamedTuple):
    """One way to run the attention: the tile, which says which kernel, and how the work is dealt and launched.

    Attributes:
        unit, least_units: cached rows of a unit of work, and how many of these a program has at least.
        programs_per_sm: how many programs run at a time on each multiprocessor.
    """

    tile: DecodeTile | HopperTile
    unit: int = 32
    least_units: int = 1
    programs_per_sm: int = 1
    num_warps: int = 4
    num_stages: int = 3


def fits_hopper(inputs: DecodeInputs) -> bool:
    """Whether the cache can be described to the bulk tensor copies as a matrix of rows, in which each tile is a block.

    Pages have to hold whole tiles, and sequences to start with their first one.
    """
    latents, k_rope, scales = inputs.latents, inputs.k_rope, inputs.scales
    num_latents, width = latents.shape[-2:]
    parts = [(latents, latents.stride(-3)), (k_rope, k_rope.stride(-2))]  # with the stride of rows
    if scales is not None:
        parts.append((scales, scales.stride(-2)))
    if inputs.block_table is None:
        batch, capacity = latents.shape[:2]
        rows = batch * capacity
        one_block = batch == 1 or all(x.stride(0) == capacity * stride for x, stride in parts)
    else:
        rows = latents.shape[0]
        one_block = inputs.page_size % TILE_ROWS == 0 and inputs.kv_start is None
    return (
        one_block
        and k_rope.dtype in (torch.bfloat16, torch.float16)
        and (scales is not None or latents.dtype == k_rope.dtype)
        and width in (64, 128)
        and k_rope.shape[-1] in (32, 64, 128)
        and (num_latents == 1 or latents.stride(-2) == width)
        and rows < 2**31
        and all(x.data_ptr() % 16 == stride * x.element_size() % 16 == 0 for x, stride in parts)
    )


def decode_plans(
    rows: int,
    num_latents: int,
    groups: int,
    width: int,
    rope_width: int,
    itemsize: int,
    cached: int,
    hopper: bool,
    facts: DeviceFacts,
    page_size: int = 0,
    scaled: bool = False,
) -> tuple[DecodePlan, ...]:
    """Block sizes for M = `rows` query rows per latent and `cached` allocated rows in all, the best first.

    What follows is for devices where that one, against all estimates, cannot be built. `scaled`: latents are kept in
    eight bits, and `itemsize` is that of the rotary keys.
    """
    paired, double = cached >= PAIRED_ROWS, page_size % (2 * TILE_ROWS) == 0
    return _decode_plans(rows, num_latents, groups, width, rope_width, itemsize, paired, double, hopper, facts, scaled)


@functools.lru_cache(maxsize=256)
def _decode_plans(rows, num_latents, groups, width, rope_width, itemsize, paired, double, hopper, facts, scaled):
    padded = max(16, triton.next_power_of_2(width))
    rope_padded = max(16, triton.next_power_of_2(rope_width))
    branches = num_latents // groups
    plain = _plain_plans(rows, branches, padded, rope_padded, itemsize, facts, scaled)
    if not hopper:
        return plain
    if scaled:
        return DecodePlan(
            _eight_bit_tile(rows, num_latents, branches, rope_width, paired), unit=TILE_ROWS, least_units=2
        ), *plain
    if rows > 64:
        tile = HopperTile(NL=1, BM=128, BN=2 * TILE_ROWS, STAGES=3, AHEAD=2, OVERLAP=True)
        if not double:
            tile = tile._replace(BN=TILE_ROWS, STAGES=6, AHEAD=4)
        return DecodePlan(tile, unit=tile.BN), *plain
    # A tile for each of the two warpgroups; with several latents more, which leaves room for the kernel behind
    least_units = 2 if num_latents == 1 else 3
    # One latent alone waits for memory, and better holds no buffer for longer
    tile = HopperTile(NL=1, BM=64, BN=TILE_ROWS, STAGES=6, AHEAD=4, OVERLAP=num_latents > 1)
    if _in_pairs(rows, num_latents, branches, rope_width, paired):
        tile = tile._replace(NL=2, STAGES=4, AHEAD=3, OVERLAP=False)
    return DecodePlan(tile, unit=TILE_ROWS, least_units=least_units), *plain


def _in_pairs(rows: int, num_latents: int, branches: int, rope_width: int, paired: bool) -> bool:
    return rows <= 32 and num_latents >= 4 and branches % 2 == 0 and rope_width <= 64 and paired


def _eight_bit_tile(rows: int, num_latents: int, branches: int, rope_width: int, paired: bool) -> HopperTile:
    """Two tiles in 16 bits for each warpgroup: one is widened while it has the other; with two latents there is room
    for one."""
    tile = HopperTile(
        NL=1, BM=128 if rows > 64 else 64, BN=TILE_ROWS, STAGES=6, AHEAD=4, OVERLAP=True, WIDE=4, HELD=True
    )
    if _in_pairs(rows, num_latents, branches, rope_width, paired):
        tile = tile._replace(NL=2, STAGES=4, AHEAD=3, OVERLAP=False, WIDE=2, HELD=False)
    return tile


def _plain_plans(
    rows: int, branches: int, padded: int, rope_padded: int, itemsize: int, facts: DeviceFacts, scaled: bool
) -> tuple[DecodePlan, ...]:
    """Plans of the plain kernel that should fit, each with three buffers before two, from the largest on.

    Products of float32 run outside of tensor cores, and AMD's take both factors from registers: more than these tiles
    would lie in memory instead (`python -m tests.compile_kernels` counts such bytes).
    """
    per_row = (padded + rope_padded) * itemsize
    tall = 16 if rows <= 16 else 32 if rows <= 32 and not (facts.hopper and itemsize == 2) else 64
    deep = 64 if per_row <= 768 else 32
    if itemsize == 4:
        tall, deep = min(tall, 16 if padded > 256 else 32), 16
    elif not facts.nvidia and facts.warp_size == 32:
        tall, deep = min(tall, 16 if padded > 128 else 32), 16 if padded > 128 else 32
    elif not facts.nvidia:
        tall, deep = min(tall, 32 if padded > 256 else 64), max(16, min(64, 8192 // padded))
    elif padded > 256:
        tall = min(tall, 32)
    if scaled and padded > 128:  # both forms of a tile are in registers at one time
        tall, deep = min(tall, 8192 // padded), min(deep, 8192 // padded)
    found = []
    wide_registers = facts.nvidia or facts.warp_size == 64
    # Latents in eight bits are not copied ahead of such a product, which has them in registers
    if rows <= 32 and padded <= 128 and branches in (2, 4, 8) and itemsize == 2 and wide_registers and not scaled:
        together = DecodeTile(branches, 16 if rows <= 16 else 32, 16, padded, rope_padded)
        for stages in (4, 3, 2):
            shared = _shared_bytes(together, stages, itemsize, facts, scaled)
            many = max(1, int(min(8 // branches, facts.shared_per_multiprocessor // (shared + 1024))))
            plan = DecodePlan(together, programs_per_sm=many, num_warps=branches, num_stages=stages)
            found.append((shared, plan))
    while True:
        heavy = tall * padded > 8192 or itemsize == 4
        tile = DecodeTile(1, tall, deep, padded, rope_padded)
        plan = DecodePlan(tile, num_warps=16 if not wide_registers else 8 if padded > 256 or heavy else 4)
        for stages in (3, 2):
            shared = _shared_bytes(tile, stages, itemsize, facts, scaled)
            found.append((shared, plan._replace(num_stages=stages)))
        if tall > 16:
            tall //= 2
        elif deep > 16:
            deep //= 2
        else:
            break
    fitting = (plan for shared, plan in found if shared <= facts.shared_bytes)
    return *fitting, plan._replace(num_stages=1)


def _shared_bytes(tile: DecodeTile, stages: int, itemsize: int, facts: DeviceFacts, scaled: bool) -> int:
    """Shared memory that the plain kernel takes with a tile, as compiled for NVIDIA's and AMD's GPUs."""
    buffers = (stages - 1) * tile.BN * (tile.NL * tile.RP + tile.EP) * itemsize
    if scaled:  # bytes and scales wait there, and what is made of one tile
        waiting = tile.RP + tile.EP * itemsize + 4
        buffers = tile.BN * ((stages - 1) * waiting + tile.RP * itemsize)
    weights = tile.BM * tile.BN * itemsize
    if not facts.nvidia:
        return tile.NL * max(tile.BM * tile.RP * 4, buffers + weights)
    queries = tile.NL * tile.BM * (tile.RP + tile.EP) * itemsize
    return queries + buffers + (weights if tile.NL == 1 else 0)


def even_programs(programs: int, batch: int) -> int:
    """Up to a sixteenth fewer, if a share of sequences of one length then lies in one of them or holds whole ones."""
    even = programs // batch * batch or batch // triton.cdiv(batch, programs)
    return even if 16 * even >= 15 * programs else programs


@functools.lru_cache(maxsize=1024)
def deal_work(
    batch: int, capacity: int, lanes: int, most_programs: int, unit: int, least_units: int, has_start: bool
) -> tuple[int, Deal]:
    """How many programs share the rows of `batch` sequences of up to `capacity`, and the constants of the division.

    Args:
        lanes: tiles of latents and query rows, each dealt out alike.
        most_programs: how many run at a time.
        unit, least_units: rows of a unit of work, and how many of these a program has at least.
    """
    programs = even_programs(max(1, most_programs // lanes), batch)
    most_units = batch * (triton.cdiv(capacity, unit) + 1)
    programs = min(programs, triton.cdiv(most_units, least_units))
    big = (most_units + 1) * (programs + 1) >= 2**31
    return programs, Deal(unit, least_units, triton.next_power_of_2(batch), has_start, big)


@functools.lru_cache(maxsize=1024)
def reduction_plan(
    batch: int, num_latents: int, length: int, heads: int, width: int, programs: int
) -> tuple[tuple[int, int, int], Reduction, int]:
    """Grid, tile and warps of the second kernel: many small reductions take their splits in turn, a few wide ones
    SPLITS at once."""
    rows, padded_width = length * heads, triton.next_power_of_2(width)
    splits = min(256, max(8, triton.next_power_of_2(triton.cdiv(programs, batch) + 1)))
    if splits == 8 and batch * num_latents * rows > 8192:
        block, columns, splits, num_warps = min(16, triton.next_power_of_2(rows)), padded_width, 1, 4
    else:
        block, columns = 1, min(padded_width, 4096 // splits if splits < 64 else 32)
        num_warps = {8: 1, 256: 8}.get(splits, 4)
    grid = triton.cdiv(width, columns), num_latents * triton.cdiv(rows, block), batch
    return grid, Reduction(num_latents, heads, width, block, columns, splits), num_warps
