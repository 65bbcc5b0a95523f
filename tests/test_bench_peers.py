"""Who is measured: each computes batch norm, and whoever does not is found out before it is timed."""

import importlib
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import peers
from bench.cudnn import cudnn
from bench.problem import EPILOGUES, Epilogue, Inputs, Problem, State, make_inputs
from bench.providers import EPS, MOMENTUM, PROVIDERS, Operation, eager_operation
from bench.rows import call_for
from bench.shapes import Layer
from bench.verify import WrongResult, verify
from tests.launches import recorded
from tritonbn import launch

PROBLEMS = [
    Problem("tiny", Layer((4, 6, 5, 5)), "nchw", "bf16", "bn+add+relu"),
    Problem("tiny", Layer((4, 8, 3, 2)), "channels_last", "fp32", "bn"),
    Problem("tiny", Layer((4, 8, 3, 2)), "channels_last", "fp16", "bn+add+relu"),
    Problem("tiny", Layer((6, 10)), "nc", "fp32", "bn+sigmoid"),
    Problem("tiny", Layer((6, 1, 9)), "nchw", "fp16", "bn+silu"),
    Problem("tiny", Layer((3, 4, 2, 3, 2)), "channels_last", "fp32", "bn+relu"),
]
FP32 = PROBLEMS[1]


def checked(provider: str, problem: Problem, device: torch.device) -> tuple[Operation, Inputs]:
    inputs = make_inputs(problem, 2, device)
    operation = PROVIDERS[provider].build(EPILOGUES[problem.epilogue], inputs.state)
    verify(operation, problem, inputs)
    return operation, inputs


