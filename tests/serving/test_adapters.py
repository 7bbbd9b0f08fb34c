"""LoRA adapters on the projections, of which each request names its own or none."""

import json

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from tests.serving.models import PROMPTS, ask, continuations, saved_model, tokens

RANK, ALPHA = 8, 16


def write_adapter(folder, model, seed: int) -> dict[str, torch.Tensor]:
    """A random adapter of every linear layer of `model`, as peft writes it; returns what it adds to their weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(RANK, module.in_features, generator=generator) * 0.1
            up = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            key = f"base_model.model.model.{name}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            added[f"{name}.weight"] = up @ down * (ALPHA / RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({name.split(".")[-2] for name in added})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def test_adapters(tmp_path, start):
    model = saved_model(tmp_path / "model", "mlra_2", attn_output_gate=True)
    plain = continuations(model)
    added = write_adapter(tmp_path / "adapter", model, 3)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name in added:
                parameter.add_(added[name])
    adapted = continuations(model)
    assert adapted != plain
    # Two places for adapters: the CPU build's kernels give requests without one the last, which stays empty
    engine = start(tmp_path / "model", enable_lora=True, max_lora_rank=RANK, max_loras=2)
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    choice = [adapter if index % 2 else None for index in range(len(PROMPTS))]
    expected = [(adapted if chosen else plain)[index] for index, chosen in enumerate(choice)]
    assert tokens(ask(engine, lora_request=choice)) == expected
