"""recalibrate: exact population statistics, whatever the batches and the modules, or nothing changed at all."""

import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import tritonbn
from tests.parity import random
from tests.test_layers import state_of
from tritonbn import launch
from tritonbn.functional import batch_norm
from tritonbn.modules import TritonBatchNorm

C = 3


def batches(*sizes: int, shape: tuple[int, ...] = (4, 2), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """[size, C, *shape] each, of another mean and spread in every channel and batch."""
    spread = torch.tensor([1.0, 5.0, 0.2]).double().view(1, C, *[1] * len(shape))
    return [(random(n, C, *shape, seed=n + i) * spread + i + 3 * spread).to(dtype) for i, n in enumerate(sizes)]


def population(given: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The formulas, in float64: every value counts once, and so does every degree of freedom."""
    rows = [x.double().transpose(0, 1).flatten(1) for x in given]
    freedom = sum(row.shape[1] - 1 for row in rows)
    squares = torch.stack([(row - row.mean(1, keepdim=True)).square().sum(1) for row in rows])
    return torch.cat(rows, 1).mean(1), squares.sum(0) / freedom


def statistics(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.running_mean.double(), norm.running_var.double()


NORMS: dict[str, Callable[[], Any]] = {
    "torch": lambda: nn.BatchNorm2d(C),
    "ours": lambda: tritonbn.BatchNorm2d(C),
    "with-activation": lambda: tritonbn.BatchNormAct2d(C, "silu"),
    "sync": lambda: nn.SyncBatchNorm(C),
    "cumulative": lambda: tritonbn.BatchNorm2d(C, momentum=None),
    "never-moving": lambda: tritonbn.BatchNorm2d(C, momentum=0.0),
    "not-affine": lambda: tritonbn.BatchNorm2d(C, affine=False),
    "frozen": lambda: tritonbn.BatchNorm2d(C).eval(),
}
all_norms = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)


@all_norms
def test_statistics_are_those_of_all_values(make: Callable[[], Any], device: torch.device) -> None:
    given = batches(5, 2, 7)
    norm = make().double().to(device)
    norm.running_mean.fill_(float("nan"))  # as a training that failed leaves it
    before = norm.training, norm.momentum
    assert tritonbn.recalibrate(norm, given, device=device) is norm
    torch.testing.assert_close(statistics(norm), tuple(t.to(device) for t in population(given)), rtol=1e-12, atol=1e-12)
    assert int(norm.num_batches_tracked) == 3
    assert (norm.training, norm.momentum) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [nn.BatchNorm2d, tritonbn.BatchNorm2d])
def test_nothing_is_rounded_before_it_is_averaged(make: Any, dtype: torch.dtype, device: torch.device) -> None:
    """In half precision each batch's statistics round to other values than their average does."""
    given = batches(*[4] * 30, dtype=dtype)
    norm = make(C, device=device, dtype=dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    kept = norm.weight, norm.bias, norm.running_mean, norm.running_var
    tritonbn.recalibrate(norm, given, device=device)
    for ours, exact in zip((norm.running_mean, norm.running_var), population(given), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=0)
    now = norm.weight, norm.bias, norm.running_mean, norm.running_var
    assert all(one is other for one, other in zip(kept, now, strict=True))


def network(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    widths = (C, 4, 5)
    blocks = [
        [nn.Conv2d(a, b, 3, padding=1), norm(b), nn.ReLU()] for a, b in zip(widths, widths[1:] + (3,), strict=True)
    ]
    return nn.Sequential(*[module for block in blocks for module in block]).double()


def of_the_figure(model: nn.Sequential, given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Algorithm 2 by hand: each layer's input is made of batches that were normalized by their own statistics."""
    found, xs = [], given
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            n = torch.tensor([[x.numel() // x.shape[1]] for x in xs])
            var, mean = (torch.stack(each) for each in zip(*[torch.var_mean(x, (0, 2, 3)) for x in xs], strict=True))
            mean, var = (n * mean).sum(0) / n.sum(), ((n - 1) * var).sum(0) / (n - 1).sum()
            found.append((mean, var))
            xs = [nn.functional.batch_norm(x, None, None, module.weight, module.bias, True) for x in xs]
        else:
            xs = [module(x) for x in xs]
    return found


@pytest.mark.parametrize("fuse", [None, False, True], ids=["torch", "converted", "fused"])
@torch.no_grad()
def test_each_layer_sees_batches_normalized_before(fuse: bool | None, device: torch.device) -> None:
    given = [x.to(device) for x in batches(3, 4, 2)]
    model = network().to(device)
    expected = of_the_figure(model, given)
    if fuse is not None:
        tritonbn.convert(model, fuse=fuse)
    tritonbn.recalibrate(model.eval(), given)
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    for norm, exact in zip(norms, expected, strict=True):
        torch.testing.assert_close(statistics(norm), exact, rtol=1e-11, atol=1e-11)


def test_equal_batches_give_what_update_bn_gives(device: torch.device) -> None:
    given = batches(4, 4, 4)
    ours, theirs = network().to(device), network().to(device)
    tritonbn.recalibrate(ours, given, device=device)
    update_bn(given, theirs, device=device)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)


def test_moving_averages_agree_after_many_batches() -> None:
    """With momentum 0.1 the moving average of iid batches has the variance 0.1 / (2 - 0.1) of one batch's statistic.

    A batch mean of n values has the variance s2 / n, an unbiased variance of normal values 2 s4 / (n - 1): five
    standard deviations for each of 6 figures, and the population's own error is far below.
    """
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([1.0, 5.0, 0.2]).double()
    given = [torch.randn(50, C, generator=generator).double() * scale + 1 for _ in range(300)]
    moving, exact = nn.BatchNorm1d(C).double(), nn.BatchNorm1d(C).double()
    for x in given:
        moving(x)
    tritonbn.recalibrate(exact, given)
    deviation = (0.1 / 1.9) ** 0.5
    (mean, var), (moving_mean, moving_var) = statistics(exact), statistics(moving)
    assert ((moving_mean - mean).abs() < 5 * deviation * (var / 50).sqrt()).all()
    assert ((moving_var - var).abs() < 5 * deviation * var * (2 / 49) ** 0.5).all()
    torch.testing.assert_close(var.sqrt(), scale, rtol=0.02, atol=0)
    assert not torch.equal(moving_var, var)


@pytest.mark.parametrize("fuse", [False, True])
def test_folding_afterwards_keeps_the_outputs(fuse: bool) -> None:
    model = tritonbn.convert(network(), fuse=fuse)
    tritonbn.recalibrate(model, batches(3, 4)).eval()
    folded, (x,) = tritonbn.fold(model), batches(2)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


class Several(nn.Module):
    """A norm that is called twice, one that never is, one without statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.twice: Any = tritonbn.BatchNorm2d(C, momentum=0.3)
        self.never: Any = tritonbn.BatchNorm2d(C)
        self.own = nn.BatchNorm2d(C, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.modes: list[tuple[bool, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, self.twice.training, self.own.training, self.drop.training))
        y: Tensor = self.own(self.twice(self.drop(x)) + self.twice(2 * x[:1]))
        assert not y.requires_grad
        return y


def test_every_call_counts_and_what_is_not_called_keeps_its_statistics() -> None:
    model, given = Several().double(), batches(4, 2)
    model.never.running_mean.fill_(7)
    message = r"^recalibrate kept the statistics of 1 norm: never \(never called\)$"
    with pytest.warns(UserWarning, match=message) as warned:
        tritonbn.recalibrate(model, given)
    assert [warning.filename for warning in warned] == [__file__]
    calls = [call for x in given for call in (x, 2 * x[:1])]
    torch.testing.assert_close(statistics(model.twice), population(calls), rtol=1e-12, atol=1e-12)
    assert int(model.twice.num_batches_tracked) == 4
    assert int(model.never.num_batches_tracked) == 0
    assert model.never.running_mean.tolist() == [7] * C
    assert model.never.momentum == 0.1


def test_only_batch_norm_trains_meanwhile() -> None:
    model = Several().double()
    model.drop.eval()
    with pytest.warns(UserWarning, match="never called"):
        tritonbn.recalibrate(model, batches(4, 2))
    assert model.modes == [(False, True, False, False)] * 2
    assert [module.training for module in model.modules()] == [True, True, True, True, False]


def test_kinds_of_batches() -> None:
    x, y = batches(3, 4)
    for loader in ([x, y], [[x, 0], (y, 1)], iter([x, y]), (batch for batch in (x, y))):
        norm = tritonbn.recalibrate(nn.BatchNorm2d(C).double(), loader)
        torch.testing.assert_close(statistics(norm), population([x, y]))
    norm = nn.BatchNorm2d(C).double()
    tritonbn.recalibrate(norm, [{"image": x}, {"image": y}], forward=lambda model, batch: model(batch["image"]))
    torch.testing.assert_close(statistics(norm), population([x, y]))


def test_no_batch_more_than_asked_for_is_loaded() -> None:
    loaded = []

    def loader() -> Iterator[Tensor]:
        for x in batches(2, 3, 4, 5):
            loaded.append(len(x))
            yield x

    norm = tritonbn.recalibrate(nn.BatchNorm2d(C).double(), loader(), batches=2)
    torch.testing.assert_close(statistics(norm), population(batches(2, 3)))
    assert loaded == [2, 3]


def test_output_hooks_and_other_layouts_do_not_disturb() -> None:
    class Last(nn.BatchNorm1d):
        """Channels last, and n is not to be read off a dimension."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.transpose(1, 2)).transpose(1, 2)

    (x,) = batches(4, shape=(5,))
    norm = Last(C).double()
    norm.register_forward_hook(lambda module, given, y: y.sum())
    tritonbn.recalibrate(norm, [x.transpose(1, 2), x.transpose(1, 2)[:2]])
    torch.testing.assert_close(statistics(norm), population([x, x[:2]]))


# What a norm does in its forward: the function's arguments, not what it writes or returns, say what is measured.


class OwnMomentum(nn.BatchNorm2d):
    """Not replaced by one call, nor by many."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(input, mean, var, self.weight, self.bias, self.training, 0.05, self.eps)


class ByName(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        assert self.running_var is not None
        return F.batch_norm(training=self.training, running_var=self.running_var, input=input,
                            weight=self.weight, running_mean=self.running_mean)  # fmt: skip


class ByTorch(nn.BatchNorm2d):
    """torch's own operation, whose arguments have another order; positions and names."""

    def forward(self, input: Tensor) -> Tensor:
        rest: dict[str, Any] = {"training": self.training, "momentum": 0.1, "eps": self.eps, "cudnn_enabled": True}
        return torch.batch_norm(input, self.weight, self.bias, self.running_mean, running_var=self.running_var, **rest)


class InTwo(nn.BatchNorm2d):
    """A tuple of what two halves of the batch gave."""

    def forward(self, input: Tensor) -> Any:
        return tuple(super(InTwo, self).forward(half) for half in input.chunk(2))


class Sparse:
    """A container of [values, C]."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


class OfSparse(nn.BatchNorm1d):
    def forward(self, input: Any) -> Any:
        return Sparse(super().forward(input.features))


class WritesNothing(nn.BatchNorm2d):
    """Normalizes as in training, and puts other tensors in the place of its statistics afterwards."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var, self.num_batches_tracked = self.running_mean, self.running_var, torch.tensor(100)
        y = F.batch_norm(input, mean, var, self.weight, self.bias, True, 0.0)
        for tensor in (mean, var):
            assert tensor is not None
            tensor.fill_(-5)
        return y


class Checkpointed(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, input, use_reentrant=False)
        return y


class WithoutGrad(nn.BatchNorm2d):
    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class InInference(nn.BatchNorm2d):
    """Every other batch."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        with torch.inference_mode(self.calls % 2 == 1):
            return super().forward(input)


def halves(x: Tensor) -> list[Tensor]:
    return list(x.chunk(2))


def features(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).t()


MEASURED: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Any], Callable[[Tensor], list[Tensor]]]] = {
    # The norm, its input and its calls.
    "own-momentum": (lambda: OwnMomentum(C), lambda x: x, lambda x: [x]),
    "by-name": (lambda: ByName(C), lambda x: x, lambda x: [x]),
    "by-torch": (lambda: ByTorch(C), lambda x: x, lambda x: [x]),
    "tuple": (lambda: InTwo(C), lambda x: x, halves),
    "sparse": (lambda: OfSparse(C), lambda x: Sparse(features(x)), lambda x: [features(x)]),
    "writes-nothing": (lambda: WritesNothing(C), lambda x: x, lambda x: [x]),
    "checkpoint": (lambda: Checkpointed(C), lambda x: x, lambda x: [x]),
    "no-grad": (lambda: WithoutGrad(C), lambda x: x, lambda x: [x]),
    "inference": (lambda: InInference(C), lambda x: x, lambda x: [x]),
    "momentum-1": (lambda: tritonbn.BatchNorm2d(C, momentum=1.0), lambda x: x, lambda x: [x]),
}


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(("make", "given", "calls"), MEASURED.values(), ids=MEASURED)
@pytest.mark.usefixtures("no_warning")
def test_what_is_measured_is_what_batch_norm_was_given(make: Any, given: Any, calls: Any) -> None:
    norm, xs = make().double(), batches(5, 2, 7)
    norm.running_var.fill_(float("nan"))
    before, momentum = [id(tensor) for tensor in norm.buffers()], norm.momentum
    tritonbn.recalibrate(norm, xs, forward=lambda model, x: model(given(x)))
    expected = [call for x in xs for call in calls(x)]
    torch.testing.assert_close(statistics(norm), population(expected), rtol=1e-12, atol=1e-12)
    assert int(norm.num_batches_tracked) == len(expected)
    assert [id(tensor) for tensor in norm.buffers()] == before
    assert (norm.momentum, norm.training) == (momentum, True)
    assert not norm._forward_pre_hooks


class FrozenNorm(nn.BatchNorm2d):
    """Its forward always uses the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FrozenByHand(nn.BatchNorm2d):
    """As in detection: batch norm as a scale and a shift."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return input * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


class NeverTrains(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class Frozen(nn.Module):
    """A norm that may be frozen, and one whose input that one gives."""

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(C, 4, 3, padding=1), norm(4)
        self.head, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)
        nn.init.uniform_(self.bn.weight, 0.5, 2)
        self.bn.num_batches_tracked.fill_(40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.head(torch.relu(self.bn(self.conv(x)))))
        return y


class FrozenByForward(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.eval()
        return super().forward(x)


class FrozenByTrain(Frozen):
    """The parent's train() knows, and does more than that: it is not ours to call."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.bn.eval()
        with torch.no_grad():
            self.conv.weight.fill_(0)
        return self


def never_trained(model: Frozen) -> Frozen:
    """The way of models that are frozen from outside."""
    model.bn.eval()
    model.bn.train = lambda mode=True: model.bn
    return model


USES = "it uses its running statistics"
FROZEN: dict[str, tuple[Callable[[], Frozen], str]] = {
    "forward": (FrozenByForward, USES),
    "subclass": (lambda: Frozen(FrozenNorm), USES),
    "train-of-norm": (lambda: Frozen(NeverTrains), USES),
    "train-of-parent": (FrozenByTrain, USES),
    "train-of-parent-evaluating": (lambda: FrozenByTrain().requires_grad_(False), USES),
    "train-of-instance": (lambda: never_trained(Frozen()), USES),
    "by-hand": (lambda: Frozen(FrozenByHand), "it passes its statistics to no batch_norm that we know"),
}


@pytest.mark.parametrize(("make", "reason"), FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("fuse", [None, False, True], ids=["torch", "converted", "fused"])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_norms_keep_their_statistics(
    make: Callable[[], Frozen], reason: str, fuse: bool | None, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    model, given = make().double(), batches(4, 3)
    for module in model.modules():
        module.training = module.training and training
    if fuse is not None:
        tritonbn.convert(model, fuse=fuse)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    bn, seen = model.bn, []
    with torch.no_grad():
        for x in given:
            y = F.batch_norm(model.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
            seen.append(model.head(torch.relu(y)))
    message = f"recalibrate kept the statistics of 1 norm: bn ({reason})"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        assert tritonbn.recalibrate(model, given) is model
    after = model.state_dict()
    for name in before.keys() - {f"bn2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}:
        assert torch.equal(before[name], after[name]), name
    torch.testing.assert_close(statistics(model.bn2), population(seen), rtol=1e-11, atol=1e-11)
    assert model.bn2.num_batches_tracked == 2
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_a_norm_that_is_frozen_in_some_calls_keeps_its_statistics() -> None:
    norm, modes = nn.BatchNorm2d(C).double(), iter([True, False, True])
    model = nn.Sequential(norm, nn.BatchNorm2d(C).double())
    seen: list[Tensor] = []

    def forward(model: nn.Sequential, x: Tensor) -> None:
        norm.training = next(modes)
        seen.append(norm(x))
        model[1](seen[-1])

    with pytest.warns(UserWarning, match=r"of 1 norm: 0 \(it uses its running statistics\)$"):
        tritonbn.recalibrate(model, batches(3, 4, 2), forward=forward)
    assert statistics(norm)[0].tolist() == [0] * C
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(statistics(model[1]), population(seen), rtol=1e-12, atol=1e-12)


def test_nothing_but_frozen_norms_is_an_error() -> None:
    model = Frozen(FrozenNorm).double()
    model.bn2 = FrozenNorm(4).double()
    message = r"got none of 2 that it can measure: bn \(it uses its running statistics\), bn2 \(it uses"
    with pytest.raises(ValueError, match=message):
        tritonbn.recalibrate(model, batches(3))


class Twice(nn.Module):
    """One norm under two names, or two with the same statistics."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(3 * self.one(x) + 1)
        return y


def one_norm() -> Twice:
    norm = nn.BatchNorm2d(C).double()
    return Twice(norm, norm)


def one_statistic() -> Twice:
    model = Twice(nn.BatchNorm2d(C).double(), nn.BatchNorm2d(C).double())
    model.other._buffers.update(model.one._buffers)
    return model


@pytest.mark.parametrize("make", [one_norm, one_statistic])
@pytest.mark.usefixtures("no_warning")
def test_shared_statistics_count_the_calls_of_all(make: Callable[[], Twice]) -> None:
    model, given = make(), batches(4, 2)
    shared = model.one.running_mean
    tritonbn.recalibrate(model, given)
    calls = given + [3 * F.batch_norm(x, None, None, training=True) + 1 for x in given]
    for norm in (model.one, model.other):
        torch.testing.assert_close(statistics(norm), population(calls), rtol=1e-12, atol=1e-12)
        assert norm.num_batches_tracked == 4
        assert norm.running_mean is shared


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_backward_computes_again_is_not_counted_again(reentrant: bool, direct: bool) -> None:
    """Models whose forward differentiates: forces, for one."""

    def forward(norm: nn.Module, x: Tensor) -> None:
        with torch.enable_grad():
            y: Any = checkpoint(norm, x.requires_grad_(), use_reentrant=reentrant)
            loss = y.square().sum()
            if direct:  # torch.autograd.backward does no more in torch 2.8, and no mode sees it
                engine: Any = torch.autograd.graph._engine_run_backward
                engine((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
            else:
                loss.backward()

    norm, given = nn.BatchNorm2d(C).double(), batches(4, 2)
    tritonbn.recalibrate(norm, given, forward=forward)
    torch.testing.assert_close(statistics(norm), population(given), rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == 2


@pytest.mark.usefixtures("no_warning")
def test_calls_without_values_and_calls_that_fail_do_not_count() -> None:
    def forward(norm: nn.Module, x: Tensor) -> None:
        norm(x[:0])
        norm(x)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(x[:1, :, :1, :1])

    norm, given = nn.BatchNorm2d(C).double(), batches(4, 2)
    tritonbn.recalibrate(norm, given, forward=forward)
    torch.testing.assert_close(statistics(norm), population(given), rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == 2


def test_calls_without_values_are_no_calls() -> None:
    def forward(model: nn.Sequential, x: Tensor) -> None:
        for norm, values in zip(model, (x, x[:0], x[:, :0]), strict=True):
            norm(values)

    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.BatchNorm2d(0, affine=False)).double()
    few = "(given less than 2 values per channel)"
    with pytest.warns(UserWarning, match=re.escape(f"of 2 norms: 1 {few}, 2 {few}")):
        tritonbn.recalibrate(model, batches(2), forward=forward)
    assert [norm.num_batches_tracked for norm in model] == [1, 0, 0]


@pytest.mark.parametrize("part", [1, 30, 1 << 22])
def test_float64_whatever_the_dtype_and_the_size(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of thousands of standard deviations; large tensors are read in parts."""
    monkeypatch.setattr(sys.modules["tritonbn.recalibrate"], "_PART", part)
    given = [(x / 4 + 4096).float() for x in batches(5, 2)]
    norm = tritonbn.recalibrate(nn.BatchNorm2d(C), given)
    mean, var = population(given)
    torch.testing.assert_close(statistics(norm), (mean.float().double(), var.float().double()), rtol=0, atol=0)


def test_half_precision_runs_as_in_training() -> None:
    kinds: list[object] = []

    class Half(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            kinds.extend((input.dtype, self.weight.dtype, self.running_mean.dtype, y.dtype))  # type: ignore[union-attr]
            return y

    tritonbn.recalibrate(Half(C).bfloat16(), batches(3, dtype=torch.bfloat16))
    assert kinds == [torch.bfloat16] * 4


def test_a_fused_model_stays_fused_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    normalize = TritonBatchNorm.normalize

    def note(norm: TritonBatchNorm, x: Tensor, activation: Any = None, *rest: Any) -> Tensor:
        ran.append(str(activation))
        return normalize(norm, x, activation, *rest)

    model = tritonbn.convert(network(), fuse=True)
    monkeypatch.setattr(TritonBatchNorm, "normalize", note)
    tritonbn.recalibrate(model, batches(3))
    assert ran == ["relu"] * 3


def test_many_names_are_shortened() -> None:
    model = nn.Sequential(*[nn.BatchNorm2d(C) for _ in range(14)]).double()
    with pytest.warns(UserWarning, match=r"of 13 norms: 1 \(never called\), 2 .*, 10 \(never called\) and 3 more$"):
        tritonbn.recalibrate(model, batches(3), forward=lambda model, x: model[0](x))


def test_a_warning_made_an_error_changes_nothing() -> None:
    model = Several().double()
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="never called"):
            tritonbn.recalibrate(model, batches(3))
    after = state_of(model)
    assert after[1] == before[1]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)


def synchronized(rank: int, folder: str) -> None:
    """One of two processes, on the CPU: torch's kernels for it are of CUDA, so these are written out here."""
    library: Any = cast(Any, torch.library).Library("aten", "IMPL")

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, (var + eps).rsqrt()

    def gather(x: Tensor, means: Tensor, scales: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        running_mean, running_var, momentum, eps, n = rest
        mean = (n[:, None] * means).sum(0) / n.sum()
        var = (n[:, None] * (scales**-2 - eps + (means - mean) ** 2)).sum(0) / n.sum()
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n.sum() / (n.sum() - 1), momentum)
        return mean, (var + eps).rsqrt()

    def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Tensor:
        weight, bias, mean, scale = (v.view(-1, 1, 1) for v in (weight, bias, mean, scale))
        return (x - mean) * scale * weight + bias

    for name, kernel in (("stats", stats), ("gather_stats_with_counts", gather), ("elemt", elemt)):
        library.impl(f"batch_norm_{name}", kernel, "CPU")
    torch._C._get_privateuse1_backend_name = lambda: "cpu"
    torch.cuda.is_available = lambda: False  # this process is a fork of one that may have used it
    patience = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", patience, rank=rank, world_size=2)
    model = nn.Sequential(nn.SyncBatchNorm(C), nn.BatchNorm2d(C), nn.SyncBatchNorm(C)).double()
    model[2].eval()
    forward = lambda model, x: model[1](model[0](x)) if rank == 1 else model[0](x)  # noqa: E731
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tritonbn.recalibrate(model, SHARES[rank], forward=forward)
    torch.save((model.state_dict(), [str(each.message) for each in warned]), Path(folder, str(rank)))
    torch.distributed.destroy_process_group()


# Of two processes: other sizes, one value per channel, nothing.
SHARES = (
    [*batches(3, 4), batches(2)[0][:0], batches(1, shape=(1, 1))[0]],
    [*batches(5, 2), *batches(3, 1)],
)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_synchronized_norms_measure_what_all_processes_see(tmp_path: Path) -> None:
    cast(Any, start_processes)(synchronized, (str(tmp_path),), nprocs=2, start_method="fork")
    calls = [[x.transpose(0, 1).flatten(1).t() for x in both] for both in zip(*SHARES, strict=True)]
    expected = population([torch.cat(both) for both in calls])
    for rank in range(2):
        state, warned = torch.load(tmp_path / str(rank))
        found = state["0.running_mean"], state["0.running_var"]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert state["0.num_batches_tracked"] == 4
        names = ["2 (never called)"] if rank == 1 else ["1 (never called)", "2 (never called)"]
        assert warned[0].endswith(": " + ", ".join(names))


def test_a_compiled_model_runs_as_it_was_written() -> None:
    compiled = []

    def backend(graph: Any, given: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model, given = network(), batches(3, 2)
    expected = copy.deepcopy(model)
    quick: Any = torch.compile(model, backend=backend)
    assert tritonbn.recalibrate(quick, given) is quick
    tritonbn.recalibrate(expected, given)
    assert compiled == []
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def broken_loader() -> Iterator[Tensor]:
    yield from batches(3, 2)
    raise OSError("a file cannot be read")


def interrupted() -> Iterator[Tensor]:
    yield from batches(3)
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "loader": (broken_loader, OSError, "a file cannot be read"),
    "interruption": (interrupted, KeyboardInterrupt, "^$"),
    "one-value-per-channel": (
        lambda: batches(3, 1, shape=(1, 1)),
        ValueError,
        "Expected more than 1 value per channel",
    ),
    "channels": (lambda: [*batches(3), torch.zeros(2, C + 1, 4, 2).double()], RuntimeError, "channels"),
    "empty": (lambda: [], ValueError, "expected batches that reach a batch norm, got no batch"),
}


@pytest.mark.parametrize(("loader", "error", "message"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_failure_changes_nothing(
    loader: Callable[[], Any], error: type[BaseException], message: str, fuse: bool, dtype: torch.dtype
) -> None:
    model: Any = tritonbn.convert(network(), fuse=fuse).to(dtype)
    model[1].eval()
    model[1].running_mean.fill_(0.7)
    model[4].momentum = None
    before = state_of(model)
    with pytest.raises(error, match=message):
        tritonbn.recalibrate(model, (x.to(dtype) for x in loader()))
    after = state_of(model)
    assert after[1] == before[1]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert [model[i].momentum for i in (1, 4, 7)] == [0.1, None, 0.1]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        pytest.param(nn.Linear(3, 3), {}, "got one without", id="no-norm"),
        pytest.param(nn.BatchNorm2d(C, track_running_stats=False), {}, "got one without", id="no-statistics"),
        pytest.param(nn.LazyBatchNorm2d(), {}, "got LazyBatchNorm2d: call the model first", id="lazy"),
        pytest.param(nn.BatchNorm2d(C), {"batches": 0}, "expected at least 1 of batches, got 0", id="batches"),
        pytest.param(nn.BatchNorm2d(C), {"device": "cpu", "forward": print}, "got both", id="device-and-forward"),
        pytest.param(nn.BatchNorm2d(C), {"forward": lambda m, x: x}, "none of 1 called by 2 batches", id="not-called"),
    ],
)
def test_nothing_to_average(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tritonbn.recalibrate(model, batches(3, 2), **options)


def test_no_module_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"expected torch\.nn\.Module, got function"):
        tritonbn.recalibrate(batch_norm, [])  # type: ignore[type-var]
