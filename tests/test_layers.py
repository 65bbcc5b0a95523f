"""The layers that a model turns out to have, and that nothing in it changes on the way."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonbn
from tritonbn import explain, launch
from tritonbn.layers import Layer, layers_of

CPU = torch.device("cpu")
Look = Callable[..., object]


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quicker than the interpreter, and the same for what is tested here."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


def layer(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Layer:
    return Layer(shape, dtype, torch.channels_last if last else torch.contiguous_format, CPU)


class Net(nn.Module):
    """A norm that is called by its argument's name, one that is called three times, one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.first = nn.BatchNorm2d(8, momentum=None)
        self.twice = nn.BatchNorm2d(8)
        self.untracked = nn.BatchNorm1d(8, track_running_stats=False)
        self.never = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x = self.act(self.first(input=self.conv(x)))
        x = self.act(self.twice(x) + self.twice(x))
        if fail:
            raise RuntimeError("no further")
        y: Tensor = self.untracked(self.drop(self.twice(x[:, :, ::2, ::2].contiguous())).mean((2, 3)))
        return y


EXPECTED = {
    "first": [layer(4, 8, 6, 6)],
    "twice": [layer(4, 8, 6, 6), layer(4, 8, 3, 3)],
    "untracked": [layer(4, 8)],
}


def net(fuse: bool) -> Net:
    """In training, but for what is frozen."""
    model = tritonbn.convert(Net(), fuse=fuse)
    model.twice.eval()
    model.drop.eval()
    model.first.register_forward_pre_hook(lambda module, given: None)
    model.act.register_forward_hook(lambda module, given, y: None)
    return model


def state_of(model: nn.Module) -> Any:
    """Values, how often they were written, flags, hooks."""
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return values, {
        name: (module.training, list(module._forward_pre_hooks), list(module._forward_pre_hooks_with_kwargs),
               list(module._forward_hooks), [(id(t), t._version, t.grad) for t in tensors_of(module)])
        for name, module in model.named_modules()
    }  # fmt: skip


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("look", [explain, lambda model, *given, **named: layers_of(model, given, named)])
def test_nothing_in_a_model_changes(look: Look, fuse: bool) -> None:
    model, x = net(fuse), torch.randn(4, 3, 6, 6)
    before, random = state_of(model), torch.get_rng_state()
    for fail in (False, True):
        if fail:
            with pytest.raises(RuntimeError, match="no further"):
                look(model, x, fail=True)
        else:
            look(model, x)
        after = state_of(model)
        assert after[1] == before[1]
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("fuse", [False, True])
def test_each_layer_is_found_once_with_all_that_it_is_given(fuse: bool) -> None:
    assert layers_of(net(fuse), (torch.randn(4, 3, 6, 6),), {}) == EXPECTED


def test_a_fused_model_is_fused_again_afterwards() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    tritonbn.convert(model, fuse=True)
    assert layers_of(model, (torch.randn(3, 4),), {}) == {"0": [layer(3, 4)]}
    ran: list[Any] = []
    real = tritonbn.functional.normalize

    def note(*given: Any) -> Tensor:
        ran.append(str(given[8]))
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tritonbn.functional, "normalize", note)
        model(torch.randn(3, 4))
    assert ran == ["relu"]


def test_layout_and_dtype_are_those_that_the_layer_meets() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), tritonbn.BatchNormAct2d(8))
    x = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    assert layers_of(model, (x,), {}) == {"1": [layer(4, 8, 4, 4, last=True)]}
    with torch.autocast("cpu", torch.bfloat16):
        assert layers_of(model, (x,), {}) == {"1": [layer(4, 8, 4, 4, dtype=torch.bfloat16, last=True)]}


def test_a_shared_module_has_one_name() -> None:
    norm = tritonbn.BatchNorm1d(4)
    assert layers_of(nn.Sequential(norm, nn.Linear(4, 4), norm), (torch.randn(3, 4),), {}) == {"0": [layer(3, 4)]}
    assert layers_of(norm, (), {"input": torch.randn(5, 4)}) == {"": [layer(5, 4)]}


def test_it_runs_in_evaluation_and_without_gradients() -> None:
    model, found = tritonbn.BatchNorm1d(4), []
    model.register_forward_hook(lambda module, given, y: found.append((module.training, y.requires_grad)))
    layers_of(model, (torch.randn(3, 4, requires_grad=True),), {})
    assert found == [(False, False)]


def test_what_eval_of_a_module_does_beside_is_not_done() -> None:
    class Merging(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> Any:
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(4, 4), tritonbn.BatchNorm1d(4))
    layers_of(model, (torch.randn(3, 4),), {})
    assert not model[0].merged
    assert model.training


def test_a_compiled_model_runs_as_it_was_written() -> None:
    compiled = []

    def backend(graph: Any, given: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = tritonbn.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    quick: Any = torch.compile(model, backend=backend)
    assert layers_of(quick, (torch.randn(3, 4),), {}) == {"_orig_mod.1": [layer(3, 4)]}
    assert compiled == []


@pytest.mark.parametrize("model", [nn.BatchNorm1d(4), nn.Identity(), nn.Sequential(nn.Linear(4, 4))])
def test_a_model_without_our_modules(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected a model that calls tritonbn modules .* but it called none"):
        layers_of(model, (torch.randn(3, 4),), {})


def test_errors_are_the_models_own() -> None:
    """Not those of looking at what cannot be looked at."""
    norm = tritonbn.BatchNorm1d(4)
    before = copy.deepcopy(dict(norm._forward_pre_hooks))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        layers_of(norm, (), {})
    with pytest.raises(AttributeError, match="'list' object has no attribute 'dim'"):
        layers_of(norm, ([1.0],), {})
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layers_of(norm, (torch.randn(4),), {})
    assert dict(norm._forward_pre_hooks) == before


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0), (4, 4, 0)])
def test_check(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not empty, of float32, bfloat16, float16, float64; got "):
        layer(*shape).check()
    layer(1, 4).check()
