"""What the host does for a decode attention: how the work is divided, by hand, and that one shape is planned once."""

import functools
from typing import Any, NamedTuple

import pytest
import torch

from modeling_mlra import decode_triton_mlra, device_mlra
from modeling_mlra.decode_arguments_mlra import Deal, DecodeInputs, Reduction
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.decode_plans_mlra import deal_work, reduction_plan
from modeling_mlra.device_mlra import DeviceFacts, constants

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.mark.parametrize(
    ("batch", "capacity", "lanes", "most", "least", "programs", "sequences", "big"),
    [
        (1, 100, 4, 132, 1, 5, 1, False),  # 33 at a time, but there are only 4 units of 32 rows, and one to spare
        (3, 4096, 4, 132, 1, 33, 4, False),  # 11 to a sequence
        (16, 4096, 4, 132, 1, 32, 16, False),  # 2 to a sequence rather than 33
        (1, 1000, 2, 132, 3, 11, 1, False),  # 33 units, 3 to a program
        (1, 2**31, 1, 132, 1, 132, 1, True),  # 2^26 units times 133 programs
        (1, 64, 200, 132, 1, 1, 1, False),  # more tiles than programs
    ],
)
def test_work_divided_by_hand(batch, capacity, lanes, most, least, programs, sequences, big):
    number, deal = deal_work(batch, capacity, lanes, most, 32, least, True)
    assert number == programs
    assert deal == Deal(UNIT=32, MIN_UNITS=least, BLOCK_B=sequences, HAS_START=True, BIG=big)


@pytest.mark.parametrize(
    ("batch", "width", "programs", "grid", "tile", "num_warps"),
    [
        (1, 96, 8, (1, 96, 1), {"SPLITS": 16, "BD": 128, "ROWS": 1}, 4),
        (1, 128, 132, (4, 96, 1), {"SPLITS": 256, "BD": 32, "ROWS": 1}, 8),
        (128, 128, 132, (1, 8, 128), {"SPLITS": 1, "BD": 128, "ROWS": 16}, 4),
    ],
)
def test_reduction_by_hand(batch, width, programs, grid, tile, num_warps):
    expected = grid, Reduction(L=4, H=8, R=width, **tile), num_warps
    assert reduction_plan(batch, 4, 3, 8, width, programs) == expected


def test_a_second_token_is_not_planned_anew(monkeypatch):
    """As many calls as layers and tokens follow, and what a GPU does in one takes less time than planning it."""
    device = torch.device(DEVICE)
    query, rope = torch.zeros(1, 1, 2, 3, 16, device=device), torch.zeros(1, 1, 1, 3, 16, device=device)
    latents, k_rope = torch.zeros(1, 300, 2, 16, device=device), torch.zeros(1, 300, 16, device=device)
    settings: dict = {"scaling": 0.5, "implementation": "triton"}
    planned = []
    for name in ("cdiv", "next_power_of_2"):
        function = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *x, function=function: planned.append(x) or function(*x))
    for cached in (deal_work, reduction_plan):
        cached.cache_clear()
    for end in (200, 201):
        planned.clear()
        latent_attention(query, rope, latents, k_rope, kv_end=torch.full((1,), end, device=device).int(), **settings)
        assert bool(planned) == (end == 200)


class Sizes(NamedTuple):
    A: Any
    B: Any


class OtherSizes(NamedTuple):
    A: Any
    B: Any


def test_constants_are_made_once_for_each_kind(monkeypatch):
    """Tuples of equal numbers are equal, whatever they are called."""
    monkeypatch.setattr(device_mlra, "INTERPRETED", False)
    first, again, other = constants(Sizes(1, 2)), constants(Sizes(1, 2)), constants(OtherSizes(1, 2))
    assert first is again and [x.value for x in first] == [1, 2]
    assert (type(first), type(other)) == (Sizes, OtherSizes)


