"""The kernels that `bench_decode` times: this package's, FlashAttention-3, FlashMLA.

Each maker returns one callable per input set, giving `[B, T, heads, width]`, or raises with the reason it cannot run.
"""

import functools
import math
from collections.abc import Callable

import torch

from modeling_mlra import decode_flash_mlra
from modeling_mlra.decode_arguments_mlra import DecodeInputs
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.decode_plans_mlra import decode_plans
from modeling_mlra.decode_triton_mlra import triton_latent_attention
from modeling_mlra.device_mlra import device_facts
from modeling_mlra.rows_mlra import RowFormat
from scripts import flash_operators
from scripts.decode_cases import Inputs

try:
    import flash_mla
except ImportError:
    flash_mla = None


def ours(inputs: Inputs, **options) -> list[Callable]:
    """As the fused step calls it: the cached rows are there before the kernel in front has ended."""

    def call(i):
        *arguments, scales = inputs.latent(i)
        settings = {"kv_end": inputs.kv_end, "scaling": inputs.scaling, "scales": scales, "settled": True}
        settings |= {"implementation": "triton"} | options
        return lambda: latent_attention(*arguments, **settings)

    return [call(i) for i in range(len(inputs.rows))]


def portable(inputs: Inputs) -> list[Callable]:
    """`ours` by the kernel that other GPUs run."""
    case, (batch, size, _) = inputs.case, inputs.rows[0].shape
    facts = device_facts(inputs.kv_end.device)
    rows, itemsize = case.queries * case.heads, case.row_format.dtype.itemsize
    scaled = case.row_format.scales > 0
    sizes = rows, case.latents, 1, case.width, case.rope, itemsize, batch * size
    plan = decode_plans(*sizes, hopper=False, facts=facts, scaled=scaled)[0]

    def call(i):
        *arguments, scales = inputs.latent(i)
        given = DecodeInputs(*arguments, inputs.kv_end, None, None, None, 0, inputs.scaling, True, scales)
        return lambda: triton_latent_attention(given, plan)

    return [call(i) for i in range(len(inputs.rows))]


def paged(inputs: Inputs, page_size: int) -> list[Callable]:
    """`ours` on the same rows in shuffled pages of one pool."""
    case, kv_end = inputs.case, inputs.kv_end
    batch, size, elements = inputs.rows[0].shape
    blocks = math.ceil(size / page_size)
    order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0)).to(kv_end.device)
    table = order.view(batch, blocks).int()
    row_format = RowFormat(case.latents * case.width, case.rope, inputs.rows[0].dtype)

    def call(i):
        rows = torch.nn.functional.pad(inputs.rows[i], (0, 0, 0, blocks * page_size - size), value=math.nan)
        pool = torch.empty_like(rows).view(-1, page_size, elements)
        pool[order] = rows.view(-1, page_size, elements)
        latents, k_rope, _ = row_format.views(pool.view(-1, elements), case.latents)
        arguments = *inputs.latent(i)[:2], latents, k_rope
        pages = {"block_table": table, "page_size": page_size}
        options = {"kv_end": kv_end, "scaling": inputs.scaling, "implementation": "triton", "settled": True} | pages
        return lambda: latent_attention(*arguments, **options)

    return [call(i) for i in range(len(inputs.rows))]


def flash_attention_3(inputs: Inputs) -> list[Callable]:
    """The stock 192/128 form on one latent's rows, or 128/128 on a GQA share's; several latents as this package hands
    them over."""
    case, width, attend = inputs.case, inputs.case.width, _flash_attention_3().flash_attn_with_kvcache
    if case.kind != "gqa" and case.latents > 1:
        decode_flash_mlra.flash_attn_interface = _flash_attention_3()
        return ours(inputs, implementation="flash_attention_3")
    options = {"cache_seqlens": inputs.kv_end, "softmax_scale": inputs.scaling, "causal": case.queries > 1}

    def call(i):
        rows = inputs.rows[i].unsqueeze(2)
        k, v = (rows[..., :width], rows[..., width:]) if case.kind == "gqa" else (rows, rows[..., :width])
        return lambda: attend(inputs.queries[i], k, v, **options)

    return [call(i) for i in range(len(inputs.rows))]


def flash_attention_3_mla(inputs: Inputs) -> list[Callable]:
    """Its form for MLA: the 64 rotary columns as keys, the 512 of the latent as values that `qv` meets."""
    case, width, attend = inputs.case, inputs.case.width, _flash_attention_3().flash_attn_with_kvcache
    options = {"cache_seqlens": inputs.kv_end, "softmax_scale": inputs.scaling, "causal": case.queries > 1}

    def call(i):
        rows = inputs.rows[i].unsqueeze(2)
        query = inputs.queries[i]
        qv, q = query[..., :width].contiguous(), query[..., width:].contiguous()
        return lambda: attend(q, rows[..., width:], rows[..., :width], qv=qv, **options)

    return [call(i) for i in range(len(inputs.rows))]


def _flash_attention_3():
    if (module := flash_operators.interface()) is None:
        raise RuntimeError("neither flash_attn_interface nor a _vllm_fa3_C library is here")
    return module


def flash_mla_decode(inputs: Inputs) -> list[Callable]:
    """FlashMLA on the MLA cache (512 + 64) in pages of 64 rows, scheduler metadata made once, as a model would."""
    case = inputs.case
    if flash_mla is None and not hasattr(torch.ops._flashmla_C, "dense_decode_fwd"):
        raise RuntimeError("neither flash_mla nor a _flashmla_C library is here")
    (batch, size, elements), device = inputs.rows[0].shape, inputs.kv_end.device
    blocks = size // 64
    table = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
    state: list = [None, None]
    if flash_mla is not None:
        state = list(flash_mla.get_mla_metadata(inputs.kv_end, case.queries * case.heads, 1))

    def call(i):
        cache = inputs.rows[i].view(-1, 64, 1, elements)

        def run():
            if flash_mla is not None:
                return flash_mla.flash_mla_with_kvcache(
                    inputs.queries[i], cache, table, inputs.kv_end, 512, *state, inputs.scaling, case.queries > 1
                )[0]
            result, _, state[0], state[1] = torch.ops._flashmla_C.dense_decode_fwd(
                inputs.queries[i], cache, 512, inputs.kv_end, table, inputs.scaling, case.queries > 1, *state, None
            )
            return result

        return run

    return [call(i) for i in range(len(inputs.rows))]


KERNELS: dict[str, dict[str, Callable]] = {
    "latent": {"ours": ours, "flash_attention_3": flash_attention_3},
    "pages": {"ours": ours} | {f"ours, pages of {n}": functools.partial(paged, page_size=n) for n in (64, 128, 16)},
    "fp8": {"ours": ours, "portable": portable},
    "mla": {"flash_mla": flash_mla_decode, "flash_attention_3_mla": flash_attention_3_mla},
    "gqa": {"flash_attention_3": flash_attention_3},
}
