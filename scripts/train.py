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
import glob
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, is_first_process, locked, positive_int, read_json


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

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from evals.common import environment, write_json
from evals.corpora import Corpus, find_corpora, read_token_file
from evals.perplexity import Blocks, total_loss
from evals.prepare_tokens import load_tokenizer, write_token_file
from scripts.causal_attention import causal_attention
from scripts.export import export_folder, parameter_shapes, read_saved_tensors
from scripts.loading import DTYPES, check_weights, load_generation_config, load_model
from scripts.recipe import (
    DataSettings,
    Recipe,
    apply_changes,
    make_recipe,
    model_config,
    read_configuration,
    training_arguments,
)
from tokenization.build import FOLDER as GPT2_TOKENIZER
from tokenization.build import end_of_text_id

try:
    from torchao.float8 import convert_to_float8_training
except ImportError:
    convert_to_float8_training = None

TRAINING_BYTES_PER_PARAMETER = 16  # float32: weight, gradient and Adam's two moments
CHECKED_TOKENS = 2**26  # of each file before the start; every block is checked again when it is read
STATE_FILE, CONFIG_FILE, RESULT_FILE = "trainer_state.json", "train_config.json", "train_result.json"
ZERO_AT_START = ("o_proj.weight", "down_proj.weight")


def is_checkpoint(model: str | dict) -> bool:
    """Whether a recipe's `model` is a folder to go on from."""
    return isinstance(model, str) and Path(model).is_dir()


def build_model(recipe: Recipe, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The float32 model to train: the checkpoint's, or a new one whose output projections start at zero."""
    attention = recipe.attn_implementation
    if attention == "sdpa" and config.model_type != "mlra":
        attention = causal_attention("auto")  # what MLRA has by itself: blocks are whole, and no mask is made
    if is_checkpoint(recipe.model):
        return load_model(Path(recipe.model), published=True, attn_implementation=attention)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ZERO_AT_START):
                parameter.zero_()
    return model


def set_recomputation(model: PreTrainedModel, recompute: str | None) -> None:
    """What the backward pass makes again instead of keeping: "attention_inputs" (queries, keys, values) or nothing.

    Raises:
        UserError: for a model that has no such choice.
    """
    modules = [module for module in model.modules() if hasattr(module, "recompute_inputs")]
    if recompute is not None and not modules:
        raise UserError(
            f"recompute {recompute!r} is for models of type mlra, not {model.config.model_type}: use "
            "training.gradient_checkpointing"
        )
    for module in modules:
        module.recompute_inputs = recompute is not None


