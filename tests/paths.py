"""Where the tests' data lies."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
DEMO = REPOSITORY / "checkpoints" / "mlra_4_demo"
HELDOUT = REPOSITORY / "checkpoints" / "heldout_sample.bin"
GOLDEN_NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
