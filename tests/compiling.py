"""What torch.compile makes of a model, without a compiler behind it."""

from collections.abc import Callable

import torch
from transformers import CompileConfig


def recording_backend() -> tuple[Callable, list]:
    """A backend that runs graphs as they are, and the list it keeps them in; graphs compiled before are forgotten."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph

    return backend, graphs


def compiled_generate(model, ids: torch.Tensor, backend: Callable, **settings) -> torch.Tensor:
    """Tokens of `generate()` whose steps over a static cache are compiled without breaks, on any device."""
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=backend)
    compile_config._compile_all_devices = True
    return model.generate(ids, cache_implementation="static", compile_config=compile_config, **settings)
