"""Corpora: token files in the authors' format, plain text, and anything the `datasets` library can load.

A token file is 256 int32 (magic 20240520, version 1, token count, zeros), then that many uint16 tokens, little-endian.
Every document is preceded by `<|endoftext|>`, and text is encoded as GPT-2's `encode_ordinary` does: a special token
spelled out in the text is just text.

A corpus is named on the command line as
    FILE.bin                                              a token file
    FILE                                                  UTF-8 text, one document
    dataset:PATH[,name=CONFIG][,split=train][,column=text]  a dataset of the Hub, or a local folder of data files
    Wikipedia, C4, Pile, RefinedWeb, Cosmopedia, FineWeb, FineWeb-Edu   the paper's corpora, by their own datasets
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from evals.common import fingerprint
from scripts.cli import UserError, first_line, read_text

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
MAX_TOKENS = 2**31 - 1  # the count is an int32
PIECE_CHARACTERS = 2**18
PIECES_AT_ONCE = 64
WORD_BOUNDARY = re.compile(r"(?<=[^\W_]) (?=[^\W_])")

PAPER_CORPORA = {
    "Wikipedia": "dataset:wikimedia/wikipedia,name=20231101.en",
    "C4": "dataset:allenai/c4,name=en",
    "Pile": "dataset:EleutherAI/the_pile_deduplicated",
    "RefinedWeb": "dataset:tiiuae/falcon-refinedweb,column=content",
    "Cosmopedia": "dataset:HuggingFaceTB/cosmopedia,name=web_samples_v2",
    "FineWeb": "dataset:HuggingFaceFW/fineweb",
    "FineWeb-Edu": "dataset:HuggingFaceFW/fineweb-edu",
}


def read_token_file(path: Path) -> np.ndarray:
    """The tokens of a token file, mapped from disk: uint16 `[tokens]`.

    Raises:
        UserError: for a file that is missing, empty, cut off, or in another format.
    """
    if not path.is_file():
        raise UserError(f"no token file {path}")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty")
    if size < HEADER_BYTES:
        raise UserError(f"{path} has {size} bytes, fewer than the {HEADER_BYTES} of a token file's header")
    magic, version, count = (int(number) for number in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise UserError(f"{path} is no token file: it begins with {magic} instead of {MAGIC}")
    if version != VERSION:
        raise UserError(f"{path} has token file version {version}; known is {VERSION}")
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path} has {size - HEADER_BYTES} bytes of tokens, its header promises {count} tokens of 2 bytes: "
            "it was cut off or changed"
        )
    if count == 0:
        raise UserError(f"{path} holds no tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def token_file_header(count: int) -> bytes:
    """The header of a file of `count` tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()


