"""With which tiles the decode kernels run; evals/results/decode_notes.md has what was measured."""

from typing import Any

import torch

from .device_mlra import triton

# With so many cached rows, four latents or more wait for the L2 cache of an H200, out of which each reads the rotary
# keys: two in one program then share them (up to 64 wide, so that four tiles fit). With fewer, that costs more at both
# ends of a program than it saves.
PAIRED_ROWS = 3 * 2**17


def fits_hopper(latents, k_rope, block_table) -> bool:
    """Whether the cache can be described to the bulk tensor copies as a matrix of rows."""
    batch, capacity, num_latents, width = latents.shape[-4:] if block_table is None else (0, 0, 0, 0)
    return (
        block_table is None
        and latents.dtype in (torch.bfloat16, torch.float16)
        and width in (64, 128)
        and k_rope.shape[-1] in (32, 64, 128)
        and (num_latents == 1 or latents.stride(2) == width)
        and (batch == 1 or latents.stride(0) == capacity * latents.stride(1))
        and (batch == 1 or k_rope.stride(0) == capacity * k_rope.stride(1))
        and batch * capacity < 2**31
        and all(x.data_ptr() % 16 == 0 and x.stride(1) % 8 == 0 for x in (latents, k_rope))
    )


def decode_plan(
    rows: int, num_latents: int, groups: int, width: int, rope_width: int, itemsize: int, cached: int, hopper: bool
) -> dict[str, Any]:
    """Block sizes for M = `rows` query rows per latent and `cached` allocated rows in all."""
    padded = max(16, triton.next_power_of_2(width))
    rope_padded = max(16, triton.next_power_of_2(rope_width))
    branches = num_latents // groups
    plan = {"kernel": "plain", "RP": padded, "EP": rope_padded, "UNIT": 32, "MIN_UNITS": 1, "NL": 1, "num_stages": 3}
    plan["programs_per_sm"] = 1
    if hopper and rows <= 64:
        plan |= {"kernel": "rows", "BM": 64, "BN": 64, "UNIT": 64, "num_warps": 4, "num_stages": 6, "AHEAD": 4}
        # A tile for each of the two warpgroups; with several latents more, which leaves room for the kernel behind
        plan["MIN_UNITS"] = 2 if num_latents == 1 else 3
        plan["OVERLAP"] = num_latents > 1  # one latent alone waits for memory, and better holds no buffer for longer
        if rows <= 32 and num_latents >= 4 and branches % 2 == 0 and rope_width <= 64 and cached >= PAIRED_ROWS:
            plan |= {"NL": 2, "num_stages": 4, "AHEAD": 3, "OVERLAP": False}
    elif hopper:
        plan |= {"kernel": "rows", "BM": 128, "BN": 128, "UNIT": 128, "num_warps": 4, "num_stages": 3}
        plan |= {"AHEAD": 2, "OVERLAP": True}
    elif rows <= 32 and padded <= 128 and branches in (2, 4, 8):
        plan |= {"NL": branches, "BM": 16 if rows <= 16 else 32, "BN": 16, "num_stages": 4, "num_warps": branches}
        plan["programs_per_sm"] = 8 // branches
    else:
        per_row = (padded + rope_padded) * itemsize
        plan |= {"BM": 64 if rows > 16 else 16, "BN": 64 if per_row <= 768 else 32}
        plan["num_warps"] = 4 if padded <= 256 else 8
    return plan


def even_programs(programs: int, batch: int) -> int:
    """Up to a sixteenth fewer, if a share of sequences of one length then lies in one of them or holds whole ones."""
    even = programs // batch * batch or batch // triton.cdiv(batch, programs)
    return even if 16 * even >= 15 * programs else programs


def reduction_plan(batch: int, num_latents: int, rows: int, programs: int, padded_width: int) -> dict[str, int]:
    """Tile of the second kernel: many small reductions take their splits in turn, a few wide ones SPLITS at once."""
    splits = min(256, max(8, triton.next_power_of_2(triton.cdiv(programs, batch) + 1)))
    if splits == 8 and batch * num_latents * rows > 8192:
        return {"SPLITS": 1, "BD": padded_width, "ROWS": min(16, triton.next_power_of_2(rows)), "num_warps": 4}
    columns = min(padded_width, 4096 // splits if splits < 64 else 32)
    return {"SPLITS": splits, "BD": columns, "ROWS": 1, "num_warps": {8: 1, 256: 8}.get(splits, 4)}


# What to change in a plan, one after the other, if its tiles do not fit a GPU's shared memory (float32, wide latents).
SMALLER_PLANS: tuple[dict[str, int], ...] = (
    {},
    {"num_stages": 2},
    {"num_stages": 1},
    {"num_stages": 1, "BN": 16},
    {"num_stages": 1, "BN": 16, "BM": 16},
)
