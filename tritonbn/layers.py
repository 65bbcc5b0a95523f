"""The batch norm layers that a model has for an input, as its forward meets them."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonbn import dispatch
from tritonbn.modules import TritonBatchNorm
from tritonbn.planning import memory_format_of


class Layer(NamedTuple):
    """What a batch norm layer is given: [N, C, ...] of a dtype, laid out in a memory format, on a device or any."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format
    device: torch.device | None = None
    why: str = ""  # torch computes it, and not the kernels

    def empty(self, device: torch.device | str) -> Tensor:
        """A tensor like that."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format)

    def check(self) -> None:
        """Raise ValueError for what our kernels have no plan for."""
        if len(self.shape) < 2 or min(self.shape) < 1 or self.dtype not in dispatch.DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dispatch.DTYPES)
            raise ValueError(f"expected [N, C, ...], not empty, of {kinds}; got {list(self.shape)} of {self.dtype}")


def layer_of(x: Tensor) -> Layer:
    return Layer(tuple(x.shape), x.dtype, memory_format_of(x), x.device)


def layers_of(model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, list[Layer]]:
    """The name of each of our modules that `model(*inputs, **options)` calls, and the different layers that it is.

    The model runs once, in evaluation and without gradients: nothing in it changes. Raises ValueError if it calls none.
    """
    found: dict[str, list[Layer]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, TritonBatchNorm):

            def note(norm: Any, given: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
                x = given[0] if given else named.get("input")
                if not isinstance(x, Tensor):
                    return
                statistics = norm.running_mean, norm.running_var
                tensors = x, *statistics, norm.weight, norm.bias, None, norm.num_batches_tracked
                layer = layer_of(x)._replace(why=dispatch.why_torch(tensors, statistics == (None, None)))
                if layer not in found.setdefault(name, []):
                    found[name].append(layer)

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with evaluation(model), eager(), torch.no_grad():
            model(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError("expected a model that calls tritonbn modules (see tritonbn.convert), but it called none")
    return found


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The flags alone: `eval()` of some modules does more, such as to merge weights."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def eager() -> Any:
    """Compiled models run as they were written: hooks would make torch compile them anew."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
