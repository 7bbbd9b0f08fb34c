"""A tiny model, and recipes that train it."""

import json
from pathlib import Path

from scripts import recipe as recipes
from tests.paths import REPOSITORY

TRAINING = REPOSITORY / "configuration" / "training"
MODEL = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 299,
    "eos_token_id": 299,
    "pad_token_id": 299,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def settings(data: Path, output: Path, **changes) -> dict:
    """A recipe of twelve steps; `changes` are those of --set with `__` for the dot."""
    content = {
        "model": dict(MODEL),
        "data": {"train": [str(data / "train.bin")], "heldout": [str(data / "heldout.bin")], "block_size": 32},
        "blocks_per_step": 8,
        "training": {
            "output_dir": str(output),
            "max_steps": 12,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 4,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }
    recipes.apply_changes(content, [f"{name.replace('__', '.')}={json.dumps(v)}" for name, v in changes.items()])
    return content


def recipe(*args, **changes) -> recipes.Recipe:
    return recipes.make_recipe(settings(*args, **changes), "test")


def losses(result: dict) -> list[float]:
    return [loss for _, loss in result["curve"]]


def write(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# The run
