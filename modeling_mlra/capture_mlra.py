"""CUDA graphs of a model's steps, kept as long as the cache whose rows they write, and caches that wait for a call.

A graph is bound to addresses: of weights, of cached rows, of the buffers that its inputs are copied to. So it lives
with its cache: a cache that `generate()` hands back keeps its graphs for the next turn, and one that nobody asked for
waits, with its graphs, for the next call of its size.
"""

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from .cache_mlra import MLRACache
from .decode_mlra import ENVIRONMENT_VARIABLE as DECODE_VARIABLE
from .device_mlra import on_device
from .library_mlra import is_observed
from .peer_memory_mlra import ENVIRONMENT_VARIABLE as EXCHANGE_VARIABLE
from .step_maps_mlra import has_scales, stored_tensors
from .tensor_parallel_mlra import is_parallel

SPARE_SHARE = 1 / 32  # of a device's memory, for the rows of caches that wait; the one not used for longest goes first
GROWTH = 4096  # rows beyond its prompt that a call reserves at first
FIRST_CAPACITY = 256  # rows of the smallest cache kept
ORDINARY = torch.Tensor, nn.Parameter  # whose memory is their own
logger = logging.getLogger(__name__)
_capturing = threading.Lock()


def size_class(size: int, first: int) -> int:
    """The smallest of `first` (a power of two), 1.5, 2, 3, 4, 6 ... times it that holds `size`: what calls of like
    lengths allocate, so that they can share their graphs."""
    held = first
    while held < size:
        held = held * 3 // 2 if held & (held - 1) == 0 else held // 3 * 4
    return held


class Replay:
    """A function of fixed buffers, as a CUDA graph from its second call on (plain calls elsewhere).

    One that cannot be captured goes on in plain calls, and says so.

    Args:
        function: runs on `device`; its result is the same object, with new contents, after every replay.
        siblings: others, of which only one runs at a time, so that their graphs share memory; joined by this one.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, siblings: "WeakSet[Replay] | None" = None):
        self.function, self.device, self.siblings = function, device, WeakSet() if siblings is None else siblings
        self.siblings.add(self)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.refused = False
        self.result: Any = None
        self.num_calls = 0

    def __call__(self) -> Any:
        self.num_calls += 1
        if self.device.type != "cuda":
            return self.function()
        if self.num_calls == 1:  # compiles kernels, fills libraries' workspaces
            with on_device(self.device):
                return self.function()
        if self.graph is None and not self.refused:
            try:
                self.prepare()
            except RuntimeError as error:  # nothing of it has run
                self.refused = True
                logger.warning(f"a step cannot be captured and runs kernel by kernel: {str(error).splitlines()[0]}")
        with on_device(self.device):
            if self.graph is None:
                return self.function()
            self.graph.replay()
        return self.result

    def prepare(self) -> None:
        """Record the function now, on a GPU, after a plain call; nothing of it runs.

        `torch.cuda.graph` would first wait for the device, collect garbage and empty the allocator's cache, which
        takes far longer than recording. Here garbage waits until the recording has ended, and other threads' work
        on other streams goes on beside it.
        """
        if self.device.type != "cuda":
            return
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        # Of a graph that is still there: the pool of those that are gone cannot be used again
        pool = next((other.graph.pool() for other in self.siblings if other.graph is not None), None)
        collects = gc.isenabled()
        with _capturing, on_device(self.device):
            caller = torch.cuda.current_stream(self.device)
            stream.wait_stream(caller)
            gc.disable()
            try:
                with torch.cuda.stream(stream):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        self.result = self.function()
                    except BaseException:
                        with suppress(RuntimeError):  # why it failed says more than that it cannot be ended
                            graph.capture_end()
                        raise
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
            caller.wait_stream(stream)
        self.graph = graph


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module, as `model.modules()` gives them, in a fraction of its time."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]


class Walk:
    """The modules of a model below it, and what each keeps, found once for as long as all have the same children: of a
    model of many layers that takes longer to look for than to look at.

    Kept among the attributes of the model, so that it goes with it; a copy of the model gets an empty one.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.states: list[dict] = []
        self.children: list | None = None

    def __reduce__(self):
        return Walk, ()

    @classmethod
    def of(cls, model: nn.Module) -> tuple[list[nn.Module], list[dict]]:
        """Every module and its attributes."""
        known = model.__dict__.get("_walk")
        if known is None or known.children_of(model) != known.children:
            known = cls()
            known.modules = list(modules_of(model))[1:]
            known.states = [module.__dict__ for module in known.modules]
            known.children = known.children_of(model)
            model.__dict__["_walk"] = known
        return [model, *known.modules], [model.__dict__, *known.states]

    def children_of(self, model: nn.Module) -> list:
        return [child for state in (model.__dict__, *self.states) for child in state["_modules"].values()]


def may_capture(model: nn.Module, cache: Any, generation_config) -> bool:
    """What every captured way needs: a GPU, a latent cache that stays there, and no `disable_compile=True`."""
    return (
        model.device.type == "cuda"
        and isinstance(cache, MLRACache)
        and not cache.offloading
        and not generation_config.disable_compile
    )


