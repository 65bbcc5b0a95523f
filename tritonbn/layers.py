"""The batch norm layers that a model has for an input, as its forward meets them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonbn.modules import TritonBatchNorm
from tritonbn.planning import memory_format_of


class Layer(NamedTuple):
    """What a batch norm layer is given: [N, C, ...] of a dtype, laid out in a memory format."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format

    def empty(self, device: torch.device | str) -> Tensor:
        """A tensor like that."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format)


def layer_of(x: Tensor) -> Layer:
    return Layer(tuple(x.shape), x.dtype, memory_format_of(x))


def layers_of(model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Layer]:
    """The name of each of our modules that `model(*inputs, **options)` calls, and what it is given first.

    The model runs once, in evaluation and without gradients: nothing in it changes. Raises ValueError if it calls none.
    """
    found: dict[str, Layer] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, TritonBatchNorm):

            def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
                x = given[0] if given else named["input"]
                found.setdefault(name, layer_of(x))

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with _evaluation(model), torch.no_grad():
            model(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError("expected a model that calls tritonbn modules (see tritonbn.convert), but it called none")
    return found


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
