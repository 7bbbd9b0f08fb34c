"""The copying warp of the Hopper kernel of the decode attention, and what share of the work its program has.

The deal of work is that of `decode_deal_mlra`, in Gluon; every warp of a program counts it out for itself.
"""

from .decode_arguments_mlra import Share, Stretch
from .device_gluon_mlra import gl, gluon

if gluon is not None:
    from .device_gluon_mlra import bulk_load, mbarrier, program_wait

    @gluon.jit
    def _add(x, y):
        return x + y

    @gluon.jit
    def _share_start(p, total, shares, BIG: gl.constexpr):
        if BIG:
            return (p.to(gl.int64) * total // shares).to(gl.int32)
        return p * total // shares

    @gluon.jit
    def share_of(visible, B, P, p, DEAL: gl.constexpr, WARPS: gl.constexpr):
        """Program p's `Share`."""
        if DEAL.BLOCK_B == 1:
            ends = gl.load(visible.kv_end)
            starts = ends * 0
            if DEAL.HAS_START:
                starts = gl.load(visible.kv_start)
            units = gl.maximum((ends - starts + (DEAL.UNIT - 1)) // DEAL.UNIT, 1)
            cum = units
            total = units
        else:
            FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
            offs_b = gl.arange(0, DEAL.BLOCK_B, layout=FLAT)
            ends = gl.load(visible.kv_end + offs_b, mask=offs_b < B, other=0)
            starts = ends * 0
            if DEAL.HAS_START:
                starts = gl.load(visible.kv_start + offs_b, mask=offs_b < B, other=0)
            units = gl.where(offs_b < B, gl.maximum((ends - starts + (DEAL.UNIT - 1)) // DEAL.UNIT, 1), 0)
            cum = gl.associative_scan(units, 0, _add)
            total = gl.sum(units, 0)
        shares = gl.minimum(P, (total + (DEAL.MIN_UNITS - 1)) // DEAL.MIN_UNITS)
        mine = gl.minimum(p, shares - 1)
        first_pos = _share_start(mine, total, shares, DEAL.BIG)
        last_pos = gl.where(p < shares, _share_start(mine + 1, total, shares, DEAL.BIG), first_pos)
        b = p * 0
        if DEAL.BLOCK_B > 1:
            b = gl.sum((cum <= first_pos).to(gl.int32), 0)
        return Share(starts, ends, units, cum, b, first_pos, last_pos)

    @gluon.jit
    def stretch_of(share, b, pos, DEAL: gl.constexpr, WARPS: gl.constexpr):
        """What a share holds of sequence b from unit `pos` on."""
        if DEAL.BLOCK_B == 1:
            seq_last = share.cum
            seq_first = share.cum - share.units
            start = share.starts
            end = share.ends
        else:
            FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
            here = gl.arange(0, DEAL.BLOCK_B, layout=FLAT) == b
            seq_last = gl.sum(gl.where(here, share.cum, 0), 0)
            seq_first = seq_last - gl.sum(gl.where(here, share.units, 0), 0)
            start = gl.sum(gl.where(here, share.starts, 0), 0)
            end = gl.sum(gl.where(here, share.ends, 0), 0)
        stop_pos = gl.minimum(share.stop, seq_last)
        lo = start + (pos - seq_first) * DEAL.UNIT
        hi = gl.minimum(start + (stop_pos - seq_first) * DEAL.UNIT, end)
        return Stretch(stop_pos, pos == seq_first, stop_pos == seq_last, lo, gl.maximum(hi, lo), end)

    @gluon.jit
    def _page(pages, b, j, stop, PAGE: gl.constexpr):
        """Which page holds row j < stop of sequence b."""
        return gl.load(pages.table + b.to(gl.int64) * pages.b + j // PAGE, mask=j < stop, other=0)

    @gluon.jit
    def copy_tiles(
        c_desc, k_desc, s_desc, buffers, visible, pages, place,
        SHAPE: gl.constexpr, TILE: gl.constexpr, DEAL: gl.constexpr, EARLY: gl.constexpr,
    ):  # fmt: skip
        """The copying warp: every tile of the share in turn, as soon as its buffer is free; EARLY: only those with
        rows of the T query positions after the kernel in front. With pages, a tile lies in one of them, whose number
        is asked for while the tile in front waits for its buffer.

        The queries would stand in line behind all that is asked for before them, and with them the first product:
        until they are there, only AHEAD tiles are."""
        NL: gl.constexpr = TILE.NL
        BN: gl.constexpr = TILE.BN
        STAGES: gl.constexpr = TILE.STAGES
        SCALES: gl.constexpr = s_desc.block_type.nbytes if SHAPE.SCALED else 0
        share = share_of(visible, place.B, place.P, place.p, DEAL, 1)
        b = share.b
        pos = share.first
        g = place.p * 0
        while pos < share.stop:
            stretch = stretch_of(share, b, pos, DEAL, 1)
            if SHAPE.PAGE:
                next_page = _page(pages, b, stretch.lo, stretch.hi, SHAPE.PAGE)
            for j in range(stretch.lo, stretch.hi, BN):
                if SHAPE.PAGE:
                    page = next_page
                    next_page = _page(pages, b, j + BN, stretch.hi, SHAPE.PAGE)
                if EARLY:  # noqa: SIM102 (decided at compile time)
                    if j + BN > stretch.end - place.T:
                        program_wait(True)
                if (g == TILE.AHEAD) & (pos == share.first):
                    mbarrier.wait(buffers.q_full, 0)
                stage = g % STAGES
                bar = buffers.full.index(stage)
                mbarrier.wait(buffers.empty.index(stage), ((g // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, NL * c_desc.block_type.nbytes + k_desc.block_type.nbytes + SCALES)
                row = page * SHAPE.PAGE + j % SHAPE.PAGE if SHAPE.PAGE else b * place.S + j
                bulk_load(k_desc, [row, 0], bar, buffers.k.index(stage))
                if SHAPE.SCALED:  # from a multiple of 16 bytes on, as copies have to begin
                    bulk_load(s_desc, [row, place.latent // 4 * 4], bar, buffers.scales.index(stage))
                arriving = buffers.c8 if SHAPE.SCALED else buffers.c
                for k in gl.static_range(NL):
                    column = (place.latent + k) * SHAPE.R
                    bulk_load(c_desc, [row, column], bar, arriving.index(stage * NL + k))
                g += 1
            pos = stretch.stop
            b += 1
