"""Linear maps of a decoding step as data: their weights, and what happens before and after the product.

The format of weights is known here alone: what of a layer is its weights (`weights_of`), what a kernel is given of
them (`stacked`, `block_of`), how it reads a tile of them and the scales that go with it, and which numbers these
stand for (`weight_tile`, `scale_tile`, `widen`). A weight is a plain tensor, or a `ScaledWeight` of 8 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from .device_mlra import constants, tl, triton
from .step_device_mlra import Norm, Vectors, norm_of
from .tensor_parallel_mlra import local_tensor

SCALED_DTYPES = (torch.float8_e4m3fn,)
WHOLE = 2**30  # more rows and columns than any weight has: one format for all weights with one scale
GROUP = 16  # numbers of a row that share a scale at least: 16 bytes, what a thread loads at a time


class ScaledWeight(NamedTuple):
    """A weight `[n, K]` whose number (i, j) stands for `values[i, j] * scale[i // rows, j // columns]`.

    Only weights are of 8 bits: vectors keep their dtype, products and sums are those of the numbers it stands for.

    Attributes:
        values: `[n, K]`, of one of `SCALED_DTYPES`.
        scale: float32 `[ceil(n / rows), ceil(K / columns)]`, contiguous.
        block: rows and columns that share a scale, `WHOLE` for all of them.
    """

    values: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Weight: TypeAlias = torch.Tensor | ScaledWeight


@dataclass(frozen=True)
class LinearMap:
    """y = scale * norm(x) [w0; w1; ...]^T, or silu(norm(x) w0^T) * (norm(x) w1^T), plus a share of a residual.

    Attributes:
        weights: up to four `[n, K]` of one K; the two of a SwiGLU have one n and one format.
        norm: the RMSNorm module in front, or None.
        norm_scale: a factor of what it gives.
        swiglu: whether the two weights are gate and up projection of a SwiGLU.
        residual_share: how many times the residual is added, where there is one.
    """

    weights: tuple[Weight, ...]
    norm: nn.Module | None = None
    norm_scale: float = 1.0
    swiglu: bool = False
    residual_share: float = 1.0

    @property
    def inner(self) -> int:
        return self.weights[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def parts(self) -> Iterator[tuple["LinearMap", slice]]:
        """Maps of weights of one format each, and the columns of the output they give."""
        if self.swiglu:
            yield self, slice(None)
            return
        stop = 0
        for _, some in groupby(self.weights, format_of):
            weights, start = tuple(some), stop
            stop += sum(weight.shape[0] for weight in weights)
            yield replace(self, weights=weights), slice(start, stop)

    @property
    def numbers(self) -> tuple[torch.Tensor, ...]:
        """What of each weight is stored for each of its numbers."""
        return tuple(weight.values if isinstance(weight, ScaledWeight) else weight for weight in self.weights)

    @property
    def scales(self) -> tuple[Any, ...]:
        return tuple(weight.scale if isinstance(weight, ScaledWeight) else None for weight in self.weights)

    @property
    def is_scaled(self) -> bool:
        return isinstance(self.weights[0], ScaledWeight)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a weight that share a scale, of plain weights (0, 0)."""
        return format_of(self.weights[0])[1]


def format_of(weight: Weight) -> tuple[torch.dtype, tuple[int, int]]:
    """What weights must have in common for one kernel."""
    return (weight.values.dtype, weight.block) if isinstance(weight, ScaledWeight) else (weight.dtype, (0, 0))


def weight_of(layer: nn.Module) -> Weight:
    """This rank's weight of a linear layer, in whichever format it is kept: the library's `FP8Linear`, torchao's
    tensors of float8, else as it is."""
    weight = local_tensor(layer.weight)
    if hasattr(weight, "qdata"):
        return scaled(weight.qdata, weight.scale, weight.block_size)
    if has_scales(layer) and weight.dtype in SCALED_DTYPES:
        return scaled(weight, local_tensor(layer.weight_scale_inv), getattr(layer, "block_size", None))
    return weight


