"""Tensor-parallel decoding measured on the GPUs of one machine: this package's step beside what MLA is served with.

    torchrun --nproc-per-node 4 -m scripts.bench_tp --models mlra_4 mlra_4_dcp2 mlra_4_dcp4 mlra_2 mla mla_dcp4 gqa \\
        --sizes 4 --sequences 1 8 32 --contexts 2048 131072 524288 1048576 --parts decode projections \\
        --output evals/results/tp_h200_x4.json
    python -m scripts.bench_tp_plot evals/results/tp_h200_x4.json

A system is a released architecture, the same with decode context parallelism over N ranks (NAME_dcpN), or gqa
(`bench_tp_systems`). All are the same captured step, with other attention: of MLA every kernel at hand is timed, also
FlashAttention-3 and FlashMLA where `bench_decode` finds them (variable MLRA_BENCH_LIBRARIES), and the fastest counts.
Kernels are compared with a float32 reference first, at the shorter contexts.

Weights are random and the same for every size; each rank creates its own share, no checkpoint is read. With T ranks of
N the model runs N / T times side by side (data parallelism), so that no GPU idles. A decode step is the one that
`generate()` takes for a static cache, greedy choice included, as one CUDA graph; times are medians over replays, of
the slowest rank. The share of exchange is what the step gains when nothing but the vocabulary is exchanged. A cache
that a GPU has no room for is skipped, and the file says so. An existing file is added to: what is measured again
replaces what it holds.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, positive_int, read_json

WAYS = ("auto", "nccl")
PARTS = ("tokens", "projections", "decode", "compiled")


def check(args: argparse.Namespace) -> None:
    if "WORLD_SIZE" not in os.environ:
        raise UserError("start this with torchrun --nproc-per-node N -m scripts.bench_tp …")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_tp", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument(
        "--models", nargs="+", default=["mlra_4", "mla"], help="names in configuration/, wide_NAME, NAME_dcpN, gqa"
    )
    parser.add_argument("--contexts", nargs="+", type=positive_int, default=[131072, 524288], help="cached tokens")
    parser.add_argument("--sizes", nargs="+", type=positive_int, help="ranks per model (default: 1, 2, 4, 8 as fit)")
    parser.add_argument("--sequences", nargs="+", type=positive_int, default=[1], help="of each model (default: 1)")
    parser.add_argument("--layers", type=positive_int, help="decoder layers to time (default: the architecture's)")
    parser.add_argument("--replays", type=positive_int, default=20, help="timed decode steps")
    parser.add_argument("--token-models", nargs="+", help="models whose tokens to compare (default: --models)")
    parser.add_argument("--token-layers", type=positive_int, help="decoder layers of those (default: all)")
    parser.add_argument("--new-tokens", type=positive_int, default=32, help="tokens to compare")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3], help="default: all but compiled")
    parser.add_argument("--exchange", choices=WAYS, help="of sums over ranks (default: as MLRA_EXCHANGE says)")
    parser.add_argument("--commit", help="what to call the commit where there is no repository")
    args = parser.parse_args(argv)
    return cli.run("scripts.bench_tp:measure", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from evals.common import commit
from modeling_mlra.peer_memory_mlra import ENVIRONMENT_VARIABLE
from modeling_mlra.tensor_parallel_mlra import check_tensor_parallel_size, tensor_parallel_layout
from scripts import bench_tp_compile
from scripts.bench_decode import load_libraries, read_ceiling
from scripts.bench_tp_models import allocated, read_config
from scripts.bench_tp_systems import System, base_of, build_model, config_of
from scripts.bench_tp_times import measure_decode, measure_splits, spare_rows
from scripts.bench_tp_tokens import measure_compiled, measure_tokens

COMPILE_SECONDS = 100
TIMEOUT = datetime.timedelta(minutes=5)  # a rank that stops answering ends the others after this


def measure(args: argparse.Namespace) -> None:
    world, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    configs = {name: config_of(name, args.layers) for name in args.models}
    token_models = args.token_models or [name for name in args.models if is_plain(name)]
    token_configs = {name: read_config(name, args.token_layers) for name in token_models}
    sizes = args.sizes or [size for size in (1, 2, 4, 8) if world % size == 0]
    for name, config in (*configs.items(), *token_configs.items()):
        for size in sizes:
            try:
                if config is not None:
                    check_tensor_parallel_size(config, size)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
    if bad := [size for size in sizes if world % size]:
        raise UserError(f"--sizes {bad[0]} does not divide the {world} processes")
    if cuda:
        load_libraries()
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    if args.exchange is not None:
        os.environ[ENVIRONMENT_VARIABLE] = args.exchange
    try:
        measure_all(args, token_configs, sizes, device)
    finally:
        distributed.destroy_process_group()


def is_plain(name: str) -> bool:
    """Whether a system is a released architecture as it is."""
    return base_of(name) == (name, 1) and name != "gqa"


def make_meshes(sizes: list[int], device: torch.device) -> dict[int, DeviceMesh | None]:
    """The mesh of this rank and its neighbours for every number of them; None for one."""
    world = distributed.get_world_size()
    meshes = {size: None for size in sizes if size == 1}
    for size in sizes:
        if size > 1:
            mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=(f"side{size}", f"tp{size}"))
            meshes[size] = mesh[f"tp{size}"]
    return meshes


def sizes_of(name: str, sizes: list[int]) -> list[int]:
    """Those that a system can have: of one whose ranks share tokens, multiples of their number, of MLRA with as many
    branches as that."""
    sharers, config = base_of(name)[1], config_of(name, 1)
    if sharers == 1 or config is None:
        return sizes
    fit = [size for size in sizes if size % sharers == 0]
    if config.num_latent_heads == 1:
        return fit
    return [size for size in fit if check_tensor_parallel_size(config, size).branches % sharers == 0]


def describe_run(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict:
    world = distributed.get_world_size()
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "processes": world,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "nvlink_multicast": os.environ.get("NCCL_NVLS_ENABLE", "default"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"torchrun --nproc-per-node {world} -m scripts.bench_tp {' '.join(sys.argv[1:])}",
        "commit": args.commit or commit(),
        "dtype": str(dtype).removeprefix("torch."),
        "read_ceiling_GB_s": read_ceiling() if cuda else None,
    }


def measure_all(args: argparse.Namespace, token_configs: dict, sizes: list[int], device: torch.device) -> None:
    rank = distributed.get_rank()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sharers = {base_of(name)[1] for name in args.models if sizes_of(name, sizes)}
    meshes = make_meshes(sorted({*sizes, *sharers}), device)
    results: dict = {"runs": [], "tokens": {}, "compiled": None, "projections": {}, "decode": {}}
    if args.output.exists():
        results |= read_json(args.output)

    def report(what: str, content: object) -> None:
        if rank == 0:
            print(what, json.dumps(content), flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if device.type == "cuda" and {"decode", "projections"} & set(args.parts):
        compile_ahead(args, sizes)
    results["runs"].append(describe_run(args, dtype, device))
    distributed.barrier()
    if "tokens" in args.parts:
        of_sizes = {size: meshes[size] for size in sizes}
        for name, config in token_configs.items():
            results["tokens"][name] = measure_tokens(config, of_sizes, args.new_tokens, device)
            report(f"tokens {name}", results["tokens"][name])
    for size in sizes:
        for base, names in systems_by_architecture(args.models, size).items():
            before = allocated(device)
            model = build_model(base, args.layers, meshes[size], dtype, device)
            weights = allocated(device) - before
            for name in names:
                shared = base_of(name)[1]
                system = System(name, model, meshes[size], meshes[shared] if shared > 1 else None, device)
                if "decode" in args.parts:
                    cells = results["decode"].setdefault(name, {}).setdefault(str(size), {})
                    cells["weight_bytes"] = weights
                    measure_cells(args, system, cells, lambda what, cell, name=name: report(f"{name} {what}", cell))
                if "projections" in args.parts and splits(system):
                    forms = measure_splits(system, args.sequences, args.contexts[0], args.replays)
                    results["projections"].setdefault(name, {})[str(size)] = forms
                    report(f"{name} TP{size}, projections", forms)
            del system, model
    if "compiled" in args.parts:
        results["compiled"] = measure_compiled(read_config(args.models[0], 2), meshes[sizes[-1]], 16, device)
        report("compiled", results["compiled"])


def systems_by_architecture(names: list[str], size: int) -> dict[str, list[str]]:
    """Systems of so many ranks that share a model, in the order given."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        if size in sizes_of(name, [size]):
            grouped.setdefault(base_of(name)[0], []).append(name)
    return grouped


