"""Loss by position beyond the length of training, and copying, of one or several models.

    python -m evals.long_context --models build/compare_30m/*/final --data build/books/heldout.bin \
        --length 8192 --yarn 8 --output evals/results/long_context_30m.json

Loss by position: blocks of --length tokens as in evals.perplexity, the mean over blocks of the loss at each position,
in spans that double. --yarn FACTOR stretches the rotary embedding (YaRN, as the library computes it) without training.
Without it, positions beyond the model's context show what the plain embedding does there.
Copying: a random sequence of tokens that comes twice; how much of the second time the model puts first, and its loss,
for several lengths of which the double fits into the context of training.

Folders of scripts.compare_architectures, NAME_seedN/final, are shown by architecture: mean and deviation over seeds.
"""

import argparse
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, check_model_folder, positive_float, positive_int


def check(args: argparse.Namespace) -> None:
    for folder in args.models:
        check_model_folder(folder)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.long_context", __doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="DIR", help="model folders")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.bin", help="token file")
    parser.add_argument("--length", type=positive_int, default=8192, help="tokens of a block")
    parser.add_argument("--yarn", type=positive_float, metavar="FACTOR", help="stretch the rotary embedding so much")
    parser.add_argument("--max-tokens", type=positive_int, default=10**6, help="predict at most so many")
    parser.add_argument("--copies", type=positive_int, default=64, help="sequences to copy, for each length")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="blocks at a time")
    parser.add_argument("--published", action="store_true", help="float32 weights, bfloat16 autocast")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write results here; a rerun goes on from it")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of going on from --output")
    args = parser.parse_args(argv)
    return cli.run("evals.long_context:evaluate", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import copy
import statistics

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from evals.common import PUBLISHED_NUMERICS, Results, fingerprint, markdown_table, model_fingerprint, publish_table
from evals.corpora import read_token_file
from evals.perplexity import Blocks, token_losses
from scripts.loading import load_model

FIRST_SPAN = 256  # tokens; each further one is as long as all before it
COPY_LENGTHS = (16, 64, 256, 1024)


def stretched(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """The same weights with YaRN, for `factor` times the context."""
    config = copy.deepcopy(model.config)
    context = config.max_position_embeddings
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": factor,
        "original_max_position_embeddings": context,
    }
    config.max_position_embeddings = int(factor * context)
    other = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    other.load_state_dict(model.state_dict())
    return other.eval()


def spans(length: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the positions that are averaged together."""
    edges = [0, min(FIRST_SPAN, length)]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return list(zip(edges[:-1], edges[1:], strict=True))


def loss_by_position(model: PreTrainedModel, blocks: Blocks, args: argparse.Namespace, device: torch.device) -> list:
    """[first, last + 1, mean loss in nats] of each span."""
    total = torch.zeros(blocks.block_size, dtype=torch.float64)
    for losses in token_losses(model, blocks, range(len(blocks)), args.batch_size, args.published, device):
        total += losses.double().sum(dim=0).cpu()
    mean = total / len(blocks)
    return [[first, last, mean[first:last].mean().item()] for first, last in spans(blocks.block_size)]


@torch.no_grad()
def copying(model: PreTrainedModel, length: int, count: int, device: torch.device) -> dict[str, float]:
    """Share of the tokens of a repetition that are put first, and their loss; its first token is not counted.

    Args:
        length: tokens that are repeated.
        count: sequences, always the same ones.
    """
    generator = torch.Generator().manual_seed(length)
    sequences = torch.randint(model.config.vocab_size - 1, (count, length), generator=generator)  # not `<|endoftext|>`
    right, loss = 0, 0.0
    for sequence in sequences.to(device):
        logits = model(input_ids=sequence.repeat(2)[None, :-1], use_cache=False).logits[0, length:].float()
        right += (logits.argmax(-1) == sequence[1:]).sum().item()
        loss += torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").item()
    return {"accuracy": right / (count * (length - 1)), "loss": loss / (count * (length - 1))}


def name_of(folder: Path) -> str:
    """What to call a model: its folder, or the run whose `final` it is."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def evaluate(args: argparse.Namespace) -> None:
    settings = {
        "data": f"{args.data.name} {fingerprint([args.data])}" if args.data.is_file() else str(args.data),
        "length": args.length,
        "yarn": args.yarn,
        "max_tokens": args.max_tokens,
        "copies": args.copies,
        "numerics": PUBLISHED_NUMERICS if args.published else "as stored",
    }
    blocks = Blocks(read_token_file(args.data), args.length, args.max_tokens)
    if len(blocks) == 0:
        raise UserError(
            f"{args.data} or --max-tokens {args.max_tokens} is shorter than a block of {args.length} tokens"
        )
    names = [name_of(folder) for folder in args.models]
    if len(set(names)) < len(names):
        raise UserError(f"two of the models are called {next(name for name in names if names.count(name) > 1)}")
    results = Results(args.output, settings, args.overwrite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, folder in zip(names, args.models, strict=True):
        digest = model_fingerprint(folder)
        if results.entries.get(name, {}).get("model") == digest:
            print(f"{name}: already in {args.output}", file=sys.stderr)
            continue
        model = load_model(folder, args.published)
        context = model.config.max_position_embeddings
        used = blocks.tokens[: len(blocks) * args.length + 1]
        if used.max() >= model.config.vocab_size:
            raise UserError(f"{args.data} has token {used.max()}, {folder} a vocabulary of {model.config.vocab_size}")
        if args.yarn is not None:
            model = stretched(model, args.yarn)
        model = model.to(device)
        entry = {
            "model": digest,
            "context": context,
            "positions": loss_by_position(model, blocks, args, device),
            "copying": {n: copying(model, n, args.copies, device) for n in COPY_LENGTHS if 2 * n <= context},
        }
        results.add(name, entry)
    results.entries = {name: results.entries[name] for name in names}
    print_table(args, settings, results.entries, len(blocks))


def print_table(args: argparse.Namespace, settings: dict, entries: dict[str, dict], blocks: int) -> None:
    """A row for each architecture: loss by span, then how much is copied."""
    groups: dict[str, list[dict]] = {}
    for name, entry in entries.items():
        groups.setdefault(name.rpartition("_seed")[0] or name, []).append(entry)

    def cell(values: list[float], digits: int) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    places = spans(args.length)
    lengths = sorted({int(n) for entry in entries.values() for n in entry["copying"]})
    rows = []
    for name, runs in groups.items():
        row = [name, len(runs)]
        row += [cell([run["positions"][index][2] for run in runs], 4) for index in range(len(places))]
        for length in lengths:
            copied = [{int(n): value for n, value in run["copying"].items()}.get(length) for run in runs]
            row.append("" if None in copied else cell([100 * value["accuracy"] for value in copied], 1))
        rows.append(row)
    header = ["model", "runs", *(f"loss {first:,}–{last:,}" for first, last in places)]
    header += [f"copied of {length}, %" for length in lengths]
    stretch = f"YaRN by {args.yarn:g}" if args.yarn else "the rotary embedding as trained"
    contexts = " and ".join(f"{context:,}" for context in sorted({entry["context"] for entry in entries.values()}))
    publish_table(
        args.output,
        "Loss by position, and copying",
        markdown_table(header, rows),
        f"Nats per token by position in {blocks:,} blocks of {args.length:,} tokens of {args.data.name}, {stretch}; "
        f"trained on {contexts}. Copied: of a random sequence that comes twice, {args.copies} sequences of each "
        f"length. ± is the deviation over seeds. Numerics: {settings['numerics']}.",
    )
