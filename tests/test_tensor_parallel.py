"""Tensor parallelism against one process, on the CPU with gloo: 2, 4 and 8 ranks, every released attention.

Each world size starts once (`measured`): its ranks run every model and write down what they saw, and the tests judge.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.tensor_parallel_mlra import (
    check_tensor_parallel_size,
    register_parallel_styles,
    tensor_parallel_layout,
    tensor_parallel_sizes,
)
from scripts import bench_tp
from scripts.generate import main as generate
from tests.fused_checks import decode_two_tokens
from tests.models import VARIANTS, tiny_config, tiny_model
from tests.parallel_worlds import (
    FUSED_SIZES,
    MODELS,
    PATIENCE,
    SAVED,
    SIZES,
    SPLITTABLE,
    batch,
    behaviour,
    fused_sequences,
    join_world,
    load,
    name_of,
    visit,
    wait,
)
from tests.paths import REPOSITORY
from tests.quantized import as_on_a_gpu, save_fp8
from tests.tolerances import FUSED_FLOAT32_RATIO, PARALLEL_GRADIENT_RTOL, PARALLEL_LOGITS_ATOL


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> Path:
    """A folder per model: sharded safetensors, its remote code, and `behaviour.pt` of one process."""
    root = tmp_path_factory.mktemp("references")
    for variant, gated in MODELS:
        model = tiny_model(variant, attn_output_gate=gated, **SPLITTABLE)
        folder = root / name_of(variant, gated)
        model.save_pretrained(folder, max_shard_size="12KB")
        assert (folder / "model.safetensors.index.json").is_file()
        decoded = decode_two_tokens(model, fused=False, batch=fused_sequences(model))["logits"]
        torch.save({**behaviour(model), "decoded": decoded}, folder / "behaviour.pt")
    with as_on_a_gpu(), torch.no_grad():
        for name, block in (("mlra_2_fp8", None), ("mlra_2_fp8_blocks", (16, 16))):
            model = save_fp8(tiny_model("mlra_2", **SPLITTABLE), block, root / name)
            decoded = decode_two_tokens(model, fused=False)["logits"]
            torch.save({"logits": model(batch()[0]).logits, "decoded": decoded}, root / name / "behaviour.pt")
    return root


# ---- what a rank does ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def start_world():
    """`start_world(function, size, *args)`: that many processes of a server that has everything imported already."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])

    def start(function, size: int, *args):
        return torch.multiprocessing.start_processes(
            function, (size, *args), nprocs=size, join=False, start_method="forkserver"
        )

    return start


@pytest.fixture(scope="session")
def measured(references, start_world, tmp_path_factory):
    """`measured(size)`: what every rank of that world wrote down, and the folder it saved models to."""
    outs: dict[int, Path] = {}

    def measure(size: int) -> tuple[list[dict], Path]:
        if size not in outs:
            outs[size] = tmp_path_factory.mktemp(f"world{size}")
            wait(start_world(visit, size, references, outs[size]), PATIENCE)
        files = [outs[size] / f"rank{rank}.json" for rank in range(size)]
        assert all(file.is_file() for file in files), f"the world of {size} ranks failed in an earlier test"
        return [json.loads(file.read_text()) for file in files], outs[size]

    return measure


every_model = pytest.mark.parametrize(
    ("size", "variant", "gated"), [(size, *model) for size in SIZES for model in MODELS]
)


# ---- the tests -----------------------------------------------------------------------------------------------------


@every_model
def test_logits_and_tokens_are_those_of_one_process(measured, size, variant, gated):
    for rank in measured(size)[0]:
        seen = rank[name_of(variant, gated)]
        assert seen["logits"] <= PARALLEL_LOGITS_ATOL
        assert seen["tokens"] == {"dynamic": True, "static": True, "sampled": True}


