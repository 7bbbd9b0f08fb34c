"""Ranks that are processes of their own exchange through memory they share, on the CPU: interpreted kernels that wait.

A file stands for the GPUs' memory; all else, from the agreement of the ranks to the fused step, is what GPUs run.
"""

import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from torch import distributed

from modeling_mlra import peer_memory_mlra, step_mlra, step_split_mlra
from modeling_mlra.peer_memory_mlra import shared_exchange
from modeling_mlra.step_exchange_mlra import Exchange, inbox_shape
from modeling_mlra.step_split_mlra import Split, split_of
from modeling_mlra.tensor_parallel_mlra import tensor_parallel_mesh
from tests.decode_inputs import DEVICE
from tests.fused_checks import decode_two_tokens
from tests.models import rms_ratio, tiny_config, tiny_model
from tests.parallel_worlds import PATIENCE, SPLITTABLE, join_world, load, wait
from tests.tolerances import FUSED_FLOAT32_RATIO

pytest.importorskip("triton")
pytestmark = pytest.mark.distributed
if DEVICE != "cpu":
    pytest.skip("interpreted; tests/test_gpu_exchange.py has the ranks of several GPUs", allow_module_level=True)

SIZES = (2, 4)
BATCHES = (2, 3)  # tokens one by one, and their products taken together
EXCHANGES, WIDTH = 12, 300
MACHINE = SimpleNamespace(early=False)
# of each number of ranks: what is split, and the sequences, whose tokens go one by one or together
FUSED = {
    2: [(Split(), 2), (Split(), 3), (Split(query=True), 3), (Split(out=True), 2)],
    4: [(Split(query=True, out=True), 2)],
}
REFUSALS = ("told", "nodes", "access", "allocation", "device")


def shared_files(out: Path):
    """In place of `allocate`: an inbox of each rank is a file that all have mapped, named by its size."""

    def allocate(group, numbers: int, device: torch.device) -> Exchange:
        ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
        shape = inbox_shape(numbers, ranks)
        count = torch.Size(shape).numel()
        files = [str(out / f"inbox{numbers}_{r}") for r in range(ranks)]
        inboxes = [torch.from_file(file, shared=True, size=count, dtype=torch.int64).view(shape) for file in files]
        limit = 20_000  # polls
        return Exchange(rank, inboxes, torch.zeros(ranks, dtype=torch.int32), limit)

    return allocate


def exchange_often(rank: int, size: int) -> bool:
    """Whether ranks that take their time now and then all get all sums."""
    exchange = shared_exchange(distributed.group.WORLD, WIDTH, torch.device("cpu", rank))
    own, right = random.Random(rank), True
    for turn in range(EXCHANGES):
        time.sleep(own.choice((0, 0, 0.05)))
        parts = torch.arange(size * WIDTH, dtype=torch.float32).view(size, WIDTH) * (turn + 1)
        out = torch.empty(WIDTH)
        exchange.sum(parts[rank], out, MACHINE)
        right &= torch.equal(out, parts.sum(0))
    return right and exchange.missing() == []


def refuse(why: str, rank: int, monkeypatch) -> bool:
    """Whether no rank exchanges where one of them, the last, is in the way."""
    last = rank == distributed.get_world_size() - 1
    device = torch.device("cpu", rank)
    with monkeypatch.context() as patch:
        if last and why == "told":
            patch.setenv("MLRA_EXCHANGE", "nccl")
        elif last and why == "nodes":
            patch.setattr(peer_memory_mlra, "node_number", lambda: 7)
        elif last and why == "access":
            patch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: False)
        elif last and why == "allocation":

            def fail(*_):
                raise RuntimeError("CUDA driver error: out of memory")

            patch.setattr(peer_memory_mlra, "allocate", fail)
        elif why == "device":
            device = torch.device("cpu")
        return shared_exchange(distributed.group.WORLD, WIDTH, device) is None


