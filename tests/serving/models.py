"""Small random models in folders, their continuations by transformers, and what to ask an engine."""

import torch
from vllm import SamplingParams

from tests.models import random_ids, tiny_model

# Widths that the CPU build's kernels take, all different
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
    "vocab_size": 64,
    "tie_word_embeddings": False,  # else random weights repeat the last tokens
}
RELEASED = {  # widths of attention in the released mlra_4
    "num_attention_heads": 24,
    "q_lora_rank": 1024,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
PREFIX = random_ids(70, seed=5).tolist()
PROMPTS = [
    random_ids(1, seed=6).tolist(),
    random_ids(9, seed=7).tolist(),
    PREFIX,
    PREFIX + random_ids(3, seed=8).tolist(),
    PREFIX[:48] + random_ids(31, seed=9).tolist(),
    random_ids(135, seed=10).tolist(),
    random_ids(64, seed=11).tolist(),
]
NEW_TOKENS = 20


def saved_model(folder, variant: str = "mlra_4", **overrides):
    """A random model, also written to `folder`."""
    model = tiny_model(variant, **{**SIZES, **overrides})
    with torch.no_grad():  # large enough that attention reaches the logits, small enough that they stay apart
        for parameter in model.parameters():
            parameter.mul_(0.3)
    model.save_pretrained(folder)
    return model


def continuations(model, prompts=PROMPTS, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens of each prompt alone by transformers' `generate()`."""
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **length)[0, len(p) :].tolist() for p in prompts]


def ask(engine, prompts=PROMPTS, lora_request=None, **settings) -> list:
    """What the engine makes of all prompts at once: greedy tokens, unless told otherwise."""
    settings = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False, **settings}
    requests = [{"prompt_token_ids": p} for p in prompts]
    return engine.generate(requests, SamplingParams(**settings), use_tqdm=False, lora_request=lora_request)


def tokens(outputs) -> list[list[int]]:
    """The first continuation of each prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """`[len(ids) - 1]`: the logarithm of the probability of every token but the first, by one full forward."""
    with torch.no_grad():
        scores = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def margins(model, prompt: list[int], new: list[int]) -> torch.Tensor:
    """How far below the largest the float32 logits of these tokens lie, in their standard deviations."""
    ids = torch.tensor([prompt + new], device=model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (logits.max(-1).values - chosen) / logits.std(-1)
