"""Options of training that save memory or time, and the benchmark that compares them."""

import json

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Trainer

from modeling_mlra import loss_mlra
from scripts import bench_train, bench_train_cells, bench_train_checks, recipe, train, training_model
from scripts.bench_train_profile import group_of
from scripts.cli import UserError
from scripts.recipe import model_config
from scripts.training_loop import BlockTrainer
from scripts.training_speed import count_parameters
from tests.models import random_ids, tiny_model
from tests.paths import REPOSITORY
from tests.tolerances import LOSS_ATOL
from tests.training import LLAMA, MODEL, losses, settings

# The recipe


def run(data, output, **changes) -> dict:  # noqa: F811
    return train.train_recipe(recipe.make_recipe(settings(data, output, training__max_steps=6, **changes), "test"))


def test_recomputation_and_the_loss_in_chunks_change_no_loss(data, tmp_path, monkeypatch):  # noqa: F811
    """The Trainer asks for the loss alone; asking for logits too gives the same, and so does recomputation."""
    seen = []
    forward = AutoModelForCausalLM.from_config(model_config(MODEL)).__class__.forward

    def recording(self, *args, **kwargs):
        seen.append((kwargs.get("skip_logits"), self.model.layers[0].self_attn.recompute_inputs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr("modeling_mlra.MLRAForCausalLM.forward", recording)
    in_chunks = run(data, tmp_path / "chunks")
    assert set(seen[:3]) == {(True, False)}
    seen.clear()
    recomputed = run(data, tmp_path / "recomputed", recompute="attention_inputs")
    assert set(seen[:3]) == {(True, True)}
    monkeypatch.setattr(BlockTrainer, "compute_loss", Trainer.compute_loss)
    whole = run(data, tmp_path / "whole")
    for other in (recomputed, whole):
        assert losses(other) == pytest.approx(losses(in_chunks), abs=LOSS_ATOL * 10)


@pytest.mark.parametrize("recompute", [None, "elementwise"])
def test_layers_and_loss_are_compiled_once_each(recompute, data, tmp_path, monkeypatch):  # noqa: F811
    """Two graphs for all layers, micro-batches and chunks, the last of which is shorter; the plain run's losses."""
    monkeypatch.setattr(loss_mlra, "MAX_LOGITS_BYTES", 4 * MODEL["vocab_size"] * 50)  # 43, 43 and 42 of 128 tokens
    monkeypatch.setattr(training_model, "BACKEND", "aot_eager_decomp_partition")
    changes = {"training__per_device_train_batch_size": 4}
    plain = run(data, tmp_path / "plain", **changes)
    torch.compiler.reset()
    counters.clear()
    with training_model.functorch_config.patch(activation_memory_budget=1.0):  # put back afterwards
        compiled = run(data, tmp_path / "compiled", compile_layers=True, recompute=recompute, **changes)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert losses(compiled) == pytest.approx(losses(plain), abs=LOSS_ATOL * 10)
    assert compiled["heldout"]["heldout"]["loss"] == pytest.approx(plain["heldout"]["heldout"]["loss"], abs=1e-4)


@pytest.mark.parametrize("recompute", [None, "elementwise"])
def test_compiled_layers_and_loss_give_the_plain_gradients(recompute, monkeypatch):
    """In float32, by padding that counts for nothing and a given number of targets too; nothing stays compiled."""
    monkeypatch.setattr(loss_mlra, "MAX_LOGITS_BYTES", 4 * 61 * 21)  # 21, 21 and 20 of 62 tokens
    torch.compiler.reset()
    model = tiny_model("mlra_4").train()
    ids = random_ids(2, 31)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            training_model.set_recomputation(model, recompute)
            training_model.compile_layers(model, "aot_eager_decomp_partition")
            assert model.chunked_loss is not type(model).chunked_loss
        for extra in ({}, {"num_items_in_batch": torch.tensor(40)}):
            model.zero_grad()
            loss = model(ids, labels=labels, use_cache=False, skip_logits=True, **extra).loss
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        for one, other in zip(compiled, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=LOSS_ATOL * max(1.0, other.abs().max().item()))
    training_model.set_recomputation(model, None)
    training_model.without_compilation(model)
    assert model.chunked_loss is type(model).chunked_loss
    assert not any(module._compiled_call_impl for module in model.modules())


def test_models_without_such_layers_are_compiled_whole():
    with pytest.raises(UserError, match="ModuleList has no model.layers: use training.torch_compile"):
        training_model.compile_layers(torch.nn.ModuleList())


@pytest.mark.parametrize("model, given, expected", [(MODEL, "sdpa", "sdpa"), (LLAMA, "sdpa", "causal_auto"),
                                                    (LLAMA, "eager", "eager")])  # fmt: skip
def test_attention_of_a_recipe(model, given, expected, data, tmp_path):  # noqa: F811
    """The library's models get the attention without a mask that MLRA has, unless another one is asked for."""
    content = recipe.make_recipe(settings(data, tmp_path, model=model, attn_implementation=given), "test")
    built = training_model.build_model(content, model_config(model), 0)
    assert built.config._attn_implementation == expected
    ids = torch.arange(30)[None]
    logits = built(ids).logits
    built.set_attn_implementation("eager")
    torch.testing.assert_close(logits, built(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"recompute": "layers"}, "recompute must be null, attention_inputs or elementwise, not 'layers'"),
        ({"recompute": "elementwise"}, "recompute elementwise is the compiler's: set compile_layers"),
        ({"compile_layers": 1}, "compile_layers must be true or false"),
        ({"compile_layers": True, "training__torch_compile": True}, "compile the same: set one of them"),
        ({"recompute": "attention_inputs", "model": LLAMA}, "recompute 'attention_inputs' is for models of type mlra"),
        ({"float8": "yes"}, "float8 must be true or false, not 'yes'"),
        ({"float8": True}, "float8 needs"),
    ],
)
def test_refused_options(changes, message, data, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "run", **changes)


