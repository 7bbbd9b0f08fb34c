"""How the cached rows are dealt out to the programs of a decode kernel, and the kernel that reduces what they leave.

The rows in use, counted in units of UNIT rows and laid end to end over the batch, are cut into P equal shares, one per
program; kv_end is never read by the host, and an allocated but unused tail costs nothing. A share that covers a whole
sequence writes its output; any other writes a normalised partial result with its log2-sum-exp, which the second kernel
reduces. It is launched early and waits on the device where that is supported (programmatic dependent launch).
"""

from .device_mlra import tl, triton

if triton is not None:
    from .device_triton_mlra import program_release, program_wait, rescale

    @triton.jit
    def lengths(kv_start, kv_end, offs, B, UNIT: tl.constexpr, HAS_START: tl.constexpr):
        """First row, one past the last row, and number of work units (at least one) of the sequences `offs`."""
        end = tl.load(kv_end + offs, mask=offs < B, other=0)
        start = tl.load(kv_start + offs, mask=offs < B, other=0) if HAS_START else tl.zeros_like(end)
        units = tl.maximum((end - start + (UNIT - 1)) // UNIT, 1)
        return start, end, tl.where(offs < B, units, 0)

    @triton.jit
    def shares_of(total, P, MIN_UNITS: tl.constexpr):
        """How many programs get work."""
        return tl.minimum(P, (total + (MIN_UNITS - 1)) // MIN_UNITS)

    @triton.jit
    def share_start(p, total, shares, BIG: tl.constexpr):
        """First work unit of program p: floor(p * total / shares)."""
        if BIG:
            return (p.to(tl.int64) * total // shares).to(tl.int32)
        return p * total // shares

    @triton.jit
    def parts_of(b, kv_end, kv_start, B, P, DEAL: tl.constexpr):
        """Which programs, first and last, have a share of sequence b. Program p leaves its partial result at p + b."""
        offs_b = tl.arange(0, DEAL.BLOCK_B)
        _, _, units = lengths(kv_start, kv_end, offs_b, B, DEAL.UNIT, DEAL.HAS_START)
        total = tl.sum(units, 0)
        shares = shares_of(total, P, DEAL.MIN_UNITS)
        first = tl.sum(tl.where(offs_b < b, units, 0), 0)
        last = first + tl.sum(tl.where(offs_b == b, units, 0), 0) - 1
        if DEAL.BIG:
            p_first = (((first + 1).to(tl.int64) * shares - 1) // total).to(tl.int32)
            p_last = (((last + 1).to(tl.int64) * shares - 1) // total).to(tl.int32)
        else:
            p_first = ((first + 1) * shares - 1) // total
            p_last = ((last + 1) * shares - 1) // total
        return p_first, p_last

    @triton.jit
    def _reduced_in_turn(results, b, latent, m, M, columns, p_first, p_last, TILE: tl.constexpr):
        """ROWS query rows, one partial result after the other: [ROWS, BD]."""
        ok_m = m < M
        ok = ok_m[:, None] & (columns < TILE.R)[None, :]
        acc = tl.zeros([TILE.ROWS, TILE.BD], tl.float32)
        top = tl.full([TILE.ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([TILE.ROWS], tl.float32)
        for p in tl.range(p_first, p_last + 1):
            rows = ((p + b) * TILE.L + latent).to(tl.int64) * M + m
            lse = tl.load(results.lse + rows, mask=ok_m, other=float("-inf"))
            z = tl.load(results.part + (rows * TILE.R)[:, None] + columns[None, :], mask=ok, other=0.0)
            new_top = tl.maximum(top, lse)
            ref, alpha = rescale(top, new_top)
            w = tl.exp2(lse - ref)
            acc = acc * alpha[:, None] + z * w[:, None]
            norm = norm * alpha + w
            top = new_top
        return acc * tl.where(norm > 0, 1.0 / norm, 0.0)[:, None]

    @triton.jit
    def _reduced_at_once(results, b, latent, m, M, columns, p_first, p_last, TILE: tl.constexpr):
        """One query row, SPLITS partial results at once: [BD]."""
        ok_d = columns < TILE.R
        acc = tl.zeros([TILE.BD], tl.float32)
        top = float("-inf")
        norm = 0.0
        for p0 in tl.range(p_first, p_last + 1, TILE.SPLITS):
            ps = p0 + tl.arange(0, TILE.SPLITS)
            ok = ps <= p_last
            rows = ((ps + b) * TILE.L + latent).to(tl.int64) * M + m
            lse = tl.load(results.lse + rows, mask=ok, other=float("-inf"))
            mask = ok[:, None] & ok_d[None, :]
            z = tl.load(results.part + (rows * TILE.R)[:, None] + columns[None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(lse, 0))
            ref, alpha = rescale(top, new_top)
            w = tl.exp2(lse - ref)
            acc = acc * alpha + tl.sum(z * w[:, None], 0)
            norm = norm * alpha + tl.sum(w, 0)
            top = new_top
        return acc * tl.where(norm > 0, 1.0 / norm, 0.0)

    @triton.jit(do_not_specialize=["B", "P"])
    def combine_kernel(results, kv_end, kv_start, B, T, P, TILE, DEAL, PDL: tl.constexpr):
        """Reduce the partial results of ROWS query rows of one latent and sequence, BD columns; whole ones are done.

        Many splits: one query row, SPLITS at once. Few (SPLITS = 1): ROWS query rows, one split after the other.
        """
        H: tl.constexpr = TILE.H
        strides = results.strides
        b = tl.program_id(2)
        M = T * H
        blocks = (M + TILE.ROWS - 1) // TILE.ROWS
        latent = tl.program_id(1) // blocks
        m0 = tl.program_id(1) % blocks * TILE.ROWS
        columns = tl.program_id(0) * TILE.BD + tl.arange(0, TILE.BD)
        ok_d = columns < TILE.R
        target = results.out + b.to(tl.int64) * strides.b + latent * strides.l
        program_release(PDL)
        p_first, p_last = parts_of(b, kv_end, kv_start, B, P, DEAL)
        program_wait(PDL)
        if p_first == p_last:
            return
        dtype = results.out.dtype.element_ty
        if TILE.SPLITS == 1:
            m = m0 + tl.arange(0, TILE.ROWS)
            z = _reduced_in_turn(results, b, latent, m, M, columns, p_first, p_last, TILE)
            rows = (m // H) * strides.t + (m % H) * strides.h
            ok = (m < M)[:, None] & ok_d[None, :]
            tl.store(target + rows[:, None] + columns[None, :], z.to(dtype), mask=ok)
        else:
            z = _reduced_at_once(results, b, latent, m0, M, columns, p_first, p_last, TILE)
            tl.store(target + (m0 // H) * strides.t + (m0 % H) * strides.h + columns, z.to(dtype), mask=ok_d)
