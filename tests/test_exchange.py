"""The sum of vectors over ranks through each other's memory: its protocol, its kernel, and who decides on it.

The ranks of the kernel's tests are inboxes of one process, and interpreted: a rank sends before any of them gathers.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from modeling_mlra import peer_memory_mlra, step_exchange_mlra
from modeling_mlra.capture_mlra import fingerprint
from modeling_mlra.device_mlra import DeviceFacts, constants, known_devices
from modeling_mlra.generation_mlra import captured_decode
from modeling_mlra.peer_memory_mlra import asked_exchange, naming_lost_ranks, trouble_here
from modeling_mlra.step_exchange_mlra import BLOCK, Exchange, inbox_shape
from scripts import bench_tp
from tests.decode_inputs import DEVICE
from tests.models import random_ids, tiny_model

triton = pytest.importorskip("triton")
tl = triton.language
if DEVICE != "cpu":
    pytest.skip("interpreted; tests/test_gpu_exchange.py has the ranks of several GPUs", allow_module_level=True)

LIMIT = 5  # polls of an interpreted kernel


# ---- the protocol, in plain Python ---------------------------------------------------------------------------------


def outcomes(exchanges: int, slots: int, waits_for_all: bool = True, counts: bool = True) -> set[str]:
    """How two ranks that exchange two words each, so many times, can end, over all interleavings.

    Without `waits_for_all` a rank takes the second word as soon as the first is there; without `counts` it takes any
    word that was ever sent to this slot.
    """

    def moves(state):
        done, sent, got, inboxes = state  # of each rank: exchanges ended, words sent, word read; its inbox
        for rank in (0, 1):
            exchange, other = done[rank], 1 - rank
            if exchange == exchanges:
                continue
            slot = exchange % slots
            if sent[rank] < 2:
                box = list(inboxes[other])
                box[2 * slot + sent[rank]] = exchange + 1
                yield done, put(sent, rank, sent[rank] + 1), got, put(inboxes, other, tuple(box)), None
                continue
            word = inboxes[rank][2 * slot + got[rank]]
            unchecked = got[rank] == 1 and not waits_for_all
            if word == exchange + 1 or unchecked or (not counts and word):
                fault = None if word == exchange + 1 else "wrong words"
                if got[rank] == 0:
                    yield done, sent, put(got, rank, 1), inboxes, fault
                else:
                    yield put(done, rank, exchange + 1), put(sent, rank, 0), put(got, rank, 0), inboxes, fault

    def put(values, at, value):
        return (*values[:at], value, *values[at + 1 :])

    start = (0, 0), (0, 0), (0, 0), ((0,) * 2 * slots,) * 2
    waiting, known, ends = [start], {start}, set()
    while waiting:
        state = waiting.pop()
        followers = list(moves(state))
        if not followers:
            ends.add("all sums" if state[0] == (exchanges, exchanges) else "waits for ever")
        for *follower, fault in followers:
            if fault:
                ends.add(fault)
            elif (follower := tuple(follower)) not in known:
                known.add(follower)
                waiting.append(follower)
    return ends


def test_two_slots_are_enough_and_needed():
    assert outcomes(6, slots=2) == {"all sums"}
    assert "waits for ever" in outcomes(6, slots=1)


def test_every_word_has_to_bear_its_exchange():
    assert "wrong words" in outcomes(6, slots=2, waits_for_all=False)
    assert "wrong words" in outcomes(6, slots=2, counts=False)


# ---- the kernel ----------------------------------------------------------------------------------------------------


@triton.jit
def publish_kernel(parts, number, inboxes, channels, SHAPE):
    """The first half of the exchange."""
    block = tl.program_id(0)
    index = block * SHAPE.BLOCK + tl.arange(0, SHAPE.BLOCK)
    part = tl.load(parts + index, mask=index < number, other=0.0)
    step_exchange_mlra.publish(part, block, tl.load(channels.counts + block) + 1, inboxes, SHAPE)


def ranks_of_one_process(ranks: int, numbers: int) -> list[Exchange]:
    inboxes = [torch.zeros(inbox_shape(numbers, ranks), dtype=torch.int64) for _ in range(ranks)]
    return [Exchange(rank, inboxes, torch.zeros(ranks, dtype=torch.int32), LIMIT) for rank in range(ranks)]


def send(exchange: Exchange, parts: torch.Tensor) -> None:
    grid = (triton.cdiv(parts.numel(), BLOCK),)
    publish_kernel[grid](
        parts, parts.numel(), exchange.inboxes, exchange.channels, SHAPE=constants(exchange.shape)
    )  # fmt: skip


MACHINE = SimpleNamespace(early=False)


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """Ranks 0, 1, ... one after the other in float32."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "rows"), [(2, 1), (3, 2), (4, 1), (4, 7), (8, 3)])
def test_all_ranks_get_the_sum_in_the_order_of_ranks(ranks, rows, dtype):
    """Three exchanges, of more and of fewer rows, as steps of other sizes share the memory."""
    width = 150
    exchanges = ranks_of_one_process(ranks, (rows + 2) * width)
    generator = torch.Generator().manual_seed(ranks)
    for now in (rows, rows + 2, rows):
        parts = [torch.randn(now, width, generator=generator) * 10.0 ** (rank % 3) for rank in range(ranks)]
        if dtype != torch.float32:  # interpreted conversions round towards zero: numbers that need none
            parts = [part.round().clamp(-20, 20) for part in parts]
        parts[-1][0, :3] = torch.tensor([float("inf"), float("nan"), 1e-42 if dtype == torch.float32 else 0.0])
        for exchange, part in zip(exchanges, parts, strict=True):
            send(exchange, part)
        expected = in_order(parts).to(dtype)
        for exchange, part in zip(exchanges, parts, strict=True):
            out = torch.full((now, width), 7.0, dtype=dtype)
            exchange.sum(part, out, MACHINE)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            assert exchange.missing() == []
    if ranks == 4 and dtype == torch.float32:
        assert not torch.equal(in_order(parts), in_order(parts[::-1])), "these sums do not depend on the order"


