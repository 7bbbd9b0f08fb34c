"""Sums through peer memory on two GPUs or more: against NCCL's over many replays, in the model, and with a rank lost.

python -m pytest tests/test_gpu_exchange.py
"""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from modeling_mlra import MLRACache, peer_memory_mlra
from modeling_mlra.capture_mlra import Replay
from modeling_mlra.generation_mlra import captured_decodes
from modeling_mlra.peer_memory_mlra import exchange_of
from modeling_mlra.step_device_mlra import machine_of
from modeling_mlra.step_mlra import FusedStep
from tests.models import random_ids, tiny_model
from tests.parallel_worlds import SPLITTABLE, load, wait
from tests.paths import REPOSITORY

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus, pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs")]
SIZES = [size for size in (2, 4, 8) if size <= max(GPUS, 2)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS, WIDTH, REPLAYS = (1, 7, 32), 3072, 1000
PROMPT, NEW_TOKENS, RUNS = 9, 24, 20
PATIENCE = 15  # seconds that a kernel waits for a lost rank, or for one that compiles its own


def join(rank: int, size: int, out: Path) -> torch.device:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = distributed.FileStore(str(out / "store"), size)
    distributed.init_process_group(
        "nccl", store=store, rank=rank, world_size=size, device_id=device, timeout=timedelta(seconds=60)
    )
    return device


# ---- what a rank does ----------------------------------------------------------------------------------------------


def replay_often(exchange, rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Numbers, of all replays of one graph, that differ from NCCL's sum. They are integers: any order is exact."""
    rank, machine = distributed.get_rank(), machine_of(device)
    index = torch.arange(rows * WIDTH, device=device, dtype=torch.float32).view(rows, WIDTH)
    turn, wrong = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    part, out = torch.empty_like(index), torch.empty_like(index, dtype=dtype)

    def work():
        turn.add_(1)
        part.copy_((index * (rank + 2) + turn * 3) % 15 - 7)
        expected = part.clone()
        distributed.all_reduce(expected)
        exchange.sum(part, out, machine)
        wrong.add_((out != expected.to(dtype)).sum())

    replay = Replay(work, device)
    for _ in range(REPLAYS + 1):
        replay()
    assert replay.graph is not None
    return int(wrong)


def sum_in_order(exchange, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a sum has the bits of float32 additions in the order of ranks, which is the same on each."""
    torch.manual_seed(distributed.get_rank())
    part, out = torch.randn(5, WIDTH, device=device), torch.empty(5, WIDTH, dtype=dtype, device=device)
    exchange.sum(part, out, machine_of(device))
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part)
    total = torch.zeros_like(part)
    for one in parts:
        total = total + one
    return torch.equal(out, total.to(dtype))


def joined(exchange, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether parts of all ranks lie side by side."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    whole = torch.randn(rows, size * 1000, generator=torch.Generator().manual_seed(rows)).to(device, dtype)
    out = torch.empty_like(whole)
    exchange.join(whole[:, rank * 1000 : rank * 1000 + 1000].contiguous(), out, machine_of(device))
    return torch.equal(out, whole)


@torch.no_grad()
def greedy(model, device: torch.device) -> list[list[int]]:
    """Greedy tokens of two sequences by the fused step, captured, whatever the dtype."""
    ids = random_ids(2, PROMPT).to(device)
    cache = MLRACache(model.config, max_cache_len=PROMPT + NEW_TOKENS)
    token = model(ids, cache=cache).logits[:, -1].argmax(-1)
    counters = torch.tensor([PROMPT] * 3 + [PROMPT + 1] * 2, dtype=torch.int32, device=device)
    step, tokens = FusedStep(model, cache, counters), [token.clone()]
    replay = Replay(lambda: token.copy_(step(token).argmax(-1)), device)
    for _ in range(NEW_TOKENS - 1):
        replay()
        tokens.append(token.clone())
    return torch.stack(tokens, 1).tolist()


def decode_all_ways(folder: Path, size: int, device: torch.device) -> dict:
    """Tokens of the model in parts: in float32 by either exchange, in bfloat16 by `generate()`."""
    model = load(folder, size)
    seen: dict = {"float32": []}
    for way in ("auto", "nccl") * (RUNS // 2):
        os.environ["MLRA_EXCHANGE"] = way
        seen["float32"].append(greedy(model, device))
    del os.environ["MLRA_EXCHANGE"]
    model, before = load(folder, size, torch.bfloat16), captured_decodes["fused"]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": "static"}
    seen["bfloat16"] = [model.generate(random_ids(2, PROMPT).to(device), **options).tolist() for _ in range(3)]
    seen["fused"] = captured_decodes["fused"] - before
    return seen


def visit(rank: int, size: int, folder: Path, out: Path) -> None:
    device = join(rank, size, out)
    mesh = init_device_mesh("cuda", (size,), mesh_dim_names=("tp",))
    exchange = exchange_of(mesh, 32 * WIDTH, device)
    seen: dict = {"exchanges": exchange is not None, "wrong": {}, "in_order": {}, "joined": True}
    if exchange is not None:
        for name, dtype in DTYPES.items():
            seen["in_order"][name] = sum_in_order(exchange, dtype, device)
            for rows in ROWS:
                seen["wrong"][f"{name}, {rows}"] = replay_often(exchange, rows, dtype, device)
                seen["joined"] &= joined(exchange, rows, dtype, device)
        seen["same"] = exchange_of(mesh, 32 * WIDTH, device) is exchange
    if rank == size - 1:
        os.environ["MLRA_EXCHANGE"] = "nccl"
    seen["one_refuses"] = peer_memory_mlra.shared_exchange(mesh.get_group(), WIDTH, device) is None
    os.environ.pop("MLRA_EXCHANGE", None)
    seen["decoded"] = decode_all_ways(folder, size, device)
    (out / f"{rank}.json").write_text(json.dumps(seen))
    distributed.barrier()
    distributed.destroy_process_group()


def lose_a_rank(rank: int, size: int, folder: Path, out: Path) -> None:
    """The last rank stops between two tokens, its GPU with it; the others write what they met and when."""
    peer_memory_mlra.PATIENCE = PATIENCE
    device = join(rank, size, out)
    model = load(folder, size, torch.bfloat16)

    class Stops:
        tokens = 0

        def put(self, _):
            self.tokens += 1
            if rank == size - 1 and self.tokens == 8:
                time.sleep(120)

        def end(self):
            pass

    options = {"max_new_tokens": 100, "do_sample": False, "cache_implementation": "static", "streamer": Stops()}
    started = time.monotonic()
    try:
        model.generate(random_ids(1, PROMPT).to(device), **options)
    except RuntimeError as error:
        (out / f"{rank}.txt").write_text(f"{time.monotonic() - started:.1f} {error}")
        os._exit(3)


# ---- the tests -----------------------------------------------------------------------------------------------------


def start(function, size: int, *arguments):
    return torch.multiprocessing.start_processes(
        function, (size, *arguments), nprocs=size, join=False, start_method="spawn"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("mlra_4", **SPLITTABLE).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=SIZES)
def visited(request, folder, tmp_path_factory) -> list[dict]:
    """What every rank of a world has seen."""
    size, out = request.param, tmp_path_factory.mktemp(f"world{request.param}")
    wait(start(visit, size, folder, out), 200)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


def test_all_replays_give_the_sum_of_nccl(visited):
    for rank in visited:
        assert rank["exchanges"], "peer memory cannot be had on this machine"
        assert rank["joined"]
        assert rank["wrong"] == {f"{name}, {rows}": 0 for name in DTYPES for rows in ROWS}


def test_sums_are_taken_in_the_order_of_ranks(visited):
    assert all(rank["in_order"] == dict.fromkeys(DTYPES, True) for rank in visited)


def test_the_ranks_decide_together_and_once(visited):
    assert all(rank["one_refuses"] and rank["same"] for rank in visited)


def test_greedy_tokens_are_those_of_one_gpu(visited, folder):
    """In float32 by either exchange, every time; in bfloat16 all ranks have the same."""
    model = tiny_model("mlra_4", **SPLITTABLE).to("cuda")
    expected = greedy(model, torch.device("cuda", 0))
    for rank in visited:
        decoded = rank["decoded"]
        assert decoded["float32"] == [expected] * RUNS
        assert decoded["bfloat16"] == [visited[0]["decoded"]["bfloat16"][0]] * 3
        assert decoded["fused"] == 3


def test_a_rank_that_stops_is_named_and_ends_the_others(folder, tmp_path):
    size = SIZES[-1]
    world = start(lose_a_rank, size, folder, tmp_path)
    try:
        for process in world.processes[:-1]:
            process.join(90)
            assert process.exitcode not in (None, 0), "a rank goes on waiting"
    finally:
        for process in world.processes:
            process.kill()
    for rank in range(size - 1):
        seconds, _, message = (tmp_path / f"{rank}.txt").read_text().partition(" ")
        assert float(seconds) < 60
        assert message == (
            f"rank {size - 1} of {size} sent no part of a sum within {PATIENCE} s: dead, or far behind rank {rank}; "
            "start the job again"
        )


DIES = """
import os, sys, torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

rank = int(os.environ["RANK"])
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.bfloat16
)


class Dies:
    tokens = 0

    def put(self, _):
        self.tokens += 1
        if rank == 1 and self.tokens == 8:
            os._exit(7)

    def end(self):
        pass


ids = torch.arange(1, 10, device=model.device)[None]
model.generate(ids, max_new_tokens=5000, do_sample=False, streamer=Dies())
print("rank", rank, "decoded all of it")
"""


def test_torchrun_ends_when_a_rank_dies_inside_of_decoding(folder, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*command, str(tmp_path / "dies.py"), str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode != 0
    assert "exitcode  : 7" in result.stderr
    assert "decoded all of it" not in result.stdout
