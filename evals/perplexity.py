"""Perplexity of a model on corpora, by the protocol of the paper.

    python -m evals.perplexity --model DIR --data wikipedia.bin c4.bin [--published] [--output results.json]
    accelerate launch -m evals.perplexity --model DIR --data *.bin --published      # every device takes its share

Protocol. A corpus is one stream of N tokens, documents following each other without a break. Block k holds the T
tokens x = tokens[kT : kT + T] and predicts y = tokens[kT + 1 : kT + T + 1], so every prediction sees its block only
and the last target of a block is the first token of the next. There are floor((N - 1) / T) whole blocks, of which at
most floor(max_tokens / T) are used; what is left over is dropped. Loss is the mean over all predicted tokens of their
negative log likelihood in nats, perplexity its exponential. With T = 2048 and 10^8 tokens these are the 48,828 blocks
that the published numbers average over.

--published computes as the published numbers were: float32 weights under bfloat16 autocast. Otherwise the model runs
in the type it is stored in. A corpus is a token file, a text file, or dataset:PATH (see evals.corpora). With --output
a rerun goes on after the last finished corpus, and a Markdown table is written beside the JSON file.

--cache-rows FORMAT predicts as decoding does, from the rows of a latent cache: the first token of a block, then chunks
of 256, whose own rows are read from the cache too. "plain" and "fp8" then differ by what eight bits cost.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, check_model_folder, positive_int

CACHE_ROWS = "plain", "fp8"
CHUNK = 256  # tokens predicted at once from cached rows


def check(args: argparse.Namespace) -> None:
    check_model_folder(args.model)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("evals.perplexity", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", nargs="+", required=True, help="token files, text files, dataset:PATH[,name=…]")
    parser.add_argument(
        "--published", action="store_true", help="numerics of the paper: float32 weights, bfloat16 autocast"
    )
    parser.add_argument("--cache-rows", choices=CACHE_ROWS, help="predict from cached rows of this format")
    parser.add_argument("--batch-size", type=positive_int, default=6, help="blocks at a time on each device")
    parser.add_argument("--block-size", type=positive_int, help="tokens per block (default: the context, up to 2048)")
    parser.add_argument("--max-tokens", type=positive_int, default=10**8, help="predict at most so many per corpus")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write results here; a rerun goes on from it")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of going on from --output")
    parser.add_argument("--paper-row", default="auto", help="row of the paper to print beside, or auto or none")
    args = parser.parse_args(argv)
    return cli.run("evals.perplexity:evaluate", args, check, outputs=[args.output])


if __name__ == "__main__":
    sys.exit(main())

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from evals.common import (
    PUBLISHED,
    PUBLISHED_NUMERICS,
    Results,
    markdown_table,
    model_fingerprint,
    paper_row,
    publish_table,
)
from evals.corpora import Corpus, encode_up_to, find_corpora, read_token_file
from modeling_mlra import MLRACache
from scripts.loading import load_config, load_model, load_tokenizer

TABLE = PUBLISHED["perplexity"]
LARGEST_LOSS = 700  # nats: the exponential of more is no float64


@dataclass(frozen=True)
class Blocks:
    """The whole blocks of a token stream that are evaluated.

    Args:
        tokens: `[N]`.
        block_size: T.
        max_tokens: predict at most so many tokens.
    """

    tokens: np.ndarray
    block_size: int
    max_tokens: int

    def __len__(self) -> int:
        return min((len(self.tokens) - 1) // self.block_size, self.max_tokens // self.block_size)

    def __getitem__(self, index: int) -> np.ndarray:
        """T + 1 tokens: the inputs are all but the last, the targets all but the first."""
        start = index * self.block_size
        return self.tokens[start : start + self.block_size + 1]

    def batches(self, indices: range, batch_size: int) -> Iterator[torch.Tensor]:
        """Blocks of `indices`, int64 `[at most batch_size, T + 1]`."""
        for first in range(0, len(indices), batch_size):
            yield torch.from_numpy(
                np.stack([self[index].astype(np.int64) for index in indices[first : first + batch_size]])
            )


def read_blocks(corpus: Corpus, args: argparse.Namespace, config: PreTrainedConfig) -> Blocks:
    """The blocks of a corpus, checked against the model's vocabulary.

    Raises:
        UserError: when the corpus cannot be read, is shorter than a block, or has tokens the model does not know.
    """
    if corpus.is_token_file:
        tokens = read_token_file(Path(corpus.source))
    else:
        tokenizer = load_tokenizer(args.model, config.vocab_size)
        tokens = encode_up_to(tokenizer, corpus.documents(), args.max_tokens + 1)
    blocks = Blocks(tokens, args.block_size, args.max_tokens)
    if len(blocks) == 0:
        raise UserError(
            f"{corpus.source} has {len(tokens)} tokens, one block needs {args.block_size + 1}: "
            "use a longer corpus or a smaller --block-size"
        )
    used = tokens[: len(blocks) * args.block_size + 1]
    if used.max() >= config.vocab_size:
        position = int(np.argmax(used >= config.vocab_size))
        raise UserError(
            f"{corpus.source} has token {used[position]} at position {position}, outside the model's vocabulary of "
            f"{config.vocab_size}: it was made with another tokenizer"
        )
    return blocks


def logits_from_cache(model: PreTrainedModel, token_ids: torch.Tensor, row_format: str) -> torch.Tensor:
    """Logits `[B, T, vocab]` of `token_ids` `[B, T]`, every one from rows that a cache of this format gave back."""
    cache = MLRACache(model.config, row_format=row_format)
    # A prompt attends to its own latents, not to its rows; of one token that is next to nothing
    parts = token_ids[:, :1], *token_ids[:, 1:].split(CHUNK, dim=1)
    return torch.cat([model(input_ids=part, cache=cache).logits for part in parts if part.numel()], dim=1)


@torch.no_grad()
def token_losses(
    model: PreTrainedModel,
    blocks: Blocks,
    indices: range,
    batch_size: int,
    published: bool,
    device: torch.device,
    cache_rows: str | None = None,
) -> Iterator[torch.Tensor]:
    """Negative log likelihoods in nats of the targets of blocks `indices`, float32 `[at most batch_size, T]` a batch.

    Args:
        published: bfloat16 autocast over float32 weights; else in the type of the weights.
        cache_rows: format of the cached rows to predict from, by default none.
    """
    autocast = torch.autocast(device.type, torch.bfloat16) if published else contextlib.nullcontext()
    for batch in blocks.batches(indices, batch_size):
        batch = batch.to(device)
        with autocast:
            if cache_rows is None:
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # [B, T, vocab]
            else:
                logits = logits_from_cache(model, batch[:, :-1], cache_rows)
        yield torch.stack(  # one sequence at a time: float32 logits are large
            [
                torch.nn.functional.cross_entropy(sequence.float(), targets, reduction="none")
                for sequence, targets in zip(logits, batch[:, 1:], strict=True)
            ]
        )


def total_loss(
    model: PreTrainedModel,
    blocks: Blocks,
    batch_size: int,
    published: bool,
    state: PartialState,
    name: str,
    cache_rows: str | None = None,
) -> tuple[float, int]:
    """Summed negative log likelihood in nats over all processes, and how many tokens it is summed over.

    Process p of P evaluates blocks p, p + P, p + 2P, …; sums are kept in float64. `cache_rows` as in
    `token_losses`.
    """
    indices = range(state.process_index, len(blocks), state.num_processes)
    total = torch.zeros((), dtype=torch.float64)
    with tqdm(
        total=len(indices) * blocks.block_size,
        desc=name,
        unit=" tokens",
        unit_scale=True,
        disable=not state.is_main_process,
    ) as progress:
        done = 0
        for losses in token_losses(model, blocks, indices, batch_size, published, state.device, cache_rows):
            total += losses.double().sum().cpu()
            done += losses.numel()
            progress.update(losses.numel())
            progress.set_postfix(perplexity=f"{math.exp(min(total.item() / done, LARGEST_LOSS)):.3f}", refresh=False)
    sums = torch.tensor([total.item(), done], dtype=torch.float64, device=state.device)
    if state.num_processes > 1:
        sums = reduce(sums, reduction="sum")
    return sums[0].item(), int(sums[1].item())


def document_losses(losses: np.ndarray, tokens: np.ndarray, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses by document: summed nats, float64 `[D]`, and predicted tokens, int64 `[D]`.

    A document begins with `<|endoftext|>`, whose prediction is counted with it; text before the first is one as well.

    Args:
        losses: of tokens 1 … N, nats `[N]`.
        tokens: `[N + 1]`.
        end_of_text: id of the token that begins a document.
    """
    document = np.cumsum(tokens[: len(losses) + 1] == end_of_text)
    document = document[1:] - document[0]
    return np.bincount(document, weights=losses), np.bincount(document)


