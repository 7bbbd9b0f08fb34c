"""Tensor parallelism against one process, on the CPU with gloo: 2, 4 and 8 ranks, every released attention.

Each world size starts once (`measured`): its ranks run every model and write down what they saw, and the tests judge.
"""

import json
import math
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import core_model_loading
from transformers.distributed import DistributedConfig

from modeling_mlra import MLRACache, MLRAConfig, MLRAForCausalLM
from modeling_mlra.generation_mlra import captured_decode
from modeling_mlra.step_mlra import obstacle
from modeling_mlra.tensor_parallel_mlra import (
    check_tensor_parallel_size,
    register_parallel_styles,
    tensor_parallel_layout,
    tensor_parallel_sizes,
)
from scripts import bench_tp
from scripts.generate import main as generate
from tests.fused_checks import decode_two_tokens
from tests.models import VARIANTS, rms_ratio, tiny_config, tiny_model
from tests.paths import REPOSITORY
from tests.tolerances import FUSED_FLOAT32_RATIO, PARALLEL_GRADIENT_RTOL, PARALLEL_LOGITS_ATOL

SIZES = (2, 4, 8)
MODELS = [(variant, gated) for variant in VARIANTS for gated in (False, True)]
FUSED_SIZES = (2, 4)  # the kernels are interpreted, which takes its time
SAVED = ("mla", "mlra_2_gated")  # models that every world writes out again
PATIENCE = 300  # seconds for a world to do all it is asked to, on two slow cores
SPLITTABLE = {"vocab_size": 64, "intermediate_size": 40, "num_attention_heads": 8}
NEW_TOKENS = 5

pytestmark = pytest.mark.distributed


def name_of(variant: str, gated: bool) -> str:
    return f"{variant}_gated" if gated else variant


