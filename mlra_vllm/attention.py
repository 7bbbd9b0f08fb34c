"""The attention layer: one row [c_0 ... c_{L-1} | k_rope] per token in the paged cache, read by decode and prefill.

Shapes: T tokens of the batch, S cached rows, L latents that this rank keeps in G groups, H query heads per group,
R latent width, N / E / V widths of a head's positionless key, RoPE key and value.
"""

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from modeling_mlra.attention_mlra import MAX_EXPANDED_BYTES, absorbed_attention, expanded_attention
from modeling_mlra.masks_mlra import CacheRows
from modeling_mlra.rows_mlra import RowFormat

from .metadata import MAX_PACKED_ROWS, MLRABackend, MLRAMetadata, Pack
from .versions import flash_attention


class MLRACacheAttention(nn.Module, AttentionLayerBase):
    """Attention of one layer over vLLM's cache.

    Args:
        vllm_config: the engine's settings.
        num_latents: L, latents that this rank keeps.
        alpha: factor behind the sum of a head's branches (paper, eq. 8).
        prefix: name of the layer; the operator finds it by that.
    """

    supports_dcp = False

    def __init__(self, vllm_config: VllmConfig, num_latents: int, alpha: float, prefix: str):
        super().__init__()
        config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        self.layer_name = prefix
        self.num_latents = num_latents
        self.sizes = {
            "nope_dim": config.qk_nope_head_dim,
            "v_dim": config.v_head_dim,
            "scaling": config.score_scaling,
            "alpha": alpha,
        }
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
            query: `[T, G*H, N+E]`, RoPE applied.
            rows: `[T, width]`, the new tokens' latents and RoPE keys, RoPE applied, joined by the row format.
            kv_b_weight: `[L*H*(N+V), R]`, this rank's latent up-projection.
        """
        output = query.new_empty(*query.shape[:2], self.sizes["v_dim"])
        torch.ops.mlra.vllm_attention(query, rows, kv_b_weight, output, self.layer_name)
        return output

    def attend(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        kv_b_weight: torch.Tensor,
        output: torch.Tensor,
        metadata: MLRAMetadata | None,
    ) -> None:
        """Write the new rows to the cache and fill `output`; without metadata (profiling) claim what both need."""
        if metadata is None:
            self._claim_workspace(query)
            output.zero_()
            return
        pool = self.pool
        slots = metadata.slot_mapping
        # Padding goes to row 0, in the block that vLLM gives to no request
        pool.index_copy_(0, slots.clamp(min=0), rows[: len(slots)].to(pool.dtype))
        if decodes := len(metadata.seq_lens):
            output[:decodes] = self._decode(query[:decodes], kv_b_weight, pool, metadata)
        for pack in metadata.packs:
            output[pack.tokens] = self._prefill(query[pack.tokens], kv_b_weight, pool, pack)

    def _decode(self, query, kv_b_weight, pool, metadata: MLRAMetadata) -> torch.Tensor:
        """Absorbed, straight from the pages: one new token `[M, G*H, N+E]` of each request."""
        q_nope, q_rope = query.unsqueeze(1).split([self.sizes["nope_dim"], self.row_format.rope], dim=-1)
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
            implementation=self.implementation,
            scales=scales,
            **self.sizes,
        )
        return output.squeeze(1)

    def _prefill(self, query, kv_b_weight, pool, pack: Pack) -> torch.Tensor:
        """Expanded, one latent after another: new tokens `[T, G*H, N+E]` of the requests of a pack."""
        kept, k_rope = self.row_format.split(pool[pack.rows].unsqueeze(0))
        latents = self.row_format.read(kept).to(query.dtype).unflatten(-1, (self.num_latents, -1))
        k_rope = k_rope.to(query.dtype)

        def attend(module, query, key, value, mask, scaling, **kwargs):
            if self.flash is None:
                return packed_sdpa(query, key, value, pack, scaling), None
            output = self.flash(
                *(x[0].transpose(0, 1) for x in (query, key, value)),
                cu_seqlens_q=pack.query_starts,
                cu_seqlens_k=pack.key_starts,
                max_seqlen_q=max(pack.query_lengths),
                max_seqlen_k=max(pack.key_lengths),
                softmax_scale=scaling,
                causal=True,
            )
            return output.unsqueeze(0), None

        output, _ = expanded_attention(
            self,
            query.unsqueeze(0),
            latents,
            k_rope,
            kv_b_weight,
            None,
            attend,
            gives_weights=False,
            **self.sizes,
        )
        return output[0]

    def _claim_workspace(self, query: torch.Tensor) -> None:
        """Allocate and free what the largest prefill takes, so that vLLM leaves room for it beside the cache."""
        tokens, heads, width = query.shape
        nope_dim, v_dim = self.sizes["nope_dim"], self.sizes["v_dim"]
        per_head = self.max_rows * (width + v_dim) * query.element_size()  # keys and values of one head
        step = min(max(MAX_EXPANDED_BYTES // per_head, 1), heads)
        numbers = self.max_rows * 2 * self.row_format.width  # gathered rows, converted
        if self.row_format.scales:  # on the way to be latents, in float32 twice
            numbers += self.max_rows * self.row_format.latents * 8 // query.element_size()
        numbers += step * self.max_rows * (width + nope_dim + v_dim)  # keys, before and after joining, and values
        numbers += 6 * tokens * heads * v_dim  # outputs of the branches, their sum in float32
        torch.empty(numbers, dtype=query.dtype, device=query.device)


def packed_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scaling: float):
    """Causal attention of each request of a pack by torch: `[1, H, T or S, D]` to `[1, T, H, V]`."""
    outputs = []
    parts = (query.split(pack.query_lengths, 2), key.split(pack.key_lengths, 2), value.split(pack.key_lengths, 2))
    for q, k, v in zip(*parts, strict=True):
        mask = None if q.shape[2] == k.shape[2] else causal_lower_right(q.shape[2], k.shape[2])
        outputs.append(
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def no_mask(*args, **kwargs):
    raise AssertionError("rows are given by block table, never by a mask")


@torch.library.custom_op("mlra::vllm_attention", mutates_args=("output",))
def vllm_attention(
    query: torch.Tensor, rows: torch.Tensor, kv_b_weight: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    """`MLRACacheAttention.attend` of the layer with this name, opaque to the compiler: a graph ends before it."""
    context = get_forward_context()
    metadata = context.attn_metadata
    if isinstance(metadata, list):  # one for each micro-batch
        metadata = metadata[0]
    layer = context.no_compile_layers[layer_name]
    layer.attend(query, rows, kv_b_weight, output, metadata[layer_name] if metadata else None)


@vllm_attention.register_fake
def _(query, rows, kv_b_weight, output, layer_name) -> None:
    return None
