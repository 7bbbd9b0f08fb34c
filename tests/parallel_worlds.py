"""Worlds of processes that load a model in parts, and what each of them finds out."""

import json
import os
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

from modeling_mlra import MLRACache, MLRAForCausalLM
from modeling_mlra.generation_mlra import captured_decode
from modeling_mlra.step_mlra import obstacle
from tests.fused_checks import decode_two_tokens
from tests.models import VARIANTS, rms_ratio, tiny_config
from tests.quantized import as_on_a_gpu

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
    for kind, length, row_format in (("dynamic", None, "plain"), ("static", 16, "plain"), ("fp8", 16, "fp8")):
        cache = MLRACache(model.config, max_cache_len=length, row_format=row_format)
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
        results["fp8"] = fp8_share(root)
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


def wait(world, seconds: float) -> None:
    """Wait until all ranks have ended; the first error of a rank is raised, ranks left after `seconds` are killed."""
    end = time.monotonic() + seconds
    try:
        while not world.join(timeout=max(end - time.monotonic(), 0.1)):
            assert time.monotonic() < end, f"ranks were still running after {seconds} s"
    finally:
        for process in world.processes:
            process.kill()


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


def fp8_share(root: Path) -> dict:
    """A model of FP8 weights with a scale each: its logits, the fused step's, what is in its way; blocks of scales."""
    with as_on_a_gpu():
        model, reference = load(root / "mlra_2_fp8", 2), torch.load(root / "mlra_2_fp8" / "behaviour.pt")
        with torch.no_grad():
            logits = model(batch()[0]).logits
        seen = {
            "logits": (logits - reference["logits"]).abs().max().item(),
            "fused": rms_ratio(reference["decoded"], decode_two_tokens(model, fused=True)["logits"]),
            "kept": model.model.layers[0].self_attn.q_b_proj.weight.to_local().shape[0],
            "obstacle": obstacle(load(root / "mlra_2_fp8", 2, torch.bfloat16), 1),
        }
        try:
            load(root / "mlra_2_fp8_blocks", 2)
        except ValueError as error:
            seen["blocks"] = str(error)
    return seen


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
