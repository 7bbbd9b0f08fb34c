"""Perplexity against the authors' protocol written out again, token files, and every way they can be wrong."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from evals import corpora, perplexity, prepare_tokens
from evals.common import PUBLISHED, Results, markdown_table, paper_row
from evals.corpora import PAPER_CORPORA, Corpus, encode_up_to, find_corpora, read_token_file, split_pieces
from modeling_mlra import MLRAConfig, MLRAForCausalLM
from scripts.cli import UserError
from tests.paths import GOLDEN, REPOSITORY
from tests.tolerances import LOSS_ATOL

PERPLEXITY_RTOL = 1e-5


def write_tokens(path: Path, tokens, magic=20240520, version=1, count=None) -> Path:
    """A token file written by hand, not with the code under test."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())
    return path


def random_tokens(count: int, seed: int = 0, vocab_size: int = 320) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


@torch.no_grad()
def by_protocol(model, path: Path, block: int, max_tokens: float = 1e8) -> tuple[float, int]:
    """The authors' protocol, one block at a time: mean loss and number of predicted tokens."""
    data = np.fromfile(path, dtype=np.uint16).astype(np.int64)
    losses, start = [], 512  # the header is 256 int32
    while start + block + 1 <= len(data) and (len(losses) + 1) * block <= max_tokens:
        x, y = torch.tensor(data[start : start + block])[None], torch.tensor(data[start + 1 : start + 1 + block])
        losses.append(torch.nn.functional.cross_entropy(model(x).logits[0].float(), y).item())
        start += block
    return sum(losses) / len(losses), len(losses) * block


def measured(tmp_path: Path, model: Path, data, *flags: object) -> dict:
    """{corpus: result} of the command line."""
    output = tmp_path / "results.json"
    data = data if isinstance(data, list) else [data]
    arguments = ["--model", model, "--data", *data, "--output", output, "--overwrite", *flags]
    assert perplexity.main([str(argument) for argument in arguments]) == 0
    return json.loads(output.read_text())["results"]


