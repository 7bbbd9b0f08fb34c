"""Gluon kernel of a linear map of few vectors on Hopper GPUs: large weights stream through rings in shared memory.

A matrix times a few vectors takes as long as its weights take to arrive, so all that counts is that the copies never
stop: one program per multiprocessor keeps two rings of bulk tensor copies in flight, and fills them before it waits
for the kernel in front.

Legend: M vectors, K inputs; a tile is ROWS rows by COLUMNS columns of a weight [n, K], a row block ROWS whole rows.
"""

from typing import Any, NamedTuple

from .device_gluon_mlra import TensorDescriptor, gl, gluon
from .device_mlra import constants, launch, launch_options, triton
from .step_device_mlra import Machine
from .step_maps_mlra import LinearMap, map_arguments

# Smaller weights are held in registers as a whole, and are there before a ring has turned
RING_BYTES = 32 * 2**20
RING_SHARED_BYTES = 227 * 2**10
stream_linear_kernel: Any = None


class RingTile(NamedTuple):
    """A tile of a weight, STAGES of them in each of the two rings."""

    ROWS: Any
    COLUMNS: Any
    STAGES: Any


class Rings(NamedTuple):
    """Buffers of tiles [2 * STAGES * PARTS, ROWS, COLUMNS], and barriers that say which are full and which free."""

    tiles: Any
    full: Any
    empty: Any


class Inputs(NamedTuple):
    """The vectors in shared memory, and the barrier that says they are there."""

    tiles: Any
    full: Any


