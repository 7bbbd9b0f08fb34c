"""Compiled training: causal without a mask, exact where documents are packed or padded, equal to the plain form."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scripts.causal_attention import causal_attention
from scripts.training_model import set_recomputation
from tests.models import random_ids, tiny_model
from tests.oracle import oracle_of_model
from tests.tolerances import LOSS_ATOL, MATHEMATICS_ATOL

LENGTH = 29  # no other size of the models


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs(list):
    """A backend of torch.compile that keeps what it is given, and runs it as it is."""

    def __call__(self, module, example_inputs):
        self.append(module)
        return module

    def nodes(self):
        """All nodes, those of checkpointed regions too."""
        for whole in self:
            for module in whole.modules():
                if isinstance(module, torch.fx.GraphModule):
                    yield from module.graph.nodes

    def attention(self) -> list[tuple[bool, bool]]:
        """(has a mask, is causal) of every attention call."""
        calls = [node for node in self.nodes() if node.target is nn.functional.scaled_dot_product_attention]
        return [(node.kwargs["attn_mask"] is not None, bool(node.kwargs["is_causal"])) for node in calls]

    def has_square(self) -> bool:
        """Whether any tensor has a number for each pair of positions."""
        shapes = [getattr(node.meta.get("example_value"), "shape", ()) for node in self.nodes()]
        return any(tuple(shape[-2:]) == (LENGTH, LENGTH) for shape in shapes)


def compiled(model, **options):
    graphs = Graphs()
    return torch.compile(model, backend=graphs, fullgraph=True, **options), graphs


def gradients(model, call, **inputs) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(found, expected, atol=MATHEMATICS_ATOL):
    assert abs(found[0] - expected[0]) <= atol
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol * max(1.0, other.abs().max().item()))


FORMS = {
    "plain": {},
    "cache": {"use_cache": True},
    "layers": {},
    "attention_inputs": {},
    "skip_logits": {"skip_logits": True},
    "dynamic": {},
}


@pytest.mark.parametrize("form", FORMS)
def test_compiled_training_is_causal_without_a_mask(form, monkeypatch):
    model = tiny_model("mlra_2", dtype=torch.float64).train()
    ids = random_ids(2, LENGTH)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False, **FORMS[form]}
    expected = gradients(model, model, **{**inputs, "skip_logits": False})
    if form == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if form == "attention_inputs":
        set_recomputation(model, form)
    # Some versions of the library never leave the mask out while compiling
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *args, **kwargs: False)
    call, graphs = compiled(model, dynamic=form == "dynamic")
    # The library's own loss, the reference of `skip_logits`, is in float32
    assert_same(gradients(model, call, **inputs), expected, LOSS_ATOL if form == "skip_logits" else MATHEMATICS_ATOL)
    assert graphs.attention() == [(False, True)] * 2 * 4  # layers, latents
    assert not graphs.has_square()
    if form == "dynamic":
        short = random_ids(2, 17)
        shorter = {"input_ids": short, "labels": short, "use_cache": False}
        assert_same(gradients(model, call, **shorter), gradients(model, model, **shorter))
        assert len(graphs) == 1


def test_the_library_s_llama_gets_the_same_attention():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).double().train()
    ids = random_ids(2, LENGTH)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    model.set_attn_implementation("eager")
    expected = gradients(model, model, **inputs)
    model.set_attn_implementation("sdpa")
    call, graphs = compiled(model)
    assert_same(gradients(model, call, **inputs), expected, LOSS_ATOL)
    masked_by_the_library = graphs.has_square()
    model.set_attn_implementation(causal_attention("auto"))
    call, graphs = compiled(model)
    assert_same(gradients(model, call, **inputs), expected, LOSS_ATOL)
    assert graphs.attention() == [(False, True)] * 2 and not graphs.has_square()
    assert masked_by_the_library  # or the function has no purpose any more


def packed(ids):
    positions = torch.cat([torch.arange(11), torch.arange(LENGTH - 11)])
    return {"position_ids": positions.expand(2, -1)}


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, -5:] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize("given", [packed, padded])
def test_packed_and_padded_blocks_stay_exact(given):
    """Compiled logits of each document are the oracle's for the document alone, and gradients the plain ones."""
    model = tiny_model("mlra_4", dtype=torch.float64).train()
    ids = random_ids(2, LENGTH)
    extra = given(ids)
    labels = ids.masked_fill(extra["attention_mask"] == 0, -100) if given is padded else ids
    inputs = {"input_ids": ids, "labels": labels, "use_cache": False, **extra}
    call, graphs = compiled(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert_same(gradients(model, call, **inputs), gradients(model, model, **inputs))
    assert graphs.attention() == [(True, False)] * 2 * 4 and graphs.has_square()
    with torch.no_grad():
        torch.testing.assert_close(call(**inputs).logits, logits, rtol=0, atol=MATHEMATICS_ATOL)
    spans = {packed: [(0, 0, 11), (1, 11, LENGTH)], padded: [(0, 7, LENGTH), (1, 0, LENGTH - 5)]}[given]
    oracle = oracle_of_model(model)
    for row, start, end in spans:
        alone = oracle.forward(ids[row, start:end])
        torch.testing.assert_close(logits[row, start:end], alone, rtol=0, atol=MATHEMATICS_ATOL)


def test_attention_gets_positions_only_where_the_caller_gave_them():
    """FlashAttention looks for documents in them, which reads them back from the device in every layer."""
    seen = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs.get("position_ids")))
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None

    AttentionInterface.register("recording", recording)
    model = tiny_model("mla", num_hidden_layers=1)
    model.set_attn_implementation("recording")
    ids, positions = random_ids(2, LENGTH), torch.arange(LENGTH)[None]
    model(ids, use_cache=False)
    model(ids, use_cache=False, position_ids=positions)
    assert seen[0] == (None, None) and seen[1][1] is positions


