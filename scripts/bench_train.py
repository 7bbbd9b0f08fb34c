"""One training step of the released shapes and of Llamas of equal size: tokens a second, share of the peak, memory.

    python -m scripts.bench_train --output evals/results/train_h200.json
    python -m scripts.bench_train --output … --seconds 560 --cells mlra_4:auto:model:4:none llama_mha:auto:model:4:none
    python -m scripts.bench_train --smoke                                   # tiny models on the CPU, no figures

A cell is MODEL:ATTENTION:COMPILE:BLOCKS:RECOMPUTE. MODEL is an architecture of configuration/, llama_gqa (8 key heads)
or llama_mha (24), the Llamas with MLPs as wide as brings them to MLRA-4's parameter count. ATTENTION is auto (what
training uses), or one of cudnn, flash, efficient, flex and fa4. COMPILE is none, layers (each layer by itself, quick
to compile) or model (as the Trainer does). BLOCKS of --length tokens make a micro-batch. RECOMPUTE is none,
attention_inputs or layers (gradient checkpointing).

Weights and AdamW are float32, matmuls bfloat16 by autocast. Before a cell is timed, its loss and the gradients of the
first layer's attention must be those of plain eager attention, uncompiled, block by block. A step is --step-blocks
blocks in micro-batches, and one update; tokens_per_s_no_accumulation is that of a single micro-batch. Every finished
cell is in OUTPUT at once, and one that fails (out of memory, say) leaves its reason there.
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
from typing import NamedTuple

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
from transformers import AutoModelForCausalLM, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evals.common import CONFIGURATIONS, commit, environment, markdown_table, write_json, write_text
from scripts.causal_attention import IMPLEMENTATIONS, block_mask, causal_attention
from scripts.compare_architectures import architecture_fields, match_width
from scripts.recipe import model_config
from scripts.training_model import set_recomputation
from scripts.training_speed import count_parameters, matmul_rate, training_flops_per_token

try:
    import matplotlib
    from matplotlib import pyplot as plt
except ImportError:
    plt = None

PEAK = 989e12  # bfloat16 FLOP/s of an H100 and an H200 by their data sheet
LLAMAS = {"llama_gqa": 8, "llama_mha": 24}  # key heads
COMPILE = ("none", "layers", "model")
RECOMPUTE = ("none", "attention_inputs", "layers")
CELLS = (
    "mlra_4:auto:model:4:none",
    "llama_mha:auto:model:4:none",
    "mla:auto:model:4:none",
    "mlra_4:auto:model:6:none",
    "mlra_4:auto:model:4:attention_inputs",
    "mlra_4:auto:layers:4:none",
    "mlra_4:fa4:layers:4:none",
    "mlra_4:flex:layers:4:none",
    "mlra_4:flash:layers:4:none",
    "mlra_4:efficient:layers:4:none",
    "mlra_4:auto:none:4:none",
    "mlra_4:auto:model:4:layers",
    "llama_gqa:auto:model:4:none",
)
SMOKE_CELLS = ("mlra_4:auto:none:2:none", "mlra_4:auto:layers:2:attention_inputs", "llama_mha:auto:model:2:none")
SMOKE_SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}
LOSS_TOLERANCE = 5e-3  # nats
TIMES_ROUNDING = 1.5  # how far gradients may be from float32's, in units of how far plain attention in bfloat16 is


class Cell(NamedTuple):
    """What is timed; see the module's docstring."""

    model: str
    attention: str
    compile: str
    blocks: int
    recompute: str

    def __str__(self) -> str:
        return ":".join(map(str, self))


def read_cell(text: str) -> Cell:
    """A cell by its name.

    Raises:
        UserError: naming the part that is unknown.
    """
    parts = text.split(":")
    if len(parts) != len(Cell._fields) or not parts[3].isdigit() or int(parts[3]) < 1:
        raise UserError(f"--cells {text}: write MODEL:ATTENTION:COMPILE:BLOCKS:RECOMPUTE, such as {CELLS[0]}")
    released = sorted(path.stem for path in CONFIGURATIONS.glob("*.json"))
    known = {
        "model": [*released, *LLAMAS],
        "attention": list(IMPLEMENTATIONS),
        "compile": COMPILE,
        "recompute": RECOMPUTE,
    }
    cell = Cell(*parts[:3], int(parts[3]), parts[4])
    for name, values in known.items():
        if getattr(cell, name) not in values:
            raise UserError(f"--cells {text}: {name} {getattr(cell, name)!r} is none of {', '.join(values)}")
    if cell.recompute == "attention_inputs" and cell.model in LLAMAS:
        raise UserError(f"--cells {text}: only models of type mlra recompute attention_inputs")
    return cell


def model_fields(name: str, is_smoke: bool) -> dict:
    """Configuration fields of a cell's model."""

    def released(name: str) -> dict:
        fields = json.loads((CONFIGURATIONS / f"{name}.json").read_text(encoding="utf-8"))
        if is_smoke:
            fields |= SMOKE_SIZES | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return fields

    if name not in LLAMAS:
        return released(name)
    base = released("mlra_4")
    changes = {"model_type": "llama", "num_key_value_heads": LLAMAS[name]}
    return match_width(architecture_fields(base, model_config(base), changes), count_parameters(model_config(base)))


