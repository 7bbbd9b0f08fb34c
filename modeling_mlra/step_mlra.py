"""One decoding step of the whole model in eight or nine kernels per layer, for up to 32 sequences at a time.

Decoding reads every weight once per step and computes almost nothing, so its time is weight bytes over bandwidth plus
what is lost between kernels. Here each program holds its tile of weights in registers before it waits for the kernel
in front of it (programmatic dependent launch), so the memory stays busy across kernels; norms, rotations, the cache
append, gates and residuals ride along, in float32. The parameters are the model's own. (On Hopper GPUs large weights
stream through shared memory instead, `step_hopper_linear_mlra`.) More than two sequences go through tensor cores
(`step_batch_linear_mlra`), and the partial results of kernel 4, which otherwise kernel 5 reduces, through one kernel
more.

    1  [q_a | kv_a | k_rope | gate] = norm(x) W        5  o = alpha_attn * sum over branches of z W_uv, gated
    2  q = norm(q_a) W_qb                              6  x += o W_o
    3  q_latent = q_nope W_uk; RoPE; append the row    7  m = silu(norm(x) W_gate) * (norm(x) W_up)
    4  z = latent_attention(...)                       8  x += m W_down

Under tensor parallelism each rank runs these kernels on its share of latents, heads, MLP and vocabulary. Kernels 6 and
8 then add its part of the product to an equal part of the residual, and an all-reduce behind each gives x.

Legend: M sequences, K and N widths of a linear map, G groups, C branches, L = G * C latents, H heads per group,
R latent, D_N / E / V positionless key, RoPE and value widths.
"""

import weakref

import torch
from torch import nn

from .decode_mlra import asked_implementation
from .decode_triton_mlra import partial_results, triton_latent_attention
from .device_mlra import device_facts, launch, launch_options, triton, triton_missing
from .step_batch_linear_mlra import linear as batch_linear
from .step_batch_linear_mlra import padded
from .step_batch_linear_mlra import value as batch_value
from .step_hopper_linear_mlra import linear as stream_linear
from .step_hopper_linear_mlra import streams
from .step_kernels_mlra import (
    absorb_kernel,
    choose_kernel,
    embed_kernel,
    linear_kernel,
    linear_plan,
    stacked,
    value_kernel,
    value_plan,
)
from .tensor_parallel_mlra import (
    gather_output,
    is_parallel,
    local_sizes,
    local_tensor,
    plan_obstacle,
    sum_output,
    tensor_parallel_mesh,
)

FEW_SEQUENCES = 2  # as many products are free beside the reading of the weights; more take tensor cores
MAX_SEQUENCES = 32
SHARED_BYTES = 56 * 2**10  # what the products of so many vectors take for their buffers of weights


def obstacle(model: nn.Module, num_sequences: int) -> str | None:
    """Why the fused step cannot run this model, or None if it can."""
    config = model.config
    if (trouble := triton_missing(model.device, model.dtype)) is not None:
        return trouble
    if not device_facts(model.device).tested:
        return f"its kernels were never compiled for a device like {model.device}"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16 weights, not {model.dtype}"
    if num_sequences > MAX_SEQUENCES:
        return f"it takes up to {MAX_SEQUENCES} sequences, not {num_sequences}"
    if num_sequences > FEW_SEQUENCES and device_facts(model.device).shared_bytes < SHARED_BYTES:
        return f"more than {FEW_SEQUENCES} sequences take {SHARED_BYTES} bytes of shared memory, which this GPU lacks"
    if config.hidden_act != "silu":
        return f"it computes the activation 'silu', not {config.hidden_act!r}"
    if model.model.rotary_emb.rope_type in ("dynamic", "longrope"):
        return f"rope_type {model.model.rotary_emb.rope_type!r} changes its frequencies as the sequence grows"
    asked = asked_implementation(config.decode_implementation)
    if asked not in ("auto", "triton"):
        return f"decode implementation {asked!r} was asked for"
    for name, module in model.named_modules():
        replaced = "forward" in vars(module) and not is_parallel(module)
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            return f"module {name!r} has hooks or a replaced forward (offloading, sharded data parallelism)"
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear and not hasattr(module, "weight"):
            return f"module {name!r} is a {type(module).__name__}, no plain linear layer"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or any(isinstance(module, nn.Linear) and module.bias is not None for module in model.modules()):
        return "its weights are not all of one dtype and without bias"
    return plan_obstacle(model)