def use_float8(model: PreTrainedModel, device: torch.device) -> None:
    """Let the products of the layers' linear maps run in float8; weights, names and all else stay as they are.

    Raises:
        UserError: without torchao, a GPU that can, or a map whose sizes are multiples of 16.
    """
    if convert_to_float8_training is None:
        raise UserError("float8 needs torchao: pip install torchao")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"float8 needs a GPU of compute capability 8.9 or newer, not {device}: leave float8 out")
    left_out = set()

    def is_converted(module: torch.nn.Module, name: str) -> bool:
        if not name.startswith("model.layers."):
            return False
        if module.in_features % 16 or module.out_features % 16:
            left_out.add(f"{name.rpartition('.')[2]} ({module.in_features} x {module.out_features})")
            return False
        return True

    convert_to_float8_training(model, module_filter_fn=is_converted)
    if left_out:
        print(f"float8: no multiples of 16, so bfloat16: {', '.join(sorted(left_out))}", file=sys.stderr)


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model, tied ones once, without making it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def training_flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Model FLOPs of forward and backward per token of a sequence of `length`: 6 P + 3 A.

    P counts the weights of matrix products (all but norms and, unless tied, the input embedding). A is attention:
    2 FLOPs for every query, key it may see (on average (length + 1) / 2), score head and element of key and value.
    A score head is a query head in one branch. Recomputation (gradient checkpointing) is not counted.
    """
    config = model.config
    input_embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is input_embedding
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "norm" not in name and (tied or parameter is not input_embedding)
    )
    if config.model_type == "mlra":
        score_heads = config.num_attention_heads * config.num_branches
        widths = config.qk_head_dim + config.v_head_dim
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        score_heads, widths = config.num_attention_heads, 2 * head_dim
    attention = config.num_hidden_layers * 2 * score_heads * widths * (length + 1) / 2
    return 6 * weights + 3 * attention


def matmul_rate(device: torch.device, repeats: int = 5) -> float:
    """Measured bfloat16 matmul rate of `device` in FLOP/s: the best of a few products of square matrices."""
    size = 8192 if device.type == "cuda" else 256

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        for _ in range(10):
            torch.matmul(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return 10 * 2 * size**3 / best


class PackedBlocks(Dataset):
    """Blocks of one memory-mapped token file, as the model takes them.

    Args:
        path: the file.
        block_size: tokens per block.
        vocab_size: of the model; a token outside it ends the run with a clear line.
    """

    def __init__(self, path: Path, block_size: int, vocab_size: int):
        self.path, self.vocab_size = path, vocab_size
        tokens = read_token_file(path)
        self.blocks = Blocks(tokens, block_size, len(tokens))
        if len(self.blocks) == 0:
            raise UserError(f"{path} has {len(tokens)} tokens, one block needs {block_size + 1}")
        self.check(tokens[:CHECKED_TOKENS])

    def check(self, tokens: np.ndarray) -> None:
        if tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.path} has token {tokens.max()}, outside the model's vocabulary of {self.vocab_size}: "
                "it was made with another tokenizer"
            )

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index]
        self.check(block)
        block = torch.from_numpy(block.astype(np.int64))
        # `shift_labels` are the targets; the library counts a step's targets by them, older versions by `labels`
        return {"input_ids": block[:-1], "labels": block[1:], "shift_labels": block[1:]}


def token_files(specifications: list[str], data: DataSettings, cache: Path, seed: int) -> Iterator[Path]:
    """The token file of each corpus; text and datasets are encoded into `cache` first, once.

    Raises:
        UserError: as evals.corpora and evals.prepare_tokens.
    """
    names: list[str] = []
    for name in specifications:
        is_pattern = "*" in name and not name.startswith("dataset:")
        matching = sorted(glob.glob(name)) if is_pattern else [name]
        if not matching:
            raise UserError(f"no file matches {name}")
        names += matching
    for corpus in find_corpora(names):
        yield Path(corpus.source) if corpus.is_token_file else encode_corpus(corpus, data, cache, seed)


def encode_corpus(corpus: Corpus, data: DataSettings, cache: Path, seed: int) -> Path:
    if not corpus.is_dataset and not Path(corpus.source).is_file():
        raise UserError(f"no file {corpus.source}: give a .bin token file, a text file or dataset:PATH")
    tokenizer, tokenizer_fingerprint = load_tokenizer(Path(data.tokenizer or GPT2_TOKENIZER))
    settings = {
        "corpus": corpus.identity(),
        "tokenizer": tokenizer_fingerprint,
        "max_tokens": data.max_tokens,
        "shuffle_buffer": data.shuffle_buffer,
        "seed": seed,
    }
    path, settings_file = cache / f"{corpus.name}.bin", cache / f"{corpus.name}.json"
    if path.exists() and settings_file.exists():
        if read_json(settings_file) != settings:
            raise UserError(f"{path} was made with other settings: remove it to encode {corpus.source} again")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    options = argparse.Namespace(
        max_tokens=data.max_tokens, shuffle_buffer=data.shuffle_buffer, seed=seed, overwrite=False
    )
    write_token_file(path, corpus, tokenizer, settings, options)
    write_json(settings_file, settings)
    return path


class SpeedCallback(TrainerCallback):
    """Steps and seconds since the last log, less what evaluating and saving took."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.first_step = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.start is None:
            self.start, self.first_step = time.perf_counter(), state.global_step

    def on_evaluate(self, args, state, control, **kwargs):
        self.start = None

    on_save = on_evaluate

    def read(self, step: int) -> tuple[int, float]:
        """(steps, seconds) up to now, and start again at the next step."""
        if self.start is None:
            return 0, 0.0
        steps, seconds = step - self.first_step, time.perf_counter() - self.start
        self.start = None
        return steps, seconds


