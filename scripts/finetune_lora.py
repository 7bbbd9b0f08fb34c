r"""LoRA fine-tuning with PEFT on a text file, one example per line; prints the losses before and after.

    python -m scripts.finetune_lora --model checkpoints/mlra_4_demo --output build/adapter \
        --data configuration/training/devils_dictionary.txt --prompt "LAWYER, n."
    python -m scripts.finetune_lora --model build/mlra_4 --data lines.txt --output build/adapter --merge build/merged

Every tenth line is held out. The adapter acts on all linear projections of attention and MLP; the up-projection of the
latents (`kv_b_proj`) is no linear layer and stays as it is. OUTPUT becomes a PEFT adapter folder; --merge also writes
the model with the adapter merged in, as `save_pretrained` does. --prompt shows a greedy continuation before and after.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, check_model_folder, positive_int, read_lines

HELDOUT_EVERY = 10


def check(args: argparse.Namespace) -> None:
    check_model_folder(args.model)
    folders = [folder for folder in (args.output, args.merge) if folder is not None]
    for folder in folders:
        if folder.exists():
            raise UserError(f"{folder} already exists: remove it or choose another folder")
    if args.merge is not None:
        one, other = args.output.resolve(), args.merge.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UserError(
                f"--merge {args.merge} and --output {args.output} lie in each other: choose another folder"
            )
    args.lines = read_examples(args.data)  # once: it may be a pipe


def read_examples(path: Path) -> tuple[list[str], list[str]]:
    """The lines to train on and those held out.

    Raises:
        UserError: when there is no such text, or too little of it.
    """
    lines = [line for line in read_lines(path) if line.strip()]
    if len(lines) < HELDOUT_EVERY:
        raise UserError(f"{path} has {len(lines)} lines that are not empty, at least {HELDOUT_EVERY} are needed")
    heldout = lines[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    return [line for index, line in enumerate(lines, start=1) if index % HELDOUT_EVERY], heldout


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.finetune_lora", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="UTF-8 text, one example per line")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="adapter folder to create")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="also write the merged model here")
    parser.add_argument("--prompt", type=cli.utf8, metavar="TEXT", help="continue this before and after")
    parser.add_argument("--rank", type=positive_int, default=8)
    parser.add_argument("--steps", type=positive_int, default=100)
    parser.add_argument("--batch-size", type=positive_int, default=4, help="blocks per step")
    parser.add_argument("--block-size", type=positive_int, default=512, help="tokens per block")
    parser.add_argument("--learning-rate", type=cli.positive_float, default=1e-3)
    parser.add_argument("--seed", type=cli.seed, default=0)
    return cli.run("scripts.finetune_lora:finetune", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from evals.common import markdown_table, write_json
from evals.corpora import MAX_TOKENS, encode_up_to
from evals.perplexity import Blocks
from scripts.export import new_folder
from scripts.loading import load_model, load_tokenizer

try:
    from peft import LoraConfig, get_peft_model
except ImportError:
    get_peft_model = None

TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj", "k_rope_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NEW_TOKENS = 48  # of the continuations shown
RESULT_FILE = "finetune_result.json"


class LineBlocks(Dataset):
    """Lines of text, each led by `<|endoftext|>`, packed into blocks as scripts.train takes them."""

    def __init__(self, lines: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int):
        tokens = encode_up_to(tokenizer, lines, MAX_TOKENS)
        self.blocks = Blocks(tokens, min(block_size, max(len(tokens) - 1, 1)), len(tokens))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index]).long()
        return {"input_ids": block[:-1], "labels": block[1:], "shift_labels": block[1:]}


def finetune(args: argparse.Namespace) -> None:
    if get_peft_model is None:
        raise UserError("peft is not installed: pip install 'mlra[train]'")
    with new_folder(args.output) as output, nullcontext() if args.merge is None else new_folder(args.merge) as merge:
        train_adapter(args, output, merge)


def make_trainer(
    model: torch.nn.Module, args: argparse.Namespace, output: Path, train: LineBlocks, heldout: LineBlocks
) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            weight_decay=0.0,
            logging_steps=max(args.steps // 10, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            prediction_loss_only=True,
        ),
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=default_data_collator,
    )


def train_adapter(args: argparse.Namespace, output: Path, merge: Path | None) -> None:
    """Train by `args` and write the adapter into the folder `output`, the merged model into `merge`, if any."""
    train_lines, heldout_lines = args.lines
    set_seed(args.seed)
    model = load_model(args.model, published=True)  # float32; bfloat16 comes from autocast
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    block_size = min(args.block_size, model.config.max_position_embeddings)
    train, heldout = (LineBlocks(lines, tokenizer, block_size) for lines in (train_lines, heldout_lines))
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in TARGETS if name in present]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules=targets
    )
    model = get_peft_model(model, config)
    trainer = make_trainer(model, args, output, train, heldout)

    def losses() -> dict[str, float]:
        return {part: trainer.evaluate(data)["eval_loss"] for part, data in (("train", train), ("held out", heldout))}

    def continuation() -> str:
        ids = tokenizer(args.prompt, return_tensors="pt").to(model.device)
        tokens = model.eval().generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)
        return tokenizer.decode(tokens[0], skip_special_tokens=True)

    shown = {}
    before = losses()
    if args.prompt:
        shown["before"] = continuation()
    trainer.train()
    after = losses()
    if args.prompt:
        shown["after"] = continuation()
    model.save_pretrained(output)
    trainable, total = model.get_nb_trainable_parameters()
    result = {
        "before": before,
        "after": after,
        "steps": args.steps,
        "rank": args.rank,
        "target_modules": targets,
        "trainable_parameters": trainable,
        "parameters": total,
        "continuation": shown,
    }
    write_json(output / RESULT_FILE, result)
    if merge is not None:
        model.config.use_cache = True  # the Trainer turns it off
        model.merge_and_unload().save_pretrained(merge)
        tokenizer.save_pretrained(merge)
    rows = [[part, f"{before[part]:.4f}", f"{after[part]:.4f}"] for part in before]
    for when, text in shown.items():
        print(f"{when}: {' '.join(text.split())}")
    print(markdown_table(["loss", "before", "after"], rows), end="")
    print(f"{trainable:,} of {total:,} parameters trained, {args.steps} steps; the adapter is in {args.output}")
