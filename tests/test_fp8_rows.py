"""Latents cached in eight bits: their bytes, whoever writes and reads them, against the oracle of `fp8_oracle`."""

import pytest
import torch

from modeling_mlra import MLRACache, MLRAConfig, decode_flash_mlra, decode_mlra, device_mlra, rows_mlra
from modeling_mlra.decode_mlra import latent_attention
from modeling_mlra.rows_mlra import RowFormat
from modeling_mlra.step_mlra import FusedStep
from tests import tolerances
from tests.fp8_oracle import E4M3, oracle, rounded, rounded_cache
from tests.models import VARIANTS, random_ids, rms_ratio, tiny_config, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where there is one, all of them run on the GPU
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off, and does not round


if device_mlra.triton is not None:
    from modeling_mlra.device_mlra import tl, triton
    from modeling_mlra.device_triton_mlra import from_e4m3, scale_of, to_e4m3

    @triton.jit
    def convert_kernel(codes, wide, numbers, narrow, tops, scales, inverses, C, N, T, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(wide + i, from_e4m3(tl.load(codes + i, mask=i < C, other=0), 3.0, tl.float32), mask=i < C)
        tl.store(narrow + i, to_e4m3(tl.load(numbers + i, mask=i < N, other=0.0)), mask=i < N)
        scale, inverse = scale_of(tl.load(tops + i, mask=i < T, other=0.0))
        tl.store(scales + i, scale, mask=i < T)
        tl.store(inverses + i, inverse, mask=i < T)


def latents_of_all_kinds(number: int, width: int, seed: int = 0) -> torch.Tensor:
    """Of every size, with numbers that lie between two of e4m3's, subnormal ones, zeros, and a latent of nothing."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(5, number, width, generator=generator)
    latents[0, :, ::3] *= 2.0**-12
    latents[1] *= 1000
    latents[2, 0] = 0
    latents[3, :, :4] = torch.tensor([448.0, -232.0, 17.0, 2.0**-9 * 2.5])
    latents[4] *= 2.0**-100
    return latents.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("number", "width", "rope"), [(4, 32, 16), (1, 24, 6), (3, 9, 2)])
def test_bytes_of_a_row(number, width, rope, dtype):
    """Numbers, rotary key and scales, each where it belongs, against the oracle."""
    latents, k_rope = latents_of_all_kinds(number, width).to(dtype), torch.randn(5, rope).to(dtype)
    row_format = RowFormat(number * width, rope, dtype, number)
    rows = row_format.join(latents, k_rope)
    begin = -(-number * width // 4) * 4
    scales = -(-(begin + rope * dtype.itemsize) // 16) * 16
    assert rows.dtype == torch.uint8 and rows.shape == (5, row_format.nbytes) == (5, scales + 16)
    for row, c, k in zip(rows, latents, k_rope, strict=True):
        expected = [oracle(part.double()) for part in c.split(width)]
        assert row[: number * width].tolist() == [code for codes, _ in expected for code in codes]
        assert row[scales:].view(torch.float32).tolist() == [scale for _, scale in expected] + [0] * (4 - number)
        assert torch.equal(row[begin : begin + rope * dtype.itemsize].view(dtype), k)
    kept, key = row_format.split(rows)
    assert torch.equal(key, k_rope)
    read = row_format.read(kept)
    assert torch.equal(read, rounded(latents, width))
    again = row_format.read(row_format.split(row_format.join(read, key))[0])
    torch.testing.assert_close(again, read, rtol=3e-7 if dtype == torch.float32 else 0, atol=0)


def test_latents_that_are_not_finite_are_nan_and_no_others():
    latents = torch.ones(3, 8)
    latents[0, 1], latents[1, 6] = float("inf"), float("nan")
    row_format = RowFormat(8, 2, torch.float32, 2)
    read = row_format.read(row_format.join(latents, torch.ones(3, 2)))
    nan = torch.zeros(3, 8, dtype=torch.bool)
    nan[0, :4] = nan[1, 4:] = True
    assert torch.equal(read.isnan(), nan) and read[~nan].eq(1).all()


def test_released_rows_by_hand():
    """656 bytes a token for 1152, on a rank of four 272; in the library's pages 768, of heads of an even width."""
    config = MLRAConfig(dtype="bfloat16", cache_row_format="fp8")
    assert RowFormat.of_config(config).nbytes == 656 and RowFormat.of_config(config, num_latents=1).nbytes == 272
    assert MLRACache(config).bytes_per_token() == 24 * 656
    assert MLRACache(config, row_format="plain").bytes_per_token() == 24 * 1152
    assert 2 * config.num_key_value_heads * config.head_dim * 2 == 768


@pytest.mark.parametrize(("latents", "width", "rope"), [(4, 128, 64), (4, 8, 6), (8, 9, 4), (1, 30, 2)])
@pytest.mark.parametrize("heads", [8, 24])
def test_pages_of_the_library_hold_a_row(latents, width, rope, heads):
    settings = {"num_attention_heads": heads, "num_latent_heads": latents, "num_branches": latents}
    settings |= {"kv_lora_rank": latents * width, "qk_rope_head_dim": rope, "cache_row_format": "fp8"}
    config = MLRAConfig(**settings)
    page_row = 2 * config.num_key_value_heads * config.head_dim
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert RowFormat.of_config(config, dtype=dtype).nbytes <= page_row * dtype.itemsize
    assert page_row * 2 < RowFormat.of_config(config, dtype=torch.bfloat16).nbytes + 8 * heads


@pytest.mark.skipif(device_mlra.triton is None, reason="needs triton")
def test_what_the_kernels_make_of_every_number():
    """All codes that are numbers to float32, and float32 up to 448 to codes: those between and on the way between two,
    and subnormal ones; scales and their inverses."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    known = (codes & 127) < 127
    ladder = E4M3.to(DEVICE)
    middles = (ladder[1:] + ladder[:-1]) / 2
    numbers = torch.cat([ladder, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), ladder * 1e-3]).float()
    numbers = torch.cat([numbers, -numbers])
    tops = torch.cat([numbers.abs(), torch.tensor([2e-36, 1e-38, 3e-45, 1e38, torch.inf, torch.nan], device=DEVICE)])
    wide, narrow = torch.empty(256, device=DEVICE), torch.empty(numbers.shape, dtype=torch.uint8, device=DEVICE)
    scales, inverses = torch.empty_like(tops), torch.empty_like(tops)
    sizes = {"C": 256, "N": numbers.numel(), "T": tops.numel(), "BLOCK": 2048}
    convert_kernel[(1,)](codes, wide, numbers, narrow, tops, scales, inverses, **sizes)
    assert torch.equal(wide[known].cpu(), 3 * codes.view(torch.float8_e4m3fn).float()[known].cpu())
    assert torch.equal(narrow.cpu(), numbers.to(torch.float8_e4m3fn).view(torch.uint8).cpu())
    expected = rows_mlra.quantized(tops[:, None])[1]
    assert torch.equal(scales.nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(inverses[expected.isfinite()], expected.reciprocal()[expected.isfinite()])


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match=r"cache_row_format='fp4' must be one of \('plain', 'fp8'\)"):
        MLRAConfig(cache_row_format="fp4")
    with pytest.raises(ValueError, match=r"^row_format='int8' must be one of \('plain', 'fp8'\)"):
        MLRACache(tiny_config(), row_format="int8")
    config = tiny_config()
    config.cache_row_format = "FP8"
    with pytest.raises(ValueError, match="cache_row_format='FP8'"):
        MLRACache(config)


def decode_inputs(num_latents, groups, dtype, batch=3, length=2, heads=3, width=24, rope=6, rows=70):
    """Arguments of `latent_attention` over rows of eight bits, whose unused ones are NaN, and the plain latents."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    row_format = RowFormat(num_latents * width, rope, dtype, num_latents)
    buffer = row_format.join(normal(batch, rows, num_latents * width), normal(batch, rows, rope))
    kv_end = torch.tensor([rows, 41, length], dtype=torch.int32)
    for b, end in enumerate(kv_end):
        buffer[b, end:] = 255
    latents, k_rope, scales = row_format.views(buffer.to(DEVICE), num_latents)
    q_latent, q_rope = normal(batch, length, num_latents, heads, width), normal(batch, length, groups, heads, rope)
    plain = rows_mlra.dequantized(latents, scales, dtype)
    return (q_latent.to(DEVICE), q_rope.to(DEVICE), latents, k_rope), scales, kv_end.to(DEVICE), plain


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_over_rows(variant, implementation, dtype):
    """Every path against float64 on what was read, with left padding, holes and rows that are NaN."""
    num_latents, branches = VARIANTS[variant]
    arguments, scales, kv_end, plain = decode_inputs(num_latents, num_latents // branches, dtype)
    key_mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    kv_start = torch.tensor([3, 0, 0], dtype=torch.int32, device=DEVICE)
    options = {"kv_end": kv_end, "kv_start": kv_start, "key_mask": key_mask, "scaling": 0.2}
    result = latent_attention(*arguments, scales=scales, implementation=implementation, **options)
    q_latent, q_rope, _, k_rope = (x.double() for x in arguments)
    expected = latent_attention(q_latent, q_rope, plain.double(), k_rope, implementation="torch", **options)
    limit = tolerances.FUSED_FLOAT32_RATIO if dtype == torch.float32 else tolerances.KERNEL_BF16_RATIO
    assert result.dtype == dtype and rms_ratio(expected, result) < limit


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_attention_over_pages(page_size, implementation):
    arguments, scales, kv_end, plain = decode_inputs(4, 1, torch.float32, length=1, rows=64)
    places = torch.randperm(3 * 64 // page_size, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    table = places.view(3, -1).to(torch.int32)
    rows = (places[:, None] * page_size + torch.arange(page_size, device=DEVICE)).flatten()
    bytes_of, key = arguments[2].view(torch.uint8).flatten(0, 1), arguments[3].flatten(0, 1)
    pool, pool_rope, pool_scales = (
        torch.empty_like(bytes_of),
        torch.empty_like(key),
        torch.empty(192, 4, device=DEVICE),
    )
    pool[rows], pool_rope[rows], pool_scales[rows] = bytes_of, key, scales.flatten(0, 1)
    options = {"kv_end": kv_end, "scaling": 0.2}
    result = latent_attention(
        *arguments[:2], pool.view(torch.float8_e4m3fn), pool_rope, scales=pool_scales, block_table=table,
        page_size=page_size, implementation=implementation, **options,
    )  # fmt: skip
    q_latent, q_rope, _, k_rope = (x.double() for x in arguments)
    expected = latent_attention(q_latent, q_rope, plain.double(), k_rope, implementation="torch", **options)
    assert rms_ratio(expected, result) < tolerances.FUSED_FLOAT32_RATIO


def test_what_cannot_read_them_says_so(monkeypatch):
    arguments, scales, kv_end, _ = decode_inputs(1, 1, torch.bfloat16)
    options = {"kv_end": kv_end, "scaling": 0.2}
    with pytest.raises(ValueError, match="latents of torch.float8_e4m3fn lack scales"):
        latent_attention(*arguments, **options)
    with pytest.raises(ValueError, match=r"scales \(3, 70\) are not those of latents"):
        latent_attention(*arguments, scales=scales[..., 0], **options)
    monkeypatch.setattr(decode_flash_mlra, "flash_attn_interface", object())
    moved = [x.to("meta") for x in arguments]
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"), raising=False)
    obstacle = decode_mlra._obstacle("flash_attention_3", *moved, None, None)
    assert obstacle is not None and obstacle.startswith("it takes no latents in eight bits; use 'triton' or 'torch'")


@pytest.mark.parametrize(("variant", "dtype"), [*((name, torch.float32) for name in VARIANTS), ("mlra_4", HALF)])
def test_fused_step_appends_the_bytes_of_update(variant, dtype):
    """Two steps behind a prompt: what the step writes is what `update` makes of the plain row that it writes."""
    model = tiny_model(
        variant, num_attention_heads=4, attn_output_gate=variant == "mla", dtype=dtype, num_hidden_layers=1
    )
    model = model.to(DEVICE)
    ids = random_ids(2, 9).to(DEVICE)
    written = {}
    for name in ("plain", "fp8"):
        cache = MLRACache(model.config, max_cache_len=20, row_format=name)
        with torch.no_grad():
            model(ids[:, :7], cache=cache)
            for layer in cache.layers:
                layer.rows[:, :, 7:].view(torch.uint8).fill_(255)
            counters = torch.tensor([7, 7, 7, 8, 8], dtype=torch.int32, device=DEVICE)
            step = FusedStep(model, cache, counters)
            logits = [step(ids[:, 7]).clone(), step(ids[:, 8]).clone()]
        written[name] = cache.layers[0]
    plain, layer = written["plain"], written["fp8"]
    expected = layer.format.join(*plain.format.split(plain.rows))
    number = layer.format.scales
    for part, of_update in zip(
        *(layer.format.views(rows[:, 0, :9], number) for rows in (layer.rows, expected)), strict=True
    ):
        assert torch.equal(part.contiguous().view(torch.uint8), of_update.contiguous().view(torch.uint8))
    assert layer.rows[:, :, 9:].eq(255).all()
    cache = MLRACache(model.config, row_format="fp8")
    with torch.no_grad():
        model(ids[:, :7], cache=cache)
        modules = [model(ids[:, t : t + 1], cache=cache).logits[:, 0] for t in (7, 8)]
    limit = tolerances.FP8_FUSED_RATIO if dtype == torch.float32 else tolerances.FUSED_BFLOAT16_RATIO
    assert rms_ratio(torch.stack(modules), torch.stack(logits)) < limit


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_over_rounded_latents(variant, implementation):
    """Prompt, tokens one by one and a long continuation, which runs expanded; against the oracle's rounding."""
    model = tiny_model(variant, attn_implementation=implementation, cache_row_format="fp8")
    ids = random_ids(2, 90)
    parts = ids.split([9, 1, 1, 3, 76], dim=1)
    logits = {}
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        caches = {
            "fp8": MLRACache(model.config),
            "static": MLRACache(model.config, 90),
            "r": rounded_cache(model.config),
        }
        for name, cache in caches.items():
            logits[name] = torch.cat([model(part, cache=cache).logits for part in parts], dim=1)
    assert rms_ratio(logits["r"], logits["fp8"]) < tolerances.FUSED_FLOAT32_RATIO
    assert rms_ratio(logits["r"], logits["static"]) < tolerances.FUSED_FLOAT32_RATIO
    assert 0 < rms_ratio(full, logits["fp8"]) < tolerances.FP8_ROWS_RATIO
    assert caches["fp8"].layers[0].rows.dtype == caches["static"].layers[0].rows.dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.parametrize(("num_latents", "heads"), [(1, 64), (4, 24), (1, 128), (4, 3)])
@pytest.mark.parametrize("length", [1, 5])
def test_gpu_shapes(num_latents, heads, length):
    """The released widths, in rows of 656 and 272 bytes, with and without a mask."""
    arguments, scales, kv_end, plain = decode_inputs(
        num_latents, 1, torch.bfloat16, length=length, heads=heads, width=128, rope=64, rows=700
    )
    key_mask = torch.rand(3, 700, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.2
    for options in ({}, {"key_mask": key_mask}):
        options |= {"kv_end": kv_end, "scaling": 0.07}
        result = latent_attention(*arguments, scales=scales, implementation="triton", **options)
        q_latent, q_rope, _, k_rope = (x.double() for x in arguments)
        expected = latent_attention(q_latent, q_rope, plain.double(), k_rope, implementation="torch", **options)
        assert rms_ratio(expected, result) < tolerances.KERNEL_BF16_RATIO
