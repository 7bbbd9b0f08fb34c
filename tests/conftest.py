"""Shared fixtures. No test may reach the network or the user's caches, so both are settled before any import."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HF_HOME = Path(tempfile.mkdtemp(prefix="mlra-tests-"))
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ.update(HF_HOME=str(HF_HOME), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, so that equal runs are equal; the tests run side by side

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined: without a GPU they are interpreted

from tests.paths import GOLDEN  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with token files, to train on, of a noisy rule that two layers learn quickly."""
    import numpy as np

    from evals.corpora import token_file_header

    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, count in (("train", 8001), ("heldout", 641)):
        tokens = np.ones(count, dtype="<u2")
        for index, noise in enumerate(generator.integers(0, 3, count - 1), start=1):
            tokens[index] = (5 * tokens[index - 1] + noise) % 61
        (folder / f"{name}.bin").write_bytes(token_file_header(count) + tokens.tobytes())
    return folder


@pytest.fixture
def no_choice_from_outside(monkeypatch):
    """The environment names no implementation of the decode attention."""
    from modeling_mlra.decode_mlra import ENVIRONMENT_VARIABLE

    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Callable[[str], Path]:
    """`converted(name)`: the Hub folder of a golden checkpoint, converted once per session."""
    from scripts.convert_checkpoint import main

    root = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            flags = ["--no-scale"] if name.endswith("no_scale") else []
            assert main([str(GOLDEN / name), str(folder), *flags]) == 0
        return folder

    return convert


@pytest.fixture(scope="session")
def run_isolated(tmp_path_factory) -> Callable[..., str]:
    """`run_isolated(code, *args)`: stdout of a Python process that cannot import this repository's packages."""
    guard = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_mlra", "scripts", "tokenization", "evals", "tests"):
            raise ImportError(f"{name} is out of reach here")
sys.meta_path.insert(0, Guard())
try:
    import modeling_mlra
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported")
"""
    folder = tmp_path_factory.mktemp("isolated")

    def run(code: str, *args: object) -> str:
        command = [sys.executable, "-P", "-c", guard + code, *map(str, args)]
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
