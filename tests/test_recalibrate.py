"""recalibrate: exact population statistics, whatever the batches and the modules, or nothing changed at all."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import tritonbn
from tests.parity import random
from tests.test_layers import state_of
from tritonbn.functional import batch_norm

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
    tritonbn.recalibrate(model, given)
    calls = [call for x in given for call in (x, 2 * x[:1])]
    torch.testing.assert_close(statistics(model.twice), population(calls), rtol=1e-12, atol=1e-12)
    assert int(model.twice.num_batches_tracked) == 4
    assert int(model.never.num_batches_tracked) == 0
    assert model.never.running_mean.tolist() == [7] * C
    assert model.never.momentum == 0.1


def test_only_batch_norm_trains_meanwhile() -> None:
    model = Several().double()
    model.drop.eval()
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
