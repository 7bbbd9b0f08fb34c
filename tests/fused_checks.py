"""Comparison of the fused decoding step with the modules, for the tests and for the benchmark that times it."""

import torch

from modeling_mlra import MLRACache
from modeling_mlra.fused_mlra import FusedStep
from tests.models import random_ids, rms_ratio, tiny_model


@torch.no_grad()
def compare(variant: str, device: str, **overrides) -> dict[str, float | bool]:
    """Two fused steps after a left-padded prompt against the modules: logits and the rows written to the cache."""
    model = tiny_model(variant, num_attention_heads=4, **overrides).to(device)
    ids = random_ids(2, 9).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    fused_cache, module_cache = (MLRACache(model.config, max_cache_len=20) for _ in range(2))
    for cache in (fused_cache, module_cache):
        model(ids[:, :7], attention_mask=mask[:, :7], position_ids=positions[:, :7], past_key_values=cache)
        for layer in cache.layers:
            layer.rows[:, :, 7:] = torch.nan
    key_mask = torch.nn.functional.pad(mask, (0, 11), value=1).bool()
    counters = torch.tensor([7, *positions[:, 7].tolist(), 8, 8], dtype=torch.int32, device=device)
    step = FusedStep(model, fused_cache, counters, key_mask.int().argmax(-1).int(), key_mask)
    logits, reference = [], []
    for t in (7, 8):
        logits.append(step(ids[:, t]).clone())
        reference.append(
            model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                past_key_values=module_cache,
            ).logits[:, 0]
        )
    rows = [torch.stack([layer.rows[:, :, 7:9] for layer in c.layers]) for c in (module_cache, fused_cache)]
    return {
        "logits": rms_ratio(torch.stack(reference), torch.stack(logits)),
        "rows": rms_ratio(*rows),
        "counters": counters.tolist() == [9, *(positions[:, 8] + 1).tolist(), 10, 10],
    }
