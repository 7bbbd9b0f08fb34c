"""What the kernels run on: the installed triton, the facts of a device, and the one way to launch a kernel on it."""

import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

triton_trouble: str | None = None  # why triton cannot be used
try:
    import triton
    import triton.language as tl

    # What is looked up where a kernel is defined; the names inside of one only when it is compiled
    triton.jit(do_not_specialize=["x"])
    _ = tl.constexpr, triton.cdiv, triton.next_power_of_2, triton.__version__
except ImportError as error:
    triton = tl = None
    triton_trouble = "module triton is not installed"
    if not (isinstance(error, ModuleNotFoundError) and error.name == "triton"):
        triton_trouble = f"module triton cannot be used ({error})"
except (AttributeError, TypeError) as error:
    triton = tl = None
    triton_trouble = f"module triton cannot be used ({error})"
try:
    from triton.runtime._async_compile import AsyncCompileMode
except ImportError:  # not every triton compiles in the background
    AsyncCompileMode = None

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# First and last version of triton whose experimental API the Hopper kernels compile with (tests/compile_kernels.py)
GLUON_VERSIONS = (3, 6), (3, 9)
FIRST_CAPABILITY = (8, 0)  # of NVIDIA's GPUs
FLOAT8_CAPABILITY = (8, 9)
AMD_TARGETS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")  # that all kernels are compiled for in the tests


class DeviceFacts(NamedTuple):
    """What a launch has to know about a device.

    Attributes:
        multiprocessors: how many there are.
        early: whether kernels can be launched before the one in front has ended (programmatic dependent launch).
        hopper: whether the Hopper kernels run.
        shared_bytes: shared memory that one program can have.
        shared_per_multiprocessor: what programs on the same multiprocessor share.
        warp_size: threads that run in step.
        nvidia: whether NVIDIA's compiler, with its own launch options, builds the kernels.
        float8: whether kernels can read numbers of 8 bits (e4m3).
        tested: whether the tests compile all kernels for such a device.
        obstacle: why the kernels do not run on it, or None.
    """

    multiprocessors: int = 4
    early: bool = False
    hopper: bool = False
    shared_bytes: float = math.inf
    shared_per_multiprocessor: float = math.inf
    warp_size: int = 32
    nvidia: bool = False
    float8: bool = True
    tested: bool = True
    obstacle: str | None = None


known_devices: dict[torch.device, DeviceFacts] = {}


