"""Times of a tensor-parallel decode step and of its parts, the slowest rank's, in microseconds."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from modeling_mlra import step_split_mlra
from modeling_mlra.peer_memory_mlra import ENVIRONMENT_VARIABLE
from modeling_mlra.step_exchange_mlra import Exchange
from modeling_mlra.step_mlra import FusedStep
from modeling_mlra.step_split_mlra import Split
from scripts.bench_decode import RATIO_LIMIT
from scripts.bench_tp_dcp import DCPStep
from scripts.bench_tp_systems import OURS, System

HEAD_WIDTH = 128  # d_h of the released models, the unit of the paper's table of cache sizes
SPARE_BYTES = 3 * 2**30  # of a GPU, beside weights and cache
WARM_UPS = 3


@contextmanager
def no_exchange() -> Iterator[None]:
    """Sums over ranks, and what context parallelism exchanges, are left out: results are wrong, and the time that is
    gained is what they cost. The vocabulary is joined all the same."""
    places = (distributed, "all_reduce"), (Exchange, "sum"), (DCPStep, "gather"), (DCPStep, "merge")
    real = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for (place, name), function in zip(places, real, strict=True):
            setattr(place, name, function)


@contextmanager
def through_nccl() -> Iterator[None]:
    """Steps that are made inside sum over ranks by NCCL."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = "nccl"
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT_VARIABLE]
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before


@contextmanager
def splitting(ranks: int, split: Split) -> Iterator[None]:
    """Steps that are made inside split these maps over so many ranks."""
    before = step_split_mlra.SPLITS
    step_split_mlra.SPLITS = {ranks: split}
    try:
        yield
    finally:
        step_split_mlra.SPLITS = before


def median_time(function: Callable[[], object], device: torch.device, replays: int) -> float:
    """Median microseconds of `function` as a CUDA graph (plain calls on the CPU); the slowest rank's."""
    with torch.no_grad():
        for _ in range(2):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            for _ in range(WARM_UPS):
                graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            for event in events:
                event.record()
                if event is not events[-1]:
                    graph.replay()
            torch.cuda.synchronize()
            times = [1e3 * start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]
            del graph
        else:
            times = []
            for _ in range(replays):
                started = time.perf_counter()
                function()
                times.append(1e6 * (time.perf_counter() - started))
    return slowest(statistics.median(times), device)


def slowest(value: float, device: torch.device) -> float:
    held = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
    return held.item()


def spare_rows(replays: int) -> int:
    """What one timing of a step appends."""
    return replays + WARM_UPS + 2


def lacking_memory(system: System, batch: int, context: int, replays: int) -> str | None:
    """Why a cache does not fit, alike on all ranks, or None."""
    if system.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    needed = system.cache_bytes(batch, context, spare_rows(replays)) + SPARE_BYTES
    free = -slowest(-torch.cuda.mem_get_info()[0], system.device)
    return None if needed <= free else f"needs {needed / 2**30:.0f} GiB a GPU, of which {free / 2**30:.0f} are free"


def measure_decode(system: System, batch: int, context: int, replays: int) -> dict:
    """Time of a step from `context` on by the best of the system's kernels, the attention's part, what exchange takes
    of it, and the cache's bytes on each rank; of one sequence also through NCCL, where peer memory is used."""
    if (reason := lacking_memory(system, batch, context, replays)) is not None:
        return {"skipped": reason}
    cache, taken = system.cache(batch, context, spare_rows(replays))
    rows = batch * system.capacity(context, spare_rows(replays)) * system.sharers
    element = cache.layers[0].rows.element_size()
    result = {
        "sequences": batch,
        "cache_bytes_allocated": taken,
        "cache_head_widths": taken / (rows * len(cache.layers) * HEAD_WIDTH * element),
        "cache_bytes_read": batch * context // system.sharers * len(cache.layers) * system.row_width * element,
        "kernels": {},
    }
    for kernel in system.kernels():
        try:
            result["kernels"][kernel] = time_kernel(system, cache, batch, context, kernel, replays)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            result["kernels"][kernel] = {"failed": str(error).split("\n")[0][:200]}
    times = {kernel: timed["token_us"] for kernel, timed in result["kernels"].items() if "token_us" in timed}
    if not times:
        return result
    best = min(times, key=lambda kernel: times[kernel])
    step = system.step(cache, batch, context, best)
    result |= {"kernel": best, "token_us": times[best], "tokens_per_s": 1e6 * batch / times[best]}
    result["tokens_per_s"] *= distributed.get_world_size() // system.size
    if system.mesh is not None:
        result["exchange"] = "peer memory" if step.exchange is not None else "nccl"
        with no_exchange():  # `slowest` needs the real one, so the time is this rank's
            without = median_time(decoding(step, batch), system.device, replays)
        result |= {"token_us_without_exchange": without, "exchange_share": 1 - without / times[best]}
        if result["exchange"] == "peer memory" and batch == 1 and system.sharing is None:
            with through_nccl():
                step = system.step(cache, batch, context, best)
                result["token_us_through_nccl"] = median_time(decoding(step, batch), system.device, replays)
    return result


def time_kernel(system: System, cache, batch: int, context: int, kernel: str, replays: int) -> dict:
    """A token with this attention kernel, once it is known to be right, and of one sequence the attention alone."""
    step = system.step(cache, batch, context, kernel)
    found = system.check(step)
    if found is not None:
        found = slowest(found, system.device)  # the same on all ranks, which go on or stop together
        if not found < RATIO_LIMIT:
            raise RuntimeError(f"float32 check: ratio {found:.1e}")
    timed: dict = {"ratio": found, "token_us": median_time(decoding(step, batch), system.device, replays)}
    if batch == 1:
        step.counters.copy_(system.counters(batch, context))
        timed["attend_us_per_layer"] = time_attention(system, step, replays)
    return timed


def time_attention(system: System, step: FusedStep, replays: int) -> float:
    """Of one layer, with what its ranks exchange for it, but without projections."""
    attend, layers = system.attends(step), system.model.model.layers

    def all_layers():
        for layer, cached in zip(layers, step.cache.layers, strict=True):
            attend(layer, cached.rows)

    return median_time(all_layers, system.device, replays) / len(layers)


def decoding(step: FusedStep, batch: int) -> Callable[[], object]:
    """A token of each sequence, greedy choice included."""
    token = torch.zeros(batch, dtype=torch.long, device=step.device)
    return lambda: token.copy_(step(token).argmax(-1))


def measure_splits(system: System, batches: list[int], context: int, replays: int) -> dict:
    """Query and output projections whole on every rank, and split over ranks (`step_split_mlra`).

    Of each form the microseconds of both maps of a layer, with all that the ranks exchange for them, and of a token.
    """
    results: dict = {}
    for batch in batches:
        cache, _ = system.cache(batch, context, spare_rows(replays))
        forms = results[str(batch)] = {"context": context}
        for split in (Split(), Split(query=True), Split(out=True), Split(query=True, out=True)):
            with splitting(system.size, split):
                step = system.step(cache, batch, context, OURS)
            assert step.split == split, f"{step.split} is what these ranks split"
            token = median_time(decoding(step, batch), system.device, replays)

            def maps(step=step):
                for layer in system.model.model.layers:
                    step.query(layer)
                    step.out(layer)

            layer = median_time(maps, system.device, replays) / len(system.model.model.layers)
            name = " and ".join(name for name, asked in split._asdict().items() if asked) or "whole"
            forms[name] = {"maps_us_per_layer": layer, "token_us": token}
    return results
