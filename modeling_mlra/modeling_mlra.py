"""Multi-Head Low-Rank Attention (MLRA) language model (arXiv 2603.02188, ICLR 2026), read top to bottom.

Prefill and training run the expanded form through the library's attention interface; decoding runs the absorbed form
on the latent cache (`attention_mlra`). Both use the same parameters.
"""

import torch
import transformers
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mlra import MAX_ABSORBED_QUERIES, absorbed_attention, expanded_attention, recompute_inputs
from .cache_mlra import MLRACache, check_prefix
from .configuration_mlra import MLRAConfig
from .device_mlra import on_device
from .generation_hooks_mlra import MLRAGenerationMixin
from .library_mlra import (
    CACHE,
    CACHE_NAMES,
    cache_of,
    is_paged,
    slice_logits_to_keep,
    takes_cache_by_any_name,
)
from .loss_mlra import chunked_causal_loss, has_plain_weight
from .masks_mlra import CacheRows, make_mask
from .paged_mlra import update_paged
from .rotary_mlra import MLRARotaryEmbedding, apply_rotary_pos_emb, at_least_float32
from .rows_mlra import dequantized, separate
from .stepped_mlra import FusedLayers, fused_forward
from .tensor_parallel_mlra import register_parallel_styles

register_parallel_styles()
# For smoothed losses the library's Trainer shifts the labels of the classes in this table alone, and compares every
# other model's logits with the token they were computed from. Its server knows a language model by it too.
transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mlra", "MLRAForCausalLM")


