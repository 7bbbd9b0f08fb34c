"""Turn a released MLRA checkpoint into a complete Transformers folder.

    python -m scripts.convert_checkpoint SRC DST [--dtype bfloat16] [--no-scale] [--variant mlra_4]
    python -m scripts.convert_checkpoint Soughing/MLRA build/mlra_4 --subfolder main/mlra_4 --dtype bfloat16

SRC is a local released folder, or org/repo on the Hub. Which attention the checkpoint holds is read off its keys and
shapes. Whether it is a "no scale" ablation cannot be: say --no-scale for those, or its outputs will be wrong.
"""

import argparse
import re
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, refuse_existing
from scripts.variants import VARIANTS


def check(args: argparse.Namespace) -> None:
    refuse_existing(args.dst)
    if not Path(args.src).is_dir() and (Path(args.src).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", args.src)):
        raise UserError(f"{args.src} is no folder: give a released checkpoint folder or org/repo on the Hub")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.convert_checkpoint", __doc__)
    parser.add_argument("src", help="released checkpoint folder, or org/repo on the Hub")
    parser.add_argument("dst", type=Path, help="folder to create")
    parser.add_argument("--dtype", choices=cli.DTYPES, default="float32", help="type to store the weights as")
    parser.add_argument("--no-scale", action="store_true", help="the checkpoint is a no-scale ablation")
    parser.add_argument("--variant", choices=VARIANTS, help="fail unless the checkpoint is this one")
    parser.add_argument("--subfolder", help="folder of the model inside SRC, e.g. main/mlra_4")
    parser.add_argument("--revision", help="branch, tag or commit of org/repo")
    parser.add_argument("--allow-nonfinite", action="store_true", help="write weights that are NaN or infinite")
    return cli.run("scripts.convert_checkpoint:convert", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from scripts.export import export_folder
from scripts.loading import DTYPES
from scripts.released import (
    INDEX,
    ReleasedCheckpoint,
    check_keys,
    convert_tensors,
    detect_variant,
    read_released_config,
    released_config,
)
from tokenization.build import NUM_TOKENS


def find_source(src: str, subfolder: str | None, revision: str | None) -> Path:
    """The local folder of one released model; for org/repo, what is missing of it is downloaded from the Hub."""
    if Path(src).is_dir():
        if revision is not None:
            raise UserError(f"--revision {revision} applies to org/repo on the Hub, but {src} is a local folder")
        folder = Path(src)
    else:
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        wanted = [prefix + name for name in ("config.json", "pytorch_model.bin", INDEX, "pytorch_model-*-of-*.bin")]
        try:
            offline = constants.HF_HUB_OFFLINE
            folder = Path(snapshot_download(src, revision=revision, allow_patterns=wanted, local_files_only=offline))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise UserError(
                f"{src} is no local folder and could not be had from the Hub "
                f"(revision {revision or 'main'}): {str(error).splitlines()[0]}"
            ) from error
    if subfolder:
        folder = folder / subfolder
        if not folder.is_dir():
            raise UserError(f"{src} has no subfolder {subfolder}")
    return folder


def convert(args: argparse.Namespace) -> None:
    folder = find_source(args.src, args.subfolder, args.revision)
    released = read_released_config(folder)
    checkpoint = ReleasedCheckpoint(folder)
    variant = detect_variant(released, checkpoint.shapes)
    if args.variant not in (None, variant):
        raise UserError(f"--variant {args.variant}: the keys and shapes of {folder} are those of {variant}")
    config = released_config(released, variant, latent_scaling=not args.no_scale)
    check_keys(checkpoint, config, variant)

    name = variant + ("_no_scale" if args.no_scale else "")
    print(f"{folder}: {name}, {config.num_hidden_layers} layers", file=sys.stderr)
    if config.vocab_size < NUM_TOKENS:
        print(
            f"note: {config.vocab_size} embedding rows are fewer than GPT-2's {NUM_TOKENS} tokens; "
            f"the folder gets a tokenizer of the first {config.vocab_size - 1} and <|endoftext|>",
            file=sys.stderr,
        )
    where = f"`{Path(args.src).resolve().name if Path(args.src).is_dir() else args.src}`"
    if args.subfolder:
        where += f", `{args.subfolder}`"
    if args.revision:
        where += f", revision `{args.revision}`"
    export_folder(
        args.dst,
        config,
        convert_tensors(checkpoint, config),
        DTYPES[args.dtype],
        provenance=f"Converted from a checkpoint in the authors' released form: {where}.",
        released=True,
        allow_nonfinite=args.allow_nonfinite,
    )
    print(args.dst)
