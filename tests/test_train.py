"""Training: the recipe's optimizer and schedule, resuming, refusals, equal sizes, text preparation, fine-tuning."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, TrainerCallback, get_scheduler

from evals.corpora import read_token_file, token_file_header
from evals.perplexity import main as perplexity
from modeling_mlra import MLRAForCausalLM
from scripts import compare_architectures, finetune_lora, train, training_data
from scripts import recipe as recipes
from scripts.cli import UserError
from scripts.training_checks import RESULT_FILE, STATE_FILE, last_checkpoint
from scripts.training_loop import BlockTrainer
from scripts.training_model import build_model
from scripts.training_speed import count_parameters, training_flops_per_token
from tests.paths import REPOSITORY
from tests.tolerances import LOSS_ATOL
from tests.training import LLAMA, MODEL, TRAINING, losses, recipe, settings, write


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[dict, Path]:
    """Result of a whole run that exports, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    config = write(
        folder / "recipe.json",
        settings(data, folder / "run") | {"export": {"folder": str(folder / "hub"), "license": "cc0-1.0"}},
    )
    assert train.main([str(config)]) == 0
    return json.loads((folder / "run" / RESULT_FILE).read_text()), folder


def test_loss_falls_from_that_of_a_uniform_guess(trained):
    result, _ = trained
    assert result["finished"] and result["step"] == 12 and result["tokens"] == 12 * 8 * 32
    assert losses(result)[0] == pytest.approx(math.log(MODEL["vocab_size"]), abs=0.02)  # zero output projections
    assert losses(result)[-1] < losses(result)[0] - 1
    assert result["heldout"]["heldout"]["loss"] == pytest.approx(losses(result)[-1], abs=0.3)
    assert result["tokens_per_second"] > 0
    assert result["matmul_share"] == pytest.approx(
        result["tokens_per_second"] * result["flops_per_token"] / result["matmul_rate"]
    )


def test_exported_model_has_the_perplexity_of_its_card(trained, data, tmp_path):
    result, folder = trained
    model = MLRAForCausalLM.from_pretrained(folder / "hub")
    assert model.dtype == torch.bfloat16 and model.config.use_cache
    output = tmp_path / "perplexity.json"
    assert perplexity(["--model", str(folder / "hub"), "--data", str(data / "heldout.bin"), "--output", str(output),
                       "--block-size", "32"]) == 0  # fmt: skip
    measured = json.loads(output.read_text())["results"]["heldout"]
    stated = result["heldout_exported"]["heldout"]
    assert measured["tokens"] == stated["tokens"]
    assert measured["perplexity"] == pytest.approx(stated["perplexity"], rel=1e-3)  # other batches, bfloat16
    assert f"{stated['perplexity']:.3f}" in (folder / "hub" / "README.md").read_text(encoding="utf-8")


def test_accumulation_and_checkpointing_change_nothing(trained, data, tmp_path):
    result, _ = trained
    for name, changes in {
        "accumulated": {"training__per_device_train_batch_size": 2},
        "checkpointed": {"training__gradient_checkpointing": True},
    }.items():
        other = train.train_recipe(recipe(data, tmp_path / name, **changes))
        assert losses(other) == pytest.approx(losses(result), abs=LOSS_ATOL * 10), name


def test_killed_and_resumed_run_has_the_same_next_losses(trained, data, tmp_path):
    result, _ = trained
    content = settings(data, tmp_path / "run", training__save_strategy="steps", training__save_steps=4)
    config = write(tmp_path / "recipe.json", content)
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.train", str(config), "--set", "training.logging_steps=1"],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while last_checkpoint(tmp_path / "run") is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = last_checkpoint(tmp_path / "run")
    assert begun is not None and not (tmp_path / "run" / RESULT_FILE).exists()
    (tmp_path / "run" / "checkpoint-99").mkdir()  # as a kill in the middle of saving leaves it
    with pytest.raises(UserError, match="holds a run already"):
        train.train_recipe(recipes.make_recipe(content, "test"))
    other = settings(data, tmp_path / "run", training__learning_rate=1e-3)
    with pytest.raises(UserError, match="was begun with training"):
        train.train_recipe(recipes.make_recipe(other, "test"), resume=True)
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    resumed = train.train_recipe(recipes.make_recipe(content, "test"), resume=True, callbacks=[Count()])
    assert steps == list(range(int(begun.name.partition("-")[2]) + 1, 13))
    assert losses(resumed) == losses(result)
    assert resumed["heldout"] == result["heldout"]


