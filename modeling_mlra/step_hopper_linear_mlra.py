"""Gluon kernel of a linear map of few vectors on Hopper GPUs: large weights stream through rings in shared memory.

A matrix times a few vectors takes as long as its weights take to arrive, so all that counts is that the copies never
stop: one program per multiprocessor keeps two rings of bulk tensor copies in flight, and fills them before it waits
for the kernel in front.

Legend: M vectors, K inputs; a tile is ROWS rows by COLUMNS columns of a weight [n, K], a row block ROWS whole rows.
"""

from typing import Any

import torch

from .decode_hopper_mlra import TensorDescriptor, gl, gluon
from .device_mlra import launch, launch_options, triton

# Smaller weights are held in registers as a whole, and are there before a ring has turned
RING_BYTES = 32 * 2**20
SHARED_BYTES = 227 * 2**10
linear_kernel: Any = None

if gluon is not None:
    from .decode_hopper_mlra import _barrier, _bulk_load, _program_release, _program_wait, fence_async_shared, mbarrier

    @gluon.jit
    def _copy_tiles(
        w, w_up, n, buf, full, empty, p, P,
        K: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SWIGLU: gl.constexpr,
    ):  # fmt: skip
        """The copying warp: the tiles of both computing warpgroups, as soon as their buffers are free."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        blocks = (n + ROWS - 1) // ROWS
        for t in range(0, _share(blocks, p, P) * TILES):
            column = (t % TILES) * COLUMNS
            for wg in gl.static_range(2):
                block = p + wg * P + (t // TILES) * (2 * P)
                if block < blocks:
                    stage = wg * STAGES + t % STAGES
                    bar = full.index(stage)
                    mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)
                    mbarrier.expect(bar, PARTS * w.block_type.nbytes)
                    _bulk_load(w, [block * ROWS, column], bar, buf.index(stage * PARTS))
                    if SWIGLU:
                        up = buf.index(stage * PARTS + 1)
                        _bulk_load(w_up, [block * ROWS, column], bar, up)

    @gluon.jit
    def _share(blocks, first, P):
        """How many of the row blocks first, first + 2 P, ... there are."""
        return (blocks - first + (2 * P - 1)) // (2 * P)

    @gluon.jit
    def _take_inputs(
        x, x_stride, gamma, scale, eps, x_buf,
        K: gl.constexpr, M: gl.constexpr, COLUMNS: gl.constexpr, NORM: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """Puts the vectors, normalised, into shared memory, in their own dtype as the modules do."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        offs = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 128], [32], [4], [0]))
        gammas = ()
        if NORM:
            for tile in gl.static_range(TILES):
                column = tile * COLUMNS + offs
                gammas = gammas + (gl.load(gamma + column, mask=column < K, other=0.0),)  # type: ignore[assignment]
        _program_wait(PDL)
        for m in gl.static_range(M):
            values = ()
            squares = gl.to_tensor(0.0)
            for tile in gl.static_range(TILES):
                column = tile * COLUMNS + offs
                value = gl.load(x + m * x_stride + column, mask=column < K, other=0.0)
                if NORM:
                    value = value.to(gl.float32)
                    squares += value * value
                    value *= gammas[tile].to(gl.float32)
                values = values + (value,)  # type: ignore[assignment]
            if NORM:
                factor = scale * gl.rsqrt(gl.sum(squares, 0) / K + eps)
            for tile in gl.static_range(TILES):
                value = values[tile]
                if NORM:
                    value *= factor
                x_buf.index(m * TILES + tile).store(value.to(x.dtype.element_ty))

    @gluon.jit
    def _multiply(
        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride,
        n, p, P,
        WG: gl.constexpr, K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
        STAGES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups: every second of the program's row blocks. The first one also takes the
        vectors in."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        TILE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        if WG == 0:
            _take_inputs(x, x_stride, gamma, scale, eps, x_buf, K, M, COLUMNS, NORM, PDL)
            _barrier()
            mbarrier.arrive(x_full, count=1)
        else:
            _program_wait(PDL)
            mbarrier.wait(x_full, 0)
        first = p + WG * P
        t = p * 0
        for block in range(0, _share((n + ROWS - 1) // ROWS, first, P)):
            accs = ()
            for _part in gl.static_range(M * PARTS):
                accs = accs + (gl.zeros([ROWS, COLUMNS], gl.float32, layout=TILE),)  # type: ignore[assignment]
            for tile in range(TILES):
                stage = WG * STAGES + t % STAGES
                mbarrier.wait(full.index(stage), (t // STAGES) & 1)
                weight = buf.index(stage * PARTS).load(TILE)
                weight_up = weight
                if SWIGLU:
                    weight_up = buf.index(stage * PARTS + 1).load(TILE)
                fence_async_shared()  # these reads come before the copies that follow into the same buffers
                _barrier()
                mbarrier.arrive(empty.index(stage), count=1)
                t += 1
                sums = ()
                for m in gl.static_range(M):
                    row = x_buf.index(m * TILES + tile).load(gl.SliceLayout(0, TILE)).to(gl.float32)
                    row = gl.expand_dims(row, 0)
                    sums = sums + (accs[m * PARTS] + weight.to(gl.float32) * row,)  # type: ignore[assignment]
                    if SWIGLU:
                        sums = sums + (accs[m * PARTS + 1] + weight_up.to(gl.float32) * row,)  # type: ignore[assignment]
                accs = sums
            rows = (first + block * (2 * P)) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE))
            for m in gl.static_range(M):
                y = gl.sum(accs[m * PARTS], 1)
                if not NORM:
                    y *= scale
                if SWIGLU:
                    y = y / (1 + gl.exp(-y)) * gl.sum(accs[m * PARTS + 1], 1)
                target = m * out_stride + rows
                if RESIDUAL:
                    y += gl.load(residual + target, mask=rows < n, other=0.0).to(gl.float32) * residual_share
                gl.store(out + target, y.to(out.dtype.element_ty), mask=rows < n)

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
        buf = gl.allocate_shared_memory(w.dtype, [2 * STAGES * PARTS, ROWS, COLUMNS], w.layout)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        x_buf = gl.allocate_shared_memory(x.dtype.element_ty, [M * TILES, COLUMNS], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2 * STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        mbarrier.init(x_full, count=1)
        fence_async_shared()
        _barrier()
        _program_release(PDL)
        p = gl.program_id(0)
        P = gl.num_programs(0)
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share,
                        out, out_stride, n, p, P,
                        0, K, M, ROWS, COLUMNS, STAGES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (
                    _multiply,
                    (
                        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share,
                        out, out_stride, n, p, P,
                        1, K, M, ROWS, COLUMNS, STAGES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (
                    _copy_tiles,
                    (w, w_up, n, buf, full, empty, p, P, K, ROWS, COLUMNS, STAGES, SWIGLU),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip


def ring_plan(itemsize: int, swiglu: bool, vectors: int) -> dict[str, int]:
    """Rings of 64 KB for each of the two warpgroups, chosen on an H200 with `python -m scripts.bench_fused`.

    One vector leaves registers for programs of the small kernels around this one.
    """
    plan = {"ROWS": 8, "COLUMNS": 2048 // itemsize // (2 if swiglu else 1), "STAGES": 4, "num_warps": 4}
    return plan | ({"REGISTERS": 136, "maxnreg": 104} if vectors == 1 else {"REGISTERS": 232, "maxnreg": 168})


def streams(weights: list[torch.Tensor], vectors: int) -> bool:
    """Whether `linear` takes a weight, or the two of a SwiGLU: large, its rows fit for bulk copies, the vectors for
    shared memory."""
    if linear_kernel is None or sum(w.numel() * w.element_size() for w in weights) < RING_BYTES:
        return False
    inner, itemsize = weights[0].shape[1], weights[0].element_size()
    plan = ring_plan(itemsize, len(weights) == 2, vectors)
    rings = 2 * plan["STAGES"] * len(weights) * plan["ROWS"] * plan["COLUMNS"] * itemsize
    held = vectors * triton.cdiv(inner, plan["COLUMNS"]) * plan["COLUMNS"] * itemsize
    return rings + held + 1024 <= SHARED_BYTES and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and inner * itemsize % 16 == 0 for w in weights
    )


def linear(x, weights, out, norm, scale, residual, residual_share, multiprocessors, early) -> None:
    """out = scale * x W^T of one weight, or silu(x W^T) * (x U^T) of two, for weights that it `streams`.

    Args:
        x: `[M, K]`; RMS-normalised by the module `norm` first, unless that is None.
        weights: one or two, `[n, K]` each.
        out: `[M, n]`.
        residual: `[M, n]`, of which `residual_share` times is added, or None; may be `out`.
        multiprocessors, early: as in `DeviceFacts`.
    """
    itemsize, rows = weights[0].element_size(), weights[0].shape[0]
    plan = ring_plan(itemsize, len(weights) == 2, x.shape[0])
    block = [plan["ROWS"], plan["COLUMNS"]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * itemsize, rank=2)
    descriptors = [TensorDescriptor(w, list(w.shape), [w.stride(0), 1], block, layout) for w in weights]
    launch(
        x.device, linear_kernel, (min(triton.cdiv(rows, 2 * plan["ROWS"]), multiprocessors),),
        descriptors[0], descriptors[-1], rows, x, x.stride(0), x if norm is None else norm.weight, scale,
        0.0 if norm is None else norm.variance_epsilon, out if residual is None else residual, residual_share,
        out, out.stride(0),
        K=weights[0].shape[1], M=x.shape[0], NORM=norm is not None, SWIGLU=len(weights) == 2,
        RESIDUAL=residual is not None, PDL=early, **plan, **launch_options(early),
    )  # fmt: skip
