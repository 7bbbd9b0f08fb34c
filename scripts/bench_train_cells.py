"""What bench_train times: cells by their names, and the models that they stand for."""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from evals.common import CONFIGURATIONS
from scripts.causal_attention import IMPLEMENTATIONS, block_mask, causal_attention
from scripts.cli import UserError
from scripts.compare_architectures import architecture_fields, match_width
from scripts.recipe import model_config
from scripts.training_model import compile_layers, set_recomputation, use_float8
from scripts.training_speed import count_parameters

LLAMAS = {"llama_gqa": 8, "llama_mha": 24}  # key heads
COMPILE = ("none", "layers", "model")
RECOMPUTE = ("none", "attention_inputs", "elementwise", "layers")
PRODUCTS = ("bfloat16", "float8")
WIDENED = "_16"  # behind a model's name: its MLP as wide as the next multiple of 16, which float8 needs
CELLS = (
    "mlra_4:auto:model:4:none",
    "llama_mha:auto:model:4:none",
    "mla:auto:model:4:none",
    "mlra_4:auto:layers:10:elementwise",
    "mlra_4:auto:model:4:attention_inputs",
    "mlra_4:auto:layers:4:none",
    "mlra_4:fa4:layers:4:none",
    "mlra_4:flex:layers:4:none",
    "mlra_4:flash:layers:4:none",
    "mlra_4:efficient:layers:4:none",
    "mlra_4:auto:none:4:none",
    "mlra_4:auto:model:4:layers",
    "llama_gqa:auto:model:4:none",
)
SMOKE_CELLS = ("mlra_4:auto:none:2:none", "mlra_4:auto:layers:2:attention_inputs", "llama_mha:auto:model:2:none")
SMOKE_SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}


class Cell(NamedTuple):
    """What is timed; see the module's docstring."""

    model: str
    attention: str
    compile: str
    blocks: int
    recompute: str
    products: str = "bfloat16"

    def __str__(self) -> str:
        return ":".join(map(str, self)).removesuffix(":bfloat16")


def read_cell(text: str) -> Cell:
    """A cell by its name.

    Raises:
        UserError: naming the part that is unknown.
    """
    parts = text.split(":")
    if len(parts) not in (5, 6) or not parts[3].isdigit() or int(parts[3]) < 1:
        raise UserError(f"--cells {text}: write MODEL:ATTENTION:COMPILE:BLOCKS:RECOMPUTE, such as {CELLS[0]}")
    released = sorted(path.stem for path in CONFIGURATIONS.glob("*.json"))
    known = {
        "model": [*released, *LLAMAS, *(name + WIDENED for name in released)],
        "attention": list(IMPLEMENTATIONS),
        "compile": COMPILE,
        "recompute": RECOMPUTE,
        "products": PRODUCTS,
    }
    cell = Cell(*parts[:3], int(parts[3]), *parts[4:])
    for name, values in known.items():
        if getattr(cell, name) not in values:
            raise UserError(f"--cells {text}: {name} {getattr(cell, name)!r} is none of {', '.join(values)}")
    if cell.recompute == "elementwise" and cell.compile == "none":
        raise UserError(f"--cells {text}: only what is compiled recomputes elementwise")
    if cell.recompute == "attention_inputs" and cell.model in LLAMAS:
        raise UserError(f"--cells {text}: only models of type mlra recompute attention_inputs")
    return cell


def model_fields(name: str, is_smoke: bool) -> dict:
    """Configuration fields of a cell's model."""

    def released(name: str) -> dict:
        fields = json.loads((CONFIGURATIONS / f"{name}.json").read_text(encoding="utf-8"))
        if is_smoke:
            fields |= SMOKE_SIZES | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return fields

    if name.endswith(WIDENED):
        fields = released(name.removesuffix(WIDENED))
        return fields | {"intermediate_size": -(-fields["intermediate_size"] // 16) * 16}
    if name not in LLAMAS:
        return released(name)
    base = released("mlra_4")
    changes = {"model_type": "llama", "num_key_value_heads": LLAMAS[name]}
    return match_width(architecture_fields(base, model_config(base), changes), count_parameters(model_config(base)))


def build(name: str, is_smoke: bool, device: torch.device) -> nn.Module:
    """A float32 model in training mode; weights N(0, 0.02), so that every path shows in the loss."""
    set_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            model_config(model_fields(name, is_smoke)), dtype=torch.float32, attn_implementation="eager"
        )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.normal_(0, 0.02)
    return model.train()


def prepare(model: nn.Module, cell: Cell, length: int, is_smoke: bool) -> Callable:
    """The model as the cell asks for it."""
    device = next(model.parameters()).device
    if cell.attention == "flex":
        block_mask(length, device)
    is_mlra = model.config.model_type == "mlra"
    model.set_attn_implementation("sdpa" if is_mlra and cell.attention == "auto" else causal_attention(cell.attention))
    if cell.recompute == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        set_recomputation(model, None if cell.recompute == "none" else cell.recompute)
    if cell.products == "float8":
        use_float8(model, device)
    options = {"backend": "aot_eager"} if is_smoke else {}
    if cell.compile == "layers":
        compile_layers(model, **options)
    return torch.compile(model, **options) if cell.compile == "model" else model
