"""Plans of the decode kernels: what is tried first on which GPU, shares of the work, and plans that do not fit."""

from unittest.mock import MagicMock

import pytest
import torch

from modeling_mlra import decode_mlra, decode_plans_mlra, decode_triton_mlra
from modeling_mlra.decode_arguments_mlra import DecodeTile
from modeling_mlra.decode_mlra import decode_calls
from modeling_mlra.device_mlra import DeviceFacts
from tests.decode_inputs import DEVICE, FP32_RATIO, inputs, oracle, ratio, run

errors = pytest.importorskip("triton.runtime.errors")

CARDS = {
    "H100": DeviceFacts(132, True, True, 232_448, 233_472, nvidia=True),
    "A100": DeviceFacts(108, shared_bytes=166_912, shared_per_multiprocessor=167_936, nvidia=True),
    "4090": DeviceFacts(128, shared_bytes=101_376, shared_per_multiprocessor=102_400, nvidia=True),
    "MI300X": DeviceFacts(304, shared_bytes=65_536, shared_per_multiprocessor=65_536, warp_size=64),
    "7900": DeviceFacts(96, shared_bytes=65_536, shared_per_multiprocessor=65_536, warp_size=32),
}
pytestmark = [pytest.mark.usefixtures("no_choice_from_outside")]
if DEVICE == "cuda":  # where there is one, all of them run on the GPU
    pytestmark.append(pytest.mark.gpu)


@pytest.mark.parametrize(
    ("card", "latents", "width", "itemsize", "expected"),
    [
        ("H100", 4, 128, 2, {"NL": 4, "BM": 32, "BN": 16, "num_stages": 4, "num_warps": 4, "programs_per_sm": 2}),
        ("H100", 1, 512, 2, {"NL": 1, "BM": 32, "BN": 32, "num_stages": 3, "num_warps": 8, "programs_per_sm": 1}),
        ("A100", 4, 128, 2, {"NL": 4, "BM": 32, "BN": 16, "num_stages": 4, "num_warps": 4, "programs_per_sm": 1}),
        ("4090", 4, 128, 2, {"NL": 4, "BM": 32, "BN": 16, "num_stages": 3, "num_warps": 4, "programs_per_sm": 1}),
        ("4090", 4, 128, 4, {"NL": 1, "BM": 32, "BN": 16, "num_stages": 3, "num_warps": 8, "programs_per_sm": 1}),
        ("4090", 1, 512, 2, {"NL": 1, "BM": 32, "BN": 32, "num_stages": 2, "num_warps": 8, "programs_per_sm": 1}),
        ("MI300X", 1, 512, 2, {"NL": 1, "BM": 32, "BN": 16, "num_stages": 3, "num_warps": 8, "programs_per_sm": 1}),
        ("7900", 4, 128, 2, {"NL": 1, "BM": 32, "BN": 32, "num_stages": 3, "num_warps": 16, "programs_per_sm": 1}),
        ("7900", 4, 128, 4, {"NL": 1, "BM": 32, "BN": 16, "num_stages": 3, "num_warps": 16, "programs_per_sm": 1}),
    ],
)
def test_first_plans_of_the_plain_kernel(card, latents, width, itemsize, expected):
    plan = decode_plans_mlra.decode_plans(24, latents, 1, width, 64, itemsize, 4096, False, CARDS[card])[0]
    assert isinstance(plan.tile, DecodeTile)
    assert expected.items() <= (plan._asdict() | plan.tile._asdict()).items()


def test_latents_share_programs_where_the_rotary_keys_are_read_often():
    def latents_of_a_program(cached, rows=24, latents=4, groups=1):
        plans = decode_plans_mlra.decode_plans(rows, latents, groups, 128, 64, 2, cached, True, CARDS["H100"])
        return plans[0].tile.NL

    assert latents_of_a_program(2**20) == latents_of_a_program(2**20, rows=32, groups=2) == 2
    assert latents_of_a_program(2**17) == latents_of_a_program(2**20, rows=33) == 1
    assert latents_of_a_program(2**20, latents=2) == latents_of_a_program(2**20, groups=4) == 1


@pytest.mark.parametrize(
    ("rows", "latents", "cached", "expected"),
    [
        (64, 1, 2**21, {"NL": 1, "BM": 64, "OVERLAP": True, "HELD": True, "STAGES": 6, "WIDE": 4}),
        (24, 4, 2**17, {"NL": 1, "BM": 64, "OVERLAP": True, "HELD": True, "STAGES": 6, "WIDE": 4}),
        (24, 4, 2**20, {"NL": 2, "BM": 64, "OVERLAP": False, "HELD": False, "STAGES": 4, "WIDE": 2}),
        (96, 4, 2**20, {"NL": 1, "BM": 128, "OVERLAP": True, "HELD": True, "STAGES": 6, "WIDE": 4}),
    ],
)
def test_latents_of_eight_bits_are_widened_where_copies_are_in_bulk(rows, latents, cached, expected):
    sizes = (rows, latents, 1, 128, 64, 2, cached)
    plan, portable, *_ = decode_plans_mlra.decode_plans(*sizes, True, CARDS["H100"], 64, True)
    assert expected.items() <= plan.tile._asdict().items() and plan.tile.BN == plan.unit == 64
    assert portable == decode_plans_mlra.decode_plans(*sizes, False, CARDS["H100"], 64, True)[0]


