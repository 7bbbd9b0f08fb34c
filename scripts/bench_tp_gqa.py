"""Grouped-query attention of the paper's sizes in this package's step: its linear maps and sums, FlashAttention-3."""

from types import SimpleNamespace

import torch
from torch import nn

from modeling_mlra.device_mlra import tl, triton
from modeling_mlra.peer_memory_mlra import exchange_of
from modeling_mlra.step_device_mlra import machine_of
from modeling_mlra.step_maps_mlra import LinearMap, weights_of
from modeling_mlra.step_mlra import MAX_SEQUENCES, FusedStep
from scripts.bench_tp_peers import attend_3, deal_3

HEADS, KEY_HEADS, WIDTH, HIDDEN, INNER, VOCABULARY, LAYERS = 24, 8, 128, 3072, 9560, 50304, 24

if triton is not None:
    from modeling_mlra.step_device_mlra import wait_for_front

    @triton.jit
    def rotate_kernel(
        qkv, inv_freq, counters, q, rows, stride_b, stride_s,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """A head of a token: a query or a key turned by its position; keys and values appended to `rows`
        [B, S, 2, KEYS, WIDTH]."""
        m, head = tl.program_id(0), tl.program_id(1)
        half = tl.arange(0, WIDTH // 2)
        angle = tl.load(counters + 1 + m).to(tl.float32) * tl.load(inv_freq + half)
        angle = tl.where(head < QUERIES + KEYS, angle, 0.0)  # of a value, nothing
        place = tl.load(counters).to(tl.int64)
        cos, sin = tl.cos(angle), tl.sin(angle)
        target = q + (m * QUERIES + head) * WIDTH + half
        if head >= QUERIES:
            target = rows + m * stride_b + place * stride_s + (head - QUERIES) * WIDTH + half
        wait_for_front(PDL)
        source = qkv + (m * (QUERIES + 2 * KEYS) + head) * WIDTH + half
        x1, x2 = tl.load(source).to(tl.float32), tl.load(source + WIDTH // 2).to(tl.float32)
        tl.store(target, (x1 * cos - x2 * sin).to(q.dtype.element_ty))
        tl.store(target + WIDTH // 2, (x2 * cos + x1 * sin).to(q.dtype.element_ty))


def build_gqa(size: int, layers: int | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """This rank's random share of a model of `size` ranks."""
    heads, keys, inner, vocabulary = HEADS // size, KEY_HEADS // size, INNER // size, VOCABULARY // size

    def norm() -> nn.Module:
        layer = nn.RMSNorm(HIDDEN, eps=1e-6, dtype=dtype, device=device)
        layer.variance_epsilon = layer.eps
        return layer

    def linear(inputs: int, outputs: int) -> nn.Module:
        layer = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)
        nn.init.normal_(layer.weight, 0, 0.02)
        return layer

    def decoder() -> nn.Module:
        layer = nn.Module()
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj = linear(HIDDEN, (heads + 2 * keys) * WIDTH)
        layer.self_attn.o_proj = linear(heads * WIDTH, HIDDEN)
        layer.mlp.gate_proj, layer.mlp.up_proj = linear(HIDDEN, inner), linear(HIDDEN, inner)
        layer.mlp.down_proj = linear(inner, HIDDEN)
        return layer

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(decoder() for _ in range(layers or LAYERS))
    model.model.norm = norm()
    model.model.embed_tokens = model.lm_head = linear(HIDDEN, vocabulary)
    model.config = SimpleNamespace(hidden_size=HIDDEN)
    model.dtype = dtype
    return model.requires_grad_(False)


class GQARows:
    """Keys and values `[B, 1, S, 2 * heads * width]` of each layer, of `context` random tokens."""

    def __init__(self, model: nn.Module, size: int, batch: int, context: int, capacity: int, device: torch.device):
        shape = batch, 1, capacity, 2 * (KEY_HEADS // size) * WIDTH
        number = len(model.model.layers)
        rows = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(number)]
        for layer in rows:
            layer[:, :, :context].normal_()
        self.layers = [SimpleNamespace(rows=layer) for layer in rows]


class GQAStep(FusedStep):
    """The kernels of a step for one token of each of M sequences.

    Args:
        model: of `build_gqa`.
        cache: `GQARows`.
        counters: as in `FusedStep`.
        mesh: of the ranks that share the model, or None.
        dealt: whether FlashAttention-3's work is dealt out once for all layers.
    """

    def __init__(self, model: nn.Module, cache: GQARows, counters: torch.Tensor, mesh, dealt: bool):
        self.deals, self.dealt = dealt, None
        self._model, self._cache, self.counters = (lambda: model), (lambda: cache), counters
        self.mesh, self.residual_share = mesh, 1.0 if mesh is None else 1 / mesh.size()
        self.num_tokens, self.tokens_each = (counters.numel() - 1) // 2, 1
        self.dtype, self.device, self.machine = model.dtype, counters.device, machine_of(counters.device)
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        self.query_heads = attention.o_proj.in_features // WIDTH
        self.key_heads = (attention.qkv_proj.out_features // WIDTH - self.query_heads) // 2
        self.inv_freq = 10000.0 ** (-torch.arange(0, WIDTH, 2, device=self.device) / WIDTH)
        self.hidden, self.logits = self._buffer(HIDDEN), self._buffer(model.lm_head.out_features)
        self.qkv, self.q = self._buffer(attention.qkv_proj.out_features), self._buffer(attention.o_proj.in_features)
        self.mlp = self._buffer(mlp.up_proj.out_features)
        if mesh is not None:
            self.exchange = exchange_of(mesh, MAX_SEQUENCES * HIDDEN, self.device)
        if self.exchange is not None:
            self.summands = torch.empty_like(self.hidden, dtype=torch.float32)

    def run_layers(self, rows) -> None:
        if self.deals:
            cached = rows[0][:, 0].unflatten(-1, (2, self.key_heads, WIDTH))
            self.dealt = deal_3(cached[:, :, 0].shape, self.query_heads, WIDTH, WIDTH, self.kv_end)
        super().run_layers(rows)

    def attention(self, layer: nn.Module, rows: torch.Tensor) -> None:
        """Up to the heads, which are what FlashAttention-3 returns."""
        self._run(LinearMap(weights_of(layer.self_attn.qkv_proj), layer.input_layernorm), self.hidden, self.qkv)
        cached = rows[:, 0].unflatten(-1, (2, self.key_heads, WIDTH))
        self._launch(
            rotate_kernel, (self.num_tokens, self.query_heads + 2 * self.key_heads),
            self.qkv, self.inv_freq, self.counters, self.q, cached, *cached.stride()[:2],
            QUERIES=self.query_heads, KEYS=self.key_heads, WIDTH=WIDTH, num_warps=1,
        )  # fmt: skip
        self.heads = self.attend(layer, rows).view(self.num_tokens, -1)

    def attend(self, layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        cached = rows[:, 0].unflatten(-1, (2, self.key_heads, WIDTH))
        query = self.q.view(self.num_tokens, self.query_heads, WIDTH)
        return attend_3(query, cached[:, :, 0], cached[:, :, 1], None, self.kv_end, WIDTH**-0.5, self.dealt)[0]

    def expected(self, rows: torch.Tensor) -> torch.Tensor:
        """What `attend` is to give, in float32: `[B, H, width]`."""
        key, value = rows[:, 0].float().unflatten(-1, (2, self.key_heads, WIDTH)).unbind(2)  # [B, S, key heads, width]
        query = self.q.float().view(self.num_tokens, self.key_heads, -1, WIDTH)
        scores = torch.einsum("bkhw,bskw->bkhs", query, key) * WIDTH**-0.5
        seen = torch.arange(rows.shape[2], device=rows.device) < self.kv_end[:, None]
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("bkhs,bskw->bkhw", weights, value).flatten(1, 2)
