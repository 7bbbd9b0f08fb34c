"""Runs the Triton kernels of the absorbed decode attention: split over the cached rows (`decode_plain_mlra` or
`decode_hopper_mlra`), then one reduction over the splits (`decode_deal_mlra`), with tiles of `decode_plans_mlra`.
"""

import functools
import math
from typing import Any, NamedTuple

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
from .device_mlra import DeviceFacts, cannot_be_built, constants, device_facts, launch, launch_options, room, triton

if triton is not None:
    from .decode_deal_mlra import combine_kernel
    from .decode_plain_mlra import decode_kernel


MAX_LAYOUTS = 4096  # of inputs, whose launches are planned once


class PartialResults(NamedTuple):
    """What the decode kernel leaves of shares that do not cover a whole sequence, for a second kernel to reduce.

    Attributes:
        part: float32 `[programs + B - 1, L, M, r]`, normalised, at `program + sequence`: with sequences laid end to
            end, this grows from each share of a sequence to the next.
        lse: float32 `[programs + B - 1, L, M]`, log2-sum-exp of the weights behind each.
        programs: number of shares at most.
        deal: constants of the division of work, for `parts_of`.
        alike: equal for calls that differ in addresses, contents and scaling alone.
    """

    part: torch.Tensor
    lse: torch.Tensor
    programs: int
    deal: Deal
    alike: object


_OF_TORCH = {
    torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float8_e4m3fn: "float8e4nv", torch.float32: "float32"
}  # fmt: skip
_fitting_plans: dict[tuple, int | Exception] = {}  # which of the plans for a kernel can be built, or why none
_descriptors: dict[tuple, Any] = {}  # of no rows


def triton_latent_attention(inputs: DecodeInputs, plan: DecodePlan | None = None) -> torch.Tensor:
    """Run both kernels, with a plan of one's own or the best that fits; results as of `latent_attention`."""
    inputs = _as_kernels_read_them(inputs)
    batch, length, num_latents, heads, width = inputs.q_latent.shape
    out = room("attended", inputs.q_latent.shape, inputs.q_latent.dtype, inputs.q_latent.device)
    parts = partial_results(inputs, out, plan)
    if parts.programs > 1:
        early = device_facts(out.device).early
        grid, tile, num_warps = reduction_plan(batch, num_latents, length, heads, width, parts.programs)
        launch(
            out.device, combine_kernel, grid,
            Results(out, Strides(*out.stride()[:4]), parts.part, parts.lse),
            inputs.kv_end, inputs.kv_start,
            batch, length, parts.programs,
            alike=parts.alike, TILE=constants(tile), DEAL=constants(parts.deal), PDL=early, num_warps=num_warps,
            **launch_options(early),
        )  # fmt: skip
    return out


def _as_kernels_read_them(inputs: DecodeInputs) -> DecodeInputs:
    """Numbers of a row side by side, lengths in int32."""
    kv_end, kv_start = inputs.kv_end, inputs.kv_start
    if kv_end.dtype != torch.int32 or not kv_end.is_contiguous():
        kv_end = kv_end.to(torch.int32).contiguous()
    if kv_start is not None and (kv_start.dtype != torch.int32 or not kv_start.is_contiguous()):
        kv_start = kv_start.to(torch.int32).contiguous()
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


class LaunchPlan(NamedTuple):
    """What launches of the decode kernel have in common where the layouts of their inputs are equal.

    Attributes:
        alike: by which `launch` knows them.
        grid, options: of the launch.
        results: shapes of `PartialResults`.
        strides, rope_strides: of the queries.
    """

    alike: object
    programs: int
    deal: Deal
    grid: tuple
    options: dict
    results: tuple[tuple[int, ...], tuple[int, ...]]
    strides: Strides
    rope_strides: Strides


_launch_plans: dict[tuple, LaunchPlan] = {}


