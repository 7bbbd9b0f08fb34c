"""What the kernels run on: the facts of devices that are not here, and launches on the device of the tensors."""

import ast
from types import SimpleNamespace

import pytest
import torch

from modeling_mlra import device_mlra
from modeling_mlra.device_mlra import device_facts, launch
from tests.paths import REPOSITORY

CUDA = torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch):
    """Two GPUs of which the first is current; the list holds every one that became current."""
    seen = [0]

    def exchange(index):
        seen.append(index)
        return seen[-2]

    monkeypatch.setattr(torch._C, "_accelerator_exchangeDevice", exchange)
    monkeypatch.setattr(torch._C, "_accelerator_maybeExchangeDevice", exchange)
    monkeypatch.setattr(device_mlra, "known_devices", {})
    return seen


class Kernel:
    """Stands for a kernel: keeps what it is launched with, and where."""

    def __init__(self, current):
        self.current, self.launches = current, []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((self.current[-1], grid, arguments, constants))


def pretend(monkeypatch, hip=None, **properties):
    """The properties that torch reports of a GPU, and no others."""
    monkeypatch.setattr(device_mlra, "known_devices", {})
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    return device_facts(CUDA)


def h100(monkeypatch):
    return pretend(
        monkeypatch, name="H100", major=9, minor=0, multi_processor_count=132, shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    )  # fmt: skip


def test_a_kernel_is_launched_on_the_device_of_its_tensors(current, monkeypatch):
    h100(monkeypatch)
    kernel = Kernel(current)
    launch(CUDA, kernel, (3,), "x", BLOCK=4, maxnreg=88)
    launch(torch.device("cpu"), kernel, (1,))
    assert kernel.launches == [(1, (3,), ("x",), {"BLOCK": 4, "maxnreg": 88}), (0, (1,), (), {})]
    assert current == [0, 1, 0], "and the one that was current is so again"


def test_a_kernel_that_was_found_before_starts_on_the_device_of_its_tensors(current, monkeypatch):
    h100(monkeypatch)
    monkeypatch.setattr(device_mlra, "_starts", {})
    started = []

    class Compiled:
        launch_metadata = None

        def __getitem__(self, grid):
            return lambda *arguments: started.append((current[-1], grid, arguments))

    class Found:
        arg_names = ("x", "BLOCK")

        def __getitem__(self, grid):
            return lambda *arguments, **constants: Compiled()

    kernel, alike = Found(), object()
    for x in "ab":
        launch(CUDA, kernel, (3,), x, alike=alike, BLOCK=4)
    assert started == [(1, (3, 1, 1), ("b", 4))]
    assert current == [0, 1, 0, 1, 0], "and the one that was current is so again"


def test_nothing_is_launched_in_another_way():
    """`kernel[grid](...)` anywhere else would run on whichever device is current."""
    launches = []
    for file in sorted((REPOSITORY / "modeling_mlra").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                if name.endswith("kernel"):
                    launches.append(f"{file.name}: {name}")
    assert launches == ["device_mlra.py: kernel"]


def test_launch_options_that_only_nvidia_knows(current, monkeypatch):
    pretend(monkeypatch, hip="6.4", multi_processor_count=304, gcnArchName="gfx942:sramecc+:xnack-")
    kernel = Kernel(current)
    launch(CUDA, kernel, (1,), maxnreg=88, num_warps=4)
    assert kernel.launches == [(1, (1,), (), {"num_warps": 4})]


def test_facts_of_devices(monkeypatch):
    facts = h100(monkeypatch)
    assert (facts.multiprocessors, facts.shared_bytes, facts.shared_per_multiprocessor) == (132, 232448, 233472)
    assert facts.nvidia and facts.hopper and facts.tested and facts.obstacle is None
    ada = pretend(
        monkeypatch, name="4090", major=8, minor=9, multi_processor_count=128, shared_memory_per_block_optin=101376
    )
    assert (ada.shared_bytes, ada.hopper, ada.early, ada.tested) == (101376, False, False, True)
    mi300 = pretend(monkeypatch, hip="6.4", multi_processor_count=304, gcnArchName="gfx942:sramecc+:xnack-")
    assert (mi300.multiprocessors, mi300.shared_bytes, mi300.nvidia, mi300.tested) == (304, 65536, False, True)
    assert not pretend(monkeypatch, hip="6.4", multi_processor_count=36, gcnArchName="gfx1030").tested
    old = SimpleNamespace(gpu_subslice_count=64, local_mem_size=131072)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: old)
    facts = device_facts(torch.device("xpu", 0))
    assert (facts.multiprocessors, facts.shared_bytes, facts.tested) == (64, 131072, False)


def test_gpus_that_no_kernel_compiles_for_say_so(monkeypatch):
    t4 = pretend(
        monkeypatch, name="Tesla T4", major=7, minor=5, multi_processor_count=40, shared_memory_per_block_optin=65536
    )
    assert t4.obstacle == "Tesla T4 has compute capability 7.5, its kernels need 8.0"
    assert device_mlra.triton_missing(CUDA, torch.float16) == t4.obstacle
    assert "Triton does not run on mps" in device_facts(torch.device("mps")).obstacle
