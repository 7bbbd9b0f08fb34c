"""The format of a cached row, against what a cache really holds and numbers worked out by hand."""

import pytest
import torch

from modeling_mlra import MLRACache, MLRAConfig
from modeling_mlra.rows_mlra import RowFormat, as_one_row, is_one_row
from tests.models import tiny_model


def test_released_rows_by_hand():
    """4 latents of 128 beside a key of 64, in 16 bits: 1152 bytes; a rank with one latent keeps 384."""
    config = MLRAConfig(dtype="bfloat16")
    assert RowFormat.of_config(config) == RowFormat(512, 64, torch.bfloat16)
    assert (RowFormat.of_config(config).width, RowFormat.of_config(config).nbytes) == (576, 1152)
    assert RowFormat.of_config(config, num_latents=1).nbytes == 384
    assert RowFormat.of_config(config, dtype=torch.float32).nbytes == 2304


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_holds_rows_of_the_format(static):
    model = tiny_model("mlra_4").eval()
    cache = MLRACache(model.config, max_cache_len=9 if static else None)
    expected = RowFormat.of_config(model.config, dtype=model.dtype)
    before = cache.bytes_per_token()
    model(torch.arange(5)[None], past_key_values=cache)
    layer = cache.layers[0]
    assert layer.format == expected
    assert before == cache.bytes_per_token() == len(cache.layers) * layer.rows[0, 0, 0].nbytes
    assert torch.equal(expected.join(layer.keys, layer.values), layer.rows[:, :, : layer.keys.shape[2]])


def test_parts_are_views_that_leave_out_padding():
    rows = torch.arange(2 * 3 * 12.0).view(2, 3, 12)
    row_format = RowFormat(6, 4, torch.float32)
    latents, k_rope, scales = row_format.views(rows, 2)
    assert scales is None
    assert latents[1, 2].tolist() == [[60, 61, 62], [63, 64, 65]] and k_rope[1, 2].tolist() == [66, 67, 68, 69]
    rows[1, 2, 4] = -1
    assert latents[1, 2, 1, 1] == -1
    joined = row_format.join(*row_format.split(rows))
    assert torch.equal(joined, rows[..., :10])


def test_one_latent_beside_its_key_is_one_row():
    rows = torch.randn(2, 5, 192)
    latents, k_rope, _ = RowFormat(128, 64, rows.dtype).views(rows, 1)
    assert is_one_row(latents, k_rope)
    keys, values = as_one_row(latents, k_rope)
    assert torch.equal(keys[:, :, 0], rows) and torch.equal(values, latents)
    assert keys.data_ptr() == rows.data_ptr()
    assert not is_one_row(latents, k_rope.clone())
    wide = torch.randn(2, 5, 256)
    assert not is_one_row(wide[..., None, :128], wide[..., 192:]), "a gap between them"
    assert not is_one_row(*RowFormat(128, 64, rows.dtype).views(rows, 2)[:2])
