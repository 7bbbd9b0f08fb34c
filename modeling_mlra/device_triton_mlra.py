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
    def from_e4m3(x, scale, dtype: tl.constexpr):
        """Bytes of e4m3 numbers times `scale`; on any device, so by integers."""
        x = x.to(tl.int32)
        bits = ((x & 0x80) << 24) | ((x & 0x7F) << 20)  # of a float32 whose exponent is 120 short
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36 * scale).to(dtype)

    @triton.jit
    def to_e4m3(x):
        """float32 of up to 448 to bytes of the nearest e4m3 numbers, ties to even."""
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 steps are of 2^-9, which those of a float32 are from 2^14 on
        shifted = tl.abs(x) + 16384.0
        small = shifted.to(tl.int32, bitcast=True) - 0x46800000
        return (tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)

    @triton.jit
    def scale_of(top):
        """The scale of a latent whose largest number is `top` (float32), as `rows_mlra.quantized` has it, and its
        inverse."""
        scale = top * 0.002232142857142857
        scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
        scale = tl.where(scale < float("inf"), scale, float("nan"))
        return scale, tl.div_rn(1.0, scale)

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
