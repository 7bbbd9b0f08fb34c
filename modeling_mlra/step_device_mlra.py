"""Device code that the kernels of a decoding step share, and how their arguments are grouped."""

from typing import Any, NamedTuple

import torch

from .device_mlra import device_facts, tl, triton
from .tensor_parallel_mlra import local_tensor


class Machine(NamedTuple):
    """What a launch has to know about a device, and room on it.

    Attributes:
        multiprocessors, early, hopper: as in `DeviceFacts`.
        arrived: int32 zeros `[4 * multiprocessors]`, left as such, in which the programs that share a row block count.
    """

    multiprocessors: int
    early: bool
    hopper: bool
    arrived: torch.Tensor


def machine_of(device: torch.device) -> Machine:
    facts = device_facts(device)
    arrived = torch.zeros(4 * facts.multiprocessors, dtype=torch.int32, device=device)
    return Machine(facts.multiprocessors, facts.early, facts.hopper, arrived)


class Vectors(NamedTuple):
    """Rows of numbers, `stride` apart."""

    data: Any
    stride: Any


class Norm(NamedTuple):
    """RMSNorm: scale * gamma * x / rms(x)."""

    gamma: Any
    scale: Any
    eps: Any


def norm_of(module, scale: float) -> Norm:
    """A norm module of the model, times `scale`, as the kernels take it."""
    return Norm(local_tensor(module.weight), scale, module.variance_epsilon)


def padded(vectors: int) -> int:
    """Vectors of one matrix product."""
    return max(16, triton.next_power_of_2(vectors))


if triton is not None:
    from .device_triton_mlra import program_release, program_wait

    @triton.jit
    def wait_for_front(PDL: tl.constexpr):
        """Let the kernel behind load its weights, and wait for the one in front."""
        program_release(PDL)
        program_wait(PDL)

    @triton.jit
    def rms_factor(squares, width, norm):
        """What a vector times gamma is to be multiplied by, from the sum of its squares."""
        return norm.scale * tl.rsqrt(squares / width + norm.eps)

    @triton.jit
    def swiglu(gate, up):
        return gate / (1 + tl.exp(-gate)) * up
