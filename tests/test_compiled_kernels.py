"""Kernels compile for every kind of GPU with the installed triton; Hopper's run with the versions that they fit."""

import os
import subprocess
import sys

import pytest

from modeling_mlra import device_mlra
from tests.decode_inputs import DEVICE
from tests.paths import REPOSITORY

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where there is one, with its triton too
COMPILED_TARGETS = {f"sm_{number}" for number in (80, 86, 89, 90, 100, 120)} | set(device_mlra.AMD_TARGETS)


@pytest.mark.parametrize(
    ("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False)]
)
def test_hopper_kernels_run_with_versions_of_triton_they_are_written_for(version, fits, monkeypatch, caplog):
    monkeypatch.setattr(device_mlra.triton, "__version__", version)
    assert device_mlra.gluon_fits() == fits
    assert fits or f"triton {version} is not one of 3.6 to 3.9" in caplog.text


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """With the installed triton: interpreted kernels never meet its compiler, and Hopper's cannot be interpreted.

    A sample of `make kernels`, which fails where a launch would: an option that the target does not know, a plan that
    does not fit its shared memory; and where too much is spilled.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    command = [sys.executable, "-m", "tests.compile_kernels", "--sample"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if " spilled" in line]
    assert {line.split()[0] for line in lines} == COMPILED_TARGETS
    on_hopper = [line for line in lines if line.startswith("sm_90")]
    fused = {"embed_kernel", "absorb_kernel", "value_kernel", "product_value_kernel", "choose_kernel"}
    fused |= {"register_linear_kernel", "product_linear_kernel", "stream_linear_kernel", "sum_kernel", "join_kernel"}
    assert {line.split()[1] for line in on_hopper} == fused | {"rows_kernel", "decode_kernel", "combine_kernel"}
    for line in on_hopper:
        if "rows_kernel" in line:
            assert "matrix products" in line and "bulk copies" in line, line
        if "sum_kernel" in line or "join_kernel" in line:  # to three ranks; from three, at first and in a loop
            assert "3 words sent" in line and "6 words read" in line, line
        if "product_linear_kernel" in line:  # its weights come through buffers, in whole vectors
            shared = int(line.partition(" bytes")[0].split()[-1])
            assert "matrix products" in line and shared > 50_000, line
    assert sum(" 8 bulk copies" in line for line in on_hopper) == 6, "gate and up, down, vocabulary; 1 and 2 sequences"
    scaled = [line for line in on_hopper if "stream_linear_kernel" in line and "FP8 weights" in line]
    assert len(scaled) == 1 and " 4 bulk copies" in scaled[0], "gate and up, in one box each for either warpgroup"
    assert sum("rows_kernel" in line and " 5 bulk copies" in line for line in on_hopper) == 3, "two latents"
    assert sum("rows_kernel" in line and "sample, pages" in line for line in on_hopper) == 4
    in_pages = [line.split()[1:3] for line in on_hopper if "sequences in pages" in line]
    assert sum(kernel == "absorb_kernel" for kernel, _ in in_pages) == 4 and ["rows_kernel", "mlra_4,"] in in_pages
    eight_bits = [line for line in on_hopper if "sample, eight bits" in line]
    copies = [line.count(f" {n} bulk copies") for line in eight_bits if "rows_kernel" in line for n in (3, 4)]
    assert copies == [1, 0, 0, 1, 1, 0], "scales come too, and latents at a time where those of 16 bits take two"
    assert sum("decode_kernel" in line for line in eight_bits) == 1
