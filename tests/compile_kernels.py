"""Compiles, without a GPU, the kernels that decoding launches on a Hopper GPU, from the launches themselves.

    python -m tests.compile_kernels

The step and the decode attention run on tensors without data; instead of a launch, each kernel is compiled for compute
capability 9.0 with the arguments of that launch, and a line says what it is made of.
"""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from modeling_mlra import MLRAConfig, MLRAForCausalLM, batch_linear_mlra, fused_mlra, hopper_linear_mlra, triton_mlra
from modeling_mlra.device_mlra import DeviceFacts

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
PARTS = {"wgmma.mma_async": "matrix products", "cp.async.bulk.tensor": "bulk copies", "griddepcontrol.wait": "waits"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
KERNELS = (
    (triton_mlra, ("decode_kernel", "rows_kernel", "combine_kernel")),
    (fused_mlra, ("embed_kernel", "linear_kernel", "absorb_kernel", "value_kernel", "choose_kernel")),
    (batch_linear_mlra, ("batch_linear_kernel", "batch_value_kernel")),
    (hopper_linear_mlra, ("linear_kernel",)),
)


def signature(parameter, value) -> tuple[str, list]:
    """Type of an argument as the compiler names it, and what it may take for granted."""
    if parameter.is_constexpr or value is None or isinstance(value, bool):
        return "constexpr", []
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>", []
    if isinstance(value, float):
        return "fp32", []
    if parameter.do_not_specialize:
        return "i32", []
    return ("constexpr", []) if value == 1 else ("i32", [["tt.divisibility", 16]] if value % 16 == 0 else [])


class Compiled:
    """Stands for a kernel: a launch compiles it."""

    def __init__(self, kernel, seen: set[str]):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **keywords):
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        assert values.keys() == set(names), f"{self.kernel.__name__}: {set(names) ^ values.keys()}"
        types, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            types[parameter.name], known = signature(parameter, values[parameter.name])
            if types[parameter.name] == "constexpr":
                constants[(index,)] = values[parameter.name]
            if known:
                attributes[(index,)] = known
        key = f"{self.kernel.__name__} {types} {constants}"
        if key in self.seen:
            return
        self.seen.add(key)
        source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        compiled = triton.compile(
            source(self.kernel, types, constants, attributes),
            target=GPUTarget("cuda", 90, 32),
            options={k: v for k, v in keywords.items() if k in OPTIONS},
        )
        parts = ", ".join(f"{compiled.asm['ptx'].count(part)} {name}" for part, name in PARTS.items())
        print(f"{self.kernel.__name__}: {parts}, {compiled.metadata.shared} bytes of shared memory", flush=True)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    batch: int, length: int, latents: int, heads: int, masked=False, page_size=0, cached=4096, dtype=torch.bfloat16
) -> None:
    """Decode attention of up to 128 query rows over latents of width 128."""
    key_mask = empty(batch, cached, dtype=torch.bool) if masked else None
    rows = empty(*(() if page_size else (batch,)), cached, latents * 128 + 64, dtype=dtype)
    triton_mlra.triton_latent_attention(
        empty(batch, length, latents, heads, 128, dtype=dtype), empty(batch, length, 1, heads, 64, dtype=dtype),
        rows[..., :-64].unflatten(-1, (latents, 128)), rows[..., -64:], empty(batch, dtype=torch.int32),
        empty(batch, dtype=torch.int32) if masked else None, key_mask,
        empty(batch, 64, dtype=torch.int32) if page_size else None, page_size, 0.1,
    )  # fmt: skip


def step(num_sequences: int, **settings) -> None:
    """One step of a layer of the released MLRA-4 shape, and the choice of a token."""
    config = MLRAConfig(num_hidden_layers=1, **settings)
    with torch.device("meta"):
        model = MLRAForCausalLM(config).to(torch.bfloat16)
    cache = SimpleNamespace(layers=[SimpleNamespace(rows=empty(num_sequences, 1, 4096, config.kv_lora_rank + 64))])
    run = fused_mlra.FusedStep(model, cache, empty(1 + 2 * num_sequences, dtype=torch.int32))
    tokens = empty(num_sequences, dtype=torch.long)
    choice = tokens, tokens, 0, empty(2, dtype=torch.long), empty(num_sequences, 9, dtype=torch.long), tokens
    run.choose(*choice)
    run.choose(*choice, scores_of=torch.Tensor.float)


def main() -> None:
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        for module, names in KERNELS:
            for name in names:
                stack.enter_context(patch.object(module, name, Compiled(getattr(module, name), seen)))
        for module in (triton_mlra, fused_mlra):
            stack.enter_context(patch.object(module, "device_facts", lambda _: DeviceFacts(132, True, True)))
        attend(batch=1, length=1, latents=1, heads=64)
        attend(batch=3, length=4, latents=4, heads=24, masked=True)
        attend(batch=1, length=1, latents=4, heads=24, cached=2**20)
        attend(batch=3, length=4, latents=4, heads=8, masked=True, cached=2**20)
        attend(batch=3, length=1, latents=4, heads=24, page_size=32)
        attend(batch=3, length=4, latents=4, heads=24, page_size=7)
        step(num_sequences=1)
        step(num_sequences=2, attn_output_gate=True)
        step(num_sequences=16, attn_output_gate=True)
        stack.enter_context(patch.object(triton_mlra, "device_facts", lambda _: DeviceFacts(108)))
        attend(batch=1, length=1, latents=1, heads=64)
        attend(batch=3, length=1, latents=4, heads=24, masked=True)
        attend(batch=3, length=4, latents=4, heads=24, dtype=torch.float32)


if __name__ == "__main__":
    main()
