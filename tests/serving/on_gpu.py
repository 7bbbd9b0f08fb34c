"""On GPUs: whether vLLM chooses tokens whose float32 logits, by transformers, are the largest or nearly so.

    python -m tests.serving.on_gpu --output serving_tokens.json
    python -m tests.serving.on_gpu --output serving_tokens.json --tensor-parallel-size 4 --cases mlra_4 mla

Small random models of the released widths, in bfloat16, by the fused kernels where they run: prompts of 1 to 1,500
tokens, all at once, in steps of at most 1,024, so that some decode beside prompts; then again from cached prefixes.
Weights or rows in eight bits move logits by more than rounding: what they stay within is said, and has a limit too.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch  # noqa: E402
from vllm import LLM  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from tests.models import random_ids, tiny_model  # noqa: E402
from tests.serving.models import RELEASED, ask, margins, tokens  # noqa: E402

SIZES = {
    **RELEASED,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
LENGTHS = (1, 9, 64, 200, 513, 1000, 1500)
NEW_TOKENS = 48


class Case(NamedTuple):
    """A model and how it is served; margins are in standard deviations of the logits, of the worst token."""

    variant: str
    gated: bool = False
    engine: dict[str, Any] = {}
    limit: float = 0.1


CASES = {
    "mla": Case("mla"),
    "gla_2": Case("gla_2"),
    "gla_4": Case("gla_4"),
    "mlra_2 gated": Case("mlra_2", gated=True),
    "mlra_4": Case("mlra_4"),
    "mlra_4 modules": Case("mlra_4", engine={"enforce_eager": True}),
    "mlra_4 fp8 rows": Case("mlra_4", engine={"kv_cache_dtype": "fp8"}, limit=0.5),
    "mlra_2 gated, fp8 weights": Case("mlra_2", gated=True, engine={"quantization": "fp8"}, limit=0.5),
}


def random_model(case: Case):
    """In float32, with the weights that vLLM has in bfloat16; scores spread enough that attention picks some rows."""
    model = tiny_model(case.variant, attn_output_gate=case.gated, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
    return model


def check(case: Case, ranks: int, device: str, **engine_settings) -> dict:
    """The largest and the mean margin of both rounds, and whether all is well."""
    prompts = [random_ids(length, seed=length).tolist() for length in LENGTHS]
    prompts.append(prompts[-1][:600] + prompts[-2][:100])
    settings: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2 << 30}
    settings |= {"max_num_seqs": 16, "max_num_batched_tokens": 1024, "tensor_parallel_size": ranks}
    settings |= {**case.engine, **engine_settings}
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(case)
        model.save_pretrained(folder)
        engine = LLM(folder, **settings)
        rounds = [tokens(ask(engine, prompts, max_tokens=NEW_TOKENS)) for _ in range(2)]
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
    model = model.to(device)
    pairs = [pair for chosen in rounds for pair in zip(prompts, chosen, strict=True)]
    found = torch.cat([margins(model, prompt, new).cpu() for prompt, new in pairs])
    result = {"tokens": len(found), "not_the_largest": int((found > 0).sum()), "mean": found.mean().item()}
    return result | {"worst": found.max().item(), "limit": case.limit, "right": bool(found.max() < case.limit)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in args.cases:
        label = name if args.tensor_parallel_size == 1 else f"{name}, {args.tensor_parallel_size} ranks"
        try:
            results[label] = check(CASES[name], args.tensor_parallel_size, device, **args.engine)
        except Exception as error:
            results[label] = {"right": False, "error": f"{type(error).__name__}: {error}"[:500]}
        print(f"{label:32} {results[label]}", flush=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
