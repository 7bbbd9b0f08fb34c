"""Write a complete Hub folder: weights, config with auto_map, remote code, tokenizer, generation config, model card.

    python -m scripts.export checkpoints/mlra_4_demo build/demo
    python -m scripts.export SRC DST [--dtype bfloat16] [--fp8] [--license apache-2.0]

SRC is a folder that `save_pretrained` wrote, such as a training checkpoint. Its tokenizer goes along with its chat
template, and so do its generation settings; without a tokenizer, DST gets GPT-2's. DST appears whole or not at all.
"""

import argparse
import copy
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, check_model_folder, locked, refuse_existing


def check(args: argparse.Namespace) -> None:
    check_model_folder(args.src, "mlra")
    refuse_existing(args.dst)
    if cli.read_json(args.src / "config.json").get("quantization_config"):
        raise UserError(f"{args.src} holds quantised weights: export the folder they were made from")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.export", __doc__)
    parser.add_argument("src", type=Path, help="folder that save_pretrained wrote")
    parser.add_argument("dst", type=Path, help="folder to create")
    parser.add_argument("--dtype", choices=cli.DTYPES, help="type to store the weights as (default: as in SRC)")
    parser.add_argument("--fp8", action="store_true", help="store linear layers as e4m3, each with one scale")
    parser.add_argument("--license", default="unknown", help="Hub identifier of the weights' licence")
    parser.add_argument("--allow-nonfinite", action="store_true", help="write weights that are NaN or infinite")
    return cli.run("scripts.export:export", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

import modeling_mlra
from modeling_mlra import MLRAConfig, MLRAForCausalLM
from scripts.fp8 import FP8_CONFIG, fp8_shapes, fp8_tensors, stored_bytes
from scripts.loading import (
    DTYPES,
    GENERATION_FILE,
    TOKENIZER_FILES,
    check_weights,
    has_tokenizer,
    load_config,
    load_generation_config,
    load_tokenizer,
    weight_files,
)
from scripts.model_card import render_card
from scripts.saved_tensors import MAX_SHARD_BYTES, read_saved_tensors, write_weights
from tokenization.build import end_of_text_id, write_tokenizer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
AUTO_MAP = {
    "AutoConfig": "configuration_mlra.MLRAConfig",
    "AutoModel": "modeling_mlra.MLRAModel",
    "AutoModelForCausalLM": "modeling_mlra.MLRAForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_mlra.MLRAForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_mlra.MLRAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mlra.MLRAForTokenClassification",
}


def export_folder(
    dst: Path,
    config: MLRAConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    provenance: str,
    limits: str = "",
    released: bool = False,
    license_id: str = "unknown",
    tokenizer: Path | None = None,
    generation_config: GenerationConfig | None = None,
    remote_code: bool = True,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    fp8: bool = False,
) -> None:
    """Write everything a Hub repository of an `MLRAForCausalLM` holds into the new folder `dst`.

    Args:
        dst: a path that does not exist; it appears only when everything has been written.
        config: configuration of the model; a bos, eos or pad that it lacks, or that is no row of its embedding,
            becomes that of the tokenizer.
        tensors: (name, tensor) pairs of the model's state dict, in any order. They are taken one at a time and at
            most one shard of them is kept in memory, so a generator can stream a model larger than memory.
        dtype: what to store them as.
        provenance: where the weights come from, a sentence for the model card.
        limits: what the model cannot do, a sentence for the card.
        released: whether the weights are the authors', so that the card may quote the numbers they published.
        license_id: the Hub's identifier of the weights' licence.
        tokenizer: folder of the model's own tokenizer (default: the shipped GPT-2 tokenizer).
        generation_config: the model's own generation settings, kept (default: the configuration's tokens). Rows of
            the embedding that only pad it, from the tokenizer's length on, are never generated in either case.
        remote_code: whether the folder gets the model's code, without which it needs this package.
        allow_nonfinite: write NaN and infinite values instead of refusing them.
        max_shard_bytes: largest size of one weight file.
        fp8: store the linear layers' weights as the library's `FP8Linear` has them, whatever `dtype`.

    Raises:
        UserError: when `dst` exists, is being written by another command or does not fit on the disk, the tokenizer
            cannot be read or has more tokens than the model, or `tensors` are not exactly those of the model.
    """
    shapes = parameter_shapes(config)
    own_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer, config.vocab_size)
    config = stored_config(config, dtype, own_tokenizer, remote_code)
    generation_config = stored_generation_config(generation_config, config, own_tokenizer)
    if fp8:
        shapes = fp8_shapes(shapes, config)
        tensors = fp8_tensors(tensors, shapes)
        config.quantization_config = FP8_CONFIG.to_dict()
    total_bytes = stored_bytes(shapes, dtype)
    with new_folder(dst, total_bytes) as folder:
        write_weights(folder, tensors, shapes, dtype, max_shard_bytes, allow_nonfinite)
        config.to_json_file(folder / "config.json")  # save_pretrained would add one file of the code
        generation_config.to_json_file(folder / GENERATION_FILE)  # save_pretrained refuses combinations that load
        for file in remote_code_files() if remote_code else ():
            shutil.copyfile(file, folder / file.name)
        if tokenizer is None:
            write_tokenizer(folder, config.vocab_size, config.max_position_embeddings)
        else:
            copy_tokenizer(tokenizer, folder)
        card = render_card(
            config,
            dtype,
            provenance,
            released=released,
            license_id=license_id,
            limits=limits,
            remote_code=remote_code,
            tokens=None if own_tokenizer is None else len(own_tokenizer),
            fp8=fp8,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        for file in folder.glob("*.safetensors"):  # written readable by their owner alone
            shutil.copymode(folder / "README.md", file)


def stored_config(
    config: MLRAConfig, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None, remote_code: bool
) -> MLRAConfig:
    """The configuration as the folder holds it: valid tokens, type of the weights, where the code is."""
    if tokenizer is None:
        defaults = dict.fromkeys(TOKEN_IDS, end_of_text_id(config.vocab_size))
    else:
        defaults = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    config = copy.deepcopy(config)
    keep_valid_tokens(config, config.vocab_size, defaults)
    config.architectures = ["MLRAForCausalLM"]
    if remote_code:
        config.auto_map = dict(AUTO_MAP)
    elif hasattr(config, "auto_map"):
        del config.auto_map
    config.dtype = dtype
    return config


def stored_generation_config(
    given: GenerationConfig | None, config: MLRAConfig, tokenizer: PreTrainedTokenizerBase | None
) -> GenerationConfig:
    """The generation settings as the folder holds them; `config` is that of `stored_config`."""
    tokens = {name: getattr(config, name) for name in TOKEN_IDS}
    if given is None:
        settings = GenerationConfig(**tokens)
    else:
        settings = copy.deepcopy(given)
        keep_valid_tokens(settings, config.vocab_size, tokens, missing=False)
    settings.suppress_tokens = suppressed_tokens(settings.suppress_tokens or [], tokenizer, config.vocab_size)
    return settings


def copy_tokenizer(source: Path, folder: Path) -> None:
    for path in (source / name for name in TOKENIZER_FILES):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.exists():
            shutil.copyfile(path, folder / path.name)


def keep_valid_tokens(
    config: MLRAConfig | GenerationConfig, vocab_size: int, defaults: dict[str, int | list[int] | None], missing=True
) -> None:
    """Replace tokens of `config` that are no row of the embedding by `defaults`; where `missing`, also absent ones."""
    for name, default in defaults.items():
        value = getattr(config, name)
        ids = value if isinstance(value, list) else [value]
        if missing if value is None else not all(0 <= number < vocab_size for number in ids):
            setattr(config, name, default)


def suppressed_tokens(own: list[int], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[int] | None:
    """Tokens never to generate: a model's `own`, and the rows from the tokenizer's length on, which pad the embedding.

    Args:
        own: as a fine-tune's generation settings have them. If they hold every token that was added to the tokenizer,
            these were written when those rows still were padding.
        tokenizer: None for GPT-2's.
    """
    length = end_of_text_id(vocab_size) + 1 if tokenizer is None else len(tokenizer)
    added = set() if tokenizer is None else set(range(tokenizer.vocab_size, length))
    kept = {token for token in own if token < vocab_size}
    if added <= kept:
        kept -= added
    return sorted(kept | set(range(length, vocab_size))) or None


def export_model(dst: Path, model: MLRAForCausalLM, dtype: torch.dtype | None = None, **kwargs) -> None:
    """`export_folder` for a model in memory, in its own dtype unless another is given."""
    names = parameter_shapes(model.config)
    tensors = ((name, tensor) for name, tensor in model.state_dict().items() if name in names)
    export_folder(dst, model.config, tensors, dtype or model.dtype, **kwargs)


def parameter_shapes(config: MLRAConfig) -> dict[str, torch.Size]:
    """{name: shape} of what a checkpoint stores: the state dict less the tied output embedding."""
    with torch.device("meta"):
        state = MLRAForCausalLM(config).state_dict()
    tied = MLRAForCausalLM._tied_weights_keys if config.tie_word_embeddings else {}
    return {name: tensor.shape for name, tensor in state.items() if name not in tied}


def remote_code_files() -> list[Path]:
    """The modules a Hub folder ships beside its weights: every one of the package but `__init__`."""
    package = Path(modeling_mlra.__file__).parent
    return sorted(file for file in package.glob("*.py") if file.name != "__init__.py")


@contextmanager
def new_folder(dst: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling that becomes `dst` at the end, or vanishes with everything in it on any exception."""
    refuse_existing(dst)
    with locked(dst):
        refuse_existing(dst)  # another command may have finished in between
        free = shutil.disk_usage(dst.parent).free
        if free < needed_bytes:
            raise UserError(f"{dst} needs {needed_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        temporary = dst.parent / f".{dst.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        try:
            temporary.mkdir()
            yield temporary
            os.replace(temporary, dst)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def export(args: argparse.Namespace) -> None:
    config = load_config(args.src)
    if not weight_files(args.src):
        raise UserError(f"{args.src} holds no safetensors file: give a folder that save_pretrained wrote")
    check_weights(args.src)
    export_folder(
        args.dst,
        config,
        read_saved_tensors(args.src, parameter_shapes(config)),
        DTYPES[args.dtype] if args.dtype else config.dtype or torch.float32,
        provenance=f"Exported from the checkpoint `{args.src.resolve().name}`.",
        license_id=args.license,
        tokenizer=args.src if has_tokenizer(args.src) else None,
        generation_config=load_generation_config(args.src),
        allow_nonfinite=args.allow_nonfinite,
        fp8=args.fp8,
    )