# ---- what one process computes -------------------------------------------------------------------------------------


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [2, 9] without padding, and a left-padded batch: ids and mask [3, 7]."""
    ids = torch.randint(1, 64, (5, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0
    return ids[:2], ids[2:, :7] * mask, mask


def behaviour(model: MLRAForCausalLM) -> dict:
    """Logits, greedy tokens by either cache, tokens sampled, and the gradients after two equal backward passes."""
    ids, padded, mask = batch()
    with torch.no_grad():
        logits = model(ids).logits
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True}
    tokens = {
        "dynamic": model.generate(padded, attention_mask=mask, **greedy),
        "static": model.generate(padded, attention_mask=mask, cache_implementation="static", **greedy),
    }
    torch.manual_seed(5)
    sampled = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "cache_implementation": "static"}
    tokens["sampled"] = model.generate(padded, attention_mask=mask, custom_generate=captured_decode, **sampled)
    model.train()
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.eval()
    return {"logits": logits, "tokens": tokens, "gradients": gradients}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    return root


# ---- what a rank does ----------------------------------------------------------------------------------------------


def load(folder: Path, size: int, dtype: torch.dtype = torch.float32) -> MLRAForCausalLM:
    return MLRAForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=size), dtype=dtype
    )


class ReadRecorder:
    """Counts the numbers that sharded reads take out of checkpoint files."""

    def __init__(self, monkeypatch):
        self.reads: list[int] = []  # appended to by the loader's threads
        shard_tensor = core_model_loading.DtensorShardOperation.shard_tensor

        def recorded(operation, source, *args, **kwargs):
            return shard_tensor(operation, self.Slices(source, self), *args, **kwargs)

        monkeypatch.setattr(core_model_loading.DtensorShardOperation, "shard_tensor", recorded)

    class Slices:
        def __init__(self, source, recorder):
            self.source, self.recorder, self.get_shape = source, recorder, source.get_shape

        def __getitem__(self, index):
            part = self.source[index]
            self.recorder.reads.append(part.numel())
            return part


def count_collectives(model: MLRAForCausalLM) -> dict:
    """Collectives of one decode step: in every attention, in every MLP, and in all."""
    ids, _, _ = batch()
    seen: dict[str, list[int]] = {"self_attn": [], "mlp": []}
    hooks = []
    with torch.no_grad():
        cache = MLRACache(model.config, max_cache_len=12)
        model(ids[:, :6], cache=cache)
        with CommDebugMode() as counter:
            for layer in model.model.layers:
                for name, counts in seen.items():
                    module = getattr(layer, name)
                    before = lambda *_, counts=counts: counts.append(-counter.get_total_counts())  # noqa: E731

                    def after(*_, counts=counts):
                        counts[-1] += counter.get_total_counts()

                    hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
            model(ids[:, 6:7], cache=cache)
            counts = {str(operation): count for operation, count in counter.get_comm_counts().items()}
    for hook in hooks:
        hook.remove()
    return {**seen, "all": counts}


def examine_fused_step(model: MLRAForCausalLM, expected: torch.Tensor) -> dict:
    """RMS ratio of two fused steps' logits to the modules' on one process; collectives of all three forwards."""
    with CommDebugMode() as counter:
        logits = decode_two_tokens(model, fused=True, batch=fused_sequences(model))["logits"]
    counts = {str(operation): count for operation, count in counter.get_comm_counts().items()}
    gathered = sum(count for operation, count in counts.items() if "gather" in operation)
    return {"logits": rms_ratio(expected, logits), "gathered": gathered, "summed": sum(counts.values()) - gathered}


def measure_cache(model: MLRAForCausalLM) -> dict:
    ids, _, _ = batch()
    sizes = {}
    for kind, length in (("dynamic", None), ("static", 16)):
        cache = MLRACache(model.config, max_cache_len=length)
        with torch.no_grad():
            model(ids, cache=cache)
        storage = sum(layer.rows.untyped_storage().nbytes() for layer in cache.layers)
        sizes[kind] = {"per_token": cache.bytes_per_token(), "nbytes": cache.nbytes, "storage": storage}
    return sizes


def fused_sequences(model: MLRAForCausalLM) -> int:
    """A few, or so many that the products are taken together."""
    return 3 if model.config.attn_output_gate else 2


def examine(model: MLRAForCausalLM, reference: dict, fused: bool) -> dict:
    seen = behaviour(model)
    attention = model.model.layers[0].self_attn
    return {
        "logits": (seen["logits"] - reference["logits"]).abs().max().item(),
        "tokens": {kind: torch.equal(ids, reference["tokens"][kind]) for kind, ids in seen["tokens"].items()},
        "gradients": relative_errors(seen["gradients"], reference["gradients"]),
        "collectives": count_collectives(model),
        "fused": examine_fused_step(model, reference["decoded"]) if fused else None,
        "cache": measure_cache(model),
        "latent_rows": attention.kv_a_proj.weight.to_local()[:, 0].tolist()
        if isinstance(attention.kv_a_proj.weight, DTensor)
        else None,
    }


def visit(rank: int, size: int, root: Path, out: Path) -> None:
    """Everything one rank does in a world of `size`; writes `rank<N>.json`."""
    join_world(rank, size, out)
    results: dict = {}
    for variant, gated in MODELS:
        name = name_of(variant, gated)
        reference = torch.load(root / name / "behaviour.pt")
        with pytest.MonkeyPatch.context() as monkeypatch:
            recorder = ReadRecorder(monkeypatch)
            model = load(root / name, size)
        # The output embedding is tied: stored once, read once.
        sharded = {p: p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)}
        results[name] = examine(model, reference, size in FUSED_SIZES)
        results[name]["read"] = {"numbers": sum(recorder.reads), "kept": sum(sharded.values())}
        if name in SAVED:
            model.save_pretrained(out / name)
    if size == 2:
        results["compiled"] = compiled_difference(root)
        results["impossible"] = refused(root, out)
        results["fused_obstacles"] = fused_obstacles(root)
    if size == 4:
        results["with_data_parallelism"] = data_parallel_difference(
            root / "mlra_4_gated", 2, ("fsdp_size", "dp_replicate_size")
        )
    if size == 8:
        results["with_data_parallelism"] = data_parallel_difference(root / "mlra_2_gated", 4, ("dp_replicate_size",))
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


def join_world(rank: int, size: int, out: Path, timeout: float = PATIENCE) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    store = distributed.FileStore(str(out / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


def compiled_difference(root: Path) -> float:
    """Static cache, the whole decode step as one graph: largest logit difference to one process."""
    ids, _, _ = batch()
    model = load(root / "mlra_4", 2)
    cache = MLRACache(model.config, max_cache_len=ids.shape[1])
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        logits = torch.cat([step(ids[:, t : t + 1], cache=cache).logits for t in range(6, 9)], dim=1)
    return (logits - torch.load(root / "mlra_4" / "behaviour.pt")["logits"][:, 6:]).abs().max().item()


def fused_obstacles(root: Path) -> list[str | None]:
    """What keeps the fused step from a model: as planned, with a hook, and with a projection that is whole."""
    model = load(root / "mlra_4", 2, torch.bfloat16)
    found = [obstacle(model, 1)]
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    found.append(obstacle(model, 1))
    hook.remove()
    projection = model.model.layers[0].mlp.down_proj
    projection.weight = torch.nn.Parameter(full(projection.weight))
    return [*found, obstacle(model, 1)]


def refused(root: Path, out: Path) -> dict:
    """What loading says where the sizes do not divide, and how many numbers it read before."""
    config = tiny_config("mlra_4", **{**SPLITTABLE, "intermediate_size": 21})
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = ReadRecorder(monkeypatch)
        try:
            MLRAForCausalLM.from_pretrained(
                root / "mlra_4", config=config, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2)
            )
        except ValueError as error:
            return {"message": str(error), "numbers": sum(recorder.reads)}
    return {"message": "accepted", "numbers": sum(recorder.reads)}


def data_parallel_difference(folder: Path, size: int, options: tuple[str, ...]) -> dict | None:
    """Two tensor-parallel groups, parameters sharded or repeated over them: logits and gradients of the same batch.

    None for older versions of transformers, which have one kind of parallelism at a time.
    """
    if "dp_replicate_size" not in DistributedConfig.__dataclass_fields__:
        return None
    reference = torch.load(folder / "behaviour.pt")
    differences = {}
    for option in options:
        config = DistributedConfig(tp_plan="auto", tp_size=size, **{option: 2})
        model = MLRAForCausalLM.from_pretrained(folder, distributed_config=config)
        seen = behaviour(model)
        differences[option] = {
            "logits": (seen["logits"] - reference["logits"]).abs().max().item(),
            "gradients": max(relative_errors(seen["gradients"], reference["gradients"]).values()),
        }
    return differences


def relative_errors(gradients: dict, references: dict) -> dict[str, float]:
    return {
        name: ((gradient - references[name]).norm() / references[name].norm()).item()
        for name, gradient in gradients.items()
    }


# ---- starting worlds -----------------------------------------------------------------------------------------------


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


def wait(world, seconds: float) -> None:
    """Wait until all ranks have ended; the first error of a rank is raised, ranks left after `seconds` are killed."""
    end = time.monotonic() + seconds
    try:
        while not world.join(timeout=max(end - time.monotonic(), 0.1)):
            assert time.monotonic() < end, f"ranks were still running after {seconds} s"
    finally:
        for process in world.processes:
            process.kill()


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
    for rank in measured(size)[0]:
        cache = rank[name_of(variant, gated)]["cache"]
        assert cache["dynamic"]["per_token"] == cache["static"]["per_token"] == per_token
        assert cache["static"]["nbytes"] == cache["static"]["storage"] == 2 * 16 * per_token
        assert cache["dynamic"]["nbytes"] == cache["dynamic"]["storage"]


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


def test_the_benchmark_compares_with_mla_of_the_same_size():
    cell = {"layout": {}, "weight_bytes": 1}
    decode = {
        name: {"4": {**cell, "1024": {"kernel_us_per_layer": kernel, "token_us": 10.0}}}
        for name, kernel in {"mlra_4": 2.0, "mla": 6.0, "wide_mlra_4": 4.0, "wide_mla": 20.0}.items()
    }
    decode["mlra_4"]["2"] = cell  # MLA was not timed there
    decode["mla"]["4"]["1024"]["flash_mla_us_per_layer"] = 5.0
    assert bench_tp.against_mla(decode) == {
        "mlra_4": {"4": {"1024": {"kernel_us_per_layer": 3.0, "flash_mla_us_per_layer": 2.5, "token_us": 1.0}}},
        "wide_mlra_4": {"4": {"1024": {"kernel_us_per_layer": 5.0, "token_us": 1.0}}},
    }
