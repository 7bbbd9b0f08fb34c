"""The fused decoding step: its kernels in Triton's interpreter, and on a GPU the whole of generate()."""

import pytest
import torch
from torch import nn

from modeling_mlra import (
    MLRACache,
    decode_plans_mlra,
    decode_triton_mlra,
    step_linear_mlra,
    step_linear_products_mlra,
    step_linear_registers_mlra,
    step_linear_stream_mlra,
    step_mlra,
)
from modeling_mlra.device_mlra import DeviceFacts, device_facts
from modeling_mlra.generation_mlra import captured_decodes
from modeling_mlra.modeling_mlra import MLRARMSNorm
from modeling_mlra.step_device_mlra import machine_of
from modeling_mlra.step_maps_mlra import LinearMap
from modeling_mlra.step_mlra import obstacle
from tests.fused_checks import compare, verify_together
from tests.models import VARIANTS, random_ids, rms_ratio, tiny_model
from tests.tolerances import FUSED_BFLOAT16_RATIO, FUSED_FLOAT32_RATIO, KERNEL_BF16_RATIO

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where there is one, all of them run on the GPU
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off, and does not round
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
YARN |= {"mscale": 1.0, "mscale_all_dim": 0.5}
SETTINGS = {
    "plain": {},
    "gated, no scale, yarn": {
        "attn_output_gate": True,
        "latent_scaling": False,
        "rope_parameters": YARN,
        "num_hidden_layers": 1,
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_step_equals_the_modules(variant, setting):
    """Left-padded prompts, NaN in the unused rows, two steps; interpreted where there is no GPU."""
    result = compare(variant, DEVICE, **SETTINGS[setting])
    assert result["counters"]
    assert result["logits"] < FUSED_FLOAT32_RATIO
    assert result["rows"] < FUSED_FLOAT32_RATIO


@pytest.mark.parametrize(
    ("variant", "setting", "batch"),
    [("mlra_4", "plain", 5), ("mlra_2", "plain", 3), ("mla", "gated, no scale, yarn", 17)],
)
def test_more_sequences_than_few(variant, setting, batch):
    result = compare(variant, DEVICE, batch, **SETTINGS[setting])
    assert result["counters"]
    assert max(result["logits"], result["rows"]) < FUSED_FLOAT32_RATIO


@pytest.mark.parametrize(
    ("variant", "setting", "batch", "tokens_each"),
    [("mlra_4", "plain", 1, 2), ("mlra_2", "plain", 3, 4), ("mla", "gated, no scale, yarn", 1, 5)],
)
def test_several_tokens_of_a_sequence(variant, setting, batch, tokens_each):
    """Candidates verified together: each sees those in front of it, and every one's row is appended."""
    result = verify_together(variant, DEVICE, batch, tokens_each, **SETTINGS[setting])
    assert max(result.values()) < FUSED_FLOAT32_RATIO


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("inner", "sizes", "vectors"), [(1000, (200, 20), 5), (392, (70,), 16), (40, (300, 64, 9), 9)]
)
def test_linear_of_many_vectors(inner, sizes, vectors, dtype, monkeypatch):
    """Against float64: tiles that end inside, sums of one program and of several, which count anew."""
    machine = machine_of(torch.device(DEVICE))
    plan = step_linear_products_mlra.product_plan
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    norm = MLRARMSNorm(inner, 1e-6).to(DEVICE, dtype)
    norm.weight.data.copy_(normal(inner))
    x, weights = normal(vectors, inner + 8)[:, :inner], tuple(normal(rows, inner) / inner**0.5 for rows in sizes)
    exact, stacked = x.double(), torch.cat(weights).double()
    normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
    before, up = normal(vectors, sum(sizes)), normal(sizes[0], inner) / inner**0.5
    gated = nn.functional.silu(normed @ weights[0].double().T) * (normed @ up.double().T)
    cases = {
        "norm": (LinearMap(weights, norm, 0.7), None, 0.7 * normed @ stacked.T),
        "swiglu": (LinearMap((weights[0], up), norm, swiglu=True), None, gated),
        "residual": (LinearMap(weights, residual_share=0.5), before, exact @ stacked.T + 0.5 * before.double()),
    }
    limit = FUSED_FLOAT32_RATIO if dtype == torch.float32 else KERNEL_BF16_RATIO
    for splits in (1, 3):
        changed = {"SPLITS": splits, "WIDTH": 128 if DEVICE == "cuda" else 32}
        monkeypatch.setattr(step_linear_products_mlra, "product_plan", lambda *a, c=changed: plan(*a) | c)
        for name, (linear_map, residual, expected) in cases.items():
            out = torch.full(expected.shape, torch.nan, dtype=dtype, device=DEVICE)
            step_linear_mlra.run(linear_map, x, out, machine, residual)
            assert rms_ratio(expected, out.double()) < limit, f"{name}, {splits} programs"
            assert not machine.arrived.any()


def test_plans_of_released_products():
    """What was measured on one H200 for 3 to 16 vectors; ranks, more vectors, 8 bits and other GPUs go by the rule."""

    def plan(rows, inner, width=16, multiprocessors=132, dtype=torch.bfloat16):
        linear_map = LinearMap((torch.empty(rows, inner, dtype=dtype, device="meta"),))
        chosen = step_linear_products_mlra.product_plan(linear_map, -(-rows // 64), width, multiprocessors)
        return chosen["SPLITS"], chosen["STAGES"]

    assert plan(3072, 9880) == (8, 4)
    assert plan(4608, 1024) == (4, 3)
    assert plan(3072, 3072) == (5, 3)
    assert plan(3072, 4940) == (9, 3)
    assert plan(2304, 1024) == plan(4608, 1024, width=32) == plan(4608, 1024, dtype=torch.float8_e4m3fn) == (2, 3)
    assert plan(3072, 9880, width=32) == plan(3072, 9880, dtype=torch.float8_e4m3fn) == (11, 3)
    assert plan(3072, 9880, multiprocessors=108) == (9, 3)


def test_rows_in_several_chunks(monkeypatch):
    plan = {"ROWS": 8, "WIDTH": 8, "AHEAD": 2, "num_warps": 4}
    monkeypatch.setattr(step_linear_registers_mlra, "register_plan", lambda *_: dict(plan))
    assert compare("mlra_4", DEVICE)["logits"] < FUSED_FLOAT32_RATIO


@pytest.mark.parametrize("variant", ["mla", "mlra_4"])
def test_many_partial_results_of_each_sequence(variant, monkeypatch):
    """Five shares a sequence, reduced two at a time: several turns, and a share that ends one and starts the next."""
    plans = decode_triton_mlra.decode_plans
    changed = {"unit": 2, "least_units": 1, "programs_per_sm": 4}
    monkeypatch.setattr(decode_triton_mlra, "decode_plans", lambda *x: [plans(*x)[0]._replace(**changed)])
    value_plan = step_mlra.value_plan
    monkeypatch.setattr(step_mlra, "value_plan", lambda *a: (value_plan(*a)[0]._replace(SPLITS=2), 4))
    assert compare(variant, DEVICE)["logits"] < FUSED_FLOAT32_RATIO


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_few_shares_of_several_short_sequences(batch, monkeypatch):
    """One or two programs hold all sequences: each leaves a partial result of its own."""
    plans = decode_triton_mlra.decode_plans
    changed = {"least_units": 3}
    monkeypatch.setattr(decode_triton_mlra, "decode_plans", lambda *x: [plans(*x)[0]._replace(**changed)])
    result = compare("mlra_4", DEVICE, batch)
    assert result["counters"]
    assert max(result["logits"], result["rows"]) < FUSED_FLOAT32_RATIO


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("paired_rows", [0, 2**30])
def test_widths_that_hopper_kernels_take(batch, paired_rows, monkeypatch):
    """bfloat16, latents of 128: where there is such a GPU, its decode kernel, with all sequences in one share."""
    monkeypatch.setattr(decode_plans_mlra, "PAIRED_ROWS", paired_rows)
    result = compare("mlra_4", DEVICE, batch, dtype=torch.bfloat16, kv_lora_rank=512, qk_rope_head_dim=64)
    assert result["counters"]
    assert max(result["logits"], result["rows"]) < FUSED_BFLOAT16_RATIO


@pytest.mark.parametrize("end_tokens", [[], [5, 123]])
def test_choice_of_the_next_token(end_tokens, monkeypatch):
    """The first of equal maxima, as torch.argmax takes it; pads behind an end; appends, moves on and counts."""
    model = tiny_model("mlra_4").to(DEVICE)
    counters = torch.tensor([7, 3, 7, 7, 6, 8, 8, 8, 8], dtype=torch.int32, device=DEVICE)
    cache = MLRACache(model.config, max_cache_len=20)
    model(torch.ones(4, 7, dtype=torch.long, device=DEVICE), cache=cache)
    step = step_mlra.FusedStep(model, cache, counters.clone())
    logits = torch.randn(4, 40_000, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    logits[0, [5, 17_000, 39_999]] = 50.0
    logits[1] = -torch.inf
    logits[3, [30_000, 31_000]] = torch.tensor([torch.inf, torch.nan], dtype=logits.dtype, device=DEVICE)
    monkeypatch.setattr(step, "logits_after", lambda token_ids: logits)
    tokens = torch.zeros(4, dtype=torch.long, device=DEVICE)
    unfinished, column = torch.tensor([1, 1, 0, 1], device=DEVICE), torch.tensor([[2], [2], [2], [2]], device=DEVICE)
    sequences = torch.full((4, 4), -1, device=DEVICE)
    step.choose(tokens, unfinished, 9, torch.tensor(end_tokens, dtype=torch.long, device=DEVICE), sequences, column)
    assert tokens.tolist() == [5, 0, 9, 30_000]
    assert sequences.tolist() == [[-1, -1, token, -1] for token in tokens.tolist()]
    assert column.flatten().tolist() == [3] * 4
    assert unfinished.tolist() == [0 if end_tokens else 1, 1, 0, 1]
    assert torch.equal(step.counters, counters + 1)


@pytest.mark.parametrize("kept", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_is_drawn_as_multinomial_draws_it(kept, dtype, monkeypatch):
    """With its random numbers, and of the largest scores alone, the equal ones included."""
    model = tiny_model("mlra_4").to(DEVICE)
    cache = MLRACache(model.config, max_cache_len=20)
    model(torch.ones(4, 7, dtype=torch.long, device=DEVICE), cache=cache)
    step = step_mlra.FusedStep(model, cache, torch.zeros(9, dtype=torch.int32, device=DEVICE))
    logits = 2 * torch.randn(4, 9_000, generator=torch.Generator().manual_seed(0))
    logits[0, ::2] = -torch.inf
    logits[1, [7, 8_500, 40, 41]] = torch.tensor([30.0, 29.0, 28.0, 28.0])
    logits = logits.to(DEVICE, dtype)
    monkeypatch.setattr(step, "logits_after", lambda token_ids: logits)
    tokens, unfinished = torch.zeros(4, dtype=torch.long, device=DEVICE), torch.ones(4, device=DEVICE).long()
    column, sequences = torch.zeros(4, 1, device=DEVICE).long(), torch.zeros(4, 40, device=DEVICE).long()
    no_ends = torch.zeros(0, device=DEVICE).long()
    scores = logits.float()
    if kept is not None:
        scores = scores.masked_fill(scores < scores.topk(kept).values[:, -1:], -torch.inf)
    drawn = set()
    for seed in range(12):
        torch.manual_seed(seed)
        expected, state = torch.multinomial(scores.softmax(-1), 1)[:, 0], torch.rand(1, device=DEVICE)
        torch.manual_seed(seed)
        scores_of = (lambda logits: (logits, logits.topk(kept).values)) if kept else None
        step.choose(tokens, unfinished, 9, no_ends, sequences, column, scores_of, draws=True)
        assert torch.equal(tokens, expected) and torch.equal(torch.rand(1, device=DEVICE), state)
        drawn.add(tokens[1].item())
    assert len(drawn) > 1 and (not kept or drawn <= {7, 8_500, 40, 41})


def test_which_kernel_runs_a_linear_map(monkeypatch):
    """Through rings go large weights whose rows bulk copies can take; the vectors must fit beside the rings."""
    monkeypatch.setattr(step_linear_stream_mlra, "RING_BYTES", 2**20)
    hopper = machine_of(torch.device(DEVICE))._replace(hopper=True)

    def way(*weights, vectors=1, machine=hopper, **settings):
        return step_linear_mlra.runner_of(LinearMap(weights, **settings), vectors, machine).__name__

    weight = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    assert way(weight) == way(weight, vectors=2) == "run_as_stream"
    assert way(weight, machine=hopper._replace(hopper=False)) == "run_in_registers"
    assert way(weight, vectors=3) == "run_as_products"
    assert way(weight[:256], weight[256:512], swiglu=True) == "run_as_stream"
    assert way(weight[:256]) == "run_in_registers"  # too small
    assert way(weight[:, :1000]) == "run_in_registers"  # rows apart
    assert way(torch.zeros(1024, 1001, dtype=torch.bfloat16)) == "run_in_registers"  # unaligned
    wide = torch.zeros(64, 28672, dtype=torch.bfloat16)
    assert way(wide) == "run_as_stream"
    assert way(wide, vectors=2) == "run_in_registers"
    monkeypatch.setattr(step_linear_stream_mlra, "RING_SHARED_BYTES", 2**20)
    assert way(wide, vectors=2) == "run_as_stream"
    assert way(weight, weight) == "run_in_registers"  # stacked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize(("inner", "rows"), [(1000, 20), (1024, 8 * 132 * 2), (3072, 9880), (9880, 3072)])
def test_gpu_linear_through_rings(inner, rows, vectors, dtype, monkeypatch):
    """Against float64; rows and columns that end inside a tile, one and many turns of the rings."""
    machine = machine_of(torch.device("cuda", 0))
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=dtype, device="cuda", generator=generator)

    norm = MLRARMSNorm(inner, 1e-6).to("cuda", dtype)
    norm.weight.data.copy_(normal(inner))
    x, weights = normal(vectors, inner), tuple(normal(rows, inner) / inner**0.5 for _ in range(2))
    exact, (w, u) = x.double(), (weight.double() for weight in weights)
    normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
    before = normal(vectors, rows)
    cases = {
        "swiglu": (LinearMap(weights, norm, swiglu=True), None, nn.functional.silu(normed @ w.T) * (normed @ u.T)),
        "norm": (LinearMap(weights[:1], norm, 0.7), None, 0.7 * normed @ w.T),
        "residual": (LinearMap(weights[:1], residual_share=0.5), before, exact @ w.T + 0.5 * before.double()),
    }
    monkeypatch.setattr(step_linear_stream_mlra, "RING_BYTES", 0)
    limit = FUSED_FLOAT32_RATIO if dtype == torch.float32 else KERNEL_BF16_RATIO
    for name, (linear_map, residual, expected) in cases.items():
        assert step_linear_stream_mlra.streams(linear_map, vectors)
        out = torch.full((vectors, rows), torch.nan, dtype=dtype, device="cuda")
        step_linear_mlra.run(linear_map, x, out, machine, residual)
        off = ((out - expected).abs() > 10 * limit * expected.abs().clamp(min=0.1)).nonzero().tolist()
        assert rms_ratio(expected, out.double()) < limit, f"{name}: {len(off)} outputs are off, first {off[:8]}"


@pytest.mark.gpu
def test_gpu_fused_step_through_rings(monkeypatch):
    monkeypatch.setattr(step_linear_stream_mlra, "RING_BYTES", 0)
    assert compare("mlra_4", DEVICE)["logits"] < FUSED_FLOAT32_RATIO


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_takes_the_captured_loop_and_gives_the_same_tokens(dtype):
    """float32 runs the modules in the graph and must give the tokens of the plain loop; bfloat16 runs fused."""
    model = tiny_model("mlra_4", dtype=dtype).to("cuda")
    ids = random_ids(2, 9).to("cuda")
    before = dict(captured_decodes)
    tokens = model.generate(ids, max_new_tokens=24, do_sample=False, cache_implementation="static")
    kind = "fused" if dtype == torch.bfloat16 else "modules"
    assert captured_decodes[kind] == before.get(kind, 0) + 1
    if dtype == torch.float32:
        assert torch.equal(tokens, model.generate(ids, max_new_tokens=24, do_sample=False))
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    for end in (None, tokens[:, ids.shape[1] + 4].tolist()):  # recording takes the choice out of the graph
        recorded = model.generate(ids, eos_token_id=end, output_logits=True, return_dict_in_generate=True, **settings)
        assert torch.equal(model.generate(ids, eos_token_id=end, **settings), recorded.sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_captured_sampling_draws_as_the_library_does(penalty):
    """With tokens chosen inside the graph (no penalty) and outside: same tokens, same random state afterwards."""
    model = tiny_model("mlra_4", dtype=torch.float32).to("cuda")
    ids = random_ids(2, 9).to("cuda")
    settings = {"max_new_tokens": 24, "do_sample": True, "top_p": 0.9, "repetition_penalty": penalty}
    settings |= {"suppress_tokens": list(range(50, 60)), "pad_token_id": 0}
    ends: list = [None]
    for end in ends:
        results = []
        for cache in ({}, {"cache_implementation": "static"}):
            torch.manual_seed(0)
            tokens = model.generate(ids, eos_token_id=end, **settings, **cache)
            results.append((tokens, torch.rand(1, device="cuda")))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        if end is None:  # and again with rows that end early
            ends.append(tokens[:, ids.shape[1] + 4].tolist())


def test_obstacles_name_what_is_in_the_way(monkeypatch):
    assert "float32" in obstacle(tiny_model(dtype=torch.float32).to(DEVICE), 1)
    model = tiny_model(dtype=torch.bfloat16).to(DEVICE)
    assert obstacle(model, 1) is None
    assert "sequences, not 99" in obstacle(model, 99)
    assert obstacle(model, 32) is None
    monkeypatch.setattr(step_mlra, "device_facts", lambda device: DeviceFacts(shared_bytes=48 * 2**10))
    assert obstacle(model, 2) is None
    assert "shared memory" in obstacle(model, 3)
    monkeypatch.setattr(step_mlra, "device_facts", lambda device: DeviceFacts(shared_bytes=64 * 2**10))
    assert obstacle(model, 32) is None
    monkeypatch.setattr(step_mlra, "device_facts", lambda device: DeviceFacts(tested=False))
    assert "never compiled" in obstacle(model, 1)
    monkeypatch.setattr(step_mlra, "device_facts", device_facts)
    monkeypatch.setenv("MLRA_DECODE", "torch")
    assert obstacle(model, 1) == "decode implementation 'torch' was asked for"
    monkeypatch.setenv("MLRA_DECODE", "triton")
    assert obstacle(model, 1) is None
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in obstacle(model, 1)
    handle.remove()
    model.model.layers[0].self_attn.o_proj = nn.Sequential(model.model.layers[0].self_attn.o_proj)
    assert "o_proj" in obstacle(model, 1)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "'dynamic'" in obstacle(tiny_model(dtype=torch.bfloat16, rope_parameters=dynamic).to(DEVICE), 1)
