"""Causal attention over whole blocks, under one name for every architecture, so that their speeds compare.

While compiling, the library's own models make a dense mask, which its attention then needs: it cannot see that
positions restart nowhere. The functions here are for blocks without padding and without separate documents, as
scripts.train feeds them: they take no mask, and each names the kernel that it runs.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_mlra.attention_mlra import fastest_sdpa
from scripts.cli import UserError

try:
    from flash_attn.cute import flash_attn_func as flash_attention_4
    from flash_attn.cute.interface import _flash_attn_bwd as flash_attention_4_backward
except ImportError:
    flash_attention_4 = None

# Their names, which must not look like those of the library's own: "flash" and "flex" start its checks
IMPLEMENTATIONS = {
    "auto": "causal_auto",
    "cudnn": "causal_cudnn",
    "flash": "causal_fa2",
    "efficient": "causal_efficient",
    "flex": "causal_blocks",
    "fa4": "causal_fa4",
}
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BLOCK_MASKS: dict[tuple[int, str], BlockMask] = {}


def scaled_dot_product(backend: str) -> Callable:
    """torch's attention by one kernel, or by the order that MLRA prefers ("auto")."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        width = value.shape[-1]
        if backend == "flash":  # takes equal widths only
            value = nn.functional.pad(value, (0, key.shape[-1] - width))
        with fastest_sdpa(query, None) if backend == "auto" else sdpa_kernel(KERNELS[backend]):
            output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)
        return output[..., :width], weights

    return attention


def block_mask(length: int, device: torch.device) -> BlockMask:
    """The causal mask of FlexAttention, made once for each length: not while compiling."""
    place = length, device.type
    if place not in BLOCK_MASKS:
        BLOCK_MASKS[place] = create_block_mask(
            lambda batch, head, query, key: query >= key, None, None, length, length, device=device
        )
    return BLOCK_MASKS[place]


def flex(module, query, key, value, attention_mask, scaling=None, **kwargs):
    mask = BLOCK_MASKS[query.shape[2], query.device.type]
    attend = flex_attention if torch.compiler.is_compiling() else torch.compile(flex_attention)
    has_groups = query.shape[1] != key.shape[1]
    return attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=has_groups).transpose(1, 2), None


@torch.library.custom_op("mlra_scripts::flash_attention_4", mutates_args=())
def flash_4_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-4 as one operator, which a compiled layer need not break at: `[B, T, h, D]`, and log-sum-exp."""
    return flash_attention_4(query, key, value, softmax_scale=scaling, causal=True, return_lse=True)


@torch.library.custom_op("mlra_scripts::flash_attention_4_backward", mutates_args=())
def flash_4_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = query, key, value, output, gradient.contiguous(), lse
    return flash_attention_4_backward(*inputs, softmax_scale=scaling, causal=True)[:3]


@flash_4_forward.register_fake
def _(query, key, value, scaling):
    batch, length, heads, _ = query.shape
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    return query.new_empty(batch, length, heads, value.shape[-1]), lse


@flash_4_backward.register_fake
def _(gradient, query, key, value, output, lse, scaling):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def keep_for_backward(ctx, inputs, output):
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, gradient, _):
    return *flash_4_backward(gradient, *ctx.saved_tensors, ctx.scaling), None


flash_4_forward.register_autograd(backward, setup_context=keep_for_backward)


def flash_4(module, query, key, value, attention_mask, scaling=None, **kwargs):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flash_4_forward(query, key, value, scaling)[0], None


def causal_attention(backend: str) -> str:
    """Register a backend; its name for `attn_implementation`.

    Raises:
        UserError: for one that is unknown or not installed.
    """
    if backend not in IMPLEMENTATIONS:
        raise UserError(f"unknown attention backend {backend!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    if backend == "fa4" and flash_attention_4 is None:
        raise UserError("attention backend fa4: flash_attn.cute is not installed (pip install flash-attn-4)")
    functions = {"flex": flex, "fa4": flash_4}
    AttentionInterface.register(IMPLEMENTATIONS[backend], functions.get(backend) or scaled_dot_product(backend))
    return IMPLEMENTATIONS[backend]
