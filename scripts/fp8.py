"""FP8 weights as the library's `FineGrainedFP8Config` stores them: e4m3 numbers, a float32 scale for every block of a
weight. Blocks at the edges go as far as the weight does, as in DeepSeek-V3's checkpoints; the library itself leaves a
weight that its blocks do not divide in 16 bits, and so most of a model whose MLP is 9880 wide."""

import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

KEPT = ("lm_head",)  # suffixes of the names of linear layers that stay as they are
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers `[n, K]` of a weight, and float32 scales `[ceil(n / rows), ceil(K / columns)]`."""
    n, inner = weight.shape
    rows, columns = min(n, block[0]), min(inner, block[1])
    blocks = nn.functional.pad(weight.float(), (0, -inner % columns, 0, -n % rows))
    blocks = blocks.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [n / rows, rows, K / columns, columns]
    scale = blocks.abs().amax((1, 3)) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    numbers = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:n, :inner]
    return numbers.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def linear_names(model: nn.Module, kept: tuple[str, ...] = KEPT) -> list[str]:
    """The linear layers that become FP8."""
    return [name for name, layer in model.named_modules() if type(layer) is nn.Linear and not name.endswith(kept)]


@torch.no_grad()
def to_fp8(model: nn.Module, block: tuple[int, int] | None, kept: tuple[str, ...] = KEPT) -> None:
    """Put the library's FP8 layers in place of linear ones; None is one scale for a whole weight."""
    for name in linear_names(model, kept):
        weight = model.get_submodule(name).weight
        n, inner = weight.shape
        with torch.device("meta"):
            layer = FP8Linear(inner, n, block)
        numbers, scale = fp8_blocks(weight, block or (n, inner))
        layer.weight = nn.Parameter(numbers, requires_grad=False)
        layer.weight_scale_inv = nn.Parameter(scale if block else scale[0, 0], requires_grad=False)
        model.set_submodule(name, layer.eval())
