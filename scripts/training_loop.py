"""The library's Trainer as training runs use it: decay of all parameters, speed in its logs, an end by the clock."""

import statistics
import time
from contextlib import AbstractContextManager

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback


class SpeedCallback(TrainerCallback):
    """Steps and seconds since the last log, less what evaluating and saving took."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.first_step = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.start is None:
            self.start, self.first_step = time.perf_counter(), state.global_step

    def on_evaluate(self, args, state, control, **kwargs):
        self.start = None

    on_save = on_evaluate

    def read(self, step: int) -> tuple[int, float]:
        """(steps, seconds) up to now, and start again at the next step."""
        if self.start is None:
            return 0, 0.0
        steps, seconds = step - self.first_step, time.perf_counter() - self.start
        self.start = None
        return steps, seconds


class TimeBudget(TrainerCallback):
    """Saves and stops at the first logging step after `deadline` (time.monotonic), so that no logged mean is cut."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        is_logging_step = state.global_step % state.logging_steps == 0
        if is_logging_step and time.monotonic() > self.deadline and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class BlockTrainer(Trainer):
    """The library's Trainer with weight decay on all parameters, and speed in its logs.

    Args:
        tokens_per_step: of all devices together.
        flops_per_token: of `training_flops_per_token`.
        peak: FLOP/s of all devices together, of `matmul_rate`.
    """

    def __init__(self, *args, tokens_per_step: int, flops_per_token: float, peak: float, **kwargs):
        self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
        self.speed = SpeedCallback()
        super().__init__(*args, **kwargs)
        self.skip_logits = self.model.config.model_type == "mlra"
        self.autocasts = self.is_fsdp_enabled and self.args.bf16
        if self.autocasts:  # else weights, hidden states and sums of gradients were bfloat16, unlike on one device
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        self.add_callback(self.speed)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All of them: the paper decays norms and embeddings too."""
        return [name for name, _ in model.named_parameters()]

    def compute_loss_context_manager(self) -> AbstractContextManager:
        """Autocast, which accelerate leaves out for sharded models."""
        if self.autocasts:
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return super().compute_loss_context_manager()

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Without the logits of all tokens at a time, where the model can."""
        if self.skip_logits:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps, seconds = self.speed.read(self.state.global_step)
            if steps:
                rate = steps * self.tokens_per_step / seconds
                logs["tokens_per_second"] = rate
                logs["matmul_share"] = rate * self.flops_per_token / self.peak
        super().log(logs, start_time)

    def measured(self, name: str) -> float | None:
        """Median of a logged speed over the intervals after the first, which holds compilation and warm-up."""
        values = [entry[name] for entry in self.state.log_history if name in entry]
        return statistics.median(values[1:] or values) if values else None
