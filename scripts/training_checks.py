"""What is refused before anything is trained: sizes, memory, an export that could not be made, a run that is there."""

import json
import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig, TrainingArguments

from evals.prepare_tokens import load_tokenizer
from scripts.cli import UserError, read_json
from scripts.loading import check_weights
from scripts.recipe import Recipe
from scripts.training_speed import count_parameters
from tokenization.build import end_of_text_id

TRAINING_BYTES_PER_PARAMETER = 16  # float32: weight, gradient and Adam's two moments
STATE_FILE, CONFIG_FILE, RESULT_FILE = "trainer_state.json", "train_config.json", "train_result.json"


def check_start(
    recipe: Recipe, config: PreTrainedConfig, args: TrainingArguments, resume: bool, has_deadline: bool
) -> Path | None:
    """The checkpoint to go on from, if there is one, as `check_resume`.

    Raises:
        UserError: for what could not be trained, stopped in time or exported.
    """
    context = config.max_position_embeddings
    if recipe.data.block_size > context:
        raise UserError(f"data.block_size {recipe.data.block_size} is more than the model's context of {context}")
    if has_deadline and args.world_size > 1:
        raise UserError("--time-budget works with one process: the clocks of several would disagree")
    check_export(recipe, config)
    check_memory(config, args)
    return check_resume(recipe, Path(args.output_dir), resume)


def check_memory(config: PreTrainedConfig, args: TrainingArguments) -> None:
    """Refuse a model whose weights, gradients and Adam moments alone are more than the device has."""
    needed = count_parameters(config) * TRAINING_BYTES_PER_PARAMETER / (args.world_size if args.fsdp else 1)
    if args.device.type == "cuda":
        available = torch.cuda.get_device_properties(args.device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise UserError(
            f"weights, gradients and optimizer need {needed / 1e9:.1f} GB per device, {args.device} has "
            f"{available / 1e9:.1f} GB: use more devices with training.fsdp, or a smaller model"
        )


def check_export(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse at the start what could not be exported at the end."""
    if recipe.export is None:
        return
    if config.model_type != "mlra":
        raise UserError(f"export writes models of type mlra, not {config.model_type}: leave export out")
    if Path(recipe.export.folder).exists():
        raise UserError(f"export.folder {recipe.export.folder} already exists: remove it or choose another")
    if recipe.data.tokenizer is not None:
        tokenizer, _ = load_tokenizer(Path(recipe.data.tokenizer))
        if tokenizer.eos_token_id != end_of_text_id(config.vocab_size):
            raise UserError(
                f"{recipe.data.tokenizer} ends documents with token {tokenizer.eos_token_id}, a model of "
                f"{config.vocab_size} embedding rows with {end_of_text_id(config.vocab_size)}: set vocab_size to the "
                f"tokenizer's {len(tokenizer)}"
            )


def check_resume(recipe: Recipe, output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        UserError: when the folder holds a run and `resume` is false, or a run with other settings.
    """
    checkpoint = last_checkpoint(output)
    if not resume:
        if checkpoint is not None or (output / RESULT_FILE).exists():
            raise UserError(f"{output} holds a run already: --resume to go on, or choose another output_dir")
        return None
    if checkpoint is not None:
        stored = read_json(output / CONFIG_FILE)
        now = json.loads(json.dumps(recipe.settings()))
        for part in stored | now:
            if stored.get(part) != now.get(part):
                raise UserError(f"{output} was begun with {part} = {stored.get(part)}, now it is {now.get(part)}")
        check_weights(checkpoint)
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run: one whose state, which is written last, can be read."""
    found = []
    for state_file in folder.glob(f"checkpoint-*/{STATE_FILE}"):
        try:
            found.append((json.loads(state_file.read_text(encoding="utf-8"))["global_step"], state_file.parent))
        except (ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None
