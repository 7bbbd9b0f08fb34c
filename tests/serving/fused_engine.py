"""python -m tests.serving.fused_engine FOLDER RANKS: an engine that decodes one or three requests at a time fused, in
Triton's interpreter; for `test_fused`, as that is chosen when a process starts.

Reads prompts, prints what is told of the choice and, as JSON, the tokens of two rounds and how often so many requests
ran fused on each rank.
"""

import json
import os
import sys
from contextlib import nullcontext

os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_WORKER_MULTIPROC_METHOD="spawn", TRITON_INTERPRET="1")

from vllm import LLM, _custom_ops  # noqa: E402

from mlra_vllm import fused  # noqa: E402

# In every worker, which imports this file for `Worker`: weights stay as they are loaded, as on a GPU, and there are
# sizes of CUDA graphs
_custom_ops._supports_onednn = False
fused.graph_sizes = lambda vllm_config: [1, 3]
# What would be compiled ahead runs, of no rows
fused.compiled_ahead = lambda device: nullcontext(True)


class Worker:
    """What vLLM's workers can be asked beside their own."""

    def numbers_that_ran_fused(self) -> list:
        return sorted(self.get_model().fused.ran.items())


def main(folder: str, ranks: str) -> None:
    from tests.serving.models import ask, tokens

    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(int(ranks)))
    if int(ranks) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = LLM(
        folder, tensor_parallel_size=int(ranks), dtype="float16", enforce_eager=True, block_size=16,
        kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True, max_num_batched_tokens=64,
        max_num_seqs=5,
        worker_extension_cls="tests.serving.fused_engine.Worker",
    )  # fmt: skip
    prompts = json.load(sys.stdin)
    rounds = [tokens(ask(engine, prompts, max_tokens=6)) for _ in range(2)]
    print(json.dumps({"rounds": rounds, "ran": engine.collective_rpc("numbers_that_ran_fused")}))
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
