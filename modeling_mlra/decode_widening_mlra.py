"""The widening warpgroup of the Hopper kernel of the decode attention: latents of eight bits to tiles of 16.

It stands between the copying warp, which brings the bytes, and the computing warpgroups, which meet the numbers times
their scale in the queries' dtype, rounded as `rows_mlra.dequantized` does, as if rows were cached so.
"""

from .device_gluon_mlra import gl, gluon

if gluon is not None:
    from .decode_copies_mlra import share_of, stretch_of
    from .device_gluon_mlra import barrier, fence_async_shared, mbarrier

    @gluon.jit
    def _widen(buffers, stage, place, latent, SHAPE: gl.constexpr, TILE: gl.constexpr):
        """A tile from its bytes to where it is multiplied from, some rows at a time, as registers allow.

        Scales of four latents came; those of the tile's first one are in column latent % 4."""
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [512 // SHAPE.R, SHAPE.R // 16], [4, 1], [1, 0])
        ROWS: gl.constexpr = 32
        columns = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
        four = buffers.scales.index(stage)
        for k in gl.static_range(TILE.NL):
            chosen = gl.expand_dims(columns == latent % 4 + k, 0)
            numbers = buffers.c8.index(stage * TILE.NL + k)
            wide = buffers.c.index(place * TILE.NL + k)
            for i in gl.static_range(TILE.BN // ROWS):
                scale = gl.sum(gl.where(chosen, four.slice(i * ROWS, ROWS).load(LAYOUT), 0.0), 1)
                part = numbers.slice(i * ROWS, ROWS).load(LAYOUT).to(gl.float32) * gl.expand_dims(scale, 1)
                wide.slice(i * ROWS, ROWS).store(part.to(wide.dtype))

    @gluon.jit
    def widen_tiles(buffers, visible, place, SHAPE: gl.constexpr, TILE: gl.constexpr, DEAL: gl.constexpr):
        """Every tile of the share in turn, as soon as it is there and the tile whose place it takes is done with."""
        share = share_of(visible, place.B, place.P, place.p, DEAL, 4)
        b = share.b
        pos = share.first
        g = place.p * 0
        while pos < share.stop:
            stretch = stretch_of(share, b, pos, DEAL, 4)
            count = (stretch.hi - stretch.lo + (TILE.BN - 1)) // TILE.BN
            for n in range(g, g + count):
                mbarrier.wait(buffers.full.index(n % TILE.STAGES), (n // TILE.STAGES) & 1)
                if n >= TILE.WIDE:
                    before = n - TILE.WIDE
                    mbarrier.wait(buffers.empty.index(before % TILE.STAGES), (before // TILE.STAGES) & 1)
                _widen(buffers, n % TILE.STAGES, n % TILE.WIDE, place.latent, SHAPE, TILE)
                fence_async_shared()  # what was read before its next copy, what was written before the products
                barrier()
                mbarrier.arrive(buffers.widened.index(n % TILE.WIDE), count=1)
            g += count
            pos = stretch.stop
            b += 1
