"""Pretrain a model, or go on training one, on transformers' Trainer and accelerate.

    python -m scripts.train configuration/training/demo.json
    python -m scripts.train configuration/training/demo.json --set training.max_steps=200 --resume
    accelerate launch --num_processes 8 -m scripts.train configuration/training/paper.json      # DDP, or FSDP

CONFIG is JSON or YAML (docs/training.md lists every key): `model` (an architecture file, a checkpoint folder to go on
from, or the fields themselves), `data` (token files or datasets), `blocks_per_step` and `training`, which holds fields
of the library's TrainingArguments. Weights and optimizer are float32, matmuls bfloat16 under autocast with `bf16`.

A step takes `blocks_per_step` blocks of T = `data.block_size` tokens, whatever the number of devices. A block's inputs
are T tokens and its targets the T tokens one further, as in evals.perplexity; documents follow each other unmasked.
"""

import argparse
import copy
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, is_first_process, locked, positive_int


def check(args: argparse.Namespace) -> None:
    if not args.config.is_file():
        raise UserError(f"no configuration file {args.config}")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.train", __doc__)
    parser.add_argument("config", type=Path, help="JSON or YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    parser.add_argument("--time-budget", type=positive_int, metavar="SECONDS", help="save and stop after so long")
    return cli.run("scripts.train:command", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from evals.common import environment, write_json
from evals.corpora import read_token_file
from evals.perplexity import Blocks, total_loss
from scripts.export import export_folder, parameter_shapes
from scripts.loading import DTYPES, load_generation_config
from scripts.recipe import Recipe, apply_changes, make_recipe, model_config, read_configuration, training_arguments
from scripts.saved_tensors import read_saved_tensors
from scripts.training_checks import CONFIG_FILE, RESULT_FILE, check_start
from scripts.training_data import TrainingData, read_data
from scripts.training_loop import BlockTrainer, TimeBudget
from scripts.training_model import is_checkpoint, model_to_train, without_compilation
from scripts.training_speed import matmul_rate, training_flops_per_token


def train_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    deadline: float | None = None,
    peak: float | None = None,
    callbacks: list[TrainerCallback] = (),
) -> dict:
    """Train by a recipe, or go on; returns what RESULT_FILE holds.

    Args:
        resume: go on from the last checkpoint of `output_dir`, if there is one.
        deadline: of `TimeBudget`; a run that it stops has `finished` false.
        peak: matmul rate of one device, where it is known already.
        callbacks: of the Trainer.

    Raises:
        UserError: when data or sizes do not fit, before anything is trained.
    """
    args = training_arguments(recipe)
    with locked(Path(args.output_dir)) if is_first_process() else nullcontext():
        return train_locked(recipe, args, resume, deadline, peak, callbacks)


def train_locked(
    recipe: Recipe,
    args: TrainingArguments,
    resume: bool,
    deadline: float | None,
    peak: float | None,
    callbacks: list[TrainerCallback],
) -> dict:
    """`train_recipe` while no other command writes its `output_dir`."""
    config = model_config(recipe.model)
    checkpoint = check_start(recipe, config, args, resume, deadline is not None)
    data = read_data(recipe, args, config.vocab_size)
    callbacks = [*callbacks, *([TimeBudget(deadline)] if deadline is not None else [])]
    model = model_to_train(recipe, config, args)
    trainer = make_trainer(recipe, model, args, data, peak, callbacks)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with per_device_train_batch_size {args.per_device_train_batch_size}: use a smaller one, "
            "recompute attention_inputs, or training.gradient_checkpointing"
        ) from error
    result = progress(trainer, model, recipe, time.monotonic() - started)
    if result["finished"]:
        finish(trainer, recipe, config, data.heldout_files, result)
    return result


def make_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: TrainingData,
    peak: float | None,
    callbacks: list[TrainerCallback],
) -> BlockTrainer:
    """What trains the model; from here on the folder is one of this recipe."""
    if args.should_save:
        write_json(Path(args.output_dir) / CONFIG_FILE, recipe.settings())
    return BlockTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        data_collator=default_data_collator,
        tokens_per_step=recipe.blocks_per_step * recipe.data.block_size,
        flops_per_token=training_flops_per_token(model, recipe.data.block_size),
        peak=(peak or matmul_rate(args.device)) * args.world_size,
        callbacks=callbacks,
    )


