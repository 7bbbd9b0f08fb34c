"""Decode attention: the torch form and the Triton kernel against an independent float64 oracle, and the hook.

Triton runs in its interpreter here, so that no GPU is needed; tests marked `gpu` run the real kernels.
"""

import os
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch

from modeling_mlra import decode_mlra, decode_plans_mlra, decode_triton_mlra, device_mlra
from modeling_mlra.decode_arguments_mlra import DecodeInputs, DecodeTile
from modeling_mlra.decode_mlra import decode_calls, latent_attention
from modeling_mlra.decode_reference_mlra import reference_latent_attention
from modeling_mlra.device_mlra import DeviceFacts
from tests import tolerances
from tests.paths import REPOSITORY

errors = pytest.importorskip("triton.runtime.errors")

COMPILED_TARGETS = {f"sm_{number}" for number in (80, 86, 89, 90, 100, 120)} | set(device_mlra.AMD_TARGETS)
STRUCTURES = {"mla": (1, 1), "gla_2": (2, 1), "gla_4": (4, 1), "mlra_2": (4, 2), "mlra_4": (4, 4)}
FP32_RATIO = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where there is one, all of them run on the GPU


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    monkeypatch.delenv(decode_mlra.ENVIRONMENT_VARIABLE, raising=False)


