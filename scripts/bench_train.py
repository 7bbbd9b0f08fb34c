"""One training step of the released shapes and of Llamas of equal size: tokens a second, share of the peak, memory.

    python -m scripts.bench_train --output evals/results/train_h200.json
    python -m scripts.bench_train --output … --seconds 560 --cells mlra_4:auto:model:4:none llama_mha:auto:model:4:none
    python -m scripts.bench_train --smoke                                   # tiny models on the CPU, no figures

A cell is MODEL:ATTENTION:COMPILE:BLOCKS:RECOMPUTE. MODEL is an architecture of configuration/, llama_gqa (8 key heads)
or llama_mha (24), the Llamas with MLPs as wide as brings them to MLRA-4's parameter count. ATTENTION is auto (what
training uses), or one of cudnn, flash, efficient, flex and fa4. COMPILE is none, layers (a recipe's compile_layers:
each layer by itself, and the loss) or model (its torch_compile). BLOCKS of --length tokens make a micro-batch.
RECOMPUTE is none, attention_inputs, elementwise (where compiled) or layers (gradient checkpointing). A sixth part,
float8, multiplies in float8 (torchao); MODEL_16 has an MLP as wide as the next multiple of 16, for float8 and for the
bfloat16 beside it.

Weights and AdamW are float32, matmuls bfloat16 by autocast. Before a cell is timed, its loss and the gradients of the
first layer's attention must be those of plain eager attention, uncompiled, block by block. A step is --step-blocks
blocks in micro-batches, and one update; tokens_per_s_no_accumulation is that of a single micro-batch. Every finished
cell is in OUTPUT at once, and one that fails (out of memory, say) leaves its reason there.
--profile adds the milliseconds of its kernels, by what they do and by name (scripts.bench_train_profile).
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, positive_int


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_train", __doc__)
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="MODEL:ATTENTION:COMPILE:BLOCKS:RECOMPUTE")
    parser.add_argument("--length", type=positive_int, default=2048, help="tokens of a block")
    parser.add_argument("--step-blocks", type=positive_int, default=480, help="blocks of one optimizer step")
    parser.add_argument("--repeats", type=positive_int, default=8, help="micro-batches to time")
    parser.add_argument("--seconds", type=positive_int, help="start no cell that would end later")
    parser.add_argument("--no-attention", action="store_true", help="leave out the attention calls by themselves")
    parser.add_argument("--profile", action="store_true", help="also what kernels a micro-batch's time goes to")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="results; table and plot beside it")
    parser.add_argument("--commit", help="what to call the commit where there is no repository")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU: whether it runs, no figures")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return cli.run("scripts.bench_train:bench", args, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evals.common import commit, environment, markdown_table, write_json, write_text
from evals.figures import CAN_DRAW, save_figure, subplots
from scripts.bench_train_cells import CELLS, SMOKE_CELLS, Cell, build, prepare, read_cell
from scripts.bench_train_checks import check, forward_backward, reference
from scripts.bench_train_profile import kernel_times
from scripts.causal_attention import IMPLEMENTATIONS, block_mask, causal_attention
from scripts.training_speed import matmul_rate, training_flops_per_token

PEAK = 989e12  # bfloat16 FLOP/s of an H100 and an H200 by their data sheet


class Clock:
    """Seconds between two points on the device."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def median(self, function: Callable, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = self.now()
            function()
            times.append(self.now() - start)
        return statistics.median(times)


