"""Tensor parallelism of the attention: how many ranks share latents and heads, and the style that shards them.

T ranks split the head groups first, then the branches of a group, then the heads of a latent: T = T_g * T_b * T_k, and
a rank's number is (g, b, k) read as one number in that order. So each rank keeps the cache rows of its own latents,
and one all-reduce behind the output projection sums head shards and branches at once (paper, section 3.3).

    parameter                     axes of T that split it     summed over the others
    kv_a_proj, kv_a_layernorm     g, b                        gradient over k
    kv_b_proj                     g, b, k
    q_b_proj, g_proj, o_proj      g, k                        gradient over b
    q_a_proj, q_a_layernorm,      none                        gradient over g, b, k
    k_rope_proj

In the backward pass everything inside the attention is one rank's part of a sum. What enters from outside, the hidden
states and every parameter that several ranks hold alike, gets its gradient summed over those ranks, exactly once.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

if distributed.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

STYLE = "mlra_attention"

# For the axes (groups, branches, heads of a latent): the dimension of the parameter they split, or None.
SPLIT_DIMENSIONS: dict[str, tuple[int | None, int | None, int | None]] = {
    "q_a_proj": (None, None, None),
    "q_a_layernorm": (None, None, None),
    "q_b_proj": (0, None, 0),
    "kv_a_proj": (0, 0, None),
    "k_rope_proj": (None, None, None),
    "kv_a_layernorm": (0, 0, None),
    "kv_b_proj": (0, 0, 0),
    "g_proj": (0, None, 0),
    "o_proj": (1, None, 1),
}

# The dimension of the other parameters that all ranks split, by the library's own styles.
VOCABULARY_AND_MLP = {"embed_tokens": 0, "gate_proj": 0, "up_proj": 0, "down_proj": 1, "lm_head": 0}


class TensorParallelLayout(NamedTuple):
    """The ranks per axis; their product is the tensor-parallel size.

    Args:
        groups: T_g, ranks over head groups.
        branches: T_b, ranks over the latents of one group.
        heads: T_k, ranks that keep the same latent and split its heads.
    """

    groups: int
    branches: int
    heads: int


def tensor_parallel_layout(config, size: int) -> TensorParallelLayout | None:
    """How `size` ranks share the attention, or None if they cannot: latents run out before heads are split."""
    groups, branches = config.num_head_groups, config.num_branches
    heads = config.num_attention_heads // groups
    for axes in (
        TensorParallelLayout(size, 1, 1),
        TensorParallelLayout(groups, size // groups, 1),
        TensorParallelLayout(groups, branches, size // (groups * branches)),
    ):
        total = axes.groups * axes.branches * axes.heads
        if total == size and groups % axes.groups == branches % axes.branches == heads % axes.heads == 0:
            return axes
    return None


def tensor_parallel_sizes(config) -> list[int]:
    """Every tensor-parallel size this model can be split into, 1 first."""
    most = config.num_latent_heads * config.num_attention_heads // config.num_head_groups
    return [
        size
        for size in range(1, most + 1)
        if tensor_parallel_layout(config, size) and config.intermediate_size % size == 0
    ]


def check_tensor_parallel_size(config, size: int) -> TensorParallelLayout:
    """The layout for `size` ranks.

    Raises:
        ValueError: naming what does not divide and the sizes that work.
    """
    layout = tensor_parallel_layout(config, size)
    reasons = []
    if config.intermediate_size % size:
        reasons.append(f"intermediate_size={config.intermediate_size}")
    if layout is None:
        heads = config.num_attention_heads // config.num_head_groups
        reasons.insert(0, f"{config.num_head_groups} x {config.num_branches} latents of {heads} heads")
    if reasons:
        sizes = ", ".join(map(str, tensor_parallel_sizes(config)))
        raise ValueError(f"tensor parallel size {size} cannot split {' and '.join(reasons)}; sizes that work: {sizes}")
    assert layout is not None
    return layout


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over `group`: for what its ranks hold alike but use each for a part."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOutput(torch.autograd.Function):
    """Sum over `group`; its gradient is the same on every rank and passes through."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_gradient(x: torch.Tensor, group) -> torch.Tensor:
    """`x`, its gradient summed over `group` (None: one rank, nothing to sum)."""
    if group is None or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _SumGradient.apply(x, group)


def sum_output(x: torch.Tensor, group) -> torch.Tensor:
    """`x` summed over `group`; in place where no gradient is needed."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _SumOutput.apply(x, group)
    distributed.all_reduce(x, group=group)
    return x


def gather_output(x: torch.Tensor, group) -> torch.Tensor:
    """`[M, N]` of each of the T ranks to `[M, T*N]`, without gradient."""
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # older torch
    size = distributed.get_world_size(group)
    gathered = x.new_empty(size * x.shape[0], x.shape[1])
    gather(gathered, x, group=group)
    return gathered.unflatten(0, (size, -1)).transpose(0, 1).flatten(1)


@contextlib.contextmanager
def local_parameters(module: nn.Module, group) -> Iterator[None]:
    """Let `module` see its parameters as this rank's plain tensors, their gradients summed over `group`."""
    originals = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    local: dict[str, Any] = {}
    for name, parameter in originals.items():
        local[name] = sum_gradient(local_tensor(parameter), group)
    module._parameters.update(local)
    try:
        yield
    finally:
        module._parameters.update(originals)