def evaluate(args: argparse.Namespace) -> None:
    config = load_config(args.model)
    context = config.max_position_embeddings
    args.block_size = args.block_size or min(context, 2048)
    if args.block_size > context:
        raise UserError(f"--block-size {args.block_size} is more than the model's context of {context} tokens")
    if args.max_tokens < args.block_size:
        raise UserError(f"--max-tokens {args.max_tokens} is less than one block of {args.block_size}")
    if args.cache_rows is not None and config.model_type != "mlra":
        raise UserError(f"--cache-rows is for models of type 'mlra', not {config.model_type!r}, as {args.model} is")
    row = paper_row(config, args.paper_row, TABLE["rows"])
    corpora = {corpus.name: corpus for corpus in find_corpora(args.data)}
    for corpus in corpora.values():
        if corpus.is_token_file:
            read_blocks(corpus, args, config)
        elif next(corpus.documents(), None) is None:
            raise UserError(f"{corpus.source} has no text")

    settings = {
        "model": args.model.resolve().name,
        "model_fingerprint": model_fingerprint(args.model),
        "numerics": PUBLISHED_NUMERICS if args.published else "as stored",
        "block_size": args.block_size,
        "max_tokens": args.max_tokens,
        **({} if args.cache_rows is None else {"cache_rows": args.cache_rows}),
    }
    results = Results(args.output, settings, args.overwrite)
    state = PartialState(cpu=not torch.accelerator.is_available())
    todo = [[name for name in corpora if name not in results.entries]]
    if state.num_processes > 1:
        broadcast_object_list(todo)
    for name in (name for name in corpora if name in results.entries):
        if results.entries[name]["source"] != corpora[name].identity():
            raise UserError(
                f"{args.output} has {name} from {results.entries[name]['source']}, not {corpora[name].identity()}: "
                "choose another --output, or --overwrite"
            )
        print(f"{name}: already in {args.output}", file=sys.stderr)

    model = load_model(args.model, args.published).to(state.device) if todo[0] else None
    for name in todo[0]:
        blocks = read_blocks(corpora[name], args, config)
        try:
            loss, tokens = total_loss(
                model, blocks, args.batch_size, args.published, state, name, cache_rows=args.cache_rows
            )
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(f"out of memory with --batch-size {args.batch_size}: use a smaller one") from error
        mean = loss / tokens
        if not mean < LARGEST_LOSS:
            raise UserError(f"{name}: the mean loss is {mean}; check the weights of {args.model}")
        if state.is_main_process:
            source = corpora[name].identity()
            results.add(name, {"source": source, "tokens": tokens, "loss": mean, "perplexity": math.exp(mean)})
    if state.is_main_process:
        print_table(args, settings, results, [*corpora], row)
    if state.num_processes > 1:
        state.destroy_process_group()


