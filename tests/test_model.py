"""The model against the independent oracle: forward, gradients, masks, heads of the library, initialisation."""

import pytest
import torch
from transformers import AttentionInterface

from modeling_mlra import MLRACache, MLRAForSequenceClassification, MLRAForTokenClassification
from modeling_mlra.attention_mlra import up_projections
from tests.models import VARIANTS, VOCAB_SIZE, random_ids, tiny_config, tiny_model
from tests.oracle import oracle_of_model
from tests.tolerances import LOSS_ATOL, MATHEMATICS_ATOL

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SETTINGS = {
    "plain": {},
    "gated": {"attn_output_gate": True},
    "no_scale": {"latent_scaling": False},
    "gated_no_scale": {"attn_output_gate": True, "latent_scaling": False},
}


def assert_close(result, reference):
    assert reference.abs().max() > 1e6 * MATHEMATICS_ATOL, "a reference near zero proves nothing"
    torch.testing.assert_close(result, reference, rtol=0, atol=MATHEMATICS_ATOL)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_expanded_and_absorbed_equal_the_oracle(variant, setting):
    model = tiny_model(variant, dtype=torch.float64, **SETTINGS[setting])
    oracle = oracle_of_model(model)
    for length in (1, 7, 29):
        ids = random_ids(length)
        reference = oracle.forward(ids)
        with torch.no_grad():
            assert_close(model(ids[None]).logits[0], reference)
            for implementation in ("sdpa", "eager"):
                model.set_attn_implementation(implementation)
                for cache in (MLRACache(model.config), MLRACache(model.config, max_cache_len=length + 3)):
                    pieces = [model(part[None], cache=cache).logits[0] for part in ids.split(3)]
                    assert_close(torch.cat(pieces), reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_the_oracle(variant):
    """Gradients of the loss through the expanded form, and through the absorbed form on a growing cache."""
    model = tiny_model(variant, dtype=torch.float64, attn_output_gate=True)
    ids = random_ids(7)
    names = [name for name, _ in model.named_parameters()]

    oracle_model = tiny_model(variant, dtype=torch.float64, attn_output_gate=True)
    oracle = oracle_of_model(oracle_model)
    leaves = {}
    for index, layer in enumerate(oracle.layers):
        for name in ("q_a", "q_b", "k_rope", "out", "gate"):
            leaves[index, name] = getattr(layer, name).clone().requires_grad_()
            setattr(layer, name, leaves[index, name])
    torch.nn.functional.cross_entropy(oracle.forward(ids)[:-1], ids[1:]).backward()

    def gradients(logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
        return {name: parameter.grad.clone() for name, parameter in zip(names, model.parameters(), strict=True)}

    expanded = gradients(model(ids[None]).logits[0])
    cache = MLRACache(model.config)
    absorbed = gradients(torch.cat([model(part[None], cache=cache).logits[0] for part in ids.split(3)]))
    for name in names:
        torch.testing.assert_close(absorbed[name], expanded[name], rtol=0, atol=MATHEMATICS_ATOL)
    modules = {"q_a": "q_a_proj", "q_b": "q_b_proj", "k_rope": "k_rope_proj", "out": "o_proj", "gate": "g_proj"}
    for (index, name), leaf in leaves.items():
        assert_close(expanded[f"model.layers.{index}.self_attn.{modules[name]}.weight"].T, leaf.grad)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_real_token(side, implementation):
    model = tiny_model("mlra_2", dtype=torch.float64)
    model.set_attn_implementation(implementation)
    oracle = oracle_of_model(model)
    ids, lengths = random_ids(3, 9), (9, 4, 1)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(9 - length, None) if side == "left" else slice(0, length)] = 1
    with torch.no_grad():
        for length_first in (9, 5):  # whole, and as a prefill with a continuation
            cache = MLRACache(model.config)
            parts = ids.split([length_first, 9 - length_first], dim=1)
            ends = (length_first, 9)
            logits = torch.cat(
                [
                    model(part, attention_mask=mask[:, :end], cache=cache).logits
                    for part, end in zip(parts, ends, strict=True)
                    if part.shape[1]
                ],
                dim=1,
            )
            for row in range(3):
                real = mask[row].bool()
                assert_close(logits[row, real], oracle.forward(ids[row, real]))


def test_masked_tokens_in_the_middle_of_the_cache():
    model = tiny_model("mlra_4", dtype=torch.float64)
    ids, keep = random_ids(8), torch.tensor([1, 0, 1, 1, 0, 0, 1, 1])
    reference = oracle_of_model(model).forward(ids, keep=keep)
    with torch.no_grad():
        cache = MLRACache(model.config, max_cache_len=20)
        first = model(ids[None, :6], attention_mask=keep[None, :6], cache=cache).logits[0]
        second = model(ids[None, 6:], attention_mask=keep[None], cache=cache).logits[0]
    visible = keep.bool()
    assert_close(torch.cat([first, second])[visible], reference[visible])


def test_position_ids_move_rope_only():
    """RoPE is relative: a shift changes nothing, a stretch equals the oracle at the stretched positions."""
    model = tiny_model("gla_2", dtype=torch.float64)
    ids, positions = random_ids(6), torch.tensor([0, 2, 4, 9, 10, 30])
    with torch.no_grad():
        stretched = model(ids[None], position_ids=positions[None]).logits[0]
        plain, shifted = model(ids[None]).logits, model(ids[None], position_ids=torch.arange(5, 11)[None]).logits
    assert_close(stretched, oracle_of_model(model).forward(ids, positions=positions))
    assert (stretched - plain[0]).abs().max() > 1e-3
    assert_close(shifted, plain)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(implementation):
    model = tiny_model("mlra_4", dtype=torch.float64)
    model.set_attn_implementation(implementation)
    first, second = random_ids(5), random_ids(8, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second])[None], position_ids=positions, use_cache=False).logits[0]
    oracle = oracle_of_model(model)
    assert_close(packed, torch.cat([oracle.forward(first), oracle.forward(second)]))


