"""What latents become in eight bits, from the definition: the numbers by searching all that e4m3 has."""

import math

import torch

from modeling_mlra import MLRACache
from modeling_mlra.cache_mlra import MLRADynamicLayer

E4M3 = torch.tensor(
    [(m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)][:127],
    dtype=torch.float64,
)
"""What e4m3 numbers can be, by code: zero, seven steps of 2^-9, then eight to each power of two up to 448."""


def oracle(latent: torch.Tensor) -> tuple[list[int], float]:
    """Codes and scale of one latent `[R]`, one number after another in float64; of two equally near the even code."""
    scale = max((latent.abs().max().float() * torch.tensor(1 / 448)).item(), 2.0**-126)
    codes = []
    for number in latent.tolist():
        distance = (E4M3 - abs(number) / scale).abs()
        nearest = torch.nonzero(distance == distance.min()).flatten().tolist()
        code = nearest[0] if len(nearest) == 1 else next(code for code in nearest if code % 2 == 0)
        codes.append(code + 128 * (math.copysign(1, number) < 0))
    return codes, scale


def rounded(latents: torch.Tensor, width: int) -> torch.Tensor:
    """What `latents` `[..., L*R]` are after they were kept in eight bits, by the oracle."""
    result = torch.empty_like(latents).flatten(0, -2)
    for row, target in zip(latents.flatten(0, -2), result, strict=True):
        for c, place in zip(row.split(width), target.split(width), strict=True):
            codes, scale = oracle(c.double())
            signs = torch.tensor([1.0 - 2 * (code > 127) for code in codes], dtype=torch.float64)
            place.copy_(E4M3[[code % 128 for code in codes]] * signs * scale)
    return result.view(latents.shape)


class RoundedLayer(MLRADynamicLayer):
    """Plain rows of latents that the oracle has rounded."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(rounded(key_states, self.rounded_width), value_states)


def rounded_cache(config) -> MLRACache:
    cache = MLRACache(config, row_format="plain")
    for layer in cache.layers:
        layer.__class__, layer.rounded_width = RoundedLayer, config.latent_head_dim
    return cache
