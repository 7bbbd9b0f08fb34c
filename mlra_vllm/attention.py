"""The attention layer: one row [c_0 ... c_{L-1} | k_rope] per token in the paged cache, read by decode and prefill.

Shapes: T tokens of the batch, S cached rows, L latents that this rank keeps in G groups of C branches, H query heads
per group, R latent width, N / E / V widths of a head's positionless key, RoPE key and value. A query head is
`[q_rope | q_nope]`, E before N: a head's rows of the up-projection give its key's N and its value's V in one product,
which then lie side by side behind the RoPE key.
"""

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from modeling_mlra.attention_mlra import MAX_EXPANDED_BYTES, absorbed_attention
from modeling_mlra.masks_mlra import CacheRows
from modeling_mlra.rows_mlra import RowFormat

from .metadata import MAX_PACKED_ROWS, MLRABackend, MLRAMetadata, Pack
from .versions import flash_attention


class MLRACacheAttention(nn.Module, AttentionLayerBase):
    """Attention of one layer over vLLM's cache.

    Args:
        vllm_config: the engine's settings.
        num_latents, branches: L latents that this rank keeps, C of them for each head.
        alpha: factor behind the sum of a head's branches (paper, eq. 8).
        prefix: name of the layer; the operator finds it by that.
    """

    supports_dcp = False

    def __init__(self, vllm_config: VllmConfig, num_latents: int, branches: int, alpha: float, prefix: str):
        super().__init__()
        config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        self.layer_name = prefix
        self.num_latents, self.branches, self.alpha = num_latents, branches, alpha
        self.nope_dim, self.v_dim, self.scaling = config.qk_nope_head_dim, config.v_head_dim, config.score_scaling
        self.implementation = config.decode_implementation
        self.cache_dtype_name = cache.cache_dtype
        dtype, name = vllm_config.model_config.dtype, None
        if cache.cache_dtype == "fp8":
            name = "fp8"
        elif cache.cache_dtype != "auto":
            dtype, name = getattr(torch, cache.cache_dtype), "plain"
        self.row_format = RowFormat.of_config(config, num_latents, dtype, name)
        self.flash = flash_attention(config.qk_head_dim, config.v_head_dim)
        if dtype == torch.float32:
            self.flash = None
        self.max_rows = max(MAX_PACKED_ROWS, vllm_config.model_config.max_model_len)
        self.kv_cache = torch.tensor([])  # the worker puts the cache here
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two attention layers are named {prefix!r}")
        layers[prefix] = self

    def get_attn_backend(self) -> type[MLRABackend]:
        return MLRABackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        """One row per token, in the row format's elements."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.row_format.width,
            dtype=self.row_format.element,
            cache_dtype_str=self.cache_dtype_name,
        )

    @property
    def pool(self) -> torch.Tensor:
        """`[pages * page_size, width]`, the rows of all pages."""
        return self.kv_cache.view(-1, self.row_format.width)

    @property
    def page_size(self) -> int:
        return self.kv_cache.shape[-2]

    def forward(self, query: torch.Tensor, rows: torch.Tensor, kv_b_weight: torch.Tensor) -> torch.Tensor:
        """Head outputs `[T, G*H, V]`.

        Args:
            query: `[T, G*H, E+N]`, RoPE applied.
            rows: `[T, width]`, the new tokens' latents and RoPE keys, RoPE applied, joined by the row format.
            kv_b_weight: `[L*H*(N+V), R]`, this rank's latent up-projection.
        """
        output = query.new_empty(self.branches, *query.shape[:2], self.v_dim)
        torch.ops.mlra.vllm_attention(query, rows, kv_b_weight, output, self.layer_name)
        # Out here the compiler reads every branch once, and does the sum with whatever follows
        total = output.to(torch.promote_types(output.dtype, torch.float32)).sum(0) * self.alpha
        return total.to(output.dtype)

    def attend(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        kv_b_weight: torch.Tensor,
        output: torch.Tensor,
        metadata: MLRAMetadata | None,
    ) -> None:
        """Write the new rows to the cache and fill `output` `[C, T, G*H, V]`, whose sum over C, scaled by alpha, is
        the result; without metadata (profiling) claim what that needs."""
        if metadata is None:
            self._claim_workspace(query)
            output.zero_()
            return
        pool = self.pool
        slots = metadata.slot_mapping
        # Padding goes to row 0, in the block that vLLM gives to no request
        pool.index_copy_(0, slots.clamp(min=0), rows[: len(slots)].to(pool.dtype))
        if decodes := len(metadata.seq_lens):
            output[0, :decodes] = self._decode(query[:decodes], kv_b_weight, pool, metadata)
            output[1:, :decodes] = 0
        for pack in metadata.packs:
            of_pack = rows[pack.tokens] if pack.rows is None else pool[pack.rows]
            self._prefill(query[pack.tokens], of_pack, kv_b_weight, output[:, pack.tokens], pack)

    def _decode(self, query, kv_b_weight, pool, metadata: MLRAMetadata) -> torch.Tensor:
        """Absorbed, straight from the pages: one new token `[M, G*H, E+N]` of each request, its branches' sum."""
        q_rope, q_nope = query.unsqueeze(1).split([self.row_format.rope, self.nope_dim], dim=-1)
        latents, k_rope, scales = self.row_format.views(pool, self.num_latents)
        rows = CacheRows(metadata.seq_lens, row_table=metadata.block_table, page_size=self.page_size)
        output, _ = absorbed_attention(
            self,
            q_nope,
            q_rope,
            latents,
            k_rope,
            kv_b_weight,
            rows,
            no_mask,
            nope_dim=self.nope_dim,
            v_dim=self.v_dim,
            scaling=self.scaling,
            alpha=1.0,
            implementation=self.implementation,
            scales=scales,
        )
        return output.squeeze(1)

    def decode_nothing(self, kv_b_weight: torch.Tensor, metadata: MLRAMetadata) -> None:
        """As many requests as `metadata` has decode queries of zeros, for what that runs to be compiled."""
        heads = kv_b_weight.shape[0] // (self.nope_dim + self.v_dim) // self.branches
        query = kv_b_weight.new_zeros(len(metadata.seq_lens), heads, self.row_format.rope + self.nope_dim)
        self._decode(query, kv_b_weight, self.pool, metadata)

    def _prefill(self, query, rows, kv_b_weight, output, pack: Pack) -> None:
        """Expanded, one latent after another: new tokens of the requests of a pack.

        Args:
            query: `[T, G*H, E+N]`.
            rows: `[S, width]`, the requests' rows, those of the new tokens included.
            output: `[C, T, G*H, V]`, filled.
        """
        kept, k_rope = self.row_format.split(rows)
        latents = self.row_format.read(kept).to(query.dtype).unflatten(-1, (self.num_latents, -1))  # [S, L, R]
        weight = kv_b_weight.view(self.num_latents, -1, self.nope_dim + self.v_dim, latents.shape[-1])
        rope, heads_per_group = k_rope.shape[-1], weight.shape[1]
        step = self._heads_at_once(len(rows), heads_per_group, query)
        expanded = query.new_empty(len(rows), step, query.shape[-1] + self.v_dim)  # [k_rope | k_nope | value]
        expanded[..., :rope] = k_rope.unsqueeze(1)
        for first in range(0, heads_per_group, step):
            for latent, c in enumerate(latents.unbind(1)):
                group, branch = divmod(latent, self.branches)
                part = weight[latent, first : first + step]  # [h, N+V, R]
                given = expanded[:, : len(part)]
                torch.bmm(c.expand(len(part), -1, -1), part.mT, out=given[..., rope:].transpose(0, 1))
                key, value = given.split([query.shape[-1], self.v_dim], dim=-1)
                heads = slice(group * heads_per_group + first, group * heads_per_group + first + len(part))
                self._attend_causally(query[:, heads], key, value, output[branch, :, heads], pack)

    def _attend_causally(self, query, key, value, output, pack: Pack) -> None:
        """Of `[T, h, E+N]`, `[S, h, E+N]` and `[S, h, V]`, requests one after another, into `[T, h, V]`."""
        if self.flash is None:
            packed_sdpa(query, key, value, output, pack, self.scaling)
            return
        self.flash(
            query,
            key,
            value,
            out=output,
            cu_seqlens_q=pack.query_starts,
            cu_seqlens_k=pack.key_starts,
            max_seqlen_q=max(pack.query_lengths),
            max_seqlen_k=max(pack.key_lengths),
            softmax_scale=self.scaling,
            causal=True,
        )

    def _heads_at_once(self, rows: int, heads: int, query: torch.Tensor) -> int:
        """How many of a group's `heads` have keys and values of so many rows expanded at one time."""
        per_head = rows * (query.shape[-1] + self.v_dim) * query.element_size()
        return min(max(MAX_EXPANDED_BYTES // per_head, 1), heads)

    def _claim_workspace(self, query: torch.Tensor) -> None:
        """Allocate and free what the largest prefill takes, so that vLLM leaves room for it beside the cache."""
        heads = query.shape[1] * self.branches // self.num_latents
        numbers = self.max_rows * 2 * self.row_format.width  # gathered rows, converted
        if self.row_format.scales:  # on the way to be latents, in float32 twice
            numbers += self.max_rows * self.row_format.latents * 8 // query.element_size()
        numbers += self._heads_at_once(self.max_rows, heads, query) * self.max_rows * (query.shape[-1] + self.v_dim)
        torch.empty(numbers, dtype=query.dtype, device=query.device)


def packed_sdpa(query, key, value, output, pack: Pack, scaling: float) -> None:
    """Causal attention of each request of a pack by torch: of `[T or S, h, D]`, into `[T, h, V]`."""
    parts = (query.split(pack.query_lengths), key.split(pack.key_lengths), value.split(pack.key_lengths))
    for q, k, v, out in zip(*parts, output.split(pack.query_lengths), strict=True):
        mask = None if len(q) == len(k) else causal_lower_right(len(q), len(k))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        given = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        out.copy_(given[0].transpose(0, 1))


def no_mask(*args, **kwargs):
    raise AssertionError("rows are given by block table, never by a mask")


@maybe_transfer_kv_layer
def vllm_attention(
    query: torch.Tensor, rows: torch.Tensor, kv_b_weight: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    """`MLRACacheAttention.attend` of the layer with this name, opaque to the compiler: a graph ends before it. A
    connector that brings rows from elsewhere, layer by layer, is waited for."""
    context = get_forward_context()
    metadata = context.attn_metadata
    if isinstance(metadata, list):  # one for each micro-batch
        metadata = metadata[0]
    layer = context.no_compile_layers[layer_name]
    layer.attend(query, rows, kv_b_weight, output, metadata[layer_name] if metadata else None)


# Without autograd, which `torch.library.custom_op` would see to at every call
OPERATORS = torch.library.Library("mlra", "FRAGMENT")
OPERATORS.define(
    "vllm_attention(Tensor query, Tensor rows, Tensor kv_b_weight, Tensor(a!) output, str layer_name) -> ()"
)
OPERATORS.impl("vllm_attention", vllm_attention, "CompositeExplicitAutograd")
torch.library.register_fake("mlra::vllm_attention", lambda *args: None, lib=OPERATORS)
