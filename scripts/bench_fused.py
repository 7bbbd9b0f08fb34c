"""Time the fused decoding step and the steps of a layer one by one, for several plans, on the released MLRA-4 shape.

    python -m scripts.bench_fused --output evals/results/fused_h200

Each runs for all 24 layers in one CUDA graph, so that weights come from memory and not from the L2 cache. The
step is checked against the modules in float32 first, with and without rings of weights, and not timed if it is wrong.
"""

import argparse
import contextlib
import json
import sys
from datetime import date
from pathlib import Path
from unittest.mock import patch

from scripts import cli
from scripts.cli import UserError, positive_int
from scripts.variants import WEIGHTS


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_fused", __doc__)
    parser.add_argument("--contexts", nargs="+", type=positive_int, default=[2048, 131072])
    parser.add_argument("--sequences", type=positive_int, default=1, help="of the fused step (default: 1)")
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16", help="of linear layers")
    parser.add_argument("--cache-rows", choices=("plain", "fp8"), default="plain", help="format of cached rows")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json")
    args = parser.parse_args(argv)
    args.command_line = sys.argv[1:] if argv is None else argv
    return cli.run("scripts.bench_fused:benchmark", args, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
import triton

from modeling_mlra import (
    MLRACache,
    MLRAForCausalLM,
    step_linear_mlra,
    step_linear_products_mlra,
    step_linear_registers_mlra,
    step_linear_stream_mlra,
    step_mlra,
)
from scripts.bench_generate import FilledCache, build, seconds
from scripts.fp8 import to_fp8
from scripts.gpu_times import read_ceiling
from tests.fused_checks import compare
from tests.quantized import fp8_copy
from tests.tolerances import FUSED_FLOAT32_RATIO


def graph_seconds(function, repeats: int = 20) -> float:
    """Median seconds of one replay of `function` captured as a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return seconds(graph.replay, repeats)


def counts(context: int, sequences: int) -> torch.Tensor:
    """Counters of a step behind `context` rows."""
    return torch.tensor([context, *[context] * sequences, *[context + 1] * sequences], dtype=torch.int32)


def filled_step(model: MLRAForCausalLM, context: int, sequences: int) -> tuple[MLRACache, step_mlra.FusedStep]:
    """A fused step for sequences behind `context` random cache rows each, and the cache, which it does not keep."""
    cache = FilledCache(model, sequences, context, room=128).rewind()
    return cache, step_mlra.FusedStep(model, cache, counts(context, sequences).cuda())


def rings(from_megabytes: int, **changed):
    """Weights from a size on through rings, with a changed plan; 2**20 megabytes stand for none."""
    ring_plan = step_linear_stream_mlra.ring_plan
    return patch.multiple(
        step_linear_stream_mlra,
        RING_BYTES=from_megabytes * 2**20,
        ring_plan=lambda *arguments: ring_plan(*arguments) | changed,
    )


def tiles(kind: str, **changed):
    """Changed tiles of the kernel that holds its weights in registers, for maps of one kind."""
    register_plan = step_linear_registers_mlra.register_plan

    def plan(linear_map, vectors, residual):
        of_map = "residual" if residual else "swiglu" if linear_map.swiglu else "norm"
        return register_plan(linear_map, vectors, residual) | (changed if of_map == kind else {})

    return patch.multiple(step_linear_registers_mlra, register_plan=plan)


def products(splits: int = 1, **changed):
    """Changed tiles of the products of many vectors, and `splits` times as many programs for the small weights."""
    product_plan = step_linear_products_mlra.product_plan

    def plan(linear_map, blocks, width, multiprocessors):
        return product_plan(linear_map, blocks, width, multiprocessors * splits) | changed

    return patch.multiple(step_linear_products_mlra, product_plan=plan)


def variants(sequences: int, fp8: bool) -> dict:
    """Name -> what to time the step under."""
    if sequences > step_linear_mlra.FEW_VECTORS:
        return {
            "shipped": contextlib.nullcontext(),
            **{f"{n} buffers": products(STAGES=n) for n in ((2, 4, 6) if fp8 else (2, 4))},
            "tiles of 64 columns, 6 buffers": products(WIDTH=64, STAGES=6),
            "one program a row block": products(SPLITS=1),
            "twice the programs": products(2),
            **({"8 warps": products(num_warps=8)} if fp8 else {"tiles of 256 columns": products(WIDTH=256)}),
        }
    if fp8:
        return {
            "shipped": contextlib.nullcontext(),
            **{f"residual, {n} chunks ahead": tiles("residual", AHEAD=n) for n in (1, 3)},
            "residual, chunks of 1024, 4 ahead": tiles("residual", WIDTH=1024, AHEAD=4),
            "residual, chunks of 4096, 1 ahead": tiles("residual", WIDTH=4096, AHEAD=1),
            "residual, 2 rows": tiles("residual", ROWS=2),
            "residual, 8 rows, 8 warps": tiles("residual", ROWS=8, num_warps=8),
            "no rings": rings(2**20),
            **{f"rings of {n} tiles": rings(32, STAGES=n) for n in (2, 4)},
            "down and query, 8 rows": tiles("norm", ROWS=8),
            "down and query, 8 rows, 8 warps": tiles("norm", ROWS=8, num_warps=8),
        }
    return {
        "shipped": contextlib.nullcontext(),
        "no rings": rings(2**20),
        "rings for all but stacked weights": rings(0),
        **{f"rings of {n} tiles": rings(32, STAGES=n) for n in (3, 5)},
        "rings of 8 tiles of 4 rows": rings(32, ROWS=4, STAGES=8),
        "residual tiles of 8192, 8 warps": tiles("residual", ROWS=8, num_warps=8),
        "norm tiles, 8 warps": tiles("norm", num_warps=8),
    }


def steps(step: step_mlra.FusedStep) -> dict:
    """Step of a layer -> (what runs it for a layer and its cache rows, the linear layers whose weights it reads)."""
    layer = step.model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    first = (attention.q_a_proj, attention.kv_a_proj, attention.k_rope_proj)
    return {
        "down": (lambda layer, rows: step.down(layer), first),
        "query": (lambda layer, rows: step.query(layer), (attention.q_b_proj,)),
        "absorb": (step.absorb, ()),
        "attend": (step.attend, ()),
        "down to value": (step.attention, (*first, attention.q_b_proj, attention.kv_b_proj)),
        "out": (lambda layer, rows: step.out(layer), (attention.o_proj,)),
        "gate_up": (lambda layer, rows: step.gate_up(layer), (mlp.gate_proj, mlp.up_proj)),
        "down_proj": (lambda layer, rows: step.down_proj(layer), (mlp.down_proj,)),
    }


@torch.no_grad()
def benchmark(arguments: argparse.Namespace) -> int:
    """Run the benchmark; 1 if the step is wrong."""
    if not 1 <= arguments.sequences <= step_mlra.MAX_SEQUENCES:
        raise UserError(f"--sequences {arguments.sequences}: the fused step takes 1 to {step_mlra.MAX_SEQUENCES}")
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device and found none")
    fp8 = arguments.weights != "bfloat16"
    quantise = (lambda model: fp8_copy(model, (16, 16))) if fp8 else None
    ways = {"registers": rings(2**20), "rings": rings(0)}
    if arguments.sequences > step_linear_mlra.FEW_VECTORS:
        ways = {"tensor cores": contextlib.nullcontext()}
    checks = {}
    for name, way in ways.items():
        with way:
            checks[name] = check = compare("mlra_4", "cuda", max(2, arguments.sequences), quantise)
        if not (check["counters"] and max(check["logits"], check["rows"]) < FUSED_FLOAT32_RATIO):
            print(f"error: the fused step differs from the modules, so it is not timed: {check}", file=sys.stderr)
            return 1
    model = build("mlra_4", max(arguments.contexts), arguments.cache_rows)
    if fp8:
        to_fp8(model, WEIGHTS[arguments.weights])
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "sequences": arguments.sequences,
        "weights": arguments.weights,
        "cache_rows": arguments.cache_rows,
        "command": "python -m scripts.bench_fused " + " ".join(arguments.command_line),
        "check": checks,
        "read_ceiling_GB_s": read_ceiling(),
        "roofline_ms": {},
        "step_ms": {},
        "steps_us": {},
    }
    tokens = torch.zeros(arguments.sequences, dtype=torch.long, device="cuda")

    def step_ms(step, context):
        step.counters.copy_(counts(context, arguments.sequences))
        return graph_seconds(lambda: step(tokens)) * 1e3

    for context in arguments.contexts:
        cache, step = filled_step(model, context, arguments.sequences)
        times = report["step_ms"][str(context)] = {}
        must_read = weight_bytes + sum(layer.rows[:, :, :context].nbytes for layer in cache.layers)
        report["roofline_ms"][str(context)] = must_read / report["read_ceiling_GB_s"] / 1e6
        for name, variant in variants(arguments.sequences, fp8).items():
            with variant:
                times[name] = step_ms(step, context)
            print(f"{context} {name}: {times[name]:.3f} ms", flush=True)
        machine, step.machine = step.machine, step.machine._replace(early=False)
        times["without programmatic dependent launch"] = step_ms(step, context)
        step.machine = machine
        if context == arguments.contexts[0]:
            layers = list(zip(model.model.layers, step.cache.layers, strict=True))
            for name, (function, read) in steps(step).items():
                taken = graph_seconds(lambda: [function(a, b.rows) for a, b in layers]) / len(layers)  # noqa: B023
                report["steps_us"][name] = {"us": taken * 1e6}
                if read:
                    weight_bytes = sum(linear.weight.nbytes for linear in read)
                    report["steps_us"][name]["weights_GB_s"] = weight_bytes / taken / 1e9
        del cache, step
    print(
        json.dumps({key: report[key] for key in ("read_ceiling_GB_s", "roofline_ms", "step_ms", "steps_us")}, indent=1)
    )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    return 0