def test_time_budget_stops_with_a_checkpoint(data, tmp_path):
    content = recipe(data, tmp_path / "run")
    result = train.train_recipe(content, deadline=time.monotonic() - 1)
    assert not result["finished"] and result["step"] == 1
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-1"


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((4, {"global_step": 4}), (12, {"global_step": 12}), (8, {"global_step": 8})):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write(tmp_path / f"checkpoint-{step}" / STATE_FILE, state)
    (tmp_path / "checkpoint-16").mkdir()
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / STATE_FILE).write_text('{"global_st')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"


def test_every_token_but_the_first_is_predicted_once(data):
    """Targets are the tokens one further, across the borders of blocks too."""
    tokens = torch.from_numpy(np.array(read_token_file(data / "train.bin")).astype(np.int64))
    blocks = training_data.PackedBlocks(data / "train.bin", 32, 300)
    assert len(blocks) == 250
    items = [blocks[index] for index in range(250)]
    assert torch.equal(torch.cat([item["input_ids"] for item in items]), tokens[:-1])
    for targets in ("labels", "shift_labels"):
        assert torch.equal(torch.cat([item[targets] for item in items]), tokens[1:])


def test_evaluation_during_training_is_that_of_perplexity(data, tmp_path):
    changes = {"training__eval_strategy": "steps", "training__eval_steps": 4, "training__max_steps": 4}
    result = train.train_recipe(recipe(data, tmp_path / "run", **changes))
    assert result["heldout_curve"] == [[4, pytest.approx(result["heldout"]["heldout"]["loss"], abs=LOSS_ATOL)]]


# The recipe


def block_trainer(data, tmp_path, **changes) -> BlockTrainer:
    content = recipe(data, tmp_path / "run", **changes)
    model = build_model(content, recipes.model_config(content.model), 0)
    return BlockTrainer(
        model=model, args=recipes.training_arguments(content), tokens_per_step=1, flops_per_token=1, peak=1
    )


def test_weight_decay_covers_all_parameters(data, tmp_path):
    trainer = block_trainer(data, tmp_path)
    optimizer = trainer.create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert decayed == {id(parameter) for parameter in trainer.model.parameters()}
    names = [name for name, _ in trainer.model.named_parameters()]
    assert any("norm" in name for name in names) and any("embed" in name for name in names)


def test_paper_recipe():
    """Section 4 of the paper's appendix: optimizer, schedule, batch."""
    content = recipes.make_recipe(recipes.read_configuration(TRAINING / "paper.json"), "paper.json")
    args = recipes.training_arguments(content)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert (args.weight_decay, args.max_grad_norm, args.max_steps) == (0.1, 1.0, 100_000)
    assert args.optim == "adamw_torch_fused" and args.bf16
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 480
    assert content.data.block_size == 2048
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(args.max_steps), args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    ).lr_lambdas[0]  # fmt: skip
    peak, floor = 1.6e-4, 1.6e-5
    for step, expected in {
        0: 0.0,
        1000: peak / 2,
        2000: peak,
        51_000: (peak + floor) / 2,
        26_500: floor + (peak - floor) * (1 + math.cos(math.pi / 4)) / 2,
        100_000: floor,
    }.items():
        assert schedule(step) * args.learning_rate == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize(("name", "largest"), [("demo.json", 21e6), ("compare.json", 21e6), ("demo_books.json", 24e6)])