@dataclass(frozen=True)
class Corpus:
    """One corpus as given on the command line.

    Args:
        name: what to call it; one of the paper's names where the file or dataset is called so.
        source: the specification it was given by.
    """

    name: str
    source: str

    @property
    def is_dataset(self) -> bool:
        return self.source.startswith("dataset:")

    @property
    def is_token_file(self) -> bool:
        return not self.is_dataset and self.source.endswith(".bin")

    def identity(self) -> str:
        """What tells this corpus from another of the same name: the dataset, or the file and its fingerprint."""
        return self.source if self.is_dataset else f"{Path(self.source).name} {fingerprint([Path(self.source)])}"

    def documents(self, skip: int = 0, shuffle_buffer: int = 0, seed: int = 0) -> Iterator[str]:
        """The documents that are not empty, read as a stream, after the first `skip` of them.

        Args:
            skip: documents to leave out at the beginning.
            shuffle_buffer: shuffle a dataset within a window of so many documents (and its shards); 0 keeps its order.
            seed: of the shuffle.

        Raises:
            UserError: when the file or dataset cannot be read or has no such column of text.
        """
        documents = self._dataset_rows(shuffle_buffer, seed) if self.is_dataset else self._file_document()
        return itertools.islice(documents, skip, None)

    def _file_document(self) -> Iterator[str]:
        path = Path(self.source)
        if not path.is_file():
            raise UserError(
                f"no file {path}: give a .bin token file, a text file, dataset:PATH, or one of the paper's corpora "
                f"({', '.join(PAPER_CORPORA)})"
            )
        if text := read_text(path):
            yield text

    def _dataset_rows(self, shuffle_buffer: int, seed: int) -> Iterator[str]:
        from datasets import load_dataset

        path, *options = self.source.removeprefix("dataset:").split(",")
        options = dict(option.partition("=")[::2] for option in options)
        unknown = set(options) - {"name", "split", "column"}
        if not path or unknown or not all(options.values()):
            raise UserError(f"{self.source}: write dataset:PATH[,name=CONFIG][,split=train][,column=text]")
        column = options.get("column", "text")
        try:
            rows = load_dataset(path, options.get("name"), split=options.get("split", "train"), streaming=True)
            if shuffle_buffer:
                rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
            for row in rows:
                if not isinstance(row.get(column), str):
                    raise UserError(
                        f"{self.source} has no text in column {column!r}; its columns are {', '.join(row)}: "
                        "say which with ,column=NAME"
                    )
                if row[column]:
                    yield row[column]
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.source} cannot be read: {first_line(error)}") from error


def find_corpora(specifications: Iterable[str]) -> list[Corpus]:
    """The corpora that command-line arguments name, each with a name of its own.

    Raises:
        UserError: when two would have the same name.
    """
    corpora: dict[str, Corpus] = {}
    for given in specifications:
        source = PAPER_CORPORA.get(given, given)
        stem = given.removeprefix("dataset:").split(",")[0].rstrip("/")
        name = paper_name(Path(stem).name if source.startswith("dataset:") else Path(stem).stem)
        if name in corpora:
            raise UserError(f"{corpora[name].source} and {source} are both called {name}: rename one")
        corpora[name] = Corpus(name, source)
    return list(corpora.values())


def paper_name(stem: str) -> str:
    """The paper's name of a corpus for any way to spell it (`fineweb_edu_eval`), or `stem` itself."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("eval").removesuffix("val")

    return next((name for name in PAPER_CORPORA if plain(name) == plain(stem)), stem)


def split_pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text into pieces of about `size` characters that are encoded one by one as the whole would be.

    GPT-2's pre-tokenizer always begins a new word at a single space between two letters or digits, so cutting there
    changes no token. Where there is no such space for long, the piece grows until there is one.
    """
    start = 0
    while len(text) - start > size:
        found = WORD_BOUNDARY.search(text, start + size)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[tuple[list[int], bool]]:
    """Encoded documents, each led by `<|endoftext|>`, in pieces: (tokens, whether they end a document).

    Raises:
        UserError: when the tokenizer has no such token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token to begin documents with")

    def pieces() -> Iterator[tuple[str, bool, bool]]:
        for text in documents:
            parts = list(split_pieces(text))
            for index, part in enumerate(parts):
                yield part, index == 0, index == len(parts) - 1

    stream = pieces()
    while batch := list(itertools.islice(stream, PIECES_AT_ONCE)):
        encoded = tokenizer(
            [text for text, _, _ in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for tokens, (_, first, last) in zip(encoded, batch, strict=True):
            yield [tokenizer.eos_token_id, *tokens] if first else tokens, last


def encode_up_to(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], max_tokens: int) -> np.ndarray:
    """The first `max_tokens` tokens of `documents`, int32 `[tokens]`."""
    parts, count = [np.empty(0, dtype=np.int32)], 0
    for tokens, _ in encode(tokenizer, documents):
        parts.append(np.asarray(tokens, dtype=np.int32))
        count += len(tokens)
        if count >= max_tokens:
            break
    return np.concatenate(parts)[:max_tokens]
