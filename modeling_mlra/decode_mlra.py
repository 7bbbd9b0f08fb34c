"""Absorbed decode attention over the latent cache, and the hook that picks the kernel that runs it.

Legend: B sequences, T query positions, S allocated cache rows, L latents in G groups, H query heads per latent,
R latent width, E rotary width. Latent s is multiplied with the rotary queries of group s // (L // G).

Every latent is one multi-query attention whose key is [c_s | k_rope] and whose value is c_s (paper, section 3.2):
z_{s,i} = softmax(scaling * (q_latent_{s,i} . c_s + q_rope_{g,i} . k_rope)) c_s. Nothing per head is cached or built.
"""

import logging
import os
from collections import Counter
from pathlib import Path

import torch

from .decode_arguments_mlra import DecodeInputs
from .decode_flash_mlra import flash_latent_attention, flash_obstacle
from .decode_reference_mlra import reference_latent_attention
from .decode_triton_mlra import triton_latent_attention
from .device_mlra import cannot_be_built, triton_missing
from .rows_mlra import is_one_row

try:
    import kernels as hub_kernels
except ImportError:
    hub_kernels = None

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "MLRA_DECODE"
NAMESPACE = "mlra"  # of the operators, in torch.ops
IMPLEMENTATIONS = ("triton", "flash_attention_3", "torch")
decode_calls: Counter[str] = Counter()  # times each path ran; not counted while tracing or when a CUDA graph replays
_said: set[str] = set()
_hub_functions: dict = {}


def _flash_attention_3(inputs: DecodeInputs) -> torch.Tensor:
    decode_calls["flash_attention_3"] += 1
    return flash_latent_attention(inputs)


def _triton(inputs: DecodeInputs) -> torch.Tensor:
    result = triton_latent_attention(inputs)
    decode_calls["triton"] += 1
    return result


def _automatic(inputs: DecodeInputs) -> torch.Tensor:
    """Triton, or where its kernels cannot be built for the device, torch."""
    try:
        return _triton(inputs)
    except Exception as error:
        if not cannot_be_built(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _warn_once(f"latent attention falls back to 'torch': 'triton' cannot run because {reason}")
    decode_calls["torch"] += 1
    return _reference(inputs)


def _reference(inputs: DecodeInputs) -> torch.Tensor:
    """Here `settled` makes no difference."""
    return reference_latent_attention(*inputs[:-2], scales=inputs.scales)


def _empty_result(q_latent, *args, **kwargs):
    return torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)


def _register(name, function):
    """Registers `function` of `DecodeInputs` as an operator; a second copy of this file finds and uses the first
    one's."""
    operators = getattr(torch.ops, NAMESPACE)
    if not hasattr(operators, name):
        _library.define(
            f"{name}(Tensor q_latent, Tensor q_rope, Tensor latents, Tensor k_rope, Tensor kv_end, Tensor? kv_start, "
            "Tensor? key_mask, Tensor? block_table, int page_size, float scaling, bool settled=False, "
            "Tensor? scales=None) -> Tensor"
        )
        _library.impl(name, lambda *arguments: function(DecodeInputs(*arguments)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _empty_result, lib=_library)
    return getattr(operators, name)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_operators = {
    "triton": _register("latent_attention_triton", _triton),
    "auto": _register("latent_attention_auto", _automatic),
    "flash_attention_3": _register("latent_attention_flash_attention_3", _flash_attention_3),
}


def _hub_function(name: str):
    """`latent_attention` of the kernel at `name`: a local kernel folder, "org/repo" or "org/repo@revision"."""
    if hub_kernels is None:
        raise ImportError(f"decode implementation {name!r} is a kernel repository: it needs `pip install kernels`")
    if name not in _hub_functions:
        if Path(name).is_dir():
            module = hub_kernels.get_local_kernel(Path(name))
        else:
            repository, _, revision = name.partition("@")
            module = hub_kernels.get_kernel(repository, revision=revision or "main")
        if not callable(getattr(module, "latent_attention", None)):
            raise ValueError(f"kernel {name!r} has no function `latent_attention`")
        _hub_functions[name] = module.latent_attention
    return _hub_functions[name]


def _obstacle(name, q_latent, q_rope, latents, k_rope, kv_start, key_mask) -> str | None:
    """Why implementation `name` cannot run these inputs, or None if it can."""
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q_latent, q_rope, latents, k_rope))
    if name != "torch" and needs_gradient:
        return "it has no gradient; run it under torch.no_grad(), or use 'torch'"
    if name == "triton":
        return triton_missing(q_latent.device, q_latent.dtype)
    if name == "flash_attention_3":
        return flash_obstacle(q_latent, latents, k_rope, kv_start, key_mask)
    return None