def test_long_continuation_expands_the_cache():
    """More new tokens than the absorbed form takes, on a dynamic and on a static cache with an unused tail."""
    model = tiny_model("mlra_4", dtype=torch.float64, max_position_embeddings=256, num_hidden_layers=1)
    ids = random_ids(90)
    with torch.no_grad():
        reference = model(ids[None]).logits
        for cache in (MLRACache(model.config), MLRACache(model.config, max_cache_len=120)):
            first = model(ids[None, :10], cache=cache).logits
            second = model(ids[None, 10:], cache=cache).logits
            assert_close(torch.cat([first, second], dim=1), reference)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("bound", [1, 3000, 10_000])
def test_expanded_keys_and_values_stay_within_their_bound(bound, implementation, monkeypatch):
    """A few heads after another give what all at once give, and no slice is wider than it may be."""
    model = tiny_model("mlra_2", dtype=torch.float64, num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    ids, seen = random_ids(2, 9), []
    get_interface = AttentionInterface.get_interface

    def get_recording_interface(*args):
        attention = get_interface(*args)

        def recording(module, query, key, *others, **kwargs):
            seen.append(key.shape[1])  # heads expanded at once
            return attention(module, query, key, *others, **kwargs)

        return recording

    monkeypatch.setattr(AttentionInterface, "get_interface", get_recording_interface)
    with torch.no_grad():
        reference = model(ids, output_attentions=True)
        assert seen == [24]
        monkeypatch.setattr("modeling_mlra.attention_mlra.MAX_EXPANDED_BYTES", bound)
        sliced = model(ids, output_attentions=True)
    assert_close(sliced.logits, reference.logits)
    per_head = 2 * 9 * (6 + 4 + 5) * 8
    assert max(seen[1:]) == max(1, bound // per_head) and sum(seen[1:]) == 24
    if implementation == "eager":
        assert_close(sliced.attentions[0], reference.attentions[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_call_per_latent_equals_one_call_for_all(variant):
    """Training and long prompts run latent by latent, short prompts all at once; attention weights agree as well."""
    model = tiny_model(variant, dtype=torch.float64)
    ids = random_ids(2, 9)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        apart = model(ids, output_attentions=True, use_cache=False)
        with torch.no_grad():
            at_once = model(ids, output_attentions=True, use_cache=False)
        assert_close(apart.logits, at_once.logits)
        if implementation == "eager":
            assert_close(apart.attentions[1], at_once.attentions[1])


@pytest.mark.parametrize("variant", ["mlra_2", "mlra_4"])
def test_gradients_reach_the_attention_weights(variant):
    """As methods that explain a prediction read them: alpha_attn * (d loss / d head output) . value."""
    model = tiny_model(variant, dtype=torch.float64)
    model.set_attn_implementation("eager")
    attention, config, seen = model.model.layers[1].self_attn, model.config, {}
    attention.kv_a_layernorm.register_forward_hook(lambda module, inputs, output: seen.update(latents=output))
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.update(heads=inputs[0]))
    outputs = model(random_ids(2, 9), output_attentions=True, use_cache=False)
    weights = outputs.attentions[1]
    given = torch.autograd.grad(outputs.logits.square().sum(), [weights, seen["heads"]], allow_unused=True)
    assert given[0] is not None
    latents = seen["latents"].unflatten(-1, (config.num_latent_heads, -1)) * attention.alpha_kv
    _, up = up_projections(attention.kv_b_proj(), config.qk_nope_head_dim, config.v_head_dim)
    up = up.unflatten(0, (config.num_latent_heads, -1))  # [L, H, V, R]
    values = torch.einsum("bslr,lhvr->blhsv", latents, up)
    of_group = given[1].view(2, 9, -1, up.shape[1], config.v_head_dim)  # [B, T, G, H, V]
    of_latent = of_group.repeat_interleave(config.num_branches, dim=2)
    expected = torch.einsum("btlhv,blhsv->blhts", of_latent, values).flatten(1, 2) * attention.alpha_attn
    assert_close(given[0], expected)


def test_attentions_are_one_distribution_per_branch():
    model = tiny_model("mlra_2", dtype=torch.float64)
    model.set_attn_implementation("eager")
    ids = random_ids(1, 6)
    with torch.no_grad():
        cache = MLRACache(model.config)
        whole = model(ids, output_attentions=True).attentions
        model(ids[:, :4], cache=cache)
        step = model(ids[:, 4:], cache=cache, output_attentions=True).attentions
    assert len(whole) == 2
    assert whole[0].shape == (1, 4 * 6, 6, 6)  # 4 latents, 12 heads in 2 groups
    assert step[0].shape == (1, 4 * 6, 2, 6)
    torch.testing.assert_close(whole[1].sum(-1), torch.ones_like(whole[1].sum(-1)))
    torch.testing.assert_close(step[1], whole[1][:, :, 4:], rtol=0, atol=MATHEMATICS_ATOL)


def test_logits_to_keep_and_loss():
    model = tiny_model(dtype=torch.float64)
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
        assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
        assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, out.logits[:, [1, 5]])
    reference = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB_SIZE), labels[:, 1:].flatten())
    assert abs(out.loss.item() - reference.item()) < LOSS_ATOL


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model(dtype=torch.float64).train()
    ids = random_ids(2, 9)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain)


