"""python -m tests.serving.fused_engine FOLDER NUMBER...: an engine that decodes so many requests at a time fused, in
Triton's interpreter; for `test_fused`, as that is chosen when a process starts.

Reads prompts, prints what is told of the choice and, as JSON, the tokens of two rounds and how often so many requests
ran fused. The numbers stand in place of the sizes of CUDA graphs; as on a GPU, weights stay as they are loaded.
"""

import json
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", TRITON_INTERPRET="1")


def main(folder: str, *numbers: str) -> None:
    from vllm import LLM, _custom_ops

    from mlra_vllm import fused
    from tests.serving.models import ask, tokens

    _custom_ops._supports_onednn = False
    fused.graph_sizes = lambda vllm_config: [int(number) for number in numbers]
    engine = LLM(
        folder, dtype="float16", enforce_eager=True, kv_cache_memory_bytes=64 << 20, block_size=16,
        skip_tokenizer_init=True, max_num_batched_tokens=64,
    )  # fmt: skip
    prompts = json.load(sys.stdin)
    rounds = [tokens(ask(engine, prompts, max_tokens=6)) for _ in range(2)]
    ran = engine.apply_model(lambda model: sorted(model.fused.ran.items()))[0]
    print(json.dumps({"rounds": rounds, "ran": ran}))
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
