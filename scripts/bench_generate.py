"""End-to-end decoding speed of the 2.87B shapes with random weights, beside the library's own models, in one run.

    python -m scripts.bench_generate --output evals/results/generate_h200

Every model decodes through `generate()` with a static cache: MLRA by its captured loop, the library's Llama (the
paper's GQA sizes) and dense DeepSeek-V3 (the paper's MLA sizes) by the library's automatic compilation. A context is
filled with random rows instead of a prompt. Time per token is the difference between a long and a short call over the
difference of their lengths, so set-up, prefill and capture are left out. The roofline is the bytes a token must read
(weights once, cache rows in use once) over the read rate measured in the same run. With FP8 weights MLRA's prompts are
not timed: their products are the library's own, by a kernel that it loads from the Hub.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, count, positive_int
from scripts.variants import WEIGHTS

CONFIGURATION = Path(__file__).parents[1] / "configuration"


def check(args: argparse.Namespace) -> None:
    known = [*sorted(path.stem for path in CONFIGURATION.glob("*.json")), "llama_gqa", "deepseek_mla"]
    for name in args.models:
        if name not in known:
            raise UserError(f"unknown model {name!r}: choose from {', '.join(known)}")
    if args.user_calls and args.weights != "bfloat16":
        raise UserError(f"--user-calls are timed with weights of bfloat16, not {args.weights}")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_generate", __doc__)
    parser.add_argument("--models", nargs="+", default=["mlra_4", "mla", "llama_gqa", "deepseek_mla"])
    parser.add_argument("--contexts", nargs="+", type=count, default=[2048, 32768, 131072])
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[1, 16])
    parser.add_argument("--prefill", nargs="*", type=positive_int, default=[8192, 32768], help="prompt lengths")
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16", help="of MLRA's linear layers")
    parser.add_argument("--cache-rows", choices=("plain", "fp8"), default="plain", help="format of MLRA's cached rows")
    parser.add_argument("--skip", nargs="*", default=[], help="model:batch:context cases to leave out")
    parser.add_argument("--user-calls", action="store_true", help="time what everybody calls instead (user_calls.py)")
    parser.add_argument("--only", default="", help="pattern that names of --user-calls must match")
    prompts = {"type": positive_int, "default": [128, 2048, 8192, 32768]}
    parser.add_argument("--prompts", nargs="+", **prompts, help="prompt lengths of --user-calls")
    parser.add_argument("--commit", help="what to call the commit where there is no repository")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json")
    args = parser.parse_args(argv)
    args.command_line = sys.argv[1:] if argv is None else argv
    return cli.run("scripts.bench_generate:benchmark", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from evals.common import commit
from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.generation_mlra import captured_decodes
from modeling_mlra.library_mlra import CACHE
from scripts import user_calls
from scripts.fp8 import multiply_plainly, to_fp8
from scripts.gpu_times import read_ceiling

SHARED = {
    "vocab_size": 50304,
    "hidden_size": 3072,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama_gqa(max_positions: int):
    """The library's Llama with the paper's GQA sizes: 24 query and 8 key heads of 128."""
    return LlamaForCausalLM, LlamaConfig(
        **SHARED, intermediate_size=9560, num_key_value_heads=8, head_dim=128, max_position_embeddings=max_positions
    )


def deepseek_mla(max_positions: int):
    """The library's DeepSeek-V3 made dense, with the paper's MLA sizes."""
    return DeepseekV3ForCausalLM, DeepseekV3Config(
        **SHARED,
        intermediate_size=9448,
        num_key_value_heads=24,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=24,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        max_position_embeddings=max_positions,
    )


PEERS = {"llama_gqa": llama_gqa, "deepseek_mla": deepseek_mla}


def build(name: str, max_positions: int, cache_rows: str = "plain") -> nn.Module:
    """A bfloat16 model on the GPU with N(0, 0.02) weights; of MLRA with cached rows of the named format."""
    if name in PEERS:
        model_class, config = PEERS[name](max_positions)
    else:
        model_class, config = MLRAForCausalLM, MLRAConfig.from_json_file(CONFIGURATION / f"{name}.json")
        config.eos_token_id = config.pad_token_id = config.bos_token_id = None
        config.cache_row_format = cache_rows
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model.eval()


class FilledCache:
    """A static cache of `model` that can be set back to `context` random tokens."""

    def __init__(self, model, batch: int, context: int, room: int):
        config, self.context = model.config, context
        self.is_latent = isinstance(model, MLRAForCausalLM)
        if self.is_latent:
            self.cache = MLRACache(config, max_cache_len=context + room)
            widths = (1, config.kv_lora_rank), (1, config.qk_rope_head_dim)
        else:
            self.cache = StaticCache(config, max_cache_len=context + room)
            if hasattr(config, "kv_lora_rank"):
                widths = (1, config.kv_lora_rank), (1, config.qk_rope_head_dim)
            else:
                widths = ((config.num_key_value_heads, config.head_dim),) * 2
        one = [torch.zeros(batch, heads, 1, width, dtype=model.dtype, device="cuda") for heads, width in widths]
        for index, layer in enumerate(self.cache.layers):
            self.cache.update(*one, index)
            if self.is_latent and layer.format.scales:
                layer.keys, layer.values = torch.randn_like(layer.keys), torch.randn_like(layer.values)
                continue
            for tensor in (layer.rows,) if self.is_latent else (layer.keys, layer.values):
                tensor.normal_()
        self.bytes_per_token = sum(tensor[0, :, 0].nbytes for tensor in one) * len(self.cache.layers)
        if self.is_latent:
            self.bytes_per_token = self.cache.bytes_per_token()

    def rewind(self):
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        return self.cache


def matmul_rate() -> float:
    """Measured bf16 matrix-product rate in FLOP/s on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)