class TimeBudget(TrainerCallback):
    """Saves and stops at the first logging step after `deadline` (time.monotonic), so that no logged mean is cut."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        is_logging_step = state.global_step % state.logging_steps == 0
        if is_logging_step and time.monotonic() > self.deadline and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class BlockTrainer(Trainer):
    """The library's Trainer with weight decay on all parameters, and speed in its logs.

    Args:
        tokens_per_step: of all devices together.
        flops_per_token: of `training_flops_per_token`.
        peak: FLOP/s of all devices together, of `matmul_rate`.
    """

    def __init__(self, *args, tokens_per_step: int, flops_per_token: float, peak: float, **kwargs):
        self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
        self.speed = SpeedCallback()
        super().__init__(*args, **kwargs)
        self.skip_logits = self.model.config.model_type == "mlra"
        self.add_callback(self.speed)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All of them: the paper decays norms and embeddings too."""
        return [name for name, _ in model.named_parameters()]

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Without the logits of all tokens at a time, where the model can."""
        if self.skip_logits:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps, seconds = self.speed.read(self.state.global_step)
            if steps:
                rate = steps * self.tokens_per_step / seconds
                logs["tokens_per_second"] = rate
                logs["matmul_share"] = rate * self.flops_per_token / self.peak
        super().log(logs, start_time)

    def measured(self, name: str) -> float | None:
        """Median of a logged speed over the intervals after the first, which holds compilation and warm-up."""
        values = [entry[name] for entry in self.state.log_history if name in entry]
        return statistics.median(values[1:] or values) if values else None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run: one whose state, which is written last, can be read."""
    found = []
    for state_file in folder.glob(f"checkpoint-*/{STATE_FILE}"):
        try:
            found.append((json.loads(state_file.read_text(encoding="utf-8"))["global_step"], state_file.parent))
        except (ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


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
    output = Path(args.output_dir)
    config = model_config(recipe.model)
    context = config.max_position_embeddings
    if recipe.data.block_size > context:
        raise UserError(f"data.block_size {recipe.data.block_size} is more than the model's context of {context}")
    if deadline is not None and args.world_size > 1:
        raise UserError("--time-budget works with one process: the clocks of several would disagree")
    check_export(recipe, config)
    check_memory(config, args)
    checkpoint = check_resume(recipe, output, resume)
    with args.main_process_first(desc="encoding"):
        files = {
            part: list(token_files(names, recipe.data, output / "tokens", args.seed))
            for part, names in (("train", recipe.data.train), ("heldout", recipe.data.heldout))
        }
    train, heldout = (
        [PackedBlocks(path, recipe.data.block_size, config.vocab_size) for path in files[part]] for part in files
    )
    train = ConcatDataset(train)
    if len(train) < recipe.blocks_per_step:
        raise UserError(
            f"the training data has {len(train)} blocks of {recipe.data.block_size} tokens, one step takes "
            f"{recipe.blocks_per_step}: use more data, or smaller steps or blocks"
        )

    model = build_model(recipe, config, args.seed)
    set_recomputation(model, recipe.recompute)
    if recipe.float8:
        use_float8(model, args.device)
    if args.should_save:
        write_json(output / CONFIG_FILE, recipe.settings())
    trainer = BlockTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=ConcatDataset(heldout) if heldout else None,
        data_collator=default_data_collator,
        tokens_per_step=recipe.blocks_per_step * recipe.data.block_size,
        flops_per_token=training_flops_per_token(model, recipe.data.block_size),
        peak=(peak or matmul_rate(args.device)) * args.world_size,
        callbacks=[*callbacks, *([TimeBudget(deadline)] if deadline is not None else [])],
    )
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with per_device_train_batch_size {args.per_device_train_batch_size}: use a smaller one, "
            "recompute attention_inputs, or training.gradient_checkpointing"
        ) from error
    state = trainer.state
    result = {
        "finished": state.global_step >= args.max_steps,
        "step": state.global_step,
        "tokens": state.global_step * trainer.tokens_per_step,
        "epochs": round(state.global_step * recipe.blocks_per_step / len(train), 4),
        "parameters": model.num_parameters(),
        "seconds": round(time.monotonic() - started, 3),
        "tokens_per_second": trainer.measured("tokens_per_second"),
        "matmul_rate": trainer.peak,
        "matmul_share": trainer.measured("matmul_share"),
        "flops_per_token": trainer.flops_per_token,
        "curve": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
        "heldout_curve": [[entry["step"], entry["eval_loss"]] for entry in state.log_history if "eval_loss" in entry],
    }
    if not result["finished"]:
        return result
    trainer.save_model(str(output / "final"))
    if heldout and not args.fsdp:
        trained = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
        result["heldout"] = heldout_loss(trained, files["heldout"], recipe, args, published=args.bf16)
        if recipe.export is not None:
            if recipe.float8:  # as it will be loaded
                plain = AutoModelForCausalLM.from_config(config, attn_implementation=recipe.attn_implementation)
                plain.load_state_dict(trained.state_dict())
                trained = plain.to(args.device)
            trained = copy.deepcopy(trained).to(DTYPES[recipe.export.dtype])
            result["heldout_exported"] = heldout_loss(trained, files["heldout"], recipe, args, published=False)
    if args.should_save:
        write_json(output / RESULT_FILE, {"environment": environment(), **result})
        if recipe.export is not None:
            export_trained(output / "final", recipe, result)
    return result


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