@pytest.mark.parametrize("provider", ["tritonbn", "eager", "eager-no-cudnn"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_inputs_and_results(problem: Problem, provider: str, device: torch.device) -> None:
    with PROVIDERS[provider].scope():
        operation, inputs = checked(provider, problem, device)
        for index, slot in enumerate(inputs.slots):
            assert slot.x.is_contiguous(memory_format=problem.memory_format)
            assert (slot.residual is not None) == problem.epilogue.count("add")
            y = operation(slot.x, slot.residual)
            assert y.is_contiguous(memory_format=problem.memory_format)
            gradients: Any = call_for("both", operation, inputs)(index)
            assert [g.shape for g in gradients[1]] == [leaf.shape for leaf in inputs.leaves(index)]
    assert not torch.equal(inputs.slots[0].x, inputs.slots[1].x)


@pytest.mark.parametrize("provider", ["compile", "compile-max-autotune"])
def test_compiled(provider: str, device: torch.device) -> None:
    """Two shapes in turn: each is compiled, none falls back to eager code, and backwards may be repeated."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    with PROVIDERS[provider].scope():
        for problem in PROBLEMS[:2]:
            operation, inputs = checked(provider, problem, device)
            backward = call_for("backward", operation, inputs)
            first: Any = backward(0)
            again: Any = backward(0)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not (launch.INTERPRETED or torch.cuda.is_available()), reason="our kernels do not run")
def test_a_timed_backward_repeats_no_forward(device: torch.device) -> None:
    operation, inputs = checked("tritonbn", PROBLEMS[0], device)
    backward = call_for("backward", operation, inputs)
    with recorded() as names:
        backward(0)
        backward(1)
        backward(0)
    assert names
    assert not [name for name in names if name in ("forward_kernel", "statistics_kernel", "normalize_kernel")]


def test_without_cudnn_where_its_flags_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own test helpers forbid to set them for the rest of the process."""
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", False)
    with pytest.raises(RuntimeError, match="not allowed to set"):
        torch.backends.cudnn.enabled = False
    with PROVIDERS["eager-no-cudnn"].scope():
        assert not torch.backends.cudnn.enabled
    for switch in ("benchmark", "allow_tf32"):
        before = getattr(torch.backends.cudnn, switch)
        with cudnn(**{switch: not before}):
            assert getattr(torch.backends.cudnn, switch) == (not before)
        assert getattr(torch.backends.cudnn, switch) == before


def test_without_cudnn_is_undone() -> None:
    before = torch.backends.cudnn.enabled

    def fail() -> None:
        with PROVIDERS["eager-no-cudnn"].scope():
            assert not torch.backends.cudnn.enabled
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.backends.cudnn.enabled == before


def wrong(name: str, state: State) -> Operation:
    """Batch norm with one mistake."""
    mistakes: dict[str, Callable[[Tensor], Tensor]] = {
        "y": lambda y: y * 1.001,
        "nan": lambda y: y + float("nan"),
        "dtype": lambda y: y.double(),
        "dweight": lambda y: y + (state.weight - state.weight.detach()).view(1, -1, 1, 1),
    }
    mistake = mistakes.get(name)

    def operate(x: Tensor, _: Tensor | None) -> Tensor:
        mean, var = state.running_mean.clone(), state.running_var.clone()
        y = F.batch_norm(x, mean, var, state.weight, state.bias, True, MOMENTUM, EPS)
        if name == "dx":  # statistics taken for constants
            y = F.batch_norm(x, x.mean((0, 2, 3)).detach(), x.var((0, 2, 3), False).detach(), *state[:2], eps=EPS)
        if name == "running_var":  # biased
            n = x.numel() / x.shape[1]
            var = var * (n - 1) / n
        if name != "not updated":
            state.running_mean.copy_(mean)
            state.running_var.copy_(var)
        return y if mistake is None else mistake(y)

    return operate


@pytest.mark.parametrize(
    ("mistake", "says"),
    [("y", "y: relative error 1"), ("nan", "y: relative error nan"), ("dtype", "float64"), ("dx", "dx: relative"),
     ("dweight", "dweight"), ("running_var", "running_var"), ("not updated", "running_mean")],
)  # fmt: skip
def test_mistakes_are_found(mistake: str, says: str, device: torch.device) -> None:
    inputs = make_inputs(FP32, 1, device)
    with pytest.raises(WrongResult, match=says):
        verify(wrong(mistake, inputs.state), FP32, inputs)
    verify(wrong("none", inputs.state), FP32, inputs)


def test_who_is_missing_says_why() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert peers.missing("no_such_package", cuda) == "no_such_package is not installed"
    assert peers.missing("no_such_package.sub", cuda) == "no_such_package.sub is not installed"
    assert peers.missing("torch.nn", cuda) is None
    assert peers.missing("torch.nn", cpu) == "needs a GPU"
    assert set(PROVIDERS) >= {"tritonbn", "eager", "eager-no-cudnn", "compile", "compile-max-autotune"}


class Attorch(nn.BatchNorm2d):
    """The signature of attorch's modules."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act_func: str | None = None,
        device: Any = "cuda",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.act_func = act_func

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor, pre_act_add: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        y = y if pre_act_add is None else y + pre_act_add
        return y if self.act_func is None else getattr(torch, self.act_func, F.silu)(y)


class Apex(nn.BatchNorm2d):
    """The signature of apex's BatchNorm2d_NHWC; as there, the buffers are those of the module."""

    def __init__(self, num_features: int, fuse_relu: bool = False, bn_group: int = 1) -> None:
        super().__init__(num_features)
        self.fuse_relu = fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.is_contiguous()
        assert z is None or self.fuse_relu
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y if z is None else y + z
        return torch.relu(y) if self.fuse_relu else y


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Packages with the modules that the adapters use."""
    used: dict[str, Any] = {"gems": 0}

    @contextmanager
    def use_gems() -> Iterator[None]:
        used["gems"] += 1
        used["cudnn"] = torch.backends.cudnn.enabled
        yield

    packages: dict[str, dict[str, object]] = {
        "attorch": {"BatchNorm1d": Attorch, "BatchNorm2d": Attorch},
        "flag_gems": {"use_gems": use_gems},
        "apex": {},
        "apex.contrib": {},
        "apex.contrib.groupbn": {"BatchNorm2d_NHWC": Apex},
    }
    for name, content in packages.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    assert importlib.import_module("attorch") is sys.modules["attorch"]
    return used


@pytest.mark.parametrize("provider", ["attorch", "flag-gems", "apex-groupbn"])
def test_adapters(provider: str, pretended: dict[str, Any]) -> None:
    """Against modules of the same signatures on the CPU: what they are given, and where, is right."""
    device = torch.device("cpu")
    taken = [problem for problem in PROBLEMS if PROVIDERS[provider].takes(problem)]
    assert len(taken) == {"attorch": 5, "flag-gems": 6, "apex-groupbn": 1}[provider]
    with PROVIDERS[provider].scope():
        for problem in taken:
            checked(provider, problem, device)
    assert pretended["gems"] == (provider == "flag-gems")
    assert pretended.get("cudnn") in (None, False)


def test_eager_is_what_models_do() -> None:
    """In place where torchvision's models are: a residual and a ReLU take no tensors of their own."""
    inputs = make_inputs(PROBLEMS[0], 1, torch.device("cpu"))
    x, residual, _ = inputs.slots[0]
    y = eager_operation(Epilogue("relu", True), inputs.state)(x, residual)
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    with torch.no_grad():
        assert residual is not None
        expected = F.batch_norm(x, None, None, inputs.state.weight, inputs.state.bias, True)
        assert torch.equal(y, torch.relu(expected + residual))
