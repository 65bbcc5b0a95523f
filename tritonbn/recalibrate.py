"""Population statistics for inference: exact averages over many batches in place of moving ones."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from tritonbn import functional, private
from tritonbn.layers import eager, evaluation
from tritonbn.types import check_module

Model = TypeVar("Model", bound=nn.Module)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NEVER = "never called"
_PART = 1 << 22  # elements that are copied to float64 at once


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
    and unbiased variance s2 in each call of a norm:

        E[x] = sum(n * mu) / sum(n)        Var[x] = sum((n - 1) * s2) / sum(n - 1)

    which for batches of one size is the paper's E[mu] and m / (m - 1) * E[sigma2]. While this is measured, batch norm
    normalizes with each batch's own statistics, as in training, and everything else is in evaluation, without
    gradients. (`torch.optim.swa_utils.update_bn` has dropout and the like in training too, and gives a smaller last
    batch the weight of a full one.)

    Args:
        model: in training or evaluation, with batch norm that has running statistics: torch's, ours, or any subclass
            that calls `batch_norm` (torch's or ours) with them: the input of that call is what is measured.
            SyncBatchNorm measures what all processes were given, others know but their own.
        loader: batches of training data. Each is the input of `model`, or a list or tuple that begins with it.
        batches: how many of them to use at most, all by default.
        device: where inputs are moved first.
        forward: called as forward(model, batch) instead, for batches of any other kind.

    A norm that is called several times counts every call; `num_batches_tracked` becomes the number of calls. When
    anything fails, statistics and counters are what they were.

    Warns (UserWarning) which norms kept their statistics and counter, and why: never called; frozen, which is using
    the running statistics in a call, because of the norm's forward, an `eval()` in some forward, or a `train()` that
    the norm or a module around it overrides; computed without `batch_norm`, so that the input is not known.

    Raises ValueError where there is nothing to average: no such norm in the model, none that is measured, no batch.
    """
    check_module(model)
    if batches is not None and batches < 1:
        raise ValueError(f"expected at least 1 of batches, got {batches}")
    if device is not None and forward is not None:
        raise ValueError("expected device or forward, got both: forward has to move what it needs")
    names = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and _tracks(m)}
    if not names:
        raise ValueError("expected a model that has batch norm with running statistics, got one without")
    used = 0
    with _measuring(model, list(names)) as watch:
        for batch in islice(loader, batches):
            used += 1
            x = _input(batch, device) if forward is None else batch
            with watch:
                model(x) if forward is None else forward(model, x)
    if not used:
        raise ValueError("expected batches that reach a batch norm, got no batch")
    kept = {norm: reason for norm in names if (reason := watch.populations[norm].reason_to_keep())}
    listed = ", ".join(f"{names[norm] or type(norm).__name__} ({reason})" for norm, reason in islice(kept.items(), 10))
    listed += f" and {len(kept) - 10} more" if len(kept) > 10 else ""
    if len(kept) == len(names):
        why = f"called by {used} batches" if set(kept.values()) == {_NEVER} else f"that it can measure: {listed}"
        raise ValueError(f"expected batches that reach a batch norm, got none of {len(names)} {why}")
    if kept:  # before anything is written: a warning may be an error
        norms = "1 norm" if len(kept) == 1 else f"{len(kept)} norms"
        warnings.warn(f"recalibrate kept the statistics of {norms}: {listed}", UserWarning, stacklevel=2)
    for norm in names.keys() - kept.keys():
        watch.populations[norm].write(norm)
    return model


