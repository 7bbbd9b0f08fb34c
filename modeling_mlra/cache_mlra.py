"""The latent cache: one row of L * r + e numbers per token and layer, and nothing else.

A row is `[c_0 … c_{L-1} | k_rope]`: the normed and scaled latents, then the rotated RoPE key that all heads and
latents share (paper, section 3; 4.5 head widths for the released sizes). As in every cache of the library, a layer
takes what is new and returns all it holds: `update(latents, rope_keys)`, with "keys" for latents and "values" for RoPE
keys.

Shapes: B batch, S cached tokens, T new tokens, L latents (of this device), R latent width, E RoPE width.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache, StaticLayer
from transformers.configuration_utils import PreTrainedConfig


class MLRADynamicLayer(CacheLayerMixin):
    """Latent rows of one layer, growing as tokens arrive.

    Rows live in one buffer `[B, 1, capacity, L*R + E]` that grows by a quarter when it is full, so that a token costs
    an append and not a copy of everything before it. `keys` and `values` are views of the rows in use.
    """

    is_sliding = False
    is_croppable = True
    min_growth = 256  # rows
    rows: torch.Tensor  # from the first update on

    def __init__(self):
        super().__init__()
        self._length = 0
        self._latent_width = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._latent_width = key_states.shape[-1]
        row_width = self._latent_width + value_states.shape[-1]
        self._set_rows(key_states.new_empty(key_states.shape[0], 1, 0, row_width), 0)
        self.is_initialized = True

    def _set_rows(self, rows: torch.Tensor, length: int) -> None:
        self.rows, self._length = rows, length
        used = rows[:, :, :length]
        self.keys, self.values = used[..., : self._latent_width], used[..., self._latent_width :]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `T` rows and return all of them.

        Args:
            key_states: latents `[B, 1, T, L*R]`.
            value_states: rotated RoPE keys `[B, 1, T, E]`.

        Returns:
            The cached latents `[B, 1, S, L*R]` and RoPE keys `[B, 1, S, E]`, views of the cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_rows = torch.cat([key_states, value_states], dim=-1)
        start, end = self._length, self._length + new_rows.shape[2]
        if new_rows.requires_grad or self.rows.requires_grad:
            # Autograd needs the earlier rows unmodified, so they are copied as the library's own cache does.
            rows = torch.cat([self.rows[:, :, :start], new_rows], dim=2)
        else:
            rows = self.rows
            if end > rows.shape[2]:
                capacity = end + max(end // 4, self.min_growth)
                rows = rows.new_empty(rows.shape[0], 1, capacity, rows.shape[-1])
                rows[:, :, :start] = self.rows[:, :, :start]
            rows[:, :, start:end] = new_rows
        self._set_rows(rows, end)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all rows; the buffer stays allocated."""
        if self.is_initialized:
            self._set_rows(self.rows.detach(), 0)

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
        if self.is_initialized and tokens_to_remove:
            self._set_rows(self.rows, max(self._length + tokens_to_remove, 0))

    def _map_rows(self, function) -> None:
        if self.is_initialized:
            self._set_rows(function(self.rows), self._length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows[indices])

    def offload(self) -> None:
        self._map_rows(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_rows(lambda rows: rows.to(self.device, non_blocking=True))


class MLRAStaticLayer(StaticLayer):
    """Latent rows of one layer in a buffer `[B, 1, max_cache_len, L*R + E]` of fixed address, for compiled code."""

    rows: torch.Tensor
    cumulative_length: torch.Tensor
    _is_empty = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        row_width = self.k_head_dim + self.v_head_dim
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._set_rows(key_states.new_zeros(self.batch_size, 1, self.max_cache_len, row_width))
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.rows)
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def _set_rows(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.keys, self.values = rows[..., : self.k_head_dim], rows[..., self.k_head_dim :]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write `T` rows after those in use and return the whole buffer, unused tail included.

        Args:
            key_states: latents `[B, 1, T, L*R]`.
            value_states: rotated RoPE keys `[B, 1, T, E]`.

        Returns:
            Latents `[B, 1, max_cache_len, L*R]` and RoPE keys `[B, 1, max_cache_len, E]`, views of the cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[2]
        positions = torch.arange(num_new, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(num_new)
        self._is_empty = False
        self.rows.index_copy_(2, positions, torch.cat([key_states, value_states], dim=-1))
        return self.rows[..., : self.k_head_dim], self.rows[..., self.k_head_dim :]

    def get_seq_length(self) -> torch.Tensor | int:
        """Rows in use: a tensor of fixed address, or the integer 0 while the layer is known to be empty."""
        return 0 if self._is_empty else self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self._is_empty = True

    def _map_rows(self, function) -> None:
        if self.is_initialized:
            self._set_rows(function(self.rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def offload(self) -> None:
        self._map_rows(lambda rows: rows.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_rows(lambda rows: rows.to(self.device, non_blocking=True))


class MLRACache(Cache):
    """Latent cache of a whole model; what `generate()` uses unless told otherwise.

    Every instance is also an instance of the library's cache of its kind, `DynamicCache` or `StaticCache`.

    Args:
        config: the model's configuration.
        max_cache_len: tokens to hold. Given, the cache is static: allocated once at the first token, with addresses
            that compiled code and CUDA graphs can rely on. `None` grows as needed.
        offloading: keep layers on the CPU and fetch them one ahead.

    Raises:
        ValueError: if `max_cache_len` is below 1.

    Example:
        >>> cache = MLRACache(model.config)
        >>> model(input_ids, cache=cache)
        >>> cache.get_seq_length(), cache.bytes_per_token(), cache.nbytes
    """

    def __new__(
        cls, config: PreTrainedConfig | None = None, max_cache_len: int | None = None, offloading: bool = False
    ):
        if cls is MLRACache:
            cls = MLRADynamicCache if max_cache_len is None else MLRAStaticCache
        return super().__new__(cls)

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None, offloading: bool = False):
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len} must be at least 1, or None to grow as needed")
        config = config.get_text_config(decoder=True)
        layers = [
            MLRADynamicLayer() if max_cache_len is None else MLRAStaticLayer(max_cache_len)
            for _ in range(config.num_hidden_layers)
        ]
        Cache.__init__(self, layers=layers, offloading=offloading, offload_only_non_sliding=False)
        self._row_dim = config.cache_row_dim
        self._dtype = config.dtype or torch.get_default_dtype()

    def bytes_per_token(self) -> int:
        """Bytes one more token of one sequence takes in this cache, all layers together.

        Before the first forward it follows from the configuration; afterwards from the rows really kept, which under
        tensor parallelism are this device's share.
        """
        return sum(
            layer.rows.shape[-1] * layer.rows.element_size()
            if layer.is_initialized
            else self._row_dim * self._dtype.itemsize
            for layer in self.layers
        )

    def set_seq_length(self, length: int) -> None:
        """Declare the first `length` rows of a static cache to be the ones in use, whoever wrote them."""
        for layer in self.layers:
            layer.cumulative_length.fill_(length)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, room for growth included."""
        return sum(layer.rows.nbytes for layer in self.layers if layer.is_initialized)


class MLRADynamicCache(MLRACache, DynamicCache):
    """The `MLRACache` that grows."""


class MLRAStaticCache(MLRACache, StaticCache):
    """The `MLRACache` of fixed length."""


__all__ = ["MLRACache", "MLRADynamicCache", "MLRADynamicLayer", "MLRAStaticCache", "MLRAStaticLayer"]
