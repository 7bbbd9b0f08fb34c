"""The hook of decode attention: which implementation runs, what it refuses, FlashAttention-3, kernels of the Hub."""

from unittest.mock import MagicMock

import pytest
import torch

from modeling_mlra import decode_mlra, device_mlra
from modeling_mlra.decode_mlra import decode_calls, latent_attention
from modeling_mlra.decode_reference_mlra import reference_latent_attention
from tests.decode_inputs import DEVICE, FP32_RATIO, inputs, oracle, ratio, run

pytest.importorskip("triton")

pytestmark = [pytest.mark.usefixtures("no_choice_from_outside")]
if DEVICE == "cuda":  # where there is one, all of them run on the GPU
    pytestmark.append(pytest.mark.gpu)


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


# --- FlashAttention-3 ---


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


# --- a kernel from elsewhere ---


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
