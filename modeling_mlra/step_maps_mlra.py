"""Linear maps of a decoding step as data: their weights, and what happens before and after the product.

The format of weights is known here alone: what of a layer is its weights (`weights_of`), what a kernel is given of
them (`stacked`), how it reads a tile, and which numbers that stands for (`weight_tile`, `widen`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .device_mlra import constants, tl, triton
from .step_device_mlra import Norm, Vectors, norm_of
from .tensor_parallel_mlra import local_tensor


@dataclass(frozen=True)
class LinearMap:
    """y = scale * norm(x) [w0; w1; ...]^T, or silu(norm(x) w0^T) * (norm(x) w1^T), plus a share of a residual.

    Attributes:
        weights: up to four `[n, K]` of one K; the two of a SwiGLU have one n.
        norm: the RMSNorm module in front, or None.
        norm_scale: a factor of what it gives.
        swiglu: whether the two weights are gate and up projection of a SwiGLU.
        residual_share: how many times the residual is added, where there is one.
    """

    weights: tuple[torch.Tensor, ...]
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


def weights_of(*layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """This rank's weights of linear layers."""
    return tuple(local_tensor(layer.weight) for layer in layers)


class Stack(NamedTuple):
    """Up to four weights [n, K] one below the other; the two of a SwiGLU side by side."""

    w0: Any
    w1: Any
    w2: Any
    w3: Any
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
    """K inputs, M vectors, and what happens beside the product."""

    K: Any
    M: Any
    NORM: Any
    SWIGLU: Any
    RESIDUAL: Any


def map_arguments(linear_map: LinearMap, x, out, residual) -> tuple[Vectors, Norm, Output, MapShape]:
    """What the kernels of a linear map have in common: inputs, norm, output and shape."""
    norm, share = linear_map.norm, linear_map.residual_share
    shape = MapShape(linear_map.inner, x.shape[0], norm is not None, linear_map.swiglu, residual is not None)
    return (
        Vectors(x, x.stride(0)),
        Norm(x, 1.0, 0.0) if norm is None else norm_of(norm, linear_map.norm_scale),
        Output(out if residual is None else residual, share, out, out.stride(0)),
        constants(shape),
    )


def stacked(linear_map: LinearMap, rows: int) -> tuple[int, Stack]:
    """Number of blocks of `rows` rows (of a SwiGLU, of each weight), and the weights as the kernels take them."""
    weights = linear_map.weights
    sizes, spare = [weight.shape[0] for weight in weights], 4 - len(weights)
    blocks = triton.cdiv(sizes[0], rows) if linear_map.swiglu else sum(triton.cdiv(size, rows) for size in sizes)
    return blocks, Stack(*weights, *weights[-1:] * spare, *sizes, *[0] * spare)


if triton is not None:

    @triton.jit
    def block_of(block, stack, ROWS: tl.constexpr):
        """Which of the stacked weights a row block lies in: the weight, its rows, the first row, the block in it."""
        w, n, first = stack.w0, stack.n0, 0
        blocks = tl.cdiv(stack.n0, ROWS)
        if block >= blocks:
            block -= blocks
            w, n, first = stack.w1, stack.n1, stack.n0
            blocks = tl.cdiv(stack.n1, ROWS)
            if block >= blocks:
                block -= blocks
                w, n, first = stack.w2, stack.n2, stack.n0 + stack.n1
                blocks = tl.cdiv(stack.n2, ROWS)
                if block >= blocks:
                    block -= blocks
                    w, n, first = stack.w3, stack.n3, stack.n0 + stack.n1 + stack.n2
        return w, n, first, block

    @triton.jit
    def weight_tile(w, rows, n, first, K: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH columns from `first` on of some rows of a weight [n, K], as they are stored; each is read once."""
        columns = first + tl.arange(0, WIDTH)
        mask = (rows < n)[:, None] & (columns < K)[None, :]
        offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
        return tl.load(w + offsets, mask=mask, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def widen(tile):
        """The numbers that stored weights stand for."""
        return tile.to(tl.float32)

    @triton.jit
    def columns_of(x, first, K: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH numbers from `first` on of a vector [K]."""
        columns = first + tl.arange(0, WIDTH)
        return tl.load(x + columns, mask=columns < K, other=0.0)