def fused_logits(rank: int, size: int, folder: Path, monkeypatch) -> dict:
    """Two fused steps whose sums are exchanges: RMS ratio of logits to one process's, and the number of exchanges."""
    model = load(folder, size)
    device, calls = torch.device("cpu", rank), []
    exchange = shared_exchange(tensor_parallel_mesh(model).get_group(), 32 * model.config.hidden_size, device)
    monkeypatch.setattr(step_mlra, "exchange_of", lambda mesh, numbers, device: exchange)
    for replaced in ("sum_output", "gather_output"):
        monkeypatch.setattr(step_mlra, replaced, None)

    def count(name: str, real) -> None:
        def counted(parts, out, machine):
            calls.append(name)
            assert parts.dtype == torch.float32 and exchange.holds(parts)
            real(parts, out, machine)

        monkeypatch.setattr(exchange, name, counted)

    count("sum", exchange.sum)
    count("join", exchange.join)

    seen = {}
    for split, batch in FUSED[size]:
        monkeypatch.setattr(step_split_mlra, "SPLITS", {size: split})
        calls.clear()
        logits = decode_two_tokens(model, fused=True, batch=batch)["logits"]
        ratio = rms_ratio(torch.load(folder / f"{batch}.pt"), logits)
        seen[f"{split} {batch}"] = {"ratio": ratio, "summed": calls.count("sum"), "joined": calls.count("join")}
    return seen


def meet(rank: int, size: int, folder: Path, out: Path) -> None:
    join_world(rank, size, out)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("MLRA_EXCHANGE", raising=False)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
        monkeypatch.setattr(peer_memory_mlra, "allocate", shared_files(out))
        seen = {
            "sums": exchange_often(rank, size),
            "refused": [why for why in REFUSALS if size > 2 or refuse(why, rank, monkeypatch)],
            "fused": fused_logits(rank, size, folder, monkeypatch),
        }
    (out / f"{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """What every rank of each world has seen."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("mlra_4", **SPLITTABLE)
    model.save_pretrained(folder)
    for batch in BATCHES:
        torch.save(decode_two_tokens(model, fused=False, batch=batch)["logits"], folder / f"{batch}.pt")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    seen = {}
    for size in SIZES:
        out = tmp_path_factory.mktemp(f"world{size}")
        world = torch.multiprocessing.start_processes(
            meet, (size, folder, out), nprocs=size, join=False, start_method="forkserver"
        )
        wait(world, PATIENCE)
        seen[size] = [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]
    return seen


@pytest.mark.parametrize("size", SIZES)
def test_processes_that_wait_for_each_other_get_all_sums(met, size):
    assert all(rank["sums"] for rank in met[size])


def test_one_rank_keeps_all_from_peer_memory(met):
    assert all(rank["refused"] == list(REFUSALS) for rank in met[2])


@pytest.mark.parametrize(("size", "split", "batch"), [(size, *case) for size in SIZES for case in FUSED[size]])
def test_the_fused_step_through_exchanges(met, size, split, batch):
    """All maps as their weights lie, and with queries and outputs of which each rank multiplies a part of the rows."""
    for rank in met[size]:
        fused = rank["fused"][f"{split} {batch}"]
        assert fused["ratio"] < FUSED_FLOAT32_RATIO
        # two steps: the embedding, two attentions (of a split `out` the heads) and two MLPs are summed; the vocabulary
        # and what is split of two attentions are joined
        assert (fused["summed"], fused["joined"]) == (2 * 5, 2 * (1 + 2 * sum(split)))


def test_maps_are_split_where_all_ranks_keep_branches_of_all_heads(monkeypatch):
    whole, both = Split(), Split(True, True)
    monkeypatch.setattr(step_split_mlra, "SPLITS", {2: both, 4: both, 8: both})
    config = tiny_config("mlra_4", **SPLITTABLE)  # four branches of one group
    assert [split_of(config, ranks) for ranks in (1, 2, 4, 8)] == [whole, both, both, whole]
    assert split_of(tiny_config("mlra_2", **SPLITTABLE), 4) == whole
    assert split_of(tiny_config("mla", **SPLITTABLE), 4) == whole
    config.hidden_size += 2  # rows of `out` that four ranks do not divide
    assert split_of(config, 4) == Split(query=True)
