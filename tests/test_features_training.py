"""Fine-tuning, as with any model of the library."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_mlra import MLRACache, MLRAForCausalLM
from modeling_mlra.decode_mlra import decode_calls
from tests.models import VARIANTS, random_ids, tiny_model
from tests.tolerances import LOSS_ATOL, MATHEMATICS_ATOL

LORA_TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def total_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed next-token loss in the dtype of the logits (the library's own goes through float32)."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients so far, by parameter name; they are reset."""
    found = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(reference: dict, result: dict, atol: float):
    assert reference.keys() == result.keys()
    for name, gradient in reference.items():
        scale = gradient.abs().max().clamp(min=1)
        assert (gradient - result[name]).abs().max() <= atol * scale, name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_through_the_cache(variant, implementation):
    """A sequence in pieces (expanded prefix, absorbed rest) has the gradients of the sequence at once."""
    model = tiny_model(variant, dtype=torch.float64, attn_output_gate=variant == "mlra_2")
    model.set_attn_implementation(implementation)
    ids = random_ids(2, 13)
    total_loss(model(ids, use_cache=False).logits, ids).backward()
    expected = gradients(model)
    cache = MLRACache(model.config)
    before = decode_calls["torch"]
    logits = torch.cat([model(piece, cache=cache).logits for piece in ids.split([6, 4, 1, 2], dim=1)], dim=1)
    assert (decode_calls["torch"] - before == 3 * 2) == (implementation == "sdpa")
    total_loss(logits, ids).backward()
    assert_same_gradients(expected, gradients(model), MATHEMATICS_ATOL)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_in_training_mode(use_reentrant):
    model = tiny_model("mlra_4", dtype=torch.float64).train()
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    if use_reentrant:
        model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    assert_same_gradients(expected, gradients(model), MATHEMATICS_ATOL)


def test_right_padded_batch_has_the_loss_and_gradients_of_its_rows():
    model = tiny_model("mlra_2", dtype=torch.float64)
    ids, lengths = random_ids(3, 11), (11, 4, 7)
    labels, mask = ids.clone(), torch.ones_like(ids)
    expected_loss = 0.0
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, :length]
        loss = total_loss(model(alone).logits, alone)
        loss.backward()
        expected_loss += loss.item()
        labels[row, length:], mask[row, length:], ids[row, length:] = -100, 0, 0
    expected = gradients(model)
    for settings in ({"attention_mask": mask}, {}):  # padding on the right cannot be seen from the left anyway
        out = model(ids, labels=labels, **settings)
        assert abs(out.loss.item() - expected_loss / sum(length - 1 for length in lengths)) < LOSS_ATOL
        total_loss(out.logits, labels).backward()
        assert_same_gradients(expected, gradients(model), MATHEMATICS_ATOL)


def test_packed_documents_train_as_separate_ones():
    model = tiny_model("gla_2", dtype=torch.float64)
    documents = (random_ids(1, 5), random_ids(1, 8, seed=2))
    for document in documents:
        total_loss(model(document).logits, document).backward()
    expected = gradients(model)
    ids = torch.cat(documents, dim=1)
    labels = ids.clone()
    labels[0, 5] = -100  # nothing predicts a document's first token
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        total_loss(model(ids, position_ids=positions, use_cache=False).logits, labels).backward()
        assert_same_gradients(expected, gradients(model), MATHEMATICS_ATOL)
    total_loss(model(ids, use_cache=False).logits, labels).backward()
    with pytest.raises(AssertionError):
        assert_same_gradients(expected, gradients(model), MATHEMATICS_ATOL)


def learnable_texts() -> Dataset:
    """Counting sequences: a model that attends to the last token learns them."""
    rows = [[(start + step) % 60 + 1 for step in range(12)] for start in range(60)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def fresh_model(**overrides) -> MLRAForCausalLM:
    """Weights as initialised, which is what one trains."""
    model = tiny_model("mlra_4", **overrides)
    model.init_weights()
    return model


def train(model, folder, **settings) -> list[float]:
    """Losses of a short run of the library's Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=20, learning_rate=0.01, logging_steps=1, report_to="none",
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=learnable_texts())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_saves_and_resumes(tmp_path):
    losses = train(fresh_model(), tmp_path / "whole", max_steps=30, save_strategy="no")
    assert losses[-1] < losses[0] - 1
    checkpointed = train(
        fresh_model(), tmp_path / "checkpointed", max_steps=30, save_strategy="no", gradient_checkpointing=True
    )
    assert checkpointed == pytest.approx(losses, abs=1e-3)
    train(fresh_model(), tmp_path / "part", max_steps=5, save_steps=5)
    saved = tmp_path / "part" / "checkpoint-5"
    assert json.loads((saved / "config.json").read_text())["model_type"] == "mlra"
    assert MLRAForCausalLM.from_pretrained(saved).num_parameters() == tiny_model().num_parameters()


def test_lora(tmp_path):
    """Adapters train while the model stays; saved, reloaded and merged they give the same tokens."""
    torch.manual_seed(0)
    base = tiny_model("mlra_2", attn_output_gate=True)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=[*LORA_TARGETS, "g_proj", "k_rope_proj"]
    )
    model = get_peft_model(base, config)
    adapted = {name.split(".")[-2] for name, module in model.named_modules() if name.endswith("lora_A")}
    assert adapted == {*LORA_TARGETS, "g_proj", "k_rope_proj"}
    losses = train(model, tmp_path / "run", max_steps=20, save_strategy="no", gradient_checkpointing=True)
    assert losses[-1] < losses[0] - 0.5
    for name, tensor in model.base_model.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, frozen[name.replace(".base_layer", "")]), name
    model.save_pretrained(tmp_path / "adapter")
    ids = random_ids(2, 6)
    model.eval()
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=False), expected)
    again = PeftModel.from_pretrained(tiny_model("mlra_2", attn_output_gate=True), tmp_path / "adapter").eval()
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=8, do_sample=False), expected)
    merged = again.merge_and_unload()
    assert type(merged) is MLRAForCausalLM
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_lora_on_all_linear_layers_leaves_the_up_projections():
    model = get_peft_model(tiny_model("mlra_4"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert adapted == {*LORA_TARGETS, "k_rope_proj"}