def asked_implementation(implementation: str | None) -> str:
    """What was asked for: the argument, else the environment variable MLRA_DECODE, else "auto"."""
    if implementation in (None, "auto"):
        return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    return implementation


def choose_implementation(implementation, q_latent, q_rope, latents, k_rope, kv_start=None, key_mask=None) -> str:
    """The implementation that runs: the one asked for, else the best that can ("auto": Triton, as far as it can be
    known before its kernels are built).

    Raises:
        ImportError: the named implementation needs a package that is not installed.
        ValueError: the named implementation is unknown or cannot run these inputs.
    """
    inputs = (q_latent, q_rope, latents, k_rope, kv_start, key_mask)
    name = asked_implementation(implementation)
    if name == "auto":
        if q_latent.device.type not in ("cuda", "xpu"):
            return "torch"
        obstacle = _obstacle("triton", *inputs)
        if obstacle is None:
            return "auto"
        takes_rows = is_one_row(latents, k_rope) and _obstacle("flash_attention_3", *inputs) is None
        chosen = "flash_attention_3" if takes_rows else "torch"
        _warn_once(f"latent attention falls back to '{chosen}': 'triton' cannot run because {obstacle}")
        return chosen
    if name in IMPLEMENTATIONS:
        obstacle = _obstacle(name, *inputs)
        if obstacle is not None:
            error = ImportError if "not installed" in obstacle else ValueError
            raise error(f"decode implementation {name!r} cannot run: {obstacle}")
        return name
    if "/" in name or Path(name).is_dir():
        return name
    raise ValueError(
        f"unknown decode implementation {name!r}: give 'auto', one of {', '.join(IMPLEMENTATIONS)}, a kernel "
        "repository 'org/repo' or a local kernel folder"
    )


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.warning(message)


