"""Gluon kernel of a linear map of few vectors on Hopper GPUs: large weights stream through a ring in shared memory.

A matrix times a few vectors takes as long as its weights take to arrive, so all that counts is that the copies never
stop: one program per multiprocessor keeps a ring of bulk tensor copies in flight, and fills it before it waits for the
kernel in front.

Legend: M vectors, K inputs; a tile is ROWS rows by COLUMNS columns of a weight [n, K], a row block ROWS whole rows.
"""

from typing import Any

import torch

from .hopper_mlra import TensorDescriptor, gl, gluon
from .plans_mlra import launch_options, triton

# Smaller weights are held in registers as a whole, and are there before a ring has turned
RING_BYTES = 32 * 2**20
SHARED_BYTES = 227 * 2**10
linear_kernel: Any = None

if gluon is not None:
    from .hopper_mlra import _barrier, _program_release, _program_wait, fence_async_shared, mbarrier, tma

    @gluon.jit
    def _copy_tiles(
        w, w_up, blocks, buf, full, empty, p, P,
        TILES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SWIGLU: gl.constexpr,
    ):  # fmt: skip
        """The copying warp: the program's tiles in turn, as soon as their buffers are free."""
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        t = p * 0
        for block in range(p, blocks, P):
            for tile in range(TILES):
                stage = t % STAGES
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, PARTS * w.block_type.nbytes)
                at = [block * ROWS, tile * COLUMNS]
                tma.async_copy_global_to_shared(w, at, bar, buf.index(stage * PARTS))
                if SWIGLU:
                    tma.async_copy_global_to_shared(w_up, at, bar, buf.index(stage * PARTS + 1))
                t += 1

    @gluon.jit
    def _take_inputs(
        x, x_stride, gamma, scale, eps, x_buf, x_full,
        K: gl.constexpr, M: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr, NORM: gl.constexpr,
        PDL: gl.constexpr,
    ):  # fmt: skip
        """Puts the vectors into shared memory, times the norm's weights; returns the factors still to be applied."""
        offs = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 128], [32], [4], [0]))
        gammas = ()
        if NORM:
            for tile in gl.static_range(TILES):
                column = tile * COLUMNS + offs
                value = gl.load(gamma + column, mask=column < K, other=0.0).to(gl.float32)
                gammas = gammas + (value,)  # type: ignore[assignment]
        _program_wait(PDL)
        values = ()
        for m in gl.static_range(M):
            for tile in gl.static_range(TILES):
                column = tile * COLUMNS + offs
                value = gl.load(x + m * x_stride + column, mask=column < K, other=0.0)
                values = values + (value,)  # type: ignore[assignment]
        for m in gl.static_range(M):
            for tile in gl.static_range(TILES):
                value = values[m * TILES + tile]
                if NORM:
                    value = value.to(gl.float32) * gammas[tile]
                x_buf.index(m * TILES + tile).store(value)
        _barrier()
        mbarrier.arrive(x_full, count=1)
        factors = ()
        for m in gl.static_range(M):
            factor = scale
            if NORM:
                squares = gl.zeros_like(gammas[0])
                for tile in gl.static_range(TILES):
                    value = values[m * TILES + tile].to(gl.float32)
                    squares += value * value
                factor = scale * gl.rsqrt(gl.sum(squares, 0) / K + eps)
            factors = factors + (factor,)  # type: ignore[assignment]
        return factors

    @gluon.jit
    def _multiply(
        buf, x_buf, sums_buf, full, empty, x_full, sums_full, sums_empty,
        x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride, n, blocks, p, P,
        WG: gl.constexpr, K: gl.constexpr, M: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr,
        COLUMNS: gl.constexpr, STAGES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr,
        RESIDUAL: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups: every second tile. The first one also takes the vectors in, and adds
        the second one's sums to its own for each row block."""
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        TILE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        SUMS: gl.constexpr = gl.SliceLayout(1, TILE)
        if WG == 0:
            factors = _take_inputs(x, x_stride, gamma, scale, eps, x_buf, x_full, K, M, TILES, COLUMNS, NORM, PDL)
        else:
            mbarrier.wait(x_full, 0)
        i = p * 0
        for block in range(p, blocks, P):
            rows = block * ROWS + gl.arange(0, ROWS, layout=SUMS)
            befores = ()
            if WG == 0 and RESIDUAL:
                for m in gl.static_range(M):
                    before = gl.load(residual + m * out_stride + rows, mask=rows < n, other=0.0)
                    befores = befores + (before.to(gl.float32) * residual_share,)  # type: ignore[assignment]
            accs = ()
            for _part in gl.static_range(M * PARTS):
                accs = accs + (gl.zeros([ROWS, COLUMNS], gl.float32, layout=TILE),)  # type: ignore[assignment]
            for tile in range((WG + i * TILES) & 1, TILES, 2):
                t = i * TILES + tile
                stage = t % STAGES
                mbarrier.wait(full.index(stage), (t // STAGES) & 1)
                weight = buf.index(stage * PARTS).load(TILE)
                weight_up = weight
                if SWIGLU:
                    weight_up = buf.index(stage * PARTS + 1).load(TILE)
                fence_async_shared()  # these reads come before the copies that follow into the same buffers
                _barrier()
                mbarrier.arrive(empty.index(stage), count=1)
                sums = ()
                for m in gl.static_range(M):
                    row = x_buf.index(m * TILES + tile).load(gl.SliceLayout(0, TILE)).to(gl.float32)
                    row = gl.expand_dims(row, 0)
                    sums = sums + (accs[m * PARTS] + weight.to(gl.float32) * row,)  # type: ignore[assignment]
                    if SWIGLU:
                        sums = sums + (accs[m * PARTS + 1] + weight_up.to(gl.float32) * row,)  # type: ignore[assignment]
                accs = sums
            if WG == 1:
                mbarrier.wait(sums_empty, (i & 1) ^ 1)
                for part in gl.static_range(M * PARTS):
                    sums_buf.index(part).store(gl.sum(accs[part], 1))
                _barrier()
                mbarrier.arrive(sums_full, count=1)
            else:
                mbarrier.wait(sums_full, i & 1)
                others = ()
                for part in gl.static_range(M * PARTS):
                    others = others + (sums_buf.index(part).load(SUMS),)  # type: ignore[assignment]
                _barrier()
                mbarrier.arrive(sums_empty, count=1)
                for m in gl.static_range(M):
                    y = (gl.sum(accs[m * PARTS], 1) + others[m * PARTS]) * factors[m]
                    if SWIGLU:
                        up = (gl.sum(accs[m * PARTS + 1], 1) + others[m * PARTS + 1]) * factors[m]
                        y = y / (1 + gl.exp(-y)) * up
                    if RESIDUAL:
                        y += befores[m]
                    gl.store(out + m * out_stride + rows, y.to(out.dtype.element_ty), mask=rows < n)
            i += 1

    @gluon.jit
    def linear_kernel(
        w, w_up, n, x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride,
        K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
        STAGES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
        REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """out[m] = w x[m], or silu(w x[m]) * (w_up x[m]); x normalised first (NORM), `residual` added last."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        x_dtype: gl.constexpr = gl.float32 if NORM else x.dtype.element_ty
        # A buffer stays with one warpgroup: one that skips tiles would take an older phase for the one it waits for
        gl.static_assert(STAGES % 2 == 0)
        buf = gl.allocate_shared_memory(w.dtype, [STAGES * PARTS, ROWS, COLUMNS], w.layout)
        x_buf = gl.allocate_shared_memory(x_dtype, [M * TILES, COLUMNS], FLAT)
        sums_buf = gl.allocate_shared_memory(gl.float32, [M * PARTS, ROWS], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        sums_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        sums_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        mbarrier.init(x_full, count=1)
        mbarrier.init(sums_full, count=1)
        mbarrier.init(sums_empty, count=1)
        fence_async_shared()
        _barrier()
        _program_release(PDL)
        p = gl.program_id(0)
        P = gl.num_programs(0)
        blocks = (n + ROWS - 1) // ROWS
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        buf, x_buf, sums_buf, full, empty, x_full, sums_full, sums_empty,
                        x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride, n, blocks, p, P,
                        0, K, M, TILES, ROWS, COLUMNS, STAGES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (
                    _multiply,
                    (
                        buf, x_buf, sums_buf, full, empty, x_full, sums_full, sums_empty,
                        x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride, n, blocks, p, P,
                        1, K, M, TILES, ROWS, COLUMNS, STAGES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (_copy_tiles, (w, w_up, blocks, buf, full, empty, p, P, TILES, ROWS, COLUMNS, STAGES, SWIGLU)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip


def ring_plan(itemsize: int, swiglu: bool, vectors: int) -> dict[str, int]:
    """A ring of 128 KB, chosen on an H200 with `python -m scripts.bench_fused`.

    One vector leaves registers for programs of the small kernels around this one; many need smaller tiles to have
    enough for their sums.
    """
    rows = 8 if vectors <= 2 else 4
    plan = {"ROWS": rows, "COLUMNS": 2048 // itemsize // (2 if swiglu else 1), "STAGES": 64 // rows, "num_warps": 4}
    return plan | ({"REGISTERS": 136, "maxnreg": 104} if vectors == 1 else {"REGISTERS": 232, "maxnreg": 168})


def streams(weights: list[torch.Tensor], vectors: int, norm: bool) -> bool:
    """Whether `linear` takes a weight, or the two of a SwiGLU: large, its rows fit for bulk copies, the vectors for
    shared memory."""
    if linear_kernel is None or sum(w.numel() * w.element_size() for w in weights) < RING_BYTES:
        return False
    inner, itemsize = weights[0].shape[1], weights[0].element_size()
    plan = ring_plan(itemsize, len(weights) == 2, vectors)
    ring = plan["STAGES"] * len(weights) * plan["ROWS"] * plan["COLUMNS"] * itemsize
    held = vectors * triton.cdiv(inner, plan["COLUMNS"]) * plan["COLUMNS"] * (4 if norm else itemsize)
    return ring + held + 1024 <= SHARED_BYTES and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and inner * itemsize % 16 == 0 for w in weights
    )


def linear(x, weights, out, norm, scale, residual, residual_share, multiprocessors, early) -> None:
    """out = scale * x W^T of one weight, or silu(x W^T) * (x U^T) of two, for weights that it `streams`.

    Args:
        x: `[M, K]`; RMS-normalised by the module `norm` first, unless that is None.
        weights: one or two, `[n, K]` each.
        out: `[M, n]`.
        residual: `[M, n]`, of which `residual_share` times is added, or None; may be `out`.
        multiprocessors, early: as from `plans_mlra.device_facts`.
    """
    itemsize, rows = weights[0].element_size(), weights[0].shape[0]
    plan = ring_plan(itemsize, len(weights) == 2, x.shape[0])
    block = [plan["ROWS"], plan["COLUMNS"]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * itemsize, rank=2)
    descriptors = [TensorDescriptor(w, list(w.shape), [w.stride(0), 1], block, layout) for w in weights]
    blocks = triton.cdiv(rows, plan["ROWS"])
    programs = triton.cdiv(blocks, triton.cdiv(blocks, multiprocessors))  # as few as end as soon: all end together
    linear_kernel[(programs,)](
        descriptors[0], descriptors[-1], rows, x, x.stride(0), x if norm is None else norm.weight, scale,
        0.0 if norm is None else norm.variance_epsilon, out if residual is None else residual, residual_share,
        out, out.stride(0),
        K=weights[0].shape[1], M=x.shape[0], NORM=norm is not None, SWIGLU=len(weights) == 2,
        RESIDUAL=residual is not None, PDL=early, **plan, **launch_options(early),
    )  # fmt: skip
