"""Run the tests that a new version of transformers can break, each version in an environment of its own.

    python -m scripts.compat                                # make compat
    python -m scripts.compat --only newest --torch newest   # nothing pinned at all, torch included (gigabytes)

Environments lie under build/compat/ and are kept for the next run, but "newest", which is made anew each time. It is
what a newcomer gets: an empty environment, `pip install .` without constraints, README's Python example and
`scripts.generate` on the demo model; then the same tests. torch is constraints.txt's unless --torch says otherwise.
Results go to evals/results/compat.md. Needs no package itself.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
import venv
from datetime import date
from pathlib import Path

from scripts import cli

REPOSITORY = Path(__file__).resolve().parents[1]
PLACE = REPOSITORY / "build" / "compat"
RESULTS = REPOSITORY / "evals" / "results" / "compat.md"
VERSIONS = ("5.17.0", "5.20.2", "5.23.0", "pinned", "newest")
SUBJECTS = (
    "cache",
    "config",
    "convert",
    "demo",
    "features",
    "forwards",
    "generate",
    "library",
    "model",
    "remote_code",
    "stepped",
)
SHOWN = ("transformers", "torch", "accelerate", "huggingface_hub", "tokenizers", "safetensors", "peft", "triton")


def run(command: list, log: Path, **settings) -> int:
    """Run a command, its output appended to `log`; the exit code."""
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        return subprocess.run(
            [*map(str, command)],
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            **settings,
        ).returncode


def constraints(version: str, torch: str, folder: Path) -> list[str]:
    """The pip options that make an environment of `version` ("pinned": as constraints.txt has it)."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    if version != "pinned":
        # what transformers itself pins must be free to follow it
        free = ("transformers", "huggingface_hub", "tokenizers", "peft", "accelerate")
        lines = [f"transformers=={version}", *(line for line in lines if not line.startswith(free))]
    if torch != "pinned":
        lines = [line for line in lines if not line.startswith(("torch", "triton"))]
    file = folder / "constraints.txt"
    file.write_text("\n".join(lines) + "\n")
    return ["--constraint", str(file)]


def install(version: str, torch: str, folder: Path, log: Path) -> str | None:
    """Make or refresh the environment in `folder`; None, or what failed."""
    if version == "newest" and folder.exists():
        shutil.rmtree(folder)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-qq"]
    pinned = [] if version == "newest" else constraints(version, torch, folder)
    if torch == "pinned" and run([*pip, "--constraint", REPOSITORY / "constraints.txt", "torch"], log):
        return "installing torch failed"
    if version == "newest":
        if run([*pip, "."], log):
            return "pip install . failed"
        if (failed := as_a_newcomer(folder, log)) is not None:
            return failed
    if run([*pip, *pinned, "--editable", ".[dev]"], log):
        return "pip install '.[dev]' failed"
    return None


def readme_example() -> str:
    """README's Python example, reading the demo model exported to build/compat/demo."""
    example = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    if example is None or '"build/mlra_4"' not in example.group(1):
        raise SystemExit("README.md has no Python example that loads build/mlra_4")
    return example.group(1).replace('"build/mlra_4"', repr(str(PLACE / "demo")))


def as_a_newcomer(folder: Path, log: Path) -> str | None:
    """What README shows, in an environment that has the package and what it depends on, and nothing else."""
    python = folder / "bin" / "python"
    shutil.rmtree(PLACE / "demo", ignore_errors=True)
    demo = REPOSITORY / "checkpoints" / "mlra_4_demo"
    steps = {
        "scripts.export": [python, "-m", "scripts.export", demo, PLACE / "demo"],
        "README's example": [python, "-P", "-c", readme_example()],
        "scripts.generate": [
            python,
            "-m",
            "scripts.generate",
            "--model",
            demo,
            "--prompt",
            "To install",
            "--seed",
            "1",
        ],
    }
    for name, command in steps.items():
        if run(command, log, timeout=900):
            return f"{name} failed"
    return None


def versions_in(folder: Path) -> dict[str, str]:
    """Versions of the packages in `SHOWN`."""
    code = f"from importlib.metadata import version\nfor name in {SHOWN!r}:\n    print(version(name))"
    result = subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, text=True)
    return dict(zip(SHOWN, result.stdout.split(), strict=False))


def test(folder: Path, log: Path, workers: int) -> str:
    """Run the tests in `folder`'s environment; pytest's closing words."""
    files = sorted(file for name in SUBJECTS for file in (REPOSITORY / "tests").glob(f"test_{name}*.py"))
    marks = ["-m", "not gpu", "-q", "-p", "no:cacheprovider", "-n", workers, "--dist", "loadfile"]
    code = run([folder / "bin" / "python", "-m", "pytest", *marks, *files], log)
    closing = re.findall(r"^=* ?(\d+ (?:passed|failed|error).*?) in [\d.]+s", log.read_text(), re.MULTILINE)
    if not closing:
        return f"pytest exited with {code}"
    return (
        closing[-1]
        if code == 0 or "failed" in closing[-1] or "error" in closing[-1]
        else f"{closing[-1]}, exit {code}"
    )


def table(rows: list[list[str]]) -> str:
    """A Markdown table of versions and results."""
    lines = [["environment", *SHOWN, "tests", "minutes"], ["---"] * (len(SHOWN) + 3), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def test_versions(options: argparse.Namespace) -> int:
    """Install and test every version asked for: 0 if all pass, else 1."""
    PLACE.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    for version in options.only:
        start = time.monotonic()
        name = version if options.torch == "pinned" else f"{version}-torch-newest"
        folder, log = PLACE / name, PLACE / f"{name}.log"
        log.unlink(missing_ok=True)
        print(f"{name}: installing", flush=True)
        result = install(version, options.torch, folder, log)
        if result is None:
            print(f"{name}: testing", flush=True)
            result = test(folder, log, options.workers)
        good = re.fullmatch(r"\d+ passed(, \d+ (skipped|deselected|warnings?|xfailed))*", result) is not None
        failed |= not good
        found = versions_in(folder)
        minutes = f"{(time.monotonic() - start) / 60:.0f}"
        rows.append([name, *(found.get(package, "-") for package in SHOWN), result, minutes])
        print(f"{name}: {result}" + ("" if good else f"; see {log.relative_to(REPOSITORY)}"), flush=True)
    print("\n" + table(rows))
    if options.only == VERSIONS:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
        )
        RESULTS.write_text(
            "# Versions of transformers\n\n"
            f"`python -m scripts.compat` (`make compat`), {date.today()}, commit {commit.stdout.strip()}, "
            f"Python {sys.version.split()[0]}, CPU. Tests of {', '.join(SUBJECTS)}.\n\n{table(rows)}"
        )
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 if every version passes, else 1."""
    parser = cli.Parser("scripts.compat", __doc__)
    parser.add_argument("--only", nargs="+", choices=VERSIONS, default=VERSIONS, metavar="VERSION")
    parser.add_argument("--torch", choices=("pinned", "newest"), default="pinned")
    parser.add_argument("--workers", type=cli.positive_int, default=2, help="test processes at a time")
    return cli.run(test_versions, parser.parse_args(arguments), outputs=[PLACE])


if __name__ == "__main__":
    sys.exit(main())
