"""Linear maps of the fused decoding step for more than a few sequences, on tensor cores.

The products stay cheap beside the reading of the weights, which is what the time of a step is made of. So that every
multiprocessor reads, the columns of small weights are split over programs; the last one to arrive adds up their sums.
"""

from typing import Any

import torch

from .device_mlra import launch, launch_options, tl, triton
from .step_kernels_mlra import stacked

batch_linear_kernel: Any = None
batch_value_kernel: Any = None

ROWS = 64  # of a tile of weights: the height of the tensor cores' product on Hopper

if triton is not None:
    from .decode_triton_mlra import _dot
    from .step_kernels_mlra import _block_of, _wait

    @triton.jit
    def _vectors_tile(x, x_stride, first, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, WIDTH: tl.constexpr):
        """WIDTH columns from `first` on of the vectors [M, K], as [MP, WIDTH]."""
        m, columns = tl.arange(0, MP), first + tl.arange(0, WIDTH)
        mask = (m < M)[:, None] & (columns < K)[None, :]
        return tl.load(x + (m * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0)

    @triton.jit
    def _multiply(
        acc, squares, tile, gamma, x, x_stride, first,
        K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
    ):  # fmt: skip
        """Adds a tile's products with all vectors to [rows, MP], and the vectors' squares to [MP]."""
        vectors = _vectors_tile(x, x_stride, first, K, M, MP, WIDTH)
        if NORM:
            exact = vectors.to(tl.float32)
            squares += tl.sum(exact * exact, 1)
            vectors = (exact * gamma.to(tl.float32)).to(vectors.dtype)
        return _dot(tile, tl.trans(vectors), acc), squares

    @triton.jit
    def batch_linear_kernel(
        x, x_stride, gamma, scale, eps, residual, residual_share, out, out_stride,
        w0, w1, w2, w3, n0, n1, n2, n3, apart, part, part_squares, arrived,
        K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
        SPLITS: tl.constexpr, STAGES: tl.constexpr,
        NORM: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """As `linear_kernel`, for all M vectors at once, padded to MP. Products take 16-bit numbers: a normed vector
        is rounded after its multiplication by gamma, as in the modules.

        A tile is ROWS x WIDTH; of a SwiGLU half of its rows are each weight's, w1 lying `apart` numbers behind w0 (all
        rows then have one base, and are read in whole vectors). The first is there before the wait, the others come
        through STAGES buffers. `part`, `part_squares` (float32) and `arrived` (int32, zeros, and left so) are room for
        the sums of SPLITS programs.
        """
        index, m = tl.arange(0, ROWS), tl.arange(0, MP)
        SHARE: tl.constexpr = ROWS // 2 if SWIGLU else ROWS
        block, split = tl.program_id(0), tl.program_id(1)
        w, n, first, inside = w0, n0, 0, block
        if not SWIGLU:
            w, n, first, inside = _block_of(block, w0, w1, w2, w3, n0, n1, n2, n3, ROWS)
        rows = inside * SHARE + index % SHARE
        offsets = rows.to(tl.int64) * K
        if SWIGLU:
            offsets += (index // SHARE) * apart
        source = w + offsets[:, None]
        columns, known = tl.arange(0, WIDTH)[None, :], (rows < n)[:, None]
        PER_SPLIT: tl.constexpr = ((K + WIDTH - 1) // WIDTH + SPLITS - 1) // SPLITS * WIDTH
        start = split * PER_SPLIT
        stop = tl.minimum(start + PER_SPLIT, K)
        tile = tl.load(source + start + columns, mask=known & (start + columns < K), other=0.0)
        gammas = _vectors_tile(gamma, 0, start, K, 1, 1, WIDTH) if NORM else 1.0
        _wait(PDL)
        acc, squares = _multiply(
            tl.zeros([ROWS, MP], tl.float32), tl.zeros([MP], tl.float32), tile, gammas, x, x_stride, start,
            K, M, MP, WIDTH, NORM,
        )  # fmt: skip
        if NORM:
            gammas = _vectors_tile(gamma, 0, start + WIDTH, K, 1, 1, WIDTH)
        for k in tl.range(start + WIDTH, stop, WIDTH, num_stages=STAGES):
            tile = tl.load(source + k + columns, mask=known & (k + columns < K), other=0.0)
            acc, squares = _multiply(acc, squares, tile, gammas, x, x_stride, k, K, M, MP, WIDTH, NORM)
            if NORM:
                gammas = _vectors_tile(gamma, 0, k + WIDTH, K, 1, 1, WIDTH)
        if SPLITS > 1:
            sums = part + (block * SPLITS * ROWS + index)[:, None] * MP + m[None, :]
            square_sums = part_squares + block * SPLITS * MP + m
            tl.store(sums + split * ROWS * MP, acc)
            if NORM:
                tl.store(square_sums + split * MP, squares)
            tl.debug_barrier()  # all of the program's sums are there before it counts as arrived
            if tl.atomic_add(arrived + block, 1, sem="acq_rel") < SPLITS - 1:
                return
            tl.store(arrived + block, 0)
            acc = tl.zeros([ROWS, MP], tl.float32)
            squares = tl.zeros([MP], tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(sums + i * ROWS * MP, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(square_sums + i * MP, cache_modifier=".cg")
        y = acc
        if NORM:
            y *= (scale * tl.rsqrt(squares / K + eps))[None, :]
        if SWIGLU:
            y, up = tl.split(tl.permute(tl.reshape(y, [2, SHARE, MP]), (1, 2, 0)))
            y = y * tl.sigmoid(y) * up
        rows = inside * SHARE + tl.arange(0, SHARE)
        target = m[None, :] * out_stride + first + rows[:, None]
        mask = (rows < n)[:, None] & (m < M)[None, :]
        if RESIDUAL:
            y += tl.load(residual + target, mask=mask, other=0.0).to(tl.float32) * residual_share
        tl.store(out + target, y.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def batch_value_kernel(
        z, kv_b, gate, gate_stride, out, alpha,
        M: tl.constexpr, MP: tl.constexpr, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, R: tl.constexpr,
        DN: tl.constexpr, V: tl.constexpr, RP: tl.constexpr, VB: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """out[m, i] = alpha * sum over branches of W_uv[l, i] z[m, l, i], times sigmoid(gate); VB values a program."""
        query_head = tl.program_id(0)
        values = tl.program_id(1) * VB + tl.arange(0, VB)
        m, rank = tl.arange(0, MP), tl.arange(0, RP)
        first = (query_head // H * C) * H + query_head % H  # of the latents and heads of the branches, H apart
        weights = ()
        for c in tl.static_range(C):
            rows = (first + c * H) * (DN + V) + DN + values
            mask = (values < V)[:, None] & (rank < R)[None, :]
            tile = tl.load(kv_b + (rows.to(tl.int64) * R)[:, None] + rank[None, :], mask=mask, other=0.0)
            weights = weights + (tile,)  # type: ignore[assignment]
        _wait(PDL)
        acc = tl.zeros([VB, MP], tl.float32)
        for c in tl.static_range(C):
            rows = m * L * H + first + c * H
            mask = (m < M)[:, None] & (rank < R)[None, :]
            latents = tl.load(z + (rows * R)[:, None] + rank[None, :], mask=mask, other=0.0)
            acc = _dot(weights[c], tl.trans(latents), acc)
        y = acc * alpha
        column = query_head * V + values
        mask = (values < V)[:, None] & (m < M)[None, :]
        if GATE:
            gates = tl.load(gate + (m * gate_stride)[None, :] + column[:, None], mask=mask, other=0.0)
            y *= tl.sigmoid(gates.to(tl.float32))
        target = out + (m * (L // C) * H * V)[None, :] + column[:, None]
        tl.store(target, y.to(out.dtype.element_ty), mask=mask)


def batch_linear_plan(blocks: int, inner: int, multiprocessors: int) -> dict[str, int]:
    """Columns of a tile and programs per row block, chosen on an H200 with `python -m scripts.bench_fused`."""
    programs = (4 if inner > 4096 else 2) * multiprocessors
    return {"WIDTH": 128, "STAGES": 3, "SPLITS": max(1, min(programs // blocks, inner // 512)), "num_warps": 4}


def padded(vectors: int) -> int:
    """Vectors of one matrix product."""
    return max(16, triton.next_power_of_2(vectors))


def linear(x, weights, out, norm, scale, swiglu, residual, residual_share, arrived, multiprocessors, early) -> None:
    """out = scale * x [w0; w1; ...]^T of up to four weights, or silu(x w0^T) * (x w1^T) of two.

    Args:
        x: `[M, K]`; RMS-normalised by the module `norm` first, unless that is None.
        weights: `[n, K]` each.
        out: `[M, sum of n]`, or `[M, n]`.
        residual: like `out`, of which `residual_share` times is added, or None; may be `out`.
        arrived: int32 zeros, at least `[4 * multiprocessors]`, and zeros again afterwards.
        multiprocessors, early: as in `DeviceFacts`.
    """
    vectors, inner = x.shape
    blocks, stack = stacked(weights, ROWS // 2 if swiglu else ROWS, swiglu)
    plan = batch_linear_plan(blocks, inner, multiprocessors)
    programs, width = blocks * plan["SPLITS"], padded(vectors)
    assert plan["SPLITS"] == 1 or blocks <= arrived.numel(), f"{blocks} row blocks, {arrived.numel()} counts"
    sums = torch.empty(programs * width * (ROWS + 1), dtype=torch.float32, device=x.device)
    apart = (weights[1].data_ptr() - weights[0].data_ptr()) // weights[0].element_size() if swiglu else 0
    launch(
        x.device, batch_linear_kernel, (blocks, plan["SPLITS"]),
        x, x.stride(0), x if norm is None else norm.weight, scale, 0.0 if norm is None else norm.variance_epsilon,
        out if residual is None else residual, residual_share, out, out.stride(0),
        *stack, apart, sums, sums[programs * width * ROWS :], arrived,
        K=inner, M=vectors, MP=width, ROWS=ROWS, NORM=norm is not None, SWIGLU=swiglu, RESIDUAL=residual is not None,
        PDL=early, **plan, **launch_options(early),
    )  # fmt: skip


def value(z, kv_b, gate, out, alpha, shape: dict) -> None:
    """out = alpha * the attention's results through W_uv, branches added up, times sigmoid(gate).

    Args:
        z: `[M, 1, L, H, R]`.
        kv_b: `[L * H * (DN + V), R]`.
        gate: `[M, G * H * V]`, of any first stride, read if the `shape` says so.
        out: `[M, G * H * V]`.
        shape: constants of the kernel.
    """
    block = max(16, min(32, triton.next_power_of_2(shape["V"])))
    heads = shape["L"] // shape["C"] * shape["H"]
    launch(
        z.device, batch_value_kernel, (heads, triton.cdiv(shape["V"], block)),
        z, kv_b, gate, gate.stride(0), out, alpha, MP=padded(shape["M"]), VB=block, **shape, num_warps=4,
        **launch_options(shape["PDL"]),
    )  # fmt: skip
