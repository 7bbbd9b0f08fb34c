"""Microseconds of calls on a GPU, and what it reads in a second."""

import math
import statistics
from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def time_calls(calls: list[Callable], replays: int = 15) -> float:
    """Median microseconds of one call, from replays of a CUDA graph that holds a few milliseconds of calls in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = _elapsed(lambda: [call() for call in calls])
    repeats = max(1, min(math.ceil(4000 / once), 256 // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    samples = [_elapsed(graph.replay) for _ in range(replays)]
    return statistics.median(samples) / (len(calls) * repeats)


def _elapsed(run: Callable) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def read_ceiling() -> float:
    """GB/s of the best of a few plain kernels that read 4 GB and write next to nothing."""
    values = torch.randn(2**30, device="cuda")
    result = torch.empty(2**14, device="cuda")
    best = math.inf
    for block in (2048, 4096, 8192):
        for per_sm in (4, 8):
            grid = (torch.cuda.get_device_properties(0).multi_processor_count * per_sm,)
            call = lambda grid=grid, block=block: _read_kernel[grid](values, result, 2**30, block, num_warps=8)  # noqa: E731
            best = min(best, time_calls([call], replays=7))
    return values.numel() * 4 / best / 1e3


if triton is not None:

    @triton.jit
    def _read_kernel(values, result, count, BLOCK: tl.constexpr):
        top = tl.zeros([BLOCK], tl.float32)
        for i in tl.range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK, num_stages=4):
            top = tl.maximum(top, tl.load(values + i + tl.arange(0, BLOCK)))
        tl.store(result + tl.program_id(0), tl.max(top, 0))
