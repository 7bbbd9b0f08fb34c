"""Write a complete Hub folder: weights, config with auto_map, remote code, tokenizer, generation config, model card.

    python -m scripts.export checkpoints/mlra_4_demo build/demo
    python -m scripts.export SRC DST [--dtype bfloat16] [--license apache-2.0]

SRC is a folder that `save_pretrained` wrote, such as a training checkpoint. Its tokenizer goes along; without one, DST
gets the GPT-2 tokenizer. DST appears whole or not at all.
"""

import argparse
import copy
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

import modeling_mlra
from modeling_mlra import MLRAConfig, MLRAForCausalLM
from scripts.cli import UserError, run
from scripts.model_card import render_card
from tokenization.build import end_of_text_id, write_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_SHARD_BYTES = 10**9  # one shard is in memory while it is collected
AUTO_MAP = {
    "AutoConfig": "configuration_mlra.MLRAConfig",
    "AutoModel": "modeling_mlra.MLRAModel",
    "AutoModelForCausalLM": "modeling_mlra.MLRAForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_mlra.MLRAForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_mlra.MLRAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mlra.MLRAForTokenClassification",
}


def export_folder(
    dst: Path,
    config: MLRAConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    *,
    provenance: str,
    limits: str = "",
    released: bool = False,
    license_id: str = "unknown",
    tokenizer: Path | None = None,
    remote_code: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write everything a Hub repository of an `MLRAForCausalLM` holds into the new folder `dst`.

    Args:
        dst: a path that does not exist; it appears only when everything has been written.
        config: configuration of the model; `<|endoftext|>` of the shipped tokenizer becomes its bos, eos and pad.
        tensors: (name, tensor) pairs of the model's state dict, in any order. They are taken one at a time and at
            most one shard of them is kept in memory, so a generator can stream a model larger than memory.
        dtype: what to store them as.
        provenance: where the weights come from, a sentence for the model card.
        limits: what the model cannot do, a sentence for the card.
        released: whether the weights are the authors', so that the card may quote the numbers they published.
        license_id: the Hub's identifier of the weights' licence.
        tokenizer: folder of the model's own tokenizer (default: the shipped GPT-2 tokenizer).
        remote_code: whether the folder gets the model's code, without which it needs this package.
        max_shard_bytes: largest size of one weight file.

    Raises:
        UserError: when `dst` exists, does not fit on the disk, or `tensors` are not exactly those of the model.
    """
    shapes = parameter_shapes(config)
    end_of_text = end_of_text_id(config.vocab_size)
    config = copy.deepcopy(config)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = end_of_text
    config.architectures = ["MLRAForCausalLM"]
    if remote_code:
        config.auto_map = dict(AUTO_MAP)
    elif hasattr(config, "auto_map"):
        del config.auto_map
    config.dtype = dtype
    generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        suppress_tokens=list(range(end_of_text + 1, config.vocab_size)) or None,  # rows that only pad the embedding
    )
    total_bytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    with new_folder(dst, total_bytes) as folder:
        write_weights(folder, tensors, shapes, dtype, max_shard_bytes)
        config.to_json_file(folder / "config.json")  # save_pretrained would add one file of the code
        generation_config.save_pretrained(folder)
        for file in remote_code_files() if remote_code else ():
            shutil.copyfile(file, folder / file.name)
        if tokenizer is None:
            write_tokenizer(folder, config.vocab_size, config.max_position_embeddings)
        else:
            for name in TOKENIZER_FILES:
                shutil.copyfile(tokenizer / name, folder / name)
        card = render_card(
            config,
            dtype,
            provenance,
            released=released,
            license_id=license_id,
            limits=limits,
            remote_code=remote_code,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        for file in folder.glob("*.safetensors"):  # written readable by their owner alone
            shutil.copymode(folder / "README.md", file)


def export_model(dst: Path, model: MLRAForCausalLM, dtype: torch.dtype | None = None, **kwargs) -> None:
    """`export_folder` for a model in memory, in its own dtype unless another is given."""
    names = parameter_shapes(model.config)
    tensors = ((name, tensor) for name, tensor in model.state_dict().items() if name in names)
    export_folder(dst, model.config, tensors, dtype or model.dtype, **kwargs)


def parameter_shapes(config: MLRAConfig) -> dict[str, torch.Size]:
    """{name: shape} of what a checkpoint stores: the state dict less the tied output embedding."""
    with torch.device("meta"):
        state = MLRAForCausalLM(config).state_dict()
    tied = MLRAForCausalLM._tied_weights_keys if config.tie_word_embeddings else {}
    return {name: tensor.shape for name, tensor in state.items() if name not in tied}


def remote_code_files() -> list[Path]:
    """The modules a Hub folder ships beside its weights: every one of the package but `__init__`."""
    package = Path(modeling_mlra.__file__).parent
    return sorted(file for file in package.glob("*.py") if file.name != "__init__.py")


@contextmanager
def new_folder(dst: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling that becomes `dst` at the end, or vanishes with everything in it on any exception."""
    if dst.exists() or dst.is_symlink():
        raise UserError(f"{dst} already exists: remove it or choose another destination")
    created = [parent for parent in (dst.parent, *dst.parent.parents) if not parent.exists()]
    existing = created[-1].parent if created else dst.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(f"{dst} needs {needed_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    temporary = dst.parent / f".{dst.name}.partial-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, dst)
    except BaseException:
        shutil.rmtree(created[-1] if created else temporary, ignore_errors=True)
        raise


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors` as safetensors, with an index when they take more than one file.

    Raises:
        UserError: for a missing, repeated, unexpected or mis-shaped tensor, and for values that overflow `dtype`.
    """
    shard: dict[str, Tensor] = {}
    shards: list[Path] = []
    file_of: dict[str, Path] = {}
    total_bytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize

    def flush() -> None:
        shards.append(folder / f"shard-{len(shards)}")
        save_file(shard, shards[-1], metadata={"format": "pt"})
        file_of.update(dict.fromkeys(shard, shards[-1]))
        progress.update(sum(tensor.nbytes for tensor in shard.values()))
        shard.clear()

    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for name, tensor in tensors:
            if name not in shapes or name in file_of or name in shard:
                raise UserError(f"unexpected tensor {name}: the model has no such parameter, or it came twice")
            if tensor.shape != shapes[name]:
                raise UserError(f"{name} has shape {tuple(tensor.shape)}, the model expects {tuple(shapes[name])}")
            stored = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            if dtype == torch.float16 and not torch.isfinite(stored).all() and torch.isfinite(tensor).all():
                raise UserError(f"{name} has values too large for float16: use bfloat16")
            if shard and sum(held.nbytes for held in shard.values()) + stored.nbytes > max_shard_bytes:
                flush()
            shard[name] = stored
            del tensor, stored
        flush()
    missing = [name for name in shapes if name not in file_of]
    if missing:
        raise UserError(f"missing tensor {missing[0]} ({len(missing)} in all): the model needs it")

    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    final = {shard: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards, start=1)}
    for shard_file, name in final.items():
        shard_file.rename(folder / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: final[file] for name, file in sorted(file_of.items())},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_saved_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors called `names` from the safetensors files of a `save_pretrained` folder, one at a time."""
    wanted = set(names)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors file: give a folder that save_pretrained wrote")
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (no mapping)
                    if name in wanted:
                        yield name, stored.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or no safetensors file: {error}") from error


def export(args: argparse.Namespace) -> None:
    if not (args.src / "config.json").is_file():
        raise UserError(f"{args.src} has no config.json: give a folder that save_pretrained wrote")
    saved = json.loads((args.src / "config.json").read_text(encoding="utf-8"))
    if saved.get("model_type") != "mlra":
        raise UserError(
            f"{args.src} holds a model of type {saved.get('model_type')}; "
            "a released checkpoint goes through scripts.convert_checkpoint"
        )
    config = MLRAConfig.from_pretrained(args.src)
    export_folder(
        args.dst,
        config,
        read_saved_tensors(args.src, parameter_shapes(config)),
        DTYPES[args.dtype] if args.dtype else config.dtype or torch.float32,
        provenance=f"Exported from the checkpoint `{args.src.resolve().name}`.",
        license_id=args.license,
        tokenizer=args.src if (args.src / "tokenizer.json").is_file() else None,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__.partition("\n")[0])
    parser.add_argument("src", type=Path, help="folder that save_pretrained wrote")
    parser.add_argument("dst", type=Path, help="folder to create")
    parser.add_argument("--dtype", choices=DTYPES, help="type to store the weights as (default: as in SRC)")
    parser.add_argument("--license", default="unknown", help="Hub identifier of the weights' licence")
    return run(export, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
