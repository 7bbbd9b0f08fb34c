"""What `scripts.bench_tp` times side by side: this package's step, and the same step with what others do in it.

NAME        a released architecture by this package's kernels; of MLA also by the kernels of `MLA_KERNELS`
NAME_dcpN   the same with decode context parallelism over N ranks (`bench_tp_dcp`)
gqa         grouped-query attention of the paper's sizes (`bench_tp_gqa`)
"""

import re
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from modeling_mlra import MLRAConfig
from modeling_mlra.capture_step_mlra import runs_fused
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.decode_reference_mlra import reference_latent_attention
from modeling_mlra.step_mlra import FusedStep
from modeling_mlra.tensor_parallel_mlra import local_sizes
from scripts.bench_decode import ratio
from scripts.bench_tp_dcp import DCPStep
from scripts.bench_tp_gqa import KEY_HEADS, WIDTH, GQARows, GQAStep, build_gqa
from scripts.bench_tp_models import allocated, build, random_cache, read_config
from scripts.bench_tp_peers import DEALT, IN_TURN, LATENT, MLA_KERNELS, PeerStep
from scripts.cli import UserError

OURS = "this package"
PAGE = 64  # allocated rows are a multiple of it
MOST_CHECKED = 2**17  # cached rows of all sequences, up to which a kernel is compared with the reference


def base_of(name: str) -> tuple[str, int]:
    """The architecture of a system, and how many ranks share the tokens of a sequence."""
    found = re.fullmatch(r"(.+)_dcp(\d+)", name)
    return (found[1], int(found[2])) if found else (name, 1)


def config_of(name: str, layers: int | None) -> MLRAConfig | None:
    """None for grouped-query attention."""
    base, ranks = base_of(name)
    if base == "gqa":
        if ranks > 1:
            raise UserError(f"model {name}: gqa is timed without context parallelism")
        return None
    return read_config(base, layers)


