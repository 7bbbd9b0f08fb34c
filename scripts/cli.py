"""What the command-line programs share: arguments, reading what users wrote, locks, and one line for every fault.

A program's `main` comes first in its file, before the imports of torch and transformers, which take seconds, and gives
`run` its body by name: "package.module:function". So help, a wrong argument and a missing folder answer at once.

Nothing here imports more than Python's own library.
"""

import argparse
import fcntl
import importlib
import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

EXIT_ERROR = 2  # argparse uses the same code for wrong flags
ENDING = (signal.SIGTERM, signal.SIGHUP)  # unwind as Ctrl-C does
TRACEBACK = "MLRA_TRACEBACK"  # environment variable: set, an error also shows where it came from
DTYPES = ("float32", "bfloat16", "float16")
# What the libraries raise for what they were given; anything else is a fault of this program and keeps its traceback
LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, OverflowError, MemoryError, EOFError, pickle.PickleError)


class UserError(Exception):
    """Something the user can put right; its message is one line that names the thing and what would work."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, led by its type where the message alone says little."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        return f"{type(error).__name__}: {lines[0]}"
    return " ".join(line.strip() for line in lines[:2]) if lines[0].rstrip().endswith(":") else lines[0]


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Within, whatever a library raises becomes one line that begins with `what`: where it works on users' files."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}") from error


def fail(message: object) -> int:
    """Print `message` as one line on stderr and return the exit code of errors."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return EXIT_ERROR


# Arguments


class Parser(argparse.ArgumentParser):
    """Arguments of `python -m NAME`, described by the first line of its docstring; a wrong one gets one line.

    From here on nothing that is printed can fail for the terminal's encoding: what it lacks is replaced.
    """

    def __init__(self, name: str, doc: str):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
        super().__init__(prog=f"python -m {name}", description=doc.partition("\n")[0])

    def error(self, message: str) -> NoReturn:
        self.exit(fail(f"{message} (--help lists the arguments)"))


def positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return value


def seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and {2**32 - 1}")
    return value


def positive_float(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a positive number")
    return value


def probability(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in (0, 1]")
    return value


def temperature(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be 0 or positive")
    return value


def utf8(text: str) -> str:
    """Text of an argument; bytes that the locale could not decode are read as UTF-8."""
    if text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8 text") from error


# Files that users wrote


def decode(path: Path) -> str:
    """The UTF-8 text of a file or pipe as it is there, without a byte-order mark.

    Raises:
        UserError: when there is no such file, or it is no UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_text(path: Path) -> str:
    r"""`decode`, with every line ended by "\n", as Python's text mode has it."""
    return decode(path).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 text file, which end at "\n" ("\r\n" in files of Windows) and at nothing else.

    Raises:
        UserError: as `decode`.
    """
    return [line.removesuffix("\r") for line in decode(path).removesuffix("\n").split("\n")]


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        UserError: as `decode`, and for anything else than a JSON object.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def indexed_files(index: Path) -> list[str]:
    """The names of the files that the index of a sharded checkpoint places tensors in.

    Raises:
        UserError: as `read_json`, for an index that places none, and for a file that is not there.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise UserError(f"{index} places {tensor} in {name!r}, which is no file name")
    names = sorted({Path(name).name for name in weight_map.values()})
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"missing shard {index.parent / name}: {index.name} lists it; download the folder again")
    return names


def check_model_folder(folder: Path, model_type: str | None = None, files: Iterable[str] = ()) -> None:
    """Refuse what cannot be a model folder, by its files alone.

    Args:
        model_type: what it must hold a model of.
        files: what must be there besides config.json.

    Raises:
        UserError: naming what is missing.
    """
    written = "give one that scripts.convert_checkpoint, scripts.export or save_pretrained wrote"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: {written}")
    for name in ("config.json", *files):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: {written}")
    found = read_json(folder / "config.json").get("model_type")
    if model_type is not None and found != model_type:
        raise UserError(
            f"{folder} holds a model of type {found}, not {model_type}: "
            "convert a released checkpoint with scripts.convert_checkpoint first"
        )


# Outputs


def refuse_existing(*folders: Path) -> None:
    """Raise UserError if one of the folders to create is there."""
    for folder in folders:
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder} already exists: remove it or choose another destination")


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Within, no other command writes `output`: a lock on a file beside it, which ends with the process that holds it.

    Folders above `output` are made, and removed again if nothing came into them.

    Raises:
        UserError: when another command holds it.
    """
    output = output.resolve()
    made = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(f"another command is writing {output}: wait for it, or choose another output") from error
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # whoever held it has just removed the file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break


# Running


class Signals:
    """Turns Ctrl-C and the signals of `ENDING` into exceptions that unwind, and remembers them.

    An exception is dropped where it comes inside a callback that cannot raise, and others may come of it.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.importing = False

    def __call__(self, signum: int, frame: object) -> NoReturn:
        self.received.append(signum)
        if self.importing:  # half an import raises other things later, and there is nothing to clean up
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        for number in ENDING:  # a second one must not cut the cleaning up short
            if signal.getsignal(number) is self:
                signal.signal(number, signal.SIG_IGN)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signum)


def _default_in_child() -> None:
    """A worker waiting for work may never come to run an inherited handler, and whoever ends it would hang."""
    for number in ENDING:
        if isinstance(signal.getsignal(number), Signals):
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_default_in_child)


def find(name: str) -> Callable[[argparse.Namespace], int | None]:
    """The function called "package.module:function", whose module is imported now."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def run(
    body: str | Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    check: Callable[[argparse.Namespace], None] | None = None,
    outputs: Iterable[Path | None] = (),
) -> int:
    """Run `check(args)`, then `body(args)`, and return the exit code.

    That is what the body returns or 0, or 2 after one line on stderr for a fault of the user's, or 130 after Ctrl-C,
    143 after SIGTERM and 129 after SIGHUP, which unwind alike (`Signals`), so that temporary folders are removed.

    Args:
        body: the function, or its name, "package.module:function", whose module is imported after `check`.
        check: what can be refused without the libraries.
        outputs: what the body writes, locked (`locked`) while it runs; None stands for nothing.
    """
    signals = Signals()
    # Not where a signal is to be ignored, as under nohup
    previous = {
        number: signal.signal(number, signals) for number in ENDING if signal.getsignal(number) != signal.SIG_IGN
    }
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, signals)
    try:
        if check is not None:
            check(args)
        if isinstance(body, str):
            signals.importing = True
            body = find(body)
            signals.importing = False
        with ExitStack() as locks:
            for output in outputs if is_first_process() else ():
                if output is not None:
                    locks.enter_context(locked(output))
            code = body(args)
        print(end="", flush=True)  # where there is an output: it may be closed
        if not signals.received:
            return code or 0
    except BrokenPipeError:  # whoever read our output is gone; nor must Python's own flush at exit complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        signals.received.append(signal.SIGINT)
    except Exception as error:
        if not signals.received:
            if not isinstance(error, (UserError, *LIBRARY_ERRORS)):
                raise
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            return fail(error if isinstance(error, (UserError, OSError)) else first_line(error))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print("interrupted", file=sys.stderr)
    return 128 + signals.received[0]