def has_global_hooks() -> bool:
    """Whether hooks look at all modules there are, as those of profilers that count operations."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def is_plain(model: nn.Module, but_hooks: bool = False) -> bool:
    """Whether the model's modules do nothing but compute: no hooks, and no other classes than its own, torch's and
    linear layers of a format that the step knows.

    Others, of other quantised weights or adapters, may wait for the device, which cannot be captured; a static cache
    asks for that all the same. `but_hooks`, whatever hooks look at.
    """
    own = (type(model).__module__.rpartition(".")[0], "torch.nn.modules", "transformers.activations")
    return (but_hooks or not has_global_hooks()) and not any(
        (is_observed(module) and not but_hooks)
        or not (type(module).__module__.startswith(own) or has_scales(module))
        or ("forward" in module.__dict__ and not is_parallel(module))
        for module in modules_of(model)
    )


def fingerprint(model: nn.Module) -> tuple:
    """What a graph of the model depends on beside the numbers in its weights; equal as long as the graph is right.

    Addresses and shapes of weights and buffers, the modules' classes, hooks and replaced forwards, autocast, and the
    choice of kernels. Weights that are changed in place, by an optimizer or by merging adapters, leave it as it is.
    """
    device_type = model.device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    config = model.config
    environment = [os.environ.get(name) for name in (DECODE_VARIABLE, EXCHANGE_VARIABLE)]
    parts: list = [*environment, config.decode_implementation, config.hidden_act, autocast]
    parts += [config.cache_row_format, has_global_hooks()]  # the former of the caches that wait
    modules, states = Walk.of(model)
    parts += map(type, modules)
    for index, state in enumerate(states):
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            module = modules[index]
            if "forward" in state or is_observed(module):
                parts += [ref(module), len(module._forward_hooks), len(module._forward_pre_hooks)]
    held = [x for state in states for x in (*state["_parameters"].values(), *state["_buffers"].values())]
    for tensor in held:
        if type(tensor) in ORDINARY:
            parts += tensor.data_ptr(), tensor.shape, tensor.dtype
        elif tensor is not None:
            for stored in stored_tensors(tensor):
                parts += stored.data_ptr(), stored.shape, stored.dtype
    return tuple(parts)


class Held:
    """What is kept with a cache: objects bound to its rows, by key, and what must not change meanwhile."""

    def __init__(self, model_fingerprint: tuple, cache: MLRACache):
        self.model_fingerprint, self.places = model_fingerprint, places(cache)
        self.objects: dict = {}
        self.replays: WeakSet[Replay] = WeakSet()
        self.last_use: torch.cuda.Event | None = None


def places(cache: MLRACache) -> list[tuple]:
    """Address and shape of each layer's rows."""
    return [(layer.rows.data_ptr(), layer.rows.shape) for layer in cache.layers]


_held: WeakKeyDictionary[MLRACache, Held] = WeakKeyDictionary()
_spare: WeakKeyDictionary[nn.Module, list[MLRACache]] = WeakKeyDictionary()
_sparing = threading.Lock()


def held_with(cache: MLRACache, model_fingerprint: tuple, kept: MutableMapping[MLRACache, Held] | None = None) -> Held:
    """What is kept with this cache, in `kept` or for graphs; nothing as soon as its buffers or the model have
    changed."""
    kept = _held if kept is None else kept
    held = kept.get(cache)
    if held is None or held.model_fingerprint != model_fingerprint or held.places != places(cache):
        held = kept[cache] = Held(model_fingerprint, cache)
    return held


def spare_bytes(device: torch.device) -> int:
    """Bytes of rows that may wait for calls of one model."""
    if device.type != "cuda":
        return 2**30
    return int(torch.cuda.get_device_properties(device).total_memory * SPARE_SHARE)


def take_spare(model: nn.Module, model_fingerprint: tuple, batch: int, capacity: int) -> MLRACache:
    """An empty growing cache, `capacity` rows reserved for each of `batch` sequences: one that waits, or a new one."""
    with _sparing:
        waiting = _spare.setdefault(model, [])
        for cache in [cache for cache in waiting if _held[cache].model_fingerprint != model_fingerprint]:
            _drop(waiting, cache)  # of weights that were moved or replaced
        for cache in reversed(waiting):
            if cache.layers[0].rows.shape[:3:2] == (batch, capacity):
                waiting.remove(cache)
                if (used := _held[cache].last_use) is not None:  # perhaps on another thread's stream
                    torch.cuda.current_stream(model.device).wait_event(used)
                return cache
    cache = MLRACache(model.config)
    cache.reserve(capacity)
    return cache


def give_back(model: nn.Module, cache: MLRACache) -> None:
    """Let a cache from `take_spare` wait for the next call, if it is small enough and something is kept with it."""
    held = _held.get(cache)
    if held is None or held.places != places(cache) or cache.nbytes > (most := spare_bytes(model.device)):
        return
    cache.set_seq_length(0)
    if model.device.type == "cuda":
        with on_device(model.device):
            held.last_use = torch.cuda.Event()
            held.last_use.record()
    with _sparing:
        waiting = _spare.setdefault(model, [])
        waiting.append(cache)
        while sum(cache.nbytes for cache in waiting) > most:
            _drop(waiting, waiting[0])


def _drop(waiting: list[MLRACache], cache: MLRACache) -> None:
    """Free a cache once nothing writes to it: tokens decoded past a call's end, perhaps on another thread's stream."""
    if (used := _held[cache].last_use) is not None:
        used.synchronize()
    waiting.remove(cache)


def free_spares(model: nn.Module) -> None:
    """Free the caches, and their graphs, that wait for calls of this model."""
    with _sparing:
        waiting = _spare.pop(model, [])
        while waiting:
            _drop(waiting, waiting[0])


__all__ = [
    "FIRST_CAPACITY",
    "GROWTH",
    "Held",
    "Replay",
    "fingerprint",
    "free_spares",
    "has_global_hooks",
    "give_back",
    "held_with",
    "is_plain",
    "may_capture",
    "modules_of",
    "size_class",
    "take_spare",
]
