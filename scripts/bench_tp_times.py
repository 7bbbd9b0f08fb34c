"""Times of a tensor-parallel decode step and of its parts, the slowest rank's, in microseconds."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn

from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.capture_step_mlra import DecodingStep
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.peer_memory_mlra import ENVIRONMENT_VARIABLE, exchange_of
from modeling_mlra.step_device_mlra import machine_of
from modeling_mlra.step_exchange_mlra import Exchange
from modeling_mlra.tensor_parallel_mlra import gather_output, local_sizes, tensor_parallel_mesh
from scripts.bench_decode import Case
from scripts.bench_decode import measure as measure_kernels
from scripts.bench_tp_models import random_cache

HEAD_WIDTH = 128  # d_h of the released models, the unit of the paper's table of cache sizes


@contextmanager
def no_all_reduce() -> Iterator[None]:
    """Sums over ranks are left out: results are wrong, and the time that is gained is what they cost."""
    real = distributed.all_reduce, Exchange.sum
    distributed.all_reduce = Exchange.sum = lambda *args, **kwargs: None
    try:
        yield
    finally:
        distributed.all_reduce, Exchange.sum = real


@contextmanager
def through_nccl() -> Iterator[None]:
    """Steps that are made inside sum over ranks by NCCL."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = "nccl"
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT_VARIABLE]
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before


def median_time(function: Callable[[], object], device: torch.device, replays: int) -> float:
    """Median microseconds of `function` as a CUDA graph (plain calls on the CPU); the slowest rank's."""
    with torch.no_grad():
        for _ in range(2):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            for _ in range(3):
                graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            for event in events:
                event.record()
                if event is not events[-1]:
                    graph.replay()
            torch.cuda.synchronize()
            times = [1e3 * start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]
            del graph
        else:
            times = []
            for _ in range(replays):
                started = time.perf_counter()
                function()
                times.append(1e6 * (time.perf_counter() - started))
    return slowest(statistics.median(times), device)


def slowest(value: float, device: torch.device) -> float:
    held = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
    return held.item()


def measure_decode(model: MLRAForCausalLM, batch: int, context: int, replays: int, device: torch.device) -> dict:
    """Time of a step from `context` on, what sums over ranks take of it, the attention's part, and the cache's bytes.

    A step whose sums go through peer memory is timed through NCCL as well.
    """
    mesh = tensor_parallel_mesh(model)
    cache, taken = random_cache(model, batch, context, context + 2 * (replays + 8), device)
    rows = batch * cache.get_max_length()
    step, timed = time_step(model, cache, batch, context, replays, device)
    result = {
        "sequences": batch,
        "cache_bytes_allocated": taken,
        "cache_bytes_expected": cache.bytes_per_token() * rows,
        "cache_head_widths": taken / (rows * len(cache.layers) * HEAD_WIDTH * cache.layers[0].rows.element_size()),
        "step": "fused" if step.is_fused else "modules",
        **timed,
    }
    groups_of_ranks = distributed.get_world_size() // (1 if mesh is None else mesh.size())
    result["tokens_per_s"] = 1e6 * groups_of_ranks * batch / result["token_us"]
    if result.get("exchange") == "peer memory":
        with through_nccl():
            result["through_nccl"] = time_step(model, cache, batch, context, replays, device)[1]
    return result | measure_attention(model, cache, step, batch, context, replays, device)


def time_step(
    model: MLRAForCausalLM, cache: MLRACache, batch: int, context: int, replays: int, device: torch.device
) -> tuple[DecodingStep, dict]:
    """A new step from `context` on, its time, and, under tensor parallelism, how it sums and what that takes."""
    token = torch.zeros(batch, dtype=torch.long, device=device)
    step = DecodingStep(model, cache, batch, masked=False)
    step.start(context, torch.full((batch,), context, device=device), None)

    def decode():
        token.copy_(step(token).argmax(-1))

    timed: dict = {"token_us": median_time(decode, device, replays)}
    if tensor_parallel_mesh(model) is not None:
        timed["exchange"] = "peer memory" if getattr(step.run, "exchange", None) is not None else "nccl"
        with no_all_reduce():
            # `slowest` needs the real one, so the time is this rank's
            timed["token_us_without_all_reduce"] = median_time(decode, device, replays)
        timed["all_reduce_share"] = 1 - timed["token_us_without_all_reduce"] / timed["token_us"]
    return step, timed


