"""Triton device code that decode attention and decoding step share."""

from .device_mlra import INTERPRETED, tl, triton

if triton is not None:
    _UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bit patterns of bfloat16 operands

    @triton.jit
    def dot(x, y, acc):
        if _UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        return tl.dot(x, y, acc, input_precision="ieee")

    @triton.jit
    def program_wait(PDL: tl.constexpr):
        if PDL:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def program_release(PDL: tl.constexpr):
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def rescale(m, m_new):
        """What to subtract under a new maximum (log2 units; 0 where nothing was seen), and the factor of the sums so
        far."""
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        return m_ref, tl.exp2(m - m_ref)
