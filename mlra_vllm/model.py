"""The model with vLLM's layers, read top to bottom: the counterpart of `modeling_mlra.modeling_mlra`.

A rank keeps the latents, heads and cache rows that `modeling_mlra.tensor_parallel_mlra` gives it: its attention
projections are ordinary linear layers of the rank's own sizes, loaded with its slices, and one all-reduce behind the
output projection adds head shards and branches.

Shapes: T tokens of the batch, d hidden size; L latents and G head groups of this rank, H query heads per group, R
latent width, N / E / V widths of a head's positionless key, RoPE key and value.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from modeling_mlra.rotary_mlra import MLRARotaryEmbedding, apply_rotary_pos_emb
from modeling_mlra.tensor_parallel_mlra import SPLIT_DIMENSIONS, TensorParallelLayout, check_tensor_parallel_size

from .attention import MLRACacheAttention
from .checks import check_supported
from .fused import FusedDecode

Weights = Iterable[tuple[str, torch.Tensor]]


def load_parameter(parameter: nn.Parameter, weight: torch.Tensor, *shard: int) -> None:
    """Copy a weight by the parameter's own loader, through which online quantization sees it, else plainly."""
    loader = getattr(parameter, "weight_loader", None)
    if loader is None:
        assert parameter.shape == weight.shape, (parameter.shape, weight.shape)
        parameter.data.copy_(weight)
    else:
        loader(parameter, weight, *shard)


def rank_slice(weight: torch.Tensor, name: str, layout: TensorParallelLayout, rank: int) -> torch.Tensor:
    """What `rank` keeps of the attention's parameter `name` (see `SPLIT_DIMENSIONS`)."""
    _, branches, heads = layout
    place = (rank // (branches * heads), rank // heads % branches, rank % heads)
    for size, index, dimension in zip(layout, place, SPLIT_DIMENSIONS[name], strict=True):
        if dimension is not None:
            weight = weight.chunk(size, dimension)[index]
    return weight


class MLRAMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, config, quant_config, prefix: str):
        super().__init__()
        widths = [config.intermediate_size] * 2
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, widths, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = get_act_and_mul_fn(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]

    def load_weights(self, weights: Weights) -> Iterator[str]:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            layer, _, kind = name.partition(".")
            if layer in ("gate_proj", "up_proj"):
                name = f"gate_up_proj.{kind}"
                load_parameter(parameters[name], weight, int(layer == "up_proj"))
            else:
                load_parameter(parameters[name], weight)
            yield name


class MLRALatentRMSNorm(nn.Module):
    """One RMSNorm per latent, weights `[L, R]`."""

    def __init__(self, num_latents: int, latent_dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_latents, latent_dim))
        self.variance_epsilon = eps

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        split = latents.unflatten(-1, self.weight.shape)
        return (self.weight * nn.functional.rms_norm(split, split.shape[-1:], None, self.variance_epsilon)).flatten(-2)


class MLRALatentUpProjection(nn.Module):
    """Keys and values of every latent's heads, `[L*H*(N+V), R]`: no linear layer, attention takes it apart."""

    def __init__(self, rows: int, latent_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, latent_dim), requires_grad=False)


