"""Next-token loss without the logits: of N tokens, a chunk of logits at a time is made, used and dropped.

Shapes: N tokens, d hidden size, V vocabulary. Logits of 8,192 tokens and 50,304 words take 1.6 GB in float32, several
times over in a plain forward and backward pass. The gradients of a chunk are taken while its logits are there, so
that nothing is computed twice.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

MAX_LOGITS_BYTES = 2**29
"""Of one chunk, in float32."""


def chunk_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of one chunk and its gradient by the logits `[n, V]`, in the dtype of `hidden`."""
    logits = nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = labels != ignore_index
    targets = torch.where(counts, labels, 0).unsqueeze(1)
    total = logits.logsumexp(dim=-1, keepdim=True)
    loss = torch.where(counts.unsqueeze(1), total - logits.gather(1, targets), 0).sum()
    if not with_gradient:
        return loss, None
    gradient = torch.exp(logits - total)
    gradient = gradient - (torch.arange(logits.shape[1], device=logits.device) == targets).to(gradient.dtype)
    return loss, torch.where(counts.unsqueeze(1), gradient, 0).to(hidden.dtype)


class SummedCrossEntropy(torch.autograd.Function):
    """`sum(cross_entropy(hidden @ weight.T, labels))`, chunk by chunk, with the gradients taken on the way."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, chunks, dtype):
        cast, wide = weight.to(dtype), torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        by_hidden, by_weight = [], None
        for h, y in zip(hidden.to(dtype).chunk(chunks), labels.chunk(chunks), strict=True):
            part, by_logits = chunk_loss(h, cast, y, ignore_index, with_gradient=True)
            loss = loss + part
            if ctx.needs_input_grad[0]:
                by_hidden.append(by_logits @ cast)
            if ctx.needs_input_grad[1]:
                product = (by_logits.T @ h).to(wide)
                by_weight = product if by_weight is None else by_weight + product
        ctx.save_for_backward(torch.cat(by_hidden) if by_hidden else None, by_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        by_hidden, by_weight = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return by_hidden, by_weight, None, None, None, None


def has_plain_weight(head: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether `head` is `hidden @ head.weight.T` and no more: no shard, adapter, quantizer, bias or hook."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and head.weight.shape == (head.out_features, hidden.shape[-1])
        and head.weight.device == hidden.device
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def chunked_causal_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """The library's `ForCausalLMLoss` of `hidden @ weight.T`: a mean in nats, in float32 or wider.

    Args:
        hidden: `[B, T, d]`.
        weight: `[V, d]`.
        labels: `[B, T]`; token t is predicted from t - 1, and `ignore_index` is left out.
        shift_labels: `[B, T]`, the targets of each position, instead of `labels`.
        num_items_in_batch: what to divide the sum by instead of the number of targets.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, targets = hidden.flatten(0, -2), shift_labels.to(hidden.device).flatten()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunks = -(-len(hidden) // max(MAX_LOGITS_BYTES // (4 * weight.shape[0]), 1))
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss = SummedCrossEntropy.apply(hidden, weight, targets, ignore_index, chunks, dtype)
    else:
        cast = weight.to(dtype)
        parts = zip(hidden.to(dtype).chunk(chunks), targets.chunk(chunks), strict=True)
        loss = sum(chunk_loss(h, cast, y, ignore_index, with_gradient=False)[0] for h, y in parts)
    if num_items_in_batch is None:
        return loss / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
