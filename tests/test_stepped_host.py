"""What the host does for a forward of one token without a graph: launches, and Python calls beside Llama's.

Kernels are stood for by what starts nothing, and sizes are tiny: only calls are counted. `python -m
tests.test_stepped_host` prints them.
"""

import sys

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_mlra import MLRACache, device_mlra, stepped_mlra
from modeling_mlra.library_mlra import CACHE
from tests.models import tiny_model, watched

triton = pytest.importorskip("triton")

LAYERS = 24
LAUNCHES = {1: 2 + 8 * LAYERS, 8: 2 + 9 * LAYERS}  # embedding, vocabulary, and those of each layer


class Compiled:
    """Stands for a compiled kernel."""

    launch_metadata = None
    started = 0

    def __getitem__(self, grid):
        return self.start

    def start(self, *arguments):
        Compiled.started += 1


@pytest.fixture
def stands_for_a_gpu(monkeypatch):
    """A CPU whose kernels are launched, and never run."""
    from modeling_mlra.step_tokens_mlra import embed_kernel

    facts = device_mlra.DeviceFacts(multiprocessors=132, nvidia=True)
    monkeypatch.setitem(device_mlra.known_devices, torch.device("cpu"), facts)
    monkeypatch.setattr(type(embed_kernel), "__getitem__", lambda *_: lambda *a, **k: Compiled())
    monkeypatch.setattr(stepped_mlra, "STEPPED_DEVICES", ("cpu",))
    monkeypatch.setenv("MLRA_DECODE", "triton")


def python_calls(function) -> int:
    """Of functions written in Python, in a call after two others."""
    function(), function()
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return number


def one_token(model, cache, batch: int = 1):
    """A function that runs a forward of one token, with a mask, behind the same prompt."""
    ids = torch.ones(batch, 8, dtype=torch.long)
    with torch.no_grad():
        model(ids, **{CACHE: cache})

    @torch.no_grad()
    def run():
        mask = torch.ones(batch, cache.get_seq_length() + 1, dtype=torch.long)
        model(ids[:, :1], attention_mask=mask, use_cache=True, **{CACHE: cache})
        cache.crop(-1)

    return run


def counts() -> dict[str, int]:
    model = tiny_model("mlra_4", dtype=torch.bfloat16, num_hidden_layers=LAYERS)
    sizes = {"hidden_size": 32, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=LAYERS, **sizes)).bfloat16().eval()
    found = {"llama": python_calls(one_token(llama, DynamicCache(config=llama.config)))}
    found["step"] = python_calls(one_token(model, MLRACache(model.config)))
    hook = model.model.layers[3].register_forward_hook(lambda *_: None)
    found["step, a hook on a layer"] = python_calls(one_token(model, MLRACache(model.config)))
    hook.remove()
    with watched(model):
        found["modules"] = python_calls(one_token(model, MLRACache(model.config)))
    return found


def test_fewer_python_calls_than_llama(stands_for_a_gpu):
    found = counts()
    assert found["step"] < found["llama"] / 2
    assert found["step, a hook on a layer"] < found["llama"]


@pytest.mark.parametrize("batch", LAUNCHES)
def test_launches_of_a_token(batch, stands_for_a_gpu):
    """By the kept ones alone from the second token on."""
    model = tiny_model("mlra_4", dtype=torch.bfloat16, num_hidden_layers=LAYERS)
    run = one_token(model, MLRACache(model.config), batch)
    run()
    before = Compiled.started
    run()
    assert Compiled.started - before == LAUNCHES[batch]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        stands_for_a_gpu.__wrapped__(patch)
        print(counts())