def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a device, looked up once."""
    if device not in known_devices:
        look_up = {"cpu": _cpu_facts, "cuda": _cuda_facts, "xpu": _xpu_facts}.get(device.type)
        unknown = DeviceFacts(tested=False, obstacle=f"Triton does not run on {device.type}; use 'torch'")
        known_devices[device] = unknown if look_up is None else look_up(device)
    return known_devices[device]


def _cpu_facts(device: torch.device) -> DeviceFacts:
    if INTERPRETED:
        return DeviceFacts(nvidia=True)
    return DeviceFacts(
        tested=False,
        obstacle="Triton needs a GPU; on this CPU use 'torch' (or set TRITON_INTERPRET=1 to run Triton's interpreter)",
    )


def _cuda_facts(device: torch.device) -> DeviceFacts:
    """Of GPUs by NVIDIA and by AMD, which torch calls "cuda" as well."""
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    shared = _first(properties, "shared_memory_per_block_optin", "shared_memory_per_block") or (
        48 * 2**10 if nvidia else 64 * 2**10
    )
    facts = DeviceFacts(
        multiprocessors=properties.multi_processor_count,
        shared_bytes=shared,
        shared_per_multiprocessor=_first(properties, "shared_memory_per_multiprocessor") or shared,
        warp_size=getattr(properties, "warp_size", 32 if nvidia else 64),
        nvidia=nvidia,
    )
    if not nvidia:
        return facts._replace(tested=properties.gcnArchName.split(":")[0] in AMD_TARGETS)
    capability = properties.major, properties.minor
    if capability < FIRST_CAPABILITY:
        named, first = (".".join(map(str, pair)) for pair in (capability, FIRST_CAPABILITY))
        return facts._replace(
            tested=False, obstacle=f"{properties.name} has compute capability {named}, its kernels need {first}"
        )
    early = properties.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait") if triton is not None else False
    float8, hopper = capability >= FLOAT8_CAPABILITY, properties.major == 9 and gluon_fits()
    return facts._replace(early=early, hopper=hopper, float8=float8)


def _xpu_facts(device: torch.device) -> DeviceFacts:
    properties = torch.xpu.get_device_properties(device)
    shared = _first(properties, "local_mem_size") or 64 * 2**10
    return DeviceFacts(
        multiprocessors=_first(properties, "gpu_subslice_count", "max_compute_units") or 4,
        shared_bytes=shared,
        shared_per_multiprocessor=shared,
        tested=False,
    )


def _first(properties, *names: str):
    """The first of these properties that there is: they differ between versions of torch and makers of GPUs."""
    return next((value for name in names if (value := getattr(properties, name, None))), None)


def gluon_fits() -> bool:
    """Whether the installed triton compiles the Hopper kernels; says so if only its version is in the way."""
    if triton is None:
        return False
    first, last = GLUON_VERSIONS
    if first <= tuple(int(number) for number in triton.__version__.split(".")[:2]) <= last:
        return True
    logger.warning(
        f"triton {triton.__version__} is not one of {first[0]}.{first[1]} to {last[0]}.{last[1]}, for which the "
        "Hopper kernels are written: the portable ones run, which are slower"
    )
    return False


def triton_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on tensors of this dtype on this device, or None if they can."""
    if triton is None:
        return triton_trouble
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 or float32, not {dtype}; use 'torch'"
    return device_facts(device).obstacle


def cannot_be_built(error: Exception) -> bool:
    """Whether a launch failed because its kernel does not compile for the device, or does not fit it.

    Nothing has run then. Errors of the device itself, and of its memory, are of other classes.
    """
    of_triton = type(error).__module__.partition(".")[0] == "triton"
    return of_triton or (type(error) is RuntimeError and not str(error).startswith("Triton Error ["))


def on_device(device: torch.device) -> torch.accelerator.device_index:
    """Context in which `device` is the current one: a kernel is launched on the current device and its stream,
    wherever its tensors are. On a CPU, or where it already is current, this does nothing."""
    return torch.accelerator.device_index(device.index if device.type in ("cuda", "xpu") else None)


MOST_COMPILERS = 16  # threads; about as many can wait for their part of Python
MAX_STARTS = 4096  # kept, all dropped beyond


class Start(NamedTuple):
    """What starts a compiled kernel on a grid, and the constants that it is given behind all other arguments."""

    kernel: Any
    run: Callable
    constants: tuple


_starts: dict[tuple[int, object], Start] = {}


def launch(device: torch.device, kernel, grid: tuple, *arguments, alike: object = None, **constants: Any) -> None:
    """Start a kernel of `grid` programs on `device`, where its tensors are, on that device's current stream.

    Args:
        alike: promise that launches of a kernel with the same one have equal grids, constants, types, and numbers that
            triton specializes on, and addresses on 16 bytes or not alike. After the first, the compiled kernel starts
            without triton's look at every argument, which takes longer than all else.
        constants: those of the kernel, and the launch options of its plan, of which those that a device's compiler
            does not know are left out.
    """
    if _ahead.get():
        with on_device(device):
            kernel.warmup(*arguments, grid=grid, **_known_options(device, constants))
        return
    kept, start = _kept(), None if alike is None else _starts.get((id(kernel), alike))
    if start is not None:
        with on_device(device):
            start.run(*arguments, *start.constants)
    else:
        constants = _known_options(device, constants)
        with on_device(device):
            compiled = kernel[grid](*arguments, **constants)
        interpreted = not hasattr(compiled, "launch_metadata")
        if kept is not None and interpreted:
            start = Start(kernel, functools.partial(kernel[grid], **constants), ())
        elif not interpreted and (kept is not None or alike is not None):
            rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            start = Start(kernel, compiled[(*grid, 1, 1)[:3]], rest)
            if alike is not None:
                if len(_starts) >= MAX_STARTS:
                    _starts.clear()
                _starts[id(kernel), alike] = start
    if kept is not None:
        assert start is not None
        kept.starts.append((start.run, (*arguments, *start.constants)))


