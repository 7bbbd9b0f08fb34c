"""Served by vLLM: MLRA beside vLLM's own Llama (the paper's GQA sizes) and dense DeepSeek-V3 (the paper's MLA sizes).

    python -m scripts.bench_serving --output evals/results/serving_h200.json
    python -m scripts.bench_serving --dummy-rows --cases 16:32768:64 8:131072:64 --first-tokens 32768 \\
        --output evals/results/serving_h200.json
    python -m scripts.bench_serving --tensor-parallel-size 4 --dummy-rows --cases 1:2048:256 32:65536:64 \\
        --output evals/results/serving_h200_x4.json

Weights are random (`load_format="dummy"`), prompts random tokens, and prefix caching is off. A case is
STREAMS:PROMPT:NEW, so many prompts of so many tokens, all there at once, each continued greedily by NEW tokens. It
runs once for its first tokens and once in full; the difference is what decoding takes. A first token is timed of one
prompt after another, alone. How many tokens the cache holds is vLLM's own count of blocks. An existing file is added
to: what is measured again replaces what it holds.
"""

import argparse
import json
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, positive_int, read_json

CONFIGURATION = Path(__file__).parents[1] / "configuration"
PEERS = ("llama_gqa", "deepseek_mla")
DUMMY_ROWS = {
    "kv_connector": "DummyRows",
    "kv_connector_module_path": "scripts.bench_serving_rows",
    "kv_role": "kv_both",
}
CASES = ["1:2048:256", "32:512:256", "16:32768:64", "8:131072:64"]


def case(text: str) -> tuple[int, int, int]:
    """STREAMS:PROMPT:NEW as three positive numbers, NEW at least 2."""
    streams, prompt, new = (positive_int(part) for part in text.split(":"))
    if new < 2:
        raise ValueError("NEW must be at least 2")
    return streams, prompt, new


def check(args: argparse.Namespace) -> None:
    known = [*sorted(path.stem for path in CONFIGURATION.glob("*.json")), *PEERS]
    for name in args.models:
        if name not in known:
            raise UserError(f"unknown model {name!r}: choose from {', '.join(known)}")
    if args.output.exists():
        read_json(args.output)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.bench_serving", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument(
        "--models", nargs="+", default=["mlra_4", "mla", *PEERS], help="names in configuration/, peers"
    )
    parser.add_argument("--cases", nargs="+", type=case, default=[case(text) for text in CASES])
    parser.add_argument(
        "--first-tokens",
        nargs="+",
        type=positive_int,
        default=[],
        help="lengths of prompts to time the first token of",
    )
    parser.add_argument("--first-token-runs", type=positive_int, default=20, help="prompts of each of these lengths")
    parser.add_argument(
        "--dummy-rows", action="store_true", help="prompts of the cases are not run: their rows are made up"
    )
    parser.add_argument("--tensor-parallel-size", type=positive_int, default=1)
    parser.add_argument("--layers", type=positive_int, help="decoder layers (default: the architecture's)")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--repeats", type=positive_int, default=3, help="the median of so many runs is reported")
    parser.add_argument("--commit", help="what to call the commit where there is no repository")
    args = parser.parse_args(argv)
    args.command_line = sys.argv[1:] if argv is None else argv
    return cli.run("scripts.bench_serving:benchmark", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import datetime
import math
import statistics
import tempfile
import time

import torch
import transformers
import vllm
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

from evals.common import commit, write_json
from modeling_mlra import MLRAConfig
from scripts import bench_generate


def write_configuration(name: str, folder: str, max_positions: int, layers: int | None) -> None:
    """A folder that vLLM serves with random weights."""
    if name in PEERS:
        model_class, config = bench_generate.PEERS[name](max_positions)
        config.architectures = [model_class.__name__]
    else:
        config = MLRAConfig.from_json_file(CONFIGURATION / f"{name}.json")
        config.max_position_embeddings = max_positions
    if layers is not None:
        config.num_hidden_layers = layers
    config.save_pretrained(folder)


def seconds(engine: LLM, prompts: list[dict], new_tokens: int, **extra) -> float:
    """From handing over all prompts to the last token."""
    settings = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **extra)
    start = time.perf_counter()
    outputs = engine.generate(prompts, settings, use_tqdm=False)
    elapsed = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
    return elapsed


