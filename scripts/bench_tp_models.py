"""Released architectures with random weights and a filled cache, of which every rank creates its own share."""

import gc
import inspect
import json
import zlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.tensor_parallel import apply_tensor_parallelism

from evals.common import CONFIGURATIONS
from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.tensor_parallel_mlra import local_sizes
from scripts.cli import UserError

WIDE = {"hidden_size": 8192, "intermediate_size": 24576, "num_hidden_layers": 4, "num_attention_heads": 64}


def read_config(name: str, layers: int | None) -> MLRAConfig:
    """A released architecture, "wide_" before its name for a stack of four layers of 64 heads."""
    file = CONFIGURATIONS / f"{name.removeprefix('wide_')}.json"
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
    model: MLRAForCausalLM, batch: int, context: int, capacity: int, device: torch.device, latents: int | None = None
) -> tuple[MLRACache, int]:
    """A static cache with `context` random rows of this rank's share (or of so many latents), and the bytes its
    allocation took."""
    config = model.config
    width = (latents or local_sizes(model.model.layers[0].self_attn)[0]) * config.latent_head_dim
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
