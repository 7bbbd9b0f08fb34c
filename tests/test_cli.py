"""The command-line programs as a user meets them: generate and export."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import scripts.generate
from modeling_mlra import MLRAConfig, MLRAForCausalLM
from scripts import cli
from scripts.export import export_model
from scripts.export import main as export
from scripts.generate import main as generate
from tests.paths import GOLDEN, REPOSITORY


@pytest.fixture(scope="module")
def folder(converted):
    return converted("mlra_4")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return MLRAForCausalLM.from_pretrained(folder)


def greedy(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Continuation of `prompt` by repeated full forwards, without cache or generate()."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(max_new_tokens):
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def run_program(capsys, program, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    code = program([str(arg) for arg in args])
    return code, *capsys.readouterr()


def test_prompt_is_continued(capsys, folder, model, tokenizer):
    code, out, _ = run_program(capsys, generate, "--model", folder, "--prompt", "Hello, wörld", "--max-new-tokens", 12)
    assert code == 0
    assert out == "Hello, wörld" + greedy(model, tokenizer, "Hello, wörld", 12) + "\n"


def test_batch_file(capsys, tmp_path, folder, model, tokenizer):
    prompts = ["Hello", "A longer prompt than the first", "x", "– und ein vierter"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:2]) + "\n\n" + "\n".join(prompts[2:]), encoding="utf-8")
    code, out, _ = run_program(
        capsys,
        generate,
        "--model",
        folder,
        "--batch-file",
        tmp_path / "prompts.txt",
        "--batch-size",
        3,
        "--max-new-tokens",
        8,
    )
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["completion"] for row in rows] == [greedy(model, tokenizer, prompt, 8) for prompt in prompts]


def test_sampling_is_repeatable(capsys, folder):
    flags = ["--model", folder, "--prompt", "Hello", "--max-new-tokens", 20, "--temperature", 2.0, "--top-p", 0.95]
    one, same, other = (run_program(capsys, generate, *flags, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == same != other
    (top_1,) = {run_program(capsys, generate, *flags, "--top-k", 1, "--seed", seed)[1] for seed in (1, 2)}
    assert top_1 == run_program(capsys, generate, *flags[:6])[1]  # greedy


def test_prompt_beyond_the_context_warns(capsys, folder):
    code, _, err = run_program(capsys, generate, "--model", folder, "--prompt", "z" * 126, "--max-new-tokens", 2)
    assert code == 0 and "warning" not in err
    code, _, err = run_program(capsys, generate, "--model", folder, "--prompt", "z" * 127, "--max-new-tokens", 2)
    assert code == 0
    assert "warning: 127 prompt tokens and 2 new ones exceed the context of 128" in err
    assert "rotary positions extrapolate badly" in err


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_dtype_and_device(capsys, monkeypatch, folder, name):
    seen = []
    original = scripts.generate.load_model
    monkeypatch.setattr(scripts.generate, "load_model", lambda *args: seen.append(original(*args)) or seen[-1])
    flags = ["--device", "cpu"] + (["--dtype", name] if name != "float32" else [])
    assert run_program(capsys, generate, "--model", folder, "--prompt", "a", "--max-new-tokens", 1, *flags)[0] == 0
    assert seen[0].dtype == getattr(torch, name) and seen[0].device.type == "cpu"


def test_generate_problems_get_one_line(capsys, tmp_path, folder):
    def expect(message, *args):
        code, out, err = run_program(capsys, generate, *args)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err

    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    expect("--prompt is empty", "--model", folder, "--prompt", "")
    expect(f"no folder {tmp_path / 'none'}", "--model", tmp_path / "none", "--prompt", "a")
    expect("not mlra: convert a released checkpoint", "--model", released_with_tokenizer(tmp_path), "--prompt", "a")
    expect("has no tokenizer.json", "--model", GOLDEN / "mla", "--prompt", "a")
    expect("has no config.json", "--model", tmp_path, "--prompt", "a")
    expect("empty.txt holds no prompt", "--model", folder, "--batch-file", tmp_path / "empty.txt")
    expect("No such file or directory", "--model", folder, "--batch-file", tmp_path / "none.txt")
    expect("latin.txt is not UTF-8", "--model", folder, "--batch-file", tmp_path / "latin.txt")
    expect("--device quantum cannot be used here", "--model", folder, "--prompt", "a", "--device", "quantum")
    if not torch.cuda.is_available():
        expect("--device cuda cannot be used here", "--model", folder, "--prompt", "a", "--device", "cuda")

    def break_folder(name, edit):
        shutil.copytree(folder, tmp_path / name)
        edit(tmp_path / name)
        return tmp_path / name

    no_weights = break_folder("no_weights", lambda f: (f / "model.safetensors").unlink())
    expect("model.safetensors", "--model", no_weights, "--prompt", "a")
    truncated = break_folder(
        "truncated",
        lambda f: (f / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000]),
    )
    expect(f"{truncated} cannot be loaded", "--model", truncated, "--prompt", "a")


def released_with_tokenizer(tmp_path):
    """A released folder into which someone copied a tokenizer."""
    folder = tmp_path / "released"
    shutil.copytree(GOLDEN / "mla", folder)
    shutil.copy(REPOSITORY / "tokenization" / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --prompt --batch-file is required"),
        (["--prompt", "a", "--batch-file", "b"], "not allowed with"),
        (["--prompt", "a", "--max-new-tokens", "0"], "0 must be at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "-1 must be 0 or positive"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], "1.5 must lie in (0, 1]"),
        (["--prompt", "a", "--top-k", "5"], "--top-k and --top-p need --temperature above 0"),
        (["--prompt", "a", "--dtype", "int4"], "invalid choice"),
    ],
)
def test_wrong_flags(capsys, folder, flags, message):
    with pytest.raises(SystemExit) as stop:
        generate(["--model", str(folder), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_output_is_streamed_and_ctrl_c_is_clean(folder):
    """The first words are on the pipe long before the end; an interrupt then ends the program without traceback."""
    command = [sys.executable, "-m", "scripts.generate", "--model", str(folder), "--prompt", "Hello there friend "]
    command += ["--max-new-tokens", "20000", "--temperature", "3", "--seed", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        start = process.stdout.read(24)
        assert start.startswith(b"Hello there friend ")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert err.decode().rstrip().endswith("interrupted") and "Traceback" not in err.decode()


# Export


def test_export_of_a_saved_model(capsys, tmp_path, model, folder):
    """A folder as a trainer leaves it becomes a complete one with the same weights."""
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    for file in (tmp_path / "saved").glob("*.py"):
        file.unlink()
    code, _, _ = run_program(capsys, export, tmp_path / "saved", tmp_path / "out", "--license", "apache-2.0")
    assert code == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in folder.iterdir()}
    first, second = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "Exported from the checkpoint `saved`." in card


def test_export_of_a_model_in_memory(tmp_path):
    config = MLRAConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        q_lora_rank=8,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        tie_word_embeddings=False,
    )
    model = MLRAForCausalLM(config)
    export_model(tmp_path / "out", model, torch.bfloat16, provenance="Made for a test.")
    again = MLRAForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.eos_token_id == 299 and not again.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16()), name
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_export_problems_get_one_line(capsys, tmp_path, folder):
    def expect(message, *args):
        before = sorted(tmp_path.rglob("*"))
        code, _, err = run_program(capsys, export, *args)
        assert code == 2 and message in err and err.splitlines()[-1].startswith("error: "), err
        assert sorted(tmp_path.rglob("*")) == before

    out = tmp_path / "out"
    expect(f"no folder {tmp_path / 'none'}", tmp_path / "none", out)
    expect("convert a released checkpoint with scripts.convert_checkpoint", GOLDEN / "mla", out)
    expect("already exists", folder, tmp_path)
    bare, cut = tmp_path / "bare", tmp_path / "cut"
    for copy in (bare, cut):
        copy.mkdir()
        shutil.copy(folder / "config.json", copy)
    expect("holds no safetensors file", bare, out)
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    expect("is truncated or no safetensors file", cut, out)


def test_closed_pipe_is_no_error(monkeypatch, capfd, folder):
    """`generate ... | head` must not complain about the reader that left."""

    class Closed(io.TextIOBase):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.dup(1)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert generate(["--model", str(folder), "--prompt", "a", "--max-new-tokens", "2"]) == 141
    assert "error" not in capfd.readouterr().err


def test_forked_workers_die_of_sigterm_at_once():
    def body(_):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        child = os.fork()
        if child == 0:
            os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
        assert os.waitpid(child, 0)[1] == 0

    assert cli.run(body, argparse.Namespace()) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_shows_in_the_exit_code(capsys):
    """It came while an object was being finalised, where exceptions are printed and ignored."""

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the handler runs between two instructions
                pass

    assert cli.run(lambda _: Finalised() and None, argparse.Namespace()) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
