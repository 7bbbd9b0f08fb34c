"""The decode attention as a kernel repository: complete, alone, with tests of its own; used by the model."""

import json
import subprocess
import sys

import pytest
import torch

from modeling_mlra.decode_mlra import decode_calls
from scripts.export_kernel import ENTRY, PACKAGE, kernel_files, main
from tests.models import random_ids, tiny_model


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel") / "mlra-latent-attention"
    assert main([str(folder)]) == 0
    return folder


def test_layout(repository):
    universal = repository / "build" / "torch-universal"
    metadata = json.loads((universal / "metadata.json").read_text())
    written = {file.name: file.read_text() for file in (universal / PACKAGE).iterdir()}
    assert written.keys() == {file.name for file in kernel_files()} | {"__init__.py"}
    for file in kernel_files():
        assert (written[file.name] == file.read_text()) == (file.name != ENTRY)
    assert f'NAMESPACE = "{metadata["id"]}"' in written[ENTRY]
    card = (repository / "README.md").read_text()
    assert metadata["name"] in card and f"Version {metadata['version']}" in card


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_its_own_tests_pass_without_this_package(repository, run_isolated, interpreted):
    """In a process that cannot import the package; with interpreted kernels, those run."""
    code = """
import os, sys, pytest
os.environ["TRITON_INTERPRET"] = sys.argv[2]
os.environ["MLRA_DECODE"] = "triton" if sys.argv[2] == "1" else "auto"
status = pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]])
calls = sys.modules["mlra_latent_attention.decode_mlra"].decode_calls
assert "modeling_mlra" not in sys.modules
print(int(status), dict(calls))
"""
    out = run_isolated(code, repository / "tests", interpreted)
    assert out.splitlines()[-1] == f"0 {{'{'triton' if interpreted == '1' else 'torch'}': 6}}"


def test_a_model_decodes_with_it(repository):
    pytest.importorskip("kernels")
    model, ids = tiny_model(), random_ids(2, 7)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.config.decode_implementation = str(repository)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert decode_calls[str(repository)] == 5 * len(model.model.layers)


def test_refusals_are_one_line(repository, tmp_path):
    command = [sys.executable, "-m", "scripts.export_kernel"]
    for arguments, words in (([repository], "already exists"), ([], "required")):
        result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") <= 2