def print_table(args: argparse.Namespace, settings: dict, results: Results, names: list[str], row: str | None) -> None:
    """The model's perplexities, the paper's row below them; averages where all seven corpora are there."""
    columns = sorted(names, key=lambda name: TABLE["columns"].index(name) if name in TABLE["columns"] else 99)
    complete = set(columns) == set(TABLE["columns"])
    values = [results.entries[name]["perplexity"] for name in columns]
    rows = [[settings["model"], *(f"{value:.3f}" for value in values)]]
    if complete:
        rows[0].append(f"{sum(values) / len(values):.3f}")
    if row is not None and set(columns) & set(TABLE["columns"]):
        published = dict(zip(TABLE["columns"], TABLE["rows"][row], strict=True))
        rows.append([f"paper, {row}", *(f"{published[name]:.3f}" if name in published else "" for name in columns)])
        if complete:
            rows[1].append(f"{TABLE['average'][row]:.3f}")
    of_rows = f", from {args.cache_rows} cached rows" if args.cache_rows else ""
    tokens = ", ".join(f"{name} {results.entries[name]['tokens']:,}" for name in columns)
    publish_table(
        args.output,
        "Perplexity",
        markdown_table(["perplexity", *columns, *(["average"] if complete else [])], rows),
        f"Blocks of {args.block_size} tokens; numerics: {settings['numerics']}{of_rows}. Predicted tokens: {tokens}."
        + (f" Paper: {PUBLISHED['source']}." if len(rows) > 1 else ""),
    )
