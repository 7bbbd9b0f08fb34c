"""Token files for training: documentation and dictionaries of Debian packages, folders of Markdown, and books.

    python -m scripts.prepare_text --output build/text                                 # the packages of the demo
    python -m scripts.prepare_text --output build/text --packages dict-gcide debian-reference-en
    python -m scripts.prepare_text --output build/text --folder unpacked               # dpkg-deb -x made it
    python -m scripts.prepare_text --output build/books --books Gutenberg_Text --markdown cpp-docs/docs \
        --packages openjdk-17-doc ghc-doc anarchism --vocab-size 16384 8192 --heldout 0.01 --context 1024

Packages are fetched with `apt-get download` (after `apt-get update`) and unpacked with dpkg-deb, nothing is installed.
Text comes from HTML, plain text, reStructuredText, POD and dict dictionaries, compressed or not. Paragraphs that were
seen before are dropped (navigation, licences), then documents that are short or not mostly words. A document is held
out by its digest, so the same text is always split the same way, whatever else is there.

--markdown takes a folder of Markdown files with a LICENSE file in it or above. --books takes a collection of Project
Gutenberg's books, a folder an author (scripts.book_text says which books, and what is cut). Books are held out by
author, and stay whole; one of which less than half is new, such as a part of collected works, is left out.

OUTPUT gets train.bin, heldout.bin (the format of evals.corpora), heldout_sample.bin (its first tokens, small enough to
be checked in), tokenizer/ (a byte-level BPE trained on the training part, or GPT-2's), text/ (JSON lines), licences/
(the copyright files), and sources.json and SOURCES.md: every source with version, licences, sizes and digests. A
second --vocab-size gets a tokenizer and token files of its own in OUTPUT/SIZE.
A package of Debian's non-free section, or without a copyright file, is refused.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from scripts import cli
from scripts.cli import UserError, positive_int


def check(args: argparse.Namespace) -> None:
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"no folder {args.folder}")
    for option, folder in (("--books", args.books), ("--markdown", args.markdown)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option} {folder} is no folder")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.prepare_text", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--packages", nargs="+", metavar="NAME", help="Debian packages (default: the demo's)")
    source.add_argument("--folder", type=Path, help="an unpacked package instead")
    parser.add_argument("--markdown", type=Path, metavar="DIR", help="folder of Markdown files")
    parser.add_argument("--books", type=Path, metavar="DIR", help="collection of Project Gutenberg's books by author")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--vocab-size", type=positive_int, nargs="+", default=[4096], help="of the BPE to train")
    kind.add_argument("--gpt2", dest="vocab_size", action="store_const", const=[], help="use the GPT-2 tokenizer")
    parser.add_argument("--heldout", type=float, default=0.02, help="share of the text to hold out")
    parser.add_argument(
        "--context", type=positive_int, default=512, help="context to write into the tokenizer's files"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the order of documents")
    args = parser.parse_args(argv)
    return cli.run("scripts.prepare_text:prepare", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from evals.common import write_json, write_text
from evals.corpora import MAX_TOKENS, Corpus, read_token_file, token_file_header
from evals.prepare_tokens import load_tokenizer, write_token_file
from scripts import book_text
from scripts.text_readers import SHORTEST, Document, markdown_paragraphs, package_documents, read
from tokenization.build import END_OF_TEXT, NUM_BYTES, tokenizer_config
from tokenization.build import FOLDER as GPT2_TOKENIZER

# The demo's. Not dict-wn: it repeats a definition under each of its words, so held-out text would be known already.
PACKAGES = (
    "apache2-doc",
    "debian-handbook",
    "debian-history",
    "debian-policy",
    "debian-reference-en",
    "developers-reference",
    "dict-foldoc",
    "dict-gcide",
    "dict-jargon",
    "git-doc",
    "harden-doc",
    "installation-guide-amd64",
    "libreoffice-help-en-us",
    "linux-doc-6.1",
    "maint-guide",
    "perl-doc",
    "postgresql-doc-15",
    "python-django-doc",
    "python3.11-doc",
    "sqlite3-doc",
    "vim-doc",
)
NON_FREE = ("non-free", "contrib", "restricted", "multiverse")
LICENCE_NAME = re.compile(r"[\w.+-]+(,? (or|and|with) [\w.+-]+( exception)?)*")
LONGEST = 40_000  # a longer document is cut between paragraphs, so that the held-out part is spread over many
REPEATED = 48  # a paragraph of at least so many characters is kept only the first time
LETTERS = 0.6  # smallest share of letters and spaces
NEW = 0.5  # smallest share of a book that is not known already
TOKENIZER_CHARACTERS = 200_000_000  # a tokenizer is trained on every n-th document, about so much in all
SAMPLE_TOKENS = 16 * 512 + 1
NO_LETTERS = bytes(byte for byte in range(128) if not (chr(byte).isalpha() or byte == 32))


class Source(NamedTuple):
    """Where documents come from.

    Args:
        entry: its name, licences and what else sources.json is to say.
        documents: all of them, in order.
    """

    entry: dict
    documents: Iterator[Document]


def tool(*command: str, folder: Path | None = None) -> str:
    """Output of a Debian tool.

    Raises:
        UserError: when it is not there or fails.
    """
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not there: unpack packages elsewhere and give --folder") from error
    except subprocess.CalledProcessError as error:
        message = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
        raise UserError(f"{' '.join(command[:3])}: {message}") from error


def fetch(name: str, packages: Path) -> Path:
    """The unpacked folder of a package, downloaded if it is not there."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.\-]+", name):
        raise UserError(f"{name!r} is no name of a Debian package")
    packages.mkdir(parents=True, exist_ok=True)
    if not list(packages.glob(f"{name}_*.deb")):
        tool("apt-get", "download", name, folder=packages)
    archive = max(packages.glob(f"{name}_*.deb"))
    folder = packages / name
    if not (folder / "control.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tool("dpkg-deb", "-x", str(archive), str(folder / "root"))
        control = {
            field.lower(): tool("dpkg-deb", "-f", str(archive), field).strip()
            for field in ("Package", "Version", "Section", "Homepage")
        }
        control["sha256"] = hashlib.sha256(archive.read_bytes()).hexdigest()
        write_json(folder / "control.json", control)
    return folder


def licences(root: Path, name: str) -> tuple[list[str], str]:
    """Names of the licences that a package's copyright file gives, and its text.

    Raises:
        UserError: when there is none.
    """
    doc = root / "usr/share/doc"
    files = sorted(doc.glob(f"{name}/copyright")) or sorted(doc.glob("*/copyright"))
    if not files:
        raise UserError(f"package {name} has no copyright file: its licence is unknown, leave it out")
    text = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    named = {name.strip() for name in re.findall(r"^License:[ \t]*(\S[^\n]*)", text, re.MULTILINE)}
    named = {name for name in named if LICENCE_NAME.fullmatch(name)}
    common = set(re.findall(r"common-licenses/([A-Za-z0-9.+-]*[A-Za-z0-9+])", text))
    named |= {name for name in common if not any(other.startswith(name) for other in named)}  # GPL-2, GPL-2+
    if not named:
        lowered = " ".join(text.lower().split())
        known = {
            "public domain": "public domain",
            "wordnet": "WordNet licence",
            "permission to use, copy, modify": "permission notice (MIT-like)",
            "permission is hereby granted": "permission notice (MIT-like)",
            "free documentation license": "GFDL",
            "general public license": "GPL",
            "distributed freely": "free distribution notice",
        }
        named = {label for phrase, label in known.items() if phrase in lowered}
    return sorted(named) or ["see the copyright file"], text


def clean(document: Document, seen: set[bytes]) -> Iterator[str]:
    """The texts that a document becomes: without repetition, not too long unless a book, mostly words."""
    kept: list[str] = []
    for paragraph in document.paragraphs:
        if not paragraph.isprintable():
            paragraph = "".join(c for c in paragraph if c.isprintable() or c in "\n\t")
        if len(paragraph) >= REPEATED:
            digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()[:12]
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)

    def finish(parts: list[str]) -> Iterator[str]:
        text = "\n\n".join(parts).strip()
        words = len(text.encode("ascii", "ignore").translate(None, NO_LETTERS))
        if len(text) >= document.shortest and words >= LETTERS * len(text):
            yield text

    if document.is_book:
        if sum(map(len, kept)) >= NEW * sum(map(len, document.paragraphs)):
            yield from finish(kept)
        return
    part: list[str] = []
    length = 0
    for paragraph in kept:
        part.append(paragraph)
        length += len(paragraph)
        if length > LONGEST:
            yield from finish(part)
            part, length = [], 0
    yield from finish(part)


