"""Text for training: from packages to token files, and what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.corpora import read_token_file
from modeling_mlra import MLRAForCausalLM
from scripts import prepare_text, text_readers, train
from scripts import recipe as recipes
from scripts.cli import UserError
from scripts.export import main as export
from tests.training import settings, write


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """What dpkg-deb -x makes of a small documentation package."""
    root = tmp_path_factory.mktemp("package")
    doc = root / "usr/share/doc/some-doc"
    (doc / "html").mkdir(parents=True)
    (doc / "copyright").write_text("Files: *\nLicense: GPL-2+\n text\n\nFiles: x\nLicense: GFDL-1.3\n")
    words = [f"{a}{b}" for a in ("so", "ra", "mi", "te", "lu", "ko") for b in ("na", "ri", "po", "ves", "dar")]
    generator = np.random.default_rng(1)
    for index in range(60):
        sentences = [" ".join(generator.choice(words, 9)) + "." for _ in range(8)]
        body = "".join(f"<p>{sentence} <b>&amp;</b> {sentence[:20]}</p>" for sentence in sentences)
        page = "<html><head><title>T</title><style>p {}</style></head><body><p>Next</p><div class='related'>menu</div>"
        page += "<noscript>Turn scripts on</noscript>"
        (doc / "html" / f"page{index}.html").write_text(
            f"{page}{body}<p>{'All rights are as stated. ' * 4}</p></body>"
        )
    with gzip.open(doc / "guide.txt.gz", "wt") as file:
        file.write("\n\n".join(" ".join(generator.choice(words, 60)) for _ in range(6)))
    for folder in ("class-use", "src"):
        (doc / "html" / folder).mkdir()
        (doc / "html" / folder / "page.html").write_text("<p>" + "A list of names and code. " * 30 + "</p>")
    (doc / "html" / "de").mkdir()
    (doc / "html" / "de" / "page.html").write_text("<p>" + "Zeichenkette auf Deutsch " * 30 + "</p>")
    dictd = root / "usr/share/dictd"
    dictd.mkdir()
    entries = [f"word{index}\n  A made-up word that stands for the number {index}.\n" for index in range(40)]
    digits = "".join(text_readers.DICT_DIGITS)
    start, lines = 0, []
    for index, entry in enumerate(entries):
        lines.append(f"word{index}\t{digits[start // 64]}{digits[start % 64]}\t{digits[len(entry) // 64]}"
                     f"{digits[len(entry) % 64]}")  # fmt: skip
        start += len(entry)
    with gzip.open(dictd / "made.dict.dz", "wt") as file:
        file.write("".join(entries))
    (dictd / "made.index").write_text("\n".join([*lines, lines[3].replace("word3", "synonym")]) + "\n")
    return root


def prepared(unpacked: Path, output: Path, *flags: str) -> dict:
    arguments = ["--output", str(output), "--folder", str(unpacked), "--heldout", "0.2", "--vocab-size", "300", *flags]
    assert prepare_text.main(arguments) == 0
    return {
        part: [json.loads(line)["text"] for line in (output / "text" / part / "documents.jsonl").open()]
        for part in ("train", "heldout")
    }


def test_prepared_text(unpacked, tmp_path):
    documents = prepared(unpacked, tmp_path / "a")
    everything = documents["train"] + documents["heldout"]
    assert len(everything) == len(set(everything)) == 60 + 1 + 40
    assert 5 <= len(documents["heldout"]) <= 40
    text = "\n".join(everything)
    assert text.count("All rights are as stated.") == 4  # the first page's
    assert "Deutsch" not in text and "names and code" not in text and "scripts on" not in text
    assert "menu" not in text and "Next" not in text and "<" not in text and " & " in text
    assert "word7\n  A made-up word that stands for the number 7." in everything
    sources = json.loads((tmp_path / "a" / "sources.json").read_text())
    assert sources["sources"][0]["licences"] == ["GFDL-1.3", "GPL-2+"]
    assert "characters: GFDL-1.3, GPL-2+\n" in (tmp_path / "a" / "SOURCES.md").read_text()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "tokenizer")
    assert len(tokenizer) == 300 and tokenizer.eos_token_id == 299
    for part in documents:
        tokens = np.array(read_token_file(tmp_path / "a" / f"{part}.bin"))
        assert tokens[0] == 299 and (tokens == 299).sum() == len(documents[part])
        decoded = tokenizer.decode(tokens).split("<|endoftext|>")[1:]
        assert sorted(decoded) == sorted(documents[part])
    sample, heldout = (read_token_file(tmp_path / "a" / f"{name}.bin") for name in ("heldout_sample", "heldout"))
    assert np.array_equal(sample, heldout[: prepare_text.SAMPLE_TOKENS])

    again = prepared(unpacked, tmp_path / "b")
    assert again == documents
    for name in ("train.bin", "heldout.bin", "tokenizer/tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_export_carries_the_tokenizer_it_was_trained_with(unpacked, tmp_path):
    prepared(unpacked, tmp_path / "text")
    content = settings(tmp_path / "text", tmp_path / "run", training__max_steps=4)
    content["data"]["tokenizer"] = str(tmp_path / "text" / "tokenizer")
    content["export"] = {"folder": str(tmp_path / "hub"), "remote_code": False, "limits": "It cannot sing."}
    wrong = json.loads(json.dumps(content))
    wrong["model"]["vocab_size"] = 400
    with pytest.raises(UserError, match="set vocab_size to the tokenizer's 300"):
        train.train_recipe(recipes.make_recipe(wrong, "test"))
    train.train_recipe(recipes.make_recipe(content, "test"))
    stored = (tmp_path / "hub" / "tokenizer.json").read_bytes()
    assert stored == (tmp_path / "text" / "tokenizer" / "tokenizer.json").read_bytes()
    assert MLRAForCausalLM.from_pretrained(tmp_path / "hub").config.eos_token_id == 299
    assert not list((tmp_path / "hub").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    card = (tmp_path / "hub" / "README.md").read_text()
    assert (
        "- It cannot sing.\n" in card and "import modeling_mlra  #" in card and "=True" not in card.split("padding")[0]
    )
    assert export(["--license", "mit", str(tmp_path / "hub"), str(tmp_path / "complete")]) == 0
    assert (tmp_path / "complete" / "tokenizer.json").read_bytes() == stored
    complete = AutoModelForCausalLM.from_pretrained(tmp_path / "complete", trust_remote_code=True)
    assert complete.num_parameters() == MLRAForCausalLM.from_pretrained(tmp_path / "hub").num_parameters()


def test_a_dataset_is_encoded_once_and_trained_on(unpacked, tmp_path):
    documents = prepared(unpacked, tmp_path / "text")
    content = settings(tmp_path / "text", tmp_path / "run", training__max_steps=2, training__warmup_steps=0)
    content["data"] |= {
        "train": [f"dataset:{tmp_path / 'text' / 'text' / 'train'}"],
        "tokenizer": str(tmp_path / "text" / "tokenizer"),
        "heldout": [],
    }
    result = train.train_recipe(recipes.make_recipe(content, "test"))
    assert result["finished"] and "heldout" not in result
    tokens = read_token_file(tmp_path / "run" / "tokens" / "train.bin")
    assert (tokens == 299).sum() == len(documents["train"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folder", "nothing"], "no folder nothing"),
        (["--packages", "bad name"], "no name of a Debian package"),
        (["--packages", "some-doc", "--heldout", "1.5"], "between 0 and 1"),
        (["--packages", "some-doc", "--vocab-size", "99"], "must be above"),
    ],
)
def test_text_that_is_refused(flags, message, tmp_path, capsys):
    assert prepare_text.main(["--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "copyright_text", "message"),
    [("non-free/doc", "License: X\n", "not free"), ("doc", None, "leave it out")],
)
def test_packages_that_are_not_free_are_refused(section, copyright_text, message, tmp_path, capsys):
    folder = tmp_path / "thing"
    doc = folder / "root/usr/share/doc/thing"
    doc.mkdir(parents=True)
    (doc / "readme.txt").write_text("some words that go on " * 50)
    if copyright_text:
        (doc / "copyright").write_text(copyright_text)
    write(folder / "control.json", {"package": "thing", "section": section})
    assert prepare_text.main(["--output", str(tmp_path / "out"), "--folder", str(folder)]) == 2
    assert message in capsys.readouterr().err


# Fine-tuning