def latent_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latents: torch.Tensor,
    k_rope: torch.Tensor,
    *,
    kv_end: torch.Tensor,
    kv_start: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scaling: float,
    implementation: str = "auto",
    block_table: torch.Tensor | None = None,
    page_size: int = 0,
    settled: bool = False,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Absorbed attention of T query positions over the cached rows of each sequence, in the dtype of `k_rope`.

    z_{s,i,t} = softmax_j(scaling * (q_latent_{s,i,t} . c_s[j] + q_rope_{g,i,t} . k_rope[j])) c_s[j], where query t of
    sequence b sees the rows kv_start[b] <= j <= kv_end[b] - T + t with key_mask[b, j]. One that sees none gives zeros.

    Args:
        q_latent: `[B, T, L, H, R]`.
        q_rope: `[B, T, G, H, E]`; latent s uses group s // (L // G).
        latents: `[B, S, L, R]`, any strides but the last; rows from kv_end on are never used and may hold NaN
            (for "flash_attention_3" they must be finite).
            With `block_table`: the pool of rows `[pages * page_size, L, R]`.
        k_rope: `[B, S, E]`, or `[pages * page_size, E]`.
        kv_end: int32 `[B]`, rows in use, the T query rows included. Read on the device only.
        kv_start: int32 `[B]`, first row seen (left padding), or None for 0.
        key_mask: bool `[B, any number of rows]`, rows that it lacks are not seen; or None.
        scaling: factor of the scores (explicit: the widths here are not those it derives from).
        implementation: "auto", "triton", "flash_attention_3", "torch", "org/repo" or a local kernel folder.
        block_table: int32 `[B, max_blocks]`: row j lies at row block_table[b, j // page_size] * page_size
            + j % page_size of the pool.
        settled: promise that kernels in front that may still run write no lengths, no block table, and no cached
            rows but those of the T query positions. "triton" then fetches older rows before the kernel in front has
            ended (Hopper).
        scales: float32 `[B, S, L]`, or `[pages * page_size, L]`, of e4m3 `latents`, which count times these; else
            None.

    Returns:
        `[B, T, L, H, R]` in q_latent's dtype.

    Raises:
        ImportError, ValueError: see `choose_implementation`; ValueError also for shapes that do not fit.
    """
    _check_shapes(q_latent, q_rope, latents, k_rope, kv_end, block_table, page_size)
    _check_scales(latents, scales)
    num_rows = latents.shape[1] if block_table is None else block_table.shape[1] * page_size
    if key_mask is not None and key_mask.shape[1] < num_rows:  # no implementation looks for the end of the mask
        key_mask = torch.nn.functional.pad(key_mask, (0, num_rows - key_mask.shape[1]))
    given = q_latent.dtype
    computes = latents.dtype if scales is None else k_rope.dtype
    if not q_latent.dtype == q_rope.dtype == k_rope.dtype == computes:
        q_latent, q_rope, k_rope = (x.to(computes) for x in (q_latent, q_rope, k_rope))
    name = choose_implementation(implementation, q_latent, q_rope, latents, k_rope, kv_start, key_mask)
    inputs = DecodeInputs(
        q_latent, q_rope, latents, k_rope, kv_end, kv_start, key_mask, block_table, page_size, scaling, settled,
        scales,
    )  # fmt: skip
    if name in _operators:
        return _operators[name](*inputs).to(given)
    if not torch.compiler.is_compiling():
        decode_calls[name] += 1
    if name == "torch":
        return _reference(inputs).to(given)
    options = {"kv_end": kv_end, "kv_start": kv_start, "key_mask": key_mask, "scaling": scaling}
    if block_table is not None:
        options |= {"block_table": block_table, "page_size": page_size}
    if scales is not None:
        options["scales"] = scales
    return _hub_function(name)(q_latent, q_rope, latents, k_rope, **options).to(given)


def _check_scales(latents, scales) -> None:
    if (latents.dtype == torch.float8_e4m3fn) != (scales is not None):
        raise ValueError(f"latents of {latents.dtype} {'lack' if scales is None else 'take no'} scales")
    if scales is not None and scales.shape != latents.shape[:-1]:
        raise ValueError(f"scales {tuple(scales.shape)} are not those of latents {tuple(latents.shape)}")


def _check_shapes(q_latent, q_rope, latents, k_rope, kv_end, block_table, page_size) -> None:
    batch, length, num_latents, heads, width = q_latent.shape
    *rows, latents_kept, width_kept = latents.shape
    *rope_rows, rope_width_kept = k_rope.shape
    rope_batch, rope_length, groups, rope_heads, rope_width = q_rope.shape
    if (latents_kept, width_kept) != (num_latents, width):
        raise ValueError(
            f"latents {tuple(latents.shape)} do not end in the [L, R] of q_latent {tuple(q_latent.shape)}"
        )
    if (rope_batch, rope_length, rope_heads) != (batch, length, heads) or num_latents % groups:
        raise ValueError(f"q_rope {tuple(q_rope.shape)} does not fit q_latent {tuple(q_latent.shape)}")
    if rope_width_kept != rope_width or rope_rows != rows:
        raise ValueError(f"k_rope {tuple(k_rope.shape)} does not fit latents {tuple(latents.shape)}")
    if kv_end.shape != (batch,):
        raise ValueError(f"kv_end has shape {tuple(kv_end.shape)}, not ({batch},)")
    if block_table is None and (len(rows) != 2 or rows[0] != batch):
        raise ValueError(f"latents {tuple(latents.shape)} are not [B={batch}, S, L, R]")
    if block_table is not None and (len(rows) != 1 or page_size < 1 or block_table.shape[0] != batch):
        raise ValueError(
            f"paged rows need latents [rows, L, R], block_table [B, blocks] and page_size >= 1, not "
            f"{tuple(latents.shape)}, {tuple(block_table.shape)} and {page_size}"
        )
