"""Recipes of scripts.train: their settings, read from JSON or YAML and checked before anything is made."""

import json
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig, TrainingArguments

from evals.corpora import MAX_TOKENS
from scripts.cli import DTYPES, UserError, blame, first_line, read_json, read_text
from scripts.loading import check_config, load_config

# Settings of `training` that change no loss, so that a resumed run may have others
FREE_SETTINGS = ("output_dir", "report_to", "run_name", "logging_", "save_", "eval_", "dataloader_", "disable_tqdm")

RECOMPUTE = (None, "attention_inputs", "elementwise")


@dataclass
class DataSettings:
    """What to train on.

    Args:
        train: token files (.bin, also as a pattern with *), text files or dataset:PATH, as evals.corpora names them.
        heldout: likewise, for the perplexity at the end and `eval_steps` in between; may be empty.
        block_size: tokens T per block.
        tokenizer: folder of the tokenizer that `train` was or is to be encoded with (default: GPT-2).
        max_tokens: encode at most so many tokens of a text or dataset.
        shuffle_buffer: documents to shuffle a dataset among while encoding it.
    """

    train: list[str]
    heldout: list[str]
    block_size: int = 2048
    tokenizer: str | None = None
    max_tokens: int = MAX_TOKENS
    shuffle_buffer: int = 10_000


@dataclass
class ExportSettings:
    """The Hub folder to write at the end, by scripts.export.

    Args:
        folder: path to create.
        dtype: what to store the weights as.
        license: Hub identifier of the weights' licence.
        provenance: a sentence for the card: what the model was trained on.
        limits: another: what it cannot do.
        remote_code: whether the folder holds the model's code; without it, loading needs this package.
    """

    folder: str
    dtype: str = "bfloat16"
    license: str = "unknown"
    provenance: str = "Trained with scripts.train."
    limits: str = ""
    remote_code: bool = True


@dataclass
class Recipe:
    """A training run as its configuration file gives it; see docs/training.md."""

    model: str | dict
    data: DataSettings
    blocks_per_step: int
    training: dict
    export: ExportSettings | None = None
    attn_implementation: str = "sdpa"
    recompute: str | None = None
    float8: bool = False
    compile_layers: bool = False

    def settings(self) -> dict:
        """Everything that the losses depend on."""
        training = {name: value for name, value in self.training.items() if not name.startswith(FREE_SETTINGS)}
        data = {**vars(self.data), "heldout": None}
        settings = {"model": self.model, "data": data, "blocks_per_step": self.blocks_per_step, "training": training}
        return settings | ({"float8": True} if self.float8 else {})


def read_configuration(path: Path) -> dict:
    """The mapping in a JSON or YAML file.

    Raises:
        UserError: for a file that is missing or malformed.
    """
    if not path.is_file():
        raise UserError(f"no configuration file {path}")
    text = read_text(path)
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of settings")
    return content


def apply_changes(content: dict, changes: list[str]) -> None:
    """Make changes such as "training.max_steps=10" to a configuration, in place.

    Raises:
        UserError: for a change that is no NAME=VALUE, or goes into something that is no mapping.
    """
    for change in changes:
        name, equals, value = change.partition("=")
        *parents, last = name.split(".")
        if not equals or not last:
            raise UserError(f"--set {change}: write NAME=VALUE, such as training.max_steps=10")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {change}: {parent} is {place!r}, which has no parts")
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value


