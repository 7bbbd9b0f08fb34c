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
    def _copy_tile(
        t, w0, w1, w2, w3, n0, n1, n2, buf, full,
        WEIGHTS: gl.constexpr, TILES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
        SWIGLU: gl.constexpr,
    ):  # fmt: skip
        """Start the copies of this program's tile t: of one of up to four stacked weights, or (SWIGLU) of both."""
        stage = t % STAGES
        row = (gl.program_id(0) + (t // TILES) * gl.num_programs(0)) * ROWS
        column = (t % TILES) * COLUMNS
        bar = full.index(stage)
        mbarrier.expect(bar, (2 if SWIGLU else 1) * w0.block_type.nbytes)
        if SWIGLU:
            tma.async_copy_global_to_shared(w0, [row, column], bar, buf.index(2 * stage))
            tma.async_copy_global_to_shared(w1, [row, column], bar, buf.index(2 * stage + 1))
        elif WEIGHTS == 1:
            tma.async_copy_global_to_shared(w0, [row, column], bar, buf.index(stage))
        elif row < n0:
            tma.async_copy_global_to_shared(w0, [row, column], bar, buf.index(stage))
        elif row < n0 + n1:
            tma.async_copy_global_to_shared(w1, [row - n0, column], bar, buf.index(stage))
        elif row < n0 + n1 + n2:
            tma.async_copy_global_to_shared(w2, [row - n0 - n1, column], bar, buf.index(stage))
        else:
            tma.async_copy_global_to_shared(w3, [row - n0 - n1 - n2, column], bar, buf.index(stage))

    @gluon.jit
    def _take_inputs(
        x, x_stride, gamma, scale, eps, x_buf,
        K: gl.constexpr, M: gl.constexpr, COLUMNS: gl.constexpr, NORM: gl.constexpr, WARPS: gl.constexpr,
    ):  # fmt: skip
        """Puts the vectors, times gamma, into shared memory; returns the factor of each one's products."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        offs = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // (32 * WARPS)], [32], [WARPS], [0]))
        factors = ()
        for m in gl.static_range(M):
            squares = gl.to_tensor(0.0)
            for tile in gl.static_range(TILES):
                column = tile * COLUMNS + offs
                value = gl.load(x + m * x_stride + column, mask=column < K, other=0.0)
                if NORM:
                    value = value.to(gl.float32)
                    squares += value * value
                    value *= gl.load(gamma + column, mask=column < K, other=0.0).to(gl.float32)
                x_buf.index(m * TILES + tile).store(value)
            factor = scale
            if NORM:
                factor = scale * gl.rsqrt(gl.sum(squares, 0) / K + eps)
            factors = factors + (factor,)
        return factors

    @gluon.jit
    def linear_kernel(
        w0, w1, w2, w3, x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride, n0, n1, n2, n3,
        WEIGHTS: gl.constexpr, K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
        STAGES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
        num_warps: gl.constexpr,
    ):  # fmt: skip
        """out[m] = [w0; w1; w2; w3] x[m], or silu(w0 x[m]) * (w1 x[m]); x normalised (NORM), `residual` added."""
        TILES: gl.constexpr = (K + COLUMNS - 1) // COLUMNS
        PARTS: gl.constexpr = 2 if SWIGLU else 1
        TILE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])
        FLAT_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        x_dtype: gl.constexpr = gl.float32 if NORM else x.dtype.element_ty
        buf = gl.allocate_shared_memory(w0.dtype, [STAGES * PARTS, ROWS, COLUMNS], w0.layout)
        x_buf = gl.allocate_shared_memory(x_dtype, [M * TILES, COLUMNS], FLAT_SHARED)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
        fence_async_shared()
        _barrier()
        rows_in_all = n0 if SWIGLU else n0 + n1 + n2 + n3
        blocks = (rows_in_all + ROWS - 1) // ROWS
        mine = (blocks - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
        tiles = mine * TILES
        for t in range(0, gl.minimum(tiles, STAGES)):
            _copy_tile(t, w0, w1, w2, w3, n0, n1, n2, buf, full, WEIGHTS, TILES, ROWS, COLUMNS, STAGES, SWIGLU)
        _program_release(PDL)
        _program_wait(PDL)

        factors = _take_inputs(x, x_stride, gamma, scale, eps, x_buf, K, M, COLUMNS, NORM, num_warps)
        _barrier()

        t = gl.program_id(0) * 0
        for block in range(mine):
            accs = ()
            for z in gl.static_range(M * PARTS):
                accs = accs + (gl.zeros([ROWS, COLUMNS], gl.float32, layout=TILE),)
            for tile in range(TILES):
                stage = t % STAGES
                mbarrier.wait(full.index(stage), (t // STAGES) & 1)
                weight = buf.index(stage * PARTS).load(TILE)
                weight_up = weight
                if SWIGLU:
                    weight_up = buf.index(stage * PARTS + 1).load(TILE)
                _barrier()
                if t + STAGES < tiles:
                    _copy_tile(
                        t + STAGES, w0, w1, w2, w3, n0, n1, n2, buf, full,
                        WEIGHTS, TILES, ROWS, COLUMNS, STAGES, SWIGLU,
                    )  # fmt: skip
                t += 1
                sums = ()
                for v in gl.static_range(M):
                    row = x_buf.index(v * TILES + tile).load(gl.SliceLayout(0, TILE)).to(gl.float32)
                    row = gl.expand_dims(row, 0)
                    sums = sums + (accs[v * PARTS] + weight.to(gl.float32) * row,)
                    if SWIGLU:
                        sums = sums + (accs[v * PARTS + 1] + weight_up.to(gl.float32) * row,)
                accs = sums
            rows = (gl.program_id(0) + block * gl.num_programs(0)) * ROWS
            rows += gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE))
            ok = rows < rows_in_all
            for v in gl.static_range(M):
                y = gl.sum(accs[v * PARTS], 1) * factors[v]
                if SWIGLU:
                    y = y / (1 + gl.exp(-y)) * (gl.sum(accs[v * PARTS + 1], 1) * factors[v])
                target = v * out_stride + rows
                if RESIDUAL:
                    y += gl.load(residual + target, mask=ok, other=0.0).to(gl.float32) * residual_share
                gl.store(out + target, y.to(out.dtype.element_ty), mask=ok)


def ring_plan(inner: int, itemsize: int, swiglu: bool) -> dict[str, int]:
    """Tile and number of buffers: tiles of 16 KB, six of them in flight."""
    columns = 2048 // itemsize // (2 if swiglu else 1)
    return {"ROWS": 8, "COLUMNS": max(256, min(columns, 1 << (inner - 1).bit_length())), "STAGES": 6, "num_warps": 8}


def streams(weights: list[torch.Tensor]) -> bool:
    """Whether `linear` takes these weights: bulk copies need aligned rows, and a tile lies in one weight."""
    return linear_kernel is not None and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and w.stride(0) * w.element_size() % 16 == 0 and w.shape[0] % 8 == 0
        for w in weights
    )


def linear(
    x, weights, out, norm_weight, scale, eps, residual, residual_share, swiglu, multiprocessors, early
) -> None:  # fmt: skip
    """out[M, N] = x[M, K] times the stacked weights [n, K], or silu(x w0) * (x w1); see `fused_mlra.FusedStep`."""
    inner = weights[0].shape[1]
    plan = ring_plan(inner, weights[0].element_size(), swiglu)
    block = [plan["ROWS"], plan["COLUMNS"]]
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(weights[0].dtype).removeprefix("torch.")))
    sizes = [w.shape[0] for w in weights]
    descriptors = [TensorDescriptor(w, list(w.shape), [w.stride(0), 1], block, layout) for w in weights]
    blocks = -(-(sizes[0] if swiglu else sum(sizes)) // plan["ROWS"])
    linear_kernel[(min(blocks, multiprocessors),)](
        *descriptors, *[descriptors[-1]] * (4 - len(weights)), x, x.stride(0),
        x if norm_weight is None else norm_weight, scale, eps, out if residual is None else residual, residual_share,
        out, out.stride(0), *sizes, *[0] * (4 - len(weights)),
        WEIGHTS=len(weights), K=inner, M=x.shape[0], NORM=norm_weight is not None, SWIGLU=swiglu,
        RESIDUAL=residual is not None, PDL=early, **plan, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