@every_model
def test_gradients_are_those_of_one_process(measured, size, variant, gated):
    for rank in measured(size)[0]:
        gradients = rank[name_of(variant, gated)]["gradients"]
        assert len(gradients) == 3 + 2 * (14 if gated else 13) - 1
        assert {name: error for name, error in gradients.items() if not error <= PARALLEL_GRADIENT_RTOL} == {}


@every_model
def test_one_all_reduce_per_attention_and_per_mlp(measured, size, variant, gated):
    for rank in measured(size)[0]:
        collectives = rank[name_of(variant, gated)]["collectives"]
        assert collectives["self_attn"] == collectives["mlp"] == [1, 1]
        # one more for the embedding, and the output embedding's slices of the logits are gathered
        assert sorted(collectives["all"].values()) in ([1, 5], [1, 1, 4])


@pytest.mark.parametrize("size", FUSED_SIZES)
@pytest.mark.parametrize(("variant", "gated"), MODELS)
def test_the_fused_step_on_a_share_of_the_model(measured, size, variant, gated):
    for rank in measured(size)[0]:
        fused = rank[name_of(variant, gated)]["fused"]
        assert fused["logits"] < FUSED_FLOAT32_RATIO
        # in each of three forwards: the logits gathered; the embedding, two attentions and two MLPs summed
        assert (fused["gathered"], fused["summed"]) == (3, 15)


def test_what_keeps_the_fused_step_from_a_share_of_the_model(measured):
    for rank in measured(2)[0]:
        planned, hooked, whole = rank["fused_obstacles"]
        assert planned is None
        assert hooked == (
            "module 'model.layers.1.mlp' has hooks or a replaced forward (offloading, sharded data parallelism)"
        )
        assert whole == "module 'model.layers.0.mlp.down_proj' is not split as tp_plan='auto' splits it"


def test_fp8_weights_are_shared_where_each_has_one_scale(measured):
    for rank in measured(2)[0]:
        seen = rank["fp8"]
        assert seen["logits"] <= PARALLEL_LOGITS_ATOL
        assert seen["fused"] < FUSED_FLOAT32_RATIO
        assert (seen["kept"], seen["obstacle"]) == (40, None)
        assert seen["blocks"].startswith("q_b_proj has scales for blocks of FP8 weights")


# Released sizes, in head widths d_h = 128 per token and layer (paper, table 1).
CACHE_WIDTHS = {
    "mla": (4.5, 4.5, 4.5, 4.5),
    "gla_2": (4.5, 2.5, 2.5, 2.5),
    "gla_4": (4.5, 2.5, 1.5, 1.5),
    "mlra_2": (4.5, 2.5, 1.5, 1.5),
    "mlra_4": (4.5, 2.5, 1.5, 1.5),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_sizes_keep_the_cache_of_the_table(variant):
    latents, branches = VARIANTS[variant]
    config = MLRAConfig(num_latent_heads=latents, num_branches=branches)
    for size, width in zip((1, 2, 4, 8), CACHE_WIDTHS[variant], strict=True):
        layout = tensor_parallel_layout(config, size)
        row = config.kv_lora_rank // (layout.groups * layout.branches) + config.qk_rope_head_dim
        assert row / 128 == width


@every_model
def test_cache_bytes_per_rank(measured, size, variant, gated):
    config = tiny_config(variant, **SPLITTABLE)
    width = CACHE_WIDTHS[variant][int(math.log2(size))]
    latents = round((width - 0.5) * 128) * config.kv_lora_rank // 512  # the table without its RoPE half width
    per_token = config.num_hidden_layers * (latents + config.qk_rope_head_dim) * 4
    numbers, scales = latents + 4 * config.qk_rope_head_dim, 4 * latents // config.latent_head_dim  # in bytes
    in_eight_bits = math.ceil(numbers / 16) * 16 + math.ceil(scales / 16) * 16  # bulk copies take 16 at a time
    for rank in measured(size)[0]:
        cache = rank[name_of(variant, gated)]["cache"]
        assert cache["dynamic"]["per_token"] == cache["static"]["per_token"] == per_token
        assert cache["static"]["nbytes"] == cache["static"]["storage"] == 2 * 16 * per_token
        assert cache["dynamic"]["nbytes"] == cache["dynamic"]["storage"]
        assert cache["fp8"]["per_token"] == config.num_hidden_layers * in_eight_bits
        assert cache["fp8"]["nbytes"] == cache["fp8"]["storage"] == 2 * 16 * cache["fp8"]["per_token"]


@every_model
def test_a_rank_reads_only_its_slices(measured, size, variant, gated):
    for rank in measured(size)[0]:
        read = rank[name_of(variant, gated)]["read"]
        assert read["numbers"] == read["kept"] > 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SAVED)
