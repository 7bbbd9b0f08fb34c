"""The runs of scripts.compare_architectures: a queue that several processes share, each run finished once."""

import argparse
import gc
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from evals.common import Results, environment
from evals.corpora import read_token_file
from evals.perplexity import Blocks, document_losses, token_losses
from scripts.cli import UserError, locked
from scripts.loading import load_model
from scripts.recipe import Recipe, training_arguments
from scripts.train import train_recipe
from scripts.training_data import token_files
from scripts.training_speed import matmul_rate
from tokenization.build import end_of_text_id

# Of a run; not its speed, because runs may share a device
KEPT = ("step", "tokens", "epochs", "parameters", "flops_per_token", "curve", "heldout_curve", "heldout")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
RUN_FILE = "compare_run.json"  # in the folder of a run that is finished


def architecture_of(name: str) -> str:
    """The architecture of a run's name."""
    return name.rpartition("_seed")[0]


def heldout_documents(recipe: Recipe) -> dict[str, dict[str, list]]:
    """{corpus: summed nats and predicted tokens of each held-out document} of a trained model, as in training."""
    args = training_arguments(recipe)
    output = Path(args.output_dir)
    model = load_model(output / "final", published=True).to(args.device).eval()
    found = {}
    for path in token_files(recipe.data.heldout, recipe.data, output / "tokens", args.seed):
        tokens = read_token_file(path)
        blocks = Blocks(tokens, recipe.data.block_size, len(tokens))
        batches = token_losses(
            model, blocks, range(len(blocks)), args.per_device_eval_batch_size, args.bf16, args.device
        )
        losses = torch.cat([batch.flatten().cpu() for batch in batches]).double().numpy()
        nats, counts = document_losses(losses, np.asarray(tokens), end_of_text_id(model.config.vocab_size))
        found[path.stem] = {"nats": [round(value, 3) for value in nats.tolist()], "tokens": counts.tolist()}
    return found


def work(recipes: dict[str, Recipe], settings: dict, done: set[str], deadline: float | None) -> None:
    """Train every run that is neither `done` nor finished nor in another process's hands.

    Args:
        recipes: by name, in the order in which they are to be trained.
        deadline: time.monotonic() at which to save and stop.
    """
    last = peak = None
    for name, recipe in recipes.items():
        file = Path(recipe.training["output_dir"]) / RUN_FILE
        if name in done:
            continue
        with ExitStack() as claim:
            try:
                claim.enter_context(locked(file))
            except UserError:  # another process trains it
                continue
            results = Results(file, settings)
            if name in results.entries:
                continue
            if deadline is not None and time.monotonic() > deadline:
                return
            if last not in (None, architecture_of(name)):
                torch.compiler.reset()  # or this model's graphs count as recompilations of the last one's
            last = architecture_of(name)
            peak = peak or matmul_rate(training_arguments(recipe).device)
            result = train_recipe(recipe, resume=True, deadline=deadline, peak=peak)
            if not result["finished"]:
                return
            entry = {key: result[key] for key in KEPT} | {"documents": heldout_documents(recipe)}
            if recipe.data.tokenizer is not None:  # so that evals.downstream can take the folder
                for tokenizer_file in TOKENIZER_FILES:
                    shutil.copy(Path(recipe.data.tokenizer) / tokenizer_file, file.parent / "final")
            results.add(name, entry | {"environment": environment()})
            for checkpoint in file.parent.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            loss = next(iter(result["heldout"].values()))["loss"]
            print(f"{name}: held-out loss {loss:.4f}, {result['seconds']:.0f} s", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_workers(args: argparse.Namespace, deadline: float | None) -> int:
    """A process of this command for each of --devices; returns the largest of their exit codes."""
    command = [sys.executable, "-m", "scripts.compare_architectures", str(args.config), "--output", str(args.output)]
    command += [word for change in args.set for word in ("--set", change)]
    command += ["--only", *args.only] if args.only else []
    if deadline is not None:
        command += ["--time-budget", str(max(1, round(deadline - time.monotonic())))]
    processes = []
    try:
        for device in args.devices:
            visible = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
            processes.append(subprocess.Popen([*command, "--worker"], env=visible))
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
