"""Linear maps of a few vectors on any GPU: each program holds its tile of weights in registers before it waits."""

import math
from typing import Any, NamedTuple

from .device_mlra import constants, launch, launch_options, tl, triton
from .step_device_mlra import Machine
from .step_maps_mlra import GROUP, LinearMap, map_arguments, stacked

register_linear_kernel: Any = None


class RegisterTile(NamedTuple):
    """Rows are read in chunks of WIDTH columns: the first AHEAD before the wait, each later one AHEAD chunks ahead.

    Of weights with scales, GROUP numbers that a thread holds side by side are added up before they are scaled.
    """

    ROWS: Any
    WIDTH: Any
    AHEAD: Any
    GROUP: Any


if triton is not None:
    from .step_device_mlra import rms_factor, swiglu, wait_for_front
    from .step_maps_mlra import block_of, columns_of, scale_tile, weight_tile, widen

    @triton.jit
    def _scaled_tile(weight, rows, n, first, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """A chunk of columns of a weight, and the scale of each group of columns if there are any."""
        tile = (weight_tile(weight[0], rows, n, first, SHAPE, TILE.WIDTH),)
        if SHAPE.BLOCK_COLUMNS > 0:
            groups = first + tl.arange(0, TILE.WIDTH // TILE.GROUP) * TILE.GROUP
            tile = tile + (scale_tile(weight[1], rows, n, groups, SHAPE),)  # type: ignore[assignment]
        return tile

    @triton.jit
    def _tiles(pair, rows, n, chunk, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """One chunk of columns of the weight, of a SwiGLU of both."""
        tiles = (_scaled_tile(pair[0], rows, n, chunk * TILE.WIDTH, SHAPE, TILE),)
        if SHAPE.SWIGLU:
            tiles = tiles + (_scaled_tile(pair[1], rows, n, chunk * TILE.WIDTH, SHAPE, TILE),)  # type: ignore[assignment]
        return tiles

    @triton.jit
    def _add_products(acc, tile, row, SHAPE: tl.constexpr, TILE: tl.constexpr):
        """Adds the products of a chunk with a vector, [ROWS, WIDTH]; with scales, the sum of each group."""
        products = widen(tile[0]) * row[None, :]
        if SHAPE.BLOCK_COLUMNS > 0:
            groups = tl.reshape(products, [TILE.ROWS, TILE.WIDTH // TILE.GROUP, TILE.GROUP])
            products = tl.sum(groups, axis=2) * tile[1]
        return acc + products

    @triton.jit
    def _products_of_one(
        x, gamma, pair, rows, n, early, early_gamma, SHAPE: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr
    ):
        """Sums over the chunks of each weight's products with one vector [ROWS, columns], and its squares."""
        PARTS: tl.constexpr = 2 if SHAPE.SWIGLU else 1
        SUMS: tl.constexpr = TILE.WIDTH // TILE.GROUP if SHAPE.BLOCK_COLUMNS > 0 else TILE.WIDTH
        tiles = early
        accs = ()
        for _part in tl.static_range(PARTS):
            accs = accs + (tl.zeros([TILE.ROWS, SUMS], tl.float32),)  # type: ignore[assignment]
        squares = tl.zeros([TILE.WIDTH], tl.float32)
        for i in tl.static_range(CHUNKS):
            if i + TILE.AHEAD < CHUNKS:
                tiles = tiles + _tiles(pair, rows, n, i + TILE.AHEAD, SHAPE, TILE)
            row = columns_of(x, i * TILE.WIDTH, SHAPE.K, TILE.WIDTH).to(tl.float32)
            if SHAPE.NORM:
                squares += row * row
                if i < TILE.AHEAD:
                    row *= early_gamma[i].to(tl.float32)
                else:
                    row *= columns_of(gamma, i * TILE.WIDTH, SHAPE.K, TILE.WIDTH).to(tl.float32)
            sums = ()
            for part in tl.static_range(PARTS):
                sums = sums + (_add_products(accs[part], tiles[i * PARTS + part], row, SHAPE, TILE),)  # type: ignore[assignment]
            accs = sums
        return accs, squares

    @triton.jit
    def register_linear_kernel(x, norm, out, stack, SHAPE, TILE, PDL: tl.constexpr):
        """A linear map of a block of rows, one vector after the other."""
        CHUNKS: tl.constexpr = (SHAPE.K + TILE.WIDTH - 1) // TILE.WIDTH
        weight, n, first, block = (stack.w0, stack.s0), stack.n0, 0, tl.program_id(0)
        if not SHAPE.SWIGLU:
            weight, n, first, block = block_of(block, stack, TILE.ROWS)
        pair = (weight, (stack.w1, stack.s1))
        rows = block * TILE.ROWS + tl.arange(0, TILE.ROWS)
        early, early_gamma = (), ()
        for i in tl.static_range(min(TILE.AHEAD, CHUNKS)):
            early = early + _tiles(pair, rows, n, i, SHAPE, TILE)
            if SHAPE.NORM:
                early_gamma = early_gamma + (columns_of(norm.gamma, i * TILE.WIDTH, SHAPE.K, TILE.WIDTH),)  # type: ignore[assignment]
        wait_for_front(PDL)
        for m in tl.static_range(SHAPE.M):
            target = m * out.stride + first + rows
            if SHAPE.RESIDUAL:
                before = tl.load(out.residual + target, mask=rows < n, other=0.0).to(tl.float32)
            accs, squares = _products_of_one(
                x.data + m * x.stride, norm.gamma, pair, rows, n, early, early_gamma, SHAPE, TILE, CHUNKS
            )
            factor = rms_factor(tl.sum(squares), SHAPE.K, norm) if SHAPE.NORM else 1.0
            y = tl.sum(accs[0], axis=1) * factor
            if SHAPE.SWIGLU:
                y = swiglu(y, tl.sum(accs[1], axis=1) * factor)
            if SHAPE.RESIDUAL:
                y += before * out.share
            tl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=rows < n)


def register_plan(linear_map: LinearMap, vectors: int, residual: bool) -> dict[str, int]:
    """Rows and columns of a program's tile, chosen on an H200 with `python -m scripts.bench_fused`.

    Whole rows are there before the wait where a norm or two weights share the input. Few registers let more programs
    of `down` start beside the last ones of the layer in front.
    """
    inner = linear_map.inner
    width = triton.next_power_of_2(inner)
    rows = 4096 // min(1024, width) if residual else (8192 if linear_map.swiglu else 16384) // width
    if residual or inner <= 3072:
        width = min(1024, width)
    plan = {"ROWS": max(1, rows), "WIDTH": width, "AHEAD": 2 if residual else 3, "num_warps": 4}
    if linear_map.is_scaled and residual:  # half the bytes a row
        plan["WIDTH"] = min(2048, triton.next_power_of_2(inner))
    if linear_map.is_scaled and vectors == 1 and not residual and width == 1024 == triton.next_power_of_2(inner):
        plan["ROWS"] = 8  # query
    if linear_map.is_scaled and linear_map.swiglu:
        return plan | ({"ROWS": 2 * plan["ROWS"]} if vectors == 1 else {})
    return plan | ({"maxnreg": 88} if vectors == 1 and not residual and 1024 < inner <= 3072 else {})


def run_in_registers(linear_map: LinearMap, x, out, residual, machine: Machine) -> None:
    """`step_linear_mlra.run` for a few vectors."""
    plan = register_plan(linear_map, x.shape[0], residual is not None)
    plan["GROUP"] = math.gcd(GROUP, linear_map.inner)
    tile = RegisterTile(*(plan.pop(name) for name in RegisterTile._fields))
    blocks, stack = stacked(linear_map, tile.ROWS)
    *arguments, shape = map_arguments(linear_map, x, out, residual)
    launch(
        x.device, register_linear_kernel, (blocks,), *arguments, stack,
        SHAPE=shape, TILE=constants(tile), PDL=machine.early, **plan, **launch_options(machine.early),
    )  # fmt: skip
