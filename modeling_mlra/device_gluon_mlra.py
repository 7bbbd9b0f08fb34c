"""Gluon's names for Hopper GPUs, which differ between versions of triton, and device code that kernels share."""

try:
    import triton.experimental.gluon.language as gl
    from triton.experimental import gluon
    from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: F401
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Names that differ between versions of triton
    barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
    bulk_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    _buffer = gl.shared_memory_descriptor
    reinterpret = _buffer._reinterpret if hasattr(_buffer, "_reinterpret") else _buffer.reinterpret

    gluon.jit(do_not_specialize=["x"])
    _ = gl.constexpr
except (ImportError, AttributeError, TypeError):  # an experimental API: names come and go
    gluon = gl = TensorDescriptor = None

if gluon is not None:

    @gluon.jit
    def program_wait(PDL: gl.constexpr):
        if PDL:
            gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def program_release(PDL: gl.constexpr):
        if PDL:
            gl.inline_asm_elementwise(
                "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