class MLRAAttention(nn.Module):
    """One rank's share of the attention (paper, section 3)."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.layout = check_tensor_parallel_size(config, get_tensor_model_parallel_world_size())
        self.rank = get_tensor_model_parallel_rank()
        shares = self.layout.groups * self.layout.branches
        latents = config.num_latent_heads // shares
        heads = config.num_attention_heads // (self.layout.groups * self.layout.heads)
        self.qk_dims = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.alpha_q, self.alpha_kv, alpha_attn = config.alphas

        def linear(name: str, inputs: int, outputs: int) -> ReplicatedLinear:
            return ReplicatedLinear(inputs, outputs, bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}")

        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.q_a_proj = linear("q_a_proj", hidden, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = linear("q_b_proj", config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj = linear("kv_a_proj", hidden, latents * config.latent_head_dim)
        self.k_rope_proj = linear("k_rope_proj", hidden, config.qk_rope_head_dim)
        self.kv_a_layernorm = MLRALatentRMSNorm(latents, config.latent_head_dim, eps)
        of_latent = config.num_attention_heads // config.num_head_groups // self.layout.heads
        rows = latents * of_latent * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = MLRALatentUpProjection(rows, config.latent_head_dim)
        self.g_proj = linear("g_proj", hidden, heads * config.v_head_dim) if config.attn_output_gate else None
        self.o_proj = linear("o_proj", heads * config.v_head_dim, hidden)
        branches = config.num_branches // self.layout.branches
        self.attn = MLRACacheAttention(vllm_config, latents, branches, alpha_attn, f"{prefix}.attn")

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q_latent = self.q_a_layernorm(self.q_a_proj(hidden_states)[0]) * self.alpha_q
        latents = self.kv_a_layernorm(self.kv_a_proj(hidden_states)[0]) * self.alpha_kv  # [T, L*R]
        k_rope = self.k_rope_proj(hidden_states)[0].unsqueeze(1)  # [T, 1, E]
        query = self.q_b_proj(q_latent)[0].unflatten(-1, (-1, sum(self.qk_dims)))
        q_nope, q_rope = query.split(self.qk_dims, dim=-1)  # [T, G*H, N], [T, G*H, E]
        rotated = apply_rotary_pos_emb(torch.cat([q_rope, k_rope], dim=1).unsqueeze(0), cos, sin)[0]
        q_rope, k_rope = rotated.split([q_rope.shape[1], 1], dim=1)
        query, rows = torch.cat([q_rope, q_nope], dim=-1), self.attn.row_format.join(latents, k_rope.squeeze(1))

        output = self.attn(query, rows, self.kv_b_proj.weight).flatten(1)  # [T, G*H*V]
        if self.g_proj is not None:
            output = torch.sigmoid(self.g_proj(hidden_states)[0]) * output
        output = self.o_proj(output)[0]
        return output if self.layout == (1, 1, 1) else tensor_model_parallel_all_reduce(output)

    def load_weights(self, weights: Weights) -> Iterator[str]:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            layer = name.partition(".")[0]
            load_parameter(parameters[name], rank_slice(weight, layer, self.layout, self.rank))
            yield name


class MLRADecoderLayer(nn.Module):
    """Pre-norm residual block: attention, then MLP; the residual sum is taken inside the norms."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = MLRAAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = MLRAMLP(config, vllm_config.quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, residual, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            hidden_states, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, cos, sin)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class MLRAModel(nn.Module):
    """The decoder stack: token ids or embeddings `[T]` or `[T, d]` to hidden states, or its part in a pipeline."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        self.embed_tokens = PPMissingLayer()
        if first or (last and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: MLRADecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if last else PPMissingLayer()
        self.rotary_emb = MLRARotaryEmbedding(config)
        names = ["hidden_states", "residual"]
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(names, config.hidden_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        cos, sin = self.rotary_emb(hidden_states, positions.unsqueeze(0))
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(hidden_states, residual, cos, sin)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        return self.norm(hidden_states, residual)[0]


class MLRAForCausalLM(nn.Module, SupportsLoRA, SupportsPP):
    """The decoder stack with the (tied) output embedding.

    Raises:
        ValueError: for settings that cannot be served (`checks`), and for tensor parallel sizes that cannot split it.
    """

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_supported(vllm_config)
        config = self.config = vllm_config.model_config.hf_config
        self.model = MLRAModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.fused = FusedDecode(self.model, vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if not torch.compiler.is_compiling():
            hidden_states = self.fused(input_ids, positions, inputs_embeds)
            if hidden_states is not None:
                return hidden_states
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Weights) -> set[str]:
        if self.config.tie_word_embeddings:
            weights = ((name, weight) for name, weight in weights if not name.startswith("lm_head."))
        return AutoWeightsLoader(self).load_weights(weights)
