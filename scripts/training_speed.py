"""What a training step costs and what a device can do: parameters, FLOPs of a token, rate of matrix products."""

import math
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model, tied ones once, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def training_flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Model FLOPs of forward and backward per token of a sequence of `length`: 6 P + 3 A.

    P counts the weights of matrix products (all but norms and, unless tied, the input embedding). A is attention:
    2 FLOPs for every query, key it may see (on average (length + 1) / 2), score head and element of key and value.
    A score head is a query head in one branch. Recomputation (gradient checkpointing) is not counted.
    """
    config = model.config
    input_embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is input_embedding
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "norm" not in name and (tied or parameter is not input_embedding)
    )
    if config.model_type == "mlra":
        score_heads = config.num_attention_heads * config.num_branches
        widths = config.qk_head_dim + config.v_head_dim
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        score_heads, widths = config.num_attention_heads, 2 * head_dim
    attention = config.num_hidden_layers * 2 * score_heads * widths * (length + 1) / 2
    return 6 * weights + 3 * attention


def matmul_rate(device: torch.device, repeats: int = 5) -> float:
    """Measured bfloat16 matmul rate of `device` in FLOP/s: the best of a few products of square matrices."""
    size = 8192 if device.type == "cuda" else 256

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        for _ in range(10):
            torch.matmul(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return 10 * 2 * size**3 / best
