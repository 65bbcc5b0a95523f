"""fold: what goes into the layer before, what does not and why, and that outputs stay."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import tritonbn
from tests.fusing import CHANNELS, body, converted, convolution, images, net, norm
from tests.parity import random
from tritonbn.fold import Folded
from tritonbn.fused_forward import is_installed

fold_module: Any = importlib.import_module("tritonbn.fold")


def used(model: Any, *shape: int) -> Any:
    """In float64 and evaluation mode, with running statistics of data."""
    model = model.double()
    for seed in range(3):
        model(random(*(shape or (2, CHANNELS, 4, 4)), seed=seed))
    return model.eval()


def statuses(model: nn.Module) -> list[str]:
    return [row.status for row in tritonbn.report(model).rows]


LAYERS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv1d": (lambda: [nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)], (4, 2, 5)),
    "conv2d": (lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)], (2, 2, 5, 5)),
    "conv2d-without-bias": (lambda: [nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)], (2, 2, 5, 5)),
    "conv2d-groups-padding": (lambda: [nn.Conv2d(4, 4, 3, groups=2, padding=2), nn.BatchNorm2d(4)], (2, 4, 5, 5)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (2, 2, 3, 3, 3)),
    "transposed": (lambda: [nn.ConvTranspose2d(2, 3, 3, stride=2), nn.BatchNorm2d(3)], (2, 2, 3, 3)),
    "linear": (lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3)], (5, 4)),
    "linear-without-bias": (lambda: [nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)], (5, 4)),
    "norm-without-weights": (lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)], (5, 4)),
    "ours": (lambda: [nn.Conv2d(2, 3, 1), tritonbn.BatchNorm2d(3)], (2, 2, 5, 5)),
    "ours-with-activation": (lambda: [nn.Conv2d(2, 3, 1), tritonbn.BatchNormAct2d(3, "silu")], (2, 2, 5, 5)),
    "twice": (lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)], (5, 4)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_folded_into_the_layer_before(make: Callable[[], list[nn.Module]], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = used(nn.Sequential(*make()), *shape)
    state = copy.deepcopy(model.state_dict())
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded"] * (len(model) // 2)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(random(*shape)), model(random(*shape)))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def forward(self: Any, x: Tensor) -> Any:
    y = self.relu(self.bn(self.conv(x)))
    return self.relu(self.bn2(self.conv2(y)) + x)


@pytest.mark.parametrize("prepare", [copy.deepcopy, tritonbn.convert, converted], ids=["torch", "converted", "fused"])
def test_residual_block(prepare: Callable[[Any], Any]) -> None:
    model = used(prepare(net(forward)))
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded", "folded"]
    assert not is_installed(folded)
    torch.testing.assert_close(folded(images()), model(images()))


def test_norm_with_activation_and_residual() -> None:
    model = used(net(lambda self, x: self.bn(self.conv(x), x), bn=tritonbn.BatchNormAct2d(CHANNELS)))
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded", "convertible"]
    torch.testing.assert_close(folded(images()), model(images()))


def test_what_is_left_stays_fused() -> None:
    def both(self: Any, x: Tensor) -> Any:
        return self.relu(self.bn2(self.relu(self.bn(self.conv(x)))))

    model = used(converted(net(both)))
    folded = tritonbn.fold(model)
    assert statuses(folded) == ["folded", "replaced"]
    assert tritonbn.report(folded).rows[1].fused == "relu"
    assert is_installed(folded)
    torch.testing.assert_close(folded(images()), model(images()))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, output: None)
    return module


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(convolution(), "weight", nn.Identity())


def conv_twice(self: Any, x: Tensor) -> Any:
    return self.bn(self.conv(x)) + self.conv(x)


def conv_used_twice(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.bn(y) + y


def weight_read(self: Any, x: Tensor) -> Any:
    return self.bn(self.conv(x)) + self.conv.weight.mean()


def optional(self: Any, x: Tensor, raw: bool = False) -> Any:
    y = self.conv(x)
    return y if raw else self.bn(y)


def optional_tensor(self: Any, x: Tensor, skip: Any = None) -> Any:
    y = self.bn(self.conv(x))
    return y if skip is None else y + self.conv(skip)


def flagged(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.bn(y) if self.use_bn else y


def in_a_closure(self: Any, x: Tensor) -> Any:
    return checkpoint(lambda x: self.conv(x), x, use_reentrant=False) + self.bn(self.conv(x))


def by_its_parts(self: Any, x: Tensor) -> Any:
    y = self.bn(self.conv(x))
    for module in self.children():
        if isinstance(module, nn.Conv2d):
            y = y + module(x)
    return y


def with_flag(forward: Any) -> Any:
    model = net(forward)
    model.use_bn = True
    return model


def with_method(model: Any) -> Any:
    """A method besides the forward that shows what the layer returns."""

    def features(self: Any, x: Tensor) -> Any:
        return self.conv(x)

    type(model).features = features
    return model


def with_list(model: Any) -> Any:
    vars(model)["every"] = [{"first": model.conv}]
    return model


def with_closure(model: Any) -> Any:
    conv = model.conv
    vars(model)["function"] = lambda x: conv(x)
    return model


class Parent(nn.Module):
    """Calls the layer of its child besides."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.block, self.how = body(nn.ReLU()), how

    def forward(self, x: Tensor) -> Any:
        y = self.block(x)
        if y.sum() > -1e9:
            y = y + F.conv2d(x, self.block[0].weight, padding=1)  # type: ignore[arg-type]
        return y


