"""Whatever a forward reads and does, and whatever is done with its module: converted, it does the same.

Each program of `generated_forwards` runs twice, in two modules of the same source with equal weights, one of which is
converted. After each of its actions everything that can be observed is compared.
"""

import contextlib
import functools
import io
import itertools
import linecache
import pickle
import random
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, find, given, settings
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook

import tritonbn
from tests.fusing import together
from tests.generated_forwards import CLASS, GLOBALS, PATIENT, Program, ingredients, program_with, programs
from tritonbn import launch
from tritonbn.activations import IDENTITY, Activation
from tritonbn.launch import Gradients

# For an hour: python -m pytest -p tests.generated_forwards --hypothesis-profile=deep tests/test_surgery_properties.py
DEEP = settings.get_current_profile_name() == "deep"
PROFILE = settings.get_profile("deep") if DEEP else settings(PATIENT, max_examples=2000, derandomize=True)
FOLDER = tempfile.TemporaryDirectory(prefix="tritonbn-generated-")
NUMBERS = itertools.count()
RECOMPUTED = "CheckpointError"


@pytest.fixture(autouse=True)
def _formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the backward is what the kernels are given; torch computes in their place, which is fast."""
    monkeypatch.setattr(launch, "INTERPRETED", True)
    for function in (forward, inference, backward):
        monkeypatch.setattr(launch, function.__name__, function)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, counter: Tensor | None, momentum: float | None, eps: float,
    activation: Activation = IDENTITY, keep_bits: bool = False, *_: object,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """`launch.forward`."""
    with torch.no_grad():
        if counter is not None:
            counter.add_(1)
        share = 1.0 / float(counter) if momentum is None and counter is not None else momentum
        y = F.batch_norm(x, mean, var, weight, bias, True, share or 0.0, eps)
    vectors = torch.zeros(2, x.shape[1], dtype=launch.arithmetic_dtype(x))
    return *_epilogue(y, residual, activation, keep_bits), vectors[0], vectors[1] + eps


def inference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, activation: Activation = IDENTITY, keep_bits: bool = False, *_: object,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """`launch.inference`; what it returns as rstd is what `backward` takes for var."""
    with torch.no_grad():
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        kind = launch.arithmetic_dtype(x)
        return *_epilogue(y, residual, activation, keep_bits), mean.to(kind, copy=True), var.to(kind) + eps


def _epilogue(
    y: Tensor, residual: Tensor | None, activation: Activation, keep_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, and in the place of the bits the derivative that they tell."""
    with torch.enable_grad():
        z = (y if residual is None else y + residual).detach().requires_grad_()
        y = activation.apply(z)
        bits = torch.autograd.grad(y.sum(), z)[0].contiguous().view(torch.uint8) if keep_bits else None
        return y.detach(), bits


def backward(
    dy: Tensor, saved: Any, training: bool, activation: Activation, parameter_dtype: torch.dtype,
    wanted: tuple[bool, ...], *_: object,
) -> Gradients:  # fmt: skip
    """`launch.backward`."""
    tensors: list[Any] = [t if t is None else t.detach() for t in saved]
    x, weight, bias, residual, bits, mean, var = tensors  # var + eps, in training eps alone
    if bits is not None:
        dy, activation = dy * bits.view(dy.dtype), IDENTITY
    if bias is None:  # it is not saved where it is not needed
        bias = x.new_zeros(x.shape[1], dtype=parameter_dtype)
    leaves = [t if t is None else t.requires_grad_() for t in (x, weight, bias, residual)]
    with torch.enable_grad():
        if training:
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, float(var[0]))
        else:
            kind = mean.dtype if weight is None else weight.dtype
            y = torch.batch_norm(x, weight, bias, mean.to(kind), var.to(kind), False, 0.0, 0.0, False)
        y = activation.apply(y if residual is None else y + residual)
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    dx, dweight, dbias, dresidual = [None if leaf is None else next(found) for leaf in leaves]
    results = dx, dweight, dbias, dy if bits is not None else dresidual
    return Gradients(*(result if want else None for result, want in zip(results, wanted, strict=True)))


class Surgery(NamedTuple):
    """What is tested."""

    convert: Callable[[nn.Module], object] = functools.partial(tritonbn.convert, fuse=True)
    revert: Callable[[nn.Module], object] = tritonbn.revert
    report: Callable[[nn.Module], object] = tritonbn.report