def expect_error(capsys, main, *arguments: object) -> str:
    """The single line of an error that exits with 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# ---- the protocol --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlra_4", "mlra_2_gated", "mla"])
@pytest.mark.parametrize(("count", "block", "blocks"), [(1000, 64, 15), (257, 64, 4), (256, 64, 3), (100, 99, 1)])
def test_equals_the_protocol(tmp_path, converted, name, count, block, blocks):
    folder = converted(name)
    path = write_tokens(tmp_path / "some.bin", random_tokens(count))
    loss, tokens = by_protocol(MLRAForCausalLM.from_pretrained(folder), path, block)
    assert tokens == blocks * block
    result = measured(tmp_path, folder, path, "--block-size", block, "--batch-size", 4)["some"]
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(loss, rel=PERPLEXITY_RTOL)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=PERPLEXITY_RTOL)


@pytest.mark.parametrize("name", ["gla_2", "mlra_4", "mlra_2_gated"])
def test_equals_the_loss_of_the_authors_code(tmp_path, converted, name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids = expected["input_ids"]  # [2, 33]
    files = [write_tokens(tmp_path / f"row{row}.bin", ids[row]) for row in range(2)]
    results = measured(tmp_path, converted(name), files, "--block-size", ids.shape[1] - 1)
    mean = sum(entry["loss"] for entry in results.values()) / 2
    assert mean == pytest.approx(expected["loss"].item(), abs=10 * LOSS_ATOL)


def test_batch_size_and_max_tokens(tmp_path, converted):
    folder = converted("mlra_4")
    path = write_tokens(tmp_path / "some.bin", random_tokens(1000))
    alone = measured(tmp_path, folder, path, "--block-size", 50, "--batch-size", 1)["some"]
    together = measured(tmp_path, folder, path, "--block-size", 50, "--batch-size", 7)["some"]
    assert together["tokens"] == alone["tokens"] == 950
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    limited = measured(tmp_path, folder, path, "--block-size", 50, "--max-tokens", 149)["some"]
    loss, tokens = by_protocol(MLRAForCausalLM.from_pretrained(folder), path, 50, max_tokens=149)
    assert limited["tokens"] == tokens == 100
    assert limited["loss"] == pytest.approx(loss, rel=PERPLEXITY_RTOL)


def test_the_published_blocks_are_those_of_full_batches():
    """10^8 tokens hold as many blocks of 2048 as the authors' full batches of 6."""
    blocks = perplexity.Blocks(np.empty(10**8, dtype=np.uint16), 2048, 10**8)
    assert len(blocks) == 6 * (10**8 // (6 * 2048)) == 48828


def test_published_numerics_autocast_float32_weights(tmp_path, converted):
    folder = tmp_path / "bfloat16"
    MLRAForCausalLM.from_pretrained(converted("mlra_4"), dtype=torch.bfloat16).save_pretrained(folder)
    path = write_tokens(tmp_path / "some.bin", random_tokens(400))
    model = MLRAForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, _ = by_protocol(model, path, 100)
    stored, _ = by_protocol(model.bfloat16(), path, 100)
    assert autocast != pytest.approx(stored, rel=1e-4)
    published = measured(tmp_path, folder, path, "--block-size", 100, "--published")["some"]["loss"]
    assert published == pytest.approx(autocast, rel=PERPLEXITY_RTOL)
    as_stored = measured(tmp_path, folder, path, "--block-size", 100)["some"]["loss"]
    assert as_stored == pytest.approx(stored, rel=PERPLEXITY_RTOL)


def test_text_and_datasets_are_encoded_like_token_files(tmp_path, converted):
    folder = converted("mlra_4")
    texts = ["One document. " * 30, "Another one, <|endoftext|> spelled out. " * 20]
    (tmp_path / "one.txt").write_text(texts[0], encoding="utf-8")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "data.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ["", *texts]))
    dataset = f"dataset:{tmp_path / 'both'},column=body"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    encoded = [[end, *tokenizer(text, split_special_tokens=True)["input_ids"]] for text in texts]
    assert end not in encoded[1][1:]
    files = [
        write_tokens(tmp_path / "one_by_hand.bin", encoded[0]),
        write_tokens(tmp_path / "both_by_hand.bin", encoded[0] + encoded[1]),
    ]
    results = measured(tmp_path, folder, [tmp_path / "one.txt", dataset, *files], "--block-size", 64)
    for name in ("one", "both"):
        assert {**results[name], "source": ""} == {**results[f"{name}_by_hand"], "source": ""}


@pytest.mark.distributed
def test_two_processes_give_the_same(tmp_path, converted):
    folder = converted("mlra_4")
    path = write_tokens(tmp_path / "some.bin", random_tokens(500))
    alone = measured(tmp_path, folder, path, "--block-size", 64)["some"]
    output = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "evals.perplexity", "--model", folder, "--data", path, "--block-size", "64", "--output", output]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" some |") == 1
    two = json.loads(output.read_text())["results"]["some"]
    assert two["tokens"] == alone["tokens"] == 7 * 64
    assert two["loss"] == pytest.approx(alone["loss"], rel=1e-9)


# ---- results files and tables --------------------------------------------------------------------------------------


def test_interrupted_runs_go_on_after_the_last_finished_corpus(tmp_path, converted, monkeypatch, capsys):
    folder = converted("mlra_4")
    files = [write_tokens(tmp_path / f"{name}.bin", random_tokens(300, seed)) for seed, name in enumerate("abc")]
    complete = measured(tmp_path, folder, files, "--block-size", 64)
    output = tmp_path / "resumed.json"
    command = ["--model", str(folder), "--data", *map(str, files), "--block-size", "64", "--output", str(output)]
    evaluated = []
    total_loss = perplexity.total_loss

    def interrupted(*args):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(args[-1])
        return total_loss(*args)

    monkeypatch.setattr(perplexity, "total_loss", interrupted)
    assert perplexity.main(command) == 130
    assert list(json.loads(output.read_text())["results"]) == ["a", "b"]
    evaluated.clear()
    capsys.readouterr()
    assert perplexity.main([*command, "--batch-size", "1"]) == 0
    assert evaluated == ["c"]
    assert "a: already in" in capsys.readouterr().err
    resumed = json.loads(output.read_text())["results"]
    assert resumed == {**complete, "c": resumed["c"]} and resumed["c"]["loss"] == pytest.approx(complete["c"]["loss"])