def runs(profile, name: str) -> int:
    """How often an operator ran, less where a dispatch mode stood before it and may have answered itself."""
    events = [event for event in profile.events() if event.name == name]
    return sum(all(child.name != "PythonDispatchMode" for child in event.cpu_children) for event in events)


@pytest.mark.parametrize("variant", ["gla_2", "mlra_4"])
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_recomputed_attention_inputs_change_no_gradient(variant, backend):
    """Widths are equal, so that the CPU has a kernel of its own, whose output must be kept: it may run once only."""
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "attn_output_gate": True}
    model = tiny_model(variant, dtype=torch.float64, **sizes).train()
    ids = random_ids(2, LENGTH)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False, "skip_logits": True}
    expected = gradients(model, model, **inputs)
    set_recomputation(model, "attention_inputs")
    call = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    assert_same(gradients(model, call, **inputs), expected)  # compiles
    with torch.profiler.profile() as profile:
        gradients(model, call, **inputs)
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    expected = 2 * model.config.num_latent_heads
    assert runs(profile, kernel) == runs(profile, kernel + "_backward") == expected
    set_recomputation(model, None)
    assert not any(getattr(module, "recompute_inputs", False) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [None, "attention_inputs"])
def test_compiled_training_runs_cudnn(recompute):
    """Heads of 192 and 128: the compiled step and its backward pass are cuDNN's, not the memory-efficient kernel's."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 256}
    model = tiny_model("mlra_4", **sizes, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128).cuda().train()
    nn.init.normal_(model.lm_head.weight, std=0.02)
    set_recomputation(model, recompute)
    call = torch.compile(model)
    ids = random_ids(2, 128).cuda()
    for _ in range(2):
        with torch.profiler.profile() as profile, torch.autocast("cuda", torch.bfloat16):
            call(ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
    kernel = "aten::_scaled_dot_product_cudnn_attention"
    assert runs(profile, kernel) == runs(profile, kernel + "_backward") == 2 * 4


def test_flash_attention_4_is_one_differentiable_operator(monkeypatch):
    """Its plumbing with plain mathematics in the place of the GPU's kernels: compiled whole, torch's own gradients."""

    def forward(query, key, value, softmax_scale, causal, return_lse):
        assert causal and return_lse
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) * softmax_scale
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), scores.logsumexp(-1)

    def backward(query, key, value, output, gradient, lse, softmax_scale, causal):
        query, key, value, output, gradient = (x.transpose(1, 2) for x in (query, key, value, output, gradient))
        weights = (query @ key.transpose(2, 3) * softmax_scale - lse[..., None]).exp().tril()
        d_weights = gradient @ value.transpose(2, 3) - (gradient * output).sum(-1, keepdim=True)
        d_scores = weights * d_weights * softmax_scale
        gradients = d_scores @ key, d_scores.transpose(2, 3) @ query, weights.transpose(2, 3) @ gradient
        return tuple(x.transpose(1, 2).contiguous() for x in gradients)

    monkeypatch.setattr("scripts.causal_attention.flash_attention_4", forward)
    monkeypatch.setattr("scripts.causal_attention.flash_attention_4_backward", backward, raising=False)
    attend = ALL_ATTENTION_FUNCTIONS[causal_attention("fa4")]
    inputs = [torch.randn(2, 3, 16, width, dtype=torch.float64, requires_grad=True) for width in (8, 8, 5)]
    compiled = torch.compile(
        lambda *x: attend(None, *x, None, scaling=0.3)[0].sin(), fullgraph=True, backend="aot_eager"
    )
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3)
    expected = expected.transpose(1, 2).sin()
    output = compiled(*inputs)
    gradient = torch.randn_like(output)
    torch.testing.assert_close(output, expected, rtol=0, atol=MATHEMATICS_ATOL)
    pairs = zip(*(torch.autograd.grad(x, inputs, gradient) for x in (output, expected)), strict=True)
    for found, exact in pairs:
        torch.testing.assert_close(found, exact, rtol=0, atol=MATHEMATICS_ATOL)