def _launch_plan(plan: DecodePlan, inputs: DecodeInputs, gives_results: bool, facts: DeviceFacts) -> LaunchPlan:
    """Planned once, since that takes longer than a launch: a token runs one for every layer."""
    key = plan, gives_results, facts, inputs.layout()
    known = _launch_plans.get(key)
    if known is not None:
        return known
    batch, length, num_latents, heads, width = inputs.q_latent.shape
    groups, rope_width = inputs.q_rope.shape[2:5:2]
    rows, tile = length * heads, plan.tile
    lanes = (num_latents // tile.NL) * -(-rows // tile.BM)
    programs, deal = deal_work(
        batch, inputs.capacity, lanes, facts.multiprocessors * plan.programs_per_sm, plan.unit, plan.least_units,
        inputs.kv_start is not None,
    )  # fmt: skip
    slots = programs + batch - 1
    page = 0 if inputs.block_table is None else inputs.page_size
    shape = DecodeShape(
        num_latents, groups, heads, width, rope_width, HAS_MASK=inputs.key_mask is not None, PAGE=page,
        CAUSAL=length > 1, SCALED=inputs.scales is not None,
    )  # fmt: skip
    options = {"SHAPE": constants(shape), "TILE": constants(tile), "DEAL": constants(deal), "PDL": facts.early}
    options |= {"num_warps": plan.num_warps} | launch_options(facts.early)
    results = (slots, num_latents, rows, width), (slots, num_latents, rows)
    strides = Strides(*inputs.q_latent.stride()[:4]), Strides(*inputs.q_rope.stride()[:4])
    if len(_launch_plans) >= MAX_LAYOUTS:
        _launch_plans.clear()
    known = LaunchPlan(object(), programs, deal, (programs * lanes,), options, results, *strides)
    _launch_plans[key] = known
    return known


def _launch(plan: DecodePlan, inputs: DecodeInputs, out: torch.Tensor | None) -> PartialResults:
    q_latent, q_rope, device = inputs.q_latent, inputs.q_rope, inputs.q_latent.device
    batch, length, num_latents, _, width = q_latent.shape
    whole, out = int(out is not None), q_latent if out is None else out
    known = _launch_plan(plan, inputs, bool(whole), device_facts(device))
    alike = known.alike if inputs.on_16_bytes() else None
    part, part_lse = (room("part", shape, torch.float32, device) for shape in known.results)
    visible = _visible(inputs)
    queries = DecodeQueries(q_latent, q_rope, known.strides, known.rope_strides)
    results = Results(out, Strides(*out.stride()[:4]), part, part_lse)
    scale_log2 = inputs.scaling * math.log2(math.e)
    if isinstance(plan.tile, DecodeTile):
        launch(
            device, decode_kernel, known.grid,
            queries, cached_of(inputs.latents, inputs.k_rope, inputs.scales, inputs.block_table), visible, results,
            batch, length, known.programs, whole, scale_log2,
            num_stages=plan.num_stages, alike=alike, **known.options,
        )  # fmt: skip
    else:
        rows, rope_width = plan.tile.BN, q_rope.shape[-1]
        c_desc = _rows_descriptor(inputs.latents, inputs.latents.stride(-3), num_latents * width, rows, width)
        k_desc = _rows_descriptor(inputs.k_rope, inputs.k_rope.stride(-2), rope_width, rows, rope_width)
        s_desc = None
        if inputs.scales is not None:  # 16 bytes at a time, the fewest that are copied
            s_desc = _rows_descriptor(inputs.scales, inputs.scales.stride(-2), num_latents, rows, 4)
        pages = Pages() if inputs.block_table is None else Pages(inputs.block_table, inputs.block_table.stride(0))
        launch(
            device, rows_kernel, known.grid,
            c_desc, k_desc, s_desc, queries, visible, results, pages,
            batch, length, known.programs, inputs.capacity, whole, scale_log2,
            SETTLED=inputs.settled, alike=alike, **known.options,
        )  # fmt: skip
    return PartialResults(part, part_lse, known.programs, known.deal, alike)


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
    """A bulk-copy descriptor of cached rows, of all sequences or of a pool, as one matrix. Those of one layout are
    copies of the first, which triton checks for longer than a launch takes."""
    rows = tensor.numel() // columns
    key = tensor.dtype, rows, stride, columns, block_rows, block_columns
    known = _descriptors.get(key)
    if known is None:
        block, layout = _tile_in_shared_memory(block_rows, block_columns, tensor.dtype)
        known = TensorDescriptor(tensor, [rows, columns], [stride, 1], block, layout)
        known.base = None
        if len(_descriptors) >= MAX_LAYOUTS:
            _descriptors.clear()
        _descriptors[key] = known
    descriptor = object.__new__(TensorDescriptor)  # `copy.copy` takes as long as making one
    descriptor.__dict__.update(known.__dict__, base=tensor)
    return descriptor


@functools.lru_cache(maxsize=64)
def _tile_in_shared_memory(rows: int, columns: int, dtype: torch.dtype):
    return [rows, columns], gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, _OF_TORCH[dtype]))