def same(model: nn.Module) -> nn.Module:
    return model


NONE = Surgery(same, same, same)


class Subclass(Tensor):
    """Of tensors: results are of this type, too."""


class Side:
    """One of the two: its module, and the names that actions can use."""

    def __init__(self, name: str, code: types.CodeType, surgery: Surgery) -> None:
        self.module = sys.modules[name] = types.ModuleType(name)
        self.module.__file__ = code.co_filename
        exec(code, vars(self.module))
        torch.default_generator.manual_seed(0)
        model: nn.Module = vars(self.module)["Net"]().double()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        self.inputs: list[Tensor] = []
        self.seen: list[str] = []
        self.surgery, self.added, self.models = surgery, set[str](), [model]
        tools: tuple[Any, ...] = (self.image, self.backward, self.recorded, self.watched, self.convert, Subclass)
        self.names: dict[str, Any] = {
            **vars(self.module), **surgery._asdict(), **{tool.__name__: tool for tool in tools}, "module": self.module,
            "model": model, "first_model": model, "out": None, "handles": [], "pickle": pickle,
        }  # fmt: skip

    def convert(self, model: nn.Module) -> None:
        before = [(module, set(vars(module))) for module in model.modules()]
        self.surgery.convert(model)
        self.added.update(*(vars(module).keys() - names for module, names in before))

    def image(self, *shape: int, grad: bool = False) -> Tensor:
        """Other values at each call, in the dtype of the model."""
        values = torch.rand(shape, generator=torch.Generator().manual_seed(len(self.inputs)), dtype=torch.float64)
        dtype = next((p.dtype for p in self.names["model"].parameters()), torch.float64)
        self.inputs.append((values - 0.5).to(dtype).requires_grad_(grad))
        return self.inputs[-1]

    def backward(self, out: Any) -> None:
        leaves = torch.utils._pytree.tree_leaves(out)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if wanted:
            torch.autograd.backward(together(wanted))

    def recorded(self, layer: nn.Module, *given: Any) -> None:
        """A hook that only looks."""
        self.seen.append(f"{type(layer).__name__} {len(given)}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        handle = register_module_forward_hook(self.recorded)
        try:
            yield
        finally:
            handle.remove()

    def does(self, action: str) -> dict[str, Any]:
        """What an action does besides what it does to what is `observable`."""
        torch.default_generator.manual_seed(5)  # torch.manual_seed is slow, for the sake of GPUs
        random.seed(5)
        np.random.seed(5)
        raised = None
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(io.StringIO()) as printed:
            warnings.simplefilter("always")
            try:
                exec(action, self.names)
                if isinstance(self.names["out"], types.GeneratorType):
                    self.names["out"] = list(self.names["out"])
            except Exception as error:
                text = re.sub("0x[0-9a-f]+", "0x", str(error)).replace(self.module.__name__, "generated")
                raised = type(error).__name__, text
        if self.names["model"] is not self.models[-1]:
            self.models.append(self.names["model"])
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        torch.set_grad_enabled(True)
        generators = torch.get_rng_state(), hash(random.getstate()), np.random.get_state(legacy=False)
        messages = [
            str(warning.message) for warning in warned if "tritonbn: torch computes" not in str(warning.message)
        ]
        return {"raised": raised, "printed": printed.getvalue(), "warned": messages, "modes": modes, "rng": generators}

    def observable(self) -> dict[str, Any]:
        """All that an action may have changed."""
        found = {name: self.names[name] for name in ("out", "model", "first_model")}
        for table, values in ((GLOBALS, vars(self.module)), (CLASS, vars(vars(self.module)["Net"]))):
            found.update({name: values[name] for name in table if name in values})
        return {**found, "inputs": self.inputs, "seen": self.seen}


class Comparison:
    """Walks two observations in parallel; raises AssertionError where they differ.

    Attributes of modules with an ignored name are not looked at. `exact`: torch's types are to be the same ones.
    """

    def __init__(self, tolerance: float, ignored: Collection[str] = (), exact: bool = False) -> None:
        self.tolerance, self.ignored, self.exact = tolerance, ignored, exact
        self.met: dict[Any, Any] = {}
        self.kept: list[Any] = []  # as ids are of living objects only

    def differ(self, path: str, theirs: object, ours: object) -> None:
        raise AssertionError(f"{path}: unconverted {theirs!r}, converted {ours!r}")

    def equal(self, path: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            self.differ(path, theirs, ours)

    def alike(self, path: str, theirs: Any, ours: Any) -> None:
        if theirs is ours:
            return
        self.equal(f"type of {path}", self.kind(type(theirs)), self.kind(type(ours)))
        if isinstance(theirs, (float, np.number, np.ndarray)):
            if not (np.array_equal(theirs, ours) or np.allclose(theirs, ours, self.tolerance, self.tolerance, True)):
                self.differ(path, theirs, ours)
        elif isinstance(theirs, (int, str, type(None), torch.dtype, torch.Size, set)):
            self.equal(path, theirs, ours)
        elif self.is_new(path, "", id(theirs), id(ours)):
            self.kept += [theirs, ours]
            self.contents(path, theirs, ours)

    def kind(self, kind: type) -> object:
        return kind if self.exact and kind.__module__.startswith("torch") else kind.__qualname__

    def is_new(self, path: str, space: str, theirs: int, ours: int) -> bool:
        """Whether neither was met before; else they must have been met together."""
        keys = ("theirs", space, theirs), ("ours", space, ours)
        if not any(key in self.met for key in keys):
            self.met.update(zip(keys, (ours, theirs), strict=True))
            return True
        if [self.met.get(key) for key in keys] != [ours, theirs]:
            self.differ(path, f"shares {space or 'an object'} with others", "with other ones")
        return False

    def contents(self, path: str, theirs: Any, ours: Any) -> None:
        if isinstance(theirs, Tensor):
            self.tensors(path, theirs, ours)
        elif isinstance(theirs, Side):
            pass  # our own hooks' self
        elif isinstance(theirs, nn.Module):
            self.attributes(path, theirs, ours)
        elif isinstance(theirs, dict):
            self.equal(f"keys of {path}", list(map(str, theirs)), list(map(str, ours)))
            for key, (one, other) in zip(theirs, zip(theirs.values(), ours.values(), strict=True), strict=True):
                self.alike(f"{path}[{key!r}]", one, other)
        elif isinstance(theirs, (list, tuple)):
            self.equal(f"len({path})", len(theirs), len(ours))
            for i, (one, other) in enumerate(zip(theirs, ours, strict=True)):
                self.alike(f"{path}[{i}]", one, other)
        elif isinstance(theirs, torch.Generator):
            self.alike(path, theirs.get_state(), ours.get_state())
        elif isinstance(theirs, np.random.RandomState):
            self.alike(path, theirs.get_state(legacy=False), ours.get_state(legacy=False))
        elif isinstance(theirs, (Enum, itertools.count)):
            self.equal(path, str(theirs), str(ours))
        elif isinstance(theirs, functools.partial):
            self.alike(path, *((one.func, one.args, one.keywords) for one in (theirs, ours)))
        elif isinstance(theirs, types.MethodType):
            self.alike(path, *((one.__func__.__qualname__, one.__self__) for one in (theirs, ours)))
        elif hasattr(theirs, "__qualname__"):
            self.equal(path, theirs.__qualname__, ours.__qualname__)
        elif hasattr(theirs, "__dict__"):
            self.alike(f"vars({path})", vars(theirs), vars(ours))

    def attributes(self, path: str, theirs: nn.Module, ours: nn.Module) -> None:
        one, other = vars(theirs), vars(ours)
        self.equal(f"attributes of {path}", *(sorted(names.keys() - self.ignored) for names in (one, other)))
        for name in one.keys() - self.ignored:
            if "hooks" in name:  # their keys are numbers that count all hooks
                if one[name] or other[name]:
                    self.alike(f"{path}.{name}", list(one[name].values()), list(other[name].values()))
            else:
                self.alike(f"{path}.{name}", one[name], other[name])

    def tensors(self, path: str, theirs: Tensor, ours: Tensor) -> None:
        for name in ("dtype", "shape", "requires_grad"):
            self.equal(f"{path}.{name}", getattr(theirs, name), getattr(ours, name))
        if not (torch.equal(theirs, ours) or torch.allclose(theirs, ours, self.tolerance, self.tolerance, True)):
            self.differ(f"values of {path}", theirs.flatten().tolist()[:3], ours.flatten().tolist()[:3])
        self.is_new(path, "memory", *(one.untyped_storage().data_ptr() for one in (theirs, ours)))
        if theirs.is_leaf and ours.is_leaf:
            self.alike(f"{path}.grad", theirs.grad, ours.grad)


def check(program: Program, surgery: Surgery) -> list[str]:
    """Run a program on both; the types of the errors that its actions raised. Raises AssertionError."""
    path = Path(FOLDER.name, f"generated_{next(NUMBERS)}.py")
    if program.in_file:
        path.write_text(program.source)
    try:
        code = compile(program.source, str(path) if program.in_file else "<string>", "exec")
        return _check(program, Side("theirs__", code, NONE), Side("ours__", code, surgery))
    except AssertionError as error:
        raise AssertionError(f"{error}, in\n{program!r}") from None
    finally:
        for name in ("theirs__", "ours__"):
            sys.modules.pop(name, None)
        linecache.cache.pop(str(path), None)
        path.unlink(missing_ok=True)


def _check(program: Program, theirs: Side, ours: Side) -> list[str]:
    text = repr(program)
    tolerance = 0.05 if "bfloat16" in text else 1e-4 if "float()" in text or "float32" in text else 1e-9
    outcome = ours.does("convert(model)\nreport(model)")
    Comparison(tolerance).alike("converting", theirs.does(""), outcome)
    Comparison(tolerance, ours.added).alike("converted", theirs.observable(), ours.observable())
    errors = []
    for i, action in enumerate(program.actions):
        outcome = theirs.does(action)
        errors += [outcome["raised"][0]] if outcome["raised"] else []
        other = ours.does(action)
        if action.startswith("out = ") and outcome["raised"]:
            # What is there to go back through is of an earlier state: what .data changed since, torch does not see.
            theirs.names["out"] = ours.names["out"] = None
        if action.startswith("backward") and outcome["raised"]:
            return errors  # we may succeed where torch misses something that we do not need
        if (
            "checkpoint(" in text
            and ("hook" in text or "watched" in text)
            and other["raised"]
            and other["raised"][0] == RECOMPUTED
        ):
            return errors  # see docs/swapping.md: a hook came or went between a forward and its recomputation
        Comparison(tolerance, ours.added).alike(f"{i}: {action}", outcome, other)
        if "out" in action:
            Comparison(tolerance, ours.added).alike(f"{i}: {action}", theirs.observable(), ours.observable())
    for model in ours.models:
        ours.surgery.revert(model)
    Comparison(tolerance, exact=True).alike("reverted", theirs.observable(), ours.observable())
    return errors


# What a wrong `convert` may do; it changes the class of no norm, so nothing else makes a difference.
def traced_once(model: nn.Module) -> None:
    """One trace stands for all calls."""
    with contextlib.suppress(Exception):
        vars(model)["forward"] = fx.symbolic_trace(model).forward


def frozen(model: nn.Module) -> None:
    """Plain attributes stay what they are."""
    kept = {name: value for name, value in vars(model).items() if isinstance(value, (int, float, str, Enum, tuple))}

    def forward(*args: Any, **kwargs: Any) -> Any:
        now = dict(vars(model))
        vars(model).update(kept)
        try:
            return type(model).forward(model, *args, **kwargs)
        finally:
            vars(model).update({name: now[name] for name in kept if name in now})

    vars(model)["forward"] = forward


def bound(model: nn.Module) -> None:
    """A copy runs the original."""
    vars(model)["forward"] = model.forward


def tried(model: nn.Module) -> None:
    """Called to see what it does."""
    with contextlib.suppress(Exception), torch.no_grad():
        model(torch.ones(2, 3, 4, 4, dtype=torch.float64))


def without_forward(model: nn.Module) -> None:
    vars(model).pop("forward", None)


@pytest.mark.parametrize("convert", [traced_once, frozen, bound, tried])
def test_what_is_wrong_is_found(convert: Callable[[nn.Module], None]) -> None:
    def is_wrong(program: Program) -> bool:
        try:
            check(program, Surgery(convert, without_forward, same))
        except AssertionError as error:
            return "revert" not in str(error)
        return False

    few = settings(PATIENT, max_examples=100, derandomize=True, phases=[Phase.generate])
    find(programs(), is_wrong, settings=few)


@PROFILE
@given(programs())
def test_converted_module_does_what_the_module_does(program: Program) -> None:
    check(program, Surgery())


@pytest.mark.parametrize(("name", "production"), list(ingredients()))
def test_each_ingredient(name: str, production: str) -> None:
    errors = check(program_with(name, production), Surgery())
    assert not {"NameError", "SyntaxError", "UnboundLocalError"}.intersection(errors)
