"""Token files for training, from the text of Debian packages: documentation and dictionaries under free licences.

    python -m scripts.prepare_text --output build/text                                 # the packages of the demo
    python -m scripts.prepare_text --output build/text --packages dict-gcide debian-reference-en
    python -m scripts.prepare_text --output build/text --folder unpacked               # dpkg-deb -x made it

Packages are fetched with `apt-get download` (after `apt-get update`) and unpacked with dpkg-deb, nothing is installed.
Text comes from HTML, plain text, reStructuredText, POD and dict dictionaries, compressed or not. Paragraphs that were
seen before are dropped (navigation, licences), then documents that are short or not mostly words. A document is held
out by its digest, so the same text is always split the same way, whatever else is there.

OUTPUT gets train.bin, heldout.bin (the format of evals.corpora), heldout_sample.bin (its first tokens, small enough to
be checked in), tokenizer/ (a byte-level BPE trained on the training part, or GPT-2's), text/ (JSON lines), licences/
(the copyright files), and sources.json and SOURCES.md: every package with version, licences and sizes.
A package of Debian's non-free section, or without a copyright file, is refused.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, positive_int


def check(args: argparse.Namespace) -> None:
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"no folder {args.folder}")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.prepare_text", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--packages", nargs="+", metavar="NAME", help="Debian packages (default: the demo's)")
    source.add_argument("--folder", type=Path, help="an unpacked package instead")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--vocab-size", type=positive_int, default=4096, help="of the BPE to train")
    kind.add_argument("--gpt2", dest="vocab_size", action="store_const", const=None, help="use the GPT-2 tokenizer")
    parser.add_argument("--heldout", type=float, default=0.02, help="share of the documents to hold out")
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
SUFFIXES = (".html", ".htm", ".txt", ".rst", ".pod", ".text")
LANGUAGE = re.compile(r"^(translations|(?!en)[a-z]{2}([-_][A-Z][A-Za-z]{1,3})?)$")  # a folder of other languages
NO_TEXT = re.compile(r"(genindex|modindex|bookindex|py-modindex|search|toc|perluniprops|changelog)", re.IGNORECASE)
LICENCE_NAME = re.compile(r"[\w.+-]+(,? (or|and|with) [\w.+-]+( exception)?)*")
SHORTEST = 200  # characters of a document
SHORTEST_ENTRY = 40  # of a dictionary's entry
LONGEST = 40_000  # a longer document is cut between paragraphs, so that the held-out part is spread over many
REPEATED = 48  # a paragraph of at least so many characters is kept only the first time
LETTERS = 0.6  # smallest share of letters and spaces
SAMPLE_TOKENS = 16 * 512 + 1
DICT_DIGITS = {
    digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
BLOCK_TAGS = {"p", "div", "li", "dt", "dd", "tr", "table", "ul", "ol", "dl", "section", "article", "blockquote"}
BLOCK_TAGS |= {"h1", "h2", "h3", "h4", "h5", "h6", "br", "hr", "body", "caption", "figure", "td", "th"}
SKIPPED_TAGS = {"script", "style", "head", "nav", "header", "footer", "form", "button", "svg", "select"}
NAVIGATION = re.compile(r"(prev(ious)?|next|home|up|top|contents|index|table of contents|download the ebook)", re.I)
VOID_TAGS = {"br", "hr", "img", "input", "link", "meta", "area", "base", "col", "embed", "source", "wbr"}


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


class PlainText(HTMLParser):
    """The running text of an HTML page: one paragraph per block element, `<pre>` as it stands."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.parts: list[str] = []
        self.skipped: list[str] = []
        self.pre = 0

    def flush(self) -> None:
        text = "".join(self.parts)
        text = text.strip("\n").rstrip() if self.pre else " ".join(text.replace("¶", " ").split())
        if text.strip() and not NAVIGATION.fullmatch(text):
            self.paragraphs.append(text)
        self.parts.clear()

    def handle_starttag(self, tag, attrs):
        kinds = dict(attrs)
        if self.skipped:
            if tag == self.skipped[-1]:
                self.skipped.append(tag)
        elif tag in SKIPPED_TAGS or (
            tag not in VOID_TAGS
            and re.search(r"sphinxsidebar|related|nav(header|footer)|footer", kinds.get("class") or "")
        ):
            self.skipped.append(tag)
        elif tag == "pre":
            self.flush()
            self.pre += 1
        elif tag in BLOCK_TAGS and not self.pre:
            self.flush()

    def handle_endtag(self, tag):
        if self.skipped:
            if tag == self.skipped[-1]:
                self.skipped.pop()
        elif tag == "pre" and self.pre:
            self.flush()
            self.pre -= 1
        elif tag in BLOCK_TAGS and not self.pre:
            self.flush()

    def handle_data(self, data):
        if not self.skipped:
            self.parts.append(data)


