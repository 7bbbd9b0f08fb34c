"""Configuration of Multi-Head Low-Rank Attention (MLRA) models; imports no torch.

One formulation covers the five latent attentions of the paper (arXiv 2603.02188): `num_latent_heads` L latents of
width r = kv_lora_rank / L, of which `num_branches` B serve every query head, in G = L / B head groups.

    name     L  B  G
    mla      1  1  1    DeepSeek-style MLA
    gla_2    2  1  2    grouped latent attention
    gla_4    4  1  4
    mlra_2   4  2  2
    mlra_4   4  4  1

Latents are kept group-major: latent s serves the query heads of group s // B and is branch s % B of them. A released
checkpoint numbers the same latent (s % B) * G + s // B; conversion reorders it.
"""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

ROW_FORMATS = "plain", "fp8"  # as in `rows_mlra`, which needs torch


@strict
class MLRAConfig(PreTrainedConfig):
    r"""
    Configuration of an [`MLRAModel`]. The defaults are the released 2.87B-parameter MLRA-4.

    Args:
        vocab_size (`int`): rows of the embedding.
        hidden_size (`int`): width d of the residual stream.
        intermediate_size (`int`): width of the SwiGLU MLP.
        num_hidden_layers (`int`): number of decoder layers.
        num_attention_heads (`int`): query heads h, a multiple of G.
        num_latent_heads (`int`): latents L the KV latent is split into.
        num_branches (`int`): latents B that serve each query head; their outputs are summed.
        q_lora_rank (`int`): width of the query latent.
        kv_lora_rank (`int`): total width L * r of the KV latents.
        qk_nope_head_dim (`int`): width n of a head's query and key without position.
        qk_rope_head_dim (`int`): width e of the rotary part; its key is shared by all heads and latents.
        v_head_dim (`int`): width v of a head's value.
        attn_output_gate (`bool`): multiply head outputs by sigmoid(x W_g) before the output projection.
        latent_scaling (`bool`): apply alpha_q = sqrt(d / q_lora_rank), alpha_kv = sqrt(d / r) and
            alpha_attn = 1 / sqrt(B); `False` is the paper's "no scale" ablation, with all three at 1.
        hidden_act (`str`): activation of the MLP gate.
        max_position_embeddings (`int`): context length in tokens the model was trained with.
        initializer_range (`float`): standard deviation of the initial weights; output projections start at zero.
        rms_norm_eps (`float`): epsilon of every RMSNorm.
        use_cache (`bool`): whether the model returns its latent cache.
        tie_word_embeddings (`bool`): whether the output embedding is the input embedding.
        rope_parameters (`dict`, *optional*): rotary embedding parameters as in Llama, `rope_scaling` and `rope_theta`
            of older configurations included; theta 10000 by default. `mscale_all_dim` also scales the scores, as in
            DeepSeek-V3.
        attention_dropout (`float`): dropout of attention weights in training.
        decode_implementation (`str`): kernel for the absorbed form (see `decode_mlra`): "auto", "torch", "triton",
            "flash_attention_3", or a kernel repository or folder.
        cache_row_format (`str`): how latents are cached (see `rows_mlra`): "plain", in the model's dtype, or "fp8", in
            eight bits with a scale to each latent and token: 656 bytes a token and layer for 1152 at these sizes.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): `<|endoftext|>` of the GPT-2 tokenizer.

    Raises:
        ValueError: for sizes that cannot be combined; the message names the field and its value.
    """

    model_type = "mlra"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn": "mlra_attention",  # latents, their cache rows and heads (`tensor_parallel_mlra`)
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 3072
    intermediate_size: int = 9880
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_latent_heads: int = 4
    num_branches: int = 4
    q_lora_rank: int = 1024
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attn_output_gate: bool = False
    latent_scaling: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: int | float = 0.0
    decode_implementation: str = "auto"
    cache_row_format: str = "plain"
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = 50256

    def __post_init__(self, **kwargs):
        # The library writes it where a model's code is loaded from a folder, and trainers (TRL) read it of every model
        # that the library itself does not name.
        self.auto_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)
        self.validate_architecture()  # `strict` runs it again, but wraps the error in a type that is no ValueError

    @property
    def num_head_groups(self) -> int:
        """G = L / B: groups of query heads; each group has its own B latents."""
        return self.num_latent_heads // self.num_branches

    @property
    def latent_head_dim(self) -> int:
        """r: width of one latent head."""
        return self.kv_lora_rank // self.num_latent_heads

    @property
    def qk_head_dim(self) -> int:
        """n + e: width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def score_scaling(self) -> float:
        """1 / sqrt(n + e), the factor of the scores; times the square of YaRN's mscale where `mscale_all_dim` is set.

        Then the rotary tables have the factor mscale / mscale_all_dim only, as the library computes it.
        """
        rope: dict = self.rope_parameters  # type: ignore[assignment]
        mscale = 1.0
        if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
            factor = rope.get("factor") or self.max_position_embeddings / rope["original_max_position_embeddings"]
            mscale = 0.1 * rope["mscale_all_dim"] * math.log(max(factor, 1.0)) + 1.0
        return self.qk_head_dim**-0.5 * mscale**2

    @property
    def alphas(self) -> tuple[float, float, float]:
        """alpha_q, alpha_kv, alpha_attn: factors of query latents, of latents, and of the sum of a head's branches."""
        if not self.latent_scaling:
            return 1.0, 1.0, 1.0
        of_latents = ((self.hidden_size / width) ** 0.5 for width in (self.q_lora_rank, self.latent_head_dim))
        return *of_latents, self.num_branches**-0.5

    @property
    def rotary_config(self) -> PreTrainedConfig:
        """What the library's RoPE functions take: they rotate all of `head_dim`, here the rotary part of a head."""
        config = PreTrainedConfig(
            head_dim=self.qk_rope_head_dim,
            max_position_embeddings=self.max_position_embeddings,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
        )
        config.rope_parameters = self.rope_parameters
        config.ignore_keys_at_rope_validation = self.ignore_keys_at_rope_validation
        return config

    @property
    def cache_row_dim(self) -> int:
        """L * r + e: numbers cached per token and layer (4.5 head widths for the released models)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    # The library's paged cache stores a key and a value of one shape per token. One cache row is kept there as its two
    # halves, cut into as many heads as there are query heads (as configurations of MLA models say), so that continuous
    # batching stores `cache_row_dim` numbers: exactly at the released sizes, rounded up at odd ones. The bytes of an
    # "fp8" row are counted in numbers of 16 bits, of which they take most.
    @property
    def num_key_value_heads(self) -> int:
        """h, by the convention of MLA models; no key or value is cached per head."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """A head's share of half a cache row, rounded up to the even number that the library's check of RoPE wants."""
        numbers = self.cache_row_dim
        if self.cache_row_format == "fp8":
            numbers = 8 * -(-(2 * -(-self.kv_lora_rank // 4) + self.qk_rope_head_dim) // 8)
            numbers += 8 * -(-self.num_latent_heads // 4)
        return 2 * -(-numbers // (4 * self.num_key_value_heads))

    def validate_rope(self):
        """The library's check, of the width that is rotated."""
        self.rotary_config.validate_rope()

    def to_dict(self):
        """As everywhere, without an `auto_map` that names nothing."""
        output = super().to_dict()
        if not output.get("auto_map"):
            output.pop("auto_map", None)
        return output

    def validate_architecture(self):
        """Reject sizes that cannot be combined."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_latent_heads",
            "num_branches",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_latent_heads % self.num_branches:
            raise ValueError(
                f"num_branches={self.num_branches} must divide num_latent_heads={self.num_latent_heads}: "
                "every query head is served by the same number of latents"
            )
        if self.kv_lora_rank % self.num_latent_heads:
            raise ValueError(
                f"kv_lora_rank={self.kv_lora_rank} must be a multiple of num_latent_heads={self.num_latent_heads}: "
                "the latents have equal widths"
            )
        if self.num_attention_heads % self.num_head_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of the number of head groups "
                f"{self.num_head_groups} (num_latent_heads={self.num_latent_heads} / num_branches={self.num_branches})"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs")
        self._validate_rotation()
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be positive")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"attention_dropout={self.attention_dropout} must lie in [0, 1)")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range={self.initializer_range} must not be negative")
        if self.cache_row_format not in ROW_FORMATS:
            raise ValueError(f"cache_row_format={self.cache_row_format!r} must be one of {ROW_FORMATS}")

    def _validate_rotation(self):
        """Reject rotary parameters that the model could not be built with."""
        rope = self.rope_parameters
        kind, theta, partial = rope["rope_type"], rope["rope_theta"], rope.get("partial_rotary_factor")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_type={kind!r} is unknown; give one of {known}")
        if not isinstance(theta, int | float) or not theta > 0:
            raise ValueError(f"rope_theta={theta!r} must be a positive number")
        if partial not in (None, 1) and kind != "proportional":
            raise ValueError(
                f"partial_rotary_factor={partial} cannot be combined with rope_type={kind!r}: qk_rope_head_dim="
                f"{self.qk_rope_head_dim} itself is the part of a head that is rotated"
            )
        for name in ("short_factor", "long_factor"):
            if (factors := rope.get(name)) is not None and len(factors) != self.qk_rope_head_dim // 2:
                raise ValueError(
                    f"{name} has {len(factors)} numbers; qk_rope_head_dim={self.qk_rope_head_dim} needs "
                    f"{self.qk_rope_head_dim // 2}"
                )


__all__ = ["MLRAConfig"]
