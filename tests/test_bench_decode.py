"""The decode benchmark without a GPU: its kernels on small cases against their reference, and the ratio to MLA."""

import pytest
import torch

from modeling_mlra import decode_flash_mlra, decode_mlra
from scripts import bench_decode, decode_cases, decode_peers, flash_operators
from scripts.decode_cases import Case, Inputs
from tests.flash_stand_in import SCHEMA, stand_in
from tests.tolerances import FUSED_FLOAT32_RATIO

pytest.importorskip("triton")
CASES = {
    "latent": Case("share", "latent", [70], 8),
    "latents": Case("released", "latent", [70, 9], 3, latents=4),
    "pages": Case("pages", "pages", [130, 9], 3, latents=4),
    "fp8": Case("fp8", "fp8", [70], 3, latents=4),
    "mla": Case("mla", "mla", [128], 8, width=512),
    "gqa": Case("gqa", "gqa", [70, 64], 4),
}
KERNELS = [
    (case, kernel)
    for case in CASES
    for kernel in decode_peers.KERNELS["latent" if case == "latents" else case]
    if kernel != "flash_mla"  # has an operator of its own
]


@pytest.fixture
def operator(monkeypatch):
    """A stand-in for vLLM's FlashAttention-3; computes in float64."""
    library = torch.library.Library(flash_operators.LIBRARY, "FRAGMENT")
    library.define(SCHEMA.replace("Tensor!", "Tensor"))

    def forward(q, k, v, *others):
        others = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in others]
        return [x.to(q.dtype) for x in stand_in(q.double(), k.double(), v.double(), *others)]

    library.impl("fwd", forward, "CompositeExplicitAutograd")
    yield
    library._destroy()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the benchmark itself checks them")
@pytest.mark.parametrize(("case", "kernel"), KERNELS)
def test_kernels_give_what_the_reference_does(case, kernel, operator, monkeypatch):
    """In float32, which the interpreter does not truncate."""
    monkeypatch.setattr(decode_cases, "DTYPE", torch.float32)
    monkeypatch.setattr(decode_cases, "L2_BYTES", 1)
    # The hook takes CUDA's 16 bits only
    monkeypatch.setattr(decode_mlra, "flash_obstacle", lambda *inputs: None)
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", None)  # `flash_attention_3` sets it
    inputs = Inputs(CASES[case], device="cpu")
    result = decode_peers.KERNELS[inputs.case.kind][kernel](inputs)[0]()
    assert bench_decode.ratio(result, inputs.reference(0)) < FUSED_FLOAT32_RATIO


def row(kernel, kind, heads, longest, us, batch=1):
    row = {"case": f"{kind} {longest}", "kernel": kernel, "kind": kind, "heads": heads, "longest": longest}
    return row | {"batch": batch, "latents": 1, "queries": 1} | ({} if us is None else {"us": us})


def test_the_fastest_mla_peer_counts():
    rows = [
        row("ours", "latent", 64, 1024, 10.0),
        row("flash_attention_3", "latent", 64, 1024, 11.0),
        row("flash_mla", "mla", 64, 1024, 40.0),
        row("flash_attention_3_mla", "mla", 64, 1024, 30.0),
        row("ours", "latent", 64, 2048, 20.0),
        row("flash_mla", "mla", 64, 2048, 50.0),
        row("flash_attention_3_mla", "mla", 64, 2048, None),  # failed its check
        row("ours", "latent", 64, 4096, 20.0),
        row("ours", "latent", 128, 1024, 20.0, batch=64),
        row("flash_mla", "mla", 128, 1024, 50.0, batch=16),
    ]
    lines = bench_decode.compare_with_mla(rows)
    noted = {i: (row["mla_peer"], row["against_mla"]) for i, row in enumerate(rows) if "mla_peer" in row}
    assert noted == {0: ("flash_attention_3_mla", 3.0), 4: ("flash_mla", 2.5)}
    assert len(lines) == 2 and "3.00x as fast as flash_attention_3_mla" in lines[0]


def test_parts_are_those_of_the_command():
    assert set(decode_cases.PARTS) == set(bench_decode.PART_NAMES)
    for cases in decode_cases.PARTS.values():
        assert {case.kind for case in cases()} <= decode_peers.KERNELS.keys()