NO_LAYER = "not folded: its input is not what one convolution or linear layer returns"
ELSEWHERE = "not folded: the output of the layer before it goes elsewhere, too"
NOT_FOLDED: dict[str, tuple[Callable[[], Any], str]] = {
    "norm-first": (lambda: net(lambda self, x: self.bn(x)), NO_LAYER),
    "activation-between": (lambda: net(lambda self, x: self.bn(self.conv(x).relu())), NO_LAYER),
    "output-used-twice": (lambda: net(conv_used_twice), NO_LAYER),
    "conv-called-twice": (lambda: net(conv_twice), ELSEWHERE),
    "weight-read": (lambda: net(weight_read), "not folded: its .weight is read, or that of the layer before it"),
    "norm-called-twice": (lambda: net(lambda self, x: self.bn(self.conv(self.bn(self.conv2(x))))), NO_LAYER),
    "two-names": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), **dict.fromkeys(("conv", "same"), convolution())),
        "not folded: it, or the layer before it, has a second name",
    ),
    "parametrized": (lambda: net(lambda self, x: self.bn(self.conv(x)), conv=parametrized()), NO_LAYER),
    "hook-on-conv": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), conv=hooked(convolution())),
        "not folded: a hook watches it or the layer before it",
    ),
    "hook-on-norm": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), bn=hooked(norm())),
        "not folded: a hook watches it or the layer before it",
    ),
    "no-statistics": (
        lambda: net(lambda self, x: self.bn(self.conv(x)), bn=nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
        "not folded: it has no running statistics",
    ),
    "transposed-groups": (
        lambda: net(
            lambda self, x: self.bn(self.conv(x)), conv=nn.ConvTranspose2d(CHANNELS, CHANNELS, 1, groups=CHANNELS)
        ),
        NO_LAYER,
    ),
    "data-dependent": (lambda: net(lambda self, x: self.bn(self.conv(x)) if x.sum() < 1e9 else self.bn(x)), NO_LAYER),
    "optional-argument": (lambda: net(optional), ELSEWHERE),
    "optional-tensor": (lambda: net(optional_tensor), ELSEWHERE),
    "flag": (lambda: with_flag(flagged), ELSEWHERE),
    "method": (lambda: with_method(net(lambda self, x: self.bn(self.conv(x)))), ELSEWHERE),
    "closure-in-forward": (lambda: net(in_a_closure), "not folded: its container, or the layer before it, is given to"),
    "by-its-parts": (lambda: net(by_its_parts), "not folded: its container calls self.children() and what that gives"),
    "held-by-a-list": (
        lambda: with_list(net(lambda self, x: self.bn(self.conv(x)))),
        "not folded: the model.every holds it, or the layer before it, too",
    ),
    "held-by-a-closure": (
        lambda: with_closure(net(lambda self, x: self.bn(self.conv(x)))),
        "not folded: the model.function holds it, or the layer before it, too",
    ),
    "parent-reads-weight": (lambda: Parent(0), "not folded: its .weight is read, or that of the layer before it"),
    "forward-without-source": (
        lambda: net(from_text("lambda self, x: self.bn(self.conv(x))")),
        "not folded: the forward of its container has no source code",
    ),
}