class Launches:
    """A function that only launches kernels, on tensors that stay where they are; from its second call on its launches
    start one after the other, without what Python computes for each. They read their tensors' addresses anew.

    Args:
        function: runs on `device`; its result is the same object, with new contents, after every call. What it asks
            of `room` under one name is one tensor for all its launches.
        rooms: these tensors, where others of which only one runs at a time use them too.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, rooms: dict | None = None):
        self.function, self.device = function, device
        self.starts: list[tuple[Callable, tuple]] = []
        self.rooms: dict[tuple, torch.Tensor] = {} if rooms is None else rooms
        self.result: Any = None

    def __call__(self) -> Any:
        with on_device(self.device):
            if self.starts:
                for run, arguments in self.starts:
                    run(*arguments)
                return self.result
            outer, _keeping.launches = _kept(), self
            try:
                self.result = self.function()
            except BaseException:
                self.starts.clear()
                raise
            finally:
                _keeping.launches = outer
        return self.result


_keeping = threading.local()


def _kept() -> Launches | None:
    """Whose launches are being kept on this thread."""
    return getattr(_keeping, "launches", None)


def room(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor for what a kernel leaves to the next one."""
    kept = _kept()
    if kept is None:
        return torch.empty(shape, dtype=dtype, device=device)
    key = name, shape, dtype
    if key not in kept.rooms:
        kept.rooms[key] = torch.empty(shape, dtype=dtype, device=device)
    return kept.rooms[key]


def _known_options(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """Without what the device's compiler does not know."""
    if "maxnreg" in options and not device_facts(device).nvidia:
        return {name: value for name, value in options.items() if name != "maxnreg"}
    return options


_ahead: ContextVar[bool] = ContextVar("compiled ahead", default=False)


@contextmanager
def compiled_ahead(device: torch.device) -> Iterator[bool]:
    """Within it `launch` starts no kernel on `device`: all are compiled, several at a time, and ready when it ends.

    Gives whether that is so. Otherwise (no GPU, or a triton that compiles nothing in the background) `launch` would
    start kernels as ever, and whoever asks leaves it at that. What cannot be built is found out when it is launched.
    """
    if AsyncCompileMode is None or INTERPRETED or device_facts(device).obstacle is not None:
        yield False
        return
    with ThreadPoolExecutor(MOST_COMPILERS) as threads, AsyncCompileMode(threads, ignore_errors=True):
        token = _ahead.set(True)
        try:
            yield True
        finally:
            _ahead.reset(token)


@functools.lru_cache(maxsize=1024, typed=True)
def constants(group):
    """A named tuple of numbers as an argument of a kernel: all are known when it is compiled.

    The kernel's parameter bears no `tl.constexpr`: it would make one constant of the tuple, which triton cannot
    describe to a hook that asks what was compiled (profilers and vLLM's monitor set one).
    """
    if INTERPRETED:
        return SimpleNamespace(**group._asdict())  # of a tuple's numbers the interpreter makes tensors
    return type(group)(*map(tl.constexpr, group))


def launch_options(early: bool) -> dict[str, bool]:
    """Of a kernel that waits on the device for the one in front of it, and may be launched before that has ended."""
    return {"launch_pdl": True} if early else {}
