"""An installed FlashAttention-3 as the library looks for one: a module and the metadata of its distribution.

The module hands every call to `scripts.flash_operators`, that is, to vLLM's operators. The library reads metadata when
it is imported, so this is for processes that begin with the folder on their path.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def write_package(folder: Path) -> Path:
    """Write it into `folder`."""
    (folder / "flash_attn_interface.py").write_text(
        '"""FlashAttention-3 by the operators in vLLM\'s wheel."""\n'
        "from scripts.flash_operators import (  # noqa: F401\n"
        "    flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, has_operators\n"
        ")\n"
        "if not has_operators():\n"
        '    raise ImportError("vLLM\'s operator library of FlashAttention-3 is not here")\n'
    )
    metadata = folder / "flash_attn_3-3.0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-3\nVersion: 3.0.0\n")
    (metadata / "top_level.txt").write_text("flash_attn_interface\n")
    return folder


def run_beside_package(folder: Path, *arguments: str, timeout: int = 300) -> subprocess.CompletedProcess:
    """`python *arguments` in a process that finds the package."""
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
        text=True, timeout=timeout,
    )  # fmt: skip