def from_text(text: str) -> Any:
    return eval(text)


@pytest.mark.parametrize(("make", "why"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_not_folded_and_said_why(make: Callable[[], Any], why: str) -> None:
    model = used(make())
    folded = tritonbn.fold(model)
    row = next(row for row in tritonbn.report(model).rows if row.name in ("bn", "block.1"))
    assert row.folds.startswith(why)
    assert not isinstance(folded.get_submodule(row.name), Folded)
    torch.testing.assert_close(folded(images()), model(images()))


def test_shared_parameter_is_not_folded() -> None:
    model = net(lambda self, x: self.bn(self.conv(x)))
    model.conv2.weight = model.conv.weight
    assert "shares parameters" in tritonbn.report(used(model)).rows[0].folds


def test_folded_although_code_reads_what_cannot_be_known() -> None:
    model = used(net(lambda self, x: self.bn(self.conv(x)) if x.sum() < 1e9 else x))
    assert statuses(tritonbn.fold(model, images())) == ["folded", "convertible"]


OTHER_DIMENSIONS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (5, 4), (2, 3, 4)),
    "conv1d-unbatched": (nn.Conv1d(2, 3, 3, padding=1), (2, 2, 3), (2, 3)),
    "transposed-unbatched": (nn.ConvTranspose1d(2, 3, 3, padding=1), (2, 2, 3), (2, 3)),
}


@pytest.mark.parametrize(("layer", "usual", "other"), OTHER_DIMENSIONS.values(), ids=OTHER_DIMENSIONS)
def test_channels_elsewhere_are_normalized_as_before(layer: Any, usual: Any, other: Any) -> None:
    torch.manual_seed(0)
    bn = nn.BatchNorm1d(3)
    nn.init.uniform_(bn.weight, 0.5, 1.5), nn.init.uniform_(bn.bias, -1, 1)
    model = used(nn.Sequential(layer, bn), *usual)
    folded = tritonbn.fold(model, random(*usual))
    assert statuses(folded) == ["folded"]
    for shape in (usual, other):
        torch.testing.assert_close(folded(random(*shape)), model(random(*shape)), rtol=1e-9, atol=1e-9)


def test_what_raised_before_raises_after_in_the_same_words() -> None:
    model = used(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 5, 4)
    folded = tritonbn.fold(model)
    for shape, error in (((2, 5, 4), RuntimeError), ((2, 3, 4, 4), ValueError)):
        with pytest.raises(error) as theirs:
            model(random(*shape))
        with pytest.raises(error) as ours:
            folded(random(*shape))
        assert str(ours.value) == str(theirs.value)


