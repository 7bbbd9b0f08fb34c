"""Books of Project Gutenberg as training text: which ones, without headers, paragraphs as paragraphs.

The collection is a folder of authors, each a folder of NAME.txt, such as github.com/rcdm-uga/Gutenberg_Text. A book
may lie under several of its authors, translators and illustrators; its number on Project Gutenberg tells.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LICENCE = "Project Gutenberg texts, public domain in the US, headers removed"
# Protected where copyright lasts 70 years after death: who died after 1955, and who drew for stories of such authors
EXCLUDED = (
    "Christie, Agatha",
    "Emshwiller, Ed",
    "Hesse, Hermann",
    "Kelley, Leo P.",
    "Lockhart, Caroline",
    "Orban, Paul",
    "Russell, Bertrand",
    "Tolkien, J. R. R. (John Ronald Reuel)",
    "Wodehouse, P. G. (Pelham Grenville)",
)
START = re.compile(r"^\*\*\* ?START OF TH(?:IS|E) PROJECT GUTENBERG[^\n]*\n", re.MULTILINE)
END = re.compile(r"^\*\*\* ?END OF TH(?:IS|E) PROJECT GUTENBERG", re.MULTILINE)
COPYRIGHTED = re.compile(r"copyrighted project gutenberg|world library, inc", re.IGNORECASE)
NUMBER = re.compile(r"\[(?:e-?book|etext) ?#? ?(\d+)\]", re.IGNORECASE)
LANGUAGE = re.compile(r"^Language: *(.+?) *$", re.MULTILINE)
HEADER = 8000  # characters that hold number, language and notices
NO_PROSE = re.compile(  # paragraphs that are no part of the book
    r"project gutenberg|gutenberg\.(org|net)|^(e-?text )?(produced|prepared) by|^\[illustration|^\[?transcriber"
    r"|distributed proof|https?://",
    re.IGNORECASE,
)
PROSE_LINE = 45  # characters of every line of a paragraph but its last, for it to be prose that was wrapped
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "\ufeff": None})


@dataclass
class Book:
    """A book that may be used.

    Args:
        key: its number on Project Gutenberg, or a digest of its text.
        authors: folders that it lies in.
        path: the first of its files.
    """

    key: str
    authors: list[str]
    path: Path


def body(text: str) -> str | None:
    """What lies between a text's marks of start and end, or None for one that may not be used.

    That is one marked as copyrighted, in another language than English, without marks, or an index of others.
    """
    start, end = START.search(text), END.search(text)
    language = LANGUAGE.search(text[:HEADER])
    if start is None or end is None or COPYRIGHTED.search(text[: start.end() + HEADER]):
        return None
    if language is not None and language[1] != "English":
        return None
    return text[start.end() : end.start()]


def book_paragraphs(text: str) -> list[str]:
    """Paragraphs of a body: lines of prose joined, verse as it stands, plain quotation marks, no underscores."""
    paragraphs = []
    for part in re.split(r"\n[ \t]*\n+", text.replace("\r\n", "\n").translate(QUOTES)):
        lines = [line.rstrip() for line in part.strip("\n").split("\n") if line.strip()]
        if not lines or NO_PROSE.search(part.strip()):
            continue
        is_prose = all(len(line.strip()) >= PROSE_LINE for line in lines[:-1])
        joined = " ".join(" ".join(lines).split()) if is_prose else "\n".join(lines)
        paragraphs.append(re.sub(r"_([^_\n]+)_", r"\1", joined))
    return paragraphs


def read_book(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")


def find_books(folder: Path) -> tuple[list[Book], int]:
    """The books of a collection, each once and in order, and how many files hold none that may be used."""
    books: dict[str, Book] = {}
    refused, excluded = 0, set()
    for path in sorted(folder.glob("*/*.txt")):
        text, author = read_book(path), path.parent.name.strip()
        content = None if path.name.startswith("Index of the Project Gutenberg") else body(text)
        if content is None:
            refused += 1
            continue
        number = NUMBER.search(text[:HEADER])
        key = number[1] if number else hashlib.sha256(content.encode()).hexdigest()[:16]
        if author in EXCLUDED:
            excluded.add(key)
        book = books.setdefault(key, Book(key, [], path))
        if author not in book.authors:
            book.authors.append(author)
    return [book for key, book in books.items() if key not in excluded], refused + len(excluded)


def heldout_authors(books: list[Book], share: float) -> set[str]:
    """Authors to hold out with all their books.

    Taken in the order of their names' digests, each whose bytes still fit and are no more than a quarter of the share.
    Only books of one author count, so that none is chosen for what others wrote.
    """
    sizes: dict[str, int] = {}
    for book in books:
        if len(book.authors) == 1:
            sizes[book.authors[0]] = sizes.get(book.authors[0], 0) + book.path.stat().st_size
    room = share * sum(sizes.values())
    largest = room / 4
    chosen = set()
    for author in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[author] <= min(room, largest):
            chosen.add(author)
            room -= sizes[author]
    return chosen


def divided(books: list[Book], share: float) -> Iterator[tuple[str, Book]]:
    """(part, book), the held-out ones first; a book of held-out and other authors belongs to neither part."""
    authors = heldout_authors(books, share)
    for part, wanted in (("heldout", True), ("train", False)):
        for book in books:
            if {author in authors for author in book.authors} == {wanted}:
                yield part, book


def describe(books: list[tuple[str, Book]], refused: int, share: float) -> list[str]:
    """Lines for SOURCES.md on what `divided` gave."""
    count: dict[str, dict[str, int]] = {"heldout": {}, "train": {}}
    for part, book in books:
        for author in book.authors:
            count[part][author] = count[part].get(author, 0) + 1

    def listed(part: str) -> str:
        return "; ".join(f"{author} {number}" for author, number in sorted(count[part].items()))

    return [
        f"Books by folder, to train on: {listed('train')}.",
        f"Held out, {share:g} of the whole, by author and book: {listed('heldout')}.",
        f"Left out: {refused} files that are marked as copyrighted, not in English, without marks of start and end, "
        f"an index, or by one of {'; '.join(EXCLUDED)}; and books of both held-out and other authors.",
    ]
