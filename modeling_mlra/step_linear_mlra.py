"""One way to run a linear map of the decoding step, whichever of three kernels that takes.

-   registers   a few vectors: each program holds its tile of weights before the kernel in front has ended
-   stream      the same for large weights on Hopper GPUs: tiles stream through rings in shared memory
-   products    more vectors, on tensor cores
"""

from .step_device_mlra import Machine
from .step_linear_products_mlra import run_as_products
from .step_linear_registers_mlra import run_in_registers
from .step_linear_stream_mlra import run_as_stream, streams
from .step_maps_mlra import LinearMap

FEW_VECTORS = 2  # as many products are free beside the reading of the weights; more take tensor cores


def runner_of(linear_map: LinearMap, vectors: int, machine: Machine):
    """Which of the three ways suits a map of so many vectors on this device."""
    if vectors > FEW_VECTORS:
        return run_as_products
    return run_as_stream if machine.hopper and streams(linear_map, vectors) else run_in_registers


def run(linear_map: LinearMap, x, out, machine: Machine, residual=None) -> None:
    """out = linear_map(x), plus the map's share of `residual`. Weights of one format take one kernel.

    Args:
        x: `[M, K]`, of any first stride.
        out: `[M, sum of n]`, of a SwiGLU `[M, n]`.
        residual: like `out`, or None; may be `out`.
    """
    for part, columns in linear_map.parts():
        beside = None if residual is None else residual[:, columns]
        runner_of(part, x.shape[0], machine)(part, x, out[:, columns], beside, machine)
