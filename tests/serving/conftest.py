"""Engines for the tests of the vLLM plugin: one at a time, in this process where it has one rank."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # decode runs as torch here, as it does for a user of the CPU build
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_WORKER_MULTIPROC_METHOD="spawn",
)

import pytest  # noqa: E402
from vllm import LLM  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

CACHE_BYTES = 64 << 20


@pytest.fixture
def start(monkeypatch):
    """`start(folder, **settings)`: an engine in float32, without compilation and with 64 MiB for its cache."""
    engines = []

    def start_engine(folder, **settings) -> LLM:
        assert not engines, "one engine at a time"
        ranks = settings.get("tensor_parallel_size", 1) * settings.get("pipeline_parallel_size", 1)
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": CACHE_BYTES,
            "block_size": 16,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
        }
        engines.append(LLM(str(folder), **{**defaults, **settings}))
        return engines[0]

    yield start_engine
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
