"""Compiles, without a GPU, the kernels of decoding for every kind of GPU they are meant for, from the launches.

    python -m tests.compile_kernels --targets sm_90 gfx942

The step and the decode attention run on tensors without data; instead of a launch, each kernel is compiled for the
target with the arguments of that launch, and refused where a launch would be: with an option that the target's
compiler does not know, or with more shared memory than its programs can have. A line says what a kernel is made of.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.errors import OutOfResources

from mlra_vllm.step import PagedStep, PagedTokens
from modeling_mlra import (
    MLRAConfig,
    MLRAForCausalLM,
    decode_triton_mlra,
    device_mlra,
    step_exchange_mlra,
    step_linear_products_mlra,
    step_linear_registers_mlra,
    step_linear_stream_mlra,
    step_mlra,
)
from modeling_mlra.decode_arguments_mlra import DecodeInputs
from modeling_mlra.device_mlra import DeviceFacts
from modeling_mlra.rows_mlra import RowFormat
from modeling_mlra.step_device_mlra import machine_of

META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {dtype: name for name, dtype in DTYPES.items()}
TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv"}
PARTS = {"wgmma.mma_async": "matrix products", "cp.async.bulk.tensor": "bulk copies", "griddepcontrol.wait": "waits"}
PARTS |= {"st.relaxed.sys.global.b64": "words sent", "ld.volatile.global.b64": "words read"}
KERNELS = (
    (decode_triton_mlra, ("decode_kernel", "rows_kernel", "combine_kernel")),
    (step_mlra, ("embed_kernel", "absorb_kernel", "value_kernel", "product_value_kernel", "choose_kernel")),
    (step_exchange_mlra, ("sum_kernel", "join_kernel")),
    (step_linear_registers_mlra, ("register_linear_kernel",)),
    (step_linear_products_mlra, ("product_linear_kernel",)),
    (step_linear_stream_mlra, ("stream_linear_kernel",)),
)


def _nvidia(capability: int, multiprocessors: int, shared: int, **facts) -> tuple[GPUTarget, DeviceFacts]:
    memory = {"shared_bytes": shared, "shared_per_multiprocessor": shared + 1024}
    return GPUTarget("cuda", capability, 32), DeviceFacts(multiprocessors, nvidia=True, **memory, **facts)


def _amd(arch: str, multiprocessors: int, shared: int, warp_size: int) -> tuple[GPUTarget, DeviceFacts]:
    memory = {"shared_bytes": shared, "shared_per_multiprocessor": shared, "warp_size": warp_size}
    return GPUTarget("hip", arch, warp_size), DeviceFacts(multiprocessors, **memory)


TARGETS = {
    "sm_80": _nvidia(80, 108, 166_912, float8=False),
    "sm_86": _nvidia(86, 84, 101_376, float8=False),
    "sm_89": _nvidia(89, 128, 101_376),
    "sm_90": _nvidia(90, 132, 232_448, early=True, hopper=True),
    "sm_100": _nvidia(100, 148, 232_448, early=True),
    "sm_120": _nvidia(120, 170, 101_376, early=True),
    "gfx90a": _amd("gfx90a", 104, 65_536, 64),
    "gfx942": _amd("gfx942", 304, 65_536, 64),
    "gfx950": _amd("gfx950", 256, 163_840, 64),
    "gfx1100": _amd("gfx1100", 96, 65_536, 32),
    "gfx1201": _amd("gfx1201", 64, 65_536, 32),
}
"""Name -> what the compiler is told, and what torch would tell of such a GPU."""


class Result(NamedTuple):
    """What a kernel was compiled to: bytes of shared memory, registers and spilled bytes a thread, and its text."""

    target: str
    kernel: str
    what: str
    shared: int
    registers: int
    spilled: int
    text: str

    def __str__(self):
        parts = ", ".join(f"{self.text.count(part)} {name}" for part, name in PARTS.items() if part in self.text)
        return (
            f"{self.target:8} {self.kernel:20} {self.what:44} {self.shared:7} bytes {self.registers:4} registers "
            f"{self.spilled:5} spilled {parts}"
        )


def signature(parameter, value) -> tuple:
    """Type of an argument as the compiler names it, and what it may take for granted; of a named tuple, of each."""
    if isinstance(value, tuple) and not parameter.is_constexpr:
        types, known = zip(*(signature(parameter, field) for field in value), strict=True)
        return type(value)(*types), type(value)(*known)
    if parameter.is_constexpr or value is None or isinstance(value, bool | tl.constexpr):
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


def leaves(path: tuple, types, value, known):
    """Where each number of an argument stands, with its type, itself and what is known of it."""
    if not isinstance(types, tuple):
        yield path, types, value, known
        return
    for index, of_field in enumerate(zip(types, value, known, strict=True)):
        yield from leaves((*path, index), *of_field)


def registers_and_spills(compiled) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    if "amdgcn" in compiled.asm:
        numbers = {
            name: int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        }
        return numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


class Compiler:
    """Compiles every launched kernel once for one target."""

    def __init__(self, name: str):
        self.only: str | None = None  # name of the one kernel to compile
        self.name, (self.target, self.facts) = name, TARGETS[name]
        self.what = ""
        self.results: list[Result] = []
        self.refused: list[str] = []  # launches that another plan then made up for
        self.seen: dict[str, OutOfResources | None] = {}

    def launch(self, kernel, *arguments, **keywords):
        if self.only not in (None, kernel.__name__):
            return
        names = kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        assert values.keys() == set(names), f"{kernel.__name__}: {set(names) ^ values.keys()}"
        types, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            types[parameter.name], known = signature(parameter, value)
            for path, of_type, at_path, has in leaves((index,), types[parameter.name], value, known):
                if of_type == "constexpr":
                    constants[path] = at_path
                    json.dumps(at_path.value if isinstance(at_path, tl.constexpr) else at_path)  # as triton's hooks do
                if has:
                    attributes[path] = has
        options = {k: v for k, v in keywords.items() if k not in names or k == "num_warps"}
        key = f"{kernel.__name__} {types} {constants} {options}"
        if key not in self.seen:
            self.seen[key] = self.compile(kernel, types, constants, attributes, options)
        if self.seen[key] is not None:
            raise self.seen[key]

    def compile(self, kernel, types, constants, attributes, options) -> OutOfResources | None:
        unknown = options.keys() - make_backend(self.target).parse_options(dict(options)).__dict__.keys()
        if unknown:
            raise KeyError(f"{kernel.__name__}: the compiler for {self.name} knows no option {sorted(unknown)}")
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        compiled = triton.compile(source(kernel, types, constants, attributes), target=self.target, options=options)
        shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
        if shared > self.facts.shared_bytes or tensor_memory > 512:
            self.refused.append(f"{kernel.__name__}, {self.what}: {shared} bytes")
            print(f"{self.name:8} {kernel.__name__:20} {self.what:44} {shared:7} bytes do not fit", flush=True)
            return OutOfResources(shared, self.facts.shared_bytes, "shared memory")
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        result = Result(self.name, kernel.__name__, self.what, shared, *registers_and_spills(compiled), text)
        self.results.append(result)
        print(result, flush=True)
        return None

    def faults(self) -> list[str]:
        """Plans that should have fitted and did not, and kernels that spill too much."""
        spilled = [
            f"{self.name} {result.kernel}, {result.what}: {result.spilled} bytes of a thread are spilled"
            for result in self.results
            if result.spilled > SPILLED and not (self.name in SPILL_MORE and may_spill_more(result))
        ]
        return [f"{self.name} {refused}: does not fit" for refused in self.refused] + spilled

    @contextlib.contextmanager
    def in_place_of_launches(self):
        class Compiled:
            """Stands for a kernel: a launch compiles it."""

            def __init__(stands, kernel):
                stands.kernel = kernel

            def __getitem__(stands, grid):
                return lambda *arguments, **keywords: self.launch(stands.kernel, *arguments, **keywords)

        with contextlib.ExitStack() as stack:
            for module, names in KERNELS:
                for name in names:
                    stack.enter_context(patch.object(module, name, Compiled(getattr(module, name))))
            stack.enter_context(patch.dict(device_mlra.known_devices, {META: self.facts}))
            stack.enter_context(patch.dict(decode_triton_mlra._fitting_plans, clear=True))
            yield self


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=META)


def attend(
    batch: int, length: int, latents: int, heads: int, masked=False, page_size=0, cached=4096, dtype=torch.bfloat16,
    groups=1, width=128, eight_bits=False,
) -> None:  # fmt: skip
    """Decode attention of `length` queries of `heads` heads to a latent."""
    key_mask = empty(batch, cached, dtype=torch.bool) if masked else None
    row_format = RowFormat(latents * width, 64, dtype, latents if eight_bits else 0)
    rows = empty(*(() if page_size else (batch,)), cached, row_format.width, dtype=row_format.element)
    c, k_rope, scales = row_format.views(rows, latents)
    inputs = DecodeInputs(
        q_latent=empty(batch, length, latents, heads, width, dtype=dtype),
        q_rope=empty(batch, length, groups, heads, 64, dtype=dtype),
        latents=c, k_rope=k_rope, scales=scales, kv_end=empty(batch, dtype=torch.int32),
        kv_start=empty(batch, dtype=torch.int32) if masked and not page_size else None,  # pages start with a sequence
        key_mask=key_mask, block_table=empty(batch, cached // page_size, dtype=torch.int32) if page_size else None,
        page_size=page_size, scaling=0.1,
    )  # fmt: skip
    decode_triton_mlra.triton_latent_attention(inputs)


class Holder(SimpleNamespace):
    """Stands for a cache, of which the step keeps a weak reference."""


def step(num_sequences: int, dtype=torch.bfloat16, fp8=False, **settings) -> None:
    """One step of a layer of a released shape, and the choice of a token."""
    config = MLRAConfig(num_hidden_layers=1, **settings)
    with torch.device("meta"):
        model = MLRAForCausalLM(config).to(dtype)
    if fp8:
        replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config())
    row_format = RowFormat.of_config(config, dtype=dtype)
    rows = empty(num_sequences, 1, 4096, row_format.width, dtype=row_format.element)
    cache = Holder(layers=[Holder(rows=rows, format=row_format)])
    run = step_mlra.FusedStep(model, cache, empty(1 + 2 * num_sequences, dtype=torch.int32))
    tokens = empty(num_sequences, dtype=torch.long)
    choice = tokens, tokens, 0, empty(2, dtype=torch.long), empty(num_sequences, 9, dtype=torch.long), tokens
    run.choose(*choice)
    run.choose(*choice, scores_of=lambda logits: (logits.float(), None), draws=True)
    run.choose(*choice, scores_of=lambda logits: (logits, logits[:, :50].contiguous()), draws=True)


def step_over_pages(num_sequences: int, dtype=torch.bfloat16, **settings) -> None:
    """The same of a layer whose rows lie in pages of 64."""
    config = MLRAConfig(num_hidden_layers=1, **settings)
    with torch.device("meta"):
        model = MLRAForCausalLM(config).to(dtype)
    row_format = RowFormat.of_config(config, dtype=dtype)
    run = PagedStep(model, row_format, num_sequences)
    numbers, table = empty(num_sequences, dtype=torch.long), empty(num_sequences, 2048, dtype=torch.int32)
    tokens = PagedTokens(numbers, numbers, table[:, 0].contiguous(), table, 64)
    pool = empty(2**20, row_format.width, dtype=row_format.element)
    run(empty(num_sequences, config.hidden_size, dtype=dtype), [pool], tokens)


def exchange(ranks: int, dtype=torch.bfloat16) -> None:
    """The sum over so many ranks of two vectors of a released width, and the logits of one."""
    inbox = empty(*step_exchange_mlra.inbox_shape(32 * 3072, ranks), dtype=torch.int64)
    exchanged = step_exchange_mlra.Exchange(ranks - 1, [inbox] * ranks, empty(ranks, dtype=torch.int32), 10**11)
    exchanged.sum(empty(2, 3072, dtype=torch.float32), empty(2, 3072, dtype=dtype), machine_of(META))
    exchanged.join(empty(1, 50304 // ranks, dtype=dtype), empty(1, 50304, dtype=dtype), machine_of(META))


SHAPES = {
    "mla": (1, 1, 24, 512),
    "mla, double heads": (1, 1, 48, 512),
    "gla_2": (2, 2, 12, 256),
    "gla_2, double heads": (2, 2, 24, 256),
    "gla_4": (4, 4, 6, 128),
    "mlra_2": (4, 2, 12, 128),
    "mlra_4": (4, 1, 24, 128),
    "gla_2 on 2 ranks": (1, 1, 12, 256),
    "mlra_2 on 2 ranks": (2, 1, 12, 128),
    "mlra_4 on 2 ranks": (2, 1, 24, 128),
    "mlra_4 on 4 ranks": (1, 1, 24, 128),
}
"""Name -> latents, groups, heads of a latent, latent width."""
CALLS = {"bf16": ("1", "16, masked", "3, paged"), "fp16": ("1",), "fp32": ("1", "16, masked", "3, paged")}
STEPS = {
    "mlra_4": {},
    "mlra_4, gated": {"attn_output_gate": True},
    "mlra_4, FP8 rows": {"cache_row_format": "fp8"},
    "mlra_2": {"num_branches": 2},
    "gla_4": {"num_branches": 1},
    "gla_2": {"num_branches": 1, "num_latent_heads": 2},
    "mla": {"num_branches": 1, "num_latent_heads": 1, "q_lora_rank": 1536, "intermediate_size": 9448},
}
SPILLED = 1024
"""Bytes that a thread may keep in memory for want of registers."""
SPILL_MORE = "gfx1100", "gfx1201"
"""Targets whose decode kernel may spill more, of MLA (the factors of a product of 512 columns take more registers than
these GPUs have) and of latents in eight bits (both forms of a tile do)."""


def may_spill_more(result: Result) -> bool:
    return result.kernel == "decode_kernel" and (result.what.startswith("mla,") or "FP8 rows" in result.what)


def attend_released(compiler: Compiler, shape: str, call: str, dtype: str, eight_bits: bool = False) -> None:
    """Decode attention of a released shape; `call` is how many queries, and of what kind."""
    latents, groups, heads, width = SHAPES[shape]
    length, masked = int(call.partition(",")[0]), "masked" in call
    batch, page_size = {1: 1, 3: 32, 16: 2}[length], 16 if "paged" in call else 0
    compiler.what = f"{shape}, {call}, {dtype}{', FP8 rows' if eight_bits else ''}"
    options = {"masked": masked, "page_size": page_size, "dtype": DTYPES[dtype], "groups": groups, "width": width}
    options["eight_bits"] = eight_bits
    attend(batch, length, latents, heads, **options)


def step_released(compiler: Compiler, shape: str, sequences: int, dtype: str = "bf16", fp8: bool = False) -> None:
    compiler.what = f"{shape}, {sequences} sequences, {dtype}{', FP8 weights' if fp8 else ''}"
    step(sequences, DTYPES[dtype], fp8, **STEPS[shape])


def pages_released(compiler: Compiler, shape: str, sequences: int) -> None:
    """Of a step over pages, the kernels that differ."""
    compiler.what = f"{shape}, {sequences} sequences in pages"
    for compiler.only in ("absorb_kernel", "rows_kernel", "decode_kernel"):
        step_over_pages(sequences, **STEPS[shape])
    compiler.only = None


def exchange_released(compiler: Compiler, ranks: int, dtype: str = "bf16") -> None:
    compiler.what = f"{ranks} ranks, {dtype}"
    exchange(ranks, DTYPES[dtype])


def compile_all(name: str) -> list[str]:
    """Every kernel for one target; prints them, and returns what is wrong."""
    with Compiler(name).in_place_of_launches() as compiler:
        for dtype, calls in CALLS.items():
            for call in calls:
                for shape in SHAPES:
                    attend_released(compiler, shape, call, dtype)
                    if dtype == "bf16":
                        attend_released(compiler, shape, call, dtype, eight_bits=True)
        for sequences in (1, 2, 16):
            for shape in STEPS:
                step_released(compiler, shape, sequences)
                pages_released(compiler, shape, sequences)
            if compiler.facts.float8:
                step_released(compiler, "mlra_4", sequences, fp8=True)
        for ranks in (2, 3, 4, 8) if compiler.facts.nvidia else ():
            for dtype in DTYPES:
                exchange_released(compiler, ranks, dtype)
    return compiler.faults()


def compile_sample(name: str) -> list[str]:
    """A few for one target, those where targets differ; of Hopper's every kind."""
    with Compiler(name).in_place_of_launches() as compiler:
        if name == "sm_90":
            compiler.what = "sample"
            attend(batch=1, length=1, latents=1, heads=64)
            attend(batch=3, length=4, latents=4, heads=24, masked=True)
            attend(batch=1, length=1, latents=4, heads=24, cached=2**20)
            attend(batch=3, length=4, latents=4, heads=8, masked=True, cached=2**20)
            attend(batch=3, length=1, latents=4, heads=24, page_size=32)
            compiler.what = "sample, pages"
            attend(batch=3, length=1, latents=4, heads=24, page_size=64)
            attend(batch=1, length=1, latents=4, heads=24, page_size=64, cached=2**20)
            attend(batch=3, length=4, latents=4, heads=24, page_size=64, masked=True)
            attend(batch=3, length=4, latents=4, heads=24, page_size=128)
            compiler.what = "sample, eight bits"
            attend(batch=1, length=1, latents=1, heads=64, eight_bits=True)
            attend(batch=1, length=1, latents=4, heads=24, cached=2**20, eight_bits=True)
            attend(batch=3, length=4, latents=4, heads=24, page_size=64, masked=True, eight_bits=True)
            attend(batch=3, length=1, latents=4, heads=24, page_size=32, eight_bits=True)
            for sequences in (1, 2, 16):
                step_released(compiler, "mlra_4, gated", sequences)
            for shape, sequences in (("mlra_4", 1), ("gla_2", 2), ("mla", 32), ("mlra_4, FP8 rows", 16)):
                pages_released(compiler, shape, sequences)
            for compiler.only in ("register_linear_kernel", "stream_linear_kernel"):
                step_released(compiler, "mlra_4", 1, fp8=True)
            compiler.only = "absorb_kernel"
            step_released(compiler, "mlra_4, FP8 rows", 1)
            compiler.only = None
            exchange_released(compiler, 4)
        for shape, call, dtype in SAMPLE.get(name, ()):
            attend_released(compiler, shape, call, dtype)
        if name in ("sm_80", "gfx942"):
            attend_released(compiler, "mlra_4 on 4 ranks", "1", "bf16", eight_bits=True)
        if name == "gfx90a":
            step_released(compiler, "mlra_4", 1)
        if name == "sm_80":
            compiler.only = "value_kernel"
            step_released(compiler, "gla_4", 2)
            compiler.only = None
            exchange_released(compiler, 2, "fp32")
    return compiler.faults()


SAMPLE = {
    "sm_80": [("mlra_4", "1", "fp32")],
    "sm_86": [("mlra_4", "1", "bf16"), ("mla", "1", "bf16"), ("mlra_4", "1", "fp32")],
    "sm_89": [("mlra_4", "3, paged", "bf16")],
    "sm_100": [("mla", "1", "bf16")],
    "sm_120": [("gla_2", "16, masked", "bf16")],
    "gfx90a": [("mlra_4", "1", "bf16")],
    "gfx942": [("mla", "1", "bf16"), ("gla_2", "1", "fp32")],
    "gfx950": [("mla", "1", "bf16")],
    "gfx1100": [("mlra_4", "1", "bf16")],
    "gfx1201": [("mlra_4", "3, paged", "bf16")],
}
"""Target -> decode attention that is compiled in every run of the tests."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sample", action="store_true", help="the few that every run of the tests compiles")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    run = compile_sample if options.sample else compile_all
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        faults = [fault for some in pool.imap_unordered(run, options.targets) for fault in some]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
