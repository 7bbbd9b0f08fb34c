"""Tensor-parallel decoding measured on the GPUs of one machine: every size that its processes can form.

    torchrun --nproc-per-node 4 -m scripts.bench_tp --models mlra_4 mlra_2 mla wide_mlra_4 wide_mla \\
        --contexts 131072 524288 1048576 --output evals/results/tp_h200_x4.json
    torchrun --nproc-per-node 8 -m scripts.bench_tp --models mlra_4 mla --sequences 16 --contexts 131072 \\
        --parts decode --output evals/results/tp_h200_x8.json

Weights are random and the same for every size; each rank creates its own share, no checkpoint is read. With T ranks of
N the model runs N / T times side by side (data parallelism), so that no GPU idles, each with its part of --sequences,
or with one. A decode step is the one that `generate()` takes for a static cache, greedy choice included, as one CUDA
graph; times are medians over replays, of the slowest rank. The share of all-reduce is what the step gains when its
all-reduces are left out. For MLA the attention of a rank is also timed with FlashMLA where that is here (as in
`bench_decode`, variable MLRA_BENCH_LIBRARIES). An existing file is added to: what is measured again replaces what it
holds.
"""

import argparse
import datetime
import gc
import inspect
import json
import os
import platform
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, positive_int, read_json

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
    args = parser.parse_args(argv)
    return cli.run("scripts.bench_tp:measure", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
import transformers
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.tensor_parallel import apply_tensor_parallelism

from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.capture_step_mlra import DecodingStep
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.generation_mlra import captured_decodes
from modeling_mlra.tensor_parallel_mlra import (
    check_tensor_parallel_size,
    local_sizes,
    tensor_parallel_layout,
    tensor_parallel_mesh,
)
from scripts.bench_decode import Case, load_libraries
from scripts.bench_decode import measure as measure_kernels

try:
    import matplotlib
    from matplotlib import pyplot as plt
except ImportError:
    plt = None

CONFIGURATION = Path(__file__).parent.parent / "configuration"
WIDE = {"hidden_size": 8192, "intermediate_size": 24576, "num_hidden_layers": 4, "num_attention_heads": 64}
TIMEOUT = datetime.timedelta(minutes=5)  # a rank that stops answering ends the others after this
HEAD_WIDTH = 128  # d_h of the released models, the unit of the paper's table of cache sizes


def read_config(name: str, layers: int | None) -> MLRAConfig:
    """A released architecture, "wide_" before its name for a stack of four layers of 64 heads."""
    file = CONFIGURATION / f"{name.removeprefix('wide_')}.json"
    if not file.is_file():
        raise UserError(f"model {name}: there is no {file}")
    settings = json.loads(file.read_text(encoding="utf-8"))
    if name.startswith("wide_"):
        settings |= WIDE
    if layers is not None:
        settings["num_hidden_layers"] = layers
    # random models end no sentence
    return MLRAConfig(**{**settings, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0})


def build(config: MLRAConfig, mesh, dtype: torch.dtype, device: torch.device) -> MLRAForCausalLM:
    """The model with random weights, sharded over `mesh` (None: one rank), each rank creating its own share.

    Every weight is drawn from a generator seeded by its name, whatever the number of ranks.
    """
    with torch.device("meta"):
        model = MLRAForCausalLM(config).to(dtype).eval()
    if mesh is not None:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))  # the library ties after sharding
        if "tp_plan" in inspect.signature(apply_tensor_parallelism).parameters:
            apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(model.tp_plan))
        else:
            apply_tensor_parallelism(model, mesh)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or (module is model.lm_head and config.tie_word_embeddings):
                continue
            module._parameters[key] = nn.Parameter(draw(f"{name}.{key}", parameter, device), requires_grad=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


def draw(name: str, parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Ones for norms, N(0, 0.02) for the rest; of a DTensor this rank's share."""
    if "norm" in name:
        whole = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    else:
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        whole.normal_(0, 0.02, generator=generator)
    if not isinstance(parameter, DTensor):
        return whole
    share = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local = share.to_local().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, share.device_mesh, share.placements, run_check=False, shape=share.shape, stride=share.stride()
    )


def random_cache(
    model: MLRAForCausalLM, batch: int, context: int, capacity: int, device: torch.device
) -> tuple[MLRACache, int]:
    """A static cache with `context` random rows of this rank's share, and the bytes its allocation took."""
    config = model.config
    width = local_sizes(model.model.layers[0].self_attn)[0] * config.latent_head_dim
    cache = MLRACache(config, max_cache_len=capacity)
    gc.collect()  # an earlier cache that goes now would count against this one
    before = allocated(device)
    for layer in cache.layers:
        one_row = torch.zeros(batch, 1, 1, width, dtype=model.dtype, device=device)
        layer.lazy_initialization(one_row, one_row[..., : config.qk_rope_head_dim])
        layer._is_empty = False
    taken = allocated(device) - before if device.type == "cuda" else cache.nbytes
    for layer in cache.layers:
        layer.rows[:, :, :context].normal_()
    cache.set_seq_length(context)
    return cache, taken


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def no_all_reduce() -> Iterator[None]:
    """All-reduces do nothing: results are wrong, and the time that is gained is what they cost."""
    real = distributed.all_reduce
    distributed.all_reduce = lambda *args, **kwargs: None
    try:
        yield
    finally:
        distributed.all_reduce = real


def median_time(function: Callable[[], object], device: torch.device, replays: int) -> float:
    """Median microseconds of `function` as a CUDA graph (plain calls on the CPU); the slowest rank's."""
    with torch.no_grad():
        for _ in range(2):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            for _ in range(3):
                graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            for event in events:
                event.record()
                if event is not events[-1]:
                    graph.replay()
            torch.cuda.synchronize()
            times = [1e3 * start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]
            del graph
        else:
            times = []
            for _ in range(replays):
                started = time.perf_counter()
                function()
                times.append(1e6 * (time.perf_counter() - started))
    return slowest(statistics.median(times), device)


def slowest(value: float, device: torch.device) -> float:
    held = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
    return held.item()


def measure_decode(model: MLRAForCausalLM, batch: int, context: int, replays: int, device: torch.device) -> dict:
    """Time of a step from `context` on, what all-reduce takes of it, the attention's part, and the cache's bytes."""
    config, layers, mesh = model.config, model.model.layers, tensor_parallel_mesh(model)
    cache, taken = random_cache(model, batch, context, context + 2 * (replays + 8), device)
    token = torch.zeros(batch, dtype=torch.long, device=device)
    step = DecodingStep(model, cache, batch, masked=False)
    step.start(context, torch.full((batch,), context, device=device), None)
    fused = step.is_fused

    def decode():
        token.copy_(step(token).argmax(-1))

    rows = batch * cache.get_max_length()
    result = {
        "sequences": batch,
        "cache_bytes_allocated": taken,
        "cache_bytes_expected": cache.bytes_per_token() * rows,
        "cache_head_widths": taken / (rows * len(cache.layers) * HEAD_WIDTH * cache.layers[0].rows.element_size()),
        "step": "fused" if fused else "modules",
        "token_us": median_time(decode, device, replays),
    }
    groups_of_ranks = distributed.get_world_size() // (1 if mesh is None else mesh.size())
    result["tokens_per_s"] = 1e6 * groups_of_ranks * batch / result["token_us"]
    if mesh is not None:
        with no_all_reduce():
            # `slowest` needs the real one, so the time is this rank's
            result["token_us_without_all_reduce"] = median_time(decode, device, replays)
        result["all_reduce_share"] = 1 - result["token_us_without_all_reduce"] / result["token_us"]

    latents, heads, groups = local_sizes(layers[0].self_attn)
    width, rope = config.latent_head_dim, config.qk_rope_head_dim
    q_latent = torch.randn(batch, 1, latents, heads, width, dtype=model.dtype, device=device)
    q_rope = torch.randn(batch, 1, groups, heads, rope, dtype=model.dtype, device=device)
    in_use = torch.full((batch,), context + 1, dtype=torch.int32, device=device)

    def kernels():
        for layer in cache.layers:
            latent_attention(
                q_latent,
                q_rope,
                *layer.format.views(layer.rows[:, 0], latents),
                kv_end=in_use,
                scaling=config.score_scaling,
                implementation=config.decode_implementation,
            )

    result["kernel_us_per_layer"] = median_time(kernels, device, replays) / len(layers)
    if fused:  # from `down` to `out` and its all-reduce

        def attention():
            for layer, cached in zip(layers, cache.layers, strict=True):
                step.run.attention(layer, cached.rows)
                step.run.out(layer)

        result["attention_us_per_layer"] = median_time(attention, device, replays) / len(layers)
    if device.type == "cuda" and (latents, width, rope) == (1, 512, 64):
        case = Case("", "mla", [context] * batch, heads, width=width)
        peer = measure_kernels(case, ceiling=1.0)[0]
        if "us" in peer:
            result["flash_mla_us_per_layer"] = slowest(peer["us"], device)
    return result


def measure_tokens(config: MLRAConfig, meshes: dict, new_tokens: int, device: torch.device) -> dict:
    """Greedy tokens of every size compared with one rank's: in float32 by every way to decode, in bfloat16 fused.

    In float32 all tokens are to be the same. In bfloat16 sums are rounded in another order, and tokens differ from
    the first near tie on: the tokens before it are counted, and their logits compared.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (2, 48), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    ways = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "static, captured": {"cache_implementation": "static"},
    }
    reference: dict[str, torch.Tensor] = {}
    result: dict = {}
    for size, mesh in meshes.items():
        config.decode_implementation = "torch"  # the kernels are made for 16-bit numbers
        model = build(config, mesh, torch.float32, device)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        reference.setdefault("logits", logits)
        result[str(size)] = {"logits_difference": (logits - reference["logits"]).abs().max().item(), "same": {}}
        for way, extra in ways.items():
            tokens = model.generate(ids, attention_mask=mask, **options, **extra)
            reference.setdefault("tokens", tokens)
            result[str(size)]["same"][way] = torch.equal(tokens, reference["tokens"])
        del model
        config.decode_implementation = "auto"
        model = build(config, mesh, torch.bfloat16, device)
        before = captured_decodes["fused"]
        output = model.generate(  # one sequence, so that the kernels are those of the decode part
            ids[:1], **options, **ways["static, captured"], output_logits=True, return_dict_in_generate=True
        )
        tokens, logits = output.sequences[0, ids.shape[1] :], torch.cat(output.logits)
        reference.setdefault("tokens16", tokens)
        reference.setdefault("logits16", logits)
        same = int((tokens == reference["tokens16"]).int().cumprod(0).sum())
        compared = slice(min(same + 1, new_tokens))  # the logits behind equal tokens
        difference = (logits - reference["logits16"])[compared].pow(2).mean().sqrt()
        result[str(size)]["bfloat16"] = {
            "step": "fused" if captured_decodes["fused"] > before else "modules",
            "tokens_before_the_first_difference": same,
            "logits_ratio": (difference / reference["logits16"][compared].pow(2).mean().sqrt()).item(),
        }
        del model
    return {
        "layers": config.num_hidden_layers,
        "logits_std": reference["logits"].std().item(),
        "new_tokens": new_tokens,
        "sizes": result,
    }


def measure_compiled(config: MLRAConfig, mesh, new_tokens: int, device: torch.device) -> dict:
    """Greedy tokens with the library's compiled decoding against plain calls, on this rank's share."""
    model = build(config, mesh, torch.float32, device)
    model.config.decode_implementation = "torch"
    ids = torch.arange(1, 25, device=device)[None]
    options = {"max_new_tokens": new_tokens, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **options, disable_compile=True)
    started = time.perf_counter()
    compile_config = transformers.CompileConfig(fullgraph=True, mode="reduce-overhead")
    compile_config._compile_all_devices = True
    try:
        compiled = model.generate(ids, **options, compile_config=compile_config)
    except Exception as error:  # whatever the compiler raises is the result
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"same": torch.equal(compiled, expected), "seconds": time.perf_counter() - started}


def measure_projection_forms(config: MLRAConfig, mesh, dtype: torch.dtype, replays: int, device: torch.device) -> dict:
    """Query and output projections of ranks that keep branches: whole on every rank, or sharded and gathered.

    Whole: q = c_q W_qb, y = all-reduce(o W_o). Sharded: q = all-gather(c_q W_qb[rank]),
    y = all-reduce(reduce-scatter(o) W_o[rank]). Microseconds per layer, over different weights for every layer.
    """
    size, group, layers = mesh.size(), mesh.get_group(), config.num_hidden_layers
    rows, values = config.num_attention_heads * config.qk_head_dim, config.num_attention_heads * config.v_head_dim

    def weights(*shape):
        return [torch.randn(shape, dtype=dtype, device=device).mul_(0.02) for _ in range(layers)]

    def run_form(whole: bool, batch: int) -> float:
        share = 1 if whole else size
        query_weights = weights(rows // share, config.q_lora_rank)
        output_weights = weights(config.hidden_size, values // share)
        latent = torch.randn(batch, config.q_lora_rank, dtype=dtype, device=device)
        partial = torch.randn(batch, values, dtype=dtype, device=device)

        def call():
            for query_weight, output_weight in zip(query_weights, output_weights, strict=True):
                query = nn.functional.linear(latent, query_weight)
                heads = partial
                if not whole:
                    gathered = query.new_empty(size * batch, query.shape[1])
                    distributed.all_gather_into_tensor(gathered, query, group=group)
                    query = gathered.view(size, batch, -1).transpose(0, 1).reshape(batch, -1)
                    heads = partial.new_empty(batch, values // size)
                    parts = partial.view(batch, size, -1).transpose(0, 1).contiguous()
                    distributed.reduce_scatter_tensor(heads, parts.flatten(0, 1), group=group)
                distributed.all_reduce(nn.functional.linear(heads, output_weight), group=group)

        return median_time(call, device, replays) / layers

    return {
        str(batch): {"whole_us": run_form(True, batch), "sharded_us": run_form(False, batch)} for batch in (1, 16, 128)
    }


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
    try:
        measure_all(args, configs, token_configs, sizes, device)
    finally:
        distributed.destroy_process_group()


def measure_all(
    args: argparse.Namespace, configs: dict, token_configs: dict, sizes: list[int], device: torch.device
) -> None:
    world, rank = distributed.get_world_size(), distributed.get_rank()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    meshes = {size: None for size in sizes if size == 1}
    for size in sizes:
        if size > 1:
            mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=(f"side{size}", f"tp{size}"))
            meshes[size] = mesh[f"tp{size}"]
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
    results["runs"].append(
        {
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
    )
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
    if rank == 0 and plt is not None and results["decode"]:
        print(plot(results, args.output.with_suffix(".png")))


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


def plot(results: dict, file: Path) -> Path:
    """Time of a step against context, one line per model and size; beside it the attention kernel's time per layer."""
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
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
    figure.savefig(file, dpi=120)
    return file
