"""Which rows and columns of a weight a rank loads, against numbers written by hand."""

import pytest
import torch

from mlra_vllm.model import rank_slice
from modeling_mlra.tensor_parallel_mlra import check_tensor_parallel_size
from tests.models import tiny_config

# mlra_2 over eight ranks: two groups of two latents, and the six heads of a group in two halves. Rank 5 is group 1,
# branch 0, second half: latent 2, and heads 9, 10, 11 of twelve, which are heads 3, 4, 5 of the latent's six.
RANK = 5
EXPECTED = {  # parameter: (rows or columns per unit, units in all, units kept)
    "q_b_proj": (10, 12, [9, 10, 11]),
    "kv_a_proj": (8, 4, [2]),
    "kv_a_layernorm": (1, 4, [2]),
    "kv_b_proj": (11, 24, [15, 16, 17]),
    "g_proj": (5, 12, [9, 10, 11]),
    "o_proj": (5, 12, [9, 10, 11]),
    "q_a_proj": (10, 1, [0]),
    "k_rope_proj": (4, 1, [0]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rank_five_of_eight(name):
    layout = check_tensor_parallel_size(tiny_config("mlra_2", intermediate_size=24), 8)
    unit, count, kept = EXPECTED[name]
    weight = torch.arange(unit * count)[:, None].expand(-1, 3)
    expected = torch.cat([weight[unit * k : unit * (k + 1)] for k in kept])
    if name == "o_proj":
        weight, expected = weight.T, expected.T
    assert torch.equal(rank_slice(weight, name, layout, RANK), expected)
