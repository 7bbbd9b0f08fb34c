"""vLLM's tokens and probabilities with the plugin are those of transformers, however its scheduler cuts the work."""

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode

from mlra_vllm import register
from modeling_mlra import MLRAForCausalLM
from tests.models import VARIANTS
from tests.paths import DEMO
from tests.serving.models import PROMPTS, ask, continuations, log_probabilities, saved_model, tokens


@pytest.mark.parametrize("variant, gated", [(name, False) for name in VARIANTS] + [("mlra_2", True)])
def test_greedy_tokens(variant, gated, tmp_path, start):
    """Seven prompts at once, prefilled in chunks of at most 64 tokens; then again from cached blocks of 16 rows."""
    expected = continuations(saved_model(tmp_path, variant, attn_output_gate=gated))
    engine = start(tmp_path, max_num_batched_tokens=64, max_num_seqs=8, enable_chunked_prefill=True)
    assert tokens(ask(engine)) == expected
    again = ask(engine)
    assert tokens(again) == expected
    # Whole blocks of the prompt but for its last token, which has to run
    assert [output.num_cached_tokens for output in again] == [(len(p) - 1) // 16 * 16 for p in PROMPTS]


def test_demo_checkpoint_compiled(start):
    """With torch.compile, which takes the attention of each layer for one opaque operator."""
    prompts = [[token % 4000 for token in range(17, 17 + 29 * n, 29)] for n in (3, 40, 130)]
    expected = continuations(MLRAForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval(), prompts)
    engine = start(DEMO, enforce_eager=False, max_model_len=512)
    assert engine.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
    assert tokens(ask(engine, prompts)) == expected


def test_graphs_end_at_the_attention():
    """Where vLLM compiles in pieces, as on GPUs: between them the attention runs, with lengths from the host."""
    register()
    register()
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    config.set_splitting_ops_for_v1(all2all_backend="naive")
    assert config.splitting_ops.count("mlra::vllm_attention") == 1


def test_preempted_requests_go_on(tmp_path, start):
    """Fourteen blocks hold less than half of what the prompts need."""
    expected = continuations(saved_model(tmp_path), PROMPTS, 60)
    engine = start(tmp_path, num_gpu_blocks_override=14, max_model_len=208)
    assert tokens(ask(engine, max_tokens=60)) == expected
    preemptions = next(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0


def test_log_probabilities(tmp_path, start):
    """Of prompts, and of three samples of each."""
    model = saved_model(tmp_path)
    engine = start(tmp_path, enable_prefix_caching=False)
    outputs = ask(engine, temperature=1.0, seed=3, n=3, logprobs=0, prompt_logprobs=0)
    different = 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        given = [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        assert len(output.outputs) == 3
        for sample in output.outputs:
            new = list(sample.token_ids)
            expected = log_probabilities(model, prompt + new)
            chosen = [entry[token].logprob for token, entry in zip(new, sample.logprobs, strict=True)]
            torch.testing.assert_close(torch.tensor(given + chosen), expected, rtol=1e-3, atol=1e-3)
        different += len({tuple(sample.token_ids) for sample in output.outputs})
    assert different == 3 * len(PROMPTS)


def varlen_reference(
    query, key, value, *, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
):
    """FlashAttention's varlen form in plain torch: `[T, H, D]` and `[S, H, D]`, requests one after another."""
    assert all(x.stride(-1) == 1 and x.shape[1] == out.shape[1] for x in (query, key, value, out))
    assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    for q, k, v in zip(
        query.split(cu_seqlens_q.diff().tolist()),
        key.split(cu_seqlens_k.diff().tolist()),
        value.split(cu_seqlens_k.diff().tolist()),
        strict=True,
    ):
        scores = torch.einsum("thd,shd->hts", q, k) * softmax_scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(k) - len(q) + 1)
        outputs.append(torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    out.copy_(torch.cat(outputs))


def test_prefill_by_flash_attention_in_packs(tmp_path, start, monkeypatch):
    """What FlashAttention is given, on a stand-in; requests of more than 100 rows together go apart, and of those that
    have more alone not all six heads of a group are expanded at one time."""
    monkeypatch.setattr("mlra_vllm.metadata.MAX_PACKED_ROWS", 100)
    monkeypatch.setattr("mlra_vllm.attention.MAX_EXPANDED_BYTES", 130 * 4 * (16 + 8 + 24) * 4)
    expected = continuations(saved_model(tmp_path, "mlra_2"))
    engine = start(tmp_path, max_num_batched_tokens=200)
    calls = []

    def counted(*args, **kwargs):
        calls.append((len(kwargs["cu_seqlens_q"]) - 1, args[1].shape[1]))
        varlen_reference(*args, **kwargs)

    for layer in engine.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        layer.flash = counted
    assert tokens(ask(engine)) == expected
    assert max(requests for requests, _ in calls) > 1 and {heads for _, heads in calls} == {3, 6}