def test_float8_converts_what_it_can(monkeypatch, capsys):
    """Maps of the layers whose sizes are multiples of 16; the head stays as it is, and the rest is named."""
    converted = []

    def convert(model, module_filter_fn):
        linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        converted.extend(name for name, module in linear.items() if module_filter_fn(module, name))

    monkeypatch.setattr(training_model, "convert_to_float8_training", convert)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = tiny_model("mla", hidden_size=32, q_lora_rank=16, intermediate_size=40, num_hidden_layers=1)
    training_model.use_float8(model, torch.device("cuda"))
    assert converted == ["model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.kv_a_proj"]
    assert "down_proj (40 x 32)" in capsys.readouterr().err
    with pytest.raises(UserError, match="compute capability 8.9"):
        training_model.use_float8(model, torch.device("cpu"))
    monkeypatch.setattr(training_model, "convert_to_float8_training", None)
    with pytest.raises(UserError, match="pip install torchao"):
        training_model.use_float8(model, torch.device("cuda"))


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_paper_recipe_on_several_devices(devices, monkeypatch):
    """A step is 480 blocks on any number of devices; no checkpointing, scan of parameters or waiting for NaN."""
    content = recipe.read_configuration(REPOSITORY / "configuration" / "training" / "paper.json")
    paper = recipe.make_recipe(content, "paper.json")
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    given = {}

    class Parser:
        def __init__(self, kind):
            pass

        def parse_dict(self, values):
            given.update(values)
            raise ValueError("seen")

    monkeypatch.setattr(recipe, "HfArgumentParser", Parser)
    with pytest.raises(UserError, match="seen"):
        recipe.training_arguments(paper)
    assert given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] * devices == 480
    assert given["ddp_find_unused_parameters"] is given["logging_nan_inf_filter"] is False
    assert paper.compile_layers and paper.recompute == "elementwise"
    assert not given.get("torch_compile") and not given.get("gradient_checkpointing")


# The benchmark


def test_benchmark_runs_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    """Cells are checked before they are timed, and one that fails leaves its reason and the others' figures."""
    output = tmp_path / "bench.json"
    prepare = bench_train.prepare

    def failing(model, cell, *args):
        if cell.recompute == "layers":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return prepare(model, cell, *args)

    monkeypatch.setattr(bench_train, "prepare", failing)
    cells = ["mlra_4:auto:none:2:layers", "mlra_4:auto:layers:2:attention_inputs", "llama_gqa:auto:model:1:none"]
    cells += ["mlra_4:fa4:none:2:none"]
    arguments = ["--smoke", "--length", "16", "--step-blocks", "4", "--output", str(output), "--cells", *cells]
    monkeypatch.setattr("scripts.causal_attention.flash_attention_4", None)
    assert bench_train.main(arguments) == 2
    results = json.loads(output.read_text())
    assert results["cells"][cells[0]] == {"error": "OutOfMemoryError: CUDA out of memory."}
    assert "flash_attn.cute is not installed" in results["cells"][cells[3]]["error"]
    for name, count in ((cells[1], 2), (cells[2], 4)):
        entry = results["cells"][name]
        assert abs(entry["loss_difference"]) < bench_train_checks.LOSS_TOLERANCE and entry["micro_batches"] == count
        seconds = (count * entry["micro_batch_ms"] + entry["update_ms"]) / 1e3
        assert entry["tokens_per_s"] == pytest.approx(4 * 16 / seconds)
        rate = entry["tokens_per_s"] * entry["model_gflop_per_token"] * 1e9
        assert entry["share_of_989"] == pytest.approx(rate / 989e12)
        assert entry["share_of_matmul_rate"] == pytest.approx(rate / results["matmul_rate_TFLOP_s"] / 1e12)
    assert output.with_suffix(".md").exists() and cells[1] in capsys.readouterr().out
    assert results["command"].endswith(" ".join(arguments)) and results["date"]


