"""What scripts.prepare_text reads: HTML, plain text, POD, dict dictionaries and Markdown, as lists of paragraphs."""

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".html", ".htm", ".txt", ".rst", ".pod", ".text")
LANGUAGE = re.compile(r"^(translations|(?!en)[a-z]{2}([-_][A-Z][A-Za-z]{1,3})?)$")  # a folder of other languages
NO_TEXT_FOLDERS = {"_sources", "class-use", "src"}  # what other pages are made from; lists of names; source code
NO_TEXT = re.compile(
    r"(package-(use|tree)|genindex|modindex|bookindex|py-modindex|search|toc|perluniprops|changelog)", re.IGNORECASE
)
SHORTEST = 200  # characters of a document
SHORTEST_ENTRY = 40  # of a dictionary's entry
DICT_DIGITS = {
    digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
BLOCK_TAGS = {"p", "div", "li", "dt", "dd", "tr", "table", "ul", "ol", "dl", "section", "article", "blockquote"}
BLOCK_TAGS |= {"h1", "h2", "h3", "h4", "h5", "h6", "br", "hr", "body", "caption", "figure", "td", "th"}
SKIPPED_TAGS = {"script", "style", "head", "nav", "header", "footer", "form", "button", "svg", "select", "noscript"}
NAVIGATION = re.compile(r"(prev(ious)?|next|home|up|top|contents|index|table of contents|download the ebook)", re.I)
VOID_TAGS = {"br", "hr", "img", "input", "link", "meta", "area", "base", "col", "embed", "source", "wbr"}


class Document(NamedTuple):
    """Text before cleaning.

    Args:
        shortest: characters that must be left.
        part: "train" or "heldout"; None to decide by digest.
        is_book: kept whole, if `NEW` of it is.
    """

    paragraphs: list[str]
    shortest: int = SHORTEST
    part: str | None = None
    is_book: bool = False


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


def package_documents(root: Path) -> Iterator[Document]:
    """Every document of an unpacked package, in order."""
    for file in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        relative = file.relative_to(root)
        name = file.name.removesuffix(".gz")
        if file.name.endswith(".index") and (
            file.with_suffix(".dict.dz").exists() or file.with_suffix(".dict").exists()
        ):
            for paragraphs in dictionary_entries(file):
                yield Document(paragraphs, SHORTEST_ENTRY)
        elif (
            name.endswith(SUFFIXES)
            and not NO_TEXT.search(name)
            and not any(LANGUAGE.match(part) for part in relative.parts[3:-1])
            and not NO_TEXT_FOLDERS & set(relative.parts)
        ):
            kind = html_paragraphs if ".htm" in name else pod_paragraphs if name.endswith(".pod") else text_paragraphs
            yield Document(kind(read(file)))


def markdown_paragraphs(text: str) -> list[str]:
    """Paragraphs of Markdown: no front matter, comments, images or targets of links; code and tables as they stand."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(:::.*|> \[!(?!NOTE|TIP|IMPORTANT|CAUTION|WARNING)\w+.*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^> \[!(\w+)\] *$", lambda m: f"> {m[1].capitalize()}:", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<a [^>]*>|</a>", "", text)
    text = re.sub(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?:[^()]|\([^()]*\))*\)", r"\1", text)
    return text_paragraphs(re.sub(r"\\([<>\[\]*_#|])", r"\1", text))