class CompiledKernel:
    """Stands for a kernel: a launch compiles it, and gives what starts it at once."""

    arg_names = ("x", "y", "TILE", "EARLY")

    def __init__(self):
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def compile(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            start = {(*grid, 1, 1)[:3]: lambda *arguments: self.started.append(arguments)}
            return type("Compiled", (), {"launch_metadata": None, "__getitem__": lambda _, whole: start[whole]})()

        return compile


@pytest.mark.skipif(DEVICE == "cuda", reason="a kernel that is none cannot be started there")
def test_kernels_compiled_ahead_are_not_started(monkeypatch):
    """But handed to triton with what a launch gives it, for background threads; one that fails is left to a launch."""
    _async_compile = pytest.importorskip("triton.runtime._async_compile")
    compiled, device = [], torch.device("cpu")

    class Kernel:
        def warmup(self, *arguments, grid, **options):
            mode = _async_compile.active_mode.get()
            compiled.append((arguments, grid, options, mode.ignore_errors))
            background = [lambda *_: None] * (4 if "cleanup_fn" in mode.submit.__code__.co_varnames else 3)
            mode.submit(len(compiled), lambda: 1 / 0, *background[2:])

        def __getitem__(self, grid):
            return lambda *arguments, **options: compiled.append((arguments, grid, options, "started"))

    launch = functools.partial(device_mlra.launch, device, Kernel(), (3,), 7, maxnreg=168, TILE=4)
    monkeypatch.setattr(device_mlra, "INTERPRETED", False)
    monkeypatch.setattr(device_mlra, "known_devices", {device: DeviceFacts()})
    with device_mlra.compiled_ahead(device) as works:
        launch()
        launch()
    launch()
    assert works and _async_compile.active_mode.get() is None
    assert compiled == [((7,), (3,), {"TILE": 4}, how) for how in (True, True, "started")]


def test_nothing_is_compiled_ahead_without_a_gpu(monkeypatch):
    for facts in (DeviceFacts(obstacle="none"), DeviceFacts()):
        monkeypatch.setattr(device_mlra, "known_devices", {torch.device("cpu"): facts})
        with device_mlra.compiled_ahead(torch.device("cpu")) as works:
            assert not works and not device_mlra._ahead.get()
        monkeypatch.setattr(device_mlra, "INTERPRETED", True)


def test_alike_launches_look_for_the_kernel_once(monkeypatch):
    monkeypatch.setattr(device_mlra, "_starts", {})
    kernel, other, first, second = CompiledKernel(), CompiledKernel(), object(), object()
    for number, alike in enumerate([first, first, None, second, first]):
        device_mlra.launch(
            torch.device("cpu"), kernel, (2, 3), number, "y", alike=alike, EARLY=True, TILE=4, num_warps=8
        )
    constants = {"EARLY": True, "TILE": 4, "num_warps": 8}
    assert kernel.compiled == [((2, 3), (number, "y"), constants) for number in (0, 2, 3)]
    assert kernel.started == [(number, "y", 4, True) for number in (1, 4)], "constants in the kernel's order"
    device_mlra.launch(torch.device("cpu"), other, (1,), 7, "y", alike=first, EARLY=True, TILE=4)
    assert len(other.compiled) == 1 and not other.started, "another kernel"


def test_launches_are_kept(monkeypatch):
    """The first call launches as ever; others start the same kernels, in one room for equal ones."""
    monkeypatch.setattr(device_mlra, "_starts", {})
    kernel, device, planned, alike = CompiledKernel(), torch.device("cpu"), [], object()

    def function():
        for number in range(2):
            planned.append(number)
            left = device_mlra.room("left", (3,), torch.float32, device)
            device_mlra.launch(device, kernel, (2,), number, left, alike=alike, EARLY=True, TILE=4, num_warps=8)
            device_mlra.launch(device, kernel, (1,), number, "y", EARLY=False, TILE=number)
        return left

    launches = device_mlra.Launches(function, device)
    left = launches()
    assert device_mlra.room("left", (3,), torch.float32, device) is not left, "not within the function"
    compiled, started = list(kernel.compiled), list(kernel.started)
    assert len(compiled) == 3 and started == [(1, left, 4, True)]
    kernel.started.clear()
    assert launches() is left and launches() is left
    again = [(0, left, 4, True), (0, "y", 0, False), (1, left, 4, True), (1, "y", 1, False)]
    assert all(mine[1] is theirs[1] for mine, theirs in zip(kernel.started, again, strict=False))
    assert [x[:1] + x[2:] for x in kernel.started] == [x[:1] + x[2:] for x in again * 2]
    assert kernel.compiled == compiled and planned == [0, 1]


def test_a_launch_that_fails_is_not_kept(monkeypatch):
    kernel, device, fails = CompiledKernel(), torch.device("cpu"), [True, False]

    def function():
        device_mlra.launch(device, kernel, (1,), 0, "y", EARLY=False, TILE=1)
        if fails.pop(0):
            raise RuntimeError("no room")

    launches = device_mlra.Launches(function, device)
    with pytest.raises(RuntimeError, match="no room"):
        launches()
    launches()
    assert len(launches.starts) == 1 and device_mlra._kept() is None


def flat(x):
    """What triton sees of an argument beside its address, and a number that no kernel is compiled for."""
    if isinstance(x, tuple):
        return tuple(map(flat, x))
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.stride()
    if hasattr(x, "block_shape"):
        return flat(x.base), x.shape, x.strides, x.block_shape
    return None if isinstance(x, float) else x


def call(
    batch=2, length=1, latents=4, heads=24, capacity=512, held=640, page_size=0, starts=False, mask=0, offset=0,
    spread=False, settled=False, dtype=torch.bfloat16,
) -> DecodeInputs:  # fmt: skip
    """A call over `capacity` of `held` cached rows, `offset` numbers from where they could begin."""
    pages = (batch * held,) if page_size else (batch, held)
    rows = torch.zeros(*pages, latents * 128 + 64 + 8, dtype=dtype)[..., offset : offset + latents * 128 + 64]
    rows = rows if page_size else rows[:, :capacity]
    query = torch.zeros(batch, length, latents, heads, 256 if spread else 128, dtype=dtype)[..., :128]
    return DecodeInputs(
        query, torch.zeros(batch, length, 1, heads, 64, dtype=dtype),
        rows[..., :-64].unflatten(-1, (latents, 128)), rows[..., -64:], torch.ones(batch, dtype=torch.int32),
        kv_start=torch.zeros(batch, dtype=torch.int32) if starts else None,
        key_mask=torch.ones(batch, mask, dtype=torch.bool) if mask else None,
        block_table=torch.zeros(batch, capacity // page_size, dtype=torch.int32) if page_size else None,
        page_size=page_size, scaling=0.1, settled=settled,
    )  # fmt: skip


CALLS: list[dict] = [
    {}, {"batch": 3}, {"length": 4}, {"latents": 2}, {"heads": 8}, {"capacity": 513}, {"held": 641}, {"starts": True},
    {"mask": 512}, {"mask": 520}, {"spread": True}, {"settled": True}, {"dtype": torch.float32},
    {"page_size": 16}, {"page_size": 64}, {"page_size": 64, "capacity": 576}, {"page_size": 64, "held": 1280},
]  # fmt: skip


def test_alike_are_calls_that_differ_in_addresses_alone(monkeypatch):
    hopper = device_mlra.DeviceFacts(multiprocessors=132, early=True, hopper=True, nvidia=True)
    monkeypatch.setitem(device_mlra.known_devices, torch.device("cpu"), hopper)
    launched: list = []
    monkeypatch.setattr(decode_triton_mlra, "launch", lambda *x, **options: launched.append((x, options)))
    seen: dict = {}
    for settings in CALLS:
        for _ in range(2):
            launched.clear()
            decode_triton_mlra.triton_latent_attention(call(**settings))
            (attends, options), (reduces, others) = launched
            alike = options.pop("alike")
            assert alike is not None and others.pop("alike") is alike
            what = flat(attends[2:]), flat(reduces[2:]), options, others
            assert seen.setdefault(alike, what) == what
    assert len(seen) == len(CALLS)
    launched.clear()
    for offset in (1, 4, 8):
        decode_triton_mlra.triton_latent_attention(call(offset=offset, dtype=torch.bfloat16))
    assert [options["alike"] is None for _, options in launched[::2]] == [True, True, False], "not on 16 bytes"
