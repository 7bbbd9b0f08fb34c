"""The format of a cached row: what is kept of a token and layer, in which order, and how many bytes that takes.

A row is `[c_0 … c_{L-1} | k_rope]`: the normed and scaled latents of this device, then the rotated RoPE key that all
heads and latents share. In "plain" rows both are of the model's dtype. In "fp8" rows each latent is of e4m3 numbers
beside a float32 scale, and a row is bytes: `[c_0 … c_{L-1} | k_rope | scale_0 … scale_{L-1}]`, with room in front of
a part that the sizes would leave unaligned; scales and rows begin on the 16 bytes that bulk copies ask for. Whoever
writes, reads or counts cached rows asks here.

A scale is the latent's largest number over 448, the largest of e4m3: that one is kept as it is, and latents that were
read and are kept again stay what they are. The least power of two that is no smaller would cost half as much again
(docs/tried.md).

Shapes: L latents of this device, R latent width, E RoPE width; `...` for sequences and rows.
"""

from dataclasses import dataclass

import torch

ONE_ROW_WIDTHS = 128, 64  # latent and rotary key that FlashAttention-3 takes as one key of 192 and its value of 128
ROW_FORMATS = "plain", "fp8"
EIGHT_BITS = torch.float8_e4m3fn
LARGEST = 448  # of its numbers
COPIED = 16  # bytes that bulk copies begin on
LEAST_SCALE = 2.0**-126  # the smallest whose inverse is finite, of latents of nothing


