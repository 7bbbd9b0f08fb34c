"""Where the device's time goes: kernels of a forward and backward pass by what they do."""

import re
from collections import defaultdict
from collections.abc import Callable

import torch

# The first whose pattern the kernel's name matches
GROUPS = {
    "compiled": r"^triton_",
    "attention backward": r"(flash|fmha|sdpa|attention|attn|cudnn).*(bprop|bwd|backward)|(bprop|bwd).*(flash|sdpa)",
    "attention forward": r"flash|fmha|sdpa|attention|attn|cudnn_generated",
    "matrix products": r"gemm|nvjet|cutlass|splitk|cublas",
    "exchange": r"nccl",
    "optimizer": r"multi_tensor_apply|adam",
    "copies": r"memcpy|memset|copy",
    "plain elementwise and sums": r"elementwise|reduce|softmax|embedding|index|cat",
}


def group_of(name: str) -> str:
    """What a kernel does, by its name."""
    found = (group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "others")


def kernel_times(function: Callable, longest: int = 25) -> dict[str, dict[str, float]]:
    """Milliseconds of the kernels that `function` runs: of each group, and of the `longest` kernels by name."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    groups: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = {}
    for event in profile.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        if is_kernel and event.self_device_time_total > 0:
            groups[group_of(event.key)] += event.self_device_time_total / 1e3
            kernels[f"{event.key[:120]} x{event.count}"] = event.self_device_time_total / 1e3

    def ranked(times: dict[str, float]) -> dict[str, float]:
        return dict(sorted(times.items(), key=lambda item: -item[1]))

    return {"groups_ms": ranked(groups), "kernels_ms": dict(list(ranked(kernels).items())[:longest])}