def test_saving_gathers(measured, references, size, name):
    original = MLRAForCausalLM.from_pretrained(references / name).state_dict()
    saved = MLRAForCausalLM.from_pretrained(measured(size)[1] / name).state_dict()
    assert original.keys() == saved.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)


def test_two_ranks_of_mlra_2_keep_a_head_group_each(measured, references):
    """Rank 0 keeps the released latents 0 and 2, rank 1 keeps 1 and 3."""
    config = tiny_config("mlra_2", **SPLITTABLE)
    stored = MLRAForCausalLM.from_pretrained(references / "mlra_2").model.layers[0].self_attn.kv_a_proj.weight
    by_latent = stored[:, 0].view(config.num_latent_heads, config.latent_head_dim)
    groups, branches = config.num_head_groups, config.num_branches
    released = {branch * groups + group: by_latent[group * branches + branch] for group in (0, 1) for branch in (0, 1)}
    for rank, latents in enumerate(((0, 2), (1, 3))):
        kept = torch.tensor(measured(2)[0][rank]["mlra_2"]["latent_rows"])
        assert torch.equal(kept, torch.cat([released[latent] for latent in latents]))


def test_a_compiled_decode_step_is_one_graph(measured):
    assert all(rank["compiled"] <= PARALLEL_LOGITS_ATOL for rank in measured(2)[0])


@pytest.mark.parametrize("size", [4, 8])
def test_with_data_parallelism(measured, size):
    for rank in measured(size)[0]:
        if rank["with_data_parallelism"] is None:
            pytest.skip("this version of transformers has one kind of parallelism at a time")
        for difference in rank["with_data_parallelism"].values():
            assert difference["logits"] <= PARALLEL_LOGITS_ATOL
            assert difference["gradients"] <= PARALLEL_GRADIENT_RTOL


def test_impossible_sizes_are_refused_before_any_weight_is_read(measured):
    for rank in measured(2)[0]:
        assert rank["impossible"]["numbers"] == 0
        assert rank["impossible"]["message"] == (
            "tensor parallel size 2 cannot split intermediate_size=21; sizes that work: 1"
        )


def test_sizes_that_work():
    assert tensor_parallel_sizes(MLRAConfig()) == [1, 2, 4, 8]
    mla = MLRAConfig(num_latent_heads=1, num_branches=1, intermediate_size=9448, q_lora_rank=1536)
    assert tensor_parallel_sizes(mla) == [1, 2, 4, 8]
    assert tensor_parallel_sizes(MLRAConfig(num_attention_heads=6, intermediate_size=9600)) == [1, 2, 4, 8, 12, 24]
    with pytest.raises(ValueError, match=r"size 3 cannot split 1 x 4 latents of 24 heads.*work: 1, 2, 4, 8$") as error:
        check_tensor_parallel_size(MLRAConfig(), 3)
    assert "\n" not in str(error.value)


def test_styles_register_twice():
    register_parallel_styles()
    register_parallel_styles()


# ---- ranks that fail -----------------------------------------------------------------------------------------------