def time_cell(cell: Cell, args: argparse.Namespace, device: torch.device, peak: float) -> dict:
    """Build, check and time one cell."""
    clock = Clock(device)
    model = build(cell.model, args.smoke, device)
    flops = training_flops_per_token(model, args.length)
    ids = torch.randint(0, model.config.vocab_size, (cell.blocks, args.length + 1), device=device)
    expected = reference(model, ids)
    stepper = prepare(model, cell, args.length, args.smoke)
    began = clock.now()
    loss = forward_backward(stepper, ids).item()
    result = {"first_call_s": clock.now() - began, "parameters": model.num_parameters()}
    result |= check(loss, model, expected, cell.products)
    del expected
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    update()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        forward_backward(stepper, ids)
    micro = clock.median(lambda: forward_backward(stepper, ids), args.repeats)
    step = clock.median(update, 3)
    tokens, count = cell.blocks * args.length, max(args.step_blocks // cell.blocks, 1)
    profile = kernel_times(lambda: forward_backward(stepper, ids)) if args.profile else {}
    rate, alone = count * tokens / (count * micro + step), tokens / (micro + step)
    return result | {
        "micro_batch_ms": micro * 1e3,
        "update_ms": step * 1e3,
        "micro_batches": count,
        "tokens_per_s": rate,
        "tokens_per_s_no_accumulation": alone,
        "model_gflop_per_token": flops / 1e9,
        "share_of_989": rate * flops / PEAK,
        "share_of_989_no_accumulation": alone * flops / PEAK,
        "share_of_matmul_rate": rate * flops / peak,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        **profile,
    }


def attention_rates(args: argparse.Namespace, device: torch.device) -> dict[str, dict | str]:
    """Forward and backward of one attention call by backend: 4 blocks, 24 heads, keys 192 wide, values 128."""
    heads, widths = 24, (192, 192, 128)
    module = nn.Module().train()
    module.is_causal, module.num_key_value_groups = True, 1
    shapes = [(4, args.length, heads, width) for width in widths]
    query, key, value = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for shape in shapes
    )
    flops = 4 * args.length * (args.length + 1) * heads * (192 + 128)
    clock, results = Clock(device), {}
    for backend in IMPLEMENTATIONS:
        try:
            name = causal_attention(backend)
            if backend == "flex":
                block_mask(args.length, device)
            attend = ALL_ATTENTION_FUNCTIONS[name]

            def forward(attend=attend):
                return attend(module, query, key, value, None, scaling=192**-0.5)[0]

            output = forward()
            gradient = torch.randn_like(output)

            def backward(output=output, gradient=gradient):
                torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True)

            times = {}
            for part, function in (("forward", forward), ("backward", backward)):
                function()  # warm
                # Several calls at a time: one takes less than a launch and a synchronisation from the host
                times[part] = clock.median(lambda function=function: [function() for _ in range(10)], 5) / 10
        except Exception as error:  # one backend's failure leaves the others' figures
            results[backend] = reason(error)
            continue
        results[backend] = {
            f"{part}_TFLOP_s": flops * factor / times[part] / 1e12
            for part, factor in (("forward", 1), ("backward", (3 * 192 + 2 * 128) / (192 + 128)))
        }
    return results


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def report(path: Path | None, results: dict, is_last: bool) -> None:
    """Write what there is; at the end print the table and draw."""
    if path is not None:
        write_json(path, results)
    timed = {name: values for name, values in results["cells"].items() if "tokens_per_s" in values}
    if not is_last or not timed:
        return
    header = ["cell", "tokens/s", "of 989", "of matmul", "alone tokens/s", "micro-batch ms", "update ms", "GiB"]
    rows = [
        [
            name,
            f"{values['tokens_per_s']:,.0f}",
            f"{values['share_of_989']:.3f}",
            f"{values['share_of_matmul_rate']:.3f}",
            f"{values['tokens_per_s_no_accumulation']:,.0f}",
            f"{values['micro_batch_ms']:.1f}",
            f"{values['update_ms']:.1f}",
            "" if values["peak_gib"] is None else f"{values['peak_gib']:.1f}",
        ]
        for name, values in timed.items()
    ]
    table = markdown_table(header, rows)
    print(table, end="")
    if path is None:
        return
    write_text(
        path.with_suffix(".md"),
        f"# Training speed\n\n{table}\nOne {results['gpu']}, {results['date']}, torch {results['torch']}, by "
        f"`{results['command']}`; the module says what a cell is.\n",
    )
    if CAN_DRAW:
        draw(path, timed, results["gpu"])


def draw(path: Path, timed: dict[str, dict], gpu: str) -> None:
    """Bars of the share of the data sheet's peak."""
    figure, axes = subplots(figsize=(8, 0.4 * len(timed) + 1.2))
    bars = axes.barh(list(timed), [values["share_of_989"] for values in timed.values()])
    axes.bar_label(bars, [f"{values['tokens_per_s']:,.0f} tokens/s" for values in timed.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel=f"model FLOPs as a share of 989 TFLOP/s, one {gpu}")
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def bench(args: argparse.Namespace) -> None:
    cells = [read_cell(text) for text in args.cells or (SMOKE_CELLS if args.smoke else CELLS)]
    if args.output is not None and args.output.suffix != ".json":
        raise UserError(f"--output {args.output} must end in .json")
    if not args.smoke and not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device and found none; --smoke runs tiny models on the CPU")
    began = time.monotonic()
    device = torch.device("cpu" if args.smoke else "cuda")
    if args.smoke:
        args.length, args.repeats, args.profile = min(args.length, 32), 1, False
    peak = matmul_rate(device)
    results = {
        "gpu": environment()["device"],
        **{name: value for name, value in environment().items() if name != "device"},
        "commit": args.commit or commit(),
        "date": date.today().isoformat(),
        "command": "python -m scripts.bench_train " + " ".join(args.argv),
        "length": args.length,
        "step_blocks": args.step_blocks,
        "matmul_rate_TFLOP_s": peak / 1e12,
        "attention": {} if args.smoke or args.no_attention else attention_rates(args, device),
        "cells": {},
    }
    print(f"matrix products {peak / 1e12:.0f} TFLOP/s, attention {json.dumps(results['attention'])}", flush=True)
    longest = 0.0
    for cell in tqdm(cells, desc="cells", disable=None):
        start = time.monotonic()
        if args.seconds is not None and start - began + longest > args.seconds:
            entry = {"error": f"no time left of --seconds {args.seconds}"}
        else:
            try:
                entry = time_cell(cell, args, device, peak)
            except UserError as error:
                entry = {"error": str(error)}
            except Exception as error:  # one cell's failure leaves the others' figures
                entry = {"error": reason(error)}
            longest = max(longest, time.monotonic() - start)
        results["cells"][str(cell)] = entry
        tqdm.write(f"{cell} {json.dumps(entry)}")
        sys.stdout.flush()
        report(args.output, results, is_last=False)
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report(args.output, results, is_last=True)
    if args.smoke and any("error" in entry for entry in results["cells"].values()):
        raise UserError("a cell failed")
