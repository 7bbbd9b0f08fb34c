"""Linear maps of more than a few vectors, on tensor cores.

The products stay cheap beside the reading of the weights, which is what the time of a step is made of. So that every
multiprocessor reads, the columns of small weights are split over programs; the last one to arrive adds up their sums.
"""

import math
from typing import Any, NamedTuple

import torch

from .device_mlra import constants, launch, launch_options, room, tl, triton
from .step_device_mlra import Machine, padded
from .step_maps_mlra import LinearMap, map_arguments, stacked

product_linear_kernel: Any = None

ROWS = 64  # of a tile of weights: the height of the tensor cores' product on Hopper
PRODUCT_SHARED_BYTES = 56 * 2**10  # what a program takes for its buffers of weights
MEASURED = {(48, 9880): {"SPLITS": 8, "STAGES": 4}, (72, 1024): {"SPLITS": 4}}
"""Row blocks and columns of down_proj and query of the released MLRA-4 on one GPU -> what was faster there than the
rule that all others go by: 16 vectors, weights of 16 bits, an H200. Ranks, 8 bits and other GPUs were not measured.
"""


class ProductTile(NamedTuple):
    """ROWS x WIDTH weights times MP vectors, STAGES of them on their way; SPLITS programs share a row block."""

    MP: Any
    ROWS: Any
    WIDTH: Any
    SPLITS: Any
    STAGES: Any


class Apart(NamedTuple):
    """How many numbers, and scales, the second weight of a SwiGLU lies behind the first one."""

    weights: Any
    scales: Any


class Sums(NamedTuple):
    """Room for what the programs of a row block leave for the last of them: sums and sums of squares, and a count."""

    products: Any
    squares: Any
    arrived: Any


