"""Running the conversion as the command does."""

from pathlib import Path

import scripts.saved_tensors
from scripts.convert_checkpoint import main


def convert(*args) -> int:
    return main([str(arg) for arg in args])


def expect_error(capsys, folder: Path, expected: str, *args) -> None:
    """Converting must exit with 2 after one line on stderr that contains `expected`, and leave `folder` as it was."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert convert(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
    assert sorted(folder.rglob("*")) == before


class Bomb:
    """Unpickling it creates the file `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def fail_after(calls: int, error: BaseException):
    """A `save_file` that raises `error` once it has worked `calls` times."""
    count = iter(range(calls + 1))

    def save(*args, **kwargs):
        if next(count) == calls:
            raise error
        return original(*args, **kwargs)

    original = scripts.saved_tensors.save_file
    return save