def compile_ahead(args: argparse.Namespace, sizes: list[int]) -> None:
    """Every rank has its part of the kernels compiled."""
    jobs = [(name, size, n) for name in args.models for size in sizes_of(name, sizes) for n in args.sequences]
    rank, world = int(os.environ["LOCAL_RANK"]), distributed.get_world_size()
    own = jobs[rank::world]
    processes = bench_tp_compile.start(own, args.contexts, spare_rows(args.replays), rank)
    end = time.monotonic() + COMPILE_SECONDS
    for process in processes:
        try:
            process.wait(max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:  # what is missing is compiled where it is used
            process.kill()
    distributed.barrier()


def splits(system: System) -> bool:
    """Whether this system's ranks hold projections whole that they could split."""
    if system.sharing is not None or system.mesh is None or system.base == "gqa":
        return False
    layout = tensor_parallel_layout(system.model.config, system.size)
    return layout is not None and layout.branches == system.size


def measure_cells(args: argparse.Namespace, system: System, cells: dict, report: Callable[[str, dict], None]) -> None:
    for batch in args.sequences:
        for context in args.contexts:
            cell = measure_decode(system, batch, context, args.replays)
            cells.setdefault(str(batch), {})[str(context)] = cell
            report(f"TP{system.size}, {batch} x {context}", cell)
