"""Gluon kernel of the linear maps of a few vectors on Hopper GPUs: weights stream through a ring of shared memory.

A matrix times a few vectors takes as long as its weights take to arrive, so all that counts is that copies never stop:
one program per multiprocessor keeps a ring of bulk tensor copies in flight, and starts it before it waits for the
kernel in front. The ring leaves room for that of the kernel behind, which does the same.

Legend: M vectors, K inputs, N outputs; a tile is ROWS rows by COLUMNS columns of a weight.
"""

import torch

from .hopper_mlra import TensorDescriptor, gl, gluon

linear_kernel = None

if gluon is not None:
    from .hopper_mlra import _barrier, _program_release, _program_wait, fence_async_shared, mbarrier, tma

    @gluon.jit
    def _copy_tiles(
        w0, w1, w2, w3, n0, n1, n2, n3, buf, full, empty, p, P,
        K: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, WEIGHTS: gl.constexpr,
        SWIGLU: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """The copying warp: the tiles of both computing warpgroups, of one of up to four stacked weights or of both
        (SWIGLU), as soon as their buffers are free. Only then may the kernel behind start its copies: they fill the
        pause between the two."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        blocks = _blocks(n0, n1, n2, n3, ROWS, SWIGLU)
        for t in range(0, _share(blocks, p, P) * TILES):
            column = (t % TILES) * COLUMNS
            for wg in gl.static_range(2):
                block = p + wg * P + (t // TILES) * (2 * P)
                if block < blocks:
                    row = block * ROWS
                    stage = wg * STAGES + t % STAGES
                    bar = full.index(stage)
                    tile = buf.index(stage * PARTS)
                    mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)
                    mbarrier.expect(bar, PARTS * w0.block_type.nbytes)
                    if SWIGLU:
                        tma.async_copy_global_to_shared(w0, [row, column], bar, tile)
                        tma.async_copy_global_to_shared(w1, [row, column], bar, buf.index(stage * PARTS + 1))
                    elif WEIGHTS == 1:
                        tma.async_copy_global_to_shared(w0, [row, column], bar, tile)
                    elif row < n0:
                        tma.async_copy_global_to_shared(w0, [row, column], bar, tile)
                    elif row < n0 + n1:
                        tma.async_copy_global_to_shared(w1, [row - n0, column], bar, tile)
                    elif row < n0 + n1 + n2:
                        tma.async_copy_global_to_shared(w2, [row - n0 - n1, column], bar, tile)
                    else:
                        tma.async_copy_global_to_shared(w3, [row - n0 - n1 - n2, column], bar, tile)
        _program_release(PDL)

    @gluon.jit
    def _blocks(n0, n1, n2, n3, ROWS: gl.constexpr, SWIGLU: gl.constexpr):
        """Row blocks in all."""
        rows = n0 if SWIGLU else n0 + n1 + n2 + n3
        return (rows + ROWS - 1) // ROWS

    @gluon.jit
    def _share(blocks, first, P):
        """How many of the row blocks first, first + 2 P, ... there are."""
        return (blocks - first + (2 * P - 1)) // (2 * P)

    @gluon.jit
    def _take_inputs(
        x, x_stride, gamma, scale, eps, x_buf,
        K: gl.constexpr, M: gl.constexpr, COLUMNS: gl.constexpr, NORM: gl.constexpr,
    ):  # fmt: skip
        """Puts the vectors, normalised, into shared memory."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        offs = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 128], [32], [4], [0]))
        for m in gl.static_range(M):
            values = ()
            squares = gl.to_tensor(0.0)
            for tile in gl.static_range(TILES):
                column = tile * COLUMNS + offs
                value = gl.load(x + m * x_stride + column, mask=column < K, other=0.0)
                if NORM:
                    value = value.to(gl.float32)
                    squares += value * value
                    value *= gl.load(gamma + column, mask=column < K, other=0.0).to(gl.float32)
                values = values + (value,)
            if NORM:
                factor = scale * gl.rsqrt(gl.sum(squares, 0) / K + eps)
            for tile in gl.static_range(TILES):
                value = values[tile]
                if NORM:
                    value *= factor
                x_buf.index(m * TILES + tile).store(value)

    @gluon.jit
    def _multiply(
        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride,
        n0, n1, n2, n3, p, P,
        WG: gl.constexpr, K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
        STAGES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups: every second of the program's row blocks. The first one also takes the
        vectors in."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        TILE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        _program_wait(PDL)
        if WG == 0:
            _take_inputs(x, x_stride, gamma, scale, eps, x_buf, K, M, COLUMNS, NORM)
            _barrier()
            mbarrier.arrive(x_full, count=1)
        else:
            mbarrier.wait(x_full, 0)
        total = n0 if SWIGLU else n0 + n1 + n2 + n3
        first = p + WG * P
        t = p * 0
        for block in range(0, _share(_blocks(n0, n1, n2, n3, ROWS, SWIGLU), first, P)):
            accs = ()
            for part in gl.static_range(M * PARTS):
                accs = accs + (gl.zeros([ROWS, COLUMNS], gl.float32, layout=TILE),)
            for tile in range(TILES):
                stage = WG * STAGES + t % STAGES
                mbarrier.wait(full.index(stage), (t // STAGES) & 1)
                weight = buf.index(stage * PARTS).load(TILE)
                weight_up = weight
                if SWIGLU:
                    weight_up = buf.index(stage * PARTS + 1).load(TILE)
                _barrier()
                mbarrier.arrive(empty.index(stage), count=1)
                t += 1
                sums = ()
                for m in gl.static_range(M):
                    row = x_buf.index(m * TILES + tile).load(gl.SliceLayout(0, TILE)).to(gl.float32)
                    row = gl.expand_dims(row, 0)
                    sums = sums + (accs[m * PARTS] + weight.to(gl.float32) * row,)
                    if SWIGLU:
                        sums = sums + (accs[m * PARTS + 1] + weight_up.to(gl.float32) * row,)
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
                    y += gl.load(residual + target, mask=rows < total, other=0.0).to(gl.float32) * residual_share
                gl.store(out + target, y.to(out.dtype.element_ty), mask=rows < total)

    @gluon.jit
    def linear_kernel(
        w0, w1, w2, w3, x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride, n0, n1, n2, n3,
        WEIGHTS: gl.constexpr, K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
        STAGES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
        REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """out[m] = [w0; w1; w2; w3] x[m], or silu(w0 x[m]) * (w1 x[m]); x normalised (NORM), `residual` added."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        x_dtype: gl.constexpr = gl.float32 if NORM else x.dtype.element_ty
        buf = gl.allocate_shared_memory(w0.dtype, [2 * STAGES * PARTS, ROWS, COLUMNS], w0.layout)
        x_buf = gl.allocate_shared_memory(x_dtype, [M * TILES, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2 * STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        mbarrier.init(x_full, count=1)
        fence_async_shared()
        _barrier()
        p = gl.program_id(0)
        P = gl.num_programs(0)
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share,
                        out, out_stride, n0, n1, n2, n3, p, P,
                        0, K, M, ROWS, COLUMNS, STAGES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (
                    _multiply,
                    (
                        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share,
                        out, out_stride, n0, n1, n2, n3, p, P,
                        1, K, M, ROWS, COLUMNS, STAGES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (
                    _copy_tiles,
                    (
                        w0, w1, w2, w3, n0, n1, n2, n3, buf, full, empty, p, P,
                        K, ROWS, COLUMNS, STAGES, WEIGHTS, SWIGLU, PDL,
                    ),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip


def ring_plan(inner: int, itemsize: int, swiglu: bool, vectors: int) -> dict[str, int]:
    """Tiles of 8 KB, six of them in flight for each of two warpgroups, and registers of a thread."""
    columns = 2048 // itemsize // (2 if swiglu else 1)
    plan = {"ROWS": 4, "COLUMNS": max(256, min(columns, 1 << (inner - 1).bit_length())), "STAGES": 6, "num_warps": 4}
    # One vector leaves registers for the kernel behind
    return plan | ({"REGISTERS": 104, "maxnreg": 80} if vectors == 1 else {"REGISTERS": 232, "maxnreg": 168})


def streams(weights: list[torch.Tensor]) -> bool:
    """Whether `linear` takes these weights: bulk copies need aligned rows, and a tile lies in one weight."""
    return linear_kernel is not None and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and w.stride(0) * w.element_size() % 16 == 0 and w.shape[0] % 4 == 0
        for w in weights
    )


def linear(
    x, weights, out, norm_weight, scale, eps, residual, residual_share, swiglu, multiprocessors, early
) -> None:  # fmt: skip
    """out[M, N] = x[M, K] times the stacked weights [n, K], or silu(x w0) * (x w1); see `fused_mlra.FusedStep`."""
    inner = weights[0].shape[1]
    plan = ring_plan(inner, weights[0].element_size(), swiglu, x.shape[0])
    block = [plan["ROWS"], plan["COLUMNS"]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * weights[0].element_size(), rank=2)
    sizes = [w.shape[0] for w in weights]
    descriptors = [TensorDescriptor(w, list(w.shape), [w.stride(0), 1], block, layout) for w in weights]
    blocks = -(-(sizes[0] if swiglu else sum(sizes)) // plan["ROWS"])
    linear_kernel[(min(-(-blocks // 2), multiprocessors),)](
        *descriptors, *[descriptors[-1]] * (4 - len(weights)), x, x.stride(0),
        x if norm_weight is None else norm_weight, scale, eps, out if residual is None else residual, residual_share,
        out, out.stride(0), *sizes, *[0] * (4 - len(weights)),
        WEIGHTS=len(weights), K=inner, M=x.shape[0], NORM=norm_weight is not None, SWIGLU=swiglu,
        RESIDUAL=residual is not None, PDL=early, **plan, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
