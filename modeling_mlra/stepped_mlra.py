"""Forwards of everybody, outside of captured loops: one new token of each sequence over a growing latent cache.

Where nothing looks inside the model, the kernels of the fused step start one by one, embedding to logits. Where hooks
look at layers, or hidden states are asked for, every layer that nothing looks into runs its kernels instead of its
modules, and whatever is around it is called as ever.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import _python_dispatch

from .cache_mlra import MLRACache, ordinary_tensors
from .capture_mlra import Held, fingerprint, has_global_hooks, held_with, is_plain, modules_of
from .device_mlra import Launches, on_device
from .forwards_mlra import VerifyingStep, captured_logits, fused_forwards, make_room
from .library_mlra import is_observed, is_recording
from .rows_mlra import RowFormat
from .step_mlra import MAX_SEQUENCES, obstacle
from .tensor_parallel_mlra import tensor_parallel_mesh

MAX_STEPPED = 8  # caches of a model that keep launches, and a few megabytes of buffers each; the oldest go first
STEPPED_DEVICES = ("cuda",)
# What counts or traces operations; torch has no public name for it
current_dispatch_mode = getattr(_python_dispatch, "_get_current_dispatch_mode", lambda: None)


class Fused(NamedTuple):
    """What of a model runs fused: some layers, and perhaps all of it at once."""

    layers: frozenset[int]
    whole: bool


class Stepped:
    """What is kept of a model, as it is, for forwards of everybody; launches keep weights alive, so it goes with it.

    Attributes:
        takes: for each number of sequences, what runs fused.
        held: with the newest caches, their steps.
    """

    def __init__(self, model_fingerprint: tuple):
        self.fingerprint = model_fingerprint
        self.takes: dict[int, Fused] = {}
        self.held: WeakKeyDictionary[MLRACache, Held] = WeakKeyDictionary()

    def held_of(self, cache: MLRACache) -> Held:
        if cache not in self.held and len(self.held) >= MAX_STEPPED:
            del self.held[next(iter(self.held))]
        return held_with(cache, self.fingerprint, self.held)


_stepped: WeakKeyDictionary[nn.Module, Stepped] = WeakKeyDictionary()
_looking = threading.RLock()  # threads with caches of their own may share a model


class FusedLayers:
    """The kernels of a step's layers, each layer's for itself, for a forward that calls the layers.

    Args:
        step: whose buffers and kernels they are.
        layers: indices of those that run fused.
    """

    def __init__(self, step: VerifyingStep, layers: frozenset[int]):
        self.step, self.layers = step.step, layers
        self.launches: dict[int, Launches] = {}
        self.rooms: dict = {}

    def takes(self, layer_idx: int) -> bool:
        return layer_idx in self.layers

    def __call__(self, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer's output `[B, 1, d]`; its rows are appended and counted."""
        index, step = layer.self_attn.layer_idx, self.step
        rows = step.cache.layers[index]
        if index not in self.launches:
            layer_of = weakref.ref(layer)  # whose hooks may keep the model alive

            def run() -> torch.Tensor:
                step.run_layer(layer_of(), rows.rows)
                return step.hidden

            self.launches[index] = Launches(run, step.device, self.rooms)
        with on_device(step.device):
            step.hidden.copy_(hidden_states.flatten(0, 1))
            output = self.launches[index]().view_as(hidden_states).clone()
        rows.set_seq_length(rows.get_seq_length() + 1)
        return output


