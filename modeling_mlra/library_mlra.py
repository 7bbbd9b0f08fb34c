"""What differs between the versions of transformers that this package runs on (5.17 to 5.24); no other file knows.

Each entry names the version that brought the change; the older form goes when that version becomes the oldest one
supported. Code here tells versions apart by what they have, not by their number.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers < 5.20

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, indices, :]


# 5.24 renamed `past_key_values` to `cache`, in forwards, masks, outputs and generation; the old names end with 5.40.
# This package says `cache`, and hands the library the name that it knows.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

RECORDERS = "transformers.utils.output_capturing"  # module of the hooks by which it collects outputs of layers


def take_cache(kwargs: MutableMapping[str, Any]) -> Any:
    """Remove the cache from keyword arguments, under whichever of its names, and return it (None if there is none).

    Raises:
        ValueError: if both names carry one.
    """
    given = [value for name in CACHE_NAMES if (value := kwargs.pop(name, None)) is not None]
    if len(given) > 1:
        raise ValueError("give the cache once: as `cache`, or as `past_key_values`, its name before transformers 5.24")
    return given[0] if given else None


def takes_cache_by_any_name(function: Callable) -> Callable:
    """Let a function whose cache parameter is `cache` be called with `past_key_values` as well.

    The older name brings a `FutureWarning` with the versions that deprecate it, as it does with the library's models.
    """

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        if "past_key_values" in kwargs:
            if CACHE == "cache" and not torch.compiler.is_compiling():
                message = "`past_key_values` is deprecated and ends with transformers 5.40: say `cache` instead"
                warnings.warn(message, FutureWarning, stacklevel=2)
            kwargs["cache"] = take_cache(kwargs) if "cache" in kwargs else kwargs.pop("past_key_values")
        return function(*args, **kwargs)

    renamed.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # `generate()` asks again and again
    return renamed


def cache_of(outputs) -> Cache | None:
    """The cache in a model's outputs."""
    return getattr(outputs, CACHE)


def is_observed(module: torch.nn.Module) -> bool:
    """Whether hooks look at what goes through a module.

    Those that the library leaves on layers the first time that hidden states or attentions are asked for do not count:
    they do nothing in other calls.
    """
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    after = module._forward_hooks.values()
    return bool(module._forward_pre_hooks) or any(getattr(hook, "__module__", "") != RECORDERS for hook in after)


def is_recording(model: torch.nn.Module, kwargs: dict, *kinds: str) -> bool:
    """Whether a forward is asked, by an argument or by the configuration, for "attentions" or "hidden_states": for
    these kinds, or for either."""
    names = [f"output_{kind}" for kind in kinds or ("attentions", "hidden_states")]
    return any(kwargs.get(name, getattr(model.config, name, False)) for name in names)


def is_paged(cache) -> bool:
    """Whether `cache` is continuous batching's, which is no `Cache`; every version passes it as `cache`.

    Raises:
        ValueError: for a tuple of keys and values, as caches were long ago.
    """
    if isinstance(cache, (tuple, list)):
        raise ValueError("a tuple of keys and values is no cache: pass MLRACache(model.config), or none")
    return cache is not None and not isinstance(cache, Cache)


def causal_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
):
    """The library's causal mask for its attention interface: a tensor, a block mask, or None."""
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{CACHE: cache},
    )


@functools.cache
def _takes_kwargs(function: Callable) -> bool:
    return "kwargs" in inspect.signature(function).parameters


def update_pages(
    cache, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store new keys and values in the cache of continuous batching and read those of the requests at hand.

    Args:
        cache: the library's `PagedAttentionCache`.
        keys: `[1, heads, T, head_dim]`; `values` alike.
        kwargs: what the library passes to attention functions; comes out with the names of 5.19 and later.

    Returns:
        Keys and values `[1, S, heads, head_dim]` (`[S, heads, head_dim]` before 5.19).

    Raises:
        ValueError: for a block table with a version whose cache does not hand out its pages.
    """
    if _takes_kwargs(type(cache).update):
        keys, values = cache.update(keys, values, layer_idx, kwargs)  # [1, heads, S, head_dim]
        return keys.transpose(1, 2), values.transpose(1, 2)
    # transformers < 5.19
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "max_blocks_per_request > 0 (decoding by block table) needs transformers 5.19 or newer; set it to 0 "
            "in the continuous batching configuration"
        )
    keys, values = cache.update(keys, values, layer_idx, kwargs["read_index"], kwargs["write_index"])
    kwargs["max_length_q"], kwargs["max_length_k"] = kwargs.pop("max_seqlen_q"), kwargs.pop("max_seqlen_k")
    for name in ("cu_seq_lens_k", "max_length_k"):
        if isinstance(kwargs[name], dict):
            kwargs[name] = kwargs[name]["full_attention"]
    return keys, values


__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "cache_of",
    "causal_mask",
    "is_observed",
    "is_paged",
    "is_recording",
    "slice_logits_to_keep",
    "take_cache",
    "takes_cache_by_any_name",
    "update_pages",
]
