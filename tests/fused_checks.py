"""Compares the fused decoding step with the modules and prints RMS ratios as JSON: `python -m tests.fused_checks`.

A program of its own because Triton decides at import whether it runs on a GPU or is interpreted (TRITON_INTERPRET=1).
"""

import json

import torch

from modeling_mlra import MLRACache, fused_mlra
from modeling_mlra.fused_mlra import FusedStep
from tests.models import VARIANTS, random_ids, rms_ratio, tiny_model

YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}


@torch.no_grad()
def compare(variant: str, device: str, **overrides) -> dict[str, float]:
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


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for variant in VARIANTS:
        results[variant] = compare(variant, device)
        results[f"{variant} gated, no scale, yarn"] = compare(
            variant,
            device,
            attn_output_gate=True,
            latent_scaling=False,
            rope_parameters=YARN,
            num_hidden_layers=1,
        )
    fused_mlra.linear_plan = lambda *_: {"ROWS": 8, "WIDTH": 8, "num_warps": 4}
    results["three chunks a row"] = compare("mlra_4", device)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
