"""What a training step keeps for its backward pass, counted in bytes on MLRA-4 at an eighth of its widths."""

import gc

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from modeling_mlra import MLRAConfig, MLRAForCausalLM, loss_mlra
from modeling_mlra.loss_mlra import chunked_causal_loss
from scripts.training_model import set_recomputation
from tests.models import random_ids, tiny_model
from tests.tolerances import LOSS_ATOL, MATHEMATICS_ATOL

LENGTH, LAYERS, HEADS, LATENTS = 64, 1, 24, 4
WIDTHS = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
BYTES = 2  # bfloat16


# An attention kernel as GPUs have them: it keeps its arguments, its output and a number for each row of scores


@torch.library.custom_op("mlra_tests::attention", mutates_args=())
def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (q.float() @ k.float().transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    output = torch.empty_like(v.transpose(1, 2)).transpose(1, 2)
    return output.copy_(scores.softmax(-1) @ v.float()), scores.logsumexp(-1)


@kernel.register_fake
def _(q, k, v):
    return torch.empty_like(v.transpose(1, 2)).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mlra_tests::attention_backward", mutates_args=())
def kernel_backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@kernel_backward.register_fake
def _(gradient, q, k, v, o, rows):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


kernel.register_autograd(
    lambda ctx, gradient, _: kernel_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def kernel_attention(module, query, key, value, attention_mask, **kwargs):
    return kernel(query, key, value)[0].transpose(1, 2), None


class Norm(torch.autograd.Function):
    """A norm as GPUs have it: it keeps its arguments and a number for each row."""

    @staticmethod
    def forward(ctx, x, eps, weight=None):
        rows = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rows)
        return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def copied_attention(
    module, query, latents, k_rope, kv_b_weight, mask, interface, *, nope_dim, v_dim, alpha, **kwargs
):
    """The plain form: one call for all branches, each with a copy of the queries."""
    batch, length = query.shape[:2]
    weight = kv_b_weight.view(LATENTS, -1, latents.shape[-1])
    expanded = torch.bmm(latents.flatten(0, 1).transpose(0, 1), weight.transpose(1, 2))
    expanded = expanded.view(LATENTS, batch, length, HEADS, -1).permute(1, 0, 3, 2, 4)
    k_nope, value = expanded.split([nope_dim, v_dim], dim=-1)
    key = torch.cat([k_nope, k_rope[:, None, None].expand(*k_nope.shape[:-1], -1)], dim=-1).flatten(1, 2)
    query = query.transpose(1, 2)[:, None].expand(-1, LATENTS, -1, -1, -1).flatten(1, 2)
    output, weights = interface(module, query, key, value.flatten(1, 2), mask, **kwargs)
    return output.view(batch, length, LATENTS, HEADS, v_dim).sum(2) * alpha, weights


def kept(loss_of, parameters, blocks: int, is_held: bool = False) -> int:
    """Bytes of the different tensors that live on for the backward pass, parameters left out.

    They are those that autograd packs and, if `is_held`, those that Python holds: selective recomputation keeps what
    it does not make again there, when nothing is compiled.
    """
    ids = random_ids(blocks, LENGTH)
    packed, before = [], {id(thing) for thing in gc.get_objects()} if is_held else set()

    def pack(tensor):
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss_of(ids)
    held = []
    if is_held:
        gc.collect()
        held = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and id(thing) not in before]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in (*packed, *held)}
    for tensor in (*parameters, ids, getattr(result, "last_hidden_state", None), getattr(result, "logits", None)):
        if tensor is not None:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.fixture