def seconds(function, repeats: int = 10) -> float:
    """Median seconds of `function` on the GPU."""
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def time_per_token(model, batch: int, context: int, do_sample: bool, repeats: int = 5) -> dict:
    """Median milliseconds per token in steady state, and the seconds of the first call (compilation, capture).

    The long call is longer by 32 to 256 tokens, about half a second, so that what calls differ by otherwise is small.
    """
    short, most = 16, 256
    filled = FilledCache(model, batch, context, room=short + most + 2)
    ids = torch.ones(batch, context + 1, dtype=torch.long, device="cuda")

    def generate(new_tokens: int) -> float:
        cache = filled.rewind()
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=new_tokens, do_sample=do_sample, **{CACHE: cache})
        torch.cuda.synchronize()
        return time.perf_counter() - began

    before = dict(captured_decodes)
    first = generate(short)
    generate(short + 32)
    rough = max((generate(short + 32) - generate(short)) / 32, 1e-4)
    longer = min(most, max(32, round(0.5 / rough)))
    per_token = [(generate(short + longer) - generate(short)) / longer for _ in range(repeats)]
    ran = [kind for kind, count in captured_decodes.items() if count > before.get(kind, 0)]
    return {
        "ms_per_token": statistics.median(per_token) * 1e3,
        "tokens_timed": longer,
        "first_call_s": first,
        "loop": f"captured, {ran[0]}" if ran else "library, automatic compilation",
        "cache_bytes_per_token": filled.bytes_per_token,
    }


@torch.no_grad()
def prefill(model, length: int, peak: float) -> dict:
    """Seconds of one forward over a prompt and its share of the matrix-product rate; FLOPs of the expanded form."""
    config = model.config
    ids = torch.ones(1, length, dtype=torch.long, device="cuda")
    elapsed = seconds(lambda: model(ids, logits_to_keep=1, use_cache=True).logits, repeats=3)
    linear = 2 * length * sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    heads = config.num_attention_heads * config.num_branches
    scores = length * length * heads * (config.qk_head_dim + config.v_head_dim) * config.num_hidden_layers  # causal
    return {
        "length": length,
        "s": elapsed,
        "tokens_per_s": length / elapsed,
        "share_of_matmul_rate": (linear + scores) / elapsed / peak,
        "attention": config._attn_implementation,
    }


