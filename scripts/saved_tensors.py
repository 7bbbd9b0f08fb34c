"""Weights into safetensors files, one shard in memory at a time, and out of them, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from scripts.cli import UserError
from scripts.fp8 import stored_bytes, stored_dtype
from scripts.loading import weight_files

MAX_SHARD_BYTES = 10**9  # one shard is in memory while it is collected


def finite(tensor: Tensor) -> Tensor:
    """Which values are neither NaN nor infinite."""
    return torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)


def check_values(name: str, tensor: Tensor, stored: Tensor, allow_nonfinite: bool) -> None:
    """Refuse what became infinite as it is stored and, unless `allow_nonfinite`, what was not finite before."""
    if finite(stored).all():
        return
    if finite(tensor).all():
        narrow = str(stored.dtype).removeprefix("torch.")
        raise UserError(f"{name} has values too large for {narrow}: use bfloat16")
    if not allow_nonfinite:
        raise UserError(
            f"{name} has {(~finite(tensor)).sum():,} of {tensor.numel():,} values that are NaN or "
            "infinite: --allow-nonfinite to write them all the same"
        )


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
) -> None:
    """Write `tensors` as safetensors, with an index when they take more than one file.

    Raises:
        UserError: for a missing, repeated, unexpected or mis-shaped tensor, for values that overflow `dtype`, and,
            unless `allow_nonfinite`, for NaN and infinite ones.
    """
    shard: dict[str, Tensor] = {}
    shards: list[Path] = []
    file_of: dict[str, Path] = {}
    total_bytes = stored_bytes(shapes, dtype)

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
            stored = tensor.detach().to(device="cpu", dtype=stored_dtype(name, shapes, dtype)).contiguous()
            check_values(name, tensor, stored, allow_nonfinite)
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
    """The tensors called `names` from a `save_pretrained` folder, one at a time."""
    wanted = set(names)
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                if name in wanted:
                    yield name, stored.get_tensor(name)