if triton is not None:
    from .device_triton_mlra import dot
    from .step_device_mlra import rms_factor, swiglu, wait_for_front
    from .step_maps_mlra import block_of, widen

    @triton.jit
    def _vectors_tile(x, x_stride, first, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH columns from `first` on of the vectors [M, K], as [MP, WIDTH]."""
        m, columns = tl.arange(0, MP), first + tl.arange(0, WIDTH)
        mask = (m < M)[:, None] & (columns < K)[None, :]
        return tl.load(x + (m * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0)

    @triton.jit
    def _add_products(acc, squares, tile, scale, gamma, x, first, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """Adds a tile's products with all vectors to [rows, MP], and the vectors' squares to [MP]."""
        vectors = _vectors_tile(x.data, x.stride, first, SHAPE.K, SHAPE.M, TILE.MP, TILE.WIDTH)
        if SHAPE.NORM:
            exact = vectors.to(tl.float32)
            squares += tl.sum(exact * exact, 1)
            vectors = (exact * gamma.to(tl.float32)).to(vectors.dtype)
        if SHAPE.BLOCK_COLUMNS > 0:
            numbers = widen(tile).to(vectors.dtype)  # exact; in one step, half as fast as the memory
            acc += dot(numbers, tl.trans(vectors), None) * scale
        else:
            acc = dot(tile, tl.trans(vectors), acc)
        return acc, squares

    @triton.jit
    def _products_of_all(
        x, norm, source, scales, known, split, SHAPE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr
    ):
        """Sums [ROWS, MP] over a program's columns of the rows at `source`, and of the vectors' squares [MP].

        The first tile is there before the wait, the others come through STAGES buffers. A tile lies in one block of
        columns; the scales of each row's blocks are at `scales`.
        """
        WIDTH: tl.constexpr = TILE.WIDTH
        PER_SPLIT: tl.constexpr = ((SHAPE.K + WIDTH - 1) // WIDTH + TILE.SPLITS - 1) // TILE.SPLITS * WIDTH
        columns = tl.arange(0, WIDTH)[None, :]
        start = split * PER_SPLIT
        stop = tl.minimum(start + PER_SPLIT, SHAPE.K)
        tile = tl.load(source + start + columns, mask=known & (start + columns < SHAPE.K), other=0.0)
        scale = _scales_of_tile(scales, known, start, SHAPE) if SHAPE.BLOCK_COLUMNS > 0 else 1.0
        gammas = _vectors_tile(norm.gamma, 0, start, SHAPE.K, 1, 1, WIDTH) if SHAPE.NORM else 1.0
        wait_for_front(PDL)
        acc = tl.zeros([TILE.ROWS, TILE.MP], tl.float32)
        squares = tl.zeros([TILE.MP], tl.float32)
        acc, squares = _add_products(acc, squares, tile, scale, gammas, x, start, SHAPE, TILE)
        if SHAPE.BLOCK_COLUMNS > 0:
            scale = _scales_of_tile(scales, known, start + WIDTH, SHAPE)
        if SHAPE.NORM:
            gammas = _vectors_tile(norm.gamma, 0, start + WIDTH, SHAPE.K, 1, 1, WIDTH)
        for k in tl.range(start + WIDTH, stop, WIDTH, num_stages=TILE.STAGES):
            tile = tl.load(source + k + columns, mask=known & (k + columns < SHAPE.K), other=0.0)
            acc, squares = _add_products(acc, squares, tile, scale, gammas, x, k, SHAPE, TILE)
            if SHAPE.BLOCK_COLUMNS > 0:
                scale = _scales_of_tile(scales, known, k + WIDTH, SHAPE)
            if SHAPE.NORM:
                gammas = _vectors_tile(norm.gamma, 0, k + WIDTH, SHAPE.K, 1, 1, WIDTH)
        return acc, squares

    @triton.jit
    def _scales_of_tile(scales, known, first, SHAPE: tl.constexpr):
        """Each row's scale [ROWS, 1] of the block that column `first` lies in."""
        column = first + tl.arange(0, 1)[None, :]
        return tl.load(scales + column // SHAPE.BLOCK_COLUMNS, mask=known & (column < SHAPE.K), other=0.0)

    @triton.jit
    def _places(sums, block, TILE: tl.constexpr):
        """Where the first program of a row block leaves its sums; those of the next follow."""
        index, m = tl.arange(0, TILE.ROWS), tl.arange(0, TILE.MP)
        places = sums.products + (block * TILE.SPLITS * TILE.ROWS + index)[:, None] * TILE.MP + m[None, :]
        return places, sums.squares + block * TILE.SPLITS * TILE.MP + m

    @triton.jit
    def _leave(acc, squares, sums, block, split, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """Stores a program's sums; how many of its row block have done so before."""
        products_at, squares_at = _places(sums, block, TILE)
        tl.store(products_at + split * TILE.ROWS * TILE.MP, acc)
        if SHAPE.NORM:
            tl.store(squares_at + split * TILE.MP, squares)
        tl.debug_barrier()  # all of the program's sums are there before it counts as arrived
        return tl.atomic_add(sums.arrived + block, 1, sem="acq_rel")

    @triton.jit
    def _add_up(sums, block, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """The sums of all programs of a row block, of which none is still to arrive."""
        products_at, squares_at = _places(sums, block, TILE)
        tl.store(sums.arrived + block, 0)
        acc = tl.zeros([TILE.ROWS, TILE.MP], tl.float32)
        squares = tl.zeros([TILE.MP], tl.float32)
        for i in tl.static_range(TILE.SPLITS):
            acc += tl.load(products_at + i * TILE.ROWS * TILE.MP, cache_modifier=".cg")
            if SHAPE.NORM:
                squares += tl.load(squares_at + i * TILE.MP, cache_modifier=".cg")
        return acc, squares

    @triton.jit
    def product_linear_kernel(x, norm, out, stack, apart, sums, SHAPE, TILE, PDL: tl.constexpr):
        """A linear map of a block of rows, of all M vectors at once, padded to MP. Products take 16-bit numbers: a
        normed vector is rounded after its multiplication by gamma, as in the modules.

        Of a SwiGLU half of a tile's rows are each weight's, w1 lying `apart.weights` numbers behind w0 (all rows then
        have one base, and are read in whole vectors).
        """
        index, m = tl.arange(0, TILE.ROWS), tl.arange(0, TILE.MP)
        SHARE: tl.constexpr = TILE.ROWS // 2 if SHAPE.SWIGLU else TILE.ROWS
        block, split = tl.program_id(0), tl.program_id(1)
        weight, n, first, inside = (stack.w0, stack.s0), stack.n0, 0, block
        if not SHAPE.SWIGLU:
            weight, n, first, inside = block_of(block, stack, TILE.ROWS)
        rows = inside * SHARE + index % SHARE
        offsets = rows.to(tl.int64) * SHAPE.K
        if SHAPE.SWIGLU:
            offsets += (index // SHARE) * apart.weights
        scales = None
        if SHAPE.BLOCK_COLUMNS > 0:
            PER_ROW: tl.constexpr = (SHAPE.K + SHAPE.BLOCK_COLUMNS - 1) // SHAPE.BLOCK_COLUMNS
            scales = weight[1] + (rows // SHAPE.BLOCK_ROWS * PER_ROW)[:, None]
            if SHAPE.SWIGLU:
                scales += (index // SHARE)[:, None] * apart.scales
        source, known = weight[0] + offsets[:, None], (rows < n)[:, None]
        y, squares = _products_of_all(x, norm, source, scales, known, split, SHAPE, TILE, PDL)
        if TILE.SPLITS > 1:
            if _leave(y, squares, sums, block, split, SHAPE, TILE) < TILE.SPLITS - 1:
                return
            y, squares = _add_up(sums, block, SHAPE, TILE)
        if SHAPE.NORM:
            y *= rms_factor(squares, SHAPE.K, norm)[None, :]
        if SHAPE.SWIGLU:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, SHARE, TILE.MP]), (1, 2, 0)))
            y = swiglu(gate, up)
        rows = inside * SHARE + tl.arange(0, SHARE)
        target = m[None, :] * out.stride + first + rows[:, None]
        mask = (rows < n)[:, None] & (m < SHAPE.M)[None, :]
        if SHAPE.RESIDUAL:
            y += tl.load(out.residual + target, mask=mask, other=0.0).to(tl.float32) * out.share
        tl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=mask)


def product_plan(linear_map: LinearMap, blocks: int, width: int, multiprocessors: int) -> dict[str, int]:
    """Columns of a tile and programs per row block, chosen on an H200 with `python -m scripts.bench_fused`."""
    inner = linear_map.inner
    programs = (4 if inner > 4096 else 2) * multiprocessors
    plan = {"WIDTH": 128, "STAGES": 3, "SPLITS": max(1, min(programs // blocks, inner // 512)), "num_warps": 4}
    if width == 16 and multiprocessors == 132 and linear_map.numbers[0].element_size() == 2:
        plan |= MEASURED.get((blocks, inner), {})
    return plan


def fitting_width(width: int, linear_map: LinearMap) -> int:
    """The widest tile up to `width`, a power of two, that lies in one block of columns."""
    columns = linear_map.block[1]
    return math.gcd(width, columns) if 0 < columns < linear_map.inner else width


def apart(linear_map: LinearMap) -> Apart:
    if not linear_map.swiglu:
        return Apart(0, 0 if linear_map.is_scaled else None)
    pairs = linear_map.numbers, linear_map.scales
    return Apart(*(None if a is None else (b.data_ptr() - a.data_ptr()) // a.element_size() for a, b in pairs))


def run_as_products(linear_map: LinearMap, x, out, residual, machine: Machine) -> None:
    """`step_linear_mlra.run` for more than a few vectors."""
    width = padded(x.shape[0])
    blocks, stack = stacked(linear_map, ROWS // 2 if linear_map.swiglu else ROWS)
    plan = {"MP": width, "ROWS": ROWS} | product_plan(linear_map, blocks, width, machine.multiprocessors)
    tile = ProductTile(*(plan.pop(name) for name in ProductTile._fields))
    tile = tile._replace(WIDTH=fitting_width(tile.WIDTH, linear_map))
    assert tile.SPLITS == 1 or blocks <= machine.arrived.numel(), f"{blocks} row blocks"
    products = blocks * tile.SPLITS * width * ROWS
    left = room("sums", (products + products // ROWS,), torch.float32, x.device)
    sums = Sums(left, left[products:], machine.arrived)
    *arguments, shape = map_arguments(linear_map, x, out, residual)
    launch(
        x.device, product_linear_kernel, (blocks, tile.SPLITS), *arguments, stack, apart(linear_map), sums,
        SHAPE=shape, TILE=constants(tile), PDL=machine.early, **plan, **launch_options(machine.early),
    )  # fmt: skip
