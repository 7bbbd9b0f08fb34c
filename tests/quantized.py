"""Models whose linear layers are of 8 bits, for tests on machines where the library itself would not make them."""

from copy import deepcopy

import torch
from torch import nn

from modeling_mlra.step_maps_mlra import ScaledWeight, scaled, weight_of
from scripts.fp8 import KEPT, linear_names, to_fp8


def scaled_weight(weight: torch.Tensor, block: tuple[int, int]) -> ScaledWeight:
    """e4m3 numbers and a scale for every block of rows and columns, those at the edges as far as they go."""
    rows, columns = block
    scale = torch.stack(
        [
            torch.stack([part.abs().max() / 448 for part in band.split(columns, 1)])
            for band in weight.float().split(rows, 0)
        ]
    )
    spread = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return scaled((weight.float() / spread).to(torch.float8_e4m3fn), scale, block)


def exact(weight: ScaledWeight) -> torch.Tensor:
    """The numbers that a weight stands for, in float64, one row after the other."""
    rows, columns = weight.block
    scale, of_column = weight.scale.double(), torch.arange(weight.shape[1], device=weight.scale.device) // columns
    return torch.stack([row.double() * scale[i // rows, of_column] for i, row in enumerate(weight.values.unbind())])


def fp8_copy(model: nn.Module, block: tuple[int, int] | None, kept: tuple[str, ...] = KEPT) -> nn.Module:
    """A copy of the model with the library's FP8 layers in place of linear ones. The model itself gets the numbers
    that these stand for: the two then compute the same."""
    copy = deepcopy(model)
    to_fp8(copy, block, kept)
    for name in linear_names(model, kept):
        model.get_submodule(name).weight.data.copy_(exact(weight_of(copy.get_submodule(name))))
    return copy
