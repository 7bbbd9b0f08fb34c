"""Write token files for evals.perplexity, from text or from the paper's seven corpora.

    python -m evals.prepare_tokens --output data                             # all seven, 10^8 tokens each (network)
    python -m evals.prepare_tokens --output data --data C4 notes.txt dataset:org/name,column=content

Documents are read as a stream, each preceded by `<|endoftext|>`, until --max-tokens are written; the last document is
cut there. Datasets are shuffled within a window of --shuffle-buffer documents, because their order is seldom random.
(The authors shuffled the first 10 GiB of each corpus, so the very files behind the published numbers cannot be made
again this way; they are in `eval_datasets/` of the Hub repository Soughing/MLRA.)

A file appears under its name only when it is complete. Interrupted, its beginning stays as NAME.bin.partial, and the
same command goes on after the last document in it.
"""

import argparse
import os
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, locked, positive_int, read_json


def check(args: argparse.Namespace) -> None:
    if not args.tokenizer.is_dir():
        raise UserError(f"no folder {args.tokenizer}: give a model folder or one with a tokenizer")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.prepare_tokens", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for NAME.bin")
    parser.add_argument(
        "--data",
        nargs="+",
        help="text files, dataset:PATH[,name=CONFIG][,split=train][,column=text], or the paper's corpora by name, "
        "such as FineWeb (default: all seven)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path(__file__).parent.parent / "tokenization",
        help="folder of a tokenizer (default: GPT-2)",
    )
    parser.add_argument("--max-tokens", type=positive_int, default=10**8, help="tokens per corpus")
    parser.add_argument(
        "--shuffle-buffer", type=cli.count, default=10_000, help="documents to shuffle among; 0 to keep order"
    )
    parser.add_argument("--seed", type=cli.seed, default=42, help="of the shuffle")
    parser.add_argument("--overwrite", action="store_true", help="write again what is already there")
    return cli.run("evals.prepare_tokens:prepare", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from evals.common import fingerprint, write_json
from evals.corpora import HEADER_BYTES, MAX_TOKENS, PAPER_CORPORA, Corpus, encode, find_corpora, token_file_header
from scripts import loading

SAVE_EVERY = 2**20  # tokens


def load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, str]:
    """A folder's tokenizer and its fingerprint.

    Raises:
        UserError: when there is none, or its tokens do not fit 16 bits.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder} has no tokenizer.json: give a model folder or one with a tokenizer")
    tokenizer = loading.load_tokenizer(folder)
    if len(tokenizer) > 2**16:
        raise UserError(f"{folder}: a vocabulary of {len(tokenizer)} tokens does not fit the format's 16 bits")
    return tokenizer, fingerprint([file])


def write_token_file(
    path: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: dict, args: argparse.Namespace
) -> int:
    """Write the token file of a corpus, going on from what an interrupted run left; returns how many tokens it has.

    Raises:
        UserError: when the corpus has no text, or the beginning that is there was made with other settings.
    """
    partial, progress_file = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")
    done = {"documents": 0, "tokens": 0}
    if partial.exists() and progress_file.exists() and not args.overwrite:
        stored = read_json(progress_file)
        if stored.get("settings") != settings or "done" not in stored:
            raise UserError(
                f"{partial} was begun with other settings ({stored.get('settings')}): --overwrite to start over"
            )
        done = stored["done"]
        print(f"{path.name}: going on after {done['tokens']:,} tokens", file=sys.stderr)
    partial.touch()
    with partial.open("r+b") as file:
        file.truncate(HEADER_BYTES + 2 * done["tokens"])  # whole documents only, after the last save
        file.seek(0, os.SEEK_END)  # behind the header, which stays zero until the file is complete

        def save() -> None:
            file.flush()
            os.fsync(file.fileno())
            write_json(progress_file, {"settings": settings, "done": done})

        count, saved = done["tokens"], done["tokens"]
        documents = corpus.documents(done["documents"], args.shuffle_buffer, args.seed)
        with tqdm(total=args.max_tokens, initial=count, desc=corpus.name, unit=" tokens", unit_scale=True) as bar:
            for tokens, ends_document in encode(tokenizer, documents):
                tokens = tokens[: args.max_tokens - count]
                file.write(np.asarray(tokens, dtype="<u2").tobytes())
                count += len(tokens)
                bar.update(len(tokens))
                if ends_document:
                    done = {"documents": done["documents"] + 1, "tokens": count}
                    if count - saved >= SAVE_EVERY:
                        save()
                        saved = count
                if count == args.max_tokens:
                    break
        if count == 0:
            raise UserError(f"{corpus.source} has no text")
        file.seek(0)
        file.write(token_file_header(count))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    progress_file.unlink(missing_ok=True)
    return count


def prepare(args: argparse.Namespace) -> None:
    if args.max_tokens > MAX_TOKENS:
        raise UserError(f"--max-tokens {args.max_tokens}: the format holds at most {MAX_TOKENS}")
    corpora = find_corpora(args.data or PAPER_CORPORA)
    for corpus in corpora:
        if corpus.is_token_file:
            raise UserError(f"{corpus.source} is a token file already")
        if not corpus.is_dataset and not Path(corpus.source).is_file():
            raise UserError(
                f"no file {corpus.source}: give text files, dataset:PATH, or some of {', '.join(PAPER_CORPORA)}"
            )
    tokenizer, tokenizer_fingerprint = load_tokenizer(args.tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    for corpus in corpora:
        path = args.output / f"{corpus.name}.bin"
        if path.exists() and not args.overwrite:
            print(f"{path}: already there", file=sys.stderr)
            continue
        settings = {
            "corpus": corpus.identity(),
            "tokenizer": tokenizer_fingerprint,
            "max_tokens": args.max_tokens,
            "shuffle_buffer": args.shuffle_buffer,
            "seed": args.seed,
        }
        with locked(path):
            count = write_token_file(path, corpus, tokenizer, settings, args)
        print(f"{path}: {count:,} tokens")