@torch.no_grad()
def prefill_backends(length: int, heads: int = 96) -> dict[str, float | str]:
    """TFLOP/s of each backend of scaled_dot_product_attention on causal keys of width 192 and values of 128."""
    query, key = (torch.randn(1, heads, length, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    value = torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)
    padded = nn.functional.pad(value, (0, 64))
    flops = length * length * heads * (192 + 128)
    results: dict[str, float | str] = {}
    for name, backend, values in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION, value),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION, value),
        ("flash, values padded to 192", SDPBackend.FLASH_ATTENTION, padded),
    ):
        with sdpa_kernel(backend):
            try:
                elapsed = seconds(
                    lambda v=values: nn.functional.scaled_dot_product_attention(query, key, v, is_causal=True),
                    repeats=3,
                )
                results[name] = flops / elapsed / 1e12
            except RuntimeError as error:
                results[name] = str(error).splitlines()[0]
    return results


def benchmark(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device and found none")
    rate, peak = read_ceiling() * 1e9, matmul_rate()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": "python -m scripts.bench_generate " + " ".join(arguments.command_line),
        "commit": arguments.commit or commit() or "unknown",
        "read_ceiling_GB_s": rate / 1e9,
        "matmul_rate_TFLOP_s": peak / 1e12,
    }
    if arguments.user_calls:
        report["user_calls"] = []
    else:
        backends = {str(length): prefill_backends(length) for length in arguments.prefill}
        report |= {"prefill_backends_TFLOP_s": backends, "decode": [], "prefill": []}
    print(f"read ceiling {rate / 1e9:.0f} GB/s, matrix products {peak / 1e12:.0f} TFLOP/s")
    for name in tqdm(arguments.models, desc="models", disable=None):
        model = build(name, max(*arguments.contexts, *arguments.prompts) + 128, arguments.cache_rows)
        fp8 = arguments.weights != "bfloat16" and isinstance(model, MLRAForCausalLM)
        if fp8:
            to_fp8(model, WEIGHTS[arguments.weights])
            multiply_plainly()
        if arguments.user_calls:

            def keep(case: dict, name: str = name) -> None:
                report["user_calls"].append({"model": name, **case})
                tqdm.write(json.dumps(report["user_calls"][-1]))
                write(report, arguments.output)

            user_calls.measure(model, model.config.vocab_size, arguments.prompts, arguments.only, keep)
            del model
            torch.cuda.empty_cache()
            continue
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        for batch in arguments.batch_sizes:
            for context in arguments.contexts:
                if f"{name}:{batch}:{context}" in arguments.skip:
                    continue
                for do_sample in (False, True) if isinstance(model, MLRAForCausalLM) and batch == 1 else (False,):
                    case = {"model": name, "batch": batch, "context": context, "sampling": do_sample}
                    case["weights"] = arguments.weights if fp8 else "bfloat16"
                    try:
                        case |= time_per_token(model, batch, context, do_sample)
                    except Exception as error:  # one model's failure leaves the others' figures
                        case["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    else:
                        must_read = weight_bytes + batch * context * case["cache_bytes_per_token"]
                        case["roofline_ms"] = must_read / rate * 1e3
                        case["share_of_roofline"] = case["roofline_ms"] / case["ms_per_token"]
                    report["decode"].append(case)
                    tqdm.write(json.dumps(case))
                    write(report, arguments.output)
                    torch.cuda.empty_cache()
        if isinstance(model, MLRAForCausalLM) and not fp8:
            for length in arguments.prefill:
                report["prefill"].append({"model": name, **prefill(model, length, peak)})
                tqdm.write(json.dumps(report["prefill"][-1]))
        del model
        torch.cuda.empty_cache()
        write(report, arguments.output)


def write(report: dict, output: Path | None) -> None:
    """OUTPUT.json as far as it goes, after every case, so that a run cut short keeps its figures."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
