"""Token files from documents: the authors' format, interrupted runs, named corpora."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from evals import corpora, prepare_tokens
from evals.common import PUBLISHED
from evals.corpora import PAPER_CORPORA, Corpus, encode_up_to, find_corpora, read_token_file, split_pieces
from tests.paths import REPOSITORY
from tests.token_files import expect_error, mkdir, write_tokens


@pytest.fixture
def documents(tmp_path) -> tuple[Path, list[str]]:
    """A local dataset of 40 documents in two files, with an empty one among them."""
    folder = mkdir(tmp_path / "documents")
    texts = [f"Document {number} says {'word ' * (number % 7)}and no more." for number in range(40)]
    rows = [json.dumps({"content": text}) + "\n" for text in [*texts[:11], "", *texts[11:]]]
    (folder / "a.jsonl").write_text("".join(rows[:20]))
    (folder / "b.jsonl").write_text("".join(rows[20:]))
    return folder, texts


def prepare(*arguments: object) -> int:
    return prepare_tokens.main([str(argument) for argument in arguments])


def test_prepared_file_is_in_the_authors_format(tmp_path, documents):
    folder, texts = documents
    assert prepare("--output", tmp_path, "--data", f"dataset:{folder},column=content", "--shuffle-buffer", 0) == 0
    raw = (tmp_path / "documents.bin").read_bytes()
    header, tokens = np.frombuffer(raw[:1024], dtype="<i4"), np.frombuffer(raw[1024:], dtype="<u2")
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "tokenization")
    expected = [token for text in texts for token in [50256, *tokenizer(text)["input_ids"]]]
    assert tokens.tolist() == expected
    assert read_token_file(tmp_path / "documents.bin").tolist() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "documents.bin"]


def test_max_tokens_and_shuffle(tmp_path, documents):
    folder, _ = documents
    data = ("--data", f"dataset:{folder},column=content")
    assert prepare("--output", tmp_path / "plain", *data, "--shuffle-buffer", 0) == 0
    assert prepare("--output", tmp_path / "cut", *data, "--shuffle-buffer", 0, "--max-tokens", 100) == 0
    for name in ("shuffled", "again"):
        assert prepare("--output", tmp_path / name, *data) == 0
    plain, cut, shuffled, again = (
        read_token_file(tmp_path / name / "documents.bin").tolist() for name in ("plain", "cut", "shuffled", "again")
    )
    assert cut == plain[:100]
    assert shuffled == again != plain
    assert sorted(shuffled) == sorted(plain)


def test_interrupted_preparation_goes_on(tmp_path, documents, monkeypatch, capsys):
    folder, _ = documents
    monkeypatch.setattr(prepare_tokens, "SAVE_EVERY", 50)
    monkeypatch.setattr(corpora, "PIECES_AT_ONCE", 3)
    data = ("--data", f"dataset:{folder},column=content")
    assert prepare("--output", tmp_path / "whole", *data) == 0
    whole = (tmp_path / "whole" / "documents.bin").read_bytes()

    read = Corpus.documents
    seen = []

    def interrupted(self, skip=0, *args):
        for number, text in enumerate(read(self, skip, *args), start=skip):
            if number == 25 and not seen.count(25):
                seen.append(25)
                raise KeyboardInterrupt
            seen.append(number)
            yield text

    monkeypatch.setattr(Corpus, "documents", interrupted)
    output = tmp_path / "parts"
    assert prepare("--output", output, *data) == 130
    partial = output / "documents.bin.partial"
    assert not (output / "documents.bin").exists() and 1024 < partial.stat().st_size < len(whole)
    with partial.open("ab") as file:  # as after a power cut: bytes that were written after the last save
        file.write(b"garbage")
    seen[:] = [25]
    capsys.readouterr()
    assert prepare("--output", output, *data) == 0
    assert "going on after" in capsys.readouterr().err
    assert 0 < seen[1] <= 25 and (output / "documents.bin").read_bytes() == whole
    assert [path.name for path in output.iterdir()] == ["documents.bin"]

    assert prepare("--output", output, *data) == 0
    assert "already there" in capsys.readouterr().err


def test_other_settings_do_not_continue_a_partial_file(tmp_path, documents, monkeypatch, capsys):
    folder, _ = documents
    monkeypatch.setattr(prepare_tokens, "SAVE_EVERY", 1)
    data = ("--output", tmp_path, "--data", f"dataset:{folder},column=content")
    monkeypatch.setattr(prepare_tokens, "token_file_header", lambda count: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(*data)
    monkeypatch.undo()
    assert "begun with other settings" in expect_error_last(capsys, *data, "--seed", 7)
    assert prepare(*data, "--seed", 7, "--overwrite") == 0


def expect_error_last(capsys, *arguments: object) -> str:
    """The last line on stderr, behind a progress bar, of an error that exits with 2."""
    capsys.readouterr()
    assert prepare(*arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in line
    return line


def test_preparation_errors(tmp_path, documents, capsys):
    folder, _ = documents
    (tmp_path / "empty.txt").write_text("")
    path = write_tokens(tmp_path / "a.bin", [1, 2])
    text = tmp_path / "empty.txt"
    for arguments, message in (
        (("--data", "nowhere.txt"), "no file nowhere.txt"),
        (("--data", path), "token file already"),
        (("--data", text, "--max-tokens", 2**31), "at most 2147483647"),
        (("--data", text, "--tokenizer", tmp_path), "no tokenizer.json"),
    ):
        assert message in expect_error(capsys, prepare_tokens.main, "--output", tmp_path / "out", *arguments)
    assert "has no text" in expect_error_last(capsys, "--output", tmp_path / "out", "--data", text)
    assert "no text in column" in expect_error_last(capsys, "--output", tmp_path / "o", "--data", f"dataset:{folder}")


def test_named_corpora():
    found = find_corpora(["C4", "fineweb_edu_eval.bin", "dataset:some/thing,name=x", "notes.txt"])
    assert [corpus.name for corpus in found] == ["C4", "FineWeb-Edu", "thing", "notes"]
    assert found[0].source == "dataset:allenai/c4,name=en"
    assert [corpus.name for corpus in find_corpora(PAPER_CORPORA)] == PUBLISHED["perplexity"]["columns"]


def test_long_texts_are_encoded_as_if_in_one_piece(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "tokenization")
    text = (REPOSITORY / "LICENSE").read_text() + "naïve 東京 tabs\tand  two spaces\n\n it's 1 234 !? " * 30
    pieces = list(split_pieces(text, 50))
    assert "".join(pieces) == text and len(pieces) > 100
    assert all(re.match(r" \w", piece) for piece in pieces[1:])
    monkeypatch.setattr(corpora, "split_pieces", lambda text: split_pieces(text, 50))
    monkeypatch.setattr(corpora, "PIECES_AT_ONCE", 7)
    assert encode_up_to(tokenizer, [text], 10**6).tolist() == [50256, *tokenizer(text, verbose=False)["input_ids"]]
    assert list(split_pieces("a" * 100, 10)) == ["a" * 100]