def lose_a_rank(rank: int, size: int, root: Path, out: Path, how: str) -> None:
    """Rank 1 dies or stalls between two decode steps; rank 0 writes what it met and when."""
    join_world(rank, size, out, timeout=3)
    model = load(root / "mlra_2", size)
    ids, _, _ = batch()
    cache = MLRACache(model.config)
    started = time.monotonic()
    try:
        with torch.no_grad():
            for step in range(9):
                if rank == 1 and step == 4:
                    if how == "dies":
                        os._exit(1)
                    time.sleep(30)
                model(ids[:, step : step + 1], cache=cache)
    except RuntimeError as error:
        (out / f"{rank}.txt").write_text(f"{time.monotonic() - started} {type(error).__name__} {error}")
        os._exit(3)


@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_a_lost_rank_ends_the_others_within_the_timeout(references, start_world, tmp_path, how):
    world = start_world(lose_a_rank, 2, references, tmp_path, how)
    world.processes[0].join(60)
    world.processes[1].kill()
    assert world.processes[0].exitcode == 3
    seconds = float((tmp_path / "0.txt").read_text().split()[0])
    assert seconds < 10


# ---- as users run it: torchrun, remote code ------------------------------------------------------------------------

REMOTE = """
import os, sys, torch
from datetime import timedelta
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_mlra":
            raise ImportError(f"{name} is out of reach here")


sys.meta_path.insert(0, Guard())
folder, how = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
)
assert type(model).__module__.startswith("transformers_modules.")
if how == "dies" and os.environ["RANK"] == "1":
    os._exit(7)
expected = torch.load(folder + "/behaviour.pt")["tokens"]["dynamic"]
prompt = expected[:, :7]
tokens = model.generate(prompt, attention_mask=(prompt != 0).long(), max_new_tokens=5, do_sample=False)
assert torch.equal(tokens, expected)
if distributed.get_rank() == 0:
    print("rows of", model.model.layers[0].self_attn.kv_a_proj.weight.to_local().shape[0])
distributed.destroy_process_group()
"""


def torchrun(tmp_path: Path, *program: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture
def remote(tmp_path) -> Path:
    script = tmp_path / "remote.py"
    script.write_text(REMOTE)
    return script


def test_torchrun_with_remote_code(references, remote, tmp_path):
    result = torchrun(tmp_path, remote, references / "mlra_4_gated", "works")
    assert result.returncode == 0, result.stderr
    assert "rows of 16" in result.stdout


def test_torchrun_ends_when_a_rank_dies(references, remote, tmp_path):
    started = time.monotonic()
    result = torchrun(tmp_path, remote, references / "mlra_4_gated", "dies")
    assert result.returncode != 0
    assert "exitcode  : 7" in result.stderr
    assert time.monotonic() - started < 60


def test_generate_script_under_torchrun(converted, tmp_path, capsys):
    folder = converted("mlra_4")
    capsys.readouterr()
    (tmp_path / "prompts.txt").write_text("Hello\nA longer prompt, of more tokens\n")
    flags = ["--model", folder, "--batch-file", tmp_path / "prompts.txt", "--max-new-tokens", 6]
    assert generate([str(flag) for flag in flags]) == 0
    expected = capsys.readouterr().out
    result = torchrun(tmp_path, "-m", "scripts.generate", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected
    result = torchrun(tmp_path, "-m", "scripts.generate", *flags, "--device", "cpu")
    assert result.returncode != 0
    assert "error: --device cpu cannot be given under torchrun" in result.stderr


def test_the_benchmark_names_what_it_cannot_run(monkeypatch, capsys, tmp_path):
    flags = ["--output", str(tmp_path / "tp.json"), "--models", "mlra_4", "--token-models", "mlra_5"]
    assert bench_tp.main(flags) == 2
    assert "start this with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert bench_tp.main(flags) == 2
    assert "error: model mlra_5: there is no" in capsys.readouterr().err
    assert bench_tp.main([*flags[:-1], "mla", "--sizes", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mlra_4: tensor parallel size 3 cannot split")
    assert error.endswith("; sizes that work: 1, 2, 4, 8\n")
    assert bench_tp.main([*flags[:-1], "mla", "--sizes", "2"]) == 2
    assert capsys.readouterr().err == "error: --sizes 2 does not divide the 3 processes\n"