def html_paragraphs(text: str) -> list[str]:
    parser = PlainText()
    parser.feed(text)
    parser.flush()
    return parser.paragraphs


def text_paragraphs(text: str) -> list[str]:
    """Paragraphs of plain text: what empty lines separate."""
    return [part.strip("\n").rstrip() for part in re.split(r"\n[ \t]*\n+", text.replace("\r\n", "\n")) if part.strip()]


def pod_paragraphs(text: str) -> list[str]:
    """Paragraphs of Perl's documentation without its markup; code between documentation is left out."""
    paragraphs, inside = [], False
    for part in text_paragraphs(text):
        command = re.match(r"=(\w+)\s*", part)
        if command:
            inside = command[1] not in ("cut", "begin", "for")
            part = part[command.end() :] if command[1].startswith(("head", "item")) else ""
        if inside and part:
            part = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", part, flags=re.DOTALL)
            for _ in range(3):  # nested
                part = re.sub(r"[BCFILSXZ]<([^<>|]*\|)?([^<>]*)>", lambda m: (m[1] or m[2]).rstrip("|"), part)
            paragraphs.append(part.replace("E<gt>", ">").replace("E<lt>", "<"))
    return paragraphs


def read(file: Path) -> str:
    """Text of a file, unpacked if need be."""
    data = file.read_bytes()
    if file.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def dictionary_entries(index: Path) -> Iterator[list[str]]:
    """Entries of a dict dictionary in the order of its text, each once."""
    stem = index.with_suffix("")
    packed, plain = stem.with_suffix(".dict.dz"), stem.with_suffix(".dict")
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()

    def number(digits: str) -> int:
        value = 0
        for digit in digits:
            value = value * 64 + DICT_DIGITS[digit]
        return value

    places = set()
    for line in index.read_text(encoding="utf-8", errors="replace").split("\n"):
        headword, *place = line.split("\t")
        if len(place) >= 2 and not headword.startswith(("00-", "00database")):
            places.add((number(place[0]), number(place[1])))
    for start, size in sorted(places):
        yield text_paragraphs(data[start : start + size].decode("utf-8", errors="replace"))


def package_documents(root: Path) -> Iterator[tuple[str, list[str], int]]:
    """(where it is from, paragraphs, shortest length to keep) of every document of an unpacked package, in order."""
    for file in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        relative = file.relative_to(root)
        name = file.name.removesuffix(".gz")
        if file.name.endswith(".index") and (
            file.with_suffix(".dict.dz").exists() or file.with_suffix(".dict").exists()
        ):
            for paragraphs in dictionary_entries(file):
                yield str(relative), paragraphs, SHORTEST_ENTRY
        elif (
            name.endswith(SUFFIXES)
            and not NO_TEXT.search(name)
            and not any(LANGUAGE.match(part) for part in relative.parts[3:-1])
            and "_sources" not in relative.parts
        ):
            kind = html_paragraphs if ".htm" in name else pod_paragraphs if name.endswith(".pod") else text_paragraphs
            yield str(relative), kind(read(file)), SHORTEST


def clean(paragraphs: list[str], seen: set[bytes], shortest: int) -> Iterator[str]:
    """The documents that a list of paragraphs becomes: without repetition, not too long, mostly words."""
    kept: list[str] = []
    for paragraph in paragraphs:
        paragraph = "".join(c for c in paragraph if c.isprintable() or c in "\n\t")
        if len(paragraph) >= REPEATED:
            digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()[:12]
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)

    def finish(parts: list[str]) -> Iterator[str]:
        text = "\n\n".join(parts).strip()
        words = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
        if len(text) >= shortest and words >= LETTERS * len(text):
            yield text

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


