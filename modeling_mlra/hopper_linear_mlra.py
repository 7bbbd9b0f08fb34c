"""Gluon kernels of linear maps of few vectors on Hopper GPUs: large weights stream through rings in shared memory.

A matrix times a few vectors takes as long as its weights take to arrive, so all that counts is that the copies never
stop. One program per multiprocessor keeps two rings of bulk tensor copies in flight, and fills them before it waits
for the kernel in front. Where maps follow one another, one kernel takes them all: the rings go on with the next
weights while the programs wait for each other's outputs.

Legend: M vectors, K inputs; a box is ROWS rows by COLUMNS columns of a weight [n, K]. A buffer of a ring holds two: of
the two weights of a SwiGLU, or two neighbours of one weight. A row block is ROWS whole rows.
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
    def _share(blocks, first, P):
        """How many of the row blocks first, first + 2 P, ... there are."""
        return (blocks - first + (2 * P - 1)) // (2 * P)

    @gluon.jit
    def _copy_map(
        w, w_up, n, buf, full, empty, p, P, turn0, turn1,
        K: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SWIGLU: gl.constexpr,
    ):  # fmt: skip
        """The copying warp: a map's weights for both computing warpgroups, as soon as their buffers are free.

        Takes and returns how many buffers each ring has filled."""
        STEP: gl.constexpr = COLUMNS if SWIGLU else 2 * COLUMNS
        blocks = (n + ROWS - 1) // ROWS
        for i in range(0, _share(blocks, p, P)):
            for column in range(0, K, STEP):
                for wg in gl.static_range(2):
                    block = p + wg * P + i * (2 * P)
                    if block < blocks:
                        turn = turn0 if wg == 0 else turn1
                        stage = wg * STAGES + turn % STAGES
                        bar = full.index(stage)
                        mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
                        mbarrier.expect(bar, 2 * w.block_type.nbytes)
                        row = block * ROWS
                        tma.async_copy_global_to_shared(w, [row, column], bar, buf.index(2 * stage))
                        second = column if SWIGLU else column + COLUMNS
                        tma.async_copy_global_to_shared(w_up, [row, second], bar, buf.index(2 * stage + 1))
                        if wg == 0:
                            turn0 += 1
                        else:
                            turn1 += 1
        return turn0, turn1

    @gluon.jit
    def _take_inputs(
        x, x_stride, gamma, scale, eps, x_buf,
        K: gl.constexpr, M: gl.constexpr, COLUMNS: gl.constexpr, BOXES: gl.constexpr, NORM: gl.constexpr,
    ):  # fmt: skip
        """Puts the vectors, normalised, into shared memory, in BOXES boxes each."""
        offs = gl.arange(0, COLUMNS, layout=gl.BlockedLayout([COLUMNS // 128], [32], [4], [0]))
        for m in gl.static_range(M):
            values = ()
            squares = gl.to_tensor(0.0)
            for box in gl.static_range(BOXES):
                column = box * COLUMNS + offs
                value = gl.load(x + m * x_stride + column, mask=column < K, other=0.0, cache_modifier=".cg")
                if NORM:
                    value = value.to(gl.float32)
                    squares += value * value
                    value *= gl.load(gamma + column, mask=column < K, other=0.0).to(gl.float32)
                values = values + (value,)  # type: ignore[assignment]
            if NORM:
                factor = scale * gl.rsqrt(gl.sum(squares, 0) / K + eps)
            for box in gl.static_range(BOXES):
                value = values[box]
                if NORM:
                    value *= factor
                x_buf.index(m * BOXES + box).store(value)
        _barrier()

    @gluon.jit
    def _apply_map(
        buf, x_buf, full, empty, scale, residual, residual_share, out, out_stride, n, p, P, turn,
        WG: gl.constexpr, K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
        STAGES: gl.constexpr, BOXES: gl.constexpr, SWIGLU: gl.constexpr, RESIDUAL: gl.constexpr,
    ):  # fmt: skip
        """A computing warpgroup's part of a map: every second of the program's row blocks.

        Takes and returns how many buffers of its ring it has emptied."""
        STEP: gl.constexpr = COLUMNS if SWIGLU else 2 * COLUMNS
        TILE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        SUMS: gl.constexpr = 2 * M if SWIGLU else M
        first = p + WG * P
        for i in range(0, _share((n + ROWS - 1) // ROWS, first, P)):
            accs = ()
            for _sum in gl.static_range(SUMS):
                accs = accs + (gl.zeros([ROWS, COLUMNS], gl.float32, layout=TILE),)  # type: ignore[assignment]
            for tile in range((K + STEP - 1) // STEP):
                stage = WG * STAGES + turn % STAGES
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                left = buf.index(2 * stage).load(TILE)
                right = buf.index(2 * stage + 1).load(TILE)
                fence_async_shared()  # these reads come before the copies that follow into the same buffer
                _barrier()
                mbarrier.arrive(empty.index(stage), count=1)
                turn += 1
                sums = ()
                for m in gl.static_range(M):
                    box = m * BOXES + (tile if SWIGLU else 2 * tile)
                    row = gl.expand_dims(x_buf.index(box).load(gl.SliceLayout(0, TILE)).to(gl.float32), 0)
                    if SWIGLU:
                        sums = sums + (accs[2 * m] + left.to(gl.float32) * row,)  # type: ignore[assignment]
                        sums = sums + (accs[2 * m + 1] + right.to(gl.float32) * row,)  # type: ignore[assignment]
                    else:
                        acc = accs[m] + left.to(gl.float32) * row
                        row = gl.expand_dims(x_buf.index(box + 1).load(gl.SliceLayout(0, TILE)).to(gl.float32), 0)
                        sums = sums + (acc + right.to(gl.float32) * row,)  # type: ignore[assignment]
                accs = sums
            rows = (first + i * (2 * P)) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, TILE))
            for m in gl.static_range(M):
                if SWIGLU:
                    y = gl.sum(accs[2 * m], 1)
                    y = y / (1 + gl.exp(-y)) * gl.sum(accs[2 * m + 1], 1)
                else:
                    y = gl.sum(accs[m], 1) * scale
                target = m * out_stride + rows
                if RESIDUAL:
                    y += gl.load(residual + target, mask=rows < n, other=0.0).to(gl.float32) * residual_share
                gl.store(out + target, y.to(out.dtype.element_ty), mask=rows < n)
        return turn

    @gluon.jit
    def _make_barriers(full, empty, x_full, COUNT: gl.constexpr):
        for i in gl.static_range(COUNT):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        mbarrier.init(x_full, count=1)
        fence_async_shared()
        _barrier()

    @gluon.jit
    def _copy_one(
        w, w_up, n, buf, full, empty, p, P,
        K: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SWIGLU: gl.constexpr,
    ):  # fmt: skip
        _copy_map(w, w_up, n, buf, full, empty, p, P, p * 0, p * 0, K, ROWS, COLUMNS, STAGES, SWIGLU)

    @gluon.jit
    def _multiply_one(
        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride,
        n, p, P,
        WG: gl.constexpr, K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
        STAGES: gl.constexpr, BOXES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr,
        RESIDUAL: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        _program_wait(PDL)
        if WG == 0:
            _take_inputs(x, x_stride, gamma, scale if NORM else 1.0, eps, x_buf, K, M, COLUMNS, BOXES, NORM)
            mbarrier.arrive(x_full, count=1)
        else:
            mbarrier.wait(x_full, 0)
        _apply_map(
            buf, x_buf, full, empty, 1.0 if NORM else scale, residual, residual_share, out, out_stride, n, p, P, p * 0,
            WG, K, M, ROWS, COLUMNS, STAGES, BOXES, SWIGLU, RESIDUAL,
        )  # fmt: skip

    @gluon.jit
    def linear_kernel(
        w, w_up, n, x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride,
        K: gl.constexpr, M: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
        BOXES: gl.constexpr, NORM: gl.constexpr, SWIGLU: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
        REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """out[m] = w x[m], or silu(w x[m]) * (w_up x[m]); x normalised first (NORM), `residual` added last."""
        x_dtype: gl.constexpr = gl.float32 if NORM else x.dtype.element_ty
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        buf = gl.allocate_shared_memory(w.dtype, [4 * STAGES, ROWS, COLUMNS], w.layout)
        x_buf = gl.allocate_shared_memory(x_dtype, [M * BOXES, COLUMNS], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        _make_barriers(full, empty, x_full, 2 * STAGES)
        _program_release(PDL)
        p = gl.program_id(0)
        P = gl.num_programs(0)
        gl.warp_specialize(
            [
                (
                    _multiply_one,
                    (
                        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share,
                        out, out_stride, n, p, P,
                        0, K, M, ROWS, COLUMNS, STAGES, BOXES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (
                    _multiply_one,
                    (
                        buf, x_buf, full, empty, x_full, x, x_stride, gamma, scale, eps, residual, residual_share,
                        out, out_stride, n, p, P,
                        1, K, M, ROWS, COLUMNS, STAGES, BOXES, NORM, SWIGLU, RESIDUAL, PDL,
                    ),
                ),
                (
                    _copy_one,
                    (w, w_up, n, buf, full, empty, p, P, K, ROWS, COLUMNS, STAGES, SWIGLU),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip

    @gluon.jit
    def _report(counter):
        """This warpgroup's outputs are there for all programs to read."""
        _barrier()
        gl.atomic_add(counter, 1, sem="release", scope="gpu")

    @gluon.jit
    def _peek(counter):
        return gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
        )

    @gluon.jit
    def _await_reports(counter, count):
        seen = _peek(counter)
        while seen < count:
            seen = _peek(counter)
        _barrier()

    @gluon.jit
    def _copy_block(
        w_o, w_gate, w_up, w_down, hidden_size, mlp_size, buf, full, empty, p, P,
        K_O: gl.constexpr, K_HIDDEN: gl.constexpr, K_MLP: gl.constexpr,
        ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        t0, t1 = _copy_map(
            w_o, w_o, hidden_size, buf, full, empty, p, P, p * 0, p * 0, K_O, ROWS, COLUMNS, STAGES, False
        )
        t0, t1 = _copy_map(
            w_gate, w_up, mlp_size, buf, full, empty, p, P, t0, t1, K_HIDDEN, ROWS, COLUMNS, STAGES, True
        )
        _copy_map(w_down, w_down, hidden_size, buf, full, empty, p, P, t0, t1, K_MLP, ROWS, COLUMNS, STAGES, False)

    @gluon.jit
    def _multiply_block(
        buf, o_buf, hidden_buf, mlp_buf, full, empty, x_full,
        heads, heads_stride, gamma, eps, hidden, hidden_stride, mlp, mlp_stride, reports, hidden_size, mlp_size, p, P,
        WG: gl.constexpr, K_O: gl.constexpr, K_HIDDEN: gl.constexpr, K_MLP: gl.constexpr, M: gl.constexpr,
        ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
        B_O: gl.constexpr, B_HIDDEN: gl.constexpr, B_MLP: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """The first warpgroup takes the inputs of each map in, once all programs have reported those that it needs."""
        _program_wait(PDL)
        if WG == 0:
            _take_inputs(heads, heads_stride, gamma, 1.0, eps, o_buf, K_O, M, COLUMNS, B_O, False)
            mbarrier.arrive(x_full, count=1)
        else:
            mbarrier.wait(x_full, 0)
        turn = _apply_map(
            buf, o_buf, full, empty, 1.0, hidden, 1.0, hidden, hidden_stride, hidden_size, p, P, p * 0,
            WG, K_O, M, ROWS, COLUMNS, STAGES, B_O, False, True,
        )  # fmt: skip
        _report(reports)
        if WG == 0:
            _await_reports(reports, 2 * P)
            _take_inputs(hidden, hidden_stride, gamma, 1.0, eps, hidden_buf, K_HIDDEN, M, COLUMNS, B_HIDDEN, True)
            mbarrier.arrive(x_full, count=1)
        else:
            mbarrier.wait(x_full, 1)
        turn = _apply_map(
            buf, hidden_buf, full, empty, 1.0, hidden, 1.0, mlp, mlp_stride, mlp_size, p, P, turn,
            WG, K_HIDDEN, M, ROWS, COLUMNS, STAGES, B_HIDDEN, True, False,
        )  # fmt: skip
        _report(reports + 1)
        if WG == 0:
            _await_reports(reports + 1, 2 * P)
            _take_inputs(mlp, mlp_stride, gamma, 1.0, eps, mlp_buf, K_MLP, M, COLUMNS, B_MLP, False)
            mbarrier.arrive(x_full, count=1)
        else:
            mbarrier.wait(x_full, 0)
        _apply_map(
            buf, mlp_buf, full, empty, 1.0, hidden, 1.0, hidden, hidden_stride, hidden_size, p, P, turn,
            WG, K_MLP, M, ROWS, COLUMNS, STAGES, B_MLP, False, True,
        )  # fmt: skip

    @gluon.jit
    def block_kernel(
        w_o, w_gate, w_up, w_down, heads, heads_stride, gamma, eps, hidden, hidden_stride, mlp, mlp_stride, reports,
        hidden_size, mlp_size,
        K_O: gl.constexpr, K_HIDDEN: gl.constexpr, K_MLP: gl.constexpr, M: gl.constexpr,
        ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
        B_O: gl.constexpr, B_HIDDEN: gl.constexpr, B_MLP: gl.constexpr, PDL: gl.constexpr,
        REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """hidden += W_o heads; mlp = silu(W_gate norm(hidden)) * (W_up norm(hidden)); hidden += W_down mlp.

        All programs run at once, and wait for each other twice: `reports` counts, from 0, the warpgroups whose outputs
        of the first and of the second map are there."""
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        dtype: gl.constexpr = heads.dtype.element_ty
        buf = gl.allocate_shared_memory(w_o.dtype, [4 * STAGES, ROWS, COLUMNS], w_o.layout)
        o_buf = gl.allocate_shared_memory(dtype, [M * B_O, COLUMNS], FLAT)
        hidden_buf = gl.allocate_shared_memory(gl.float32, [M * B_HIDDEN, COLUMNS], FLAT)
        mlp_buf = gl.allocate_shared_memory(dtype, [M * B_MLP, COLUMNS], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        _make_barriers(full, empty, x_full, 2 * STAGES)
        _program_release(PDL)
        p = gl.program_id(0)
        P = gl.num_programs(0)
        gl.warp_specialize(
            [
                (
                    _multiply_block,
                    (
                        buf, o_buf, hidden_buf, mlp_buf, full, empty, x_full,
                        heads, heads_stride, gamma, eps, hidden, hidden_stride, mlp, mlp_stride, reports,
                        hidden_size, mlp_size, p, P,
                        0, K_O, K_HIDDEN, K_MLP, M, ROWS, COLUMNS, STAGES, B_O, B_HIDDEN, B_MLP, PDL,
                    ),
                ),
                (
                    _multiply_block,
                    (
                        buf, o_buf, hidden_buf, mlp_buf, full, empty, x_full,
                        heads, heads_stride, gamma, eps, hidden, hidden_stride, mlp, mlp_stride, reports,
                        hidden_size, mlp_size, p, P,
                        1, K_O, K_HIDDEN, K_MLP, M, ROWS, COLUMNS, STAGES, B_O, B_HIDDEN, B_MLP, PDL,
                    ),
                ),
                (
                    _copy_block,
                    (
                        w_o, w_gate, w_up, w_down, hidden_size, mlp_size, buf, full, empty, p, P,
                        K_O, K_HIDDEN, K_MLP, ROWS, COLUMNS, STAGES,
                    ),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip


def ring_plan(itemsize: int, vectors: int) -> dict[str, int]:
    """Rings of 64 KB for each of the two warpgroups, chosen on an H200 with `python -m scripts.bench_fused`.

    One vector leaves registers for programs of the small kernels around this one; many need smaller boxes to have
    enough for their sums.
    """
    rows = 8 if vectors <= 2 else 4
    plan = {"ROWS": rows, "COLUMNS": 1024 // itemsize, "STAGES": 32 // rows, "num_warps": 4}
    return plan | ({"REGISTERS": 136, "maxnreg": 104} if vectors == 1 else {"REGISTERS": 232, "maxnreg": 168})


def _boxes(inner: int, columns: int, swiglu: bool) -> int:
    return triton.cdiv(inner, columns) if swiglu else 2 * triton.cdiv(inner, 2 * columns)


def _fits_copies(weight: torch.Tensor) -> bool:
    row_bytes = weight.shape[1] * weight.element_size()
    return weight.is_contiguous() and weight.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def _ring_bytes(plan: dict[str, int], itemsize: int) -> int:
    return 4 * plan["STAGES"] * plan["ROWS"] * plan["COLUMNS"] * itemsize + 1024


def streams(weights: list[torch.Tensor], vectors: int, norm: bool) -> bool:
    """Whether `linear` takes a weight, or the two of a SwiGLU: large, its rows fit for bulk copies, the vectors for
    shared memory."""
    if linear_kernel is None or sum(w.numel() * w.element_size() for w in weights) < RING_BYTES:
        return False
    inner, itemsize = weights[0].shape[1], weights[0].element_size()
    plan = ring_plan(itemsize, vectors)
    held = vectors * _boxes(inner, plan["COLUMNS"], len(weights) == 2) * plan["COLUMNS"] * (4 if norm else itemsize)
    return _ring_bytes(plan, itemsize) + held <= SHARED_BYTES and all(map(_fits_copies, weights))


def _descriptor(weight: torch.Tensor, plan: dict[str, int]):
    block = [plan["ROWS"], plan["COLUMNS"]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * weight.element_size(), rank=2)
    return TensorDescriptor(weight, list(weight.shape), [weight.stride(0), 1], block, layout)


def linear(x, weights, out, norm, scale, residual, residual_share, multiprocessors, early) -> None:
    """out = scale * x W^T of one weight, or silu(x W^T) * (x U^T) of two, for weights that it `streams`.

    Args:
        x: `[M, K]`; RMS-normalised by the module `norm` first, unless that is None.
        weights: one or two, `[n, K]` each.
        out: `[M, n]`.
        residual: `[M, n]`, of which `residual_share` times is added, or None; may be `out`.
        multiprocessors, early: as from `plans_mlra.device_facts`.
    """
    rows, inner = weights[0].shape
    plan = ring_plan(weights[0].element_size(), x.shape[0])
    descriptors = [_descriptor(w, plan) for w in weights]
    linear_kernel[(min(triton.cdiv(rows, 2 * plan["ROWS"]), multiprocessors),)](
        descriptors[0], descriptors[-1], rows, x, x.stride(0), x if norm is None else norm.weight, scale,
        0.0 if norm is None else norm.variance_epsilon, out if residual is None else residual, residual_share,
        out, out.stride(0),
        K=inner, M=x.shape[0], BOXES=_boxes(inner, plan["COLUMNS"], len(weights) == 2), NORM=norm is not None,
        SWIGLU=len(weights) == 2, RESIDUAL=residual is not None, PDL=early, **plan, **launch_options(early),
    )  # fmt: skip


def streams_block(weights: list[torch.Tensor], vectors: int) -> bool:
    """Whether `block` takes the weights of an output projection, gate, up and down: as in `streams`."""
    if linear_kernel is None or sum(w.numel() * w.element_size() for w in weights) < RING_BYTES:
        return False
    itemsize = weights[0].element_size()
    plan = ring_plan(itemsize, vectors)
    o, hidden, mlp = _block_boxes(weights, plan["COLUMNS"])
    held = vectors * plan["COLUMNS"] * ((o + mlp) * itemsize + hidden * 4)
    return _ring_bytes(plan, itemsize) + held <= SHARED_BYTES and all(map(_fits_copies, weights))


def _block_boxes(weights: list[torch.Tensor], columns: int) -> list[int]:
    return [_boxes(w.shape[1], columns, swiglu) for w, swiglu in zip(weights[::2] + weights[3:], (0, 1, 0), strict=True)]


def block(heads, weights, norm, hidden, mlp, reports, multiprocessors, early) -> None:
    """hidden += heads W_o^T; mlp = silu(norm(hidden) W_gate^T) * (norm(hidden) W_up^T); hidden += mlp W_down^T.

    Args:
        heads: `[M, heads * v]`.
        weights: of the output projection, gate, up and down, that it `streams_block`.
        norm: the RMS norm module in front of the MLP.
        hidden, mlp: `[M, hidden_size]`, updated, and `[M, intermediate_size]`, overwritten.
        reports: int32 `[2]`, zeros; overwritten.
        multiprocessors, early: as from `plans_mlra.device_facts`.
    """
    plan = ring_plan(weights[0].element_size(), heads.shape[0])
    o, in_hidden, in_mlp = _block_boxes(weights, plan["COLUMNS"])
    block_kernel[(multiprocessors,)](
        *(_descriptor(w, plan) for w in weights), heads, heads.stride(0), norm.weight, norm.variance_epsilon,
        hidden, hidden.stride(0), mlp, mlp.stride(0), reports, hidden.shape[1], mlp.shape[1],
        K_O=heads.shape[1], K_HIDDEN=hidden.shape[1], K_MLP=mlp.shape[1], M=heads.shape[0],
        B_O=o, B_HIDDEN=in_hidden, B_MLP=in_mlp, PDL=early,
        launch_cooperative_grid=True, **plan, **launch_options(early),
    )  # fmt: skip