class System:
    """A system on the ranks of a mesh.

    Args:
        name: as above.
        model: of `build_model`, which systems of one architecture may share.
        mesh: of the ranks that share the model, or None.
        sharing: of the ranks that share tokens, or None.
    """

    def __init__(self, name: str, model: Any, mesh: DeviceMesh | None, sharing: DeviceMesh | None, device):
        self.base, self.sharers = base_of(name)
        self.model, self.mesh, self.sharing, self.device = model, mesh, sharing, device
        self.size = 1 if mesh is None else mesh.size()

    @property
    def is_mla(self) -> bool:
        return self.base != "gqa" and self.model.config.num_latent_heads == 1 and self.row_width == LATENT + 64

    @property
    def layer(self) -> nn.Module:
        return self.model.model.layers[0]

    @property
    def row_width(self) -> int:
        """Numbers of a cached row of this rank."""
        if self.base == "gqa":
            return 2 * KEY_HEADS // self.size * WIDTH
        return self.latents * self.model.config.latent_head_dim + self.model.config.qk_rope_head_dim

    @property
    def latents(self) -> int:
        """In a cached row of this rank."""
        own = local_sizes(self.layer.self_attn)[0]
        return own if self.model.config.num_latent_heads == 1 else own * self.sharers

    def kernels(self) -> list[str]:
        """Attention kernels to time."""
        if self.base == "gqa":
            return [DEALT, IN_TURN]
        on_gpu = self.device.type == "cuda"
        return [
            OURS,
            *(name for name, kernel in MLA_KERNELS.items() if on_gpu and self.is_mla and not kernel.missing()),
        ]

    def capacity(self, context: int, spare: int) -> int:
        """Rows to allocate for this rank's share of `context` tokens, and `spare` more."""
        return -(-(context // self.sharers + spare) // PAGE) * PAGE

    def cache_bytes(self, batch: int, context: int, spare: int) -> int:
        rows = batch * self.capacity(context, spare) * len(self.model.model.layers)
        return rows * self.row_width * self.layer.mlp.up_proj.weight.element_size()

    def cache(self, batch: int, context: int, spare: int) -> tuple[Any, int]:
        """Random rows, and the bytes that their allocation took."""
        rows, capacity = context // self.sharers, self.capacity(context, spare)
        if self.base == "gqa":
            before = allocated(self.device)
            cache = GQARows(self.model, self.size, batch, rows, capacity, self.device)
            return cache, allocated(self.device) - before
        return random_cache(self.model, batch, rows, capacity, self.device, self.latents)

    def counters(self, batch: int, context: int) -> torch.Tensor:
        """As `FusedStep` takes them: the next token is kept by the first of those that share tokens."""
        rows = context // self.sharers
        keeps = self.sharing is None or self.sharing.get_local_rank() == 0
        counts = [rows, *[context] * batch, *[rows + keeps] * batch]
        return torch.tensor(counts, dtype=torch.int32, device=self.device)

    def step(self, cache, batch: int, context: int, kernel: str) -> FusedStep:
        """A step from `context` on.

        Raises:
            RuntimeError: where its kernels cannot run.
        """
        counters = self.counters(batch, context)
        if self.base == "gqa":
            return GQAStep(self.model, cache, counters, self.mesh, kernel == DEALT)
        if self.device.type == "cuda" and not runs_fused(self.model, batch):
            raise RuntimeError("the fused step does not run here")
        peer = None if kernel == OURS else kernel
        if self.sharing is not None:
            return DCPStep(self.model, cache, counters, self.sharing, peer)
        return FusedStep(self.model, cache, counters) if peer is None else PeerStep(self.model, cache, counters, peer)

    def attends(self, step: FusedStep):
        """The attention of a layer with its cached rows, up to whole results."""
        if type(step) is not FusedStep:
            return step.attend
        latents, heads, groups = local_sizes(self.layer.self_attn)
        config, shape = self.model.config, (step.num_tokens, 1)
        latent = step.queries.latent.view(*shape, latents, heads, config.latent_head_dim)
        rope = step.queries.rope.view(*shape, groups, heads, config.qk_rope_head_dim)

        def attend(_, rows: torch.Tensor) -> torch.Tensor:
            c, k_rope, scales = step.row_format.views(rows[:, 0], latents)
            options = {"kv_end": step.kv_end, "scaling": config.score_scaling, "scales": scales, "settled": True}
            return latent_attention(latent, rope, c, k_rope, **options, implementation=config.decode_implementation)

        return attend

    def check(self, step: FusedStep) -> float | None:
        """RMS ratio of the first layer's attention to the float32 reference over the rows of all who share tokens, or
        None where these are too many."""
        rows = step.cache.layers[0].rows[:, 0]
        if rows.shape[:2].numel() * self.sharers > MOST_CHECKED:
            return None
        if isinstance(step, GQAStep):
            step.q.normal_()
            return ratio(step.attend(self.layer, rows[:, None]), step.expected(rows[:, None]))
        step.queries.latent.normal_()
        of_heads = distributed.get_rank() if self.latents == 1 else 0  # ranks of several latents turn the same queries
        rope = torch.randn(step.queries.rope.shape, generator=torch.Generator().manual_seed(of_heads))
        step.queries.rope.copy_(rope)
        z = self.attends(step)(self.layer, rows[:, None])
        used = torch.arange(rows.shape[1], device=self.device) < step.kv_end[:, None]
        rows, used = rows.float(), used.int()
        if self.sharing is not None:
            rows, used = (self._joined(x) for x in (rows, used))
        width, latents = self.model.config.latent_head_dim, local_sizes(self.layer.self_attn)[0]
        c, k_rope = rows.split([self.latents * width, rows.shape[-1] - self.latents * width], dim=-1)
        c = c.unflatten(-1, (-1, width))
        first = 0 if latents == self.latents else self.sharing.get_local_rank() * latents
        heads = local_sizes(self.layer.self_attn)[1]
        expected = reference_latent_attention(
            step.queries.latent.float().view(len(rows), 1, latents, heads, width),
            step.queries.rope.float().view(len(rows), 1, -1, heads, k_rope.shape[-1]),
            c[:, :, first : first + latents], k_rope,
            torch.full_like(step.kv_end, rows.shape[1]), key_mask=used.bool(), scaling=self.model.config.score_scaling,
        )  # fmt: skip
        return ratio(z, expected)

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, ...]` of all who share tokens, one behind the other in S."""
        parts = [torch.empty_like(x) for _ in range(self.sharers)]
        distributed.all_gather(parts, x.contiguous(), group=self.sharing.get_group())
        return torch.cat(parts, dim=1)


def build_model(name: str, layers: int | None, mesh: DeviceMesh | None, dtype: torch.dtype, device) -> nn.Module:
    config = config_of(name, layers)
    if config is None:
        return build_gqa(1 if mesh is None else mesh.size(), layers, dtype, device)
    return build(config, mesh, dtype, device)
