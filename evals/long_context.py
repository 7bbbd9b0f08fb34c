"""Where context matters: loss by position beyond the length of training, copying, and last words, of several models.

    python -m evals.long_context --models build/compare_30m/*/final --data build/books/heldout.bin \
        --length 8192 --yarn 8 --output evals/results/long_context_30m.json

Loss by position: blocks of --length tokens as in evals.perplexity, the mean over blocks of the loss at each position,
in spans that double. --yarn FACTOR stretches the rotary embedding (YaRN, as the library computes it) without training.
Without it, positions beyond the model's context show what the plain embedding does there.
Copying: a random sequence of tokens that comes twice; how much of the second time the model puts first, and its loss,
for several lengths of which the double fits into the context of training.
Last words: --last-words takes a file of {"text": …} lines, LAMBADA as evals.local_tasks writes it, and gives how often
the last word is what the model puts first, and the perplexity of last words, as the harness's task does.

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
    parser.add_argument("--last-words", type=Path, metavar="FILE.jsonl", help="texts whose last words are predicted")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="blocks at a time")
    parser.add_argument("--published", action="store_true", help="float32 weights, bfloat16 autocast")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write results here; a rerun goes on from it")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of going on from --output")
    args = parser.parse_args(argv)
    return cli.run("evals.long_context:evaluate", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import contextlib
import copy
import json
import math
import statistics

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from evals.common import PUBLISHED_NUMERICS, Results, fingerprint, markdown_table, model_fingerprint, publish_table
from evals.corpora import read_token_file
from evals.perplexity import Blocks, token_losses
from scripts.cli import read_lines
from scripts.loading import load_model, load_tokenizer

FIRST_SPAN = 256  # tokens; each further one is as long as all before it
COPY_LENGTHS = (16, 64, 256, 1024)
TEXTS_AT_ONCE = 32


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


def read_texts(path: Path) -> list[str]:
    """The texts of a file of {"text": …} lines.

    Raises:
        UserError: for a line that is something else, or a text of one word.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: evals.local_tasks writes DIR/data/lambada_openai.jsonl")
    texts = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number} is no {{"text": …}}: {line[:80]!r}') from error
        if not isinstance(text, str) or not text.rpartition(" ")[0].strip() or text.endswith(" "):
            raise UserError(f"{path}, line {number} has no last word after others: {text!r:.80}")
        texts.append(text)
    return texts


def encode_last_word(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Tokens of a text, and how many of them are its last word's; a space belongs to the word that it precedes."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.encode(text.rpartition(" ")[0].rstrip(), add_special_tokens=False)
    return tokens, len(tokens) - len(before)


@torch.no_grad()
def last_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], published: bool, device: torch.device
) -> dict[str, float]:
    """Share of the texts whose last word is put first, token by token, and the perplexity of the last words."""
    encoded = sorted((encode_last_word(tokenizer, text) for text in texts), key=lambda pair: len(pair[0]))
    autocast = torch.autocast(device.type, torch.bfloat16) if published else contextlib.nullcontext()
    right, loss = 0, 0.0
    for first in range(0, len(encoded), TEXTS_AT_ONCE):
        batch = encoded[first : first + TEXTS_AT_ONCE]
        longest = len(batch[-1][0])
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch], device=device)
        with autocast:
            logits = model(input_ids=padded[:, :-1], use_cache=False).logits
        for row, (tokens, count), sequence in zip(logits, batch, padded, strict=True):
            last = slice(len(tokens) - count - 1, len(tokens) - 1)  # what predicts the word
            word = sequence[1:][last]
            right += bool((row[last].argmax(-1) == word).all())
            loss += torch.nn.functional.cross_entropy(row[last].float(), word, reduction="sum").item()
    return {"accuracy": right / len(texts), "perplexity": math.exp(loss / len(texts))}


def name_of(folder: Path) -> str:
    """What to call a model: its folder, or the run whose `final` it is."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def evaluate(args: argparse.Namespace) -> None:
    texts = read_texts(args.last_words) if args.last_words is not None else []
    settings = {
        "data": f"{args.data.name} {fingerprint([args.data])}" if args.data.is_file() else str(args.data),
        "length": args.length,
        "yarn": args.yarn,
        "max_tokens": args.max_tokens,
        "copies": args.copies,
        "last_words": args.last_words and f"{args.last_words.name} {fingerprint([args.last_words])}",
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
        if args.last_words is not None:
            tokenizer = load_tokenizer(folder, model.config.vocab_size)
            entry["last_words"] = last_words(model, tokenizer, texts, args.published, device)
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
        if settings["last_words"] is not None:
            row.append(cell([100 * run["last_words"]["accuracy"] for run in runs], 2))
            row.append(cell([run["last_words"]["perplexity"] for run in runs], 1))
        rows.append(row)
    header = ["model", "runs", *(f"loss {first:,}–{last:,}" for first, last in places)]
    header += [f"copied of {length}, %" for length in lengths]
    header += ["last words, %", "their perplexity"] * (settings["last_words"] is not None)
    stretch = f"YaRN by {args.yarn:g}" if args.yarn else "the rotary embedding as trained"
    contexts = " and ".join(f"{context:,}" for context in sorted({entry["context"] for entry in entries.values()}))
    publish_table(
        args.output,
        "Loss by position, and copying",
        markdown_table(header, rows),
        f"Nats per token by position in {blocks:,} blocks of {args.length:,} tokens of {args.data.name}, {stretch}; "
        f"trained on {contexts}. Copied: of a random sequence that comes twice, {args.copies} sequences of each "
        f"length. Last words: {args.last_words and args.last_words.name}. ± is the deviation over seeds. "
        f"Numerics: {settings['numerics']}.",
    )
