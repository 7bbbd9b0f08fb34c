"""Token files of chosen contents, and commands that must refuse."""

from pathlib import Path

import numpy as np
import torch


def write_tokens(path: Path, tokens, magic=20240520, version=1, count=None) -> Path:
    """A token file written by hand, not with the code under test."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())
    return path


def random_tokens(count: int, seed: int = 0, vocab_size: int = 320) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


@torch.no_grad()
def expect_error(capsys, main, *arguments: object) -> str:
    """The single line of an error that exits with 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# ---- the protocol --------------------------------------------------------------------------------------------------


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path
