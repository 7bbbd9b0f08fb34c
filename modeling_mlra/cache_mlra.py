"""The latent cache: one row of L * r + e numbers per token and layer, and nothing else.

A row is `[c_0 … c_{L-1} | k_rope]`: the normed and scaled latents, then the rotated RoPE key that all heads and
latents share (paper, section 3; 4.5 head widths for the released sizes), in a format of `rows_mlra`. As in every cache
of the library, a layer takes what is new and returns all it holds: `update(latents, rope_keys)`, with "keys" for
latents and "values" for RoPE keys. Of "fp8" rows it returns the latents as they are kept, bytes that
`rows_mlra.separate` takes apart.

Shapes: B batch, S cached tokens, T new tokens, L latents (of this device), R latent width, E RoPE width.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache, StaticLayer
from transformers.configuration_utils import PreTrainedConfig

from .rows_mlra import RowFormat, scaled_width


def ordinary_tensors() -> AbstractContextManager:
    """Where a tensor made is an ordinary one, even under `torch.inference_mode()`.

    A cache is written to in place, and one filled in inference mode may be continued outside it.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return nullcontext()


class LatentRows:
    """What both kinds of layer share: one buffer of rows, of which `keys` and `values` are two views.

    Assigning `keys` or `values` changes the rows. A copied, pickled or saved layer holds the rows in use. Of "fp8"
    rows `keys` is a copy, in the dtype of the values; assigned again it makes the same rows.

    Attributes:
        scaled_width: R where latents are kept in eight bits, else None.
    """

    rows: torch.Tensor
    scaled_width: int | None = None
    device: torch.device
    is_initialized = False
    supports_early_init = False  # the library would allocate keys and values of heads
    format: RowFormat  # from the first update on

    @property
    def keys(self) -> torch.Tensor | None:
        """The cached latents, a view (of "fp8" rows a copy)."""
        return self._part(0)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._assign(0, keys)

    @property
    def values(self) -> torch.Tensor | None:
        """The cached rotary keys, a view."""
        return self._part(1)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._assign(1, values)

    def _part(self, index: int):
        raise NotImplementedError

    def _seen(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """The keys (0) or values (1) of rows."""
        part = self.format.split(rows)[index]
        return part if index else self.format.read(part)

    def _assign(self, index: int, part: torch.Tensor | None) -> None:
        if part is None and not self.is_initialized:  # as the library's own `__init__` does
            return
        expected = self._assignable(index)
        shape = () if part is None else tuple(part.shape)
        if len(shape) != 4 or not all(b in (None, a) for a, b in zip(shape, expected, strict=True)):
            name, needed = (
                ("keys", "values")[index],
                ", ".join("*" if size is None else str(size) for size in expected),
            )
            raise ValueError(f"{name} of shape {shape} do not fit this cache, which takes [{needed}]")
        self._take(index, part)

    def _assignable(self, index: int) -> tuple[int | None, ...]:
        """The shape of keys or values that may be assigned, None for any size."""
        raise NotImplementedError

    def _take(self, index: int, part) -> None:
        raise NotImplementedError

    def _set_rows(self, rows: torch.Tensor) -> None:
        raise NotImplementedError

    def _map_rows(self, function) -> None:
        if self.is_initialized:
            with ordinary_tensors():
                self._set_rows(function(self.rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def offload(self) -> None:
        self._map_rows(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Fetch the rows, after all that the device was given to do before: rows may still be on their way to the
        CPU, and rows fetched earlier may still be read where these will lie. (Older versions of the library do not
        wait.)"""
        if self.is_initialized and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(torch.cuda.default_stream(self.device))
        self._map_rows(lambda rows: rows.to(self.device, non_blocking=True))


class MLRADynamicLayer(LatentRows, CacheLayerMixin):
    """Latent rows of one layer, growing as tokens arrive.

    Rows live in one buffer `[B, 1, capacity, L*R + E]` that grows by a quarter when it is full, so that a token costs
    an append and not a copy of everything before it. `keys` and `values` are views of the rows in use; rows seen
    through them are never overwritten, so that what they showed before a `crop` can be assigned again after it.
    """

    is_sliding = False
    is_croppable = True
    min_growth = 256  # rows

    def __init__(self, scaled_width=None):
        self.scaled_width = scaled_width
        self._rows, self._length = None, 0
        self._num_seen = 0  # rows that may be seen through `keys` and `values`
        self._reserved = 0
        self._assigned = {}  # keys (0) or values (1) that wait for the other to fit them
        super().__init__()

    @property
    def rows(self) -> torch.Tensor:
        """The buffer, room for growth included; from the first update on."""
        self._check_assigned()
        return self._rows

    def _check_assigned(self) -> None:
        if self._assigned:
            keys, values = (
                None if (part := self._part(index)) is None else f"{part.dtype} {tuple(part.shape)}"
                for index in (0, 1)
            )
            raise ValueError(
                f"keys {keys} and values {values} do not belong together: assign both, of the same tokens"
            )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.format = RowFormat.of(key_states, value_states, self.scaled_width)
        with ordinary_tensors():
            shape = key_states.shape[0], 1, 0, self.format.width
            self._set_rows(key_states.new_empty(shape, dtype=self.format.element))
        self.is_initialized = True

    def _set_rows(self, rows: torch.Tensor) -> None:
        if rows is not self._rows:
            self._rows, self._num_seen = rows, 0

    def _part(self, index: int):
        if index in self._assigned or not self.is_initialized:
            return self._assigned.get(index)
        self._num_seen = max(self._num_seen, self._length)
        return self._seen(self._rows[:, :, : self._length], index)

    def _assignable(self, index: int) -> tuple[int | None, ...]:
        return None, 1, None, (self.format.latents, self.format.rope)[index] if self.is_initialized else None

    def _take(self, index: int, part) -> None:
        self._assigned[index] = part
        parts = [self._part(0), self._part(1)]
        kinds = {None if p is None else (p.shape[:-1], p.dtype, p.device) for p in parts}
        if None not in kinds and len(kinds) == 1:
            self._assigned.clear()
            self.lazy_initialization(*parts)
            with ordinary_tensors():
                self._set_rows(self.format.join(*parts))
            self._length = part.shape[2]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `T` rows and return all of them.

        Args:
            key_states: latents `[B, 1, T, L*R]`.
            value_states: rotated RoPE keys `[B, 1, T, E]`.

        Returns:
            The cached latents `[B, 1, S, L*R]` (as they are kept) and RoPE keys `[B, 1, S, E]`, views of the cache.

        Raises:
            ValueError: for rows of another number of sequences than the cache holds; or if keys or values were
                assigned, and the other does not fit them.
        """
        if not self.is_initialized and not self._assigned:
            self.lazy_initialization(key_states, value_states)
        rows, new_rows = self.rows, self.format.join(key_states, value_states)
        if rows.shape[0] != new_rows.shape[0]:
            raise ValueError(f"the cache holds {rows.shape[0]} sequences, and these tokens are of {new_rows.shape[0]}")
        start, end = self._length, self._length + new_rows.shape[2]
        if new_rows.requires_grad or rows.requires_grad:
            # Autograd needs the earlier rows unmodified, so they are copied as the library's own cache does.
            with ordinary_tensors():
                self._set_rows(torch.cat([rows[:, :, :start], new_rows], dim=2))
        else:
            if end > rows.shape[2] or start < self._num_seen:
                self._grow(self._reserved if self._reserved >= end else end + max(end // 4, self.min_growth))
            self._rows[:, :, start:end] = new_rows
        self._length = end
        return self.format.split(self._rows[:, :, :end])

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` rows: now, or from the first update on. Rows move if there are some already."""
        self._reserved = capacity
        if self.is_initialized and (capacity > self.rows.shape[2] or self._length < self._num_seen):
            self._grow(max(capacity, self.rows.shape[2]))

    def _grow(self, capacity: int) -> None:
        rows = self.rows
        with ordinary_tensors():
            # Finite where no row is: FlashAttention-3 multiplies by zero what lies behind the last one
            grown = rows.new_zeros(rows.shape[0], 1, capacity, rows.shape[-1])
        grown[:, :, : self._length] = rows[:, :, : self._length]
        self._set_rows(grown)

    def is_seen_behind(self, length: int) -> bool:
        """Whether rows behind the first `length` may be seen through `keys` and `values`."""
        return self._num_seen > length

    def set_seq_length(self, length: int) -> None:
        self._length = length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        self._check_assigned()
        return self._length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all rows; the next ones may be of another batch, dtype or device."""
        self._rows, self._length, self.is_initialized = None, 0, False
        self._assigned.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` rows.

        Raises:
            ValueError: for a positive number, which would look like a length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer, for example "
                f"crop({tokens_to_remove} - cache.get_seq_length()) to keep {tokens_to_remove}"
            )
        self._length = max(self.get_seq_length() + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take each sequence's rows from sequence `beam_idx[b]`; in place, so that graphs of the buffer stay right."""
        if not self.is_initialized:
            return
        if self.rows.requires_grad or self._num_seen:
            super().reorder_cache(beam_idx)
            return
        used = self.rows[:, :, : self._length]
        used.copy_(used.index_select(0, beam_idx.to(used.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows[indices])

    def __getstate__(self) -> dict:
        state = self.__dict__ | {"_assigned": dict(self._assigned), "_num_seen": 0}
        if self.is_initialized:
            state["_rows"] = self._rows[:, :, : self._length].clone(memory_format=torch.contiguous_format)
        return state


class MLRAStaticLayer(LatentRows, StaticLayer):
    """Latent rows of one layer in a buffer `[B, 1, max_cache_len, L*R + E]` of fixed address, for compiled code.

    `keys` and `values` are views of all of it; assigning them copies into it.
    """

    rows: torch.Tensor  # from the first update on
    cumulative_length: torch.Tensor
    _is_empty = True

    def __init__(self, max_cache_len: int, scaled_width: int | None = None):
        super().__init__(max_cache_len)
        self.scaled_width = scaled_width

    @classmethod
    def over(cls, layer: MLRADynamicLayer) -> "MLRAStaticLayer":
        """A layer of as many rows as the growing `layer` has room for: the same ones."""
        fixed = cls(layer.rows.shape[2], layer.scaled_width)
        fixed.dtype, fixed.device = layer.format.dtype, layer.rows.device
        fixed.batch_size, fixed.num_heads = layer.rows.shape[:2]
        fixed.format = layer.format
        fixed.k_head_dim, fixed.v_head_dim = layer.format.latents, layer.format.rope
        fixed.cumulative_length = fixed.cumulative_length.to(fixed.device)
        fixed._set_rows(layer.rows)
        fixed.is_initialized = True
        fixed.set_seq_length(layer.get_seq_length())
        return fixed

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.format = RowFormat.of(key_states, value_states, self.scaled_width)
        self._allocate(key_states.new_empty((self.batch_size, 1, 0, self.format.width), dtype=self.format.element))
        self.is_initialized = True

    def _allocate(self, rows: torch.Tensor) -> None:
        """A buffer that begins with `rows` `[B, 1, S, L*R + E]` and the number of those in use, at fixed addresses."""
        with ordinary_tensors():
            self._set_rows(torch.nn.functional.pad(rows, (0, 0, 0, self.max_cache_len - rows.shape[2])))
            self.cumulative_length = self.cumulative_length.to(self.device, copy=True)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.rows)
            torch._dynamo.mark_static_address(self.cumulative_length)

    def _set_rows(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def _part(self, index: int):
        return self._seen(self.rows, index) if self.is_initialized else None

    def _assignable(self, index: int) -> tuple[int | None, ...]:
        if not self.is_initialized:
            raise ValueError(
                "an empty static latent cache takes no keys or values by assignment: it is allocated by the first "
                "forward, `update` or `lazy_initialization`"
            )
        return tuple(self._part(index).shape)

    def _take(self, index: int, part) -> None:
        if index or not self.format.scales:
            self.format.split(self.rows)[index].copy_(part)
        else:
            self.rows.copy_(self.format.join(part.to(self.values), self.values))
        self._is_empty = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write `T` rows after those in use and return the whole buffer, unused tail included.

        Args:
            key_states: latents `[B, 1, T, L*R]`.
            value_states: rotated RoPE keys `[B, 1, T, E]`.

        Returns:
            Latents `[B, 1, max_cache_len, L*R]` (as they are kept) and RoPE keys `[B, 1, max_cache_len, E]`, views of
            the cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[2]
        positions = torch.arange(num_new, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(num_new)
        self._is_empty = False
        self.rows.index_copy_(2, positions, self.format.join(key_states, value_states))
        return self.format.split(self.rows)

    def set_seq_length(self, length: int) -> None:
        self.cumulative_length.fill_(length)
        self._is_empty = length == 0

    def get_seq_length(self) -> torch.Tensor | int:
        """Rows in use: a tensor of fixed address, or the integer 0 while the layer is known to be empty."""
        return 0 if self._is_empty else self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self._is_empty = True

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self.is_initialized:
            used = self.rows[:, :, : int(self.cumulative_length)]
            state["rows"] = used.clone(memory_format=torch.contiguous_format)
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.is_initialized:
            self._allocate(self.rows)


def check_prefix(cache: Cache) -> None:
    """Raise for a cache that was filled with keys and values of heads.

    Raises:
        ValueError: for a cache that another kind of model, or PEFT's prefix tuning, has filled.
    """
    keys = None if isinstance(cache, MLRACache) else getattr(cache.layers[0], "keys", None)
    if keys is not None and keys.dim() == 4 and keys.shape[1] != 1:
        raise ValueError(
            f"the cache holds keys of {keys.shape[1]} heads; MLRA caches one row of latents per token, so caches of "
            "other models and prefix tuning do not fit (prompt tuning and LoRA do)"
        )


class MLRACache(Cache):
    """Latent cache of a whole model; what `generate()` uses unless told otherwise.

    Every instance is also an instance of the library's cache of its kind, `DynamicCache` or `StaticCache`.

    Args:
        config: the model's configuration.
        max_cache_len: tokens to hold. Given, the cache is static: allocated once at the first token, with addresses
            that compiled code and CUDA graphs can rely on. `None` grows as needed.
        offloading: keep layers on the CPU and fetch them one ahead.
        row_format: "plain" or "fp8", by default `config.cache_row_format` (see there).

    Attributes:
        made_for_call: whether `generate()` made it by itself, so that nobody else has it.

    Raises:
        ValueError: if `max_cache_len` is below 1, or for an unknown `row_format`.

    Example:
        >>> cache = MLRACache(model.config)
        >>> model(input_ids, cache=cache)
        >>> cache.get_seq_length(), cache.bytes_per_token(), cache.nbytes
    """

    made_for_call = False
    _row_bytes = 0  # of a layer, where no row is held yet

    def __new__(
        cls,
        config: PreTrainedConfig | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
        row_format: str | None = None,
    ):
        if cls is MLRACache:
            cls = MLRADynamicCache if max_cache_len is None else MLRAStaticCache
        return super().__new__(cls)

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int | None = None,
        offloading: bool = False,
        row_format: str | None = None,
    ):
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len} must be at least 1, or None to grow as needed")
        config = config.get_text_config(decoder=True)
        width = scaled_width(config, row_format)
        layers = [
            MLRADynamicLayer(width) if max_cache_len is None else MLRAStaticLayer(max_cache_len, width)
            for _ in range(config.num_hidden_layers)
        ]
        Cache.__init__(self, layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self._row_bytes = RowFormat.of_config(config, row_format=row_format).nbytes

    def bytes_per_token(self) -> int:
        """Bytes one more token of one sequence takes in this cache, all layers together.

        Before the first forward it follows from the configuration; afterwards from the rows really kept, which under
        tensor parallelism are this device's share.
        """
        return sum(layer.format.nbytes if layer.is_initialized else self._row_bytes for layer in self.layers)

    def set_seq_length(self, length: int) -> None:
        """Declare the first `length` rows of each layer to be the ones in use, whoever wrote them."""
        for layer in self.layers:
            layer.set_seq_length(length)

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` tokens of each sequence in a growing cache, which still grows beyond them."""
        for layer in self.layers:
            layer.reserve(capacity)

    def fixed(self) -> "MLRACache":
        """This cache if it is static, else a static one over the same rows, as many as there is room for.

        Lengths are each one's own: `set_seq_length` tells the growing cache what was written through the static one.
        """
        if self.is_compileable:
            return self
        fixed = MLRAStaticCache.__new__(MLRAStaticCache)
        Cache.__init__(fixed, layers=[MLRAStaticLayer.over(layer) for layer in self.layers])
        fixed._row_bytes = self._row_bytes
        return fixed

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, room for growth included."""
        return sum(layer.rows.nbytes for layer in self.layers if layer.is_initialized)


class MLRADynamicCache(MLRACache, DynamicCache):
    """The `MLRACache` that grows.

    Args:
        config: the model's configuration; or for each layer its keys and values, with which `torch.nn.DataParallel`
            makes one cache of the caches on its devices.
    """

    def __init__(self, config, max_cache_len: None = None, offloading: bool = False, row_format: str | None = None):
        if hasattr(config, "get_text_config"):
            super().__init__(config, max_cache_len, offloading, row_format)
            return
        layers = []
        for keys, values, *_ in config:
            layers.append(MLRADynamicLayer())
            layers[-1].keys, layers[-1].values = keys, values
        Cache.__init__(self, layers=layers, offloading=offloading, offload_only_non_sliding=False)


class MLRAStaticCache(MLRACache, StaticCache):
    """The `MLRACache` of fixed length."""


__all__ = ["MLRACache", "MLRADynamicCache", "MLRADynamicLayer", "MLRAStaticCache", "MLRAStaticLayer", "check_prefix"]