def collect(args: argparse.Namespace) -> list[dict]:
    """Write text/{train,heldout}/documents.jsonl and the copyright files; returns what each source gave."""
    if args.folder is not None:
        roots = {args.folder.name: args.folder}
    else:
        names = tqdm(args.packages or PACKAGES, desc="packages")
        roots = {name: fetch(name, args.output / "packages") for name in names}
    sources, seen = [], set()
    streams = {}
    for part in ("train", "heldout"):
        (args.output / "text" / part).mkdir(parents=True, exist_ok=True)
        streams[part] = (args.output / "text" / part / "documents.jsonl").open("w", encoding="utf-8")
    try:
        for name, folder in roots.items():
            control_file = folder / "control.json"
            control = json.loads(control_file.read_text(encoding="utf-8")) if control_file.exists() else {}
            if control.get("section", "").split("/")[0] in NON_FREE:
                raise UserError(f"package {name} is in Debian's section {control['section']}: it is not free")
            root = folder / "root" if control else folder
            named, text = licences(root, name)
            write_text(args.output / "licences" / f"{name}.copyright", text)
            entry = {"name": name, **control, "licences": named}
            counts = {"train": [0, 0], "heldout": [0, 0]}
            for _, paragraphs, shortest in tqdm(package_documents(root), desc=name, unit=" documents", leave=False):
                for document in clean(paragraphs, seen, shortest):
                    part = "heldout" if is_heldout(document, args.heldout) else "train"
                    streams[part].write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                    counts[part][0] += 1
                    counts[part][1] += len(document)
            for part, (documents, characters) in counts.items():
                entry |= {f"{part}_documents": documents, f"{part}_characters": characters}
            if not counts["train"][0]:
                raise UserError(f"package {name} gives no text: leave it out")
            print(f"{name}: {counts['train'][1]:,} + {counts['heldout'][1]:,} characters; {', '.join(named)}")
            sources.append(entry)
    finally:
        for stream in streams.values():
            stream.close()
    return sources


def texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def sources_page(sources: list[dict], tokens: dict[str, int]) -> str:
    """SOURCES.md: what `collect` returned, one line per package, and the number of tokens of each part."""
    lines = [
        f"- **{source['name']}** {source.get('version', '')}, {source['train_characters']:,} characters: "
        f"{', '.join(source['licences'])}\n"
        for source in sources
    ]
    return (
        "# Training text\n\nText of Debian packages, prepared by `python -m scripts.prepare_text`: "
        f"{tokens['train']:,} tokens to train on, {tokens['heldout']:,} held out. The licences are those that a "
        "package's copyright file names, often for a whole source package of which this text is a part.\n\n"
        + "".join(lines)
    )


def prepare(args: argparse.Namespace) -> None:
    if not 0 < args.heldout < 1:
        raise UserError(f"--heldout {args.heldout} must be a share between 0 and 1")
    if args.vocab_size is not None and not NUM_BYTES + 1 < args.vocab_size <= 2**16:
        raise UserError(f"--vocab-size {args.vocab_size} must be above {NUM_BYTES + 1} and at most {2**16}")
    if (args.output / "train.bin").exists():
        raise UserError(f"{args.output / 'train.bin'} already exists: remove it or choose another --output")
    sources = collect(args)
    folder = GPT2_TOKENIZER
    if args.vocab_size is not None:
        folder = args.output / "tokenizer"
        train_tokenizer(folder, texts(args.output / "text/train/documents.jsonl"), args.vocab_size, args.context)
    tokenizer, digest = load_tokenizer(folder)
    settings = {"tokenizer": digest, "seed": args.seed, "heldout": args.heldout}
    options = argparse.Namespace(max_tokens=MAX_TOKENS, shuffle_buffer=100_000, seed=args.seed, overwrite=True)
    tokens = {}
    for part in ("heldout", "train"):  # train.bin last: its presence says that all is there
        corpus = Corpus(part, f"dataset:{(args.output / 'text' / part).resolve()}")
        tokens[part] = write_token_file(args.output / f"{part}.bin", corpus, tokenizer, settings, options)
        print(f"{args.output / f'{part}.bin'}: {tokens[part]:,} tokens")
    sample = read_token_file(args.output / "heldout.bin")[:SAMPLE_TOKENS]
    (args.output / "heldout_sample.bin").write_bytes(token_file_header(len(sample)) + sample.tobytes())
    write_json(args.output / "sources.json", {"settings": settings, "tokens": tokens, "packages": sources})
    write_text(args.output / "SOURCES.md", sources_page(sources, tokens))