class _Population:
    """What a norm was given, in float64: values, their sum, their squares about the mean of each call."""

    def __init__(self) -> None:
        self.calls, self.values, self.freedom = 0, 0, 0
        self.sum = self.squares = torch.zeros((), dtype=torch.float64)
        self.called = self.measured = self.frozen = False

    def note_call(self, norm: nn.Module, given: object) -> None:
        """A forward pre-hook."""
        self.called = True

    @torch.no_grad()
    def add(self, x: Tensor, group: Any = None) -> None:
        """Count a call with x, [N, C, ...], or with the x of all processes of a group, each of which adds its own."""
        if x.numel() == 0 and group is None:
            return
        n, dims = x.numel() // x.shape[1], [0, *range(2, x.dim())]
        parts = torch.split(x, max(1, _PART * len(x) // max(1, x.numel())))
        if group is not None:
            n = int(_total(torch.tensor(n, device=x.device), group))
        if n > 0:
            total = _total(torch.stack([part.double().sum(dims, keepdim=True) for part in parts]).sum(0), group)
            squares = [(part - total / n).square().sum(dims, keepdim=True) for part in parts]
            self.calls, self.values, self.freedom = self.calls + 1, self.values + n, self.freedom + n - 1
            self.sum = self.sum + total.flatten()
            self.squares = self.squares + _total(torch.stack(squares).sum(0), group).flatten()

    def reason_to_keep(self) -> str | None:
        """Why the norm keeps its statistics; None if it does not."""
        if self.frozen:
            return "it uses its running statistics"
        if self.freedom > 0:
            return None
        if self.measured:
            return "given less than 2 values per channel"
        return "it passes its statistics to no batch_norm that we know" if self.called else _NEVER

    @torch.no_grad()
    def write(self, norm: Any) -> None:
        """Set the statistics and the counter of the norm."""
        norm.running_mean.copy_(self.sum / self.values)
        norm.running_var.copy_(self.squares / self.freedom)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(self.calls)


class _Watch(TorchFunctionMode):
    """Sees each call of batch_norm, and counts its input where it is given the running mean of a norm."""

    def __init__(self, populations: dict[_BatchNorm, _Population]) -> None:
        super().__init__()
        self.populations = populations
        self.norms = {id(norm.running_mean): norm for norm in populations}
        arguments = ("input", "running_mean", "running_var", "weight", "bias", "training")
        self.arguments: dict[Any, tuple[str, ...]] = {
            functional.batch_norm: arguments,
            functional.normalize: arguments,
            torch.nn.functional.batch_norm: arguments,
            torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
            # What SyncBatchNorm calls between several processes, in training only.
            torch.batch_norm_gather_stats_with_counts: ("input", "mean", "invstd", "running_mean"),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """func(*args, **kwargs). What it calls itself does not come here."""
        result = func(*args, **(kwargs or {}))
        if func is functional.normalize_two:
            for x, running_mean in (args[:2], args[7:9]):
                self.note(func, {"input": x, "running_mean": running_mean, "training": args[14]})
        elif func is functional.batch_norm_add:
            names = ("input", "running_mean", "running_var", "other", "other_running_mean")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            for x, running_mean in (("input", "running_mean"), ("other", "other_running_mean")):
                training = given.get("training", False)
                self.note(func, {"input": given[x], "running_mean": given[running_mean], "training": training})
        elif func in self.arguments:
            self.note(func, dict(zip(self.arguments[func], args, strict=False)) | (kwargs or {}))
        return result

    def note(self, func: Any, given: dict[str, Any]) -> None:
        """Count the input of one batch norm."""
        norm: Any = self.norms.get(id(given.get("running_mean")))
        if norm is None or private.is_backward():  # a backward (torch 2.8's) runs a checkpoint again
            return
        population = self.populations[norm]
        population.measured = True
        if not given.get("training", True):
            population.frozen = True
        elif func is torch.batch_norm_gather_stats_with_counts:
            group = getattr(norm, "process_group", None) or torch.distributed.group.WORLD
            population.add(given["input"], group)
        else:
            population.add(given["input"])


@contextmanager
def _measuring(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[_Watch]:
    """The norms in training, all else in evaluation. Afterwards all is as it was, whatever a forward put in its place.

    Norms are given copies of their statistics: training does not write to their own, a frozen norm reads its values.
    """
    frozen = _frozen_by_train(model)
    own = [(norm, name, getattr(norm, name)) for norm in norms for name in _STATISTICS]
    copies = {tensor: _clone(tensor) for _, _, tensor in own}  # norms that share a tensor share its copy
    shared = {norm.running_mean: _Population() for norm in norms}
    populations = {norm: shared[norm.running_mean] for norm in norms}
    with ExitStack() as stack:
        for scope in (torch.no_grad(), eager(), evaluation(model)):
            stack.enter_context(scope)
        for norm, name, tensor in own:
            stack.callback(setattr, norm, name, tensor)
            setattr(norm, name, copies[tensor])
        for norm, population in populations.items():
            norm.training = norm not in frozen
            if not type(norm).__module__.startswith(f"{__package__}."):  # a hook would keep ours from being fused
                stack.callback(norm.register_forward_pre_hook(population.note_call).remove)
        yield _Watch(populations)


def _frozen_by_train(model: nn.Module) -> set[nn.Module]:
    """The modules that `model.train()` leaves in evaluation; copies are asked, as it may do more than set flags."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    if all(type(module).train is nn.Module.train and "train" not in vars(module) for module in modules):
        return set()
    copies: dict[nn.Module | None, nn.Module] = {module: object.__new__(type(module)) for module in modules}
    for module in modules:
        own = vars(copies[module])
        own.update(vars(module))
        own["_modules"] = {name: copies.get(child) for name, child in module._modules.items()}
        for tensors in ("_parameters", "_buffers"):
            own[tensors] = {name: _clone(tensor) for name, tensor in own[tensors].items()}
    copies[model].train()
    return {module for module in modules if not copies[module].training}


def _clone(tensor: Tensor | None) -> Tensor | None:
    """A copy of the same kind; of what has no values yet, that itself."""
    if tensor is None or is_lazy(tensor):
        return tensor
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _total(part: Tensor, group: Any) -> Tensor:
    """The sum over the processes of the group, if there is one; in place."""
    if group is not None:
        torch.distributed.all_reduce(part, group=group)
    return part


def _tracks(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    if is_lazy(norm.running_mean):
        raise ValueError(f"expected batch norm with known channels, got {type(norm).__name__}: call the model first")
    return norm.track_running_stats


def _input(batch: Any, device: torch.device | str | int | None) -> Any:
    x = batch[0] if isinstance(batch, list | tuple) else batch
    return x if device is None else x.to(device)