class FusedStep:
    """The kernels of one decoding step, bound to a model, a cache and buffers for M tokens, T of each sequence.

    More than one token of a sequence are candidates to be verified together: each sees those in front of it.

    Args:
        model: an `MLRAForCausalLM` that has no `obstacle`; of a tensor-parallel one every rank makes its step.
        cache: an `MLRACache` that holds the prompt, with rows allocated for what is to come. Neither it nor the model
            is kept alive by its step.
        counters: int32 `[1 + M + M / T]`: the first cache row to write, then each token's RoPE position, then each
            sequence's number of rows in use, those of its T tokens included.
        kv_start, key_mask: as in `latent_attention`.
        tokens_each: T.
    """

    def __init__(self, model: nn.Module, cache, counters: torch.Tensor, kv_start=None, key_mask=None, tokens_each=1):
        config = model.config
        self._model, self._cache, self.counters = weakref.ref(model), weakref.ref(cache), counters
        self.kv_start, self.key_mask = kv_start, key_mask
        self.tokens_each = tokens_each
        self.num_tokens = (counters.numel() - 1) * tokens_each // (tokens_each + 1)
        self.few = self.num_tokens <= FEW_SEQUENCES
        self.mesh = tensor_parallel_mesh(model)
        self.residual_share = 1.0 if self.mesh is None else 1 / self.mesh.size()
        self.local_sizes = local_sizes(model.model.layers[0].self_attn)
        latents, heads_per_latent, groups = self.local_sizes
        heads = groups * heads_per_latent
        self.widths_a = [config.q_lora_rank, latents * config.latent_head_dim, config.qk_rope_head_dim]
        if config.attn_output_gate:
            self.widths_a.append(heads * config.v_head_dim)

        def buffer(width):
            return torch.empty(self.num_tokens, width, dtype=model.dtype, device=counters.device)

        self.hidden, self.a = buffer(config.hidden_size), buffer(sum(self.widths_a))
        self.q, self.q_rope = buffer(heads * config.qk_head_dim), buffer(heads * config.qk_rope_head_dim)
        self.q_latent = buffer(latents * heads_per_latent * config.latent_head_dim)
        self.heads = buffer(heads * config.v_head_dim)
        self.mlp = buffer(local_tensor(model.model.layers[0].mlp.up_proj.weight).shape[0])
        self.logits = buffer(local_tensor(model.lm_head.weight).shape[0])
        self.device = counters.device
        facts = device_facts(self.device)
        self.multiprocessors, self.early, self.hopper = facts.multiprocessors, facts.early, facts.hopper
        self.arrived = torch.zeros(4 * self.multiprocessors, dtype=torch.int32, device=counters.device)

    @property
    def model(self) -> nn.Module:
        return self._model()

    @property
    def cache(self):
        return self._cache()

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[M, vocab_size]` after `token_ids` `[M]`; appends their rows to the cache and counts them."""
        logits = self._logits_after(token_ids)
        self.counters.add_(self.tokens_each)
        return logits

    def choose(self, token_ids, unfinished, pad: int, end_tokens, sequences, column, scores_of=None) -> None:
        """The same, and the most likely next token of each sequence, all on the device.

        Args:
            token_ids: int64 `[M]`, replaced by the next ones.
            unfinished: int64 `[M]`, 0 for a sequence that has ended, to which `pad` is appended; updated.
            end_tokens: int64 `[N]`, tokens that end a sequence.
            sequences: int64 `[M, S]`; the tokens go to column `column[m]`, int64 `[M]`, which moves on.
            scores_of: a function of the logits whose largest value is taken instead of the logits' own, for sampling.
        """
        logits = self._logits_after(token_ids)
        if scores_of is not None:
            logits = scores_of(logits)
        block = min(16384, triton.next_power_of_2(logits.shape[1]))
        launch(
            self.device, choose_kernel, (self.num_tokens,),
            logits, logits.shape[1], unfinished, pad, end_tokens, end_tokens.numel(), token_ids,
            sequences, sequences.stride(0), column, self.counters,
            COUNTERS=self.counters.numel(), COUNTERS_P=triton.next_power_of_2(self.counters.numel()),
            ENDS=triton.next_power_of_2(max(1, end_tokens.numel())), BLOCK=block,
            CHUNKS=triton.cdiv(logits.shape[1], block), PDL=self.early, num_warps=16, **launch_options(self.early),
        )  # fmt: skip

    def _logits_after(self, token_ids: torch.Tensor) -> torch.Tensor:
        base = self.model.model
        self._embed(local_tensor(base.embed_tokens.weight), token_ids)
        for layer, cache_layer in zip(base.layers, self.cache.layers, strict=True):
            self._attention(layer, cache_layer.rows)
            self._add(layer.self_attn.o_proj, self.heads)
            mlp, norm = layer.mlp, layer.post_attention_layernorm
            self._linear(self.hidden, [mlp.gate_proj, mlp.up_proj], self.mlp, norm=norm, swiglu=True)
            self._add(mlp.down_proj, self.mlp)
        self._linear(self.hidden, [self.model.lm_head], self.logits, norm=base.norm)
        return self.logits if self.mesh is None else gather_output(self.logits, self.mesh.get_group())

    def _embed(self, weight: torch.Tensor, token_ids: torch.Tensor) -> None:
        """The embedding of each token, from the rank that keeps its row."""
        if self.mesh is None:
            width, block = weight.shape[1], 256
            launch(
                self.device, embed_kernel, (self.num_tokens, triton.cdiv(width, block)),
                token_ids, token_ids.stride(0), weight, self.hidden,
                WIDTH=width, BLOCK=block, PDL=self.early, num_warps=1,
            )  # fmt: skip
            return
        rows = token_ids - self.mesh.get_local_rank() * weight.shape[0]
        kept = (rows >= 0) & (rows < weight.shape[0])
        torch.index_select(weight, 0, rows.clamp(0, weight.shape[0] - 1), out=self.hidden)
        sum_output(self.hidden.mul_(kept[:, None]), self.mesh.get_group())

    def _add(self, layer, x) -> None:
        """hidden += layer(x), the input features of `layer` split over the ranks."""
        self._linear(x, [layer], self.hidden, residual=self.hidden)
        if self.mesh is not None:
            sum_output(self.hidden, self.mesh.get_group())

    def _linear(self, x, layers, out, norm=None, scale=1.0, swiglu=False, residual=None):
        weights = [local_tensor(layer.weight) for layer in layers]
        one_map = len(weights) == 1 or swiglu
        if self.few and self.hopper and one_map and streams(weights, self.num_tokens):
            stream_linear(
                x, weights, out, norm, scale, residual, self.residual_share, self.multiprocessors, self.early
            )
            return
        if not self.few:
            batch_linear(
                x, weights, out, norm, scale, swiglu, residual, self.residual_share, self.arrived,
                self.multiprocessors, self.early,
            )  # fmt: skip
            return
        inner = weights[0].shape[1]
        plan = linear_plan(inner, swiglu, residual is not None, self.num_tokens)
        blocks, stack = stacked(weights, plan["ROWS"], swiglu)
        launch(
            self.device, linear_kernel, (blocks,),
            x, x.stride(0), x if norm is None else norm.weight, scale, 0.0 if norm is None else norm.variance_epsilon,
            out if residual is None else residual, self.residual_share, out, out.stride(0), *stack,
            K=inner, M=self.num_tokens, NORM=norm is not None, SWIGLU=swiglu,
            RESIDUAL=residual is not None, PDL=self.early, **plan, **launch_options(self.early),
        )  # fmt: skip

    def _attention(self, layer, rows):
        attention = layer.self_attn
        config, batch = attention.config, self.num_tokens
        latents, heads, groups = self.local_sizes
        branches, rank, rope = latents // groups, config.latent_head_dim, config.qk_rope_head_dim
        kv_b, latent_gamma = (local_tensor(m.weight) for m in (attention.kv_b_proj, attention.kv_a_layernorm))
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        first = [attention.q_a_proj, attention.kv_a_proj, attention.k_rope_proj]
        if config.attn_output_gate:
            first.append(attention.g_proj)
        self._linear(self.hidden, first, self.a, norm=layer.input_layernorm)
        self._linear(
            self.a[:, : config.q_lora_rank], [attention.q_b_proj], self.q,
            norm=attention.q_a_layernorm, scale=attention.alpha_q,
        )  # fmt: skip
        padded_rank, padded_nope = (max(16, triton.next_power_of_2(width)) for width in (rank, nope))
        columns = min(padded_rank, max(16, 8192 // padded_nope))
        rotary = self.model.model.rotary_emb
        launch(
            self.device, absorb_kernel, (latents * heads, triton.cdiv(rank, columns) + batch),
            self.q, self.a, self.a.stride(0), config.q_lora_rank, kv_b, latent_gamma, rotary.inv_freq,
            self.counters, self.q_latent, self.q_rope,
            rows, rows.stride(0), rows.stride(2), attention.alpha_kv, attention.kv_a_layernorm.variance_epsilon,
            rotary.attention_scaling, M=batch, T=self.tokens_each, MP=0 if self.few else padded(batch),
            L=latents, C=branches, H=heads, R=rank, DN=nope, E=rope, V=value, DNP=padded_nope, RP=padded_rank,
            RB=columns, EP=triton.next_power_of_2(rope // 2), PDL=self.early, num_warps=4,
            **launch_options(self.early),
        )  # fmt: skip
        gate = self.a[:, sum(self.widths_a[:3]) :]
        shape = {"M": batch, "L": latents, "C": branches, "H": heads, "R": rank, "DN": nope, "V": value}
        shape |= {"RP": padded_rank, "GATE": config.attn_output_gate, "PDL": self.early}
        z = self._latent_attention(attention, rows)
        if not self._reduces_parts():
            batch_value(z, kv_b, gate, self.heads, attention.alpha_attn, shape)
            return
        padded_branches = triton.next_power_of_2(branches)
        block = min(64, triton.next_power_of_2(value), max(4, 16384 // (padded_branches * padded_rank)))
        launch(
            self.device, value_kernel, (groups * heads, triton.cdiv(value, block)),
            z.part, z.lse, *self._lengths(), kv_b, gate, gate.stride(0), self.heads, attention.alpha_attn, z.programs,
            CP=padded_branches, VB=block, **shape, **value_plan(z.programs, padded_branches * padded_rank), **z.deal,
            **launch_options(self.early),
        )  # fmt: skip

    def _reduces_parts(self) -> bool:
        """Whether kernel 5 itself reduces the partial results of kernel 4."""
        return self.few and self.tokens_each == 1

    def _lengths(self):
        return self.counters[1 + self.num_tokens :], self.kv_start

    def _latent_attention(self, attention, rows):
        """Kernel 4: the partial results of a few sequences, which kernel 5 reduces, or the results of more.

        Older rows and lengths are settled: of what it reads, the kernels in front of it in this step write this
        token's rows only, and no step begins before the one before has ended (`embed_kernel` is launched in the
        ordinary way).
        """
        config, shape = attention.config, (-1, self.tokens_each)
        latents, heads, groups = self.local_sizes
        split, cached = latents * config.latent_head_dim, rows.squeeze(1)
        arguments = (
            self.q_latent.view(*shape, latents, heads, config.latent_head_dim),
            self.q_rope.view(*shape, groups, heads, config.qk_rope_head_dim),
            cached[..., :split].unflatten(-1, (latents, -1)),
            cached[..., split:],
            *self._lengths(), self.key_mask, None, 0, attention.scaling, True,
        )  # fmt: skip
        return partial_results(None, *arguments) if self._reduces_parts() else triton_latent_attention(*arguments)
