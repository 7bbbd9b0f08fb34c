"""Rotary position embedding of the `qk_rope_head_dim` part of queries and keys."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    """The dtype that sensitive reductions of `x` are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


class MLRARotaryEmbedding(nn.Module):
    """Rotary position embedding over `qk_rope_head_dim`, with every scaling type of the library."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config.rotary_config
        self.rope_type: str = self.config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(self.config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """Moves, but never rounds: `model.bfloat16()` leaves the frequencies as `from_pretrained` does."""
        exact = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact[0].dtype:
            self.inv_freq, self.original_inv_freq = (buffer.to(self.inv_freq.device) for buffer in exact)
        return self

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[head_dim / 2]` of unscaled RoPE and the factor 1.0 for its tables."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin tables `[B, T, E]` in the dtype of `x`."""
        dtype = at_least_float32(x)
        freqs = position_ids[..., None].to(dtype) * self.inv_freq.to(device=x.device, dtype=dtype)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) to (-x2, x1), the halves of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[B, T, heads, E]` by the tables `[B, T, E]`, in the dtype of `x`."""
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    return torch.addcmul(x * cos, rotate_half(x), sin)
