"""Small networks made of a forward and children, what they fuse, and whether they still train as they did."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tritonbn
from tests.parity import random
from tritonbn import functional

CHANNELS = 3


def net(forward: Callable[..., Any], **children: nn.Module) -> Any:
    """A module whose class has this forward; with conv, conv2, bn, bn2 and relu unless given, in float64."""
    torch.manual_seed(0)
    module: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    usual = {"conv": convolution(), "conv2": convolution(), "bn": norm(), "bn2": norm(), "relu": nn.ReLU()}
    for name, child in (usual | children).items():
        module.add_module(name, child)
    return module.double()


def convolution() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


def norm() -> nn.BatchNorm2d:
    """With weights and biases that are not the usual ones."""
    module = nn.BatchNorm2d(CHANNELS)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.uniform_(module.bias, -0.5, 0.5)
    return module


def body(*last: nn.Module) -> nn.Sequential:
    """Convolution, batch norm and what follows."""
    return nn.Sequential(convolution(), norm(), *last)


def images(seed: int = 0) -> Tensor:
    return random(2, CHANNELS, 4, 4, seed=seed)


def together(output: Any) -> Tensor:
    """One number that all tensors of an output contribute to."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return torch.stack([(leaf * leaf.detach().cos()).sum() for leaf in leaves if isinstance(leaf, Tensor)]).sum()


def steps(model: nn.Module, *inputs: Any, count: int = 2, **named: Any) -> list[Tensor]:
    """Losses, gradients and at last the state of a few steps of SGD, then the output in evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = []
    for _ in range(count):
        torch.manual_seed(1)
        loss = together(model(*copy.deepcopy(inputs), **named))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        seen += [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
        optimizer.step()
    was = model.training
    model.eval()
    with torch.no_grad():
        seen.append(together(model(*copy.deepcopy(inputs), **named)))
    model.train(was)
    return [*seen, *[tensor.clone() for tensor in model.state_dict().values()]]


def assert_trains_alike(one: nn.Module, other: nn.Module, *inputs: Any, **named: Any) -> None:
    mine, theirs = steps(one, *inputs, **named), steps(other, *inputs, **named)
    assert len(mine) == len(theirs)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def converted(model: nn.Module) -> Any:
    """A copy with everything fused that can be."""
    return tritonbn.convert(copy.deepcopy(model), fuse=True)


@contextmanager
def fusions() -> Iterator[list[str]]:
    """What each batch norm run within was fused with: "", "relu", "add", "add + relu"; twice where two are added."""
    seen: list[str] = []
    real, both = functional.normalize, functional.normalize_add

    def note(*args: Any) -> Tensor:
        activation, residual, _ = args[-3:]
        name = str(activation)
        seen.append(" + ".join(["add"] * (residual is not None) + [name] * (name != "identity")))
        return real(*args)

    def note_both(*args: Any) -> Tensor:
        name = str(args[-1])
        seen.extend([" + ".join(["add"] + [name] * (name != "identity"))] * 2)
        return both(*args)

    functional.normalize, functional.normalize_add = note, note_both  # type: ignore[assignment]
    try:
        yield seen
    finally:
        functional.normalize, functional.normalize_add = real, both


def fused_in(model: nn.Module, *inputs: Any, **named: Any) -> list[str]:
    """What each batch norm is fused with, in the order of one call of a copy."""
    with fusions() as seen:
        copy.deepcopy(model)(*copy.deepcopy(inputs), **named)
    return seen
