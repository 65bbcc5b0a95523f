"""Population statistics for inference: exact averages over many batches in place of moving ones."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from tritonbn.epilogue import check_module
from tritonbn.layers import eager, evaluation

Model = TypeVar("Model", bound=nn.Module)


def recalibrate(
    model: Model,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    device: torch.device | str | int | None = None,
    forward: Callable[[Model, Any], object] | None = None,
) -> Model:
    """Set the running statistics of every batch norm in `model` to those of the training data; return `model`.

    This is algorithm 2 of the batch normalization paper (arXiv:1502.03167): the means and unbiased variances of many
    training batches are averaged, in float64, where training keeps moving averages. With n values per channel, mean mu
    and unbiased variance s2 in each batch:

        E[x] = sum(n * mu) / sum(n)        Var[x] = sum((n - 1) * s2) / sum(n - 1)

    which for batches of one size is the paper's E[mu] and m / (m - 1) * E[sigma2]. While this is measured, batch norm
    normalizes with each batch's own statistics, as in training, and everything else is in evaluation, without
    gradients. (`torch.optim.swa_utils.update_bn` has dropout and the like in training too, and gives a smaller last
    batch the weight of a full one.)

    Args:
        model: with batch norm that has running statistics: torch's, ours, SyncBatchNorm, any subclass, frozen or not.
            SyncBatchNorm weighs the statistics of all processes by the n of its own; others know but their process.
        loader: batches of training data. Each is the input of `model`, or a list or tuple that begins with it.
        batches: how many of them to use at most, all by default.
        device: where inputs are moved first.
        forward: called as forward(model, batch) instead, for batches of any other kind.

    A norm that is called several times counts every call, one that is never called keeps its statistics;
    `num_batches_tracked` becomes the number of calls. When anything fails, statistics and counters are what they were.

    Raises ValueError where there is nothing to average: no such norm in the model, none that is called, no batch.
    """
    check_module(model)
    if batches is not None and batches < 1:
        raise ValueError(f"expected at least 1 of batches, got {batches}")
    if device is not None and forward is not None:
        raise ValueError("expected device or forward, got both: forward has to move what it needs")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and _tracks(module)]
    if not norms:
        raise ValueError("expected a model that has batch norm with running statistics, got one without")
    used = 0
    with ExitStack() as stack:
        for scope in (torch.no_grad(), eager(), evaluation(model)):
            stack.enter_context(scope)
        populations = {norm: stack.enter_context(_measured(norm)) for norm in norms}
        for batch in islice(loader, batches):
            used += 1
            if forward is not None:
                forward(model, batch)
            else:
                model(_input(batch, device))
    found = {norm: population for norm, population in populations.items() if population.calls}
    if not found:
        none_called = f"none of {len(norms)} called by {used} batches"
        raise ValueError(f"expected batches that reach a batch norm, got {none_called if used else 'no batch'}")
    for norm, population in found.items():
        population.write(norm)
    return model


class _Population:
    """Weighted sums over the calls of one batch norm, in float64 on its device."""

    def __init__(self) -> None:
        self.calls, self.values, self.freedom = 0, 0, 0
        self.mean = self.var = torch.zeros((), dtype=torch.float64)

    def add(self, norm: _BatchNorm, _: object, output: Tensor) -> None:
        """A forward hook: the running statistics are those of this call."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        n = output.numel() // norm.num_features
        self.calls, self.values, self.freedom = self.calls + 1, self.values + n, self.freedom + n - 1
        self.mean = self.mean + n * norm.running_mean.double()
        self.var = self.var + (n - 1) * norm.running_var.double()

    @torch.no_grad()
    def write(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(self.mean / self.values)
        norm.running_var.copy_(self.var / self.freedom)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(self.calls)


@contextmanager
def _measured(norm: _BatchNorm) -> Iterator[_Population]:
    """The norm in training mode, with stand-ins for its statistics that hold those of its last call.

    Nothing is written to its own, and half precision rounds nothing that is yet to be averaged: float32 is the least.
    """
    population, momentum = _Population(), norm.momentum
    kept = {name: getattr(norm, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    wide = torch.promote_types(kept["running_mean"].dtype, torch.float32)
    if wide != kept["running_mean"].dtype:  # with wide statistics, kernels take wide parameters only
        kept |= {name: parameter for name, parameter in norm._parameters.items() if parameter is not None}
    # First, before hooks that may change the output.
    hook = norm.register_forward_hook(population.add, prepend=True)
    try:
        norm.momentum, norm.training = 1.0, True
        for name, tensor in kept.items():
            if isinstance(tensor, nn.Parameter):
                setattr(norm, name, nn.Parameter(tensor.to(wide), requires_grad=False))
            elif tensor is not None:
                setattr(norm, name, torch.zeros_like(tensor, dtype=wide if tensor.is_floating_point() else None))
        yield population
    finally:
        hook.remove()
        norm.momentum = momentum
        for name, tensor in kept.items():
            setattr(norm, name, tensor)


def _tracks(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    if is_lazy(norm.running_mean):
        raise ValueError(f"expected batch norm with known channels, got {type(norm).__name__}: call the model first")
    return norm.track_running_stats


def _input(batch: Any, device: torch.device | str | int | None) -> Any:
    x = batch[0] if isinstance(batch, list | tuple) else batch
    return x if device is None else x.to(device)