class _LocalShard(TensorParallelLayer):
    """One projection or norm of the attention, run on this rank's share of its parameters.

    Args:
        gradient_group: the ranks that hold the same share, or None.
        output_group: the ranks to sum the output over, or None to leave it as it is.
    """

    def __init__(self, gradient_group, output_group):
        self.gradient_group = gradient_group
        self.output_group = output_group

    def context_around_forward(self, module, mesh):
        return local_parameters(module, self.gradient_group)

    def transform_output_post_forward(self, module, output, mesh):
        return output if self.output_group is None else sum_output(output, self.output_group)


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's share of a parameter, as a plain tensor."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_sizes(attention: nn.Module) -> tuple[int, int, int]:
    """Latents, heads per latent and head groups that this rank keeps of an `MLRAAttention`."""
    config = attention.config
    latents, rows, queries = (
        local_tensor(module.weight).shape[0]
        for module in (attention.kv_a_layernorm, attention.kv_b_proj, attention.q_b_proj)
    )
    heads = rows // (latents * (config.qk_nope_head_dim + config.v_head_dim))
    return latents, heads, queries // (config.qk_head_dim * heads)


def tensor_parallel_mesh(model: nn.Module):
    """The one-dimensional device mesh that an `MLRAForCausalLM` is split over, or None."""
    weight = model.model.layers[0].self_attn.kv_b_proj.weight  # every rank keeps rows of its own
    return weight.device_mesh if isinstance(weight, DTensor) else None


def is_parallel(module: nn.Module) -> bool:
    """Whether the library's tensor parallelism, and nothing else, replaced the forward of `module`."""
    forward, installer = vars(module).get("forward"), TensorParallelLayer.install_forward
    return inspect.isfunction(forward) and forward.__qualname__.startswith(installer.__qualname__)


def plan_obstacle(model: nn.Module) -> str | None:
    """What of an `MLRAForCausalLM` is not split as `tp_plan="auto"` splits it, or None; None on one device too."""
    mesh = tensor_parallel_mesh(model)
    for name, module in model.named_modules():
        dimension = VOCABULARY_AND_MLP.get(name.rpartition(".")[2])
        if dimension is None:
            continue
        expected = None if mesh is None else (Shard(dimension),)
        if getattr(module.weight, "placements", None) != expected:
            return f"module {name!r} is not split as tp_plan='auto' splits it"
    if mesh is not None and model.config.vocab_size % mesh.size():
        return f"vocab_size={model.config.vocab_size} is not divisible by the {mesh.size()} ranks"
    return None


def is_whole_scale(module: str, name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is the scale of a whole FP8 weight, which goes with every share of it.

    Raises:
        ValueError: for the scales of blocks, inside which a share may end.
    """
    if name == "weight_scale_inv" and parameter.ndim:
        raise ValueError(
            f"{module} has scales for blocks of FP8 weights, which tensor parallelism does not split: use one scale "
            "for a weight (weight_block_size=None, as scripts.export --fp8 writes it)"
        )
    return name == "weight_scale_inv"


def _axes_of(layout: TensorParallelLayout, dimensions) -> list[tuple[int, int | None]]:
    """The axes that matter for a parameter as (ranks, dimension split): neighbours of one kind are one axis."""
    axes: list[tuple[int, int | None]] = []
    for size, dimension in zip(layout, dimensions, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == dimension:
            axes[-1] = (axes[-1][0] * size, dimension)
        else:
            axes.append((size, dimension))
    return axes


def _mesh_of(mesh, sizes: tuple[int, ...]):
    """`mesh`, one-dimensional, seen with `sizes` ranks per axis; made once per mesh and shape, as it opens groups."""
    if len(sizes) == 1:
        return mesh
    views = mesh.__dict__.setdefault("_mlra_views", {})
    if sizes not in views:
        names = tuple(f"mlra_{'x'.join(map(str, sizes))}_{axis}" for axis in range(len(sizes)))
        if mesh.mesh_dim_names is None:  # older transformers: an unnamed mesh over all processes
            views[sizes] = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=names)
        else:
            views[sizes] = mesh._unflatten(0, sizes, names)
    return views[sizes]


class MLRAAttentionParallel(TensorParallelLayer):
    """The style of a whole attention module: shards its parameters and installs what runs them."""

    def install_forward(self, module, mesh):
        layout = check_tensor_parallel_size(module.config, mesh.size())
        for name, child in module.named_children():
            axes = _axes_of(layout, SPLIT_DIMENSIONS[name])
            view = _mesh_of(mesh, tuple(size for size, _ in axes))
            placements = [Replicate() if dimension is None else Shard(dimension) for _, dimension in axes]
            if any(dimension is not None for _, dimension in axes):
                for key, parameter in child.named_parameters(recurse=False):
                    if is_whole_scale(name, key, parameter):
                        continue
                    sharded = distribute_tensor(parameter, view, placements, src_data_rank=None)
                    setattr(child, key, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
            alike = [axis for axis, (_, dimension) in enumerate(axes) if dimension is None]
            assert len(alike) <= 1
            gradient_group = view.get_group(alike[0]) if alike else None
            output_group = mesh.get_group() if name == "o_proj" else None
            _LocalShard(gradient_group, output_group).install_forward(child, mesh)
        return super().install_forward(module, mesh)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        hidden_states, *others = args
        return (sum_gradient(hidden_states, mesh.get_group()), *others), kwargs


def register_parallel_styles() -> None:
    """Make `STYLE` known to the library; a second call, or a second copy of this file, changes nothing."""
    ALL_PARALLEL_STYLES.register(STYLE, MLRAAttentionParallel())  # type: ignore[arg-type]


__all__ = ["TensorParallelLayout", "register_parallel_styles", "tensor_parallel_layout", "tensor_parallel_sizes"]