def test_weight_too_small_to_be_undone_is_not_folded_where_that_may_be_needed() -> None:
    bn = nn.BatchNorm1d(3)
    nn.init.zeros_(bn.weight)
    model = used(nn.Sequential(nn.Linear(4, 3), bn), 5, 4)
    assert "too small to be undone" in tritonbn.report(model).rows[0].folds
    torch.testing.assert_close(tritonbn.fold(model)(random(2, 3, 4)), model(random(2, 3, 4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = used(nn.Sequential(convolution(), norm())).to(dtype)
    conv, bn = copy.deepcopy(model).double()
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    folded = tritonbn.fold(model)[0]
    exact = {
        "weight": conv.weight * scale.view(-1, 1, 1, 1),
        "bias": (conv.bias - bn.running_mean) * scale + bn.bias,
    }
    for name, expected in exact.items():
        error = (getattr(folded, name).double() - expected).abs() / expected.abs()
        assert error.max() <= 0.51 * torch.finfo(dtype).eps, name


class Nested(nn.Sequential):
    """As MONAI's: the norm one Sequential further down."""

    def __init__(self) -> None:
        super().__init__(convolution(), nn.Sequential(norm(), nn.LeakyReLU(0.1)))


class Twice(nn.Module):
    """As nnU-Net's: each under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = convolution(), norm()
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.all_modules(x)


@pytest.mark.parametrize("kind", [Nested, Twice])
@pytest.mark.parametrize("fuse", [False, True])
def test_layouts_of_others_are_folded(kind: Any, fuse: bool) -> None:
    torch.manual_seed(0)
    model = tritonbn.convert(used(nn.Sequential(kind(), kind())), fuse=fuse)
    folded = tritonbn.fold(model, images())
    assert statuses(folded) == ["folded", "folded"]
    torch.testing.assert_close(folded(images()), model(images()))


def test_example_that_differs_raises_with_the_layers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, norm: Any, layer: Any, into: str) -> Any:
        rest = real(model, norm, layer, into)
        layer.bias.data.add_(1e-3)
        return rest

    real = fold_module._fold
    monkeypatch.setattr(fold_module, "_fold", wrong)
    model = used(nn.Sequential(convolution(), nn.ReLU(), body()))
    tritonbn.fold(model)
    with pytest.raises(
        ValueError, match=r"^expected equal outputs of 2\.1 before and after folding, got a difference of "
    ):
        tritonbn.fold(model, images())


class Ends(nn.Module):
    """What a folded model returns, made infinite, undefined or empty: the same as before."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.body, self.end = body(), end

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(self.body(x))
        return y


@pytest.mark.parametrize(
    "end",
    [
        lambda y: y.masked_fill(y == y.amax(), -torch.inf),
        lambda y: y.masked_fill(y == y.amax(), torch.inf),
        lambda y: y.masked_fill(y == y.amax(), torch.nan),
        lambda y: y[:0],
    ],
)
def test_outputs_that_are_no_numbers_are_compared(end: Any) -> None:
    model = used(Ends(end))
    assert statuses(tritonbn.fold(model, images())) == ["folded"]


def test_outputs_of_another_shape_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged = True
    model = used(Ends(lambda y: y if unchanged else y[:, :1]))

    def wrong(*args: Any) -> Any:
        nonlocal unchanged
        outputs = real(*args)
        unchanged = False
        return outputs

    real = fold_module._outputs
    monkeypatch.setattr(fold_module, "_outputs", wrong)
    message = r"^expected equal outputs of the model before and after folding, got \[2, 3, 4, 4\] and \[2, 1, 4, 4\]$"
    with pytest.raises(ValueError, match=message):
        tritonbn.fold(model, images())


def test_example_is_given_to_both_as_it_is() -> None:
    model = used(nn.Sequential(convolution(), norm(), nn.ReLU(inplace=True)))
    example, state = images(), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    tritonbn.fold(model, example)
    torch.testing.assert_close(example, images(), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_training_mode_raises_with_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval(), nn.SyncBatchNorm(2))
    with pytest.raises(ValueError, match=r"evaluation mode, call model.eval\(\) first: 1, 3$"):
        tritonbn.fold(model)


@pytest.mark.parametrize(("given", "name"), [(None, "NoneType"), ([nn.Linear(1, 1)], "list")], ids=["none", "list"])
def test_what_is_no_module_raises(given: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^expected torch\.nn\.Module, got {name}$"):
        tritonbn.fold(given)


def test_report_before_and_after() -> None:
    model = used(nn.Sequential(convolution(), norm(), nn.ReLU(), norm()))
    assert [row.folds for row in tritonbn.report(model).rows] == ["fold() folds it into 0", NO_LAYER]
    folded = tritonbn.fold(model)
    assert str(tritonbn.report(folded)).splitlines() == [
        "module  type                  status       fused with  why",
        "1       tritonbn.fold.Folded  folded       -           into 0",
        "3       torch.nn.BatchNorm2d  convertible  -           convert makes it tritonbn.BatchNorm2d; "
        f"its output is returned; {NO_LAYER}",
        "2 found: 0 replaced, 0 fused, 1 convertible, 0 left alone, 1 folded",
    ]
    assert repr(folded[1]) == "Folded(into=0)"
    assert isinstance(folded[1], Folded)
    assert not folded[1].training