def make_recipe(content: dict, source: object) -> Recipe:
    """The recipe of a configuration; `source` is what errors call it.

    Raises:
        UserError: for unknown, missing and unusable settings.
    """

    def build(kind: type, values: object, where: str):
        if not isinstance(values, dict):
            raise UserError(f"{source}: {where} must be a mapping, not {values!r}")
        known = [field.name for field in fields(kind)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(f"{source}: unknown {where} setting {unknown[0]!r}; known are {', '.join(known)}")
        try:
            return kind(**values)
        except TypeError as error:
            raise UserError(f"{source}: {where}: {first_line(error).partition('() ')[2]}") from error

    recipe = build(Recipe, content, "top-level")
    recipe.data = build(DataSettings, recipe.data, "data")
    if recipe.export is not None:
        recipe.export = build(ExportSettings, recipe.export, "export")
        if recipe.export.dtype not in DTYPES:
            raise UserError(f"{source}: export.dtype {recipe.export.dtype!r} is none of {', '.join(DTYPES)}")
    if not isinstance(recipe.training, dict) or "output_dir" not in recipe.training:
        raise UserError(f"{source}: training needs an output_dir")
    for name, value in (("blocks_per_step", recipe.blocks_per_step), ("data.block_size", recipe.data.block_size)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{source}: {name} must be a positive whole number, not {value!r}")
    if recipe.recompute not in RECOMPUTE:
        raise UserError(f"{source}: recompute must be null, attention_inputs or elementwise, not {recipe.recompute!r}")
    for name in ("float8", "compile_layers"):
        value = getattr(recipe, name)
        if not isinstance(value, bool):
            raise UserError(f"{source}: {name} must be true or false, not {value!r}")
    is_whole = any(recipe.training.get(f"torch_compile{kind}") for kind in ("", "_backend", "_mode"))
    if recipe.compile_layers and is_whole:
        raise UserError(f"{source}: compile_layers and training.torch_compile compile the same: set one of them")
    if recipe.recompute == "elementwise" and not (recipe.compile_layers or is_whole):
        raise UserError(f"{source}: recompute elementwise is the compiler's: set compile_layers")
    for name in ("train", "heldout"):
        names = getattr(recipe.data, name)
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            raise UserError(f"{source}: data.{name} must be a list of files, not {names!r}")
    for name in ("max_tokens", "shuffle_buffer"):
        value = getattr(recipe.data, name)
        if type(value) is not int or value < (name == "max_tokens"):
            raise UserError(f"{source}: data.{name} must be a whole number, not {value!r}")
    for part, names in ((recipe.data, ["tokenizer"]), (recipe.export, ["folder", "license", "provenance", "limits"])):
        for name in names if part is not None else ():
            value = getattr(part, name)
            if not isinstance(value, str) and not (name == "tokenizer" and value is None):
                raise UserError(f"{source}: {name} must be text, not {value!r}")
    if not isinstance(recipe.model, (str, dict)):
        raise UserError(f"{source}: model must be a path or the fields of a configuration, not {recipe.model!r}")
    if not isinstance(recipe.training["output_dir"], str):
        raise UserError(f"{source}: training.output_dir must be a path, not {recipe.training['output_dir']!r}")
    if not recipe.data.train:
        raise UserError(f"{source}: data.train names no corpus")
    return recipe


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The library's arguments; gradient accumulation follows from `blocks_per_step`.

    Raises:
        UserError: for unknown or unusable settings, and for devices that cannot share a step's blocks evenly.
    """
    given = {"report_to": "none", "disable_tqdm": not sys.stderr.isatty()}
    # Every parameter has a gradient in every step, and a loss that is no number belongs in the log: looking for either
    # makes the host wait for the device in each micro-batch
    given |= {"ddp_find_unused_parameters": False, "logging_nan_inf_filter": False}
    given |= {"use_cpu": not torch.accelerator.is_available(), **recipe.training}
    for name in ("gradient_accumulation_steps", "num_train_epochs"):
        if name in given:
            raise UserError(f"training.{name} follows from blocks_per_step and max_steps: leave it out")
    numbers = {field.name: field.type for field in fields(TrainingArguments) if field.type in (int, float)}
    for name, value in given.items():
        if name in numbers and isinstance(value, str):  # YAML reads 1e-8 as a word
            try:
                given[name] = numbers[name](value)
            except ValueError as error:
                raise UserError(f"training settings: {name} {value!r} is no number") from error
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"training.{name} {value} is no finite number")
    for name in ("seed", "data_seed"):
        value = given.get(name)
        if value is not None and not (type(value) is int and 0 <= value < 2**32):
            raise UserError(f"training.{name} {value!r} must be a whole number between 0 and {2**32 - 1}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_device = given.setdefault("per_device_train_batch_size", math.gcd(recipe.blocks_per_step // world or 1, 8))
    if not isinstance(per_device, int) or per_device < 1 or recipe.blocks_per_step % (per_device * world):
        raise UserError(
            f"blocks_per_step {recipe.blocks_per_step} is no multiple of per_device_train_batch_size {per_device} x "
            f"{world} processes: change one of them"
        )
    given.setdefault("per_device_eval_batch_size", per_device)
    given["gradient_accumulation_steps"] = recipe.blocks_per_step // (per_device * world)
    given |= {"remove_unused_columns": False, "label_names": ["labels"], "prediction_loss_only": True}
    try:
        (args,) = HfArgumentParser(TrainingArguments).parse_dict(given)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"training settings: {first_line(error)}") from error
    if args.label_smoothing_factor:
        raise UserError(
            f"training.label_smoothing_factor {args.label_smoothing_factor}: the library's smoothed loss shifts the "
            "targets, which are shifted already here, and so trains the model to copy: leave it out"
        )
    if not args.learning_rate > 0:
        raise UserError(f"training.learning_rate {args.learning_rate} must be positive")
    if args.max_steps < 1:
        raise UserError("training.max_steps must say how many steps to train")
    if args.warmup_steps > args.max_steps:
        raise UserError(f"training.warmup_steps {args.warmup_steps} is more than max_steps {args.max_steps}")
    if args.n_gpu > 1:
        raise UserError(f"{args.n_gpu} GPUs are visible to one process: use accelerate launch or CUDA_VISIBLE_DEVICES")
    return args


def model_config(model: str | dict) -> PreTrainedConfig:
    """The configuration of a recipe's `model`: fields, an architecture file, or a checkpoint folder.

    Raises:
        UserError: when it is none of these, or its sizes cannot be combined.
    """
    source = model if isinstance(model, str) else "model"
    if isinstance(model, str):
        path = Path(model)
        if path.is_dir():
            return load_config(path)
        if not path.is_file():
            raise UserError(f"model {path} is neither an architecture file nor a checkpoint folder")
        model = read_json(path)
    sizes = {"model_type": "mlra", **model}
    with blame(f"{source} cannot be used"):
        config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        check_config(config)
    return config
