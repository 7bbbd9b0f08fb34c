"""The model that a training run starts from, how it is compiled, what it makes again, and products in float8."""

import sys
from pathlib import Path

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed

from scripts.causal_attention import causal_attention
from scripts.cli import UserError
from scripts.loading import load_model
from scripts.recipe import Recipe

try:
    from torchao.float8 import convert_to_float8_training
except ImportError:
    convert_to_float8_training = None

# Of what a compiled layer keeps by default. At 2.87B no product is made again for it, and 29 % less is kept
ELEMENTWISE_BUDGET = 0.85
BACKEND = "inductor"  # of torch.compile
ZERO_AT_START = ("o_proj.weight", "down_proj.weight")


def is_checkpoint(model: str | dict) -> bool:
    """Whether a recipe's `model` is a folder to go on from."""
    return isinstance(model, str) and Path(model).is_dir()


def model_to_train(recipe: Recipe, config: PreTrainedConfig, args: TrainingArguments) -> PreTrainedModel:
    """`build_model`, with the recomputation, float8 products and compilation that the recipe asks for."""
    model = build_model(recipe, config, args.seed)
    set_recomputation(model, recipe.recompute)
    if recipe.float8:
        use_float8(model, args.device)
    if recipe.compile_layers:
        compile_layers(model)
    return model


def build_model(recipe: Recipe, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The float32 model to train: the checkpoint's, or a new one whose output projections start at zero."""
    attention = recipe.attn_implementation
    if attention == "sdpa" and config.model_type != "mlra":
        attention = causal_attention("auto")  # what MLRA has by itself: blocks are whole, and no mask is made
    if is_checkpoint(recipe.model):
        return load_model(Path(recipe.model), published=True, attn_implementation=attention)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ZERO_AT_START):
                parameter.zero_()
    return model


def set_recomputation(model: PreTrainedModel, recompute: str | None) -> None:
    """What the backward pass makes again instead of keeping: "attention_inputs" (queries, keys, values), "elementwise"
    (where compiled: norms, SwiGLU, the sum over branches, which the compiler finds under a budget), or nothing.

    Raises:
        UserError: for a model that has no such choice.
    """
    functorch_config.activation_memory_budget = ELEMENTWISE_BUDGET if recompute == "elementwise" else 1.0
    modules = [module for module in model.modules() if hasattr(module, "recompute_inputs")]
    if recompute == "attention_inputs" and not modules:
        raise UserError(
            f"recompute {recompute!r} is for models of type mlra, not {model.config.model_type}: use "
            "training.gradient_checkpointing"
        )
    for module in modules:
        module.recompute_inputs = recompute == "attention_inputs"


def compile_layers(model: PreTrainedModel, backend: str | None = None) -> None:
    """Compile the layers, all from one graph, and the loss in chunks, one graph too, when they are first called.

    Shapes are fixed: a run's blocks have one. A layer's gradients go to DDP when its backward pass ends, so that its
    graph need not be cut where DDP's buckets end.

    Raises:
        UserError: for a model whose layers are not where Llama's are.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UserError(f"compile_layers: {type(model).__name__} has no model.layers: use training.torch_compile")
    dynamo_config.optimize_ddp = False
    options = {"backend": backend or BACKEND, "dynamic": False}
    for layer in layers:
        layer.compile(**options)
    if hasattr(model, "chunked_loss"):
        model.chunked_loss = torch.compile(type(model).chunked_loss, **options)


def without_compilation(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its layers and loss as they were before `compile_layers`."""
    for module in model.modules():
        module._compiled_call_impl = None
    vars(model).pop("chunked_loss", None)
    return model


def use_float8(model: PreTrainedModel, device: torch.device) -> None:
    """Let the products of the layers' linear maps run in float8; weights, names and all else stay as they are.

    Raises:
        UserError: without torchao, a GPU that can, or a map whose sizes are multiples of 16.
    """
    if convert_to_float8_training is None:
        raise UserError("float8 needs torchao: pip install torchao")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"float8 needs a GPU of compute capability 8.9 or newer, not {device}: leave float8 out")
    left_out = set()

    def is_converted(module: torch.nn.Module, name: str) -> bool:
        if not name.startswith("model.layers."):
            return False
        if module.in_features % 16 or module.out_features % 16:
            left_out.add(f"{name.rpartition('.')[2]} ({module.in_features} x {module.out_features})")
            return False
        return True

    convert_to_float8_training(model, module_filter_fn=is_converted)
    if left_out:
        print(f"float8: no multiples of 16, so bfloat16: {', '.join(sorted(left_out))}", file=sys.stderr)
