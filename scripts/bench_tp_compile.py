"""Compiles, ahead and side by side, the kernels of the steps that `scripts.bench_tp` times.

In turn they would take minutes: every system and number of sequences has kernels of its own. Each of these processes
makes one layer of rank 0 of one system, in a group of ranks that is not there, and runs its steps once without
exchange, so that the kernels lie in triton's cache. Kernels of the exchange itself are compiled where they are used.
"""

import argparse
import math
import os
import subprocess
import sys

from scripts import cli
from scripts.cli import positive_int


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_tp_compile", __doc__)
    parser.add_argument("--model", required=True, help="a system, as in scripts.bench_tp")
    parser.add_argument("--size", type=positive_int, required=True, help="ranks")
    parser.add_argument("--sequences", type=positive_int, required=True)
    parser.add_argument("--contexts", nargs="+", type=positive_int, required=True, help="cached tokens")
    parser.add_argument("--spare", type=positive_int, required=True, help="rows to allocate beyond them")
    args = parser.parse_args(argv)
    return cli.run("scripts.bench_tp_compile:compile_steps", args)


if __name__ == "__main__":
    sys.exit(main())

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from modeling_mlra import step_mlra
from modeling_mlra.step_exchange_mlra import Exchange, inbox_shape
from modeling_mlra.step_mlra import FusedStep
from modeling_mlra.step_split_mlra import Split
from scripts import bench_tp_dcp, bench_tp_gqa
from scripts.bench_tp_peers import IN_TURN
from scripts.bench_tp_systems import OURS, System, base_of, build_model, config_of
from scripts.bench_tp_times import no_exchange, splitting


def start(jobs: list[tuple[str, int, int]], contexts: list[int], spare: int, local_rank: int) -> list:
    """A process for each system, number of ranks and number of sequences, on this rank's GPU; they go on meanwhile."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = visible.split(",")[local_rank] if visible else str(local_rank)
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment |= {"CUDA_VISIBLE_DEVICES": own, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "scripts.bench_tp_compile",
        "--contexts",
        *map(str, contexts),
        "--spare",
        str(spare),
    ]
    return [
        subprocess.Popen(
            [*command, "--model", name, "--size", str(size), "--sequences", str(batch)],
            env=environment, stdout=subprocess.DEVNULL,
        )
        for name, size, batch in jobs
    ]  # fmt: skip


def compile_steps(args: argparse.Namespace) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if args.size > 1:
        distributed.init_process_group("fake", rank=0, world_size=args.size, store=FakeStore())
    for module in (step_mlra, bench_tp_dcp, bench_tp_gqa):
        module.exchange_of = lone_exchange
    bench_tp_gqa.attend_3 = lambda query, *_: (torch.empty_like(query), None)  # nothing to compile
    mesh = sharing = None
    if args.size > 1:
        sharers = base_of(args.model)[1]
        whole = init_device_mesh(device.type, (args.size,), mesh_dim_names=("tp",))
        split = init_device_mesh(device.type, (args.size // sharers, sharers), mesh_dim_names=("groups", "sharers"))
        mesh, sharing = whole, split["sharers"] if sharers > 1 else None
    model = build_model(args.model, 1, mesh, torch.bfloat16 if cuda else torch.float32, device)
    system, config = System(args.model, model, mesh, sharing, device), config_of(args.model, None)
    layers = bench_tp_gqa.LAYERS if config is None else config.num_hidden_layers
    room = torch.cuda.mem_get_info()[1] if cuda else math.inf
    with torch.no_grad(), no_exchange():
        for context in args.contexts:
            if layers * system.cache_bytes(args.sequences, context, args.spare) <= room:  # else it is not timed
                run_once(system, args.sequences, context, args.spare)


def run_once(system: System, sequences: int, context: int, spare: int) -> None:
    """A step, with maps split and whole, and the attention alone."""
    cache, _ = system.cache(sequences, context, spare)
    tokens = torch.zeros(sequences, dtype=torch.long, device=system.device)
    step = system.step(cache, sequences, context, IN_TURN if system.base == "gqa" else OURS)
    step(tokens)
    if type(step) is FusedStep:
        system.attends(step)(system.layer, cache.layers[0].rows)
        with splitting(system.size, Split(query=True, out=True)):
            system.step(cache, sequences, context, OURS)(tokens)


def lone_exchange(mesh, numbers: int, device: torch.device) -> Exchange:
    """One that has the shapes of all ranks' and reaches none of them."""
    ranks = mesh.size()
    inbox = torch.zeros(inbox_shape(numbers, ranks), dtype=torch.int64, device=device)
    exchange = Exchange(0, [inbox] * ranks, torch.zeros(ranks, dtype=torch.int32, device=device), 10**9)
    exchange.join = lambda *args: None  # type: ignore[method-assign]
    return exchange