if gluon is not None and triton is not None:
    from .device_gluon_mlra import barrier, bulk_load, fence_async_shared, mbarrier, program_release, program_wait
    from .step_device_mlra import rms_factor, swiglu
    from .step_maps_mlra import widen

    @gluon.jit
    def _share(blocks, first, P):
        """How many of the row blocks first, first + 2 P, ... there are."""
        return (blocks - first + (2 * P - 1)) // (2 * P)

    @gluon.jit
    def _fill_rings(w, w_up, n, rings, p, P, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """The copying warp: the tiles of both computing warpgroups, as soon as their buffers are free."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        blocks = (n + TILE.ROWS - 1) // TILE.ROWS
        for t in range(0, _share(blocks, p, P) * TILES):
            column = (t % TILES) * TILE.COLUMNS
            for wg in gl.static_range(2):
                block = p + wg * P + (t // TILES) * (2 * P)
                if block < blocks:
                    stage = wg * TILE.STAGES + t % TILE.STAGES
                    bar = rings.full.index(stage)
                    mbarrier.wait(rings.empty.index(stage), ((t // TILE.STAGES) & 1) ^ 1)
                    mbarrier.expect(bar, PARTS * w.block_type.nbytes)
                    bulk_load(w, [block * TILE.ROWS, column], bar, rings.tiles.index(stage * PARTS))
                    if SHAPE.SWIGLU:
                        up = rings.tiles.index(stage * PARTS + 1)
                        bulk_load(w_up, [block * TILE.ROWS, column], bar, up)

    @gluon.jit
    def _take_inputs(x, norm, inputs, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr):
        """Puts the vectors, normalised, into shared memory, in their own dtype as the modules do."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        offs = gl.arange(0, TILE.COLUMNS, layout=gl.BlockedLayout([TILE.COLUMNS // 128], [32], [4], [0]))
        gammas = ()
        if SHAPE.NORM:
            for tile in gl.static_range(TILES):
                column = tile * TILE.COLUMNS + offs
                gammas = gammas + (gl.load(norm.gamma + column, mask=column < SHAPE.K, other=0.0),)  # type: ignore[assignment]
        program_wait(PDL)
        for m in gl.static_range(SHAPE.M):
            values = ()
            squares = gl.to_tensor(0.0)
            for tile in gl.static_range(TILES):
                column = tile * TILE.COLUMNS + offs
                value = gl.load(x.data + m * x.stride + column, mask=column < SHAPE.K, other=0.0)
                if SHAPE.NORM:
                    value = value.to(gl.float32)
                    squares += value * value
                    value *= gammas[tile].to(gl.float32)
                values = values + (value,)  # type: ignore[assignment]
            if SHAPE.NORM:
                factor = rms_factor(gl.sum(squares, 0), SHAPE.K, norm)
            for tile in gl.static_range(TILES):
                value = values[tile]
                if SHAPE.NORM:
                    value *= factor
                inputs.tiles.index(m * TILES + tile).store(value.to(x.data.dtype.element_ty))

    @gluon.jit
    def _add_tile(accs, rings, inputs, stage, tile, LAYOUT: gl.constexpr, SHAPE: gl.constexpr, TILES: gl.constexpr):
        """Adds the products of a tile of the ring, which is free again once it is in registers, with all vectors."""
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        weight = rings.tiles.index(stage * PARTS).load(LAYOUT)
        weight_up = weight
        if SHAPE.SWIGLU:
            weight_up = rings.tiles.index(stage * PARTS + 1).load(LAYOUT)
        fence_async_shared()  # these reads come before the copies that follow into the same buffers
        barrier()
        mbarrier.arrive(rings.empty.index(stage), count=1)
        sums = ()
        for m in gl.static_range(SHAPE.M):
            row = inputs.tiles.index(m * TILES + tile).load(gl.SliceLayout(0, LAYOUT)).to(gl.float32)
            row = gl.expand_dims(row, 0)
            sums = sums + (accs[m * PARTS] + widen(weight) * row,)  # type: ignore[assignment]
            if SHAPE.SWIGLU:
                sums = sums + (accs[m * PARTS + 1] + widen(weight_up) * row,)  # type: ignore[assignment]
        return sums

    @gluon.jit
    def _multiply_blocks(
        rings, inputs, x, norm, out, n, p, P,
        WG: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """One of the two computing warpgroups: every second of the program's row blocks. The first one also takes the
        vectors in."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        if WG == 0:
            _take_inputs(x, norm, inputs, SHAPE, TILE, PDL)
            barrier()
            mbarrier.arrive(inputs.full, count=1)
        else:
            program_wait(PDL)
            mbarrier.wait(inputs.full, 0)
        first = p + WG * P
        t = p * 0
        for block in range(0, _share((n + TILE.ROWS - 1) // TILE.ROWS, first, P)):
            accs = ()
            for _part in gl.static_range(SHAPE.M * PARTS):
                accs = accs + (gl.zeros([TILE.ROWS, TILE.COLUMNS], gl.float32, layout=LAYOUT),)  # type: ignore[assignment]
            for tile in range(TILES):
                stage = WG * TILE.STAGES + t % TILE.STAGES
                mbarrier.wait(rings.full.index(stage), (t // TILE.STAGES) & 1)
                accs = _add_tile(accs, rings, inputs, stage, tile, LAYOUT, SHAPE, TILES)
                t += 1
            rows = (first + block * (2 * P)) * TILE.ROWS + gl.arange(0, TILE.ROWS, layout=gl.SliceLayout(1, LAYOUT))
            for m in gl.static_range(SHAPE.M):
                y = gl.sum(accs[m * PARTS], 1)
                if SHAPE.SWIGLU:
                    y = swiglu(y, gl.sum(accs[m * PARTS + 1], 1))
                target = m * out.stride + rows
                if SHAPE.RESIDUAL:
                    y += gl.load(out.residual + target, mask=rows < n, other=0.0).to(gl.float32) * out.share
                gl.store(out.data + target, y.to(out.data.dtype.element_ty), mask=rows < n)

    @gluon.jit
    def stream_linear_kernel(
        w, w_up, n, x, norm, out,
        SHAPE, TILE, PDL: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        """A linear map of one weight, or a SwiGLU of two: every program copies and multiplies its row blocks."""
        TILES: gl.constexpr = (SHAPE.K + TILE.COLUMNS - 1) // TILE.COLUMNS
        BUFFERS: gl.constexpr = 2 * TILE.STAGES
        PARTS: gl.constexpr = 2 if SHAPE.SWIGLU else 1
        buf = gl.allocate_shared_memory(w.dtype, [BUFFERS * PARTS, TILE.ROWS, TILE.COLUMNS], w.layout)
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        x_buf = gl.allocate_shared_memory(x.data.dtype.element_ty, [SHAPE.M * TILES, TILE.COLUMNS], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for i in gl.static_range(BUFFERS):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        mbarrier.init(x_full, count=1)
        fence_async_shared()
        barrier()
        program_release(PDL)
        p = gl.program_id(0)
        P = gl.num_programs(0)
        rings = Rings(buf, full, empty)
        inputs = Inputs(x_buf, x_full)
        gl.warp_specialize(
            [
                (_multiply_blocks, (rings, inputs, x, norm, out, n, p, P, 0, SHAPE, TILE, PDL)),
                (_multiply_blocks, (rings, inputs, x, norm, out, n, p, P, 1, SHAPE, TILE, PDL)),
                (_fill_rings, (w, w_up, n, rings, p, P, SHAPE, TILE)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


def ring_plan(itemsize: int, swiglu: bool, vectors: int) -> dict[str, int]:
    """Rings of 64 KB for each of the two warpgroups, chosen on an H200 with `python -m scripts.bench_fused`.

    One vector leaves registers for programs of the small kernels around this one.
    """
    plan = {"ROWS": 8, "COLUMNS": 2048 // itemsize // (2 if swiglu else 1), "STAGES": 4, "num_warps": 4}
    return plan | ({"REGISTERS": 136, "maxnreg": 104} if vectors == 1 else {"REGISTERS": 232, "maxnreg": 168})


def streams(linear_map: LinearMap, vectors: int) -> bool:
    """Whether a map can go, and is worth going, through rings: one weight or the two of a SwiGLU, large, their rows
    fit for bulk copies, the vectors for shared memory."""
    weights, inner = linear_map.numbers, linear_map.inner
    if stream_linear_kernel is None or linear_map.nbytes < RING_BYTES:
        return False
    if (len(weights) > 1 and not linear_map.swiglu) or linear_map.is_scaled:
        return False
    itemsize = weights[0].element_size()
    plan = ring_plan(itemsize, linear_map.swiglu, vectors)
    rings = 2 * plan["STAGES"] * len(weights) * plan["ROWS"] * plan["COLUMNS"] * itemsize
    held = vectors * triton.cdiv(inner, plan["COLUMNS"]) * plan["COLUMNS"] * itemsize
    return rings + held + 1024 <= RING_SHARED_BYTES and all(
        w.is_contiguous() and w.data_ptr() % 16 == 0 and inner * itemsize % 16 == 0 for w in weights
    )


def run_as_stream(linear_map: LinearMap, x, out, residual, machine: Machine) -> None:
    """`step_linear_mlra.run` for a few vectors and a map that `streams`."""
    weights = linear_map.numbers
    itemsize, rows = weights[0].element_size(), weights[0].shape[0]
    plan = ring_plan(itemsize, linear_map.swiglu, x.shape[0])
    tile = RingTile(*(plan.pop(name) for name in RingTile._fields))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * itemsize, rank=2)
    block = [tile.ROWS, tile.COLUMNS]
    descriptors = [TensorDescriptor(w, list(w.shape), [w.stride(0), 1], block, layout) for w in weights]
    *arguments, shape = map_arguments(linear_map, x, out, residual)
    launch(
        x.device, stream_linear_kernel, (min(triton.cdiv(rows, 2 * tile.ROWS), machine.multiprocessors),),
        descriptors[0], descriptors[-1], rows, *arguments,
        SHAPE=shape, TILE=constants(tile), PDL=machine.early, **plan, **launch_options(machine.early),
    )  # fmt: skip
