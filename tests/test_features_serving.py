"""`scripts.serve`: an exported folder behind the library's server, for completions and for `transformers chat`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer

from modeling_mlra import MLRAForCausalLM
from scripts.export import main as export
from tests.paths import DEMO, REPOSITORY

LENGTH = 12
CHAT = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo checkpoint as a Hub folder, in float32: bfloat16 has ties, which the two forms break differently."""
    folder = tmp_path_factory.mktemp("hub") / "demo"
    assert export([str(DEMO), str(folder), "--dtype", "float32"]) == 0
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["sequential", "continuous batching"])
def server(request, folder, tmp_path_factory):
    """Address of a server in another process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", REPOSITORY / "scripts" / "serve.py", folder, "--trust-remote-code"]
    command += ["--device", "cpu", "--port", port]
    command += ["--continuous-batching", "--cb-num-blocks", 16, "--cb-max-batch-tokens", 64] if request.param else []
    place = tmp_path_factory.mktemp("server")
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            [*map(str, command)], cwd=place, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()[-3000:]
                time.sleep(0.3)
        yield f"http://localhost:{port}/v1"
        assert ("CB: True" in (place / "log").read_text()) == request.param
    finally:
        process.terminate()
        process.wait(timeout=30)


def post(address: str, **body) -> str:
    request = urllib.request.Request(
        address, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def continuation(folder, prompt: str) -> str:
    """Greedy continuation by repeated full forwards."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MLRAForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(LENGTH):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_completions_and_chat(server, folder):
    settings = {"model": str(folder), "max_tokens": LENGTH, "temperature": 0}
    answer = json.loads(post(f"{server}/completions", prompt="Hello world", **settings))
    assert answer["choices"][0]["text"] == continuation(folder, "Hello world")
    messages = [{"role": "user", "content": "Hello world"}]
    lines = post(f"{server}/chat/completions", messages=messages, stream=True, **settings).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert len(chunks) > 3, "the answer is streamed"
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert streamed == continuation(folder, "Hello world\n")


def test_transformers_chat(server, folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "COLUMNS": "200"}  # offline it refuses even this machine
    talk = subprocess.run(
        [sys.executable, "-P", "-c", CHAT, "chat", str(folder), server, f"max_new_tokens={LENGTH}", "do_sample=False"],
        input="Hello world\nN\n!exit\n", capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert f"{LENGTH} tokens in" in talk.stdout, talk.stdout[-2000:] + talk.stderr[-2000:]