@dataclass(frozen=True)
class RowFormat:
    """Numbers of the latents and of the rotary key in a row, and their element type.

    Attributes:
        latents: L * R.
        rope: E.
        dtype: of both; of "fp8" rows that of the rotary key, and of the latents when they are read.
        scales: L where the latents are kept in eight bits, each with a scale; else 0.
    """

    latents: int
    rope: int
    dtype: torch.dtype
    scales: int = 0

    @classmethod
    def of(cls, latents: torch.Tensor, k_rope: torch.Tensor, scaled_width: int | None = None) -> "RowFormat":
        """The format of rows made of latents `[..., L*R]` and rotary keys `[..., E]`; "fp8" of latents of
        `scaled_width` R."""
        scales = latents.shape[-1] // scaled_width if scaled_width else 0
        return cls(latents.shape[-1], k_rope.shape[-1], latents.dtype, scales)

    @classmethod
    def of_config(
        cls,
        config,
        num_latents: int | None = None,
        dtype: torch.dtype | None = None,
        row_format: str | None = None,
    ) -> "RowFormat":
        """The format of a model's rows, or of a device's that keeps only `num_latents` of the latents.

        Raises:
            ValueError: for an unknown `row_format` (by default the configuration's).
        """
        named = config.dtype or torch.get_default_dtype()  # of a loaded model it is a name
        dtype = dtype or getattr(torch, str(named).removeprefix("torch."))
        number = config.num_latent_heads if num_latents is None else num_latents
        scales = number if scaled_width(config, row_format) else 0
        return cls(number * config.latent_head_dim, config.qk_rope_head_dim, dtype, scales)

    @property
    def numbers(self) -> int:
        """L * R + E: what a row keeps, however many bytes that takes."""
        return self.latents + self.rope

    @property
    def element(self) -> torch.dtype:
        """Of a buffer of rows."""
        return torch.uint8 if self.scales else self.dtype

    @property
    def width(self) -> int:
        """Elements of a row."""
        if not self.scales:
            return self.numbers
        return _aligned(self._rope_at + self.rope * self.dtype.itemsize, COPIED) + _bytes_of_scales(self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.element.itemsize

    @property
    def _rope_at(self) -> int:
        """Byte of an "fp8" row at which the rotary key begins; the row ends with the scales and what follows them."""
        return _aligned(self.latents, max(4, self.dtype.itemsize))

    def join(self, latents: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """Rows `[..., width]` of latents `[..., L*R]` and rotary keys `[..., E]`; "fp8" rows have no gradient."""
        if not self.scales:
            return torch.cat([latents, k_rope], dim=-1)
        numbers, scales = quantized(latents.detach().unflatten(-1, (self.scales, -1)))
        numbers, rope, scales = (
            part.contiguous().view(torch.uint8) for part in (numbers.flatten(-2), k_rope.detach(), scales)
        )
        numbers = torch.nn.functional.pad(numbers, (0, self._rope_at - self.latents))
        end = _bytes_of_scales(self.scales)
        rope = torch.nn.functional.pad(rope, (0, self.width - self._rope_at - rope.shape[-1] - end))
        scales = torch.nn.functional.pad(scales, (0, end - scales.shape[-1]))
        return torch.cat([numbers, rope, scales], dim=-1)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents as they are kept and rotary keys `[..., E]` of rows, which may be padded behind; views.

        Of "fp8" rows the first are whole rows of bytes, that `separate` finds the latents in.
        """
        if not self.scales:
            return rows[..., : self.latents], rows[..., self.latents : self.width]
        rope = rows[..., self._rope_at : self._rope_at + self.rope * self.dtype.itemsize]
        return rows[..., : self.width], rope.view(self.dtype)

    def read(self, kept: torch.Tensor) -> torch.Tensor:
        """Latents `[..., L*R]` in the format's dtype of latents as they are kept."""
        if not self.scales:
            return kept
        numbers, scales = separate(kept, self.scales, self.latents // self.scales)
        return dequantized(numbers, scales, self.dtype).flatten(-2)

    def views(self, rows: torch.Tensor, num_latents: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same as the decode kernels take them: latents `[..., L, R]`, rotary keys `[..., E]`, and of latents in
        eight bits the scales `[..., L]`."""
        kept, k_rope = self.split(rows)
        latents, scales = separate(kept, num_latents, self.latents // num_latents)
        return latents, k_rope, scales


def scaled_width(config, row_format: str | None = None) -> int | None:
    """R of rows that keep latents in eight bits, else None; `row_format` by default the configuration's.

    Raises:
        ValueError: for an unknown one.
    """
    name = config.cache_row_format if row_format is None else row_format
    if name not in ROW_FORMATS:
        field = "cache_row_format" if row_format is None else "row_format"
        raise ValueError(f"{field}={name!r} must be one of {ROW_FORMATS}")
    return config.latent_head_dim if name == "fp8" else None


def _aligned(size: int, step: int) -> int:
    """`size` rounded up to whole steps."""
    return -(-size // step) * step


def _bytes_of_scales(number: int) -> int:
    """What a row has at its end for them."""
    return _aligned(4 * number, COPIED)


def separate(kept: torch.Tensor, num_latents: int, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents `[..., L, R]` of latents as rows keep them, and of those in eight bits the scales `[..., L]`; views."""
    if kept.dtype != torch.uint8:
        return kept.view(*kept.shape[:-1], num_latents, width), None
    numbers = kept[..., : num_latents * width].view(EIGHT_BITS).unflatten(-1, (num_latents, width))
    scales = kept[..., kept.shape[-1] - _bytes_of_scales(num_latents) :][..., : 4 * num_latents]
    return numbers, scales.view(torch.float32)


def quantized(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `[..., R]` as e4m3 numbers of the same shape and float32 scales `[...]`, whose products they are about.

    One with a number that is not finite is NaN as a whole.
    """
    # Products alone, but for one quotient: GPUs and compilers make products of quotients by a constant
    scales = (latents.abs().amax(dim=-1).float() * (1 / LARGEST)).clamp(min=LEAST_SCALE)
    scales = torch.where(scales.isfinite(), scales, float("nan"))
    return (latents.float() * scales.reciprocal()[..., None]).to(EIGHT_BITS), scales


def dequantized(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The latents of e4m3 `numbers` `[..., R]` and `scales` `[...]`."""
    return (numbers.float() * scales[..., None]).to(dtype)


def is_one_row(latents: torch.Tensor, k_rope: torch.Tensor) -> bool:
    """Whether one latent `[..., 1, R]` and the rotary key `[..., E]` lie side by side in the same rows: a 192/128
    attention as they are."""
    width = latents.shape[-1]
    return (
        latents.shape[-2] == 1
        and latents.dtype == k_rope.dtype
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


__all__ = ["RowFormat", "as_one_row", "dequantized", "is_one_row", "quantized", "scaled_width", "separate"]
