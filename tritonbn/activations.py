"""Which activations can be fused, and all the names that torch's users have for them."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """An activation and its parameters; the compile-time constant ACT of the kernels. Made by `resolve`."""

    name: str
    a: float = 0.0  # leaky_relu: negative slope; elu: alpha; softplus: beta
    b: float = 0.0  # softplus: threshold

    @property
    def parameters(self) -> tuple[float, ...]:
        """Those that it has, in torch's order."""
        return (self.a, self.b)[: len(_PARAMETERS.get(self.name, {}))]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.parameters))})" if self.parameters else self.name

    @property
    def two_valued(self) -> bool:
        """Whether the derivative takes two values only, so that one bit per element tells it."""
        return self.name in ("relu", "relu6", "leaky_relu", "hardsigmoid")

    @property
    def keeps_residual(self) -> bool:
        """Whether the backward reads the residual again, so that it is saved by reference."""
        return not self.two_valued and self.name != "identity"

    @property
    def costly(self) -> bool:
        """Whether the derivative takes exponentials."""
        return not self.two_valued and self.name not in ("identity", "hardswish")

    def apply(self, x: Tensor) -> Tensor:
        """The activation of x by torch's own function, any shape and floating dtype; differentiable."""
        function = _TORCHS[self.name]
        # Not `parameters`: before torch 2.9 compilers know no properties of tuples.
        count = len(_PARAMETERS[self.name]) if self.name in _PARAMETERS else 0
        return function(x, *(self.a, self.b)[:count]) if count else function(x)


IDENTITY = Activation("identity")

_TORCHS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
}
NAMES = tuple(_TORCHS)
# torch's names of the parameters, and its defaults.
_PARAMETERS: dict[str, dict[str, float]] = {
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
}
_WITHOUT_PARAMETERS = {name: Activation(name) for name in NAMES if name not in (*_PARAMETERS, "gelu", "gelu_tanh")}
_ALIASES = {"swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid", "gelu(tanh)": "gelu_tanh"}
_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
}
METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")
_FUNCTIONS: dict[Callable[..., Any], str] = {
    getattr(place, name): name.rstrip("_")
    for place in (torch, F, Tensor, torch.special)
    for name in (*NAMES, *(f"{name}_" for name in NAMES))
    if hasattr(place, name)
} | {torch.special.expit: "sigmoid"}

# Those that take inplace=True.
_WITH_INPLACE = {f for f in _FUNCTIONS if "inplace" in getattr(getattr(f, "__code__", None), "co_varnames", ())}

ActivationLike = str | Activation | nn.Module | type[nn.Module] | Callable[..., Any]


def resolve(activation: ActivationLike | None) -> Activation:
    """The Activation that a user means: by name, as a torch module (or its class) or as a torch function.

    Names are those of torch.nn.functional, parameters in parentheses: "relu", "leaky_relu(0.2)", "elu(1.0)",
    "softplus(1.0, 20.0)", "gelu", "gelu_tanh". None is "identity".
    Raises ValueError for one that cannot be fused, TypeError for what is none of these.
    """
    if activation is None:
        return IDENTITY
    found: Activation | None
    if isinstance(activation, Activation):
        found = activation
    elif isinstance(activation, str):
        found = _named(activation)
    elif isinstance(activation, nn.Module):
        found = of_module(activation)
    elif isinstance(activation, type) and issubclass(activation, nn.Module):
        found = of_module(activation()) if activation in _MODULES else None
    elif isinstance(activation, partial):
        found = of_call(activation.func, activation.args, activation.keywords)
    elif callable(activation):
        found = of_call(activation, (), {})
    else:
        raise TypeError(f"activation must be a name, a torch module or function, but got {type(activation).__name__}")
    if found is None:
        raise ValueError(f"activation must be one of {', '.join(NAMES)}, but got {activation!r}")
    return found


def of_module(module: nn.Module) -> Activation | None:
    """The Activation that a torch module computes, at present; None if it is none that can be fused."""
    name = _MODULES.get(type(module))
    if name is None or "forward" in module.__dict__:
        return None
    if (plain := _WITHOUT_PARAMETERS.get(name)) is not None:
        return plain
    if name == "gelu":
        return _make(name, {"approximate": module.approximate})
    return _make(name, {parameter: getattr(module, parameter) for parameter in _PARAMETERS.get(name, {})})


def of_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | None:
    """The Activation of `function(x, *args, **kwargs)`, whether in place or not; None if it is none, or would raise."""
    try:
        name = _FUNCTIONS.get(function)
    except TypeError:  # not hashable
        name = None
    if name is None:
        return None
    if not args and not kwargs and name in _WITHOUT_PARAMETERS:
        return _WITHOUT_PARAMETERS[name]
    names = (*_PARAMETERS.get(name, {}), *(["inplace"] if function in _WITH_INPLACE else []))
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys():
        return None
    given |= kwargs
    if "inplace" in names:
        given.pop("inplace", None)
    return _make(name, given)


def is_activation(function: Any) -> bool:
    """Whether `of_call` may find an Activation for it."""
    try:
        return function in _FUNCTIONS
    except TypeError:  # not hashable
        return False


def of_method(method: str) -> Activation | None:
    """The Activation of the tensor method x.method(); None if it is none."""
    return Activation(method.rstrip("_")) if method in METHODS else None


def _named(text: str) -> Activation | None:
    text = _ALIASES.get(text.strip(), text.strip())
    if text in NAMES:
        return _make(text, {})
    found = re.fullmatch(r"(\w+)\((.*)\)", text)
    if found is None or found[1] not in _PARAMETERS:
        return None
    names = list(_PARAMETERS[found[1]])
    values = found[2].split(",")
    try:
        return (
            _make(found[1], dict(zip(names, map(float, values), strict=False))) if len(values) <= len(names) else None
        )
    except ValueError:
        return None


def _make(name: str, given: Mapping[str, Any]) -> Activation | None:
    """The Activation with the parameters given and torch's defaults for the others; None if they do not fit."""
    if name == "gelu" and set(given) <= {"approximate"}:
        return {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}.get(given.get("approximate", "none"))
    defaults = _PARAMETERS.get(name, {})
    values = {**defaults, **given}
    if values.keys() != defaults.keys() or not all(type(v) in (int, float) for v in values.values()):
        return None
    if name == "softplus" and values["beta"] == 0:  # torch divides by it
        return None
    return Activation(name, *map(float, values.values()))
