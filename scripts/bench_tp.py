"""Tensor-parallel decoding measured on the GPUs of one machine: every size that its processes can form.

    torchrun --nproc-per-node 4 -m scripts.bench_tp --models mlra_4 mlra_2 mla wide_mlra_4 wide_mla \\
        --contexts 131072 524288 1048576 --output evals/results/tp_h200_x4.json
    torchrun --nproc-per-node 8 -m scripts.bench_tp --models mlra_4 mla --sequences 16 --contexts 131072 \\
        --parts decode --output evals/results/tp_h200_x8.json

Weights are random and the same for every size; each rank creates its own share, no checkpoint is read. With T ranks of
N the model runs N / T times side by side (data parallelism), so that no GPU idles, each with its part of --sequences,
or with one. A decode step is the one that `generate()` takes for a static cache, greedy choice included, as one CUDA
graph; times are medians over replays, of the slowest rank. The share of all-reduce is what the step gains when its
sums over ranks are left out; where they go through peer memory, the same is timed through NCCL beside it. For MLA the
attention of a rank is also timed with FlashMLA where that is here (as in `bench_decode`, variable
MLRA_BENCH_LIBRARIES). An existing file is added to: what is measured again replaces what it holds.
"""

import argparse
import datetime
import json
import os
import platform
import sys
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
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results; a plot goes beside it")
    parser.add_argument("--models", nargs="+", default=["mlra_4", "mla"], help="names in configuration/, or wide_NAME")
    parser.add_argument("--contexts", nargs="+", type=positive_int, default=[131072, 524288], help="cached tokens")
    parser.add_argument("--sizes", nargs="+", type=positive_int, help="ranks per model (default: 1, 2, 4, 8 as fit)")
    parser.add_argument("--sequences", type=positive_int, help="in all (default: one for each group of ranks)")
    parser.add_argument("--layers", type=positive_int, help="decoder layers to time (default: the architecture's)")
    parser.add_argument("--replays", type=positive_int, default=20, help="timed decode steps")
    parser.add_argument("--token-models", nargs="+", help="models whose tokens to compare (default: --models)")
    parser.add_argument("--token-layers", type=positive_int, help="decoder layers of those (default: all)")
    parser.add_argument("--new-tokens", type=positive_int, default=32, help="tokens to compare")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3], help="default: all but compiled")
    parser.add_argument("--exchange", choices=WAYS, help="of sums over ranks (default: as MLRA_EXCHANGE says)")
    args = parser.parse_args(argv)
    return cli.run("scripts.bench_tp:measure", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from evals.figures import CAN_DRAW, save_figure, subplots
from modeling_mlra.peer_memory_mlra import ENVIRONMENT_VARIABLE
from modeling_mlra.tensor_parallel_mlra import check_tensor_parallel_size, tensor_parallel_layout
from scripts.bench_decode import load_libraries
from scripts.bench_tp_models import allocated, build, read_config
from scripts.bench_tp_times import measure_decode, measure_projection_forms
from scripts.bench_tp_tokens import measure_compiled, measure_tokens

TIMEOUT = datetime.timedelta(minutes=5)  # a rank that stops answering ends the others after this


def measure(args: argparse.Namespace) -> None:
    world, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    configs = {name: read_config(name, args.layers) for name in args.models}
    token_configs = {name: read_config(name, args.token_layers) for name in args.token_models or args.models}
    sizes = args.sizes or [size for size in (1, 2, 4, 8) if world % size == 0]
    for name, config in (*configs.items(), *token_configs.items()):
        for size in sizes:
            try:
                check_tensor_parallel_size(config, size)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
    if bad := [size for size in sizes if world % size]:
        raise UserError(f"--sizes {bad[0]} does not divide the {world} processes")
    if args.sequences is not None and (bad := [size for size in sizes if args.sequences % (world // size)]):
        raise UserError(
            f"--sequences {args.sequences} cannot be dealt to {world // bad[0]} groups of {bad[0]} ranks; "
            f"{world // min(sizes)} could"
        )
    if cuda:
        load_libraries()
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    if args.exchange is not None:
        os.environ[ENVIRONMENT_VARIABLE] = args.exchange
    try:
        measure_all(args, configs, token_configs, sizes, device)
    finally:
        distributed.destroy_process_group()


def make_meshes(sizes: list[int], device: torch.device) -> dict[int, DeviceMesh | None]:
    """The mesh of this rank for every number of ranks to a model; None for one."""
    world = distributed.get_world_size()
    meshes = {size: None for size in sizes if size == 1}
    for size in sizes:
        if size > 1:
            mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=(f"side{size}", f"tp{size}"))
            meshes[size] = mesh[f"tp{size}"]
    return meshes


def describe_run(dtype: torch.dtype, device: torch.device) -> dict:
    world = distributed.get_world_size()
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "processes": world,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None,
        "nvlink_multicast": os.environ.get("NCCL_NVLS_ENABLE", "default"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"torchrun --nproc-per-node {world} -m scripts.bench_tp {' '.join(sys.argv[1:])}",
        "dtype": str(dtype).removeprefix("torch."),
    }


def measure_all(
    args: argparse.Namespace, configs: dict, token_configs: dict, sizes: list[int], device: torch.device
) -> None:
    world, rank = distributed.get_world_size(), distributed.get_rank()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    meshes = make_meshes(sizes, device)
    results: dict = {
        "runs": [],
        "tokens": {},
        "compiled": None,
        "projection_forms": {},
        "decode": {},
        "against_mla": {},
    }
    if args.output.exists():
        results |= read_json(args.output)
    results["runs"].append(describe_run(dtype, device))
    distributed.barrier()

    def report(what: str, content: object) -> None:
        if rank == 0:
            print(what, json.dumps(content), flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    if "tokens" in args.parts:
        for name, config in token_configs.items():
            results["tokens"][name] = measure_tokens(config, meshes, args.new_tokens, device)
            report(f"tokens {name}", results["tokens"][name])
    largest, first = meshes[sizes[-1]], configs[args.models[0]]
    if "projections" in args.parts and tensor_parallel_layout(first, sizes[-1]).branches > 1:
        forms = measure_projection_forms(first, largest, dtype, args.replays, device)
        results["projection_forms"] = {"model": args.models[0], "size": sizes[-1], "batch": forms}
        report("projection forms", forms)
    for name, config in configs.items() if "decode" in args.parts else ():
        for size in sizes:
            before = allocated(device)
            model = build(config, meshes[size], dtype, device)
            cell = results["decode"].setdefault(name, {}).setdefault(str(size), {})
            cell["layout"] = tensor_parallel_layout(config, size)._asdict()
            cell["weight_bytes"] = allocated(device) - before
            batch = 1 if args.sequences is None else args.sequences * size // world
            for context in args.contexts:
                cell[str(context)] = measure_decode(model, batch, context, args.replays, device)
                report(f"{name} TP{size} {context}", cell[str(context)])
            del model
    results["against_mla"] = against_mla(results["decode"])
    report("times faster than mla", results["against_mla"])
    if "compiled" in args.parts:
        results["compiled"] = measure_compiled(read_config(args.models[0], 2), largest, 16, device)
        report("compiled", results["compiled"])
    if rank == 0 and CAN_DRAW and results["decode"]:
        print(plot(results, args.output))


def against_mla(decode: dict) -> dict:
    """How many times faster than MLA of the same size, on as many ranks: the attention kernel (MLA's by this package
    and by FlashMLA), the attention as a whole with its projections, and a token."""
    ratios: dict = {}
    for name, by_size in decode.items():
        other = "wide_mla" if name.startswith("wide_") else "mla"
        if name == other:
            continue
        for size, cell in by_size.items():
            for context in filter(str.isdigit, cell):
                if reference := decode.get(other, {}).get(size, {}).get(context):
                    ratios.setdefault(name, {}).setdefault(size, {})[context] = {
                        key: reference[key] / cell[context][own]
                        for key, own in (
                            ("kernel_us_per_layer", "kernel_us_per_layer"),
                            ("flash_mla_us_per_layer", "kernel_us_per_layer"),
                            ("attention_us_per_layer", "attention_us_per_layer"),
                            ("token_us", "token_us"),
                        )
                        if key in reference and own in cell[context]
                    }
    return ratios


def plot(results: dict, output: Path) -> Path:
    """Time of a step against context, one line per model and size; beside it the attention kernel's time per layer."""
    figure, panels = subplots(1, 2, figsize=(12, 4.2))
    for panel, key, scale, label in (
        (panels[0], "token_us", 1e-3, "milliseconds per step"),
        (panels[1], "kernel_us_per_layer", 1.0, "microseconds, attention kernel of one layer"),
    ):
        for color, (name, by_size) in enumerate(results["decode"].items()):
            for style, (size, cell) in enumerate(by_size.items()):
                line = {"color": f"C{color}", "linestyle": ("-", "--", "-.", ":")[style % 4]}
                points = {int(context) / 1024: cell[context] for context in cell if context.isdigit()}
                panel.plot(
                    list(points),
                    [scale * x[key] for x in points.values()],
                    marker="o",
                    label=f"{name} TP{size}",
                    **line,
                )
                peer = {k: x["flash_mla_us_per_layer"] for k, x in points.items() if "flash_mla_us_per_layer" in x}
                if panel is panels[1] and peer:
                    panel.plot(list(peer), list(peer.values()), marker="x", label=f"{name} TP{size}, FlashMLA", **line)
        panel.set(xlabel="context, K tokens", ylabel=label, xscale="log", ylim=(0, None))
        panel.set_xticks(list(points), [f"{k:g}" for k in points])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    last = results["runs"][-1]
    figure.suptitle(f"{last['processes']} x {last['gpu']}, {last['dtype']}, {last['date'][:10]}", fontsize=9)
    return save_figure(figure, output)
