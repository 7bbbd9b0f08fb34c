"""Loading, scaling down, context extension and introspection, as with any model of the library."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantoConfig, pipeline
from transformers.utils.import_utils import is_bitsandbytes_available, is_optimum_quanto_available

from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.decode_mlra import decode_calls
from modeling_mlra.library_mlra import cache_of
from tests.models import random_ids, rms_ratio, tiny_config, tiny_model

# Widths that 4-bit formats can group; weights are small enough for 4 bits to keep the picture.
QUANTIZABLE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    model = tiny_model("mlra_4", attn_output_gate=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = random_ids(2, 11)
    cache = MLRACache(half.config)
    with torch.no_grad():
        reference = model(ids).logits
        full = half(ids).logits
        first = half(ids[:, :6], cache=cache).logits
        cached = torch.cat([first, half(ids[:, 6:], cache=cache).logits], dim=1)
    assert cache.layers[0].rows.dtype == dtype and full.dtype == dtype
    # Eight and eleven bits of mantissa, accumulated over two layers
    limit = 30 * torch.finfo(dtype).eps
    assert rms_ratio(reference, full.float()) < limit
    assert rms_ratio(reference, cached.float()) < limit
    assert half.generate(ids, max_new_tokens=4).shape == (2, 15)


def test_sharded_saves_and_tied_weights(tmp_path):
    model = tiny_model("mlra_2")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert "lm_head.weight" not in index["weight_map"]
    again, report = MLRAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_from_config_and_meta_device():
    config = tiny_config("gla_2")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model) is MLRAForCausalLM and model.dtype == torch.bfloat16
    with torch.device("meta"):
        released = MLRAForCausalLM(MLRAConfig())
    assert {parameter.device.type for parameter in released.parameters()} == {"meta"}
    assert released.num_parameters() == 2_873_220_096
    assert released.num_parameters(exclude_embeddings=True) == 2_873_220_096 - 50304 * 3072


def test_counts_of_a_model_in_memory():
    model = tiny_model()
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    buffers = 2 * model.model.rotary_emb.inv_freq.nbytes
    assert model.get_memory_footprint() == 4 * model.num_parameters() + buffers


@pytest.mark.parametrize("target", ["auto", "layers on disk", "layers offloaded"])
def test_device_map(tmp_path, target):
    """Layers can be kept elsewhere and fetched for their turn; up-projections outside nn.Linear come along."""
    model = tiny_model("mlra_4", attn_output_gate=True)
    model.save_pretrained(tmp_path / "model")
    ids = random_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    if target == "layers offloaded":
        from accelerate import cpu_offload

        placed = cpu_offload(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.device("cpu"))
        assert placed.model.layers[1].self_attn.kv_b_proj.weight.device.type == "meta"
    else:
        device_map = "auto"
        if target == "layers on disk":
            device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        if target == "layers on disk":
            assert placed.model.layers[1].self_attn.kv_b_proj.weight.device.type == "meta"
        ids = ids.to(placed.device)
    assert torch.equal(placed.generate(ids, max_new_tokens=8, do_sample=False).cpu(), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("library", ["bitsandbytes", "quanto"])
def test_weight_only_quantization(tmp_path, library, bits):
    """Linear layers shrink; the up-projections, which the absorbed form uses as blocks, stay as they are."""
    if library == "quanto":
        if not is_optimum_quanto_available():
            pytest.skip("optimum-quanto is not installed")
        settings = QuantoConfig(weights=f"int{bits}")
    else:
        if not is_bitsandbytes_available():
            pytest.skip("bitsandbytes is not installed")
        settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
    model = tiny_model("mlra_4", **QUANTIZABLE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    model.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu").eval()
    for layer in small.model.layers:
        assert type(layer.self_attn.q_b_proj) is not torch.nn.Linear
        assert type(layer.mlp.down_proj) is not torch.nn.Linear
        assert layer.self_attn.kv_b_proj.weight.dtype == torch.float32
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert rms_ratio(model(ids).logits, small(ids).logits.float()) < {8: 0.03, 4: 0.3}[bits]
    before = decode_calls["torch"]
    tokens = small.generate(ids, max_new_tokens=8, do_sample=False)
    assert decode_calls["torch"] > before
    assert torch.equal(tokens, small.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))
    if library == "bitsandbytes":
        assert small.get_memory_footprint() < {8: 0.6, 4: 0.5}[bits] * model.get_memory_footprint()


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("name", ROPE)
def test_context_extension_as_in_llama(name, tmp_path):
    """The same rotation tables as Llama's, in prompts and token by token, and a changed result."""
    from transformers.models.llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = {"max_position_embeddings": 32, "qk_rope_head_dim": 8}
    rope = {"rope_theta": 10000.0, **ROPE[name]}
    model = tiny_model("mlra_2", rope_parameters=dict(rope), **settings)
    plain = tiny_model("mlra_2", **settings)
    llama = LlamaRotaryEmbedding(LlamaConfig(head_dim=8, max_position_embeddings=32, rope_parameters=dict(rope)))
    for length in (20, 50, 20):
        positions = torch.arange(length)[None]
        for ours, theirs in zip(
            model.model.rotary_emb(torch.zeros(1), positions), llama(torch.zeros(1), positions), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    ids = random_ids(2, 50)
    with torch.no_grad():
        assert rms_ratio(plain(ids).logits, model(ids).logits) > 0.01
    model.save_pretrained(tmp_path)
    again = MLRAForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    if name != "dynamic":  # its frequencies change as the text grows, so rows cached before differ, in Llama too
        short = ids[:, :28]
        tokens = model.generate(short, max_new_tokens=12, do_sample=False)
        assert torch.equal(tokens, model.generate(short, max_new_tokens=12, do_sample=False, use_cache=False))


def test_hidden_states():
    model = tiny_model("mlra_2")
    ids = random_ids(2, 7)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == 3
        assert all(states.shape == (2, 7, 24) for states in out.hidden_states)
        assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        decoding = model(ids[:, :1], cache=cache_of(out), output_hidden_states=True)
        assert decoding.hidden_states[1].shape == (2, 1, 24)


def test_export_of_a_forward():
    """`torch.export` with a dynamic length, without weights baked into one length."""
    model = tiny_model("mlra_2", attn_output_gate=True)
    length = torch.export.Dim("length", min=2, max=64)
    inputs = {"input_ids": random_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    program = torch.export.export(model, (), inputs | {"use_cache": False}, dynamic_shapes=shapes, strict=False)
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        exported = program.module()(input_ids=ids, attention_mask=mask, use_cache=False)
        expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(exported.logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_pipelines(converted):
    """Text generation, in a padded batch too, and feature extraction; the package's classes serve the folder."""
    folder = converted("mlra_2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MLRAForCausalLM.from_pretrained(folder)
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(generator.model) is MLRAForCausalLM
    prompts = ["Hello world", "a"]
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = [
        tokenizer.decode(
            model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0], skip_special_tokens=True
        )
        for prompt in prompts
    ]
    for batch_size in (1, 2):
        results = generator(prompts, batch_size=batch_size, **settings)
        assert [result[0]["generated_text"] for result in results] == expected
    features = pipeline("feature-extraction", model=str(folder), device="cpu")("Hello world", return_tensors=True)
    with torch.no_grad():
        states = model.model(**tokenizer("Hello world", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, states)