@pytest.mark.parametrize(
    ("programs", "batch", "expected"),
    [(132, 1, 132), (33, 16, 32), (33, 5, 33), (132, 64, 128), (132, 128, 128), (33, 66, 33), (33, 40, 33)],
)
def test_shares_of_sequences_of_one_length(programs, batch, expected):
    assert decode_plans_mlra.even_programs(programs, batch) == expected


def test_sequences_stay_whole_where_that_idles_few_programs(monkeypatch):
    """15 equal sequences on 16 programs' worth of multiprocessors: nothing is left for the second kernel to reduce."""
    monkeypatch.setattr(decode_triton_mlra, "device_facts", lambda device: DeviceFacts(multiprocessors=16))
    monkeypatch.setattr(decode_triton_mlra, "combine_kernel", MagicMock())
    arguments, kv_end = inputs(15, 1, 1, 1, 3, 16, 16, 64)
    result = run(arguments, kv_end, "triton", scaling=0.2)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


class SmallGPU:
    """Refuses the first launches of the decode kernel, as a GPU does where shared memory lacks."""

    def __init__(self, refusals):
        self.refusals, self.tried, self.launch = refusals, [], decode_triton_mlra._launch

    def __call__(self, plan, *arguments):
        self.tried.append(plan)
        if len(self.tried) <= self.refusals:
            raise errors.OutOfResources(300_000, 200_000, "shared memory")
        return self.launch(plan, *arguments)


def test_a_plan_that_does_not_fit_gives_way_to_a_smaller_one(monkeypatch):
    """Plans are tried from the best on, and the choice is kept: for what decides on a kernel, and for nothing else."""
    arguments, kv_end = inputs(1, 1, 2, 1, 3, 16, 16, 9)
    expected = oracle(*arguments, kv_end, scaling=0.2)
    small = SmallGPU(refusals=2)
    monkeypatch.setattr(decode_triton_mlra, "_launch", small)
    monkeypatch.setattr(decode_triton_mlra, "_fitting_plans", {})
    for _ in range(2):
        assert ratio(run(arguments, kv_end, "triton", scaling=0.2), expected) < FP32_RATIO
    best, second, third, again = small.tried
    assert again == third and best != second != third
    paged = [x[0] if i > 1 else x for i, x in enumerate(arguments)]
    table = torch.zeros(1, 1, dtype=torch.int32)
    for options in ({"key_mask": torch.ones(1, 9, dtype=torch.bool)}, {"block_table": table, "page_size": 9}):
        run(paged if "page_size" in options else arguments, kv_end, "triton", scaling=0.2, **options)
        assert small.tried[-1] == best, "another kernel, which may fit"


def test_where_no_plan_fits_the_automatic_choice_is_torch_and_says_so_once(monkeypatch, caplog):
    arguments, kv_end = inputs(1, 1, 2, 1, 3, 16, 16, 9)
    small = SmallGPU(refusals=10**9)
    monkeypatch.setattr(decode_triton_mlra, "_launch", small)
    monkeypatch.setattr(decode_triton_mlra, "_fitting_plans", {})
    monkeypatch.setattr(decode_mlra, "_said", set())
    moved = [x.to(DEVICE) for x in (*arguments, kv_end)]
    tries = []
    for _ in range(2):
        before = dict(decode_calls)
        result = torch.ops.mlra.latent_attention_auto(*moved, None, None, None, 0, 0.2)
        assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO
        assert decode_calls["torch"] == before.get("torch", 0) + 1
        assert decode_calls["triton"] == before.get("triton", 0)
        tries.append(len(small.tried))
    assert tries[0] == tries[1] > 2, "each plan is tried once"
    assert [record.message.count("'triton' cannot run because out of resource") for record in caplog.records] == [1]
    with pytest.raises(errors.OutOfResources, match="shared memory"):
        run(arguments, kv_end, "triton", scaling=0.2)

    def broken(*arguments):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(decode_triton_mlra, "_fitting_plans", {})
    monkeypatch.setattr(decode_triton_mlra, "_launch", broken)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ops.mlra.latent_attention_auto(*moved, None, None, None, 0, 0.2)
