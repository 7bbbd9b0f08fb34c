"""What bench_train holds a cell against before it is timed: loss and gradients of plain eager attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

LOSS_TOLERANCE = 5e-3  # nats
TIMES_ROUNDING = 1.5  # how far gradients may be from float32's, in units of how far plain attention in bfloat16 is
ROUNDING = {"bfloat16": 1, "float8": 16}  # e4m3 has four bits less than bfloat16


def forward_backward(model: Callable, ids: torch.Tensor, weight: float = 1.0, rounds: bool = True) -> torch.Tensor:
    """Loss of blocks `[B, T + 1]` as scripts.train computes it, in float32 unless it `rounds`; gradients add up."""
    targets = ids[:, 1:].contiguous()
    inputs = {"input_ids": ids[:, :-1].contiguous(), "labels": targets, "shift_labels": targets, "use_cache": False}
    if model.config.model_type == "mlra":
        inputs["skip_logits"] = True
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=rounds):
        loss = model(**inputs).loss
    (loss * weight).backward()
    return loss.detach()


def watched(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters whose gradients are compared: the first layer's attention, furthest from the loss."""
    return dict(model.model.layers[0].self_attn.named_parameters())


class Reference(NamedTuple):
    """Of plain eager attention, block by block: the loss and watched gradients in float32, and bfloat16's rounding.

    Attributes:
        rounding: of each gradient in bfloat16, RMS of its difference from float32's over RMS.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    rounding: dict[str, float]


def reference(model: nn.Module, ids: torch.Tensor) -> Reference:
    """What a cell is held against."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, gradients = [], []
    for rounds in (False, True):
        loss = sum(forward_backward(model, block[None], 1 / len(ids), rounds).item() for block in ids)
        losses.append(loss / len(ids))
        gradients.append({name: parameter.grad.clone() for name, parameter in watched(model).items()})
        model.zero_grad()
    model.gradient_checkpointing_disable()
    return Reference(losses[0], gradients[0], ratios(gradients[1], gradients[0]))


def ratios(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """RMS of the difference over RMS, of each tensor."""
    return {name: ((found[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items()}


def check(loss: float, model: nn.Module, expected: Reference, products: str = "bfloat16") -> dict:
    """Differences from the reference of a model that multiplies in `products`.

    Raises:
        ValueError: when they are more than rounding.
    """
    found = ratios({name: parameter.grad for name, parameter in watched(model).items()}, expected.gradients)
    where = max(found, key=lambda name: found[name] / expected.rounding[name])
    times = found[where] / expected.rounding[where]
    if not (abs(loss - expected.loss) <= LOSS_TOLERANCE and times <= TIMES_ROUNDING * ROUNDING[products]):
        raise ValueError(
            f"wrong: loss {loss:.4f} instead of {expected.loss:.4f}, gradient of {where} off by {found[where]:.3f}, "
            f"{times:.2f} times what bfloat16 rounds in plain attention"
        )
    return {"loss": loss, "loss_difference": loss - expected.loss, "gradient_difference_in_roundings": times}