def test_results_of_other_settings_are_never_mixed(tmp_path, converted, capsys):
    path = write_tokens(tmp_path / "a.bin", random_tokens(300))
    output = tmp_path / "r.json"
    common = ("--data", path, "--output", output)
    assert perplexity.main([str(x) for x in ("--model", converted("mlra_4"), *common, "--block-size", 64)]) == 0
    line = expect_error(capsys, perplexity.main, "--model", converted("mlra_4"), *common, "--block-size", 32)
    assert "block_size = 64" in line and "--overwrite" in line
    assert "model" in expect_error(capsys, perplexity.main, "--model", converted("mla"), *common, "--block-size", 64)
    line = expect_error(
        capsys, perplexity.main, "--model", converted("mlra_4"), *common, "--block-size", 64, "--published"
    )
    assert "numerics" in line
    write_tokens(path, random_tokens(300, seed=1))
    line = expect_error(capsys, perplexity.main, "--model", converted("mlra_4"), *common, "--block-size", 64)
    assert "has a from a.bin" in line
    output.write_text("{}")
    line = expect_error(capsys, perplexity.main, "--model", converted("mlra_4"), *common, "--block-size", 64)
    assert "no results file" in line


def test_table_shows_the_papers_row_and_averages(tmp_path, converted, capsys):
    folder = converted("mlra_4")
    names = ["C4_eval", "pile", "Wikipedia", "refined_web", "cosmopedia", "fineweb_eval", "fineweb-edu_val"]
    files = [write_tokens(tmp_path / f"{name}.bin", random_tokens(100, seed)) for seed, name in enumerate(names)]
    results = measured(tmp_path, folder, files, "--block-size", 64, "--paper-row", "MLRA-4")
    printed = capsys.readouterr().out
    assert set(results) == set(PAPER_CORPORA)
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in printed.strip().splitlines()]
    assert lines[0] == ["perplexity", *PUBLISHED["perplexity"]["columns"], "average"]
    values = [results[name]["perplexity"] for name in PUBLISHED["perplexity"]["columns"]]
    assert lines[2][1:] == [f"{value:.3f}" for value in [*values, sum(values) / 7]]
    assert lines[3] == ["paper, MLRA-4", "14.407", "16.286", "13.124", "18.398", "8.937", "15.361", "9.193", "13.672"]
    assert printed in (tmp_path / "results.md").read_text()


def test_paper_row_of_released_architectures_only():
    rows = PUBLISHED["perplexity"]["rows"]
    for name, file in PUBLISHED["architectures"].items():
        config = MLRAConfig.from_pretrained(REPOSITORY / "configuration" / f"{file}.json")
        assert paper_row(config, "auto", rows) == name
    config.latent_scaling = False
    assert paper_row(config, "auto", rows) is None
    assert paper_row(config, "none", rows) is None
    assert paper_row(config, "GQA", rows) == "GQA"
    with pytest.raises(UserError, match="MLRA-9"):
        paper_row(config, "MLRA-9", rows)


@pytest.mark.parametrize("table", ["perplexity", "zero_shot"])
def test_published_averages_are_those_of_the_rows(table):
    for name, row in PUBLISHED[table]["rows"].items():
        assert len(row) == len(PUBLISHED[table]["columns"])
        digits = 3 if table == "perplexity" else 2
        assert sum(row) / len(row) == pytest.approx(PUBLISHED[table]["average"][name], abs=0.6 * 10**-digits)


def test_markdown_table():
    assert markdown_table(["a", "bc"], [["xyz", 1]]) == "| a   | bc |\n|-----|---:|\n| xyz |  1 |\n"


def test_results_are_written_whole(tmp_path, monkeypatch):
    results = Results(tmp_path / "r.json", {"x": 1})
    results.add("first", {"loss": 1.0})
    before = (tmp_path / "r.json").read_text()

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError):
        results.add("second", {"loss": 2.0})
    assert (tmp_path / "r.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


# ---- what can be wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (bytes(100), "100 bytes"),
        (bytes(1024), "begins with 0"),
        ("version", "version 7"),
        ("count", "promises 500"),
        ("odd", "601 bytes"),
        ("no tokens", "holds no tokens"),
        ("negative", "promises -1"),
        ("short", "has 60 tokens"),
        ("vocabulary", "token 320 at position 7"),
    ],
)
def test_malformed_token_files(tmp_path, converted, capsys, content, message):
    path = tmp_path / "bad.bin"
    tokens = random_tokens(300)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "odd":
        path.write_bytes(write_tokens(path, tokens).read_bytes() + b"x")
    elif content == "vocabulary":
        tokens[7] = 320
        write_tokens(path, tokens)
    else:
        variants = {
            "version": {"version": 7},
            "count": {"count": 500},
            "no tokens": {"tokens": []},
            "negative": {"count": -1},
            "short": {"tokens": tokens[:60]},
        }
        write_tokens(path, **({"tokens": tokens} | variants[content]))
    line = expect_error(capsys, perplexity.main, "--model", converted("mlra_4"), "--data", path, "--block-size", 64)
    assert message in line and "bad.bin" in line


