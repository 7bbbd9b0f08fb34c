"""Perplexity against the authors' protocol written out again, token files, and every way they can be wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from evals import perplexity
from evals.common import PUBLISHED, Results, markdown_table, paper_row
from evals.corpora import PAPER_CORPORA
from modeling_mlra import MLRAConfig, MLRAForCausalLM
from scripts.cli import UserError
from tests.paths import GOLDEN, REPOSITORY
from tests.token_files import expect_error, mkdir, random_tokens, write_tokens
from tests.tolerances import FP8_LOSS_RTOL, LOSS_ATOL

PERPLEXITY_RTOL = 1e-5


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


def test_predicting_from_cached_rows(tmp_path, converted, monkeypatch):
    """Plain rows give the loss of a full forward, in chunks shorter than a block too; rows of eight bits almost."""
    monkeypatch.setattr(perplexity, "CHUNK", 20)
    path, losses = write_tokens(tmp_path / "some.bin", random_tokens(700)), []
    for flags in ((), ("--cache-rows", "plain"), ("--cache-rows", "fp8")):
        losses.append(measured(tmp_path, converted("mlra_4"), path, "--block-size", 50, *flags)["some"]["loss"])
    full, plain, fp8 = losses
    assert plain == pytest.approx(full, rel=PERPLEXITY_RTOL)
    assert PERPLEXITY_RTOL * full < abs(fp8 - full) < FP8_LOSS_RTOL * full


# ---- results files and tables --------------------------------------------------------------------------------------


def test_interrupted_runs_go_on_after_the_last_finished_corpus(tmp_path, converted, monkeypatch, capsys):
    folder = converted("mlra_4")
    files = [write_tokens(tmp_path / f"{name}.bin", random_tokens(300, seed)) for seed, name in enumerate("abc")]
    complete = measured(tmp_path, folder, files, "--block-size", 64)
    output = tmp_path / "resumed.json"
    command = ["--model", str(folder), "--data", *map(str, files), "--block-size", "64", "--output", str(output)]
    evaluated = []
    total_loss = perplexity.total_loss

    def interrupted(*args, **options):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(args[-1])
        return total_loss(*args, **options)

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


def test_infinite_loss_is_an_error(tmp_path, converted, capsys):
    folder = tmp_path / "broken"
    model = MLRAForCausalLM.from_pretrained(converted("mlra_4"))
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(folder)
    path = write_tokens(tmp_path / "a.bin", random_tokens(300))
    capsys.readouterr()
    assert perplexity.main(["--model", str(folder), "--data", str(path), "--block-size", "64"]) == 2
    assert "error: a: the mean loss is nan" in capsys.readouterr().err