def test_flex_attention_equals_sdpa():
    model = tiny_model("mlra_2", qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    ids = random_ids(2, 9)
    with torch.no_grad():
        reference = model(ids).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids).logits, reference, rtol=1e-4, atol=1e-4)


def test_classification_heads():
    ids = random_ids(2, 7)
    ids[1, :3] = 0  # left padding
    mask = (ids != 0).long()
    sequence = tiny_model(model_class=MLRAForSequenceClassification, num_labels=3, dtype=torch.float64)
    with torch.no_grad():
        logits = sequence(ids, attention_mask=mask).logits
        alone = sequence(ids[1:, 3:]).logits
    assert logits.shape == (2, 3)
    assert_close(logits[1:], alone)
    token = tiny_model(model_class=MLRAForTokenClassification, num_labels=5)
    assert token(ids, attention_mask=mask).logits.shape == (2, 7, 5)


def test_initialisation():
    """N(0, 0.02) everywhere, ones for norms, zero for the output projections of attention and MLP."""
    from modeling_mlra import MLRAForCausalLM

    torch.manual_seed(0)
    model = MLRAForCausalLM(tiny_config(hidden_size=96, q_lora_rank=64, vocab_size=500, attn_output_gate=True))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert parameter.abs().max() == 0, name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name


def test_inputs_are_checked():
    model = tiny_model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(random_ids(1, 3), inputs_embeds=torch.zeros(1, 3, 24))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_behind_a_cached_prefix(implementation):
    """In training attention weights are dropped behind a cache too, and in evaluation never."""
    model = tiny_model("mlra_2", attention_dropout=0.5)
    model.set_attn_implementation(implementation)
    ids, results = random_ids(2, 9), {True: [], False: []}
    for training, found in results.items():
        for seed in (1, 2):
            cache = MLRACache(model.config)
            with torch.no_grad():
                model.eval()(ids, past_key_values=cache)
            torch.manual_seed(seed)
            found.append(model.train(training)(ids[:, :2], past_key_values=cache).logits)
    assert torch.equal(*results[False])
    assert (results[True][0] - results[True][1]).abs().max() > 1e-3