def oracle(q_latent, q_rope, latents, k_rope, kv_end, kv_start=None, key_mask=None, *, scaling):
    """One row at a time in float64, straight from the definition."""
    batch, length, num_latents, heads, _ = q_latent.shape
    per_group = num_latents // q_rope.shape[2]
    result = torch.zeros(q_latent.shape, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            first = 0 if kv_start is None else int(kv_start[b])
            rows = [j for j in range(first, int(kv_end[b]) - length + t + 1) if key_mask is None or key_mask[b, j]]
            if not rows:
                continue
            for s in range(num_latents):
                keys = torch.cat([latents[b, rows, s], k_rope[b, rows]], dim=-1).double()
                for h in range(heads):
                    query = torch.cat([q_latent[b, t, s, h], q_rope[b, t, s // per_group, h]]).double()
                    weights = torch.softmax(scaling * (keys @ query), dim=0)
                    result[b, t, s, h] = weights @ latents[b, rows, s].double()
    return result


def inputs(batch, length, num_latents, groups, heads, width, rope, rows, dtype=torch.float32, ends=None, seed=0):
    """Queries and one row tensor [c_0 .. | k_rope] whose unused rows are NaN; returns the arguments and kv_end."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    ends = [rows] * batch if ends is None else ends
    cache = normal(batch, rows, num_latents * width + rope)
    for b, end in enumerate(ends):
        cache[b, end:] = float("nan")
    latents = cache[..., : num_latents * width].unflatten(-1, (num_latents, width))
    queries = normal(batch, length, num_latents, heads, width), normal(batch, length, groups, heads, rope)
    return (*queries, latents, cache[..., num_latents * width :]), torch.tensor(ends, dtype=torch.int32)


def ratio(result, reference):
    """RMS of the difference over RMS of the reference; NaN fails every comparison."""
    return ((result.double().cpu() - reference).norm() / reference.norm()).item()


def run(arguments, kv_end, implementation, **options):
    arguments = [x.to(DEVICE) for x in arguments]
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return latent_attention(*arguments, kv_end=kv_end.to(DEVICE), implementation=implementation, **options).cpu()


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh results and partial results start as NaN: whatever the kernel does not write shows."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(decode_triton_mlra.torch, "empty", poisoned_empty)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_structures_ragged_with_nan_tail(structure, implementation, poisoned):
    num_latents, branches = STRUCTURES[structure]
    arguments, kv_end = inputs(4, 1, num_latents, num_latents // branches, 3, 16, 16, 70, ends=[63, 1, 0, 37])
    result = run(arguments, kv_end, implementation, scaling=0.2)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO
    assert result[2].eq(0).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_query_lengths_are_causal(length, implementation, poisoned):
    arguments, kv_end = inputs(2, length, 4, 2, 3, 16, 16, 45, ends=[45, max(length, 3)])
    result = run(arguments, kv_end, implementation, scaling=0.3)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.3)) < FP32_RATIO


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_padding_and_holes(implementation, poisoned):
    arguments, kv_end = inputs(3, 2, 4, 1, 3, 16, 16, 50, ends=[50, 41, 20])
    kv_start = torch.tensor([0, 17, 20], dtype=torch.int32)  # the last sees nothing at all
    key_mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    for rows in arguments[2:]:
        rows[~key_mask] = float("nan")
    expected = oracle(*arguments, kv_end, kv_start, key_mask, scaling=0.2)
    result = run(arguments, kv_end, implementation, kv_start=kv_start, key_mask=key_mask, scaling=0.2)
    assert ratio(result, expected) < FP32_RATIO
    assert result[2].eq(0).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(("heads", "width", "rope"), [(24, 16, 16), (5, 24, 8), (1, 48, 20), (40, 16, 16)])
def test_sizes_that_are_no_powers_of_two(heads, width, rope, implementation, poisoned):
    arguments, kv_end = inputs(1, 1, 2, 1, heads, width, rope, 37)
    result = run(arguments, kv_end, implementation, scaling=0.2)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, implementation):
    arguments, kv_end = inputs(2, 1, 4, 1, 3, 32, 16, 150, dtype=dtype, ends=[150, 77])
    result = run(arguments, kv_end, implementation, scaling=0.15)
    assert result.dtype == dtype
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.15)) < tolerances.KERNEL_BF16_RATIO


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_paged_rows(page_size, implementation, poisoned):
    arguments, kv_end = inputs(2, 2, 4, 1, 3, 16, 16, 42, ends=[42, 9])
    q_latent, q_rope, latents, k_rope = arguments
    blocks = -(-42 // page_size)
    order = torch.randperm(2 * blocks + 3, generator=torch.Generator().manual_seed(2))[: 2 * blocks].view(2, blocks)
    pool = torch.full(((2 * blocks + 3) * page_size, 4 * 16 + 16), float("nan"))
    for b in range(2):
        for j in range(int(kv_end[b])):
            row = order[b, j // page_size] * page_size + j % page_size
            pool[row] = torch.cat([latents[b, j].flatten(), k_rope[b, j]])
    paged = q_latent, q_rope, pool[:, :64].unflatten(-1, (4, 16)), pool[:, 64:]
    table = order.to(torch.int32)
    result = run(paged, kv_end, implementation, scaling=0.2, block_table=table, page_size=page_size)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


def test_large_scores_do_not_overflow():
    arguments, kv_end = inputs(1, 1, 1, 1, 2, 16, 16, 90)
    arguments = (arguments[0] * 100, *arguments[1:])
    for implementation in ("torch", "triton"):
        result = run(arguments, kv_end, implementation, scaling=1.0)
        assert ratio(result, oracle(*arguments, kv_end, scaling=1.0)) < FP32_RATIO


@pytest.mark.parametrize("programs_per_sm", [1, 5])
@pytest.mark.parametrize(("latents", "rows"), [(1, 16), (2, 16), (4, 32)])
def test_every_split_of_the_work(latents, rows, programs_per_sm, poisoned):
    """Shares that start and end inside sequences, whole sequences between them, more programs than units."""
    arguments, kv_end = inputs(5, 1, 4, 1, 3, 16, 16, 64, ends=[64, 3, 0, 40, 17])
    tile = DecodeTile(NL=latents, BM=rows, BN=16, RP=16, EP=16)
    plan = decode_plans_mlra.DecodePlan(tile, unit=8, programs_per_sm=programs_per_sm * 4)
    moved = [x.to(DEVICE) for x in (*arguments, kv_end)]
    call = DecodeInputs(*moved, kv_start=None, key_mask=None, block_table=None, page_size=0, scaling=0.2)
    result = decode_triton_mlra.triton_latent_attention(call, plan)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


def test_sequences_stay_whole_where_that_idles_few_programs(monkeypatch):
    """15 equal sequences on 16 programs' worth of multiprocessors: nothing is left for the second kernel to reduce."""
    monkeypatch.setattr(decode_triton_mlra, "device_facts", lambda device: DeviceFacts(multiprocessors=16))
    monkeypatch.setattr(decode_triton_mlra, "combine_kernel", MagicMock())
    arguments, kv_end = inputs(15, 1, 1, 1, 3, 16, 16, 64)
    result = run(arguments, kv_end, "triton", scaling=0.2)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_settled_rows_give_the_same_result(implementation):
    """On Hopper GPUs with a row that the kernel right in front has written."""
    size = (1, 1, 1, 1, 64, 128, 64, 5000) if DEVICE == "cuda" else (2, 1, 4, 1, 3, 16, 16, 20)
    arguments, kv_end = inputs(*size, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    arguments = [x.to(DEVICE) for x in arguments]
    expected = run(arguments, kv_end, implementation, scaling=0.2)
    newest = [x[:, -1].clone() for x in arguments[2:]]
    for _ in range(5):
        for rows, row in zip(arguments[2:], newest, strict=True):
            rows[:, -1] = float("nan")
            rows[:, -1] = row
        assert torch.equal(run(arguments, kv_end, implementation, scaling=0.2, settled=True), expected)


def test_reference_is_differentiable_and_float64():
    arguments, kv_end = inputs(1, 2, 2, 1, 2, 8, 4, 6, dtype=torch.float64)
    arguments = [x.clone().requires_grad_() for x in arguments]

    def attend(*x):
        return latent_attention(*x, kv_end=kv_end, scaling=0.2)

    assert torch.autograd.gradcheck(attend, arguments)
    assert (attend(*arguments) - oracle(*arguments, kv_end, scaling=0.2)).abs().max() < tolerances.MATHEMATICS_ATOL


# --- the operator ---


def operator_arguments():
    arguments, kv_end = inputs(2, 2, 4, 2, 3, 16, 16, 20, ends=[20, 11])
    moved = [x.to(DEVICE) for x in arguments]
    return (*moved, kv_end.to(DEVICE), None, None, None, 0, 0.2)


def test_operator_is_well_formed():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.mlra.latent_attention_triton.default, operator_arguments(), test_utils=checks)


@pytest.mark.parametrize("implementation", ["auto", "torch", "triton"])
def test_compiles_without_graph_breaks(implementation):
    arguments, kv_end = inputs(2, 1, 4, 1, 3, 16, 16, 20, ends=[20, 11])

    def attend(*x):
        return latent_attention(*x, kv_end=kv_end, scaling=0.2, implementation=implementation)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    before = decode_calls["triton"]
    if DEVICE == "cpu":
        assert ratio(compiled(*arguments), oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO
        assert (decode_calls["triton"] > before) == (implementation == "triton")


# --- the hook ---


def attend(**options):
    arguments, kv_end = inputs(1, 1, 1, 1, 2, 16, 16, 5)
    return run(arguments, kv_end, options.pop("implementation", "auto"), scaling=0.2, **options)


def test_order_of_choice(monkeypatch):
    decode_calls.clear()
    attend()
    assert decode_calls == ({"torch": 1} if DEVICE == "cpu" else {"triton": 1})
    monkeypatch.setenv("MLRA_DECODE", "triton")
    attend()
    assert decode_calls["triton"] == (1 if DEVICE == "cpu" else 2)
    torch_calls = decode_calls["torch"]
    attend(implementation="torch")
    assert decode_calls["torch"] == torch_calls + 1


def test_impossible_requests_say_why(monkeypatch):
    with pytest.raises(ValueError, match="unknown decode implementation 'tritn'.*torch"):
        attend(implementation="tritn")
    monkeypatch.setattr(decode_mlra, "flash_attn_interface", None)
    with pytest.raises(ImportError, match="flash_attn_interface.*not installed.*triton"):
        attend(implementation="flash_attention_3")
    monkeypatch.setattr(device_mlra, "INTERPRETED", False)
    monkeypatch.setattr(device_mlra, "known_devices", {})
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs a GPU.*'torch'"):
            attend(implementation="triton")
    monkeypatch.setattr(device_mlra, "triton", None)
    monkeypatch.setattr(device_mlra, "triton_trouble", "module triton is not installed")
    with pytest.raises(ImportError, match="triton is not installed"):
        attend(implementation="triton")
    monkeypatch.setattr(decode_mlra, "hub_kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        attend(implementation="org/repo")


def test_gradient_goes_to_torch():
    arguments, kv_end = inputs(1, 1, 1, 1, 2, 16, 16, 5)
    arguments = [x.requires_grad_() for x in arguments[:2]] + list(arguments[2:])
    assert latent_attention(*arguments, kv_end=kv_end, scaling=0.2).requires_grad
    with pytest.raises(ValueError, match="no gradient"):
        latent_attention(*arguments, kv_end=kv_end, scaling=0.2, implementation="triton")


def test_shapes_that_do_not_fit():
    arguments, kv_end = inputs(2, 1, 4, 1, 3, 16, 16, 5)
    q_latent, q_rope, latents, k_rope = arguments
    with pytest.raises(ValueError, match=r"kv_end has shape \(1,\)"):
        latent_attention(*arguments, kv_end=kv_end[:1], scaling=0.2)
    with pytest.raises(ValueError, match="latents"):
        latent_attention(q_latent, q_rope, latents[:, :, :3], k_rope, kv_end=kv_end, scaling=0.2)
    with pytest.raises(ValueError, match="k_rope"):
        latent_attention(q_latent, q_rope, latents, k_rope[..., :3], kv_end=kv_end, scaling=0.2)


class FakeFlashAttention3:
    """Stands in for `flash_attn_interface`: what it is handed, computed plainly."""

    def __init__(self):
        self.forms = []

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, qv=None, cache_seqlens=None, softmax_scale=None, causal=False
    ):
        self.forms.append((k_cache.shape[-1], v_cache.shape[-1], qv is not None))
        keys = k_cache if qv is None else torch.cat([v_cache, k_cache], -1)
        query = q if qv is None else torch.cat([qv, q], -1)
        zero_rope = torch.zeros(*q.shape[:2], 1, q.shape[2], 16, dtype=q.dtype)
        no_keys = torch.zeros(*keys.shape[:2], 16, dtype=q.dtype)
        full = reference_latent_attention(
            query[:, :, None], zero_rope, keys, no_keys, cache_seqlens, scaling=softmax_scale
        )[:, :, 0]
        return full[..., : v_cache.shape[-1]]


@pytest.mark.parametrize(
    ("num_latents", "width", "forms"), [(1, 128, [(192, 128, False)]), (2, 256, [(64, 256, True)] * 2)]
)
def test_flash_attention_3_forms(num_latents, width, forms, monkeypatch):
    fake = FakeFlashAttention3()
    monkeypatch.setattr(decode_mlra, "flash_attn_interface", fake)
    arguments, kv_end = inputs(2, 3, num_latents, 1, 2, width, 64, 20, ends=[20, 7])
    result = torch.ops.mlra.latent_attention_flash_attention_3(*arguments, kv_end, None, None, None, 0, 0.1)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.1)) < FP32_RATIO
    assert fake.forms == forms


@pytest.mark.parametrize(("num_latents", "width"), [(1, 128), (2, 256), (1, 512), (4, 128), (2, 64)])
def test_flash_attention_3_refuses_what_no_published_build_takes(num_latents, width, monkeypatch):
    monkeypatch.setattr(decode_mlra, "flash_attn_interface", FakeFlashAttention3())
    _, _, latents, k_rope = inputs(1, 1, num_latents, 1, 2, width, 64, 5, torch.bfloat16)[0]
    on_gpu = MagicMock(device=torch.device("cuda", 0), dtype=torch.bfloat16, requires_grad=False)
    inputs_there = (on_gpu, on_gpu, latents, k_rope)
    if (num_latents, width) in ((4, 128), (2, 64)):
        with pytest.raises(ValueError, match=f"latents of 256 or more.* not {num_latents} of {width}; use 'triton'"):
            decode_mlra.choose_implementation("flash_attention_3", *inputs_there)
    else:
        assert decode_mlra.choose_implementation("flash_attention_3", *inputs_there) == "flash_attention_3"


HUB_KERNEL = """
import torch
calls = 0
def latent_attention(q_latent, q_rope, latents, k_rope, *, kv_end, kv_start=None, key_mask=None, scaling):
    global calls
    calls += 1
    return torch.full_like(q_latent, 7.0)
"""


@pytest.fixture
def kernel_folder(tmp_path):
    package = tmp_path / "latent-decode" / "build" / "torch-universal" / "latent_decode"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(HUB_KERNEL)
    (package.parent / "metadata.json").write_text(
        '{"id": "_latent_decode_1", "name": "latent-decode", "version": 1, "license": "apache-2.0", '
        '"upstream": "https://example.org/latent-decode.git", "source": "https://example.org/latent-decode.git", '
        '"python-depends": [], "backend": {"type": "cpu"}}'
    )
    return tmp_path / "latent-decode"


def test_kernel_from_a_local_folder(kernel_folder):
    pytest.importorskip("kernels")
    name = str(kernel_folder)
    assert attend(implementation=name).eq(7).all()
    assert decode_calls[name] == 1


def test_kernel_without_the_function_says_so(monkeypatch):
    class Loader:
        @staticmethod
        def get_kernel(repository, revision):
            assert (repository, revision) == ("org/repo", "v2")
            return object()

    monkeypatch.setattr(decode_mlra, "hub_kernels", Loader)
    with pytest.raises(ValueError, match="no function `latent_attention`"):
        attend(implementation="org/repo@v2")


# --- the real thing ---


@pytest.mark.parametrize(
    ("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False)]
)
def test_hopper_kernels_run_with_versions_of_triton_they_are_written_for(version, fits, monkeypatch, caplog):
    monkeypatch.setattr(device_mlra.triton, "__version__", version)
    assert device_mlra.gluon_fits() == fits
    assert fits or f"triton {version} is not one of 3.6 to 3.9" in caplog.text


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """With the installed triton: interpreted kernels never meet its compiler, and Hopper's cannot be interpreted.

    A sample of `make kernels`, which fails where a launch would: an option that the target does not know, a plan that
    does not fit its shared memory; and where too much is spilled.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    command = [sys.executable, "-m", "tests.compile_kernels", "--sample"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if " spilled" in line]
    assert {line.split()[0] for line in lines} == COMPILED_TARGETS
    on_hopper = [line for line in lines if line.startswith("sm_90")]
    fused = {"embed_kernel", "absorb_kernel", "value_kernel", "product_value_kernel", "choose_kernel"}
    fused |= {"register_linear_kernel", "product_linear_kernel", "stream_linear_kernel"}
    assert {line.split()[1] for line in on_hopper} == fused | {"rows_kernel", "decode_kernel", "combine_kernel"}
    for line in on_hopper:
        if "rows_kernel" in line:
            assert "matrix products" in line and "bulk copies" in line, line
        if "product_linear_kernel" in line:  # its weights come through buffers, in whole vectors
            shared = int(line.partition(" bytes")[0].split()[-1])
            assert "matrix products" in line and shared > 50_000, line
    assert sum(" 8 bulk copies" in line for line in on_hopper) == 6, "gate and up, down, vocabulary; 1 and 2 sequences"
    assert sum("rows_kernel" in line and " 5 bulk copies" in line for line in on_hopper) == 2, "two latents"


@pytest.mark.parametrize(
    ("programs", "batch", "expected"),
    [(132, 1, 132), (33, 16, 32), (33, 5, 33), (132, 64, 128), (132, 128, 128), (33, 66, 33), (33, 40, 33)],
)
def test_shares_of_sequences_of_one_length(programs, batch, expected):
    assert decode_plans_mlra.even_programs(programs, batch) == expected


class SmallGPU:
    """Refuses the first launches of the decode kernel, as a GPU does where shared memory lacks."""

    def __init__(self, refusals):
        self.refusals, self.tried, self.launch = refusals, [], decode_triton_mlra._launch

    def __call__(self, plan, *arguments):
        self.tried.append(plan)
        if len(self.tried) <= self.refusals:
            raise errors.OutOfResources(300_000, 200_000, "shared memory")
        return self.launch(plan, *arguments)


def test_a_plan_that_does_not_fit_gives_way_to_a_smaller_one(monkeypatch):
    """Plans are tried from the best on, and the choice is kept: for what decides on a kernel, and for nothing else."""
    arguments, kv_end = inputs(1, 1, 2, 1, 3, 16, 16, 9)
    expected = oracle(*arguments, kv_end, scaling=0.2)
    small = SmallGPU(refusals=2)
    monkeypatch.setattr(decode_triton_mlra, "_launch", small)
    monkeypatch.setattr(decode_triton_mlra, "_fitting_plans", {})
    for _ in range(2):
        assert ratio(run(arguments, kv_end, "triton", scaling=0.2), expected) < FP32_RATIO
    best, second, third, again = small.tried
    assert again == third and best != second != third
    paged = [x[0] if i > 1 else x for i, x in enumerate(arguments)]
    table = torch.zeros(1, 1, dtype=torch.int32)
    for options in ({"key_mask": torch.ones(1, 9, dtype=torch.bool)}, {"block_table": table, "page_size": 9}):
        run(paged if "page_size" in options else arguments, kv_end, "triton", scaling=0.2, **options)
        assert small.tried[-1] == best, "another kernel, which may fit"


def test_where_no_plan_fits_the_automatic_choice_is_torch_and_says_so_once(monkeypatch, caplog):
    arguments, kv_end = inputs(1, 1, 2, 1, 3, 16, 16, 9)
    small = SmallGPU(refusals=10**9)
    monkeypatch.setattr(decode_triton_mlra, "_launch", small)
    monkeypatch.setattr(decode_triton_mlra, "_fitting_plans", {})
    monkeypatch.setattr(decode_mlra, "_said", set())
    moved = [x.to(DEVICE) for x in (*arguments, kv_end)]
    tries = []
    for _ in range(2):
        before = dict(decode_calls)
        result = torch.ops.mlra.latent_attention_auto(*moved, None, None, None, 0, 0.2)
        assert ratio(result, oracle(*arguments, kv_end, scaling=0.2)) < FP32_RATIO
        assert decode_calls["torch"] == before.get("torch", 0) + 1
        assert decode_calls["triton"] == before.get("triton", 0)
        tries.append(len(small.tried))
    assert tries[0] == tries[1] > 2, "each plan is tried once"
    assert [record.message.count("'triton' cannot run because out of resource") for record in caplog.records] == [1]
    with pytest.raises(errors.OutOfResources, match="shared memory"):
        run(arguments, kv_end, "triton", scaling=0.2)

    def broken(*arguments):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(decode_triton_mlra, "_fitting_plans", {})
    monkeypatch.setattr(decode_triton_mlra, "_launch", broken)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ops.mlra.latent_attention_auto(*moved, None, None, None, 0, 0.2)


CARDS = {
    "H100": DeviceFacts(132, True, True, 232_448, 233_472, nvidia=True),
    "A100": DeviceFacts(108, shared_bytes=166_912, shared_per_multiprocessor=167_936, nvidia=True),
    "4090": DeviceFacts(128, shared_bytes=101_376, shared_per_multiprocessor=102_400, nvidia=True),
    "MI300X": DeviceFacts(304, shared_bytes=65_536, shared_per_multiprocessor=65_536, warp_size=64),
}


@pytest.mark.parametrize(
    ("card", "latents", "width", "itemsize", "expected"),
    [
        ("H100", 4, 128, 2, {"NL": 4, "BM": 32, "BN": 16, "num_stages": 4, "num_warps": 4, "programs_per_sm": 2}),
        ("H100", 1, 512, 2, {"NL": 1, "BM": 32, "BN": 32, "num_stages": 3, "num_warps": 8, "programs_per_sm": 1}),
        ("A100", 4, 128, 2, {"NL": 4, "BM": 32, "BN": 16, "num_stages": 4, "num_warps": 4, "programs_per_sm": 1}),
        ("4090", 4, 128, 2, {"NL": 4, "BM": 32, "BN": 16, "num_stages": 3, "num_warps": 4, "programs_per_sm": 1}),
        ("4090", 4, 128, 4, {"NL": 1, "BM": 32, "BN": 16, "num_stages": 3, "num_warps": 8, "programs_per_sm": 1}),
        ("4090", 1, 512, 2, {"NL": 1, "BM": 32, "BN": 32, "num_stages": 2, "num_warps": 8, "programs_per_sm": 1}),
        ("MI300X", 1, 512, 2, {"NL": 1, "BM": 32, "BN": 16, "num_stages": 3, "num_warps": 8, "programs_per_sm": 1}),
    ],
)
def test_first_plans_of_the_plain_kernel(card, latents, width, itemsize, expected):
    plan = decode_plans_mlra.decode_plans(24, latents, 1, width, 64, itemsize, 4096, False, CARDS[card])[0]
    assert isinstance(plan.tile, DecodeTile)
    assert expected.items() <= (plan._asdict() | plan.tile._asdict()).items()


@pytest.mark.gpu
@pytest.mark.parametrize(("num_latents", "heads"), [(1, 64), (4, 24), (1, 128), (4, 3)])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_gpu_shapes(num_latents, heads, length):
    arguments, kv_end = inputs(3, length, num_latents, 1, heads, 128, 64, 700, torch.bfloat16, ends=[700, 65, 16])
    mask = torch.rand(3, 700, generator=torch.Generator().manual_seed(1)) > 0.2
    holes = [x.clone() for x in arguments]
    for rows in holes[2:]:
        rows[~mask] = float("nan")
    for options in ({}, {"key_mask": mask, "kv_start": torch.tensor([3, 0, 0], dtype=torch.int32)}):
        used = holes if options else arguments
        exact = [x.double() for x in used]
        expected = reference_latent_attention(
            *exact, kv_end, options.get("kv_start"), options.get("key_mask"), scaling=0.07
        )
        result = run(used, kv_end, "triton", scaling=0.07, **options)
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(("num_latents", "groups", "heads", "length"), [(4, 1, 24, 1), (4, 1, 5, 6), (4, 2, 12, 2)])
def test_gpu_two_latents_in_one_program(batch, num_latents, groups, heads, length, monkeypatch):
    monkeypatch.setattr(decode_plans_mlra, "PAIRED_ROWS", 0)
    ends = [700 - 7 * b for b in range(batch)]
    arguments, kv_end = inputs(batch, length, num_latents, groups, heads, 128, 64, 700, torch.bfloat16, ends=ends)
    mask = torch.rand(batch, 700, generator=torch.Generator().manual_seed(1)) > 0.2
    holes = [x.clone() for x in arguments]
    for rows in holes[2:]:
        rows[~mask] = float("nan")
    for options in ({}, {"key_mask": mask, "kv_start": torch.arange(batch, dtype=torch.int32)}):
        used = holes if options else arguments
        expected = run([x.double() for x in used], kv_end, "torch", scaling=0.07, **options)
        result = run(used, kv_end, "triton", scaling=0.07, **options)
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO


def test_latents_share_programs_where_the_rotary_keys_are_read_often():
    def latents_of_a_program(cached, rows=24, latents=4, groups=1):
        return decode_plans_mlra.decode_plans(rows, latents, groups, 128, 64, 2, cached, True, CARDS["H100"])[
            0
        ].tile.NL

    assert latents_of_a_program(2**20) == latents_of_a_program(2**20, rows=32, groups=2) == 2
    assert latents_of_a_program(2**17) == latents_of_a_program(2**20, rows=33) == 1
    assert latents_of_a_program(2**20, latents=2) == latents_of_a_program(2**20, groups=4) == 1


@pytest.mark.gpu
def test_gpu_captures_into_a_cuda_graph_and_follows_kv_end():
    arguments, _ = inputs(2, 1, 4, 1, 24, 128, 64, 4096, torch.bfloat16)
    arguments = [x.cuda() for x in arguments]
    kv_end = torch.tensor([100, 4000], dtype=torch.int32, device="cuda")
    latent_attention(*arguments, kv_end=kv_end, scaling=0.07)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = latent_attention(*arguments, kv_end=kv_end, scaling=0.07)
    for ends in ([100, 4000], [4096, 1], [0, 777]):
        kv_end.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        exact = [x.double() for x in arguments]
        expected = reference_latent_attention(*exact, kv_end, scaling=0.07).cpu()
        assert ratio(result, expected) < tolerances.KERNEL_BF16_RATIO
