"""Books and Markdown as training text: headers cut, what may not be used left out, held out by author and book."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from evals.corpora import read_token_file
from scripts import book_text, prepare_text, text_readers

HEADER = (
    "\ufeffThe Project Gutenberg EBook of {title}, by X\n\n"
    "Release Date: 1999 [EBook #{number}]\n\nLanguage: {language}\n\n"
)
START = (
    "*** START OF THIS PROJECT GUTENBERG EBOOK {title} ***\n\n"
    "Produced by Someone and the\nDistributed Proofreaders\n\n"
)
FOOTER = (
    "\n\nEnd of the Project Gutenberg EBook of {title}\n\n*** END OF THIS PROJECT GUTENBERG EBOOK ***\n\nLICENSE\n"
)
WORDS = [
    "so",
    "ra",
    "mi",
    "te",
    "lu",
    "ko",
    "na",
    "po",
    "dar",
    "sun",
    "moon",
    "river",
    "house",
    "walked",
    "gave",
    "asked",
]
AUTHORS = ("Ann", "Bob", "Cy", "Dee", "Eve", "Flo", "Guy", "Hal", "Ida", "Joe")
SHARE = 0.45


def prose(name: str, paragraphs: int = 30) -> str:
    """Wrapped paragraphs, the same for a name."""
    generator = np.random.default_rng(list(name.encode()))
    parts = []
    for _ in range(paragraphs):
        words = generator.choice(WORDS, 40)
        parts.append("\n".join(" ".join(words[start : start + 14]) + " wrapped" for start in (0, 14)) + "\nthe end.")
    return "\n\n".join(parts)


def book(number: int, text: str, title: str = "A BOOK", language: str = "English", notice: str = "") -> str:
    filled = {"title": title, "number": number, "language": language}
    return HEADER.format(**filled) + notice + START.format(**filled) + text + FOOTER.format(**filled)


@pytest.fixture
def collection(tmp_path) -> Path:
    """Ten authors of three books each, and what is to be left out."""
    folder = tmp_path / "books"
    files = {
        f"{author}/Book {index}.txt": book(100 * place + index, prose(f"{author} {index}"))
        for place, author in enumerate(AUTHORS)
        for index in range(3)
    }
    notice = "** This is a COPYRIGHTED Project Gutenberg eBook, Details Below **\n\n"
    tolkien = "Tolkien, J. R. R. (John Ronald Reuel)"
    files |= {
        "Ann/Copyrighted.txt": book(9001, prose("copyrighted"), notice=notice),
        "Ann/Livre.txt": book(9002, prose("livre"), language="French"),
        "Ann/Old.txt": "Welcome to Project Gutenberg\n\n" + prose("old"),
        "Ann/Index of the Project Gutenberg Works of Ann.txt": book(9003, prose("index")),
        f"{tolkien}/Glossary.txt": book(9004, prose("glossary")),
        "Bob/Glossary.txt": book(9004, prose("glossary")),
        "Cy/Book 9.txt": book(9005, prose("Cy 0") + "\n\n" + prose("Cy more", 3)),  # hardly new
        "Dee/Collected.txt": book(9006, prose("Dee 1") + "\n\n" + prose("Dee new", 40)),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_book_without_its_header():
    text = (
        "EMMA\n\nBy “Jane”\n\n[Illustration: a house]\n\nIt was a long paragraph of prose that goes on and on,\n"
        "_wrapped_ at some width, as all of them are there,\nto an end.\n\n"
        "    Tiger, tiger,\n      burning bright\n    tonight\n"
    )
    full = book(1, text)
    assert book_text.book_paragraphs(book_text.body(full.lstrip("\ufeff"))) == [
        "EMMA",
        'By "Jane"',
        "It was a long paragraph of prose that goes on and on, wrapped at some width, as all of them are there, "
        "to an end.",
        "    Tiger, tiger,\n      burning bright\n    tonight",
    ]


def test_which_books_and_where(collection):
    books, refused = book_text.find_books(collection)
    assert len(books) == 30 + 2 and refused == 4 + 1
    authors = book_text.heldout_authors(books, SHARE)
    order = sorted(AUTHORS, key=lambda name: hashlib.sha256(name.encode()).digest())
    small = [name for name in order if name not in ("Cy", "Dee")]  # who have more than a quarter of the share
    assert authors == set(small[:4])  # 9 % each
    parts = list(book_text.divided(books, SHARE))
    assert [part for part, _ in parts] == ["heldout"] * 12 + ["train"] * 20
    for part, found in parts:
        assert {author in authors for author in found.authors} == {part == "heldout"}


def test_a_book_of_held_out_and_other_authors_is_in_neither_part(collection):
    held = sorted(book_text.heldout_authors(book_text.find_books(collection)[0], SHARE))[0]
    other = "Dee"
    for author in (held, other):
        (collection / author / "Both.txt").write_text(book(7777, prose("both")), encoding="utf-8")
    books, _ = book_text.find_books(collection)
    both = next(found for found in books if found.key == "7777")
    assert sorted(both.authors) == sorted([held, other])
    assert both not in [found for _, found in book_text.divided(books, SHARE)]


def test_markdown():
    text = (
        "---\ntitle: x\n---\n# Arrays\n\nSee [`std::vector`](../a_(b).md) and ![icon](i.png)the [one [1]](x).\n\n"
        "<!-- hidden\n\nstill -->\n> [!NOTE]\n> Mind \\<this\\>.\n\n```cpp\nint a[2];\n\nf(a);\n```\n"
    )
    assert text_readers.markdown_paragraphs(text) == [
        "# Arrays",
        "See `std::vector` and the one [1].",
        "> Note:\n> Mind <this>.",
        "```cpp\nint a[2];",
        "f(a);\n```",
    ]


def test_prepared(collection, tmp_path):
    """Held-out authors occur nowhere in the training text; each paragraph occurs once; two vocabularies."""
    docs = tmp_path / "cpp-docs" / "docs"
    docs.mkdir(parents=True)
    (tmp_path / "cpp-docs" / "LICENSE").write_text("Creative Commons\n\nAttribution 4.0 International\n")
    (docs / "page.md").write_text(
        "---\nt: 1\n---\n# Page\n\n" + prose("page").replace("\n", " ").replace("  ", "\n\n")
    )
    output = tmp_path / "out"
    arguments = ["--books", str(collection), "--markdown", str(docs), "--output", str(output), "--heldout", str(SHARE)]
    assert prepare_text.main([*arguments, "--vocab-size", "300", "280"]) == 0
    text = {
        part: [json.loads(line)["text"] for line in (output / f"text/{part}/documents.jsonl").open(encoding="utf-8")]
        for part in ("train", "heldout")
    }
    authors = book_text.heldout_authors(book_text.find_books(collection)[0], SHARE)
    for author in AUTHORS:
        for index in range(3):
            first = " ".join(prose(f"{author} {index}").split("\n\n")[0].split())
            part, other = ("heldout", "train") if author in authors else ("train", "heldout")
            assert "\n".join(text[part]).count(first) == 1 and first not in "\n".join(text[other])
    everything = "\n".join(text["train"] + text["heldout"])
    for absent in (
        "Gutenberg",
        "Produced by",
        "LICENSE",
        *(
            " ".join(prose(name).split("\n\n")[0].split())
            for name in ("copyrighted", "livre", "old", "index", "glossary", "Cy more")
        ),
    ):
        assert absent not in everything
    new, known = (" ".join(prose(name).split("\n\n")[2].split()) for name in ("Dee new", "Dee 1"))
    assert new in everything and everything.count(known) == 1  # collected works, without what is there already
    sources = json.loads((output / "sources.json").read_text())
    names = [source["name"] for source in sources["sources"]]
    assert names == ["cpp-docs", "books"] and sources["sources"][0]["licences"] == ["CC-BY-4.0"]
    page = (output / "SOURCES.md").read_text()
    assert f"Held out, 0.45 of the whole, by author and book: {sorted(authors)[0]} " in page and "5 files" in page
    for name, file in sources["files"].items():
        content = (output / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"] and file["sha256"] in page
        assert len(read_token_file(output / name)) == file["tokens"]
    assert list(sources["files"]) == ["heldout.bin", "train.bin", "280/heldout.bin", "280/train.bin"]
    for folder, size in ((output, 300), (output / "280", 280)):
        assert max(read_token_file(folder / "train.bin")) == size - 1


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_collections_that_cannot_be_divided(share, tmp_path, capsys):
    (tmp_path / "one/author").mkdir(parents=True)
    (tmp_path / "one/author/a.txt").write_text(book(1, prose("a")))
    flags = ["--books", str(tmp_path / "one"), "--output", str(tmp_path / "out"), "--heldout", str(share)]
    assert prepare_text.main(flags) == 2
    assert "no author can be held out" in capsys.readouterr().err
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/a.md").write_text("text")
    assert prepare_text.main(["--markdown", str(tmp_path / "pages"), "--output", str(tmp_path / "out")]) == 2
    assert "no LICENSE of Creative Commons" in capsys.readouterr().err