def progress(trainer: BlockTrainer, model: PreTrainedModel, recipe: Recipe, seconds: float) -> dict:
    """How far training came in `seconds`, how fast, and its losses."""
    state = trainer.state
    return {
        "finished": state.global_step >= trainer.args.max_steps,
        "step": state.global_step,
        "tokens": state.global_step * trainer.tokens_per_step,
        "epochs": round(state.global_step * recipe.blocks_per_step / len(trainer.train_dataset), 4),
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 3),
        "tokens_per_second": trainer.measured("tokens_per_second"),
        "matmul_rate": trainer.peak,
        "matmul_share": trainer.measured("matmul_share"),
        "flops_per_token": trainer.flops_per_token,
        "curve": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
        "heldout_curve": [[entry["step"], entry["eval_loss"]] for entry in state.log_history if "eval_loss" in entry],
    }


def finish(trainer: BlockTrainer, recipe: Recipe, config: PreTrainedConfig, heldout: list[Path], result: dict) -> None:
    """Save the trained model, add its held-out losses to `result`, write that and the export."""
    args, output = trainer.args, Path(trainer.args.output_dir)
    trainer.save_model(str(output / "final"))
    if heldout and not args.fsdp:
        trained = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
        trained = without_compilation(trained)
        result["heldout"] = heldout_loss(trained, heldout, recipe, args, published=args.bf16)
        if recipe.export is not None:
            if recipe.float8:  # as it will be loaded
                plain = AutoModelForCausalLM.from_config(config, attn_implementation=recipe.attn_implementation)
                plain.load_state_dict(trained.state_dict())
                trained = plain.to(args.device)
            trained = copy.deepcopy(trained).to(DTYPES[recipe.export.dtype])
            result["heldout_exported"] = heldout_loss(trained, heldout, recipe, args, published=False)
    if args.should_save:
        write_json(output / RESULT_FILE, {"environment": environment(), **result})
        if recipe.export is not None:
            export_trained(output / "final", recipe, result)


def heldout_loss(model: PreTrainedModel, files: list[Path], recipe: Recipe, args: TrainingArguments, published: bool):
    """{corpus: loss, perplexity and tokens} of evals.perplexity.

    Args:
        published: bfloat16 autocast over float32 weights; else in the type of the weights.
    """
    losses = {}
    for path in files:
        tokens = read_token_file(path)
        blocks = Blocks(tokens, recipe.data.block_size, len(tokens))
        total, count = total_loss(
            model.eval(), blocks, args.per_device_eval_batch_size, published, args.distributed_state, path.stem
        )
        losses[path.stem] = {"loss": total / count, "perplexity": math.exp(total / count), "tokens": count}
    return losses


def export_trained(folder: Path, recipe: Recipe, result: dict) -> None:
    """Write the Hub folder of a trained model, with the tokenizer it was trained with and its held-out perplexity."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.use_cache = True  # the Trainer turns it off
    sentences = [recipe.export.provenance]
    sentences += [
        f"Perplexity on the held-out tokens of `{name}` ({values['tokens']:,} predicted, blocks of "
        f"{recipe.data.block_size}): {values['perplexity']:.3f}, as `python -m evals.perplexity` computes it."
        for name, values in result.get("heldout_exported", {}).items()
    ]
    export_folder(
        Path(recipe.export.folder),
        config,
        read_saved_tensors(folder, parameter_shapes(config)),
        DTYPES[recipe.export.dtype],
        provenance=" ".join(sentences),
        limits=recipe.export.limits,
        license_id=recipe.export.license,
        tokenizer=None if recipe.data.tokenizer is None else Path(recipe.data.tokenizer),
        generation_config=load_generation_config(folder) if is_checkpoint(recipe.model) else None,
        remote_code=recipe.export.remote_code,
    )


def describe(result: dict) -> str:
    """One line on a run."""
    parts = [f"step {result['step']:,}", f"{result['tokens']:,} tokens", f"{result['parameters']:,} parameters"]
    if result["curve"]:
        parts.append(f"loss {result['curve'][-1][1]:.4f}")
    if result["tokens_per_second"]:
        parts.append(f"{result['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{result['matmul_share']:.1%} of the measured {result['matmul_rate'] / 1e12:.3g} TFLOP/s")
    parts += [f"{name} perplexity {values['perplexity']:.3f}" for name, values in result.get("heldout", {}).items()]
    return ", ".join(parts) + ("" if result["finished"] else "; out of time, --resume goes on")


def command(args: argparse.Namespace) -> None:
    content = read_configuration(args.config)
    apply_changes(content, args.set)
    recipe = make_recipe(content, args.config)
    deadline = None if args.time_budget is None else time.monotonic() + args.time_budget
    result = train_recipe(recipe, resume=args.resume, deadline=deadline)
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(result))
