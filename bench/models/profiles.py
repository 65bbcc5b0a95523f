"""Where the time of a step goes: kernels on the GPU, operators on the CPU, sorted by their names."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.torch_version import TorchVersion

from bench.measure import synchronize
from tritonbn import launch

STEPS = 3
KINDS = ("batch norm", "activation, add", "convolution, matmul", "copies", "other")
OURS = tuple(name for name in vars(launch) if name.endswith("_kernel"))
# The first found in a name decides. Names of kernels are torch's, cuDNN's, cuBLAS', CUTLASS', Inductor's and ours, of
# operators ATen's. Inductor names a kernel after the operators in it: with batch norm, it counts as that.
PATTERNS = (
    ("batch norm", rf"batch_?norm|\bbn_(fw|bw)|^({'|'.join(OURS)})$"),
    ("copies", r"nchwtonhwc|nhwctonchw|converttensor|^triton_poi_fused(__to_copy)?(_convolution)?_\d+$"),
    ("other", r"multi_tensor|_foreach|nccl|pool|softmax|nll_loss|dropout|^autograd::"),
    ("convolution, matmul", r"conv(?!ert)|gemm|gemv|nvjet|cutlass|xmma|fprop|dgrad|wgrad|winograd|addmm|\bb?mm\b"),
    ("activation, add", r"relu|clamp|threshold|sigmoid|silu|hardtanh|hardswish|functor\w*_add|[:_]add_?(_|$)"),
    ("copies", r"memcpy|copy|convert|catarray|_cat_|::cat$|::clone$|transpose"),
)
LAYOUT_CHANGES = re.compile(r"nchwtonhwc|nhwctonchw", re.IGNORECASE)


class Shares(NamedTuple):
    """Of the time of all kernels or operators together, by `KINDS`; and how many kernels a step has, on a GPU."""

    of: str
    share: dict[str, float]
    kernels: float | None
    changed_layout: bool  # a kernel between NCHW and NHWC ran


def kind(name: str) -> str:
    """One of `KINDS`."""
    return next((kind for kind, pattern in PATTERNS if re.search(pattern, name, re.IGNORECASE)), "other")


def shares(step: Callable[[], None], device: torch.device) -> Shares | None:
    """Of some steps, under the profiler; None where it saw nothing."""
    cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would write into our output
    if cuda and TorchVersion(torch.version.cuda or "0") < "12.6":  # as torch does for its own graphs: else it may crash
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    synchronize(device)
    with profile(activities=activities) as seen:
        for _ in range(STEPS):
            step()
        synchronize(device)
    found = [
        (event.key, event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in seen.key_averages()
        if (event.device_type != torch.profiler.DeviceType.CPU) is cuda and not annotation(event)
    ]
    return summed(found, "GPU kernels" if cuda else "CPU operators", STEPS if cuda else None)


def annotation(event: Any) -> bool:
    """Spans of time that others gave names to: the kernels in them are there too."""
    return bool(getattr(event, "is_user_annotation", False)) or event.key.startswith("ProfilerStep")


def summed(found: Iterable[tuple[str, float, int]], of: str, steps: int | None) -> Shares | None:
    """Of (name, time, how often)."""
    times: Counter[str] = Counter()
    kernels, changed = 0, False
    for name, time, count in found:
        times[kind(name)] += time  # type: ignore[assignment]
        kernels += count
        changed = changed or bool(LAYOUT_CHANGES.search(name))
    total = sum(times.values())
    if not total:
        return None
    share = {name: times[name] / total for name in KINDS}
    return Shares(of, share, None if steps is None else kernels / steps, changed)
