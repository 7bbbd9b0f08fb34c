"""The hook of decode attention: which implementation runs, what it refuses, FlashAttention-3, kernels of the Hub."""

from unittest.mock import MagicMock

import pytest
import torch

from modeling_mlra import decode_flash_mlra, decode_mlra, device_mlra
from modeling_mlra.cache_mlra import MLRADynamicLayer
from modeling_mlra.decode_mlra import decode_calls, latent_attention
from tests.decode_inputs import DEVICE, FP32_RATIO, in_pages, inputs, oracle, ratio, run

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
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", None)
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
    """Stands in for `flash_attn_interface`: what it is handed, computed plainly, if published builds take it.

    As their kernels do, it multiplies what lies behind the last row by zero.
    """

    def __init__(self):
        self.forms = []

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, qv=None, page_table=None, cache_seqlens=None, softmax_scale=None, causal=False
    ):
        widths = k_cache.shape[-1], v_cache.shape[-1]
        assert widths == (192, 128) if qv is None else widths[0] <= 64 and 256 <= widths[1] <= 512
        assert qv is None or qv.shape == (*q.shape[:3], widths[1])
        assert k_cache.shape[2] == v_cache.shape[2] == 1 and k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert causal == (q.shape[1] > 1)
        self.forms.append((*widths, q.shape[2], qv is not None))
        if page_table is not None:
            k_cache, v_cache = (x[page_table.clamp(min=0).long()].flatten(1, 2) for x in (k_cache, v_cache))
        keys, values = k_cache[:, :, 0].double(), v_cache[:, :, 0].double()
        scores = torch.einsum("bthd,bsd->bths", q.double(), keys)
        if qv is not None:
            scores += torch.einsum("bthd,bsd->bths", qv.double(), values)
        last = cache_seqlens[:, None] - q.shape[1] + torch.arange(q.shape[1])
        seen = torch.arange(keys.shape[1]) <= last[..., None]
        weights = (scores * softmax_scale).masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
        return torch.einsum("bths,bsd->bthd", weights, values).to(q.dtype)


FLASH_FORMS = {  # latents, groups, latent width; key and value widths, heads and `qv` of each call (2 heads a latent)
    "mla": ((1, 1, 512), [(64, 512, 2, True)]),
    "gla_2": ((2, 2, 256), [(64, 256, 2, True)] * 2),
    "gla_4": ((4, 4, 128), [(64, 512, 8, True)]),
    "mlra_2": ((4, 2, 128), [(64, 512, 8, True)]),
    "mlra_4": ((4, 1, 128), [(64, 512, 8, True)]),
    "mlra_4 on 2 ranks": ((2, 1, 128), [(64, 256, 4, True)]),
    "mlra_4 on 4 ranks": ((1, 1, 128), [(192, 128, 2, False)]),
}


def finite_inputs(shape, length, ends):
    """As `inputs` of float32, unused rows of zeros."""
    num_latents, groups, width = shape
    arguments, kv_end = inputs(len(ends), length, num_latents, groups, 2, width, 64, max(ends) + 3, ends=ends)
    rows = arguments[3]._base.nan_to_num_(0.0)
    assert not rows.isnan().any()
    return arguments, kv_end


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("released", FLASH_FORMS)
def test_flash_attention_3_forms(released, length, monkeypatch):
    fake = FakeFlashAttention3()
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", fake)
    shape, forms = FLASH_FORMS[released]
    arguments, kv_end = finite_inputs(shape, length, [20, 7])
    result = torch.ops.mlra.latent_attention_flash_attention_3(*arguments, kv_end, None, None, None, 0, 0.1)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.1)) < FP32_RATIO
    assert result.is_contiguous()  # as its stand-in while tracing says
    assert fake.forms == forms


@pytest.mark.parametrize("released", ["mla", "mlra_4", "mlra_4 on 4 ranks"])
def test_flash_attention_3_over_pages(released, monkeypatch):
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", FakeFlashAttention3())
    arguments, kv_end = finite_inputs(FLASH_FORMS[released][0], 2, [20, 7])
    paged, where = in_pages(arguments, kv_end, 4)
    paged[3]._base.nan_to_num_(0.0)
    pages = where["block_table"], where["page_size"]
    result = torch.ops.mlra.latent_attention_flash_attention_3(*paged, kv_end, None, None, *pages, 0.1)
    assert ratio(result, oracle(*arguments, kv_end, scaling=0.1)) < FP32_RATIO


@pytest.mark.parametrize(
    "shape", [*(shape for shape, _ in FLASH_FORMS.values()), (2, 1, 64), (5, 1, 128), (1, 1, 576)]
)
def test_flash_attention_3_refuses_what_no_published_build_takes(shape, monkeypatch):
    """And nothing of what the released models keep on 1, 2 and 4 ranks."""
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", FakeFlashAttention3())
    num_latents, _, width = shape
    _, _, latents, k_rope = inputs(1, 1, num_latents, 1, 2, width, 64, 5, torch.bfloat16)[0]
    on_gpu = MagicMock(device=torch.device("cuda", 0), dtype=torch.bfloat16, requires_grad=False)

    def chosen(latents, k_rope):
        return decode_mlra.choose_implementation("flash_attention_3", on_gpu, on_gpu, latents, k_rope)

    if shape in [released for released, _ in FLASH_FORMS.values()]:
        assert chosen(latents, k_rope) == "flash_attention_3"
        with pytest.raises(ValueError, match=r"rotary key of at most 64.* and 66; use 'triton'"):
            chosen(latents, torch.zeros(1, 5, 66, dtype=torch.bfloat16))
    else:
        with pytest.raises(
            ValueError, match=f"256 to 512 columns.* not {num_latents} of {width} and 64; use 'triton'"
        ):
            chosen(latents, k_rope)
    if 1 < num_latents < 5 and width == 128:  # not side by side
        with pytest.raises(ValueError, match="256 to 512 columns"):
            chosen(torch.cat([latents, latents], -1)[..., :128], k_rope)


def test_growing_rows_are_finite_where_unused(monkeypatch):
    """What FlashAttention-3 multiplies by zero behind the last row, whatever the memory held before."""
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: plain(*args, **kwargs).fill_(torch.nan))
    layer = MLRADynamicLayer()
    layer.reserve(8)
    for _ in range(3):
        layer.update(torch.ones(1, 1, 5, 8), torch.ones(1, 1, 5, 4))
        assert layer.rows.shape[2] > layer.get_seq_length()
        assert layer.rows.isfinite().all()


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
