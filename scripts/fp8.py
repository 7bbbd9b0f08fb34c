"""FP8 weights as the library's `FineGrainedFP8Config` stores them: e4m3 numbers, float32 scales.

What is exported has one scale for a weight. Blocks of 128 x 128 keep numbers a little better, but the library leaves a
weight that they do not divide in 16 bits (nearly all of a released model, whose MLP is 9880 wide), and takes scales of
blocks that end at an edge for those of smaller ones where it widens weights again, as on a CPU.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Linear

from modeling_mlra import MLRAConfig, MLRAForCausalLM

KEPT = ("lm_head",)  # suffixes of the names of linear layers that stay as they are
FP8_CONFIG = FineGrainedFP8Config(weight_block_size=None, modules_to_not_convert=list(KEPT))
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SCALE = "_scale_inv"  # behind the name of a weight


def fp8_blocks(weight: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """e4m3 numbers `[n, K]` of a weight, and float32 scales `[ceil(n / rows), ceil(K / columns)]`, for None one."""
    n, inner = weight.shape
    rows, columns = (n, inner) if block is None else (min(n, block[0]), min(inner, block[1]))
    blocks = nn.functional.pad(weight.float(), (0, -inner % columns, 0, -n % rows))
    blocks = blocks.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [n / rows, rows, K / columns, columns]
    scale = blocks.abs().amax((1, 3)) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    numbers = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:n, :inner]
    numbers = numbers.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).contiguous()
    return numbers, scale[0, 0] if block is None else scale


def linear_names(model: nn.Module, kept: tuple[str, ...] = KEPT) -> list[str]:
    """The linear layers that become FP8."""
    return [name for name, layer in model.named_modules() if type(layer) is nn.Linear and not name.endswith(kept)]


@torch.no_grad()
def to_fp8(model: nn.Module, block: tuple[int, int] | None, kept: tuple[str, ...] = KEPT) -> None:
    """Put the library's FP8 layers in place of linear ones."""
    for name in linear_names(model, kept):
        weight = model.get_submodule(name).weight
        with torch.device("meta"):
            layer = FP8Linear(weight.shape[1], weight.shape[0], block)
        layer.weight, layer.weight_scale_inv = (
            nn.Parameter(x, requires_grad=False) for x in fp8_blocks(weight, block)
        )
        model.set_submodule(name, layer.eval())


def widened(layer: FP8Linear, dtype: torch.dtype) -> Tensor:
    """The numbers that the weights of an FP8 layer stand for."""
    scale = layer.weight_scale_inv
    if layer.block_size is not None:
        (n, inner), (rows, columns), device = layer.weight.shape, layer.block_size, scale.device
        scale = scale[torch.arange(n, device=device) // rows][:, torch.arange(inner, device=device) // columns]
    return (layer.weight.float() * scale).to(dtype)


def multiply_plainly() -> None:
    """From now on FP8 layers multiply by the numbers their weights stand for, slowly: for machines that do not get the
    library's own kernel, which is on the Hub. The fused step does not ask them."""
    FP8Linear.forward = lambda layer, x: nn.functional.linear(x, widened(layer, x.dtype))


def fp8_shapes(shapes: dict[str, torch.Size], config: MLRAConfig) -> dict[str, torch.Size]:
    """Shapes of the tensors of a model, and of the scales that some get."""
    with torch.device("meta"):
        names = linear_names(MLRAForCausalLM(config))
    return shapes | {f"{name}.weight{SCALE}": torch.Size() for name in names}


def fp8_tensors(tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, those that have a scale as FP8 with it."""
    for name, tensor in tensors:
        if name + SCALE in shapes:
            tensor, scale = fp8_blocks(tensor, None)
            yield name + SCALE, scale
        yield name, tensor


def stored_dtype(name: str, shapes: dict[str, torch.Size], dtype: torch.dtype) -> torch.dtype:
    """What a tensor is stored as, in a folder of `dtype`."""
    if name + SCALE in shapes:
        return torch.float8_e4m3fn
    return torch.float32 if name.endswith(SCALE) else dtype


def stored_bytes(shapes: dict[str, torch.Size], dtype: torch.dtype) -> int:
    return sum(shape.numel() * stored_dtype(name, shapes, dtype).itemsize for name, shape in shapes.items())
