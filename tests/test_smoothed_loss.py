"""Label smoothing through the library's Trainer, against the loss computed by hand."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from modeling_mlra import MLRAForSequenceClassification, MLRAForTokenClassification
from tests.models import VOCAB_SIZE, random_ids, tiny_model
from tests.tolerances import LOSS_ATOL

SMOOTHING = 0.1
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def smoothed(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean over the targets that count of 0.9 * -log p[target] + 0.1 * the mean of -log p over all classes."""
    total, count = 0.0, 0
    for row, target in zip(logits.double().flatten(0, -2), targets.flatten().tolist(), strict=True):
        if target != -100:
            surprise = -(row - row.logsumexp(0))
            total += (1 - SMOOTHING) * surprise[target].item() + SMOOTHING * surprise.mean().item()
            count += 1
    return total / count


def trainer_of(model, rows, collator, folder, **settings) -> Trainer:
    arguments = TrainingArguments(
        folder,
        label_smoothing_factor=SMOOTHING,
        per_device_eval_batch_size=8,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"[PAD]": 0, **{f"w{index}": index for index in range(1, VOCAB_SIZE)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")), pad_token="[PAD]")


def alone(model, rows, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token logits `[N, vocab]` of every row by itself, and the tokens that follow."""
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in rows])
    return logits, torch.cat([torch.tensor(row[1:]) for row in labels])


@pytest.mark.parametrize("collator", ["equal lengths", "padded", "given labels", "flattened"])
@pytest.mark.parametrize("wrapping", ["plain", "lora"])
def test_next_tokens_are_the_targets(collator, wrapping, tmp_path):
    lengths = (7, 7, 7) if collator == "equal lengths" else (7, 4, 9)
    ids = [random_ids(length, seed=length + index).tolist() for index, length in enumerate(lengths)]
    labels = [row.copy() for row in ids]
    if collator == "given labels":
        labels = [[-100, -100, *row[2:]] for row in ids]
    rows = [{"input_ids": row} for row in ids]
    if collator in ("equal lengths", "given labels"):
        rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    collate = {
        "equal lengths": default_data_collator,
        "padded": DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        "given labels": DataCollatorForSeq2Seq(tokenizer()),
        "flattened": DataCollatorWithFlattening(),
    }[collator]
    model = tiny_model(use_cache=False)
    expected = smoothed(*alone(model, ids, labels))
    if wrapping == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_b_proj", "down_proj"], task_type="CAUSAL_LM"))
    trainer = trainer_of(model, rows, collate, tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=LOSS_ATOL * 10)
    assert trainer.train().training_loss == pytest.approx(expected, abs=LOSS_ATOL * 10)


def test_classes_of_a_sequence_or_a_token_are_not_shifted(tmp_path):
    ids = random_ids(3, 7)
    for model_class, labels in (
        (MLRAForSequenceClassification, torch.tensor([2, 0, 1])),
        (MLRAForTokenClassification, random_ids(3, 7, seed=5) % 3),
    ):
        model = tiny_model(model_class=model_class, num_labels=3, use_cache=False)
        with torch.no_grad():
            expected = smoothed(model(ids).logits, labels)
        rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
        loss = trainer_of(model, rows, default_data_collator, tmp_path).evaluate()["eval_loss"]
        assert loss == pytest.approx(expected, abs=LOSS_ATOL * 10), model_class.__name__


REMOTE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers_modules.")
ids = torch.tensor(json.loads(sys.argv[3]))
rows = [{"input_ids": row, "labels": row} for row in ids]
arguments = TrainingArguments(sys.argv[2], label_smoothing_factor=0.1, report_to="none", use_cpu=True)
print(json.dumps(Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]))
"""


def test_remote_code(converted, run_isolated, tmp_path):
    from modeling_mlra import MLRAForCausalLM

    folder, ids = converted("mlra_2_gated"), torch.randint(0, 319, (2, 9), generator=torch.Generator().manual_seed(3))
    model = MLRAForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = smoothed(model(ids).logits[:, :-1], ids[:, 1:])
    loss = json.loads(run_isolated(REMOTE, folder, tmp_path, json.dumps(ids.tolist())).splitlines()[-1])
    assert loss == pytest.approx(expected, rel=LOSS_ATOL)


def test_training_learns_the_next_token_and_not_to_copy(tmp_path):
    """A row of one repeated pair: after training the next token is the other one, not the current one."""
    torch.manual_seed(0)
    model = tiny_model(use_cache=False)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.05) if parameter.dim() > 1 else nn.init.ones_(parameter)
    rows = [{"input_ids": torch.tensor([3, 8] * 6), "labels": torch.tensor([3, 8] * 6)}] * 8
    trainer_of(model, rows, default_data_collator, tmp_path, max_steps=60, learning_rate=3e-3).train()
    tokens = model.eval()(torch.tensor([[3, 8, 3, 8]])).logits[0].argmax(-1)
    assert tokens.tolist() == [8, 3, 8, 3]
