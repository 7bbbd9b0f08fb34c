"""Steps that only decode run by the package's fused kernels, interpreted, on vLLM's parameters and pages."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm import _custom_ops
from vllm.config import CompilationConfig, CUDAGraphMode

from mlra_vllm import fused
from modeling_mlra.decode_plans_mlra import deal_work, reduction_plan
from modeling_mlra.step_maps_mlra import weight_of
from tests.models import random_ids
from tests.paths import REPOSITORY
from tests.serving.models import ask, continuations, margins, saved_model, tokens

PROMPTS = [random_ids(length, seed=length).tolist() for length in (3, 70, 100)]
MARGIN = 0.05
"""How far below the largest float32 logit a token chosen in float16 may lie, in standard deviations of the logits."""


@pytest.mark.parametrize(("variant", "gated", "ranks"), [("gla_2", True, 1), ("mlra_4", False, 2)])
def test_decoding_by_fused_kernels(variant, gated, ranks, tmp_path):
    """Prompts in chunks of 64 tokens: steps of prompts and decoding take the modules, those of decoding alone do not
    unless they are of two requests. The second round starts from cached blocks, and ranks add up what they have."""
    model = saved_model(tmp_path, variant, num_attention_heads=4, attn_output_gate=gated)
    command = [sys.executable, "-m", "tests.serving.fused_engine", str(tmp_path), str(ranks)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ, input=json.dumps(PROMPTS), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "MLRA decodes up to 3 requests at a time by fused kernels" in result.stdout + result.stderr
    given = json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"rounds"')))
    assert [{number for number, _ in ran} for ran in given["ran"]] == [{1, 3}] * ranks
    for chosen in given["rounds"]:
        for prompt, new in zip(PROMPTS, chosen, strict=True):
            assert margins(model, prompt, new).max() < MARGIN


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [("FULL_AND_PIECEWISE", [1, 2, 32]), ("FULL_DECODE_ONLY", [1, 2, 32]), ("PIECEWISE", []), ("NONE", [])],
)
def test_numbers_of_requests_that_full_graphs_hold(mode, sizes):
    compilation = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 2, 32, 40])
    assert fused.graph_sizes(SimpleNamespace(compilation_config=compilation)) == sizes


@pytest.mark.parametrize(("most", "lanes"), [(1, 4), (100, 4), (256, 2), (1024, 1)])
def test_numbers_that_kernels_are_compiled_for(most, lanes):
    """Every other number of requests runs the same ones: division of work and reduction on a GPU of 132 processors."""

    def kernels(number):
        programs, deal = deal_work(number, 2**17, lanes, 132, 64, 3, False)
        return deal, reduction_plan(number, 4, 1, 24, 128, programs)[1:]

    numbers = fused.numbers_with_kernels_of_their_own(most)
    assert {kernels(number) for number in numbers} == {kernels(number) for number in range(1, most + 1)}
    assert len(numbers) < 25 and numbers[-1] == most


def test_what_stands_in_the_way_is_said(tmp_path, start, monkeypatch):
    """The CPU build packs weights: the modules decode. Every other reason on the way to that one."""
    monkeypatch.setattr(fused, "graph_sizes", lambda vllm_config: [1, 2, 3])
    said = []
    monkeypatch.setattr(fused.logger, "info_once", said.append)
    expected = continuations(saved_model(tmp_path), PROMPTS, 6)
    engine = start(tmp_path)
    assert tokens(ask(engine, PROMPTS, max_tokens=6)) == expected
    assert len(said) == 1 and "module by module" in said[0] and "vLLM made" in said[0] and "packing" in said[0]

    def reasons(model):
        decode, parallel = model.fused, model.fused.vllm_config.parallel_config
        attention = model.model.layers[0].self_attn.attn
        yield decode.ran == {} and decode.sizes == []
        with monkeypatch.context() as patch:
            patch.setattr(attention, "row_format", SimpleNamespace(dtype=torch.float16))
            yield "cached rows are of torch.float16" in decode._obstacle()
            patch.setattr(parallel, "enable_dbo", True)
            yield "micro-batches" in decode._obstacle()
            patch.setattr(parallel, "pipeline_parallel_size", 2)
            yield "pipeline_parallel_size=2" in decode._obstacle()

    assert engine.apply_model(lambda model: list(reasons(model))) == [[True] * 4]


def test_steps_that_run_fused(tmp_path, start, monkeypatch):
    """Those of one new token each, of as many requests as some full graph; not while graphs of pieces run."""
    saved_model(tmp_path)
    engine = start(tmp_path)
    numbers = torch.arange(2)
    decodes = SimpleNamespace(packs=[], seq_lens=numbers, slot_mapping=numbers, block_table=numbers)
    prompts = SimpleNamespace(packs=[1], seq_lens=numbers, slot_mapping=numbers)
    padded = SimpleNamespace(packs=[], seq_lens=numbers, slot_mapping=numbers[:1])
    of_three = SimpleNamespace(packs=[], seq_lens=torch.arange(3), slot_mapping=torch.arange(3))
    none, full, pieces = CUDAGraphMode.NONE, CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE

    def outcomes(model):
        decode = model.fused
        decode.sizes, decode.steps = [1, 2], {2: lambda hidden, pools, tokens: hidden}
        name = model.model.layers[0].self_attn.attn.layer_name
        cases = (none, decodes), (full, decodes), (pieces, decodes), (full, prompts), (full, padded), (full, of_three)
        contexts = [(mode, {name: metadata}) for mode, metadata in cases] + [(none, None), (full, [{name: decodes}])]
        for mode, metadata in contexts:
            context = SimpleNamespace(attn_metadata=metadata, cudagraph_runtime_mode=mode)
            monkeypatch.setattr(fused, "get_forward_context", lambda context=context: context)
            is_third = isinstance(metadata, dict) and metadata[name] is of_three
            positions = torch.arange(3 if is_third else 2)
            yield decode(positions, positions, None) is not None
        assert decode.ran == {2: 2}

    assert engine.apply_model(lambda model: list(outcomes(model)))[0] == [True] * 2 + [False] * 6


def test_weights_quantized_online_are_read_as_they_are(tmp_path, start, monkeypatch):
    """Those that vLLM keeps transposed, in 8 bits with one scale; no other."""
    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
    saved_model(tmp_path)
    engine = start(tmp_path)

    def quantize(model):
        decode, plain = model.fused, {}
        assert decode._obstacle() is None
        for name, layer in model.model.layers.named_modules():
            if name.endswith("_proj") and "kv_b_proj" not in name:
                weight = plain[name] = layer.weight.data
                layer.weight_scale = nn.Parameter((weight.abs().max() / 448).view(1), requires_grad=False)
                small = (weight / layer.weight_scale).to(torch.float8_e4m3fn)
                layer.weight = nn.Parameter(small.t(), requires_grad=False)
        assert decode._obstacle() is None
        package = fused.package_model(decode.model, decode.vllm_config)
        for name, weight in plain.items():
            halves = fused.gate_and_up(name, weight) if "gate_up" in name else [(name, weight)]
            for part, expected in halves:
                given = weight_of(package.model.layers.get_submodule(part))
                numbers = given.values.float() * given.scale
                assert torch.allclose(numbers, expected, rtol=1 / 16, atol=expected.abs().max() / 448)
        down = model.model.layers[1].mlp.down_proj
        down.weight_scale = nn.Parameter(torch.ones(down.weight.shape[1]), requires_grad=False)
        return decode._obstacle()

    assert "down_proj.weight_scale another one" in engine.apply_model(quantize)[0]