def is_step(model: nn.Module, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs) -> bool:
    """Whether a forward is of one new token of each of a few sequences, and asks for no more than hidden states."""
    if not isinstance(cache, MLRACache) or cache.is_compileable or cache.offloading or input_ids is None:
        return False
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(input_ids.device.type):
        return False
    if input_ids.device.type not in STEPPED_DEVICES or input_ids.ndim != 2:
        return False
    (batch, length), rows = input_ids.shape, cache.get_seq_length()
    if not all(layer.is_initialized and layer.get_seq_length() == rows for layer in cache.layers):
        return False
    mask_shape = (batch, rows + 1) if attention_mask is None else attention_mask.shape
    return (
        length == 1
        and batch <= MAX_SEQUENCES
        and rows > 0
        and mask_shape == (batch, rows + 1)
        and (position_ids is None or position_ids.ndim == 2)
        and inputs_embeds is None
        and labels is None
        and not is_recording(model, kwargs, "attentions")
        and model.config._attn_implementation != "eager"
        and current_dispatch_mode() is None
        and not torch.jit.is_tracing()
        and not (input_ids.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def fits(model: nn.Module, cache: MLRACache, batch: int) -> bool:
    """Whether a cache holds rows of `batch` sequences as this model writes them."""
    config, weight, rows = model.config, model.lm_head.weight, cache.layers[0].rows
    own = RowFormat(config.kv_lora_rank, config.qk_rope_head_dim, weight.dtype)
    if cache.layers[0].scaled_width == config.latent_head_dim:
        own = replace(own, scales=config.num_latent_heads)
    return len(model.model.layers) == config.num_hidden_layers == len(cache.layers) and all(
        layer.rows.shape == (batch, *rows.shape[1:])
        and layer.rows.device == weight.device
        and layer.format == own
        and not layer.rows.requires_grad
        for layer in cache.layers
    )


def what_fuses(model: nn.Module, batch: int) -> Fused:
    """Nothing where more than hooks is in the way, else the layers that no hook looks into; all, if there are none."""
    if (
        not is_plain(model, but_hooks=True)
        or has_global_hooks()
        or tensor_parallel_mesh(model) is not None
        or not all(parameter.numel() for parameter in model.parameters())  # hooks of sharded models fetch them
        or obstacle(model, batch, but_hooks=True) is not None
    ):
        return Fused(frozenset(), False)
    layers = model.model.layers
    return Fused(frozenset(x for x in range(len(layers)) if not is_looked_into(layers[x])), is_plain(model))


def is_looked_into(layer: nn.Module) -> bool:
    """Whether hooks see what is inside of a layer, or the arguments that only its modules make use of."""
    return bool(layer._forward_pre_hooks_with_kwargs) or any(
        is_observed(module) for module in modules_of(layer) if module is not layer
    )


def step_for(model: nn.Module, cache: MLRACache, input_ids) -> tuple[Held, Fused] | None:
    """What is held of the model with this cache, which has room for a token, and what runs fused."""
    now, batch = fingerprint(model), input_ids.shape[0]
    with _looking:
        kept = _stepped.get(model)
        if kept is None or kept.fingerprint != now:
            kept = _stepped[model] = Stepped(now)
        if batch not in kept.takes:
            kept.takes[batch] = what_fuses(model, batch)
        if not kept.takes[batch].layers:
            return None
        held = kept.held_of(cache)
        if ("fits", batch) not in held.objects:
            held.objects["fits", batch] = fits(model, cache, batch)
        if not held.objects["fits", batch]:
            return None
        make_room(cache, 1)
        return kept.held_of(cache), kept.takes[batch]


def made(held: Held, key: tuple, make: Callable):
    """What is held by this key, made at first, for the current stream alone: there its buffers are freed, and may be
    given to others."""
    key = *key, torch.cuda.current_stream() if torch.cuda.is_available() else None
    if key not in held.objects:
        with ordinary_tensors():
            held.objects[key] = make()
    return held.objects[key]


def fused_forward(
    model: nn.Module, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs: dict
) -> torch.Tensor | FusedLayers | None:
    """Logits of a forward that runs fused as a whole, or the layers of it that do; None for the modules' own."""
    arguments = model, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, kwargs
    if torch.compiler.is_compiling():
        return None
    if (captured := captured_logits(*arguments)) is not None:
        return captured
    if not is_step(*arguments) or (found := step_for(model, cache, input_ids)) is None:
        return None
    (held, fused), batch, rows = found, input_ids.shape[0], cache.get_seq_length()
    masked = attention_mask is not None
    with on_device(input_ids.device):
        step = made(held, ("step", batch, masked), lambda: VerifyingStep(model, cache, batch, 1, masked))
        inputs = input_ids, rows, position_ids, attention_mask
        if fused.whole and not is_recording(model, kwargs):
            logits = step(*inputs)
            cache.set_seq_length(rows + 1)
            fused_forwards["launches"] += 1
            return logits
        step.start(*inputs)
        fused_forwards["layers"] += 1
        return made(held, ("layers", batch, masked), lambda: FusedLayers(step, fused.layers))


def free_steps(model: nn.Module) -> None:
    """Free what forwards of everybody have kept of this model."""
    with _looking:
        _stepped.pop(model, None)


__all__ = ["FusedLayers", "free_steps", "fused_forward"]
