"""Translation equivariance, measured (the paper's appendix B): positions matter only relative to each other.

    python -m evals.equivariance [--output evals/results/equivariance.json]
    python -m evals.equivariance --model DIR --dtype float32

Moving every position by the same amount must change neither attention scores nor logits, for each (L, B). Two moves
are tried: position ids that start at a later position, and padding on the left. Each is measured on

    scores   tau * (q_nope . k_nope + q_rope . k_rope) of every layer, latent and head, in the expanded form
    logits   of a whole sequence, in the expanded form
    decode   logits of the last tokens, taken one by one from the cache, in the absorbed form

as the root mean square of the change over that of the values, the largest over the moves. The control is the same
model with sinusoidal absolute positions added to its embeddings, where scores and logits must change.

Without --model, the five released architectures are measured at a reduced width and depth with random weights of a
size that lets attention decide the logits.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, check_model_folder

DTYPES = ("float64", "float32")


def check(args: argparse.Namespace) -> None:
    for folder in args.model or ():
        check_model_folder(folder)
    if args.output is not None and args.output.suffix != ".json":
        raise UserError(f"--output {args.output} must end in .json (the table is written beside it, as .md)")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.equivariance", __doc__)
    parser.add_argument(
        "--model", type=Path, nargs="+", help="model folders (default: the five architectures, reduced)"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="types to measure in")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write results here, and a table beside it")
    args = parser.parse_args(argv)
    return cli.run("evals.equivariance:evaluate", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evals.common import (
    CONFIGURATIONS,
    PUBLISHED,
    environment,
    markdown_table,
    publish_table,
    write_json,
)
from modeling_mlra import MLRACache, MLRAForCausalLM
from scripts.loading import load_model

ARCHITECTURES = {name: file for name, file in PUBLISHED["architectures"].items() if "gated" not in name}
REDUCED = {
    "vocab_size": 509,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "q_lora_rank": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTH, DECODED = 32, 4  # tokens of the sequence, and how many of them are decoded one by one
MOVES = {"shift": (1, 17, 1000), "padding": (1, 17, 100)}
PROBE = "mlra_score_probe"
MEASURES = ("scores", "logits", "decode")


@contextmanager
def recorded_scores(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Within, attention calls of the expanded form append their scores `[B, heads, T, T]`, before mask and softmax."""
    recorded: list[torch.Tensor] = []

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        scores = query @ key.transpose(2, 3) * scaling
        recorded.append(scores)
        weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
        return (weights @ value).transpose(1, 2), weights

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(PROBE, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(PROBE)
    try:
        yield recorded
    finally:
        model.set_attn_implementation(before)


def absolute_positions(positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sinusoidal embeddings `[T, d]` of `positions` `[T]`, as large as the token embeddings `like`."""
    half = like.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=like.dtype, device=like.device) / half)
    angles = positions.to(like.dtype)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    table = torch.nn.functional.pad(table, (0, like.shape[-1] - 2 * half))
    return table * math.sqrt(2) * like.pow(2).mean().sqrt()  # a sine's root mean square is 1 / sqrt(2)


@torch.no_grad()
def observe(
    model: PreTrainedModel, token_ids: torch.Tensor, shift: int, padding: int, absolute: bool
) -> dict[str, torch.Tensor]:
    """Scores, logits and decoded logits of `token_ids` `[T]`.

    Args:
        shift: what the first position id is.
        padding: how many padding tokens to put in front, masked; positions then count from the first of them.
        absolute: add absolute positions to the embeddings.
    """
    length = padding + len(token_ids)
    ids = torch.nn.functional.pad(token_ids, (padding, 0)).unsqueeze(0)
    positions = torch.arange(shift, shift + length, device=ids.device)
    mask = (torch.arange(length, device=ids.device) >= padding).long().unsqueeze(0) if padding else None
    embeddings = model.get_input_embeddings()(ids)
    if absolute:
        embeddings = embeddings + absolute_positions(positions, model.get_input_embeddings().weight)

    def forward(start: int, end: int, cache: MLRACache | None = None) -> torch.Tensor:
        return model(
            inputs_embeds=embeddings[:, start:end],
            position_ids=positions[None, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            cache=cache,
            use_cache=cache is not None,
        ).logits[0]

    with recorded_scores(model) as recorded:
        logits = forward(0, length)[padding:]
    causal = torch.ones(len(token_ids), len(token_ids), dtype=torch.bool, device=ids.device).tril()
    scores = torch.stack([layer[0, :, padding:, padding:][:, causal] for layer in recorded])

    cache = MLRACache(model.config)
    forward(0, length - DECODED, cache)
    decoded = torch.cat([forward(end - 1, end, cache) for end in range(length - DECODED + 1, length + 1)])
    return {"scores": scores, "logits": logits, "decode": decoded}


def relative_change(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return ((values - reference).double().pow(2).mean().sqrt() / reference.double().pow(2).mean().sqrt()).item()


def measure(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """{"shift", "padding", "control shift", "control padding": {measure: largest relative change over the moves}}."""
    token_ids = torch.randint(model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    changes = {}
    for control in (False, True):
        reference = observe(model, token_ids, shift=0, padding=0, absolute=control)
        for kind, moves in MOVES.items():
            moved = [
                observe(model, token_ids, absolute=control, **({"shift": 0, "padding": 0} | {kind: move}))
                for move in moves
            ]
            changes["control " * control + kind] = {
                name: max(relative_change(values[name], reference[name]) for values in moved) for name in MEASURES
            }
    return changes


def random_model(file: str) -> MLRAForCausalLM:
    """A released architecture at reduced size, with weights N(0, 1 / fan-in) and norms near 1."""
    config = AutoConfig.from_pretrained(CONFIGURATIONS / f"{file}.json", **REDUCED)
    model = MLRAForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name
            parameter.normal_(
                1.0 if is_norm else 0.0, 0.1 if is_norm else parameter.shape[-1] ** -0.5, generator=generator
            )
    return model


def evaluate(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for name in args.model or ARCHITECTURES:
        model = load_model(name, published=True) if args.model else random_model(ARCHITECTURES[name])
        if not hasattr(model.config, "num_latent_heads"):
            raise UserError(f"{name} is no MLRA model (model type {model.config.model_type})")
        label = name.resolve().name if args.model else name
        results[label] = {
            "L": model.config.num_latent_heads,
            "B": model.config.num_branches,
            "changes": {dtype: measure(model.to(device, getattr(torch, dtype))) for dtype in args.dtype},
        }
    if args.output is not None:
        write_json(args.output, {"moves": MOVES, "environment": environment(), "results": results})
    kinds = ("shift", "padding", "control shift", "control padding")
    header = ["model, L, B, type", *(f"{kind}: {name}" for kind in kinds for name in MEASURES)]
    rows = [
        [
            f"{label}, {entry['L']}, {entry['B']}, {dtype}",
            *(f"{entry['changes'][dtype][kind][name]:.1e}" for kind in kinds for name in MEASURES),
        ]
        for dtype in args.dtype
        for label, entry in results.items()
    ]
    publish_table(
        args.output,
        "Translation equivariance",
        markdown_table(header, rows),
        "Relative change (root mean square) when all positions move, the largest over the moves: `shift` moves the "
        f"position ids by {', '.join(map(str, MOVES['shift']))}; `padding` puts "
        f"{', '.join(map(str, MOVES['padding']))} padding tokens on the left. The controls add absolute positions to "
        "the embeddings. `scores` and `logits` are those of the expanded form, `decode` are logits of the absorbed "
        "form on the cache.",
    )