def test_presets_can_be_read(name, largest):
    content = recipes.read_configuration(TRAINING / name)
    for key in ("architectures", "seeds"):
        content.pop(key, None)
    content = recipes.make_recipe(content, name)
    args = recipes.training_arguments(content)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == content.blocks_per_step
    assert count_parameters(recipes.model_config(content.model)) * 2 < largest  # bytes in bfloat16


def test_learning_rate_of_a_run(data, tmp_path):
    rates = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    train.train_recipe(recipe(data, tmp_path / "run", training__max_steps=8), callbacks=[Record()])
    expected = [step / 4 for step in range(4)] + [0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx([1e-2 * value for value in expected])


@pytest.mark.parametrize("model", [MODEL, LLAMA], ids=["mlra", "llama"])
def test_output_projections_start_at_zero(model, data, tmp_path):
    content = recipe(data, tmp_path / "run", model=model)
    built = build_model(content, recipes.model_config(model), 3)
    for name, parameter in built.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not parameter.any(), name
        elif "norm" not in name and parameter.numel() > 200:
            assert 0.015 < parameter.std() < 0.025, name
    again = build_model(content, recipes.model_config(model), 3)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("model", [MODEL, {**MODEL, "num_latent_heads": 4, "num_branches": 2}, LLAMA])
def test_flops_are_those_that_the_profiler_counts(model, data, tmp_path):
    """Eager attention computes every pair of positions; the formula counts the half that causality needs."""
    content = recipe(data, tmp_path / "run", model=model)
    content.attn_implementation = "eager"
    built = build_model(content, recipes.model_config(model), 0)
    length = 24
    ids = torch.randint(0, 300, (1, length))
    with FlopCounterMode(display=False) as counter:
        built(ids, labels=ids, use_cache=False).loss.backward()
    attention = training_flops_per_token(built, length) - training_flops_per_token(built, -1)
    full = training_flops_per_token(built, -1) + attention * 2 * length / (length + 1)
    # In older versions of the library Llama's rotation tables are an outer product, no part of the model's work.
    tables = sum(
        sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    assert (counter.get_total_flops() - tables) / length == pytest.approx(full, rel=1e-12)


# Refused runs


REFUSED = {
    "file": ({"data__train": ["nothing.bin"]}, "no token file nothing.bin"),
    "pattern": ({"data__train": ["nothing_*.bin"]}, "no file matches"),
    "text": ({"data__train": ["nothing.txt"]}, "no file nothing.txt"),
    "vocabulary": ({"model__vocab_size": 60}, "outside the model's vocabulary of 60"),
    "context": ({"data__block_size": 65}, "more than the model's context of 64"),
    "short": ({"blocks_per_step": 512, "training__per_device_train_batch_size": 8}, "one step takes 512"),
    "divide": ({"training__per_device_train_batch_size": 3}, "is no multiple of"),
    "unknown": ({"training__learning_rat": 1}, "learning_rat"),
    "unknown_top": ({"steps": 1}, "unknown top-level setting 'steps'"),
    "accumulation": ({"training__gradient_accumulation_steps": 2}, "follows from blocks_per_step"),
    "steps": ({"training__max_steps": -1}, "max_steps must say"),
    "warmup": ({"training__warmup_steps": 13}, "warmup_steps 13"),
    "model": ({"model": "nothing.json"}, "neither an architecture file nor a checkpoint folder"),
    "sizes": ({"model__num_branches": 3}, "num_branches=3"),
    "memory": ({"model__num_hidden_layers": 3, "model__intermediate_size": 2**34}, "GB"),
    "empty": ({"data__train": []}, "names no corpus"),
    "export": ({"export": {"folder": str(REPOSITORY)}}, "already exists"),
    "dtype": ({"export": {"folder": "x", "dtype": "int3"}}, "int3"),
    "llama": ({"model": LLAMA, "export": {"folder": "nowhere"}}, "not llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_runs(case, data, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        train.train_recipe(recipe(data, tmp_path / "run", **changes))
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_refusal_is_one_line_and_exit_code_2(data, tmp_path, capsys):
    config = write(tmp_path / "recipe.json", settings(data, tmp_path / "run"))
    for arguments, message in [
        ([str(tmp_path / "none.json")], "no configuration file"),
        ([str(config), "--set", "data.block_size=9000"], "more than the model's context"),
        ([str(config), "--set", "nonsense"], "NAME=VALUE"),
    ]:
        assert train.main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_bad_token_far_into_a_file_ends_the_run(data, tmp_path, monkeypatch):
    tokens = np.array(read_token_file(data / "train.bin"))
    tokens[5000] = 300
    (tmp_path / "bad.bin").write_bytes(token_file_header(len(tokens)) + tokens.tobytes())
    monkeypatch.setattr(training_data, "CHECKED_TOKENS", 1000)
    with pytest.raises(UserError, match="token 300"):
        train.train_recipe(
            recipe(data, tmp_path / "run", data__train=[str(tmp_path / "bad.bin")], training__max_steps=32)
        )


def test_yaml_with_words_for_numbers(data, tmp_path):
    content = settings(data, tmp_path / "run")
    content["training"]["adam_epsilon"] = "1e-9"  # what YAML makes of 1e-9
    (tmp_path / "recipe.yaml").write_text(json.dumps(content), encoding="utf-8")
    read = recipes.make_recipe(recipes.read_configuration(tmp_path / "recipe.yaml"), "test")
    assert recipes.training_arguments(read).adam_epsilon == 1e-9


# Comparing architectures


def test_widths_match_those_of_the_released_models():
    base = str(REPOSITORY / "configuration" / "mlra_4.json")
    changes = {
        "mla": {"num_latent_heads": 1, "num_branches": 1, "q_lora_rank": 1536},
        "mlra_2": {"num_latent_heads": 4, "num_branches": 2},
        "gla_4": {"num_latent_heads": 4, "num_branches": 1},
        "mlra_4_gated": {"attn_output_gate": True},
        "gqa": {"model_type": "llama", "num_key_value_heads": 8},
    }
    widths = {name: model["intermediate_size"] for name, model in
              compare_architectures.plan({"model": base, "architectures": changes}).items()}  # fmt: skip
    released = {"mla": 9448, "mlra_2": 10048, "gla_4": 10136, "mlra_4_gated": 8856}
    assert {name: widths[name] for name in released} == pytest.approx(released, abs=8)  # their totals differ by 0.04 %
    with pytest.raises(UserError, match="no MLP width"):
        compare_architectures.match_width(dict(MODEL), 1000)


def test_comparison_is_matched_and_goes_on(data, tmp_path, capsys):
    content = settings(data, tmp_path / "runs", training__max_steps=6, training__warmup_steps=1)
    content["architectures"] = {
        "mlra_4": {},
        "gqa": {"model_type": "llama", "num_key_value_heads": 2},
    }
    content["seeds"] = [0, 1]
    config, output = write(tmp_path / "compare.json", content), tmp_path / "results.json"
    assert compare_architectures.main([str(config), "--output", str(output), "--only", "mlra_4"]) == 0
    first = json.loads(output.read_text())["results"]
    assert list(first) == ["mlra_4_seed0", "mlra_4_seed1"]
    elsewhere = ["--output", str(tmp_path / "elsewhere.json")]
    arguments = ["--only", "gqa", "--set", f"training.output_dir={tmp_path / 'elsewhere'}", "--set", "seeds=[0]"]
    assert compare_architectures.main([str(config), *elsewhere, *arguments]) == 0
    other = json.loads((tmp_path / "elsewhere.json").read_text())["results"]
    assert list(other) == ["gqa_seed0"]
    assert compare_architectures.main([str(config), "--output", str(output), "--merge", elsewhere[1]]) == 0
    assert list(json.loads(output.read_text())["results"]) == [*first, "gqa_seed0"]
    assert compare_architectures.main([str(config), "--output", str(output)]) == 0
    stored = json.loads(output.read_text())
    assert stored["results"]["gqa_seed0"] == other["gqa_seed0"]
    assert not (tmp_path / "runs" / "gqa_seed0").exists() and (tmp_path / "runs" / "gqa_seed1").exists()
    assert {name: stored["results"][name] for name in first} == first
    assert len(stored["results"]) == 4
    sizes = [entry["parameters"] for entry in stored["results"].values()]
    assert max(sizes) - min(sizes) <= 0.01 * min(sizes) and len(set(sizes)) == 2
    values = [first[name]["heldout"]["heldout"]["perplexity"] for name in first]
    assert values[0] != values[1]
    row = next(line for line in output.with_suffix(".md").read_text().splitlines() if line.startswith("| mlra_4"))
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    assert f" {mean:.3f} ± {deviation:.3f} " in row and "20 / 8" in row
    assert output.with_suffix(".png").stat().st_size > 10_000
    capsys.readouterr()
    assert compare_architectures.main([str(config), "--output", str(output), "--set", "training.max_steps=7"]) == 2
    assert "max_steps = 6" in capsys.readouterr().err
    assert compare_architectures.main([str(config), "--output", str(output), "--merge", "nothing.json"]) == 2
    assert "--merge nothing.json: no such file" in capsys.readouterr().err.splitlines()[-1]


# Text


def test_lora_example(trained, tmp_path, capsys):
    _, folder = trained
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"line {index} of a text that says the same\n" for index in range(40)))
    arguments = ["--model", str(folder / "hub"), "--data", str(text), "--output", str(tmp_path / "adapter")]
    flags = ["--merge", str(tmp_path / "merged"), "--steps", "25", "--learning-rate", "0.02", "--block-size", "48"]
    assert finetune_lora.main([*arguments, *flags]) == 0
    result = json.loads((tmp_path / "adapter" / finetune_lora.RESULT_FILE).read_text())
    assert set(result["target_modules"]) == set(finetune_lora.TARGETS) - {"g_proj"}
    printed = capsys.readouterr().out
    for part in ("train", "held out"):
        assert result["after"][part] < result["before"][part] - 0.1
        assert f"{result['after'][part]:.4f}" in printed
    ids = torch.arange(30)[None]
    base = AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=torch.float32)
    merged = MLRAForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert finetune_lora.main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


# Several processes


def launch(config: Path, *flags: str, module: str = "scripts.train") -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-m", module, str(config), *flags],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize("compiles", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_train_like_one(sharded, compiles, trained, data, tmp_path):
    """Compiled: as paper.json has it, layer by layer, with elementwise recomputation."""
    result, _ = trained
    changes = {"training__per_device_train_batch_size": 2 if compiles else 4}
    if compiles:
        changes |= {"compile_layers": True, "recompute": "elementwise"}
    if sharded:
        changes |= {"training__fsdp": True, "training__fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
    content = settings(data, tmp_path / "run", **changes) | {"export": {"folder": str(tmp_path / "hub")}}
    module = "tests.sharded_training" if sharded or compiles else "scripts.train"
    launch(write(tmp_path / "recipe.json", content), module=module)
    other = json.loads((tmp_path / "run" / RESULT_FILE).read_text())
    assert losses(other) == pytest.approx(losses(result), abs=LOSS_ATOL * 10)
    assert MLRAForCausalLM.from_pretrained(tmp_path / "hub").num_parameters() == result["parameters"]


@pytest.mark.distributed
def test_sharded_training_in_bfloat16_has_the_numerics_of_one_process(data, tmp_path):
    """Autocast over float32 weights and hidden states, gradients of micro-batches and processes summed in float32."""
    changes = {"training__bf16": True, "training__max_steps": 6, "training__per_device_train_batch_size": 2}
    one = train.train_recipe(recipe(data, tmp_path / "one", **changes))
    changes |= {"training__fsdp": True, "training__fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
    content = settings(data, tmp_path / "two", **changes)
    launch(write(tmp_path / "recipe.json", content), module="tests.sharded_training")
    two = json.loads((tmp_path / "two" / RESULT_FILE).read_text())
    assert losses(two) == pytest.approx(losses(one), abs=LOSS_ATOL * 10)
