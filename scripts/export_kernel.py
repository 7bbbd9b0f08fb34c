"""Write the decode attention as a kernel repository, in the universal layout of the `kernels` library.

    python -m scripts.export_kernel build/mlra-latent-attention

The folder needs torch and triton alone, not this package:

    kernel = kernels.get_local_kernel(Path("build/mlra-latent-attention"))
    z = kernel.latent_attention(q_latent, q_rope, latents, k_rope, kv_end=lengths, scaling=scaling)

A model of this package decodes with it by `decode_implementation="build/mlra-latent-attention"`. The folder brings its
card, its version and its own tests, and appears whole or not at all.
"""

import argparse
import sys
from pathlib import Path

from scripts import cli
from scripts.cli import refuse_existing


def check(args: argparse.Namespace) -> None:
    refuse_existing(args.dst)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("scripts.export_kernel", __doc__)
    parser.add_argument("dst", type=Path, help="folder to create")
    return cli.run("scripts.export_kernel:export", parser.parse_args(argv), check)


if __name__ == "__main__":
    sys.exit(main())

import ast
import hashlib
import json

from evals.common import commit
from scripts.export import new_folder, remote_code_files

NAME, PACKAGE, VERSION = "mlra-latent-attention", "mlra_latent_attention", 1
ENTRY = "decode_mlra.py"
NAMESPACE = 'NAMESPACE = "mlra"'  # of the operators: a kernel repository has one of its own
INIT = '''"""Absorbed decode attention of Multi-Head Low-Rank Attention over cached latents."""

from .decode_mlra import latent_attention
from .decode_reference_mlra import reference_latent_attention

__all__ = ["latent_attention", "reference_latent_attention"]
'''
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, attention, mlra]
---

# {name}

Absorbed decode attention of Multi-Head Low-Rank Attention (arXiv 2603.02188), and of MLA and GLA: L latents, each with
H query heads, over cached rows `[c_0 ... c_(L-1) | k_rope]`. Triton on any GPU it compiles for, bulk copies on Hopper
GPUs, plain torch elsewhere. Version {version}, commit {commit}.

```python
from pathlib import Path
from kernels import get_local_kernel

kernel = get_local_kernel(Path("{name}"))
z = kernel.latent_attention(q_latent, q_rope, latents, k_rope, kv_end=lengths, scaling=scaling)
```

`kernel.latent_attention` says in its docstring what the shapes are. `pytest tests` holds it against the formula.
"""
TESTS = '''"""The kernel against the formula in float64: pytest, from the folder of the kernel repository."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "build" / "torch-universal"))
from mlra_latent_attention import latent_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]  # Triton's interpreter truncates


def formula(q_latent, q_rope, latents, k_rope, lengths, scaling):
    out = torch.zeros(q_latent.shape, dtype=torch.float64)
    batch, queries, num_latents, heads, _ = q_latent.shape
    q_latent, q_rope, latents, k_rope = (x.double().cpu() for x in (q_latent, q_rope, latents, k_rope))
    for b in range(batch):
        for t in range(queries):
            end = int(lengths[b]) - queries + t + 1
            for latent in range(num_latents):
                group = latent // (num_latents // q_rope.shape[2])
                c = latents[b, :end, latent]
                scores = q_latent[b, t, latent] @ c.T + q_rope[b, t, group] @ k_rope[b, :end].T
                out[b, t, latent] = (scores * scaling).softmax(-1) @ c
    return out


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("latents", "groups"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula(queries, latents, groups, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, queries, latents, 3, 64), (2, queries, groups, 3, 16), (2, 40, latents, 64), (2, 40, 16)
    inputs = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]
    lengths = torch.tensor([33, 5], dtype=torch.int32, device=DEVICE)
    for rows in inputs[2:]:
        for b, length in enumerate(lengths.tolist()):
            rows[b, length:] = torch.nan
    z = latent_attention(*inputs, kv_end=lengths, scaling=0.1)
    expected = formula(*inputs, lengths, 0.1)
    error = (z.double().cpu() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 5e-3)
'''


def kernel_files() -> list[Path]:
    """The files that the hook of the decode kernels imports, itself included."""
    folder = {file.name: file for file in remote_code_files()}
    found, waiting = set(), [ENTRY]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            tree = ast.parse(folder[name].read_text(encoding="utf-8"))
            imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
            waiting += [f"{node.module}.py" for node in imports]
    return [folder[name] for name in sorted(found)]


def export(args: argparse.Namespace) -> None:
    sources = {file.name: file.read_text(encoding="utf-8") for file in kernel_files()}
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:12]
    unique = f"_{PACKAGE}_{digest}"
    if sources[ENTRY].count(NAMESPACE) != 1:
        raise ValueError(f"{ENTRY} does not say {NAMESPACE}")
    sources[ENTRY] = sources[ENTRY].replace(NAMESPACE, f'NAMESPACE = "{unique}"')
    metadata = {
        "id": unique,
        "name": NAME,
        "version": VERSION,
        "license": "apache-2.0",
        "upstream": "https://arxiv.org/abs/2603.02188",
        "source": "https://arxiv.org/abs/2603.02188",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    with new_folder(args.dst) as folder:
        package = folder / "build" / "torch-universal" / PACKAGE
        package.mkdir(parents=True)
        for name, text in (sources | {"__init__.py": INIT}).items():
            (package / name).write_text(text, encoding="utf-8")
        (package.parent / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        card = CARD.format(name=NAME, version=VERSION, commit=commit())
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "tests").mkdir()
        (folder / "tests" / "test_latent_attention.py").write_text(TESTS, encoding="utf-8")
    print(f"wrote {args.dst}: {len(sources)} files of {NAME}, operators in torch.ops.{unique}")