def scaled(values: torch.Tensor, scale: torch.Tensor, block) -> ScaledWeight:
    """A weight with a scale for every block of `block` rows and columns, or (None) one for all."""
    if block is None or tuple(block) == values.shape:
        return ScaledWeight(values, scale.view(1, 1), (WHOLE, WHOLE))
    return ScaledWeight(values, scale, tuple(block))


def is_scaled(layer: nn.Module) -> bool:
    return isinstance(weight_of(layer), ScaledWeight)


def has_blocks(layer: nn.Module) -> bool:
    """Whether parts of a layer's weight have scales of their own, so that a share of it may end inside one."""
    weight = weight_of(layer)
    return isinstance(weight, ScaledWeight) and weight.block != (WHOLE, WHOLE)


def weight_obstacle(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take a linear layer of a model of `dtype`, or None if they can. What the library does to
    vectors in front of 8-bit products, it need not do to these: they are multiplied as they are."""
    if "weight" not in layer._parameters:
        return f"is a {type(layer).__name__}, no plain linear layer"
    if getattr(layer, "bias", None) is not None:
        return "has a bias"
    weight = weight_of(layer)
    if not isinstance(weight, ScaledWeight):
        return None if weight.dtype == dtype else f"has weights of {weight.dtype}, neither {dtype} nor float8_e4m3fn"
    (n, inner), (rows, columns) = weight.shape, weight.block
    if weight.values.dtype not in SCALED_DTYPES or weight.values.shape != weight.shape:
        return f"has quantised weights of {weight.values.dtype}, not of float8_e4m3fn"
    if weight.scale.dtype != torch.float32:
        return f"has scales of {weight.scale.dtype}, not float32"
    if columns % GROUP and columns < inner:
        return f"has a scale for every {columns} columns, which is no multiple of {GROUP}"
    blocks = triton.cdiv(n, rows) * triton.cdiv(inner, columns)
    if weight.scale.numel() != blocks or not (weight.values.is_contiguous() and weight.scale.is_contiguous()):
        return f"has scales {tuple(weight.scale.shape)} for blocks of {rows} x {columns} of {n} x {inner} weights"
    return None


def has_scales(layer: nn.Module) -> bool:
    """Whether a layer is the library's `FP8Linear`, which keeps weights that its blocks do not divide in 16 bits."""
    return "weight_scale_inv" in layer._parameters


def stored_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """What is in memory of this rank's share of a parameter: of torchao's, numbers and scales."""
    local = local_tensor(parameter)
    return [local.qdata, local.scale] if hasattr(local, "qdata") else [local]


def weights_of(*layers: nn.Module) -> tuple[Weight, ...]:
    """This rank's weights of linear layers."""
    return tuple(weight_of(layer) for layer in layers)


def share_of(weight: Weight, part: int, parts: int) -> Weight:
    """The rows of a weight that are the share `part` of `parts` equal ones, a view; of scales it has one at most."""
    if isinstance(weight, ScaledWeight):
        assert weight.block == (WHOLE, WHOLE)
        return weight._replace(values=weight.values.chunk(parts)[part])
    return weight.chunk(parts)[part]


class Stack(NamedTuple):
    """Up to four weights [n, K] one below the other, and their scales or None; the two of a SwiGLU side by side."""

    w0: Any
    w1: Any
    w2: Any
    w3: Any
    s0: Any
    s1: Any
    s2: Any
    s3: Any
    n0: Any
    n1: Any
    n2: Any
    n3: Any


class Output(NamedTuple):
    """Where the vectors that a linear map gives go, and the residual, laid out alike, of which a share is added."""

    residual: Any
    share: Any
    data: Any
    stride: Any


class MapShape(NamedTuple):
    """K inputs, M vectors, what happens beside the product, and the block of a weight that shares a scale (or 0)."""

    K: Any
    M: Any
    NORM: Any
    SWIGLU: Any
    RESIDUAL: Any
    BLOCK_ROWS: Any
    BLOCK_COLUMNS: Any


def map_arguments(linear_map: LinearMap, x, out, residual) -> tuple[Vectors, Norm, Output, MapShape]:
    """What the kernels of a linear map have in common: inputs, norm, output and shape."""
    norm, share = linear_map.norm, linear_map.residual_share
    beside = norm is not None, linear_map.swiglu, residual is not None
    shape = MapShape(linear_map.inner, x.shape[0], *beside, *linear_map.block)
    return (
        Vectors(x, x.stride(0)),
        Norm(x, 1.0, 0.0) if norm is None else norm_of(norm, linear_map.norm_scale),
        Output(out if residual is None else residual, share, out, out.stride(0)),
        constants(shape),
    )


def stacked(linear_map: LinearMap, rows: int) -> tuple[int, Stack]:
    """Number of blocks of `rows` rows (of a SwiGLU, of each weight), and the weights as the kernels take them."""
    weights, scales = linear_map.numbers, linear_map.scales
    sizes, spare = [weight.shape[0] for weight in weights], 4 - len(weights)
    blocks = triton.cdiv(sizes[0], rows) if linear_map.swiglu else sum(triton.cdiv(size, rows) for size in sizes)
    filled = (*weights, *weights[-1:] * spare, *scales, *scales[-1:] * spare)
    return blocks, Stack(*filled, *sizes, *[0] * spare)


if triton is not None:

    @triton.jit
    def block_of(block, stack, ROWS: tl.constexpr):
        """Which of the stacked weights a row block lies in: the weight, with its scales if it has any, its rows, the
        first row, the block in it."""
        SCALED: tl.constexpr = stack.s0 is not None
        w, s, n, first = stack.w0, stack.s0, stack.n0, 0
        blocks = tl.cdiv(stack.n0, ROWS)
        if block >= blocks:
            block -= blocks
            w, n, first = stack.w1, stack.n1, stack.n0
            if SCALED:
                s = stack.s1
            blocks = tl.cdiv(stack.n1, ROWS)
            if block >= blocks:
                block -= blocks
                w, n, first = stack.w2, stack.n2, stack.n0 + stack.n1
                if SCALED:
                    s = stack.s2
                blocks = tl.cdiv(stack.n2, ROWS)
                if block >= blocks:
                    block -= blocks
                    w, n, first = stack.w3, stack.n3, stack.n0 + stack.n1 + stack.n2
                    if SCALED:
                        s = stack.s3
        weight = (w, s) if SCALED else (w,)
        return weight, n, first, block

    @triton.jit
    def weight_tile(w, rows, n, first, SHAPE: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH columns from `first` on of some rows of a weight [n, K], as they are stored; each is read once."""
        columns = first + tl.arange(0, WIDTH)
        mask = (rows < n)[:, None] & (columns < SHAPE.K)[None, :]
        offsets = rows.to(tl.int64)[:, None] * SHAPE.K + columns[None, :]
        return tl.load(w + offsets, mask=mask, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def scale_tile(s, rows, n, columns, SHAPE: tl.constexpr):
        """Scales [rows, columns] of a weight at these columns, which may be as many to a block as one likes."""
        PER_ROW: tl.constexpr = (SHAPE.K + SHAPE.BLOCK_COLUMNS - 1) // SHAPE.BLOCK_COLUMNS
        mask = (rows < n)[:, None] & (columns < SHAPE.K)[None, :]
        offsets = (rows // SHAPE.BLOCK_ROWS * PER_ROW)[:, None] + (columns // SHAPE.BLOCK_COLUMNS)[None, :]
        return tl.load(s + offsets, mask=mask, other=0.0)

    @triton.jit
    def widen(tile):
        """The numbers that stored weights stand for, but for their scale."""
        return tile.to(tl.float32)

    @triton.jit
    def columns_of(x, first, K: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH numbers from `first` on of a vector [K]."""
        columns = first + tl.arange(0, WIDTH)
        return tl.load(x + columns, mask=columns < K, other=0.0)
