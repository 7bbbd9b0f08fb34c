"""The data of a training run: text and datasets, encoded once into token files, and blocks as a model takes them."""

import argparse
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainingArguments

from evals.common import write_json
from evals.corpora import Corpus, find_corpora, read_token_file
from evals.perplexity import Blocks
from evals.prepare_tokens import load_tokenizer, write_token_file
from scripts.cli import UserError, read_json
from scripts.recipe import DataSettings, Recipe
from tokenization.build import FOLDER as GPT2_TOKENIZER

CHECKED_TOKENS = 2**26  # of each file before the start; every block is checked again when it is read


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


class TrainingData(NamedTuple):
    """Blocks to train on and, where there are any, held-out ones; the token files of the latter."""

    train: ConcatDataset
    heldout: ConcatDataset | None
    heldout_files: list[Path]


def read_data(recipe: Recipe, args: TrainingArguments, vocab_size: int) -> TrainingData:
    """What a recipe names, encoded below its `output_dir` where it has to be, by the first process.

    Raises:
        UserError: as `token_files` and `PackedBlocks`, and for less than one step's blocks.
    """
    data, cache = recipe.data, Path(args.output_dir) / "tokens"
    with args.main_process_first(desc="encoding"):
        files = [list(token_files(names, data, cache, args.seed)) for names in (data.train, data.heldout)]
    train, heldout = ([PackedBlocks(path, data.block_size, vocab_size) for path in part] for part in files)
    found = ConcatDataset(train)
    if len(found) < recipe.blocks_per_step:
        raise UserError(
            f"the training data has {len(found)} blocks of {data.block_size} tokens, one step takes "
            f"{recipe.blocks_per_step}: use more data, or smaller steps or blocks"
        )
    return TrainingData(found, ConcatDataset(heldout) if heldout else None, files[1])
