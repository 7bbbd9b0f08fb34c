"""MLRA served by vLLM: a plugin that vLLM finds by itself once this package is installed beside it.

register      this file: the entry point of the group `vllm.general_plugins`
model.py      the model with vLLM's layers, and how its weights are split
fused.py      steps that only decode, by the package's fused kernels
step.py       the package's fused step over pages
attention.py  the attention layer: its cache rows, its operator, decode and prefill
metadata.py   what one step tells the attention layers, built once per step
checks.py     what cannot be served, refused in one line
versions.py   what differs between the versions of vLLM
"""


def register() -> None:
    """Make vLLM know `MLRAForCausalLM`; called in every process that it starts, possibly more than once."""
    from vllm import ModelRegistry

    import modeling_mlra  # noqa: F401  (the Auto classes know the configuration by it)

    from .versions import split_graph_at

    ModelRegistry.register_model("MLRAForCausalLM", "mlra_vllm.model:MLRAForCausalLM")
    split_graph_at("mlra::vllm_attention")
