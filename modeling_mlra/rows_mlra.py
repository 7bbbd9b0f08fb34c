"""The format of a cached row: what is kept of a token and layer, in which order, and how many bytes that takes.

A row is `[c_0 … c_{L-1} | k_rope]`: the normed and scaled latents of this device, then the rotated RoPE key that all
heads and latents share. Whoever writes, reads or counts cached rows asks here; a row with more in it (a scale to each
latent) is one with another `width`, `split` and `join`.

Shapes: L latents of this device, R latent width, E RoPE width; `...` for sequences and rows.
"""

from dataclasses import dataclass

import torch

ONE_ROW_WIDTHS = 128, 64  # latent and rotary key that FlashAttention-3 takes as one key of 192 and its value of 128


@dataclass(frozen=True)
class RowFormat:
    """Numbers of the latents and of the rotary key in a row, and their element type.

    Attributes:
        latents: L * R.
        rope: E.
        dtype: of both.
    """

    latents: int
    rope: int
    dtype: torch.dtype

    @classmethod
    def of(cls, latents: torch.Tensor, k_rope: torch.Tensor) -> "RowFormat":
        """The format of rows made of latents `[..., L*R]` and rotary keys `[..., E]`."""
        return cls(latents.shape[-1], k_rope.shape[-1], latents.dtype)

    @classmethod
    def of_config(cls, config, num_latents: int | None = None, dtype: torch.dtype | None = None) -> "RowFormat":
        """The format of a model's rows, or of a device's that keeps only `num_latents` of the latents."""
        named = config.dtype or torch.get_default_dtype()  # of a loaded model it is a name
        dtype = dtype or getattr(torch, str(named).removeprefix("torch."))
        number = config.num_latent_heads if num_latents is None else num_latents
        return cls(number * config.latent_head_dim, config.qk_rope_head_dim, dtype)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.latents + self.rope

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def join(self, latents: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """Rows `[..., width]` of latents `[..., L*R]` and rotary keys `[..., E]`."""
        return torch.cat([latents, k_rope], dim=-1)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[..., L*R]` and rotary keys `[..., E]` of rows, which may be padded behind; views."""
        return rows[..., : self.latents], rows[..., self.latents : self.width]

    def views(self, rows: torch.Tensor, num_latents: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as the decode kernels take them: latents `[..., L, R]` and rotary keys `[..., E]`."""
        latents, k_rope = self.split(rows)
        return latents.unflatten(-1, (num_latents, -1)), k_rope


def is_one_row(latents: torch.Tensor, k_rope: torch.Tensor) -> bool:
    """Whether one latent `[..., 1, R]` and the rotary key `[..., E]` lie side by side in the same rows: a 192/128
    attention as they are."""
    width = latents.shape[-1]
    return (
        latents.shape[-2] == 1
        and (width, k_rope.shape[-1]) == ONE_ROW_WIDTHS
        and latents.stride()[:-2] == k_rope.stride()[:-1]
        and k_rope.storage_offset() - latents.storage_offset() == width
    )


def as_one_row(latents: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of such latents `[B, S, 1, R]`: the keys [c | k_rope] `[B, S, 1, R + E]` and the values c in them, views."""
    width = latents.shape[-1]
    shape = (*k_rope.shape[:2], 1, width + k_rope.shape[-1])
    keys = latents.as_strided(shape, (*latents.stride()[:2], shape[-1], 1))
    return keys, keys[..., :width]


__all__ = ["RowFormat", "as_one_row", "is_one_row"]
