"""The OpenAI server as people run it: clients at once, one that hangs up, bad requests, a kill and a restart."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from modeling_mlra import MLRAForCausalLM
from tests.paths import DEMO
from tests.serving.models import continuations

PROMPTS = [list(range(11 + n, 11 + n + 23 * length, 23)) for n, length in enumerate((2, 5, 9, 17, 33, 40, 64, 100))]
NEW_TOKENS = 24
START_SECONDS = 240
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "16"]
FLAGS += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-batched-tokens", "64", "--max-num-seqs", "16"]


class Server:
    """`vllm serve` on the demo model, in a process group of its own."""

    def __init__(self, port: int, log: Path):
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO), *FLAGS]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        core = sorted(os.sched_getaffinity(0))[0]
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while not self.healthy():
            assert self.process.poll() is None and time.monotonic() < end, self.output()
            time.sleep(0.5)

    def output(self) -> str:
        return self.log.read_text()[-3000:]

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def post(self, **request) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={"model": "demo", **request}, timeout=120)

    def stream(self, prompt: list[int], new_tokens: int, chunks: int | None = None) -> list[int]:
        """Greedy tokens as they come; after `chunks` pieces the client hangs up."""
        request = {"model": "demo", "prompt": prompt, "temperature": 0, "stream": True, "return_token_ids": True}
        request |= {"max_tokens": new_tokens, "min_tokens": new_tokens}
        found, pieces = [], 0
        with httpx.stream("POST", f"{self.url}/v1/completions", json=request, timeout=120) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                found += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"] or []
                pieces += 1
                if pieces == chunks:
                    break
        return found

    def metric(self, name: str, *labels: str) -> float:
        """Sum of a counter's or gauge's samples that have all of the labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        chosen = (line for line in lines if line.startswith(f"{name}{{") and all(label in line for label in labels))
        return sum(float(line.rpartition(" ")[2]) for line in chosen)

    def kill(self) -> None:
        """As if the machine had run out of memory: no handler runs."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = MLRAForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    return continuations(model, PROMPTS, NEW_TOKENS)


@pytest.fixture(scope="module")
def start_server(tmp_path_factory):
    """`start_server(port)`: a running server; all are gone after the module."""
    servers = []

    def start(port: int) -> Server:
        servers.append(Server(port, tmp_path_factory.mktemp("server") / "log"))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(start_server, port) -> Server:
    return start_server(port)


def answers(server: Server) -> list[list[int]]:
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        return list(clients.map(lambda prompt: server.stream(prompt, NEW_TOKENS), PROMPTS))


def test_clients_at_once_and_one_that_hangs_up(server, expected):
    """A ninth client leaves after three tokens: its request ends, and the others do not notice."""
    left = []
    leaver = threading.Thread(target=lambda: left.extend(server.stream(PROMPTS[2], 900, chunks=3)))
    leaver.start()
    assert answers(server) == expected
    leaver.join()
    assert 3 <= len(left) < 900 and left[:NEW_TOKENS] == expected[2][: len(left)]
    end = time.monotonic() + 20
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:request_success_total", 'finished_reason="length"') == len(PROMPTS)


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"prompt": [1] * 1100}, "1024"),
        ({"prompt": [10**6]}, "vocab"),
        ({"prompt": [1], "temperature": -1}, "temperature"),
        ({"prompt": [1], "model": "other"}, "other"),
    ],
)
def test_bad_requests_are_told_why(server, expected, request_, words):
    response = server.post(**{"max_tokens": 4, **request_})
    assert 400 <= response.status_code < 500 and words in response.text, response.text
    assert server.stream(PROMPTS[0], NEW_TOKENS) == expected[0]


def test_killed_and_restarted(server, start_server, port, expected):
    """While a client asks again and again: it is told, and the next server on the port answers as the first did."""
    failures, answered = [], threading.Event()

    def ask():
        try:
            while True:
                server.stream(PROMPTS[0], NEW_TOKENS)
                answered.set()
        except httpx.HTTPError as error:
            failures.append(error)

    client = threading.Thread(target=ask)
    client.start()
    assert answered.wait(60)
    server.kill()
    client.join(60)
    assert failures and not server.healthy()
    assert answers(start_server(port)) == expected
