"""Comparison of the fused decoding step with the modules, for the tests and for the benchmark that times it."""

import torch

from modeling_mlra import MLRACache
from modeling_mlra.step_mlra import FusedStep
from tests.models import random_ids, rms_ratio, tiny_model


@torch.no_grad()
def decode_two_tokens(model, fused: bool, batch: int = 2, stand_in=None) -> dict[str, torch.Tensor]:
    """Two steps behind a left-padded prompt, fused or by the modules: logits `[2, M, vocab]`, cache rows, counters.

    The cache's unused rows are NaN. `stand_in` takes the prompt where the model's modules cannot run.
    """
    ids = random_ids(batch, 9).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = MLRACache(model.config, max_cache_len=20)
    prompt = {"attention_mask": mask[:, :7], "position_ids": positions[:, :7]}
    (stand_in or model)(ids[:, :7], cache=cache, **prompt)
    for layer in cache.layers:
        layer.rows[:, :, 7:].view(torch.uint8).fill_(255)  # NaN in every dtype
    key_mask = torch.nn.functional.pad(mask, (0, 11), value=1).bool()
    counters = torch.tensor([7, *positions[:, 7].tolist(), *[8] * batch], dtype=torch.int32, device=model.device)
    step = FusedStep(model, cache, counters, key_mask.int().argmax(-1).int(), key_mask) if fused else None
    logits = []
    for t in (7, 8):
        if step is not None:
            logits.append(step(ids[:, t]).clone())
            continue
        inputs = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
        logits.append(model(ids[:, t : t + 1], cache=cache, **inputs).logits[:, 0])
    rows = torch.stack([layer.rows[:, :, 7:9] for layer in cache.layers])
    return {"logits": torch.stack(logits), "rows": rows, "counters": counters}


@torch.no_grad()
def verify_together(variant: str, device: str, batch: int, tokens_each: int, **overrides) -> dict[str, float | bool]:
    """A step of several tokens of each sequence against the modules: RMS ratios of logits and of rows written."""
    model = tiny_model(variant, num_attention_heads=4, **overrides).to(device)
    ids = random_ids(batch, 7 + tokens_each).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    seen = {}
    for fused in (False, True):
        cache = MLRACache(model.config, max_cache_len=20)
        model(ids[:, :7], attention_mask=mask[:, :7], position_ids=positions[:, :7], cache=cache)
        for layer in cache.layers:
            layer.rows[:, :, 7:].view(torch.uint8).fill_(255)  # NaN in every dtype
        if fused:
            key_mask = torch.nn.functional.pad(mask, (0, 13 - tokens_each), value=1).bool()
            counters = [7, *positions[:, 7:].flatten().tolist(), *[7 + tokens_each] * batch]
            counters = torch.tensor(counters, dtype=torch.int32, device=device)
            step = FusedStep(model, cache, counters, key_mask.int().argmax(-1).int(), key_mask, tokens_each)
            logits = step(ids[:, 7:].flatten()).view(batch, tokens_each, -1)
            assert counters[0] == 7 + tokens_each
        else:
            inputs = {"attention_mask": mask, "position_ids": positions[:, 7:]}
            logits = model(ids[:, 7:], cache=cache, **inputs).logits
        rows = torch.stack([layer.rows[:, :, 7 : 7 + tokens_each] for layer in cache.layers])
        seen[fused] = logits.clone(), rows.clone()
    (logits, rows), (fused_logits, fused_rows) = seen[False], seen[True]
    return {"logits": rms_ratio(logits, fused_logits), "rows": rms_ratio(rows, fused_rows)}


def compare(variant: str, device: str, batch: int = 2, quantise=None, **overrides) -> dict[str, float | bool]:
    """The fused step against the modules: RMS ratios of logits and of the rows written to the cache.

    `quantise` changes the fused model's weights, and gives the other one what they stand for.
    """
    model = tiny_model(variant, num_attention_heads=4, **overrides).to(device)
    small = model if quantise is None else quantise(model)
    expected, seen = decode_two_tokens(model, False, batch), decode_two_tokens(small, True, batch, model)
    return {
        "logits": rms_ratio(expected["logits"], seen["logits"]),
        "rows": rms_ratio(expected["rows"], seen["rows"]),
        "counters": seen["counters"].tolist() == [9, 6, *[9] * (batch - 1), *[10] * batch],
    }