@use_kernel_forward_from_hub("RMSNorm")
class MLRARMSNorm(nn.Module):
    """Root-mean-square norm in float32; where input and weight have one dtype, in one kernel, the weight included."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if hidden_states.dtype == weight.dtype:
            return rms_norm(hidden_states, self.variance_epsilon, weight)
        return weight * rms_norm(hidden_states, self.variance_epsilon)  # mixed precision

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MLRALatentRMSNorm(nn.Module):
    """One RMSNorm per latent: `[..., L*R]` to `[..., L*R]`, normed over each latent's R numbers."""

    def __init__(self, num_latents: int, latent_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_latents, latent_dim))
        self.variance_epsilon = eps

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        split = latents.view(*latents.shape[:-1], *weight.shape)
        return (weight * rms_norm(split, self.variance_epsilon)).flatten(-2)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def rms_norm(hidden_states: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times weight: in float32 or wider, returned in x's dtype."""
    device_type = hidden_states.device.type
    width = hidden_states.shape[-1:] if weight is None else weight.shape
    if torch.is_autocast_enabled(device_type):  # would return float32
        with torch.autocast(device_type, enabled=False):
            return torch.rms_norm(hidden_states, width, weight, eps)
    return torch.rms_norm(hidden_states, width, weight, eps)


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor, without a kernel for a factor of 1."""
    return x if factor == 1.0 else x * factor


class MLRAMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config: MLRAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.starts_at_zero = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, one key head per query head: `[B, heads, T, D]` to `[B, T, heads, V]` and its weights."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=at_least_float32(scores)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MLRALatentUpProjection(nn.Module):
    """W_kvb: keys and values of every latent's heads, `[L*H*(N+V), R]`.

    Rows are latent-major, then head, then `[k_nope N | v V]`. It is no `nn.Linear`: each block of rows acts on its own
    latent, and the absorbed form needs the blocks themselves, so weight-only quantizers rightly leave it alone.
    """

    def __init__(self, config: MLRAConfig):
        super().__init__()
        heads = config.num_attention_heads // config.num_head_groups
        rows = config.num_latent_heads * heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.weight = nn.Parameter(torch.empty(rows, config.latent_head_dim))

    def forward(self) -> torch.Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class MLRAAttention(nn.Module):
    """Multi-Head Low-Rank Attention (paper, section 3), and MLA and GLA as its special cases.

    Attention weights, where they are returned, have shape `[B, L*H, T, S]` with H = num_attention_heads / G: every
    branch is a distribution of its own. Row `(g*B + b)*H + i` is branch b of head `g*H + i`.
    """

    def __init__(self, config: MLRAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = 1
        self.recompute_inputs = False  # in training: keep no queries, keys and values for the backward pass
        # Read once: an attribute of a configuration takes longer to look up than some kernels to run
        self.qk_head_dim, self.v_head_dim = config.qk_head_dim, config.v_head_dim
        self.qk_head_dims = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent_head_dim, self.has_gate = config.latent_head_dim, config.attn_output_gate
        self.scaling = config.score_scaling
        self.alpha_q, self.alpha_kv, self.alpha_attn = config.alphas

        heads, eps = config.num_attention_heads, config.rms_norm_eps
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = MLRARMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj = nn.Linear(config.hidden_size, config.kv_lora_rank, bias=False)
        self.k_rope_proj = nn.Linear(config.hidden_size, config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = MLRALatentRMSNorm(config.num_latent_heads, config.latent_head_dim, eps)
        self.kv_b_proj = MLRALatentUpProjection(config)
        if self.has_gate:
            self.g_proj = nn.Linear(config.hidden_size, heads * config.v_head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)
        self.o_proj.starts_at_zero = True

    def project_query(self, q_latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[B, T, G*H, N]` of `[B, T, q_lora_rank]`; their rotary part `[B, T, G*H, E]`, not yet rotated."""
        query = self.q_b_proj(q_latent).view(*q_latent.shape[:-1], -1, self.qk_head_dim)
        q_nope, q_rope = query.split_with_sizes(self.qk_head_dims, dim=-1)
        return q_nope, q_rope

    def project(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, makes_query: bool = True
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None, torch.Tensor, torch.Tensor]:
        """All that attention needs of the new tokens `[B, T, d]`.

        Returns:
            What queries are made of, `[B, T, q_lora_rank]`; the queries `[B, T, G*H, N]` and `[B, T, G*H, E]` (None
            without `makes_query`); latents `[B, T, L*R]`; rotary keys `[B, T, E]`; all rotated.
        """
        q_latent = scaled(self.q_a_layernorm(self.q_a_proj(hidden_states)), self.alpha_q)
        latents = scaled(self.kv_a_layernorm(self.kv_a_proj(hidden_states)), self.alpha_kv)
        k_rope = self.k_rope_proj(hidden_states).unsqueeze(2)  # [B, T, 1, E]
        query = None
        if makes_query:
            q_nope, q_rope = self.project_query(q_latent)
            heads = q_rope.shape[2]
            rotated = apply_rotary_pos_emb(torch.cat([q_rope, k_rope], dim=2), cos, sin)
            q_rope, k_rope = rotated.split_with_sizes([heads, 1], dim=2)
            query = q_nope, q_rope
        else:
            k_rope = apply_rotary_pos_emb(k_rope, cos, sin)
        # Under autocast too, a row is of one dtype: that of every product with it
        return q_latent, query, latents.to(k_rope.dtype), k_rope.squeeze(2)

    def read_cache(
        self,
        cache: Cache,
        latents: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: "torch.Tensor | CacheRows | None",
        absorbed: bool,
        paged: bool,
        kwargs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor, "torch.Tensor | CacheRows | None"]:
        """Store the new rows; all rows to read, `[B, S, L*R]` (as they are kept) and `[B, S, E]`, and what may be
        attended to of them."""
        if paged:  # continuous batching
            latents, k_rope, rows = update_paged(cache, latents, k_rope, self.layer_idx, self.config, kwargs)
            if rows is not None and rows.row_table is not None:
                latents, k_rope = latents[0], k_rope[0]
            return latents, k_rope, attention_mask if rows is None else rows
        has_prefix = absorbed or not isinstance(past := cache.get_seq_length(self.layer_idx), int) or past > 0
        new = latents.unsqueeze(1), k_rope.unsqueeze(1), self.layer_idx
        if isinstance(cache, MLRACache) or torch.compiler.is_compiling():
            cached = cache.update(*new)
        else:  # kernels of other packages, as those of a quantized cache, are launched on the current device
            with on_device(latents.device):
                cached = cache.update(*new)
        if not has_prefix:
            return latents, k_rope, attention_mask
        latents, k_rope = cached[0].squeeze(1), cached[1].squeeze(1)
        if isinstance(attention_mask, torch.Tensor) and (width := attention_mask.shape[-1]) < latents.shape[1]:
            latents, k_rope = latents[:, :width], k_rope[:, :width]
        return latents, k_rope, attention_mask

    def attend_expanded(
        self,
        query: tuple[torch.Tensor, torch.Tensor],
        latents: torch.Tensor,
        k_rope: torch.Tensor,
        kv_b_weight: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Head outputs `[B, T, G*H, V]` by the library's attention interface, and weights where it gives them."""
        implementation = (self.config._attn_implementation or "eager").removeprefix("paged|")
        return expanded_attention(
            self,
            torch.cat(query, dim=-1),
            latents,
            k_rope,
            kv_b_weight,
            attention_mask,
            ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward),
            gives_weights=implementation == "eager",
            dropout=self.config.attention_dropout if self.training else 0.0,
            nope_dim=self.qk_head_dims[0],
            v_dim=self.v_head_dim,
            scaling=self.scaling,
            alpha=self.alpha_attn,
            **kwargs,
        )

    @takes_cache_by_any_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: "torch.Tensor | CacheRows | None" = None,
        cache: Cache | None = None,
        absorbed: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cos, sin = position_embeddings
        paged = is_paged(cache)
        recomputes = self.recompute_inputs and torch.is_grad_enabled() and not (absorbed or paged)
        q_latent, query, latents, k_rope = self.project(hidden_states, cos, sin, makes_query=not recomputes)
        mask, num_latents = attention_mask, latents.shape[-1] // self.latent_head_dim
        if cache is not None:
            latents, k_rope, mask = self.read_cache(cache, latents, k_rope, mask, absorbed, paged, kwargs)
        if paged and isinstance(mask, CacheRows):  # every request has one new token: [1, T, ...] becomes [T, 1, ...]
            assert query is not None
            absorbed, query = True, (query[0].transpose(0, 1), query[1].transpose(0, 1))
        latents, scales = separate(latents, num_latents, self.latent_head_dim)  # [B, S, L, R]
        if scales is not None and not (absorbed and isinstance(mask, CacheRows)):
            latents, scales = dequantized(latents, scales, k_rope.dtype), None

        if absorbed:
            assert query is not None
            output, weights = absorbed_attention(
                self,
                *query,
                latents,
                k_rope,
                self.kv_b_proj(),
                mask,
                eager_attention_forward,
                nope_dim=self.qk_head_dims[0],
                v_dim=self.v_head_dim,
                scaling=self.scaling,
                alpha=self.alpha_attn,
                implementation=self.config.decode_implementation,
                scales=scales,
            )
        elif recomputes:

            def attend(q_latent, *keys_and_values):
                q_nope, q_rope = self.project_query(q_latent)
                query = q_nope, apply_rotary_pos_emb(q_rope, cos, sin)
                return self.attend_expanded(query, *keys_and_values, mask, **kwargs)

            output, weights = recompute_inputs(attend, q_latent, latents, k_rope, self.kv_b_proj())
        else:
            assert query is not None
            output, weights = self.attend_expanded(query, latents, k_rope, self.kv_b_proj(), mask, **kwargs)

        output = output.reshape(*hidden_states.shape[:2], -1)  # [B, T, G*H*V]
        if self.has_gate:
            output = torch.sigmoid(self.g_proj(hidden_states)) * output
        return self.o_proj(output), weights


class MLRADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: MLRAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MLRAAttention(config, layer_idx)
        self.mlp = MLRAMLP(config)
        self.input_layernorm = MLRARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MLRARMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, fused: FusedLayers | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        if fused is not None and fused.takes(self.self_attn.layer_idx):
            return fused(self, hidden_states)
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MLRAPreTrainedModel(PreTrainedModel):
    """What every MLRA model shares: configuration class, initialisation and features of the library it supports."""

    config_class = MLRAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MLRADecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MLRADecoderLayer, "attentions": MLRAAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MLRALatentUpProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MLRALatentRMSNorm):
            init.ones_(module.weight)
        elif getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class MLRAModel(MLRAPreTrainedModel):
    """The decoder stack: token ids or embeddings to hidden states."""

    def __init__(self, config: MLRAConfig):
        super().__init__(config)
        # No `padding_idx`: the padding token also opens every training document, so its embedding is a trained one.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MLRADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MLRARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MLRARotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache_by_any_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states of `input_ids` `[B, T]` or `inputs_embeds` `[B, T, d]`.

        Args:
            attention_mask: `[B, S + T]`, 1 for tokens to attend to, over cached and new tokens; missing columns are
                padding. Or a 4D mask of the library. Left and right padding give every real token what it gets alone.
            position_ids: `[B, T]`; by default they count on from the cache. Positions that restart at 0 (packed
                documents, no mask, no cache) keep documents apart where the attention backend supports it.
            cache: an `MLRACache`, or any of the library's caches; `past_key_values` is its older name.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]

        if use_cache and cache is None:
            cache = MLRACache(self.config)
        paged = is_paged(cache)
        past_length = 0 if cache is None or paged else cache.get_seq_length()
        # Positions that count on from the cache stay None for masks and attention: no documents to look for in them
        positions = position_ids
        if positions is None:
            positions = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)

        has_prefix = isinstance(past_length, torch.Tensor) or past_length > 0
        if has_prefix:
            check_prefix(cache)
        drops = self.training and self.config.attention_dropout > 0  # the absorbed form drops no weights
        absorbed = has_prefix and length <= MAX_ABSORBED_QUERIES and not drops
        mask = attention_mask  # continuous batching makes the mask that its attention implementation takes
        if not paged:
            mask = make_mask(self.config, inputs_embeds, mask, cache, position_ids, past_length, absorbed)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=positions)
        for decoder_layer in list(self.layers)[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                absorbed=absorbed,
                **{CACHE: cache},
                **kwargs,
            )
        returned = None if paged else cache
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: returned})


