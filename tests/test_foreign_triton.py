"""Any version of triton: a name that is gone costs the kernels, not the package."""

import importlib
import re
import sys
import types

import pytest
import torch

from modeling_mlra import decode_hopper_mlra, device_mlra
from tests.paths import REPOSITORY

pytest.importorskip("triton.experimental.gluon")
KERNEL_FILES = ("decode_mlra", "step_mlra", "generation_mlra")
SOURCES = {path.stem: path.read_text() for path in (REPOSITORY / "modeling_mlra").glob("*.py")}


def names_of(alias: str) -> list[str]:
    """Every name that the package's files read from a module they know as `alias`."""
    return sorted({name for source in SOURCES.values() for name in re.findall(rf"\b{alias}\.([a-zA-Z_]\w*)", source)})


MODULES = {
    "triton": ("triton", names_of("triton")),
    "triton.language": ("tl", names_of("tl")),
    "triton.experimental.gluon": ("gluon", names_of("gluon")),
    "triton.experimental.gluon.language": ("gl", names_of("gl")),
    "triton.experimental.gluon.language.nvidia.hopper": (
        "",
        ["fence_async_shared", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait"],
    ),
    "triton.experimental.gluon.nvidia.hopper": ("", ["TensorDescriptor"]),
}


def copy_of_the_package(monkeypatch) -> types.ModuleType:
    """The kernels' files, imported anew as another package."""
    package = types.ModuleType("mlra_copy")
    package.__path__ = [str(REPOSITORY / "modeling_mlra")]
    for name in [name for name in sys.modules if name.split(".")[0] == "mlra_copy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlra_copy", package)
    for name in KERNEL_FILES:
        importlib.import_module(f"mlra_copy.{name}")
    copied = {name: module for name, module in sys.modules.items() if name.startswith("mlra_copy.")}
    for name in copied:
        monkeypatch.delitem(sys.modules, name)
    return types.SimpleNamespace(**{name.partition(".")[2]: module for name, module in copied.items()})


def attend(copied) -> None:
    q, rows = torch.randn(1, 1, 1, 2, 4), torch.randn(1, 3, 1, 4)
    result = copied.decode_mlra.latent_attention(
        q, q[..., :2], rows, rows[:, :, 0, :2], kv_end=torch.tensor([3], dtype=torch.int32), scaling=1.0
    )
    assert result.shape == q.shape and result.isfinite().all()


@pytest.mark.parametrize("module", MODULES)
def test_a_dropped_name_costs_the_kernels_alone(module, monkeypatch):
    loaded = importlib.import_module(module)
    _, names = MODULES[module]
    assert names
    for name in [name for name in names if hasattr(loaded, name)]:
        with monkeypatch.context() as context:
            context.delattr(loaded, name)
            attend(copy_of_the_package(context))


def test_without_triton_at_all_and_with_a_broken_one(monkeypatch):
    for gone, said in ((("triton",), "is not installed"), (("triton.language",), "cannot be used")):
        with monkeypatch.context() as context:
            for name in gone:
                context.setitem(sys.modules, name, None)
            copied = copy_of_the_package(context)
            attend(copied)
            assert said in copied.device_mlra.triton_missing(torch.device("cpu"), torch.float32)


def test_a_renamed_keyword_of_the_decorator_is_no_error(monkeypatch):
    loaded = importlib.import_module("triton")
    monkeypatch.setattr(loaded, "jit", lambda function: function)
    copied = copy_of_the_package(monkeypatch)
    attend(copied)
    assert "cannot be used" in copied.device_mlra.triton_missing(torch.device("cpu"), torch.float32)


def test_with_the_installed_one_all_kernels_are_there():
    assert device_mlra.triton is not None and decode_hopper_mlra.gluon is not None