def is_heldout(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out part: decided by its digest alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def train_tokenizer(folder: Path, texts: Iterator[str], vocab_size: int, context: int) -> None:
    """A byte-level BPE of `vocab_size` tokens like GPT-2's; the last is `<|endoftext|>`.

    Raises:
        UserError: when there is too little text for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size - 1:
        raise UserError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, fewer than --vocab-size {vocab_size}: use more text"
        )
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str() + "\n")
    write_json(folder / "tokenizer_config.json", tokenizer_config(context))


def package_sources(args: argparse.Namespace) -> Iterator[Source]:
    """The packages that were asked for; the demo's, where nothing was."""
    if args.folder is not None:
        roots = {args.folder.name: args.folder}
    else:
        names = args.packages or (() if args.books or args.markdown else PACKAGES)
        roots = {name: fetch(name, args.output / "packages") for name in tqdm(names, desc="packages")}
    for name, folder in roots.items():
        control_file = folder / "control.json"
        control = json.loads(control_file.read_text(encoding="utf-8")) if control_file.exists() else {}
        if control.get("section", "").split("/")[0] in NON_FREE:
            raise UserError(f"package {name} is in Debian's section {control['section']}: it is not free")
        root = folder / "root" if control else folder
        named, text = licences(root, name)
        write_text(args.output / "licences" / f"{name}.copyright", text)
        yield Source({"name": name, **control, "licences": named}, package_documents(root))


def markdown_source(folder: Path, output: Path) -> Source:
    """A folder of Markdown under a licence of Creative Commons.

    Raises:
        UserError: without one, or without files.
    """
    found = [
        path for place in (folder, *folder.resolve().parents) for path in (place / "LICENSE", place / "LICENSE.md")
    ]
    licence = next((path for path in found[:6] if path.is_file()), None)
    text = "" if licence is None else read(licence)
    version = re.search(r"Attribution(-ShareAlike)? (\d\.\d) International", text)
    if version is None:
        raise UserError(
            f"--markdown {folder}: no LICENSE of Creative Commons in it or above, so its licence is unknown"
        )
    name = folder.resolve().parent.name if folder.name == "docs" else folder.resolve().name
    write_text(output / "licences" / f"{name}.LICENSE", text)
    files = sorted(path for path in folder.rglob("*.md") if path.is_file())
    entry = {"name": name, "licences": [f"CC-BY{'-SA' if version[1] else ''}-{version[2]}"]}
    return Source(entry, (Document(markdown_paragraphs(read(path))) for path in files))


def book_source(folder: Path, share: float) -> Source:
    """Books, the held-out authors' first."""
    books, refused = book_text.find_books(folder)
    parts = list(book_text.divided(books, share))
    if {part for part, _ in parts} != {"heldout", "train"}:
        raise UserError(f"--books {folder}: no author can be held out; the collection is a folder for each author")

    def documents() -> Iterator[Document]:
        for part, book in parts:
            body = book_text.body(book_text.read_book(book.path))
            yield Document(book_text.book_paragraphs(body), SHORTEST, part, is_book=True)

    entry = {"name": folder.resolve().name, "licences": [book_text.LICENCE]}
    return Source(entry | {"notes": book_text.describe(parts, refused, share)}, documents())


def collect(args: argparse.Namespace) -> list[dict]:
    """Write text/{train,heldout}/documents.jsonl and the copyright files; returns what each source gave."""
    sources = [*package_sources(args)]
    if args.markdown is not None:
        sources.append(markdown_source(args.markdown, args.output))
    if args.books is not None:
        sources.append(book_source(args.books, args.heldout))
    entries, seen = [], set()
    streams = {}
    for part in ("train", "heldout"):
        (args.output / "text" / part).mkdir(parents=True, exist_ok=True)
        streams[part] = (args.output / "text" / part / "documents.jsonl").open("w", encoding="utf-8")
    try:
        for source in sources:
            name, digest = source.entry["name"], hashlib.sha256()
            counts = {"train": [0, 0], "heldout": [0, 0]}
            for document in tqdm(source.documents, desc=name, unit=" documents", leave=False):
                for text in clean(document, seen):
                    part = document.part or ("heldout" if is_heldout(text, args.heldout) else "train")
                    streams[part].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    counts[part][0] += 1
                    counts[part][1] += len(text)
                    digest.update(f"{part}\n{text}\n".encode())
            entry = {**source.entry, "text_sha256": digest.hexdigest()}
            for part, (documents, characters) in counts.items():
                entry |= {f"{part}_documents": documents, f"{part}_characters": characters}
            if not counts["train"][0]:
                raise UserError(f"{name} gives no text: leave it out")
            print(
                f"{name}: {counts['train'][1]:,} + {counts['heldout'][1]:,} characters; {', '.join(entry['licences'])}"
            )
            entries.append(entry)
    finally:
        for stream in streams.values():
            stream.close()
    return entries


def texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def sources_page(sources: list[dict], files: dict[str, dict]) -> str:
    """SOURCES.md: what `collect` returned, a line for each source, and the tokens and digest of each file."""
    lines = []
    for source in sources:
        version = f" {source['version']}" if "version" in source else ""
        lines.append(
            f"- **{source['name']}**{version}, {source['train_characters']:,} characters: "
            f"{', '.join(source['licences'])}\n"
        )
        lines += [f"  {note}\n" for note in source.get("notes", [])]
    return (
        "# Training text\n\nText prepared by `python -m scripts.prepare_text`: "
        f"{files['train.bin']['tokens']:,} tokens to train on, {files['heldout.bin']['tokens']:,} held out. The "
        "licences of a Debian package are those that its copyright file names, often for a whole source package of "
        "which this text is a part.\n\n"
        + "".join(lines)
        + "\n"
        + "".join(f"- `{name}`: {file['tokens']:,} tokens, sha256 {file['sha256']}\n" for name, file in files.items())
    )


def write_tokens(args: argparse.Namespace, folder: Path, vocab_size: int | None, characters: int) -> dict[str, dict]:
    """Write tokenizer and token files of one vocabulary; returns {file: tokens and sha256}."""
    tokenizer_folder = GPT2_TOKENIZER
    if vocab_size is not None:
        tokenizer_folder = folder / "tokenizer"
        every = -(-characters // TOKENIZER_CHARACTERS)
        sample = islice(texts(args.output / "text/train/documents.jsonl"), 0, None, every)
        train_tokenizer(tokenizer_folder, sample, vocab_size, args.context)
    tokenizer, digest = load_tokenizer(tokenizer_folder)
    settings = {"tokenizer": digest, "seed": args.seed, "heldout": args.heldout}
    options = argparse.Namespace(max_tokens=MAX_TOKENS, shuffle_buffer=100_000, seed=args.seed, overwrite=True)
    files = {}
    for part in ("heldout", "train"):  # train.bin last: its presence says that all is there
        corpus = Corpus(part, f"dataset:{(args.output / 'text' / part).resolve()}")
        path = folder / f"{part}.bin"
        tokens = write_token_file(path, corpus, tokenizer, settings, options)
        with path.open("rb") as stream:
            files[str(path.relative_to(args.output))] = {
                "tokens": tokens,
                "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            }
        print(f"{path}: {tokens:,} tokens")
    sample = read_token_file(folder / "heldout.bin")[:SAMPLE_TOKENS]
    (folder / "heldout_sample.bin").write_bytes(token_file_header(len(sample)) + sample.tobytes())
    return files


def prepare(args: argparse.Namespace) -> None:
    if not 0 < args.heldout < 1:
        raise UserError(f"--heldout {args.heldout} must be a share between 0 and 1")
    for size in args.vocab_size:
        if not NUM_BYTES + 1 < size <= 2**16:
            raise UserError(f"--vocab-size {size} must be above {NUM_BYTES + 1} and at most {2**16}")
    if (args.output / "train.bin").exists():
        raise UserError(f"{args.output / 'train.bin'} already exists: remove it or choose another --output")
    sources = collect(args)
    characters = sum(source["train_characters"] for source in sources)
    files: dict[str, dict] = {}
    first, *others = args.vocab_size or [None]
    for size in others:
        files |= write_tokens(args, args.output / str(size), size, characters)
    files = write_tokens(args, args.output, first, characters) | files
    settings = {"vocab_size": args.vocab_size, "seed": args.seed, "heldout": args.heldout}
    write_json(args.output / "sources.json", {"settings": settings, "files": files, "sources": sources})
    write_text(args.output / "SOURCES.md", sources_page(sources, files))
