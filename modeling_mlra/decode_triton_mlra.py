"""Runs the Triton kernels of the absorbed decode attention: split over the cached rows (`decode_plain_mlra` or
`decode_hopper_mlra`), then one reduction over the splits (`decode_deal_mlra`), with tiles of `decode_plans_mlra`.
"""

import functools
import math
from typing import NamedTuple

import torch

from .decode_arguments_mlra import (
    Cached,
    Deal,
    DecodeInputs,
    DecodeQueries,
    DecodeShape,
    DecodeTile,
    Pages,
    Results,
    Strides,
    Visible,
)
from .decode_hopper_mlra import rows_kernel
from .decode_plans_mlra import DecodePlan, deal_work, decode_plans, fits_hopper, reduction_plan
from .device_gluon_mlra import TensorDescriptor, gl
from .device_mlra import cannot_be_built, constants, device_facts, launch, launch_options, triton

if triton is not None:
    from .decode_deal_mlra import combine_kernel
    from .decode_plain_mlra import decode_kernel


class PartialResults(NamedTuple):
    """What the decode kernel leaves of shares that do not cover a whole sequence, for a second kernel to reduce.

    Attributes:
        part: float32 `[programs + B - 1, L, M, r]`, normalised, at `program + sequence`: with sequences laid end to
            end, this grows from each share of a sequence to the next.
        lse: float32 `[programs + B - 1, L, M]`, log2-sum-exp of the weights behind each.
        programs: number of shares at most.
        deal: constants of the division of work, for `parts_of`.
    """

    part: torch.Tensor
    lse: torch.Tensor
    programs: int
    deal: Deal


_fitting_plans: dict[tuple, int | Exception] = {}  # which of the plans for a kernel can be built, or why none


def triton_latent_attention(inputs: DecodeInputs, plan: DecodePlan | None = None) -> torch.Tensor:
    """Run both kernels, with a plan of one's own or the best that fits; results as of `latent_attention`."""
    inputs = _as_kernels_read_them(inputs)
    batch, length, num_latents, heads, width = inputs.q_latent.shape
    out = torch.empty(inputs.q_latent.shape, dtype=inputs.q_latent.dtype, device=inputs.q_latent.device)
    parts = partial_results(inputs, out, plan)
    if parts.programs > 1:
        early = device_facts(out.device).early
        grid, tile, num_warps = reduction_plan(batch, num_latents, length, heads, width, parts.programs)
        launch(
            out.device, combine_kernel, grid,
            Results(out, Strides(*out.stride()[:4]), parts.part, parts.lse),
            inputs.kv_end, inputs.kv_start,
            batch, length, parts.programs,
            TILE=constants(tile), DEAL=constants(parts.deal), PDL=early, num_warps=num_warps, **launch_options(early),
        )  # fmt: skip
    return out


def _as_kernels_read_them(inputs: DecodeInputs) -> DecodeInputs:
    """Numbers of a row side by side, lengths in int32."""
    kv_end = inputs.kv_end.to(torch.int32).contiguous()
    kv_start = None if inputs.kv_start is None else inputs.kv_start.to(torch.int32).contiguous()
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:4]]
    return DecodeInputs._make((*tensors, kv_end, kv_start, *inputs[6:]))


def partial_results(inputs: DecodeInputs, out: torch.Tensor | None, plan: DecodePlan | None = None) -> PartialResults:
    """Run the decode kernel with the best plan that fits; lengths in int32, numbers of a row side by side.

    Args:
        out: like `q_latent`, takes the results of sequences that one share covers; None leaves these as a part too.
        plan: one to use in place of those of `decode_plans`.

    Raises:
        Exception: of the last plan, if none can be built for the device (`cannot_be_built`); at once the next time.
    """
    q_latent, q_rope, latents, k_rope = inputs[:4]
    batch, length, num_latents, heads, width = q_latent.shape
    groups, rope_width = q_rope.shape[2:5:2]
    facts = device_facts(q_latent.device)
    plans: tuple[DecodePlan, ...]
    if plan is not None:
        plans = (plan,)
    else:
        hopper = facts.hopper and rows_kernel is not None and fits_hopper(inputs)
        plans = decode_plans(
            length * heads, num_latents, groups, width, rope_width, k_rope.element_size(), batch * inputs.capacity,
            hopper, facts, inputs.page_size, inputs.scales is not None,
        )  # fmt: skip
    given = inputs.kv_start is None, inputs.key_mask is None, inputs.page_size, length > 1, inputs.settled
    key = (
        q_latent.device,
        latents.dtype,
        k_rope.dtype,
        num_latents,
        groups,
        heads,
        width,
        rope_width,
        given,
        plans[0],
    )
    index = _fitting_plans.get(key, 0)
    while not isinstance(index, Exception):
        try:
            result = _launch(plans[index], inputs, out)
        except Exception as error:
            if not cannot_be_built(error):
                raise
            index = index + 1 if index + 1 < len(plans) else error
            continue
        _fitting_plans[key] = index
        return result
    _fitting_plans[key] = index
    raise index