@pytest.mark.parametrize(("ranks", "rows"), [(2, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_all_ranks_lie_side_by_side(ranks, rows, dtype):
    """Behind a sum, and in front of one, as in the step."""
    width = 150
    exchanges = ranks_of_one_process(ranks, rows * width)
    parts = [torch.randn(rows, width).to(dtype) for _ in range(ranks)]
    for call in ("sum", "join", "sum"):
        for exchange, part in zip(exchanges, parts, strict=True):
            send(exchange, part.float())
        for exchange, part in zip(exchanges, parts, strict=True):
            assert exchange.holds(part) and not exchange.holds(torch.empty(rows + 2, width))
            out = torch.full((rows, width * (ranks if call == "join" else 1)), 7.0, dtype=dtype)
            getattr(exchange, call)(part, out, MACHINE)
            if call == "join":
                assert torch.equal(out, torch.cat(parts, dim=1))


def test_a_rank_may_be_one_exchange_ahead():
    """It sends the next part while the others have yet to read this one; what it sends after that has to wait."""
    parts = torch.arange(5 * 2 * 200.0).view(5, 2, 200)
    first, second = ranks_of_one_process(2, 200)
    out = torch.empty(200)
    send(second, parts[0, 1])
    for turn in range(4):
        first.sum(parts[turn, 0], out, MACHINE)  # has all it needs, and ends
        assert torch.equal(out, parts[turn].sum(0))
        send(first, parts[turn + 1, 0])  # of the next one
        second.sum(parts[turn, 1], out, MACHINE)
        assert torch.equal(out, parts[turn].sum(0))
        send(second, parts[turn + 1, 1])


def test_a_rank_that_sends_nothing_is_named(monkeypatch):
    exchanges = ranks_of_one_process(4, 200)
    parts = torch.ones(4, 200)
    for rank in (0, 1, 3):
        send(exchanges[rank], parts[rank])
    exchanges[1].sum(parts[1], torch.empty(200), MACHINE)
    assert exchanges[1].missing() == [2]
    with pytest.raises(RuntimeError, match=r"^unspecified launch failure$"), naming_lost_ranks():
        raise RuntimeError("unspecified launch failure")  # of another reason
    monkeypatch.setattr(peer_memory_mlra, "_exchanges", {exchanges[1]})
    model = tiny_model()

    def fail(*_):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(model, "_prefill", fail)
    options = {"custom_generate": captured_decode, "cache_implementation": "static", "max_new_tokens": 3}
    with pytest.raises(RuntimeError) as error:
        model.generate(random_ids(1, 5), **options)
    assert str(error.value) == (
        "rank 2 of 4 sent no part of a sum within 5e-09 s: dead, or far behind rank 1; start the job again"
    )


def test_half_of_the_words_are_not_enough():
    """Each word counts: of a block that has arrived in part nothing is taken."""
    first, second = ranks_of_one_process(2, BLOCK)
    send(second, torch.ones(BLOCK))
    first.channels.inbox[1, 0, 1, BLOCK - 1] = 0
    first.sum(torch.ones(BLOCK), torch.empty(BLOCK), MACHINE)
    assert first.missing() == [1]


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_the_variable(monkeypatch):
    monkeypatch.delenv("MLRA_EXCHANGE", raising=False)
    assert asked_exchange() == "auto"
    assert bench_tp.WAYS == peer_memory_mlra.WAYS
    monkeypatch.setenv("MLRA_EXCHANGE", "nccl")
    assert asked_exchange() == "nccl"
    assert trouble_here(None, torch.device("cpu")) == "MLRA_EXCHANGE=nccl asks for it"
    monkeypatch.setenv("MLRA_EXCHANGE", "ring")
    with pytest.raises(ValueError, match=r"^MLRA_EXCHANGE=ring is unknown; use one of auto, nccl$"):
        asked_exchange()


def test_graphs_depend_on_the_variable(monkeypatch):
    model = tiny_model()
    before = fingerprint(model)
    monkeypatch.setenv("MLRA_EXCHANGE", "nccl")
    assert fingerprint(model) != before


def test_what_of_a_rank_is_in_the_way(monkeypatch):
    monkeypatch.delenv("MLRA_EXCHANGE", raising=False)
    cpu, world = torch.device("cpu"), peer_memory_mlra.distributed
    monkeypatch.setattr(world, "get_world_size", lambda group: 8)
    assert trouble_here(None, cpu) is None  # interpreted, as if on a GPU
    monkeypatch.setattr(world, "get_world_size", lambda group: 9)
    assert trouble_here(None, cpu) == "it is for up to 8 ranks, not 9"
    monkeypatch.setitem(known_devices, cpu, DeviceFacts(nvidia=False))
    assert trouble_here(None, cpu) == "its kernel is for NVIDIA's GPUs"
    monkeypatch.setattr(peer_memory_mlra, "symmetric_memory", None)
    assert trouble_here(None, cpu) == "this torch has no symmetric memory"


def test_no_access_from_gpu_to_gpu(monkeypatch):
    near = {(0, 1), (1, 0)}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) in near)
    assert peer_memory_mlra.unreachable(torch.device("cuda", 1), [0, 1]) is None
    assert peer_memory_mlra.unreachable(torch.device("cuda", 1), [0, 1, 3]) == (
        "GPU 1 has no access to the memory of GPU 3"
    )


def test_multicast_is_off_while_memory_is_allocated(monkeypatch):
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv(peer_memory_mlra.NO_MULTICAST, raising=False)
        else:
            monkeypatch.setenv(peer_memory_mlra.NO_MULTICAST, before)
        with peer_memory_mlra._no_multicast():
            assert os.environ[peer_memory_mlra.NO_MULTICAST] == "1"
        assert os.environ.get(peer_memory_mlra.NO_MULTICAST) == before
