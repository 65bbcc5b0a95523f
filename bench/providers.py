"""Who is measured: ours, torch's eager batch norm and what its compiler makes of it, and others where installed.

Each is a function that takes an epilogue and the layer's state and gives `operation(x, residual) -> y`, in training.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F

import tritonbn
from bench import peers
from bench.cudnn import cudnn
from bench.problem import Epilogue, Problem, State
from tritonbn import launch

Operation = Callable[[Tensor, Tensor | None], Tensor]

MOMENTUM, EPS = 0.1, 1e-5
# In place where torchvision's models are. silu would have to keep its input all the same.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "relu": torch.relu_,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class Provider(NamedTuple):
    """One way to compute batch norm with an epilogue."""

    name: str
    build: Callable[[Epilogue, State], Operation]
    missing: Callable[[torch.device], str | None] = lambda _: None  # why it cannot be measured there
    scope: Callable[[], AbstractContextManager[object]] = nullcontext  # within it everything runs
    takes: Callable[[Problem], bool] = lambda _: True
    stage: int = 0  # what compiles comes after what does not, and what also tunes last


def tritonbn_operation(epilogue: Epilogue, state: State) -> Operation:
    def operate(x: Tensor, residual: Tensor | None) -> Tensor:
        return tritonbn.functional.batch_norm(
            x, state.running_mean, state.running_var, state.weight, state.bias, True, MOMENTUM, EPS,
            activation=epilogue.activation, residual=residual,
        )  # fmt: skip

    return operate


def torch_batch_norm(
    activation: str,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    x: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """One operation after the other, as models are written."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
    if residual is not None:
        y = y.add_(residual)
    return ACTIVATIONS[activation](y)


def eager_operation(epilogue: Epilogue, state: State) -> Operation:
    return partial(torch_batch_norm, epilogue.activation, *state)


def compiled_operation(mode: str, epilogue: Epilogue, state: State) -> Operation:
    """Compiled for one shape at the first call; what was compiled before is forgotten, or torch would give up."""
    torch.compiler.reset()
    compiled = torch.compile(torch_batch_norm, fullgraph=True, dynamic=False, mode=mode)
    return partial(compiled, epilogue.activation, *state)


def no_cudnn() -> AbstractContextManager[object]:
    return cudnn(enabled=False)


def keeping_buffers() -> AbstractContextManager[object]:
    """Compiled backwards may run again on the same graph; they would overwrite what the forward saved."""
    return torch._functorch.config.patch(donated_buffer=False)  # type: ignore[no-any-return]


def no_kernels(device: torch.device) -> str | None:
    if device.type == "cuda" or launch.INTERPRETED:
        return None
    return "its kernels need a GPU, or TRITON_INTERPRET=1; on a CPU tensor it calls torch's"


def without_cudnn(_: torch.device) -> str | None:
    available = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return None if available else "torch has no cuDNN here: eager is the same"


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("tritonbn", tritonbn_operation, no_kernels),
        Provider("eager", eager_operation),
        Provider("eager-no-cudnn", eager_operation, without_cudnn, no_cudnn),
        Provider("compile", partial(compiled_operation, "default"), scope=keeping_buffers, stage=1),
        Provider(
            "compile-max-autotune",
            partial(compiled_operation, "max-autotune-no-cudagraphs"),  # the graph is ours
            scope=keeping_buffers,
            stage=2,
        ),
        Provider("attorch", peers.attorch, partial(peers.missing, "attorch"), takes=peers.attorch_takes),
        Provider("flag-gems", eager_operation, partial(peers.missing, "flag_gems"), peers.flag_gems),
        Provider("apex-groupbn", peers.apex, partial(peers.missing, "apex.contrib.groupbn"), takes=peers.apex_takes),
    )
}
