"""Other people's batch norm, where it is installed: thin adapters, written from their sources.

Not here: inplace_abn, which overwrites its input and scales by |weight| + eps: another function.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.problem import EPILOGUES, Epilogue, Problem, State

Operation = Callable[[Tensor, Tensor | None], Tensor]


def missing(module: str, device: torch.device) -> str | None:
    """Why a peer cannot be measured here."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it
        found = False
    if not found:
        return f"{module} is not installed"
    return None if device.type == "cuda" else "needs a GPU"


def with_state(module: Any, state: State) -> Any:
    """The batch norm module in training with this state."""
    module.weight, module.bias, module.running_mean, module.running_var = state
    return module.train()


def attorch(epilogue: Epilogue, state: State) -> Operation:
    """https://github.com/BobMcDear/attorch: BatchNorm2d(C, act_func=...)(x, pre_act_add)."""
    package: Any = importlib.import_module("attorch")
    activation = None if epilogue.activation == "identity" else epilogue.activation
    size = state.weight.numel()
    options = {"act_func": activation, "device": state.weight.device}
    short = with_state(package.BatchNorm1d(size, **options), state)
    image = with_state(package.BatchNorm2d(size, **options), state)

    def operate(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = (image if x.dim() == 4 else short)(x, residual)
        return y

    return operate


def attorch_takes(problem: Problem) -> bool:
    return len(problem.layer.shape) <= 4


@contextmanager
def flag_gems() -> Iterator[None]:
    """https://github.com/flagos-ai/FlagGems: use_gems() takes over torch's operations; those of cuDNN it does not."""
    package: Any = importlib.import_module("flag_gems")
    with torch.backends.cudnn.flags(enabled=False), package.use_gems():
        yield


def apex(epilogue: Epilogue, state: State) -> Operation:
    """https://github.com/NVIDIA/apex: contrib.groupbn.BatchNorm2d_NHWC(C, fuse_relu)(x, z), on [N, H, W, C]."""
    package: Any = importlib.import_module("apex.contrib.groupbn")
    module = package.BatchNorm2d_NHWC(state.weight.numel(), fuse_relu=epilogue.activation == "relu")
    module = with_state(module, state)

    def operate(x: Tensor, residual: Tensor | None) -> Tensor:
        z = None if residual is None else residual.permute(0, 2, 3, 1)
        y: Tensor = module(x.permute(0, 2, 3, 1), z).permute(0, 3, 1, 2)
        return y

    return operate


def apex_takes(problem: Problem) -> bool:
    """Half precision, channels_last images, and nothing but ReLU."""
    image = problem.layout == "channels_last" and len(problem.layer.shape) == 4
    return image and problem.dtype == "fp16" and EPILOGUES[problem.epilogue].activation in ("identity", "relu")