def model(monkeypatch):
    torch.compiler.reset()
    AttentionInterface.register("kernel", kernel_attention)
    monkeypatch.setattr("modeling_mlra.attention_mlra.FUSED_ATTENTION", [torch.ops.mlra_tests.attention.default])
    config = MLRAConfig(
        vocab_size=128,
        hidden_size=384,
        intermediate_size=1235,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_latent_heads=LATENTS,
        num_branches=LATENTS,
        q_lora_rank=128,
        kv_lora_rank=64,
        **WIDTHS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "kernel"
    yield MLRAForCausalLM(config).to(torch.bfloat16).train()
    torch.compiler.reset()


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_queries_are_kept_once_and_recomputation_keeps_a_third_less(model, backend, monkeypatch):
    def per_token() -> float:
        """Bytes for each token and layer: of two blocks less those of one, which leaves out weights."""
        torch.compiler.reset()
        call = model.model if backend is None else torch.compile(model.model, backend=backend, dynamic=False)
        one, two = (
            kept(lambda ids: call(ids, use_cache=False), model.parameters(), blocks, is_held=backend is None)
            for blocks in (1, 2)
        )
        return (two - one) / LENGTH / LAYERS

    if backend is None:
        monkeypatch.setattr("modeling_mlra.modeling_mlra.rms_norm", Norm.apply)
    plain = per_token()
    set_recomputation(model, "attention_inputs")
    recomputed = per_token()
    set_recomputation(model, None)
    monkeypatch.setattr("modeling_mlra.modeling_mlra.expanded_attention", copied_attention)
    copied = per_token()
    query, key, value = HEADS * 24, LATENTS * HEADS * 24, LATENTS * HEADS * 16
    key_sources = LATENTS * (model.config.latent_head_dim + WIDTHS["qk_rope_head_dim"])
    assert copied - plain == ((LATENTS - 1) * query - key_sources) * BYTES
    assert plain - recomputed >= (query + key + value - WIDTHS["qk_rope_head_dim"]) * BYTES  # keeps the rotary keys
    assert recomputed <= 2 / 3 * copied


def test_recomputing_elementwise_keeps_less_and_multiplies_no_more(model):
    """SwiGLU's product and normed inputs are made again, matrix products and attention are not; gradients stay."""

    def run(recompute: str | None):
        torch.compiler.reset()
        set_recomputation(model, recompute)
        call = torch.compile(model.model, backend="aot_eager_decomp_partition", dynamic=False)
        one, two = (kept(lambda ids: call(ids, use_cache=False), model.parameters(), blocks) for blocks in (1, 2))
        model.zero_grad()
        with torch.profiler.profile() as profile:
            call(random_ids(2, LENGTH), use_cache=False).last_hidden_state.float().square().sum().backward()
        products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
        gradients = [parameter.grad.clone() for parameter in model.model.parameters()]
        return (two - one) / LENGTH / LAYERS, products, gradients

    kept_before, products_before, before = run(None)
    kept_after, products_after, after = run("elementwise")
    set_recomputation(model, None)
    assert kept_after <= kept_before - model.config.intermediate_size * BYTES
    assert products_after == products_before > 0
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_loss_keeps_no_logits(model):
    """The loss adds the gradient by the hidden states, in place of logits for every word."""

    def per_token(loss_of) -> float:
        one, two = (kept(loss_of, model.parameters(), blocks) for blocks in (1, 2))
        return (two - one) / LENGTH

    hidden = per_token(lambda ids: model.model(ids, use_cache=False))
    in_chunks = per_token(lambda ids: model(ids, labels=ids, use_cache=False, skip_logits=True))
    whole = per_token(lambda ids: model(ids, labels=ids, use_cache=False))
    assert in_chunks - hidden == model.config.hidden_size * BYTES
    assert whole - hidden > model.config.vocab_size * 4


# The loss in chunks


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_loss_in_chunks_equals_the_plain_one(rows, monkeypatch):
    """Value and gradients, with tokens left out, given targets and a given count, tied and frozen embeddings."""
    model = tiny_model("mlra_2", dtype=torch.float64)
    monkeypatch.setattr(loss_mlra, "MAX_LOGITS_BYTES", rows * 61 * 4)
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    shifted = random_ids(2, 9, seed=3)
    shifted[1, 6:] = -100
    for extra, targets in (({}, None), ({"shift_labels": shifted, "num_items_in_batch": torch.tensor(40)}, shifted)):
        for is_frozen in (False, True):
            model.lm_head.weight.requires_grad_(not is_frozen)
            model.zero_grad()
            result = model(ids, labels=labels, use_cache=False, skip_logits=True, **extra)
            assert result.logits is None
            result.loss.backward()
            found = [parameter.grad for parameter in model.parameters()]
            model.zero_grad()
            logits = model(ids, use_cache=False).logits
            if targets is None:
                expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            else:
                expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 40
            expected.backward()
            assert abs(result.loss - expected) <= MATHEMATICS_ATOL
            for one, parameter in zip(found, model.parameters(), strict=True):
                if parameter.grad is None:
                    assert one is None
                else:
                    torch.testing.assert_close(one, parameter.grad, rtol=0, atol=MATHEMATICS_ATOL)
    with torch.no_grad():
        alone = model(ids, labels=labels, use_cache=False, skip_logits=True).loss
        assert abs(alone - model(ids, labels=labels, use_cache=False).loss) <= LOSS_ATOL


def test_loss_in_chunks_compiles(monkeypatch):
    monkeypatch.setattr(loss_mlra, "MAX_LOGITS_BYTES", 5 * 61 * 4)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 9, 8), (61, 8)))
    ids = random_ids(2, 9)
    torch.compiler.reset()
    results = []
    for call in (chunked_causal_loss, torch.compile(chunked_causal_loss, backend="aot_eager", fullgraph=True)):
        loss = call(hidden, weight, ids)
        results.append([loss, *torch.autograd.grad(loss * 3, (hidden, weight))])
    expected = nn.functional.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    results.append([expected, *torch.autograd.grad(expected * 3, (hidden, weight))])
    for found in results[:2]:
        for one, other in zip(found, results[2], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=MATHEMATICS_ATOL)


def test_a_head_that_is_no_plain_map_computes_its_logits():
    """A bias, as of an adapter or hook: leaving it out would be a wrong loss."""
    model = tiny_model("mla")
    ids = random_ids(2, 9)
    plain = model(ids, labels=ids).loss
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    hooked = model(ids, labels=ids, skip_logits=True)
    assert hooked.logits is not None and abs(hooked.loss - model(ids, labels=ids).loss) <= LOSS_ATOL
    assert abs(hooked.loss - plain) > 0.1
