"""Run the library's own common test suite for causal LMs against this package, beside Llama.

    python -m scripts.run_library_suite /path/to/transformers            # a source checkout of the installed version
    python -m scripts.run_library_suite /path/to/transformers -k generate --models mlra

The suite (`CausalLMModelTest` with its model, generation, pipeline, training and parallelism mixins) is part of the
library's repository, not of its package, so a checkout is given by path. Nothing is written to it: a temporary tree
links to its `tests` and adds `tests/library_suite/modeling_mlra_suite.py`. What is tested is the installed library.

Besides pytest it needs parameterized, pytest-rerunfailures, pytest-order, pytest-env, psutil and datasets.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from scripts import cli
from scripts.cli import UserError, positive_int

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = ROOT / "tests" / "library_suite" / "modeling_mlra_suite.py"
TEST_CLASSES = {"mlra": "MLRAModelTest", "llama": "LlamaModelTest"}


def check(args: argparse.Namespace) -> None:
    for name in ("conftest.py", "tests/causal_lm_tester.py"):
        if not (args.checkout / name).is_file():
            raise UserError(f"{args.checkout} has no {name}: give a source checkout of transformers")


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 if nothing failed for MLRA, 1 if something did, 2 for wrong arguments."""
    parser = cli.Parser("scripts.run_library_suite", __doc__)
    parser.add_argument("checkout", type=Path, help="source checkout of transformers, of the installed version")
    parser.add_argument(
        "--models", nargs="+", choices=sorted(TEST_CLASSES), default=["mlra", "llama"], help="default: both"
    )
    parser.add_argument("-k", dest="expression", help="only tests that match, as in pytest")
    parser.add_argument("-n", dest="workers", type=cli.count, default=0, help="parallel processes (pytest-xdist)")
    parser.add_argument("--timeout", type=positive_int, default=600, help="seconds per test (needs pytest-timeout)")
    parser.add_argument("--logs", type=Path, help="folder for pytest's full output and JUnit files")
    return cli.run("scripts.run_library_suite:run_suites", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

import transformers


class Outcome(NamedTuple):
    """How one test ended: "passed", "failed" or "skipped", and why."""

    state: str
    reason: str = ""


def run_suites(args: argparse.Namespace) -> int:
    """Run the suite for every model asked for; 1 if something failed for MLRA."""
    print(f"transformers {transformers.__version__}, suite of {checkout_version(args.checkout)}")

    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="library_suite_") as folder:
        tree = Path(folder)
        link_tree(args.checkout.resolve(), tree)
        logs = args.logs or tree / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for model in args.models:
            outcomes[model] = run_suite(tree, model, logs.resolve(), args)
            print(f"{model}: {summary(outcomes[model])}")
    report(outcomes)
    mlra = outcomes.get("mlra", {})
    return 1 if any(outcome.state == "failed" for outcome in mlra.values()) or not any(outcomes.values()) else 0


def checkout_version(checkout: Path) -> str:
    """The version that the checkout's `setup.py` declares, or "unknown"."""
    setup = checkout / "setup.py"
    found = re.search(r'^\s*version="([^"]+)"', setup.read_text(), re.MULTILINE) if setup.is_file() else None
    return found[1] if found else "unknown"


def link_tree(checkout: Path, tree: Path) -> None:
    """Lay out in `tree` what the suite expects around it: its tests, ours, and the installed library as the source."""
    own = ("src", "tests", "models", "mlra", ".git", "__pycache__")
    for folder in ("", "tests", "tests/models"):
        (tree / folder).mkdir(exist_ok=True)
        for entry in (checkout / folder).iterdir():
            if entry.name not in own:
                (tree / folder / entry.name).symlink_to(entry)
    (tree / "src").mkdir()
    (tree / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    subject = tree / "tests" / "models" / "mlra"
    subject.mkdir()
    (subject / "__init__.py").touch()
    (subject / "test_modeling_mlra.py").write_text(SUBJECT.read_text())


def run_suite(tree: Path, model: str, logs: Path, args: argparse.Namespace) -> dict[str, Outcome]:
    """Run one model's test class in a process of its own and read how each test ended."""
    results = logs / f"{model}.xml"
    command = [sys.executable, "-m", "pytest", f"tests/models/{model}/test_modeling_{model}.py::{TEST_CLASSES[model]}"]
    command += [f"--junitxml={results}", "-q", "-rfE", "-o", "log_cli=0", f"--timeout={args.timeout}"]
    command += ["-k", args.expression] if args.expression else []
    command += ["-n", str(args.workers)] if args.workers else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    environment.setdefault("HF_HUB_OFFLINE", "1")
    with open(logs / f"{model}.log", "w") as log:
        subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not results.is_file():
        raise RuntimeError(f"pytest did not run for {model}:\n{(logs / f'{model}.log').read_text()[-3000:]}")
    return read_outcomes(results)


def read_outcomes(results: Path) -> dict[str, Outcome]:
    """Test name to outcome, from a JUnit file; a test of several parametrizations keeps one entry for each."""
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        outcome = Outcome("passed")
        for element in case:
            if element.tag in ("failure", "error"):
                outcome = Outcome("failed", element.get("message", ""))
            elif element.tag == "skipped" and outcome.state == "passed":
                outcome = Outcome("skipped", element.get("message", ""))
        outcomes[case.get("name", "")] = outcome
    return outcomes


def summary(outcomes: dict[str, Outcome]) -> str:
    """For example "170 passed, 146 skipped, 0 failed of 316"."""
    counts = Counter(outcome.state for outcome in outcomes.values())
    return f"{counts['passed']} passed, {counts['skipped']} skipped, {counts['failed']} failed of {len(outcomes)}"


def report(outcomes: dict[str, dict[str, Outcome]]) -> None:
    """Print what failed for MLRA, and what was skipped for it but not for Llama."""
    mlra, llama = outcomes.get("mlra", {}), outcomes.get("llama")
    for name, outcome in sorted(mlra.items()):
        if outcome.state == "failed":
            print(f"FAILED {name}: {outcome.reason.splitlines()[0] if outcome.reason else ''}")
    if llama is None or not mlra:
        return
    passing = {name for name, outcome in llama.items() if outcome.state == "passed"}
    beyond = {name: outcome for name, outcome in mlra.items() if outcome.state == "skipped" and name in passing}
    print(f"skipped for MLRA where Llama passes: {len(beyond)}")
    for name, outcome in sorted(beyond.items()):
        print(f"SKIPPED {name}: {outcome.reason}")
    for name in sorted(passing - set(mlra)):
        print(f"ABSENT {name}: Llama passes it, MLRA's class has no test of that name")