def test_benchmark_times_nothing_that_is_wrong():
    model = bench_train_cells.build("mlra_4", True, torch.device("cpu"))
    ids = torch.randint(0, 320, (2, 17))
    expected = bench_train_checks.reference(model, ids)
    stepper = bench_train_cells.prepare(model, bench_train_cells.read_cell("mlra_4:auto:none:2:none"), 16, True)
    loss = bench_train_checks.forward_backward(stepper, ids).item()
    found = bench_train_checks.check(loss, model, expected)
    assert 0 < found["gradient_difference_in_roundings"] < bench_train_checks.TIMES_ROUNDING
    with pytest.raises(ValueError, match="wrong: loss"):
        bench_train_checks.check(loss + 0.01, model, expected)
    model.model.layers[0].self_attn.k_rope_proj.weight.grad *= 1.1
    with pytest.raises(ValueError, match="gradient of k_rope_proj.weight off by 0.1"):
        bench_train_checks.check(loss, model, expected)


def test_benchmark_cells_in_float8(monkeypatch):
    """Named apart from bfloat16's, with an MLP that float8 can take; held against the same gradients, more loosely."""
    cell = bench_train_cells.read_cell("mlra_4_16:auto:none:2:none:float8")
    assert str(cell) == "mlra_4_16:auto:none:2:none:float8"
    assert str(bench_train_cells.read_cell("mla:auto:none:2:none")) == "mla:auto:none:2:none"
    assert bench_train_cells.model_fields("mlra_4_16", False)["intermediate_size"] == 9888
    converted = []
    monkeypatch.setattr(bench_train_cells, "use_float8", lambda model, device: converted.append(model))
    model = bench_train_cells.build("mlra_4_16", True, torch.device("cpu"))
    bench_train_cells.prepare(model, cell, 16, True)
    assert converted == [model]
    ids = torch.randint(0, 320, (2, 17))
    expected = bench_train_checks.reference(model, ids)
    loss = bench_train_checks.forward_backward(model, ids).item()
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.grad *= 1 + 10 * expected.rounding["o_proj.weight"]
    bench_train_checks.check(loss, model, expected, "float8")
    with pytest.raises(ValueError, match="o_proj.weight"):
        bench_train_checks.check(loss, model, expected)
    weight.grad *= 2
    with pytest.raises(ValueError, match="o_proj.weight"):
        bench_train_checks.check(loss, model, expected, "float8")


def test_benchmark_stops_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "time_cell", lambda *args: {"error": "slow"})
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(bench_train.time, "monotonic", lambda: next(clock))
    output = tmp_path / "bench.json"
    bench_train.main(["--smoke", "--seconds", "450", "--output", str(output)])
    reasons = [entry["error"] for entry in json.loads(output.read_text())["cells"].values()]
    assert reasons == ["slow", "slow", "no time left of --seconds 450"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cells", "mlra_9:auto:none:1:none"], "model 'mlra_9' is none of"),
        (["--cells", "mlra_4:auto:none:1"], "write MODEL:ATTENTION:COMPILE:BLOCKS:RECOMPUTE"),
        (["--cells", "mlra_4:auto:none:0:none"], "write MODEL:ATTENTION:COMPILE:BLOCKS:RECOMPUTE"),
        (["--cells", "llama_mha:auto:none:1:attention_inputs"], "only models of type mlra"),
        (["--output", "results.txt"], "must end in .json"),
    ],
)
def test_benchmark_refuses(flags, message, capsys):
    assert bench_train.main(flags) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and message in printed[0]


def test_benchmark_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_train.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_models_of_the_benchmark_are_of_equal_size():
    sizes = {name: count_parameters(model_config(bench_train_cells.model_fields(name, False))) for name in
             ("mlra_4", "mla", "llama_gqa", "llama_mha")}  # fmt: skip
    assert all(abs(size / sizes["mlra_4"] - 1) < 0.005 for size in sizes.values()), sizes


def test_every_default_cell_can_be_read():
    cells = [bench_train_cells.read_cell(text) for text in (*bench_train_cells.CELLS, *bench_train_cells.SMOKE_CELLS)]
    assert len({str(cell) for cell in cells}) == len(cells)


def test_kernels_are_grouped_by_their_names():
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32_64x128x192": "attention backward",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x192": "attention forward",
        "triton_poi_fused__scaled_dot_product_cudnn_attention_backward__to_copy_mul_6": "compiled",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NTN": "matrix products",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": (
            "plain elementwise and sums"
        ),
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "exchange",
        "Memcpy DtoD (Device -> Device)": "copies",
        "something": "others",
    }
    assert {name: group_of(name) for name in names} == names
