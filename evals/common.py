"""What the evaluations share: the paper's numbers, results files that can be resumed, and tables."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

import modeling_mlra  # noqa: F401  registers the model with the Auto classes, so that no remote code has to be trusted
from scripts.cli import UserError, read_json

FOLDER = Path(__file__).resolve().parent
CONFIGURATIONS = FOLDER.parent / "configuration"
PUBLISHED = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
ARCHITECTURE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_latent_heads",
    "num_branches",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "attn_output_gate",
    "latent_scaling",
)
PUBLISHED_NUMERICS = "float32 weights, bfloat16 autocast"
SAMPLE_BYTES = 2**20


def paper_row(config: PreTrainedConfig, choice: str, rows: Iterable[str]) -> str | None:
    """Name of the row of a published table to print beside a model's numbers.

    Args:
        config: the model's configuration.
        choice: a row's name; "none"; or "auto" for the row of this very architecture, if the paper has one.
        rows: names of the table's rows.

    Raises:
        UserError: for a name that is no row.
    """
    rows = list(rows)
    if choice == "none":
        return None
    if choice != "auto":
        if choice not in rows:
            raise UserError(f"--paper-row {choice}: the paper's rows are {', '.join(rows)}, or auto or none")
        return choice
    for name, file in PUBLISHED["architectures"].items():
        released = AutoConfig.from_pretrained(CONFIGURATIONS / f"{file}.json")
        if name in rows and all(
            getattr(config, field, None) == getattr(released, field) for field in ARCHITECTURE_FIELDS
        ):
            return name
    return None


def fingerprint(files: Iterable[Path]) -> str:
    """A short digest of files by name, size and their first and last MiB: a change of weights or data changes it."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(size - SAMPLE_BYTES, 0))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def model_fingerprint(folder: Path) -> str:
    """`fingerprint` of a model folder's configuration and weights."""
    return fingerprint(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))


def environment() -> dict[str, str]:
    """Versions and device that a result was obtained with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}


def commit() -> str | None:
    """The checked-out commit, marked where files differ from it; None outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


class Results:
    """Results by name, kept in a JSON file from one finished entry to the next, so that a rerun goes on from there.

    Args:
        path: the file, or None to keep results in memory only.
        settings: everything that the numbers depend on. A file written with other settings is never mixed with these.
        overwrite: start over instead of going on.

    Raises:
        UserError: when the file holds results of other settings, or is no results file.
    """

    def __init__(self, path: Path | None, settings: dict, overwrite: bool = False):
        self.path, self.settings = path, settings
        self.entries: dict[str, dict] = {}
        if path is None:
            return
        if path.suffix != ".json":
            raise UserError(f"--output {path} must end in .json (the table is written beside it, as .md)")
        if overwrite or not path.exists():
            return
        try:
            stored = read_json(path)
            self.entries, found = dict(stored["results"]), dict(stored["settings"])
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no results file of this command: choose another --output") from error
        for name in settings | found:
            if settings.get(name) != found.get(name):
                raise UserError(
                    f"{path} holds results with {name} = {found.get(name)}, this run has {settings.get(name)}: "
                    "choose another --output, or --overwrite"
                )

    def add(self, name: str, entry: dict) -> None:
        """Keep one finished entry, at once."""
        self.entries[name] = entry
        if self.path is not None:
            write_json(self.path, {"settings": self.settings, "environment": environment(), "results": self.entries})


def markdown_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers, already formatted."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]

    def line(row: list[str]) -> str:
        padded = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (width + 1) + ":|" for width in widths[1:])
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])]) + "\n"


def publish_table(path: Path | None, title: str, table: str, notes: str) -> None:
    """Print a table, and write it beside the results file `path` as .md."""
    print(table, end="")
    if path is not None:
        write_text(path.with_suffix(".md"), f"# {title}\n\n{table}\n{notes}\n")