class MLRAForCausalLM(MLRAPreTrainedModel, MLRAGenerationMixin):
    """The decoder stack with the (tied) output embedding: next-token logits, loss and `generate()`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    chunked_loss = staticmethod(chunked_causal_loss)  # a model whose layers are compiled one by one may have its own

    def __init__(self, config: MLRAConfig):
        super().__init__(config)
        self.model = MLRAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache_by_any_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, vocab_size]`, and with `labels` `[B, T]` (-100 = ignore) the mean next-token loss in nats.

        Args:
            logits_to_keep: compute logits for the last so many positions only (0 = all), or for the given positions.
            skip_logits: with `labels`, return the loss alone, which then never holds the logits of all tokens. The
                other arguments are those of [`MLRAModel.forward`].
        """
        fused = fused_forward(self, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs)
        if isinstance(fused, torch.Tensor):
            return CausalLMOutputWithPast(logits=slice_logits_to_keep(fused, logits_to_keep), **{CACHE: cache})
        if fused is not None:
            kwargs["fused"] = fused
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = loss = None
        if skip_logits and labels is not None and has_plain_weight(self.lm_head, hidden_states):
            loss = self.chunked_loss(hidden_states, self.lm_head.weight, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: cache_of(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MLRAForSequenceClassification(GenericForSequenceClassification, MLRAPreTrainedModel):
    """A classification head on each sequence's last token that is no padding."""

    def __init__(self, config: MLRAConfig):
        # Not the generic `__init__`: it builds its base model with `AutoModel`, which refuses remote code there.
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MLRAModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MLRAForTokenClassification(GenericForTokenClassification, MLRAPreTrainedModel):
    """A classification head on every token."""

    def __init__(self, config: MLRAConfig):
        PreTrainedModel.__init__(self, config)  # not the generic one, as above
        self.num_labels = config.num_labels
        self.model = MLRAModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MLRAForQuestionAnswering(GenericForQuestionAnswering, MLRAPreTrainedModel):
    """Start and end of an answer within the input."""

    def __init__(self, config: MLRAConfig):
        PreTrainedModel.__init__(self, config)  # not the generic one, as above
        self.model = MLRAModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "MLRAForCausalLM",
    "MLRAForQuestionAnswering",
    "MLRAForSequenceClassification",
    "MLRAForTokenClassification",
    "MLRAModel",
    "MLRAPreTrainedModel",
]