def _launch(plan: DecodePlan, inputs: DecodeInputs, out: torch.Tensor | None) -> PartialResults:
    q_latent, q_rope = inputs.q_latent, inputs.q_rope
    batch, length, num_latents, heads, width = q_latent.shape
    groups, rope_width = q_rope.shape[2:5:2]
    device, rows, tile = q_latent.device, length * heads, plan.tile
    facts = device_facts(device)
    whole, out = int(out is not None), q_latent if out is None else out
    lanes = (num_latents // tile.NL) * -(-rows // tile.BM)
    programs, deal = deal_work(
        batch, inputs.capacity, lanes, facts.multiprocessors * plan.programs_per_sm, plan.unit, plan.least_units,
        inputs.kv_start is not None,
    )  # fmt: skip
    slots = programs + batch - 1
    part = torch.empty((slots, num_latents, rows, width), dtype=torch.float32, device=device)
    part_lse = torch.empty((slots, num_latents, rows), dtype=torch.float32, device=device)
    visible = _visible(inputs)
    page = 0 if inputs.block_table is None else inputs.page_size
    shape = DecodeShape(
        num_latents, groups, heads, width, rope_width, HAS_MASK=visible.key_mask is not None, PAGE=page,
        CAUSAL=length > 1, SCALED=inputs.scales is not None,
    )  # fmt: skip
    queries = DecodeQueries(q_latent, q_rope, Strides(*q_latent.stride()[:4]), Strides(*q_rope.stride()[:4]))
    results = Results(out, Strides(*out.stride()[:4]), part, part_lse)
    scale_log2 = inputs.scaling * math.log2(math.e)
    common = {"SHAPE": constants(shape), "TILE": constants(tile), "DEAL": constants(deal), "PDL": facts.early}
    common |= {"num_warps": plan.num_warps} | launch_options(facts.early)
    if isinstance(tile, DecodeTile):
        launch(
            device, decode_kernel, (programs * lanes,),
            queries, cached_of(inputs.latents, inputs.k_rope, inputs.scales, inputs.block_table), visible, results,
            batch, length, programs, whole, scale_log2,
            num_stages=plan.num_stages, **common,
        )  # fmt: skip
    else:
        c_desc = _rows_descriptor(inputs.latents, inputs.latents.stride(-3), num_latents * width, tile.BN, width)
        k_desc = _rows_descriptor(inputs.k_rope, inputs.k_rope.stride(-2), rope_width, tile.BN, rope_width)
        pages = Pages() if inputs.block_table is None else Pages(inputs.block_table, inputs.block_table.stride(0))
        launch(
            device, rows_kernel, (programs * lanes,),
            c_desc, k_desc, queries, visible, results, pages,
            batch, length, programs, inputs.capacity, whole, scale_log2,
            SETTLED=inputs.settled, **common,
        )  # fmt: skip
    return PartialResults(part, part_lse, programs, deal)


def _visible(inputs: DecodeInputs) -> Visible:
    key_mask = inputs.key_mask
    if key_mask is None:
        return Visible(inputs.kv_end, inputs.kv_start, None, 0)
    key_mask = key_mask if key_mask.stride(-1) == 1 else key_mask.contiguous()
    key_mask = key_mask.view(torch.uint8) if key_mask.dtype == torch.bool else key_mask
    return Visible(inputs.kv_end, inputs.kv_start, key_mask, key_mask.stride(0))


def cached_of(
    latents: torch.Tensor, k_rope: torch.Tensor, scales: torch.Tensor | None, table: torch.Tensor | None = None
) -> Cached:
    """What kernels take of the cache, whose parts are as in `latent_attention`."""
    *c_b, c_s, c_l, _ = latents.stride()  # a pool of rows has no stride of sequences
    *k_b, k_s, _ = k_rope.stride()
    *s_b, s_s, _ = (0, 0, 1) if scales is None else scales.stride()
    if scales is not None:
        latents = latents.view(torch.uint8)
    if table is None:
        return Cached(latents, k_rope, c_b[0], c_s, c_l, k_b[0], k_s, None, 0, scales, s_b[0], s_s)
    return Cached(latents, k_rope, 0, c_s, c_l, 0, k_s, table, table.stride(0), scales, 0, s_s)


def _rows_descriptor(tensor: torch.Tensor, stride: int, columns: int, block_rows: int, block_columns: int):
    """A bulk-copy descriptor of cached rows, of all sequences or of a pool, as one matrix."""
    block, layout = _tile_in_shared_memory(block_rows, block_columns, tensor.dtype)
    return TensorDescriptor(tensor, [tensor.numel() // columns, columns], [stride, 1], block, layout)


@functools.lru_cache(maxsize=64)
def _tile_in_shared_memory(rows: int, columns: int, dtype: torch.dtype):
    of = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return [rows, columns], gl.NVMMASharedLayout.get_default_for([rows, columns], of)