def measure_attention(
    model: MLRAForCausalLM,
    cache: MLRACache,
    step: DecodingStep,
    batch: int,
    context: int,
    replays: int,
    device: torch.device,
) -> dict:
    """Time of a layer's attention kernel, of a fused step's attention with its projections, and of FlashMLA."""
    config, layers = model.config, model.model.layers
    latents, heads, groups = local_sizes(layers[0].self_attn)
    width, rope = config.latent_head_dim, config.qk_rope_head_dim
    q_latent = torch.randn(batch, 1, latents, heads, width, dtype=model.dtype, device=device)
    q_rope = torch.randn(batch, 1, groups, heads, rope, dtype=model.dtype, device=device)
    in_use = torch.full((batch,), context + 1, dtype=torch.int32, device=device)

    def kernels():
        for layer in cache.layers:
            c, k_rope, scales = layer.format.views(layer.rows[:, 0], latents)
            latent_attention(
                q_latent,
                q_rope,
                c,
                k_rope,
                scales=scales,
                kv_end=in_use,
                scaling=config.score_scaling,
                implementation=config.decode_implementation,
            )

    result = {"kernel_us_per_layer": median_time(kernels, device, replays) / len(layers)}
    if step.is_fused:  # from `down` to `out` and its all-reduce

        def attention():
            for layer, cached in zip(layers, cache.layers, strict=True):
                step.run.attention(layer, cached.rows)
                step.run.out(layer)

        result["attention_us_per_layer"] = median_time(attention, device, replays) / len(layers)
    if device.type == "cuda" and (latents, width, rope) == (1, 512, 64):
        case = Case("", "mla", [context] * batch, heads, width=width)
        peer = measure_kernels(case, ceiling=1.0)[0]
        if "us" in peer:
            result["flash_mla_us_per_layer"] = slowest(peer["us"], device)
    return result


def measure_projection_forms(config: MLRAConfig, mesh, dtype: torch.dtype, replays: int, device: torch.device) -> dict:
    """Query and output projections of ranks that keep branches: whole on every rank, or sharded and gathered.

    Whole: q = c_q W_qb, y = all-reduce(o W_o). Sharded: q = all-gather(c_q W_qb[rank]),
    y = all-reduce(reduce-scatter(o) W_o[rank]). Microseconds per layer, over different weights for every layer; both
    through peer memory where it can be had (a sum, of which a rank takes its part, in place of the reduce-scatter).
    """
    size, layers = mesh.size(), config.num_hidden_layers
    rows, values = config.num_attention_heads * config.qk_head_dim, config.num_attention_heads * config.v_head_dim
    batches = (1, 16, 128)
    exchange = exchange_of(mesh, max(batches) * max(rows // size, values, config.hidden_size), device)
    ways = {"": NcclSums(mesh)} | ({} if exchange is None else {"_peer": PeerSums(mesh, exchange, device)})

    def weights(*shape):
        return [torch.randn(shape, dtype=dtype, device=device).mul_(0.02) for _ in range(layers)]

    def run_form(whole: bool, batch: int, sums: "NcclSums | PeerSums") -> float:
        share = 1 if whole else size
        query_weights = weights(rows // share, config.q_lora_rank)
        output_weights = weights(config.hidden_size, values // share)
        latent = torch.randn(batch, config.q_lora_rank, dtype=dtype, device=device)
        partial = torch.randn(batch, values, dtype=dtype, device=device)

        def call():
            for query_weight, output_weight in zip(query_weights, output_weights, strict=True):
                query = nn.functional.linear(latent, query_weight)
                heads = partial
                if not whole:
                    sums.join(query)
                    heads = sums.share(partial)
                sums.sum(nn.functional.linear(heads, output_weight))

        return median_time(call, device, replays) / layers

    return {
        str(batch): {
            f"{form}{name}_us": run_form(form == "whole", batch, sums)
            for name, sums in ways.items()
            for form in ("whole", "sharded")
        }
        for batch in batches
    }


class NcclSums:
    """Sums of the ranks' `[M, width]` by NCCL, and what is left of one for this rank."""

    def __init__(self, mesh):
        self.group, self.size = mesh.get_group(), mesh.size()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(x, group=self.group)
        return x

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's `[M, width / ranks]` of the sum."""
        parts = x.view(len(x), self.size, -1).transpose(0, 1).contiguous()
        own = x.new_empty(len(x), x.shape[1] // self.size)
        distributed.reduce_scatter_tensor(own, parts.flatten(0, 1), group=self.group)
        return own

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """`[M, ranks * width]`."""
        return gather_output(x, self.group)


class PeerSums:
    """The same through peer memory."""

    def __init__(self, mesh, exchange: Exchange, device: torch.device):
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.exchange, self.machine = exchange, machine_of(device)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.exchange.sum(x, x, self.machine)
        return x

    def share(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum(x.clone()).chunk(self.size, dim=1)[self.rank]

    def join(self, x: torch.Tensor) -> torch.Tensor:
        joined = x.new_empty(len(x), self.size * x.shape[1])
        self.exchange.join(x, joined, self.machine)
        return joined
