"""Continue a prompt with an MLRA model folder, streamed to stdout; or many prompts from a file, as JSON lines.

    python -m scripts.generate --model build/mlra_4 --prompt "The capital of France is"
    python -m scripts.generate --model build/mlra_4 --prompt "Once upon" --temperature 0.8 --top-p 0.95 --seed 1
    python -m scripts.generate --model build/mlra_4 --batch-file prompts.txt > completions.jsonl
    python -m scripts.generate --model build/tuned --chat --prompt "What is a latent?"
    torchrun --nproc-per-node 4 -m scripts.generate --model build/mlra_4 --prompt "The capital of France is"

Greedy unless --temperature is above 0. Runs in bfloat16 on a CUDA device, in float32 on the CPU. Under torchrun the
model and its cache are split over the processes, and the first one prints.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from scripts import cli
from scripts.cli import UserError, blame, check_model_folder, positive_int, probability, read_lines


def check(args: argparse.Namespace) -> None:
    check_model_folder(args.model, "mlra", files=["tokenizer.json"])
    args.prompts = read_prompts(args)  # once: it may be a pipe


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompt, or the lines of the batch file that are not empty."""
    if args.prompt is not None:
        if not args.prompt:
            raise UserError("--prompt is empty: give some text, or '<|endoftext|>' to begin a new document")
        return [args.prompt]
    prompts = [line for line in read_lines(args.batch_file) if line]
    if not prompts:
        raise UserError(f"{args.batch_file} holds no prompt: write one per line")
    return prompts


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.generate", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", type=cli.utf8, help="text to continue")
    prompts.add_argument("--batch-file", type=Path, help="file with one prompt per line; prints JSON lines")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are messages, put by the model's chat template where it has one"
    )
    parser.add_argument("--batch-size", type=positive_int, default=8, help="prompts of --batch-file at a time")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, help="tokens to generate at most")
    parser.add_argument("--temperature", type=cli.temperature, default=0.0, help="0 (default) is greedy decoding")
    parser.add_argument("--top-k", type=positive_int, help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=probability, help="sample among the likeliest tokens of this total probability"
    )
    parser.add_argument("--seed", type=cli.seed, help="makes sampling repeatable")
    parser.add_argument("--device", help="e.g. cuda, cuda:1, cpu (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=cli.DTYPES, help="default: bfloat16 on cuda, else float32")
    args = parser.parse_args(argv)
    if args.temperature == 0 and (args.top_k or args.top_p):
        parser.error("--top-k and --top-p need --temperature above 0")
    return cli.run("scripts.generate:generate", args, check)


if __name__ == "__main__":
    sys.exit(main())

import torch
from torch import distributed
from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer, set_seed
from transformers.distributed import DistributedConfig

from modeling_mlra import MLRAForCausalLM
from scripts import loading
from scripts.loading import DTYPES, load_tokenizer


def choose_device(name: str | None) -> torch.device:
    """The named device, or a CUDA device if there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name; or a build without that backend
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype, or bfloat16 on CUDA devices that have it, else float32."""
    if name is not None:
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


TIMEOUT = timedelta(minutes=5)  # after which a process that stopped answering ends the others


@contextmanager
def process_group(device_name: str | None) -> Iterator[bool]:
    """Joins torchrun's processes, if it started this one; gives whether there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield False
        return
    if device_name is not None:
        raise UserError(f"--device {device_name} cannot be given under torchrun: each process has a device of its own")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield True
    finally:
        distributed.destroy_process_group()


def common_seed(seed: int | None) -> int:
    """`seed`, or one drawn by the first process: all must sample the same tokens."""
    drawn = [torch.seed() % 2**32 if seed is None else seed]
    distributed.broadcast_object_list(drawn, src=0)
    return drawn[0]


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, parallel: bool = False) -> MLRAForCausalLM:
    """The model of `folder`, ready to generate; with `parallel`, this process's share of it."""
    if parallel:
        return loading.load_model(folder, dtype=dtype, distributed_config=DistributedConfig(tp_plan="auto"))
    return loading.load_model(folder, dtype=dtype).to(device)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], model: MLRAForCausalLM, args: argparse.Namespace
) -> BatchEncoding:
    """`input_ids` and `attention_mask` [B, T], padded on the left; warns about sequences beyond the context."""
    options = {"padding": len(prompts) > 1, "return_tensors": "pt"}
    with blame(f"{args.model} cannot encode the prompt"):
        if args.chat and tokenizer.chat_template is not None:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, **options)
        else:
            batch = tokenizer(prompts, verbose=False, **options)
    length, context = batch["input_ids"].shape[1], model.config.max_position_embeddings
    if length + args.max_new_tokens > context:
        print(
            f"warning: {length} prompt tokens and {args.max_new_tokens} new ones exceed the context of {context} the "
            "model was trained with; rotary positions extrapolate badly beyond it",
            file=sys.stderr,
        )
    return batch.to(model.device)


def generate(args: argparse.Namespace) -> None:
    with process_group(args.device) as parallel:
        continue_prompts(args, args.prompts, parallel)


def continue_prompts(args: argparse.Namespace, prompts: list[str], parallel: bool) -> None:
    """Generate and print; with `parallel`, every process generates and the first prints."""
    prints = not parallel or distributed.get_rank() == 0
    device = choose_device(args.device)
    tokenizer = load_tokenizer(args.model, loading.load_config(args.model).vocab_size)
    model = load_model(args.model, device, choose_dtype(args.dtype, device), parallel)
    settings = f"{args.model} cannot generate with its settings"  # which are many, and checked where they are used
    beams = model.generation_config.num_beams or 1
    if args.prompt is not None and beams > 1:
        raise UserError(
            f"{args.model / loading.GENERATION_FILE} has num_beams = {beams}, and beams cannot be streamed: "
            "put the prompt into a --batch-file, or remove the setting"
        )
    seed = common_seed(args.seed) if parallel else args.seed
    if seed is not None:
        set_seed(seed)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0, "tokenizer": tokenizer}
    options |= {"num_return_sequences": 1, "return_dict_in_generate": False}
    if options["do_sample"]:
        options |= {"temperature": args.temperature, "top_k": args.top_k or 0, "top_p": args.top_p or 1.0}

    if args.prompt is not None:
        streamer = TextStreamer(tokenizer, skip_prompt=args.chat, skip_special_tokens=True) if prints else None
        batch = encode(tokenizer, prompts, model, args)
        with blame(settings):
            model.generate(**batch, **options, streamer=streamer)
        return
    ascii_only = (
        "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    )  # escaped in JSON, nothing is lost
    for start in range(0, len(prompts), args.batch_size):
        chunk = prompts[start : start + args.batch_size]
        batch = encode(tokenizer, chunk, model, args)
        with blame(settings):
            new_ids = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        if not prints:
            continue
        for prompt, completion in zip(chunk, tokenizer.batch_decode(new_ids, skip_special_tokens=True), strict=True):
            print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=ascii_only), flush=True)
