"""Small random models for tests, with weights large enough that a wrong path shows in the logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling_mlra import MLRAConfig, MLRAForCausalLM

VARIANTS = {"mla": (1, 1), "gla_2": (2, 1), "gla_4": (4, 1), "mlra_2": (4, 2), "mlra_4": (4, 4)}
"""Name -> (num_latent_heads, num_branches) of the five released attentions."""

VOCAB_SIZE = 61


def tiny_config(variant: str = "mlra_4", **overrides) -> MLRAConfig:
    """A two-layer configuration with sizes that are all different and no power of two where they need not be."""
    num_latent_heads, num_branches = VARIANTS[variant]
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_latent_heads": num_latent_heads,
        "num_branches": num_branches,
        "q_lora_rank": 10,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return MLRAConfig(**{**settings, **overrides})


def tiny_model(
    variant: str = "mlra_4", *, dtype=torch.float32, seed: int = 0, model_class=MLRAForCausalLM, **overrides
):
    """A model in eval mode; weights N(0, 0.5): with the usual 0.02 attention would not reach the logits."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(variant, **overrides)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


@contextmanager
def watched(model) -> Iterator[None]:
    """Context in which hooks look into every layer, so that all modules run."""
    hooks = [layer.mlp.register_forward_hook(lambda *_: None) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids without the padding id 0."""
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(model, new_tokens: int = 12):
    """Ids and mask of three left-padded rows, and the greedy continuation of each row alone without any cache."""
    ids, lengths = random_ids(3, 9), (5, 8, 9)
    mask = torch.zeros_like(ids)
    expected = []
    for row, length in enumerate(lengths):
        mask[row, 9 - length :] = 1
        ids[row, : 9 - length] = 0
        sequence = ids[row : row + 1, 9 - length :]
        for _ in range(new_tokens):
            with torch.no_grad():
                following = model(sequence, use_cache=False).logits[:, -1:].argmax(-1)
            sequence = torch.cat([sequence, following], dim=1)
        expected.append(sequence[0, length:])
    return ids, mask, torch.stack(expected)


def rms_ratio(reference: torch.Tensor, result: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference."""
    return ((result - reference).double().pow(2).mean().sqrt() / reference.double().pow(2).mean().sqrt()).item()