def test_vocabulary_is_checked_up_to_the_last_target(tmp_path, converted, capsys):
    tokens = random_tokens(200)
    tokens[129:] = 999  # 2 blocks of 64 and the target behind them end at 128
    path = write_tokens(tmp_path / "a.bin", tokens)
    limits = ("--block-size", 64, "--max-tokens", 128)
    assert measured(tmp_path, converted("mlra_4"), path, *limits)["a"]["tokens"] == 128
    tokens[128] = 999
    write_tokens(path, tokens)
    line = expect_error(capsys, perplexity.main, "--model", converted("mlra_4"), "--data", path, *limits)
    assert "token 999 at position 128" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--model": "nowhere"}, "no folder nowhere"),
        ({"--data": "nowhere.bin"}, "no token file nowhere.bin"),
        ({"--data": "nowhere.txt"}, "no file nowhere.txt"),
        ({"--data": "dataset:nowhere/atall"}, "dataset:nowhere/atall cannot be read"),
        ({"--data": "dataset:x,colum=y"}, "colum=y: write dataset:PATH"),
        ({"--block-size": "129"}, "context of 128"),
        ({"--max-tokens": "63"}, "--max-tokens 63"),
        ({"--output": "results.txt"}, "must end in .json"),
        ({"--paper-row": "MLRA-9"}, "MLRA-9"),
    ],
)
def test_wrong_arguments(tmp_path, converted, capsys, flags, message):
    path = write_tokens(tmp_path / "a.bin", random_tokens(300))
    arguments = {"--model": converted("mlra_4"), "--data": path, "--block-size": "64"} | flags
    line = expect_error(capsys, perplexity.main, *[part for pair in arguments.items() for part in pair])
    assert message in line


def test_other_wrong_inputs(tmp_path, converted, capsys):
    folder = converted("mlra_4")
    twice = [
        write_tokens(tmp_path / name / "a.bin", random_tokens(300)) for name in ("x", "y") if mkdir(tmp_path / name)
    ]
    assert "both called a" in expect_error(capsys, perplexity.main, "--model", folder, "--data", *twice)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") * 100)
    line = expect_error(capsys, perplexity.main, "--model", folder, "--data", tmp_path / "latin.txt")
    assert "not UTF-8" in line
    empty = mkdir(tmp_path / "empty")
    assert "no config.json" in expect_error(capsys, perplexity.main, "--model", empty, "--data", twice[0])
    (empty / "config.json").write_text("{}")
    assert "config.json" in expect_error(capsys, perplexity.main, "--model", empty, "--data", twice[0])
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "data.jsonl").write_text('{"body": "text"}\n')
    line = expect_error(capsys, perplexity.main, "--model", folder, "--data", f"dataset:{tmp_path / 'rows'}")
    assert "no text in column 'text'" in line and "body" in line
    for flags in (["--batch-size", "0"], ["--nonsense"], []):
        with pytest.raises(SystemExit) as exit_info:
            perplexity.main(["--model", str(folder), *flags])
        assert exit_info.value.code == 2


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def test_infinite_loss_is_an_error(tmp_path, converted, capsys):
    folder = tmp_path / "broken"
    model = MLRAForCausalLM.from_pretrained(converted("mlra_4"))
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(folder)
    path = write_tokens(tmp_path / "a.bin", random_tokens(300))
    capsys.readouterr()
    assert perplexity.main(["--model", str(folder), "--data", str(path), "--block-size", "64"]) == 2
    assert "error: a: the mean loss is nan" in capsys.readouterr().err


# ---- writing token files -------------------------------------------------------------------------------------------


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
