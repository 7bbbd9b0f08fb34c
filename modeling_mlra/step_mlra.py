"""One decoding step of the whole model in eight or nine kernels per layer, for up to 32 sequences at a time.

Decoding reads every weight once per step and computes almost nothing, so its time is weight bytes over bandwidth plus
what is lost between kernels. Here each program holds its tile of weights in registers before it waits for the kernel
in front of it (programmatic dependent launch), so the memory stays busy across kernels; norms, rotations, the cache
append, gates and residuals ride along, in float32. The parameters are the model's own. Linear maps take one of three
kernels (`step_linear_mlra`), by their number of vectors, their size and the GPU.

    down       [q_a | kv_a | k_rope | gate] = norm(x) W
    query      q = norm(q_a) W_qb
    absorb     q_latent = q_nope W_uk; RoPE; append the row
    attend     z = latent_attention(...)
    value      o = alpha_attn * sum over branches of z W_uv, gated
    out        x += o W_o
    gate_up    m = silu(norm(x) W_gate) * (norm(x) W_up)
    down_proj  x += m W_down

`attend` leaves partial results. For a few sequences `value` merges them; otherwise a kernel of its own does.

Under tensor parallelism each rank runs these kernels on its share of latents, heads, MLP and vocabulary. `out` and
`down_proj` then add its part of the product to an equal part of the residual, and a sum over the ranks behind each
gives x: through the other ranks' memory (`step_exchange_mlra`) where they see it, in float32 and rounded once, else by
NCCL's all-reduce. `query` and `out` may be split over ranks that hold all of their weights (`step_split_mlra`).

Legend of all `step_*` files: M tokens of all sequences, T of each; K inputs of a linear map, n rows of one of its
weights; G groups, C branches, L = G * C latents, H heads per latent; R latent, D / E / V positionless key, RoPE and
value widths; a name with P behind is padded to a power of two. "Rows" without more are those of a weight.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .decode_arguments_mlra import DecodeInputs
from .decode_mlra import asked_implementation
from .decode_triton_mlra import PartialResults, cached_of, partial_results, triton_latent_attention
from .device_mlra import constants, device_facts, launch, launch_options, triton, triton_missing
from .library_mlra import is_observed
from .peer_memory_mlra import exchange_of
from .rows_mlra import RowFormat
from .step_attention_mlra import (
    AttentionShape,
    Parts,
    Queries,
    Rope,
    absorb_kernel,
    absorb_plan,
    product_value_kernel,
    product_value_plan,
    value_kernel,
    value_plan,
)
from .step_device_mlra import Vectors, machine_of, norm_of
from .step_linear_mlra import FEW_VECTORS, run
from .step_linear_products_mlra import PRODUCT_SHARED_BYTES
from .step_maps_mlra import LinearMap, Weight, format_of, has_blocks, is_scaled, share_of, weight_obstacle, weights_of
from .step_split_mlra import Split, split_of
from .step_tokens_mlra import Draw, Ends, choice_plan, choose_kernel, embed_kernel
from .tensor_parallel_mlra import (
    gather_output,
    is_parallel,
    local_sizes,
    local_tensor,
    plan_obstacle,
    sum_output,
    tensor_parallel_mesh,
)

MAX_SEQUENCES = 32


def obstacle(model: nn.Module, num_sequences: int, but_hooks: bool = False) -> str | None:
    """Why the fused step cannot run this model, or None if it can; `but_hooks`, whatever hooks look at."""
    config = model.config
    if (trouble := triton_missing(model.device, model.dtype)) is not None:
        return trouble
    if not device_facts(model.device).tested:
        return f"its kernels were never compiled for a device like {model.device}"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16 weights, not {model.dtype}"
    if num_sequences > MAX_SEQUENCES:
        return f"it takes up to {MAX_SEQUENCES} sequences, not {num_sequences}"
    if num_sequences > FEW_VECTORS and device_facts(model.device).shared_bytes < PRODUCT_SHARED_BYTES:
        needed = f"{PRODUCT_SHARED_BYTES} bytes of shared memory"
        return f"more than {FEW_VECTORS} sequences take {needed}, which this GPU lacks"
    if config.hidden_act != "silu":
        return f"it computes the activation 'silu', not {config.hidden_act!r}"
    if model.model.rotary_emb.rope_type in ("dynamic", "longrope"):
        return f"rope_type {model.model.rotary_emb.rope_type!r} changes its frequencies as the sequence grows"
    asked = asked_implementation(config.decode_implementation)
    if asked not in ("auto", "triton"):
        return f"decode implementation {asked!r} was asked for"
    for name, module in model.named_modules():
        replaced = "forward" in vars(module) and not is_parallel(module)
        if replaced or (is_observed(module) and not but_hooks):
            return f"module {name!r} has hooks or a replaced forward (offloading, sharded data parallelism)"
        is_map = name.endswith(("_proj", "lm_head"))
        if is_map and (trouble := weight_obstacle(module, model.dtype)) is not None:
            return f"module {name!r} {trouble}"
        if not is_map and any(parameter.dtype != model.dtype for parameter in module.parameters(recurse=False)):
            return f"module {name!r} has parameters that are not {model.dtype}"
    return formats_obstacle(model) or plan_obstacle(model)


def formats_obstacle(model: nn.Module) -> str | None:
    """Where weights of a format, each of which the kernels know, are not expected."""
    parallel = tensor_parallel_mesh(model) is not None
    for index, layer in enumerate(model.model.layers):
        mlp = layer.mlp
        if len({*map(format_of, weights_of(mlp.gate_proj, mlp.up_proj))}) > 1:
            return f"gate_proj and up_proj of layer {index} have weights of different formats"
        if is_scaled(layer.self_attn.kv_b_proj):
            return f"kv_b_proj of layer {index} has quantised weights"
        scaled = [name for name, child in layer.named_modules() if name.endswith("_proj") and is_scaled(child)]
        if parallel and (name := next((name for name in scaled if has_blocks(layer.get_submodule(name))), None)):
            return f"{name} of layer {index} has scales for blocks of weights, which are not split over ranks"
        if scaled and not device_facts(model.device).float8:
            return f"{scaled[0]} of layer {index} has weights of 8 bits, which take a GPU of compute capability 8.9"
    return None


class FusedStep:
    """The kernels of one decoding step, bound to a model, a cache and buffers for M tokens, T of each sequence.

    More than one token of a sequence are candidates to be verified together: each sees those in front of it. Every
    step of a layer is a method, and takes what the one in front has left in the buffers.

    Args:
        model: an `MLRAForCausalLM` that has no `obstacle`; of a tensor-parallel one every rank makes its step.
        cache: an `MLRACache` that holds the prompt, with rows allocated for what is to come. Neither it nor the model
            is kept alive by its step.
        counters: int32 `[1 + M + M / T]`: the first cache row to write, then each token's RoPE position, then each
            sequence's number of rows in use, those of its T tokens included.
        kv_start, key_mask: as in `latent_attention`.
        tokens_each: T.
    """

    slots: torch.Tensor | None = None  # over pages of a server's: the row that each token goes to, and where all lie
    block_table: torch.Tensor | None = None
    page_size = 0
    exchange: Any = None  # what sums over the ranks through peer memory, and where this rank's summands go then
    summands: torch.Tensor | None = None
    split = Split()  # maps of which each rank runs a part, and where those parts go, of the heads in float32
    query_part: torch.Tensor | None = None
    head_parts: torch.Tensor | None = None

    def __init__(self, model: nn.Module, cache, counters: torch.Tensor, kv_start=None, key_mask=None, tokens_each=1):
        self._cache, self.counters = weakref.ref(cache), counters
        self.kv_start, self.key_mask = kv_start, key_mask
        self.mesh = tensor_parallel_mesh(model)
        self.residual_share = 1.0 if self.mesh is None else 1 / self.mesh.size()
        num_tokens = (counters.numel() - 1) * tokens_each // (tokens_each + 1)
        self.bind(model, cache.layers[0].format, counters.device, num_tokens, tokens_each)
        self.hidden = self._buffer(model.config.hidden_size)
        self.logits = self._buffer(local_tensor(model.lm_head.weight).shape[0])
        if self.mesh is not None and num_tokens <= MAX_SEQUENCES:
            self.exchange = exchange_of(self.mesh, MAX_SEQUENCES * model.config.hidden_size, counters.device)
        if self.exchange is not None:
            self.summands = torch.empty_like(self.hidden, dtype=torch.float32)
            self._split_maps(model.config)

    def _split_maps(self, config) -> None:
        """Make room for this rank's part of the maps that are split."""
        ranks = self.mesh.size()
        self.split = split_of(config, ranks)
        if not self.exchange.holds(self.heads):
            self.split = self.split._replace(out=False)
        if self.split.query:
            self.query_part = self._buffer(self.queries.q.shape[1] // ranks)
        if self.split.out:
            self.head_parts = torch.empty_like(self.heads, dtype=torch.float32)

    def bind(
        self, model: nn.Module, row_format: RowFormat, device: torch.device, num_tokens: int, tokens_each: int = 1
    ) -> None:
        """Take this rank's sizes of the layers, and make room for what their kernels leave for one another."""
        self._model, self.num_tokens, self.tokens_each = weakref.ref(model), num_tokens, tokens_each
        config, self.dtype, self.device, self.row_format = model.config, model.dtype, device, row_format
        latents, heads_per_latent, groups = local_sizes(model.model.layers[0].self_attn)
        self.latents, self.heads_per_latent, self.groups = latents, heads_per_latent, groups
        heads = groups * heads_per_latent
        self.q_width = config.q_lora_rank
        self.gate_at = config.q_lora_rank + self.row_format.numbers
        gate_width = heads * config.v_head_dim if config.attn_output_gate else 0

        self.downs = self._buffer(self.gate_at + gate_width)
        self.queries = Queries(
            self._buffer(heads * config.qk_head_dim),
            self._buffer(latents * heads_per_latent * config.latent_head_dim),
            self._buffer(heads * config.qk_rope_head_dim),
        )
        self.heads = self._buffer(heads * config.v_head_dim)
        self.mlp = self._buffer(local_tensor(model.model.layers[0].mlp.up_proj.weight).shape[0])
        self.machine = machine_of(device)

    def _buffer(self, width: int) -> torch.Tensor:
        return torch.empty(self.num_tokens, width, dtype=self.dtype, device=self.device)

    @property
    def model(self) -> nn.Module:
        return self._model()

    @property
    def cache(self):
        return self._cache()

    @property
    def part(self) -> torch.Tensor:
        """Where this rank's part of a sum over the ranks goes."""
        return self.hidden if self.summands is None else self.summands

    @property
    def few(self) -> bool:
        """Whether tokens go through the small kernels one by one."""
        return self.num_tokens <= FEW_VECTORS

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[M, vocab_size]` after `token_ids` `[M]`; appends their rows to the cache and counts them."""
        logits = self.logits_after(token_ids)
        self.counters.add_(self.tokens_each)
        return logits

    def choose(
        self, token_ids, unfinished, pad: int, end_tokens, sequences, column, scores_of=None, draws=False
    ) -> None:
        """The same, and the most likely next token of each sequence or one drawn, all on the device.

        Args:
            token_ids: int64 `[M]`, replaced by the next ones.
            unfinished: int64 `[M]`, 0 for a sequence that has ended, to which `pad` is appended; updated.
            end_tokens: int64 `[N]`, tokens that end a sequence.
            sequences: int64 `[M, S]`; the tokens go to column `column[m]`, int64 `[M]`, which moves on.
            scores_of: a function of the logits that gives what is chosen by instead, `[M, vocab_size]`; and the
                largest of these `[M, k]`, of which alone tokens are drawn, or None for all.
            draws: whether to draw, with the random numbers that `torch.multinomial` takes.
        """
        logits = self.logits_after(token_ids)
        largest = None
        if scores_of is not None:
            logits, largest = scores_of(logits)
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_(1) if draws else None
        draw = Draw(noise, largest, 0 if largest is None else largest.shape[1])
        vocab_size, ends = logits.shape[1], Ends(end_tokens, end_tokens.numel())
        self._launch(
            choose_kernel, (self.num_tokens,), logits, draw, vocab_size, unfinished, pad, ends, token_ids,
            Vectors(sequences, sequences.stride(0)), column, self.counters,
            TILE=choice_plan(vocab_size, self.counters.numel(), ends.number, draw), num_warps=16,
        )  # fmt: skip

    def logits_after(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[M, vocab_size]` after `token_ids` `[M]`, whose rows are appended but not yet counted."""
        self.embed(token_ids)
        self.run_layers([layer.rows for layer in self.cache.layers])
        self._run(LinearMap(weights_of(self.model.lm_head), self.model.model.norm), self.hidden, self.logits)
        if self.mesh is None:
            return self.logits
        if self.exchange is None or not self.exchange.holds(self.logits):
            return gather_output(self.logits, self.mesh.get_group())
        joined = self.logits.new_empty(self.num_tokens, self.mesh.size() * self.logits.shape[1])
        self.exchange.join(self.logits, joined, self.machine)
        return joined

    def run_layers(self, rows: Sequence[torch.Tensor]) -> None:
        """All layers, with the cached rows of each."""
        for layer, of_layer in zip(self.model.model.layers, rows, strict=True):
            self.run_layer(layer, of_layer)

    def run_layer(self, layer: nn.Module, rows: torch.Tensor) -> None:
        self.attention(layer, rows)
        self.out(layer)
        self.gate_up(layer)
        self.down_proj(layer)

    def embed(self, token_ids: torch.Tensor) -> None:
        """The embedding of each token, from the rank that keeps its row."""
        weight = local_tensor(self.model.model.embed_tokens.weight)
        (rows, width), block = weight.shape, 256
        first = 0 if self.mesh is None else self.mesh.get_local_rank() * rows
        self._launch(
            embed_kernel, (self.num_tokens, triton.cdiv(width, block)),
            token_ids, token_ids.stride(0), weight, first, rows, self.part, WIDTH=width, BLOCK=block, num_warps=1,
        )  # fmt: skip
        self.sum_hidden()

    def attention(self, layer: nn.Module, rows: torch.Tensor) -> None:
        """`down` to `value` of a layer and its cached rows `[B, 1, S, width]`."""
        self.down(layer)
        self.query(layer)
        self.absorb(layer, rows)
        self.value(layer, self.attend(layer, rows))

    def down(self, layer: nn.Module) -> None:
        attention = layer.self_attn
        first = [attention.q_a_proj, attention.kv_a_proj, attention.k_rope_proj]
        if attention.config.attn_output_gate:
            first.append(attention.g_proj)
        self._run(LinearMap(weights_of(*first), layer.input_layernorm), self.hidden, self.downs)

    def query(self, layer: nn.Module) -> None:
        attention = layer.self_attn
        (weight,), out = weights_of(attention.q_b_proj), self.queries.q
        if self.query_part is not None:
            weight, out = self._own_rows(weight), self.query_part
        query_map = LinearMap((weight,), attention.q_a_layernorm, attention.alpha_q)
        self._run(query_map, self.downs[:, : self.q_width], out)
        if self.query_part is not None:
            self.exchange.join(out, self.queries.q, self.machine)

    def absorb(self, layer: nn.Module, rows: torch.Tensor) -> None:
        attention, rotary = layer.self_attn, self.model.model.rotary_emb
        shape = self._attention_shape(attention)
        tile = absorb_plan(shape, self.few)
        self._launch(
            absorb_kernel, (shape.L * shape.H, triton.cdiv(shape.R, tile.RB) + self.num_tokens),
            self.queries, Vectors(self.downs, self.downs.stride(0)), self.q_width, *weights_of(attention.kv_b_proj),
            norm_of(attention.kv_a_layernorm, attention.alpha_kv), Rope(rotary.inv_freq, rotary.attention_scaling),
            self.counters, self.slots,
            cached_of(*self.row_format.views(rows.squeeze(1), self.latents), self.block_table), SHAPE=shape, TILE=tile,
            num_warps=4,
        )  # fmt: skip

    def attend(self, layer: nn.Module, rows: torch.Tensor) -> PartialResults | torch.Tensor:
        """Partial results for `value` to merge, or else the results `[M / T, T, L, H, R]`.

        Older rows and lengths are settled: of what it reads, the kernels in front of it in this step write this
        token's rows only, and no step begins before the one before has ended (`embed_kernel` is launched in the
        ordinary way).
        """
        attention = layer.self_attn
        config, shape = attention.config, (-1, self.tokens_each)
        latents, k_rope, scales = self.row_format.views(rows.squeeze(1), self.latents)
        inputs = DecodeInputs(
            q_latent=self.queries.latent.view(*shape, self.latents, self.heads_per_latent, config.latent_head_dim),
            q_rope=self.queries.rope.view(*shape, self.groups, self.heads_per_latent, config.qk_rope_head_dim),
            latents=latents, k_rope=k_rope, kv_end=self.kv_end, kv_start=self.kv_start, key_mask=self.key_mask,
            block_table=self.block_table, page_size=self.page_size, scaling=attention.scaling, settled=True,
            scales=scales,
        )  # fmt: skip
        if self.few and self.tokens_each == 1:
            return partial_results(inputs, out=None)
        return triton_latent_attention(inputs)

    def value(self, layer: nn.Module, attended: PartialResults | torch.Tensor) -> None:
        """Of what `attend` gave."""
        attention = layer.self_attn
        shape, (kv_b,) = self._attention_shape(attention), weights_of(attention.kv_b_proj)
        heads, gate = self.groups * shape.H, Vectors(self.downs[:, self.gate_at :], self.downs.stride(0))
        output = kv_b, gate, self.heads if self.head_parts is None else self.head_parts, attention.alpha_attn
        if isinstance(attended, torch.Tensor):
            whole = product_value_plan(shape)
            self._launch(
                product_value_kernel, (heads, triton.cdiv(shape.V, whole.VB)), attended, *output,
                SHAPE=shape, TILE=whole, num_warps=4,
            )  # fmt: skip
            return
        tile, warps = value_plan(shape, attended.programs)
        parts = Parts(attended.part, attended.lse, self.kv_end, self.kv_start)
        self._launch(
            value_kernel, (heads, triton.cdiv(shape.V, tile.VB)), parts, attended.programs, *output,
            SHAPE=shape, TILE=tile, DEAL=attended.deal, num_warps=warps,
        )  # fmt: skip

    def out(self, layer: nn.Module) -> None:
        if self.head_parts is None:
            self._add_to_hidden(layer.self_attn.o_proj, self.heads)
            return
        (weight,), shape = weights_of(layer.self_attn.o_proj), self.exchange.shape
        own = self.hidden.chunk(shape.RANKS, dim=1)[shape.RANK]
        self.exchange.sum(self.head_parts, self.heads, self.machine)
        self._run(LinearMap((self._own_rows(weight),)), self.heads, own, residual=own)
        self.exchange.join(own, self.hidden, self.machine)

    def gate_up(self, layer: nn.Module) -> None:
        weights = weights_of(layer.mlp.gate_proj, layer.mlp.up_proj)
        self._run(LinearMap(weights, layer.post_attention_layernorm, swiglu=True), self.hidden, self.mlp)

    def down_proj(self, layer: nn.Module) -> None:
        self._add_to_hidden(layer.mlp.down_proj, self.mlp)

    @property
    def kv_end(self) -> torch.Tensor:
        """Each sequence's number of rows in use."""
        return self.counters[1 + self.num_tokens :]

    def _attention_shape(self, attention: nn.Module) -> AttentionShape:
        config = attention.config
        return AttentionShape(
            M=self.num_tokens, T=self.tokens_each, L=self.latents, C=self.latents // self.groups,
            H=self.heads_per_latent, R=config.latent_head_dim, D=config.qk_nope_head_dim, E=config.qk_rope_head_dim,
            V=config.v_head_dim, GATE=config.attn_output_gate,
            SCALED=bool(self.row_format.scales),
        )  # fmt: skip

    def _add_to_hidden(self, layer: nn.Module, x: torch.Tensor) -> None:
        """hidden += layer(x), the input features of `layer` split over the ranks."""
        linear_map = LinearMap(weights_of(layer), residual_share=self.residual_share)
        self._run(linear_map, x, self.part, residual=self.hidden)
        self.sum_hidden()

    def _own_rows(self, weight: Weight) -> Weight:
        """This rank's share of a weight that all hold."""
        return share_of(weight, self.exchange.shape.RANK, self.exchange.shape.RANKS)

    def sum_hidden(self) -> None:
        """hidden = the sum over the ranks of their parts."""
        if self.exchange is not None:
            self.exchange.sum(self.summands, self.hidden, self.machine)
        elif self.mesh is not None:
            sum_output(self.hidden, self.mesh.get_group())

    def _run(self, linear_map: LinearMap, x: torch.Tensor, out: torch.Tensor, residual=None) -> None:
        run(linear_map, x, out, self.machine, residual)

    def _launch(self, kernel, grid: tuple, *arguments, **options) -> None:
        """A kernel that waits on the device for the one in front; named tuples among the options are constants."""
        options = {name: constants(x) if isinstance(x, tuple) else x for name, x in options.items()}
        early = self.machine.early
        launch(self.device, kernel, grid, *arguments, PDL=early, **options, **launch_options(early))