def build(name: str, is_smoke: bool, device: torch.device) -> nn.Module:
    """A float32 model in training mode; weights N(0, 0.02), so that every path shows in the loss."""
    set_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            model_config(model_fields(name, is_smoke)), dtype=torch.float32, attn_implementation="eager"
        )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.normal_(0, 0.02)
    return model.train()


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


def forward_backward(model: Callable, ids: torch.Tensor, weight: float = 1.0, rounds: bool = True) -> torch.Tensor:
    """Loss of blocks `[B, T + 1]` as scripts.train computes it, in float32 unless it `rounds`; gradients add up."""
    targets = ids[:, 1:].contiguous()
    inputs = {"input_ids": ids[:, :-1].contiguous(), "labels": targets, "shift_labels": targets, "use_cache": False}
    if model.config.model_type == "mlra":
        inputs["skip_logits"] = True
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=rounds):
        loss = model(**inputs).loss
    (loss * weight).backward()
    return loss.detach()


def watched(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters whose gradients are compared: the first layer's attention, furthest from the loss."""
    return dict(model.model.layers[0].self_attn.named_parameters())


class Reference(NamedTuple):
    """Of plain eager attention, block by block: the loss and watched gradients in float32, and bfloat16's rounding.

    Attributes:
        rounding: of each gradient in bfloat16, RMS of its difference from float32's over RMS.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    rounding: dict[str, float]


def reference(model: nn.Module, ids: torch.Tensor) -> Reference:
    """What a cell is held against."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, gradients = [], []
    for rounds in (False, True):
        loss = sum(forward_backward(model, block[None], 1 / len(ids), rounds).item() for block in ids)
        losses.append(loss / len(ids))
        gradients.append({name: parameter.grad.clone() for name, parameter in watched(model).items()})
        model.zero_grad()
    model.gradient_checkpointing_disable()
    return Reference(losses[0], gradients[0], ratios(gradients[1], gradients[0]))


def ratios(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """RMS of the difference over RMS, of each tensor."""
    return {name: ((found[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items()}


def check(loss: float, model: nn.Module, expected: Reference) -> dict:
    """Differences from the reference.

    Raises:
        ValueError: when they are more than rounding.
    """
    found = ratios({name: parameter.grad for name, parameter in watched(model).items()}, expected.gradients)
    where = max(found, key=lambda name: found[name] / expected.rounding[name])
    times = found[where] / expected.rounding[where]
    if not (abs(loss - expected.loss) <= LOSS_TOLERANCE and times <= TIMES_ROUNDING):
        raise ValueError(
            f"wrong: loss {loss:.4f} instead of {expected.loss:.4f}, gradient of {where} off by {found[where]:.3f}, "
            f"{times:.2f} times what bfloat16 rounds in plain attention"
        )
    return {"loss": loss, "loss_difference": loss - expected.loss, "gradient_difference_in_roundings": times}


def prepare(model: nn.Module, cell: Cell, length: int, is_smoke: bool) -> Callable:
    """The model as the cell asks for it."""
    device = next(model.parameters()).device
    if cell.attention == "flex":
        block_mask(length, device)
    is_mlra = model.config.model_type == "mlra"
    model.set_attn_implementation("sdpa" if is_mlra and cell.attention == "auto" else causal_attention(cell.attention))
    if cell.recompute == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif cell.recompute == "attention_inputs":
        set_recomputation(model, cell.recompute)
    options = {"backend": "aot_eager"} if is_smoke else {}
    if cell.compile == "layers":
        for layer in model.model.layers:
            layer.compile(**options)
    return torch.compile(model, **options) if cell.compile == "model" else model


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
    result |= check(loss, model, expected)
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
    if plt is not None:
        draw(path.with_suffix(".png"), timed, results["gpu"])


def draw(path: Path, timed: dict[str, dict], gpu: str) -> None:
    """Bars of the share of the data sheet's peak."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(timed) + 1.2), layout="constrained")
    bars = axes.barh(list(timed), [values["share_of_989"] for values in timed.values()])
    axes.bar_label(bars, [f"{values['tokens_per_s']:,.0f} tokens/s" for values in timed.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel=f"model FLOPs as a share of 989 TFLOP/s, one {gpu}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def bench(args: argparse.Namespace) -> None:
    cells = [read_cell(text) for text in args.cells or (SMOKE_CELLS if args.smoke else CELLS)]
    if args.output is not None and args.output.suffix != ".json":
        raise UserError(f"--output {args.output} must end in .json")
    if not args.smoke and not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device and found none; --smoke runs tiny models on the CPU")
    began = time.monotonic()
    device = torch.device("cpu" if args.smoke else "cuda")
    if args.smoke:
        args.length, args.repeats = min(args.length, 32), 1
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
