"""What `scripts.bench_tp` times beside the package's step is right: ranks that share tokens find what one would.

The ranks are processes that exchange through files, interpreted, as in `test_exchange_worlds`.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from modeling_mlra import peer_memory_mlra, step_mlra
from modeling_mlra.peer_memory_mlra import shared_exchange
from scripts import bench_tp, bench_tp_dcp, bench_tp_gqa, bench_tp_plot, bench_tp_times
from scripts.bench_tp_models import build
from scripts.bench_tp_systems import OURS, System, base_of
from scripts.bench_tp_times import measure_decode
from tests.decode_inputs import DEVICE
from tests.models import rms_ratio, tiny_config
from tests.parallel_worlds import PATIENCE, SPLITTABLE, join_world, wait
from tests.test_exchange_worlds import shared_files
from tests.tolerances import FUSED_FLOAT32_RATIO

pytest.importorskip("triton")
pytestmark = pytest.mark.distributed
if DEVICE != "cpu":
    pytest.skip("interpreted", allow_module_level=True)

SYSTEMS = ("mlra_4_dcp2", "mla_dcp2")
SIZE, BATCH, CONTEXT = 2, 2, 64
# results are rounded to bfloat16 twice, interpreted towards zero: up to 2^-8 each, about half of that on average
TWO_ROUNDINGS = 8e-3


def config_of(name: str):
    return tiny_config(base_of(name)[0], **SPLITTABLE, num_hidden_layers=1)


def visit(rank: int, size: int, out: Path) -> None:
    join_world(rank, size, out)
    device, mesh = torch.device("cpu", rank), init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    exchanges: dict = {}

    def exchange_of(mesh, numbers: int, _):
        if numbers not in exchanges:
            exchanges[numbers] = shared_exchange(mesh.get_group(), numbers, device)
        return exchanges[numbers]

    seen: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLRA_EXCHANGE", raising=False)
        patch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
        patch.setattr(peer_memory_mlra, "allocate", shared_files(out))
        patch.setattr(bench_tp_times, "RATIO_LIMIT", TWO_ROUNDINGS)
        for module in (step_mlra, bench_tp_dcp):
            patch.setattr(module, "exchange_of", exchange_of)
        for name in SYSTEMS:
            model = build(config_of(name), mesh, torch.bfloat16, torch.device("cpu"))
            system = System(name, model, mesh, mesh, torch.device("cpu"))
            torch.manual_seed(rank)
            cache, _ = system.cache(BATCH, CONTEXT, 3)
            step = system.step(cache, BATCH, CONTEXT, OURS)
            seen[name] = [system.check(step) for _ in range(2)]  # the second finds the words of the first
        seen["measured"] = measure_decode(system, BATCH, CONTEXT, 1)
    (out / f"{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("world")
    os.environ["OMP_NUM_THREADS"] = "1"
    world = torch.multiprocessing.start_processes(visit, (SIZE, out), nprocs=SIZE, join=False, start_method="spawn")
    wait(world, PATIENCE)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_step_attends_to_the_tokens_of_all_ranks(seen, name):
    for rank in seen:
        assert len(rank[name]) == 2 and max(rank[name]) < TWO_ROUNDINGS


def test_a_cell_says_what_was_timed_and_what_a_rank_keeps(seen):
    """Of MLA: half of the rows on each of two ranks."""
    for rank in seen:
        measured, config = rank["measured"], config_of("mla")
        assert measured["kernel"] == OURS and measured["exchange"] == "peer memory"
        assert measured["token_us"] > 0 and "token_us_without_exchange" in measured
        width = config.latent_head_dim + config.qk_rope_head_dim
        assert measured["cache_bytes_read"] == 2 * BATCH * CONTEXT // 2 * width
        assert measured["cache_head_widths"] == pytest.approx(width / 2 / 128)


def test_systems_have_the_sizes_that_they_can():
    assert bench_tp.sizes_of("mla_dcp4", [1, 2, 4, 8]) == [4, 8]
    assert bench_tp.sizes_of("mlra_4_dcp2", [1, 2, 4, 8]) == [2, 4, 8]
    assert bench_tp.sizes_of("mlra_2_dcp4", [4]) == []
    assert bench_tp.systems_by_architecture(["mlra_4", "mla_dcp4", "gqa", "mla", "mlra_4_dcp2"], 2) == {
        "mlra_4": ["mlra_4", "mlra_4_dcp2"],
        "gqa": ["gqa"],
        "mla": ["mla"],
    }


def cell(token_us: float, **more) -> dict:
    return {"token_us": token_us, "cache_bytes_read": 4 * 10**9, "cache_bytes_allocated": 2**30, **more}


def test_tables_take_the_fastest_kernel_and_number_of_gpus():
    kernels = {"this package": {"attend_us_per_layer": 9.0}, "FlashMLA": {"attend_us_per_layer": 7.04}}
    results = {
        "runs": [{"read_ceiling_GB_s": 4000.0}],
        "decode": {
            "mla": {
                "2": {"weight_bytes": 1, "1": {"2048": cell(3000.0), "4096": {"skipped": "needs 9 GiB"}}},
                "4": {"weight_bytes": 4 * 10**9, "1": {"2048": cell(2000.0, kernels=kernels, exchange_share=0.125)}},
            },
            "mlra_4_dcp2": {"4": {"weight_bytes": 1, "1": {"4096": cell(1234.0)}}},
        },
    }
    lines = bench_tp_plot.table(results, "1", bench_tp_plot.token).split("\n")
    assert lines == ["| | 2K | 4K |", "|---|---|---|", "| MLA | 2.00 | – |", "| MLRA-4, DCP2 | – | 1.23 |"]
    assert "| MLA | 7.0 | – |" in bench_tp_plot.table(results, "1", bench_tp_plot.attention)
    assert "| MLA | 12% | – |" in bench_tp_plot.table(results, "1", bench_tp_plot.share)
    assert bench_tp_plot.floors(results, "mla", "1") == {2048: 2.0}


def rms_normed(x: torch.Tensor, layer) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * layer.weight


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """Heads `[B, H, width]` rotated by a position."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half) / half)
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def test_the_step_of_grouped_query_attention_is_that_of_its_modules(monkeypatch):
    """Logits of one token of each of two sequences, in plain torch; FlashAttention-3 needs a GPU."""
    small = {"HEADS": 4, "KEY_HEADS": 2, "WIDTH": 16, "HIDDEN": 32, "INNER": 40, "VOCABULARY": 64, "LAYERS": 1}
    for name, value in small.items():
        monkeypatch.setattr(bench_tp_gqa, name, value)
    torch.manual_seed(0)
    model = bench_tp_gqa.build_gqa(1, None, torch.float32, torch.device("cpu"))
    cache = bench_tp_gqa.GQARows(model, 1, 2, 20, 64, torch.device("cpu"))
    rows, layer = cache.layers[0].rows, model.model.layers[0]
    step = bench_tp_gqa.GQAStep(model, cache, torch.tensor([20, 20, 20, 21, 21], dtype=torch.int32), None, False)
    monkeypatch.setattr(bench_tp_gqa, "attend_3", lambda query, *_: (step.expected(rows), None))
    ids = torch.tensor([3, 5])
    logits = step(ids)

    x = model.lm_head.weight[ids]
    q, k, v = layer.self_attn.qkv_proj(rms_normed(x, layer.input_layernorm)).view(2, 8, 16).split([4, 2, 2], dim=1)
    kept = rows[:, 0].unflatten(-1, (2, 2, 16)).clone()
    torch.testing.assert_close(kept[:, 20], torch.stack([turned(k, 20), v], dim=1))
    keys, values = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in kept[:, :21].unbind(2))
    attended = torch.nn.functional.scaled_dot_product_attention(turned(q, 20)[:, :, None], keys, values)
    x = x + layer.self_attn.o_proj(attended[:, :, 0].flatten(1))
    h, mlp = rms_normed(x, layer.post_attention_layernorm), layer.mlp
    x = x + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    expected = model.lm_head(rms_normed(x, model.model.norm))
    assert rms_ratio(expected, logits) < FUSED_FLOAT32_RATIO
