"""FlashAttention-3 behind its own interface, for programs that call `flash_attn_interface`: by vLLM's operators.

vLLM's wheel holds FlashAttention-3's kernels without the module `flash_attn_interface`: an operator library
`_vllm_fa3_C*.so`, forward only, compiled for sequences of given lengths. The functions here have the names, arguments
and results of the module's, as far as the library and this package call them, and hand them to that operator.

    from scripts.flash_operators import interface
    interface().flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths)

Shapes: B sequences, T queries, S keys, H query heads, K key heads, D and V widths of keys and values.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from scripts.cli import UserError

ENVIRONMENT_VARIABLE = "MLRA_BENCH_LIBRARIES"
LIBRARY = "_vllm_fa3_C"


def load_libraries(paths: list[str] | None = None) -> None:
    """Load operator libraries of the peers; without paths, those of the environment variable."""
    from_environment = [x for x in os.environ.get(ENVIRONMENT_VARIABLE, "").split(":") if x]
    for library in from_environment if paths is None else paths:
        if not Path(library).is_file():
            raise UserError(f"no operator library at {library}")
        torch.ops.load_library(str(Path(library).resolve()))


def has_operators() -> bool:
    """Whether the operator is here: loaded already, named by the environment variable, or in an installed vLLM."""
    if not hasattr(getattr(torch.ops, LIBRARY), "fwd"):
        load_libraries()
    if not hasattr(getattr(torch.ops, LIBRARY), "fwd") and (vllm := importlib.util.find_spec("vllm")) is not None:
        for folder in vllm.submodule_search_locations or ():  # without importing it
            load_libraries([str(file) for file in Path(folder).glob(f"vllm_flash_attn/{LIBRARY}*.so")])
    return hasattr(getattr(torch.ops, LIBRARY), "fwd")


def interface() -> ModuleType | None:
    """`flash_attn_interface` where it is installed, else this file where vLLM's operators are, else None."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return importlib.import_module("flash_attn_interface")
    return sys.modules[__name__] if has_operators() else None


def _with_rows_in_order(x: torch.Tensor | None) -> torch.Tensor | None:
    """Copied where the last dimension is not contiguous, as lengths expanded from one are not: the module does so, the
    operator refuses them."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _forward(
    q, k, v, *, qv=None, cu_seqlens=(None, None), seqused_k=None, longest=(None, None), page_table=None,
    softmax_scale=None, causal=False,
):  # fmt: skip
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError("vLLM's operators of FlashAttention-3 have no backward pass")
    q, k, v, seqused_k, page_table = map(_with_rows_in_order, (q, k, v, seqused_k, page_table))
    cu_seqlens = tuple(map(_with_rows_in_order, cu_seqlens))
    scale = (q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5 if softmax_scale is None else softmax_scale
    none = [None] * 3
    return torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, qv, None, *cu_seqlens, None, None, seqused_k, *longest, page_table, None, None,
        *none, *none, scale, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
    )[0]  # fmt: skip


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None):
    """`[B, T, H, D]`, `[B, S, K, D]`, `[B, S, K, V]`: `[B, T, H, V]`; `qv` `[B, T, H, V]` meets the values."""
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    return flash_attn_with_kvcache(q, k, v, qv=qv, cache_seqlens=lengths, softmax_scale=softmax_scale, causal=causal)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    """Sequences one behind another: `[all T, H, D]`, `[all S, K, D]`, `[all S, K, V]`: `[all T, H, V]`."""
    offsets, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _forward(q, k, v, cu_seqlens=offsets, longest=longest, softmax_scale=softmax_scale, causal=causal)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, qv=None, cache_seqlens=None, page_table=None, softmax_scale=None, causal=False
):
    """The last T of `cache_seqlens` `[B]` rows of a cache attend; with `page_table` `[B, blocks]`, of pages
    `[pages, rows, K, D or V]`."""
    return _forward(
        q, k_cache, v_cache, qv=qv, seqused_k=cache_seqlens, page_table=page_table, softmax_scale=softmax_scale,
        longest=(q.shape[1], None if page_table is not None else k_cache.shape[1]), causal=causal,
    )  # fmt: skip


__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "interface", "load_libraries"]
