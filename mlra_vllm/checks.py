"""What the plugin cannot serve. No validation of vLLM's reaches an attention layer of one's own, so it stands here."""

from vllm.config import VllmConfig

CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8")


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse a setting that would be ignored or give wrong tokens.

    Raises:
        ValueError: one line that names the setting and what works.
    """
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype={cache_dtype!r} is not supported for MLRA: give one of {CACHE_DTYPES}")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            raise ValueError(
                f"{name}={size} is not supported for MLRA: tensor parallelism splits its cache already; leave it at 1"
            )
    if window := getattr(config, "sliding_window", None):
        raise ValueError(f"sliding_window={window} is not supported for MLRA: every token attends to all before it")
    kind = config.rope_parameters["rope_type"]
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type={kind!r} is not supported in vLLM: its frequencies depend on the longest sequence of the "
            "batch; give 'yarn', 'linear', 'llama3' or 'default'"
        )
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative decoding is not supported for MLRA in vLLM: leave speculative_config out")
    if vllm_config.lora_config is not None and parallel.tensor_parallel_size > 1:
        raise ValueError(
            f"LoRA with tensor_parallel_size={parallel.tensor_parallel_size} is not supported for MLRA: serve the "
            "adapter on one GPU per replica, or merge it into the weights"
        )
