"""Models whose linear layers are of 8 bits, for tests on machines where the library itself would not make them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from modeling_mlra.step_maps_mlra import ScaledWeight, scaled, weight_of
from scripts.fp8 import KEPT, linear_names, multiply_plainly, to_fp8


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


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The library, which refuses FP8 without a GPU, builds its layers all the same, and they multiply."""
    with (
        patch.object(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None),
        patch.object(FP8Linear, "forward", FP8Linear.forward),
    ):
        multiply_plainly()
        yield


def save_fp8(model: nn.Module, block: tuple[int, int] | None, folder: Path) -> nn.Module:
    """Writes the model with FP8 layers, and returns it."""
    to_fp8(model, block)
    settings = FineGrainedFP8Config(weight_block_size=block, modules_to_not_convert=["lm_head"])
    model.config.quantization_config = settings.to_dict()
    model.save_pretrained(folder)
    return model


def fp8_copy(model: nn.Module, block: tuple[int, int] | None, kept: tuple[str, ...] = KEPT) -> nn.Module:
    """A copy of the model with the library's FP8 layers in place of linear ones. The model itself gets the numbers
    that these stand for: the two then compute the same."""
    copy = deepcopy(model)
    to_fp8(copy, block, kept)
    for name in linear_names(model, kept):
        model.get_submodule(name).weight.data.copy_(exact(weight_of(copy.get_submodule(name))))
    return copy