def random_prompts(vocab_size: int, number: int, length: int) -> list[dict]:
    ids = torch.randint(1, vocab_size, (number, length), generator=torch.Generator().manual_seed(number + length))
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def time_first_tokens(engine: LLM, vocab_size: int, length: int, args: argparse.Namespace) -> dict:
    """Of prompts that run, one after another: the median of the first token's time, and what 99 % of them keep to."""
    runs = args.first_token_runs
    prompts, extra = random_prompts(vocab_size, runs, length), {}
    if args.dummy_rows:
        extra["extra_args"] = {"kv_transfer_params": {"prefill": True}}
    seconds(engine, prompts[:1], 1, **extra)
    times = sorted(seconds(engine, [prompt], 1, **extra) for prompt in prompts)
    return {"median_s": statistics.median(times), "p99_s": times[math.ceil(0.99 * runs) - 1], "runs": runs}


def time_case(engine: LLM, vocab_size: int, streams: int, length: int, new: int, repeats: int) -> dict:
    """One case: medians of the first tokens' time and of the whole, and what follows from them."""
    prompts = random_prompts(vocab_size, streams, length)
    seconds(engine, prompts, 2)
    first = statistics.median(seconds(engine, prompts, 1) for _ in range(repeats))
    whole = statistics.median(seconds(engine, prompts, new) for _ in range(repeats))
    return {
        "first_tokens_s": first,
        "whole_s": whole,
        "between_tokens_ms": (whole - first) / (new - 1) * 1e3,
        "tokens_per_s": streams * new / whole,
        "decode_tokens_per_s": streams * (new - 1) / (whole - first),
    }


def measure_model(name: str, args: argparse.Namespace) -> dict:
    """All cases of one model by one engine."""
    longest = max([prompt + new for _, prompt, new in args.cases] + [length + 1 for length in args.first_tokens])
    settings = {"dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": longest}
    settings |= {"enable_prefix_caching": False, "tensor_parallel_size": args.tensor_parallel_size, **args.engine}
    if args.dummy_rows:
        settings["kv_transfer_config"] = DUMMY_ROWS
    with tempfile.TemporaryDirectory() as folder:
        write_configuration(name, folder, longest, args.layers)
        start = time.perf_counter()
        engine = LLM(folder, **settings)
        started = time.perf_counter() - start
        config = engine.llm_engine.vllm_config
        cache = config.cache_config
        result: dict = {"cache_tokens": cache.num_gpu_blocks * cache.block_size, "block_size": cache.block_size}
        result["start_s"] = started
        print(f"{name:14} starts in {started:.1f} s; the cache holds {result['cache_tokens']:,} tokens", flush=True)
        vocab_size = config.model_config.hf_config.vocab_size
        for streams, prompt, new in args.cases:
            label = f"{streams}:{prompt}:{new}"
            result[label] = time_case(engine, vocab_size, streams, prompt, new, args.repeats)
            print(f"{name:14} {label:16} {result[label]['between_tokens_ms']:8.2f} ms between tokens", flush=True)
        for length in args.first_tokens:
            found = time_first_tokens(engine, vocab_size, length, args)
            result[f"first token behind {length}"] = found
            print(f"{name:14} first token behind {length}: {found['median_s'] * 1e3:.1f} ms", flush=True)
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
    return result


def benchmark(args: argparse.Namespace) -> None:
    results = read_json(args.output) if args.output.exists() else {"runs": [], "models": {}}
    run = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or commit(),
        "device": current_platform.get_device_name(),
        "devices": args.tensor_parallel_size,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python -m scripts.bench_serving", *args.command_line]),
    }
    for name in args.models:
        results["models"].setdefault(name, {}).update(measure_model(name, args))
        if run not in results["runs"]:
            results["runs"].append(run)
        write_json(args.output, results)
