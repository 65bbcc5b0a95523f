"""Random modules with batch norms, as source text, and random sequences of what is done with them: a grammar.

A text may hold {name} or {name argument}, which becomes one of GRAMMAR[name]; there @ stands for the argument. Running
values have fixed names: x goes from step to step, y is what a norm returned, r what is added, first the input, extra a
number that is added at the end. What a text names (children, attributes, helpers) is defined by the tables below it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from textwrap import indent
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

PATIENT = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.register_profile("deep", PATIENT, max_examples=100_000)

HEADER = """\
import collections, copy, enum, functools, itertools, math, operator, random, types, warnings
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
"""

STATEMENTS = [  # between a norm and the use of its value
    "z = self.conv(x)", "self.writes(x)", "self.writes(y)", "z = {norm x}", "z = self.bn(x)", "z = self.holder(x)",
    "x.mul_(2.0)", "y.mul_(2.0)", "y[0] = 0.5", "y[:, 1:].zero_()", "z = y\nz.mul_(2.0)", "z = y.view(-1)\nz.mul_(2.0)",
    "x, y = y, x", "(y, x), z = (y, x), None", "z = y\ndel y\ny = z", "y = (z := y)",
    "y = ({flag} and [y * 2.0] or [y])[0]", "y = y if {flag} else y * 2.0", "if {flag}:\n    y = y * 2.0",
    "if {flag}:\n    return y", "if not {flag}:\n    return x, y",
    "if {flag}:\n    raise ValueError(f'stopped at {tuple(y.shape)}')", "assert {flag}, f'{y.dim()} dimensions'",
    "try:\n    if {flag}:\n        raise KeyError('between')\nexcept KeyError:\n    y = y * 3.0\nelse:\n"
    "    y = y + 1.0", "for i in range(3):\n    if {flag}:\n        break\n    y = y + i",
    "n = 3\nwhile n:\n    n -= 1\n    if n == 1:\n        continue\n    y = y * 1.5",
    "match self.mode:\n    case 'relu':\n        y = y * 2.0\n    case _:\n        pass",
    "with torch.no_grad():\n    z = y.mean()\nextra = extra + z", "with torch.no_grad():\n    y.mul_(2.0)",
    "torch.set_grad_enabled(not torch.is_grad_enabled())",
    "with torch.autocast('cpu', torch.bfloat16):\n    x = self.conv(x)",
    "def inner():\n    return y\nextra = extra + inner().mean()", "z = lambda: y\ny = z()",
    "n = 1.0\ndef inner():\n    nonlocal n\n    n += 1.0\n    return y\ny = inner() * n",
    "extra = extra + sum(v.mean() for v in (y, x))", "y = [v for v in (y,)][0]", "y = {'k': y}['k']",
    "a, *rest = y.shape\nextra = extra + a + len(rest)", "b, c, h, w = y.size()\ny = y.view(b, c, h, w)",
    "y = y.view(y.size(0), -1).view_as(x)", "extra = extra + len(f'{y.shape} {y.dtype}')",
    "z = str(y.shape)\nLOG.append(z)", "extra = extra + (y.grad_fn is None)",
    "extra = extra + hasattr(y, 'tag')", "y.tag = 1", "y = y.detach()",
    "if y.requires_grad:\n    y.register_hook(doubled)", "if y.requires_grad:\n    y.retain_grad()",
    "extra = extra + y.sum().item()", "extra = extra + float(y.detach().max())",
    "y = checkpoint(self.bn2, y, use_reentrant=False)", "extra = extra + self.bn.running_mean.mean()",
    "z = self.bn.running_var.clone()\nextra = extra + z.sum()", "self.bn.running_mean.add_(1.0)",
    "self.bn.running_mean = self.bn.running_mean + 1.0", "self.bn.num_batches_tracked += 5",
    "self.bn.reset_running_stats()", "self.bn.eval()", "self.bn.training = False", "self.bn.momentum = 0.5",
    "with torch.no_grad():\n    self.bn.weight.mul_(2.0)", "self.bn2 = self.bn", "self.count.add_(1.0)",
    "self.count += 1.0", "self.weights.data.mul_(2.0)", "self.register_buffer('late', y.detach())", "self.calls += 1",
    "self.last = y", "self.last = y.detach()", "setattr(self, 'last', y.detach().mean())", "self.features.append(y)",
    "self.features.append(y.detach().clone())", "self.history['y'] = tuple(y.shape)", "self.meter.update(y)",
    "self.config.calls += 1", "extra = extra + next(self.counter)", "self.items.append(float(len(self.items)))",
    "random.shuffle(self.items)", "type(self).made += 1", "Net.made += 1", "LOG.append(y)", "LOG.append('between')",
    "STATE['calls'] = STATE.get('calls', 0) + 1", "COUNTS.update(['call'])", "COUNT += 1\nextra = extra + COUNT",
    "print('between', tuple(y.shape))", "warnings.warn('between', stacklevel=1)", "noted('between')",
    "extra = extra + random.random()", "extra = extra + float(np.random.rand())",
    "extra = extra + torch.rand(()).item()", "y = y * torch.rand(y.shape[1], 1, 1, dtype=y.dtype)",
    "extra = extra + torch.rand((), generator=self.generator).item()", "extra = extra + self.rng.rand()",
    "torch.manual_seed(3)", "random.seed(3)", "self.offset.add_(1.0)",
]  # fmt: skip

GRAMMAR: dict[str, list[str]] = {
    "norm": ["self.bn(@)"] * 6 + ["self.bn2(@)"] * 2 + [
        "self.norms[0](@)", "self.named['norm'](@)", "self.body(@)", "self.deep(@)", "self.inner(@)", "self.same(@)",
        "getattr(self, 'bn')(@)", "self._modules['bn'](@)", "self.get_submodule('bn')(@)", "self.bn.forward(@)",
        "self.bn(input=@)", "self.normed(@)", "self.drop0(self.bn(@))", "self.drop(self.bn(@))",
        "self.identity(self.bn(@))", "self.bn(self.conv(@))", "(self.bn if {flag} else self.bn2)(@)",
        "applied(self.bn, @)", "self.bare(@)", "self.free(@)", "self.own(@)", "next(iter(self.norms))(@)",
        "self.averaging(@)", "self.bn.__call__(@)",
        "F.batch_norm(@, self.bn.running_mean, self.bn.running_var, training=self.training)",
        "checkpoint(self.bn, @, use_reentrant=False)",
    ],
    "act": ["self.relu(@)"] * 3 + [
        "F.relu(@)", "F.relu(@, inplace=True)", "F.relu_(@)", "torch.relu(@)", "torch.relu_(@)", "@.relu()",
        "@.relu_()", "torch.nn.functional.relu(input=@)", "torch.sigmoid(@)", "@.tanh()", "F.silu(@)",
        "F.gelu(@, approximate='tanh')", "F.leaky_relu(@, 0.2)", "F.leaky_relu(@, negative_slope={number})",
        "F.elu(@, alpha=0.5)", "F.hardtanh(@, 0.0, 6.0)", "F.softplus(@, beta=2)", "F.mish(@)", "F.hardswish(@)",
        "self.relu_(@)", "self.silu(@)", "self.gelu(@)", "self.leaky(@)", "self.elu(@)", "self.sigmoid(@)",
        "self.tanh(@)", "self.hardswish(@)", "self.softplus(@)", "self.mish(@)", "self.prelu(@)", "self.relu6(@)",
        "self.hand(@)", "self.sequence(@)", "self.named['act'](@)", "self.layers[-1](@)", "self.relu.forward(@)",
        "nn.Module.__call__(self.relu, @)", "nn.ReLU()(@)", "clamped(@)", "(F.relu if {flag} else torch.tanh)(@)",
        "dict(relu=F.relu, tanh=torch.tanh)[self.mode](@)", "getattr(F, self.mode)(@)", "getattr(@, self.mode)()",
        "self.choice(@)", "self.static(@)", "decorated(@)", "ACTIVATION(@)", "@.clamp(min=0.0)",
    ],
    "number": [
        "self.times", "self.rate", "(2.0 if self.mode == 'relu' else 0.5)",
        "(1.0 if self.maybe is None else self.maybe)", "(2.0 if self.phase is Phase.LATE else 0.5)", "self.phase.value",
        "int(self.level)", "self.pair[0]", "sum(self.pair)", "self.items[-1]", "len(self.items)", "self.table['k']",
        "self.table.get('other', 1.0)", "len(self.names)", "self.ratio", "self.affine.scale", "self.config.scale",
        "self.shared", "type(self).shared", "Net.shared", "self.prop", "self.cached", "self.drop.p", "self.bn.momentum",
        "self.bn.eps", "self.conv.stride[0]", "SCALE", "STATE['scale']", "len(LOG)", "self.array[0]",
        "self.nested[0][0]", "math.copysign(2.0, self.rate)", "scaled(1.0)", "self.classy(2.0)", "self.weights",
        "self.count", "self.offset", "x.shape[0]", "x.size(-1)", "x.dim()", "x.numel()", "len(x)", "self.bound(1.0)",
        "self.partial(1.0)", "torch.get_default_dtype().itemsize", "sum(1 for _ in self.modules())", "self.calls",
        "len(self._forward_hooks)", "(self.maybe or 1.0)", "sum(p.numel() for p in self.bn.parameters())",
        "default(1.0)",
    ],
    "flag": ["self.flag"] * 4 + [
        "self.training", "self.bn.training", "(self.mode == 'relu')", "(self.maybe is None)", "flag", "(other is None)",
        "torch.is_grad_enabled()", "torch.is_autocast_enabled('cpu')", "torch.is_inference_mode_enabled()",
        "x.requires_grad", "(x.grad_fn is None)", "(x.dim() == 4)", "(x.shape[0] > 1)", "(x.dtype == torch.float64)",
        "isinstance(x, Tensor)", "(type(x) is Tensor)", "isinstance(x, nn.Parameter)", "hasattr(self, 'maybe')",
        "('aux' in self.names)", "(self.level > 1)", "(self.phase is Phase.LATE)", "(self.drop.p > 0.5)",
        "(0.0 < self.rate < 1.0)", "bool(x.sum() > 0)", "(self.flag and self.maybe)",
        "(not self.flag)", "isinstance(self.relu, nn.ReLU)", "any(self.pair)", "(x is first)",
        "isinstance(self.times, bool)", "SWITCH", "x.is_leaf", "(self.bn is self.same)", "('bn' in self._modules)",
        "(self.dtype == x.dtype)", "all(p.requires_grad for p in self.bn.parameters())", "self.bn.weight.requires_grad",
    ],
    "add": [
        "y = y + r", "y += r", "y = r + y", "y.add_(r)", "y = y.add(r)", "y = torch.add(y, r)",
        "y = torch.add(r, y, alpha=0.5)", "y = torch.add(input=y, other=r)", "y = operator.iadd(y, r)",
        "y = sum([y, r])", "y = operator.add(*[y, r])", "y -= -r", "z = y\nz += r",
    ],
    "into": ["{add}", "r += y\ny = r", "y = r.add_(y)", "r = r + y\ny = r", "y = torch.add(r, y, out=r)", "y = y + y"],
    "fresh": ["x * 0.5", "self.conv(x)", "x.clone()", "self.conv(x).view_as(x)"],
    "other": ["x"] * 2 + ["{fresh}"] * 2 + [
        "{norm x}", "self.shortcut(x)", "x[:, :1]", "x.mean()", "{number}", "torch.zeros_like(x)", "self.weights",
        "self.count", "(x if other is None else other)", "x.detach()", "first", "torch.rand_like(x)", "x.float()", "y",
        "y.detach()",
    ],
    "write": [
        "r.mul_(0.5)", "r.add_(1.0)", "r.copy_(r * 2.0)", "r.view(-1).mul_(0.5)", "r[0].zero_()", "r[:, 1] = 0.0",
        "r *= 0.5", "z = r\nz.mul_(2.0)", "z = r[1:]\nz += 1.0", "written(r)", "self.written(r)", "self.writes(r)",
        "F.relu_(r)", "y.mul_(0.5)", "with torch.no_grad():\n    r.mul_(0.5)", "r.detach().mul_(0.5)",
        "torch._foreach_mul_([r], 2.0)", "nn.init.zeros_(r)", "[t.mul_(2.0) for t in [r]]", "torch.mul(r, 2.0, out=r)",
        "r = r.mul_(2.0)", "r.clamp_(min=0.0)",
    ],
    "hidden": ["r.data.mul_(0.5)", "r.data[0] = 1.0", "z = r.data\nz.zero_()", "self.writes(r.data)"],
    "statement": STATEMENTS,
    "between": [""] * 4 + ["{statement}"],
    "core": ["x = {act {norm x}}"] * 2 + [
        "y = {norm x}\nx = {act y}", "y = {norm x}\n{statement}\nx = {act y}", "y = {norm x}\ny = {act y}\nx = y + y",
        "y = {norm x}\n{statement}\ny = {act y}\n{statement}\nx = y", "y = {norm x}\nx = {act y} + y",
        "y = {norm x}\nx = y", "y = {norm x}\n{between}\nr = {other}\n{between}\n{into}\n{between}\nx = {act y}",
        "r = {other}\ny = {norm x}\n{into}\n{write}\nx = {act y}",
        "r = {fresh}\ny = {norm x}\n{write}\n{add}\nx = {act y}",
        "r = {other}\ny = {norm x}\n{add}\nx = {act y}\n{write}",
        "r = {other}\ny = {norm x}\n{add}\nx = {act y}\nx = x + r", "x = {norm x} + {other}",
        "x = {act {norm x}} * {number}", "r = {fresh}\ny = {norm x}\n{add}\nx = {act y}\n{hidden}",
        "r = {fresh}\ny = {norm x}\n{add}\n{write}\nx = y + r", "y = {act {norm x}}\n{statement}\nx = y",
        "y = {norm x}\ny.data.add_(1.0)\nx = {act y}",
        "r = {fresh}\ny = {norm x}\n{add}\nx = F.silu(y)\n{write}\nx = x + r",
    ],
    "step": ["{core}"] * 12 + [
        "if {flag}:\n    {core}", "if {flag}:\n    {core}\nelse:\n    {core}", "with torch.no_grad():\n    {core}",
        "with torch.inference_mode():\n    {core}", "with torch.set_grad_enabled({flag}):\n    {core}",
        "with torch.autocast('cpu', torch.bfloat16):\n    {core}",
        "try:\n    {core}\nexcept ValueError:\n    x = x * 2.0\nfinally:\n    LOG.append('done')", "x = x * {number}",
        "for layer in self.norms:\n    x = {act layer(x)}",
        "for i in range(len(self.norms)):\n    x = {act self.norms[i](x)}",
        "for name, layer in self.named.items():\n    x = layer(x)", "for layer in self.layers:\n    x = layer(x)",
        "for layer in self.children():\n    x = x + layer(x)",
        "x = [x := layer(x) for layer in (self.bn, self.relu)][-1]",
        "x = functools.reduce(lambda value, layer: layer(value), [self.bn, self.relu], x)", "x = self.whole(x)",
        "x = (lambda value: {act {norm value}})(x)", "def inner(value):\n    return {act {norm value}}\nx = inner(x)",
        "while True:\n    {core}\n    break", "x = self.helper(x)", "x = super().inherited(x)", "x = self.inherited(x)",
        "x = helped(self, x)", "x = closing(self.bn)(x)", "x = silent(self, x)", "x = self.block(x)",
        "x = self.drop(x)", "x = self.function(x)", "x = x if other is None else x + other", "x = x + {number}",
        "x = checkpoint(self.helper, x, use_reentrant=False)", "x = Net.helper(self, x)",
        "x = type(self).helper(self, x)", "{statement}", "x = self.relu(self.body(x) + x)", "x = x[:, [2, 0, 1]]",
        "if other is not None:\n    return self.forward(other)", "x = x.clone()", "x = self.conv(x)",
        "x = x.to(self.dtype)",
    ],
    "end": ["return x"] * 8 + [
        "return x, y", "return [x, first]", "return {'out': x, 'norm': y}", "return x, r", "return", "yield x",
        "return x.sum(), x.shape", "return x.detach()", "return Output(x, y)", "return collections.OrderedDict(out=x)",
        "return {act x}", "return {norm x}",
    ],
    "signature": ["x, other=None, flag=False"] * 6 + [
        "x, *, other=None, flag=False", "*args, **kwargs", "x, other=None, *rest, flag=False, **more",
        "x: Tensor, other: Tensor | None = None, flag: bool = False, scale: float = 1.0",
    ],
    "decorator": [""] * 12 + [
        "@wrapped\n", "@torch.no_grad()\n", "@torch.autocast('cpu', torch.bfloat16)\n", "@bare\n",
    ],
    "image": ["image(2, 3, 4, 4)"] * 10 + ["image(2, 3, 4, 4, grad=True)"] * 10 + [
        "image(3, 3, 2, 2)", "image(1, 3, 1, 1)", "image(2, 4, 4, 4)", "image(2, 3, 4)",
        "nn.Parameter(image(2, 3, 4, 4))", "image(2, 3, 4, 4).to(memory_format=torch.channels_last)",
        "image(2, 3, 4, 4).mul(2.0)", "None", "image(2, 3, 4, 4).as_subclass(Subclass)", "image(0, 3, 4, 4)",
        "image(2, 3, 4, 4).half()",
    ],
    "invocation": ["model({image})"] * 8 + [
        "model(x={image})", "model({image}, {image})", "model({image}, flag=True)", "model({image}, other={image})",
        "model()", "model({image}, None, True)", "model({image}, 1, 2, 3)", "first_model({image})",
        "model.forward({image})", "nn.Sequential(nn.Identity(), model)({image})",
        "torch.func.functional_call(model, model.state_dict(), ({image},))",
    ],
    "call": ["out = {invocation}"] * 8 + [
        "with torch.no_grad():\n    out = {invocation}", "with torch.inference_mode():\n    out = {invocation}",
        "with torch.autocast('cpu', torch.bfloat16):\n    out = {invocation}",
        "with watched():\n    out = {invocation}",
    ],
}  # fmt: skip

CHILDREN = {
    "bn": "nn.BatchNorm2d(3)", "bn2": "nn.BatchNorm2d(3)", "same": "self.bn", "bare": "nn.BatchNorm2d(3, affine=False)",
    "free": "nn.BatchNorm2d(3, track_running_stats=False)", "averaging": "nn.BatchNorm2d(3, momentum=None)",
    "own": "OwnNorm(3)", "conv": "nn.Conv2d(3, 3, 3, padding=1)", "relu": "nn.ReLU()", "relu_": "nn.ReLU(inplace=True)",
    "relu6": "nn.ReLU6()", "silu": "nn.SiLU(inplace=True)", "gelu": "nn.GELU()", "leaky": "nn.LeakyReLU(0.3)",
    "elu": "nn.ELU(0.5)", "sigmoid": "nn.Sigmoid()", "tanh": "nn.Tanh()", "hardswish": "nn.Hardswish()",
    "softplus": "nn.Softplus(2)", "mish": "nn.Mish()", "prelu": "nn.PReLU(3)", "hand": "HandGelu()",
    "writes": "Writes()", "drop": "nn.Dropout(0.3)", "drop0": "nn.Dropout(0.0)", "identity": "nn.Identity()",
    "sequence": "nn.Sequential(nn.Identity(), nn.ReLU())",
    "body": "nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))",
    "deep": "nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3), nn.Dropout(0.0))",
    "shortcut": "nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)))",
    "whole": "nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(True), nn.BatchNorm2d(3), nn.Dropout(0.3))",
    "norms": "nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])",
    "layers": "nn.ModuleList([nn.BatchNorm2d(3), nn.Tanh(), nn.ReLU()])",
    "named": "nn.ModuleDict({'norm': nn.BatchNorm2d(3), 'act': nn.SiLU()})", "inner": "Inner()", "block": "Block()",
    "holder": "Holder(self.bn)", "weights": "nn.Parameter(torch.ones(1, 3, 1, 1))",
    "count": "nn.Buffer(torch.zeros(()))",
}  # fmt: skip

# Initial values and what they may change to; `self` is the module.
ATTRIBUTES = {
    "times": ("1", "2", "True", "1.0"), "rate": ("0.5", "2.0", "0.0", "-0.0"),
    "mode": ("'relu'", "'tanh'", "'missing'"), "flag": ("False", "True", "1"), "maybe": ("None", "2.0", "0"),
    "phase": ("Phase.EARLY", "Phase.LATE"), "level": ("Level.LOW", "Level.HIGH", "1"),
    "pair": ("(1.0, 2.0)", "(3.0, 2.0)", "(0.0, 0)"), "items": ("[1.0]", "[2.0, 3.0]"),
    "table": ("{'k': 1.0}", "{'k': 2.0, 'other': 3.0}", "{}"), "names": ("{'main'}", "{'main', 'aux'}"),
    "ratio": ("np.float64(1.0)", "np.float64(3.0)"), "affine": ("Affine(1.0, 0.0)", "Affine(2.0, 1.0)"),
    "partial": ("functools.partial(scaled, factor=1.0)", "functools.partial(scaled, factor=2.0)"),
    "bound": ("self.plain", "self.doubled"), "function": ("torch.tanh", "torch.relu", "scaled"),
    "choice": ("F.relu", "F.silu", "nn.Tanh()"), "config": ("Config()", "Config()"),
    "dtype": ("torch.float64", "torch.float32"), "array": ("np.ones(3)", "np.zeros(3)"),
    "nested": ("([1.0], 2.0)", "([2.0], 2.0)"),
    "offset": ("torch.tensor(0.5, dtype=torch.float64)", "torch.tensor(2.0, dtype=torch.float64)"),
    "generator": ("torch.Generator().manual_seed(1)",), "rng": ("np.random.RandomState(1)",), "calls": ("0", "3"),
    "last": ("None",), "features": ("[]", "[]"), "history": ("{}",), "counter": ("itertools.count()",),
    "meter": ("Meter()",),
}  # fmt: skip

CLASS = {"shared": ("1.0", "2.0"), "made": ("0", "3")}

GLOBALS = {
    "SCALE": ("1.0", "2.0", "True"), "SWITCH": ("False", "True"), "ACTIVATION": ("F.relu", "torch.tanh", "nn.SiLU()"),
    "COUNT": ("0", "3"), "LOG": ("[]", "[1]"), "STATE": ("{'scale': 1.0}", "{'scale': 2.0}"),
    "COUNTS": ("collections.Counter()",),
}  # fmt: skip

METHODS = """\
def helper(self, x, other=None, flag=False):
    first = x
    {core}
    return x

def normed(self, value):
    return self.bn(value)

def written(self, r):
    r.mul_(2.0)

@staticmethod
def static(value):
    return F.relu(value)

@classmethod
def classy(cls, value):
    return value * cls.shared

@property
def prop(self):
    return self.rate * 2.0

@functools.cached_property
def cached(self):
    return self.rate * 2.0

def plain(self, value):
    return value

def doubled(self, value):
    return value * 2.0"""

DEFINITIONS = """\
class Phase(enum.Enum):
    EARLY, LATE = 1, 2

class Level(enum.IntEnum):
    LOW, HIGH = 1, 2

class Affine(collections.namedtuple('Affine', 'scale shift')):
    pass

class Output(collections.namedtuple('Output', 'value norm')):
    pass

class Config:
    scale, calls = 1.0, 0

class Meter:
    total = 0.0
    def update(self, value):
        self.total = self.total + value.detach().mean()

class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2.0

class HandGelu(nn.Module):
    def forward(self, value):
        return F.gelu(value)

class Writes(nn.Module):
    def forward(self, value):
        return value.mul_(2.0)

class Holder(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
    def forward(self, value):
        return F.relu(self.norm(value))

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
    def forward(self, value):
        return self.bn(value)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.relu = nn.ReLU(inplace=True)
    def forward(self, value):
        out = self.body(value)
        out += value
        return self.relu(out)

class Base(nn.Module):
    def inherited(self, value):
        return F.relu(self.bn(value))

def applied(layer, value):
    return layer(value)

def clamped(value):
    return F.relu(value)

def scaled(value, factor=1.0):
    return value * factor

def default(value, state=[1.0]):
    state[0] += 1.0
    return value * state[0]

def doubled(value):
    return value * 2.0

def written(value):
    value.mul_(2.0)

def noted(text):
    LOG.append(text)

def closing(layer):
    def call(value):
        return F.relu(layer(value))
    return call

def helped(self, x, other=None, flag=False):
    first = x
    {core}
    return x

@torch.no_grad()
def silent(self, x):
    return F.relu(self.bn(x))

def wrapped(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        LOG.append('wrapped')
        return function(*args, **kwargs)
    return call

def bare(function):
    return lambda self, x, *rest, **kwargs: function(self, x * SCALE, *rest, **kwargs)

@wrapped
def decorated(value):
    return F.relu(value)

def unpacked(x, other=None, flag=False):
    return x, other, flag"""

# What is done between calls; also everything in the tables above is given its other values.
COPIES = [
    "first_model, model = model, copy.deepcopy(model)", "first_model, model = model, copy.copy(model)",
    "first_model, model = model, pickle.loads(pickle.dumps(model))", "first_model, model = model, first_model",
]  # fmt: skip
CHANGES = [  # held: nobody can tell later changes of the class from those of what was taken from the instance before
    "model.train()", "model.eval()", "model.train(not model.training)", "model.bn.eval()", "model.bn.train()",
    "model.requires_grad_(False)", "model.requires_grad_(True)", "model.bn.requires_grad_(False)", "model.zero_grad()",
    "torch.optim.SGD(model.parameters(), 0.1).step()", "model.load_state_dict(copy.deepcopy(first_model.state_dict()))",
    "model.float()", "model.double()", "report(model)", "convert(model)", "revert(model)", "convert(revert(model))",
    "for n in range(20):\n    model.times = n\n    out = model(image(2, 3, 4, 4))", "model.relu = nn.Sigmoid()",
    "model.relu = nn.Identity()", "model.relu = nn.PReLU().double()", "model.relu.inplace = True",
    "model.bn = nn.BatchNorm2d(3).double()", "model.bn = nn.Identity()", "model.bn = model.bn2", "model.bn2 = model.bn",
    "del model.bn", "del model.relu", "model.add_module('late', nn.BatchNorm2d(3).double())",
    "model.body[1] = nn.Identity()", "model.body.append(nn.Tanh())", "model.layers.append(nn.Tanh())",
    "model.layers[-1] = nn.Sigmoid()", "model.norms[0] = nn.Identity()",
    "model.norms.append(nn.BatchNorm2d(3).double())", "del model.norms[0]", "model.named['norm'] = nn.Identity()",
    "model.named['act'] = nn.Tanh()", "model.deep[0][0] = nn.Identity()", "model.whole[2] = nn.Sigmoid()",
    "model.sequence[1] = nn.Tanh()", "model.inner.bn = nn.Identity()", "model.conv.stride = (2, 2)",
    "model.drop.p = 1.0", "model.drop0.p = 1.0", "model.bn.momentum = None", "model.bn.eps = 0.1",
    "model.bn.affine = False", "model.bn.track_running_stats = False",
    "model.bn.running_mean = model.bn.running_var = None", "model.bn.weight = None", "model.leaky.negative_slope = 0.9",
    "model.elu.alpha = 2.0", "model.softplus.beta = 3", "model.gelu.approximate = 'tanh'",
    "model.bn.weight.data.zero_()", "model.bn.weight = nn.Parameter(torch.rand(3).double())",
    "model.bn.running_mean.fill_(2.0)",
    "handles.append(model.bn.register_forward_hook(lambda layer, given, out: out * 2.0))",
    "handles.append(model.bn.register_forward_hook(recorded))",
    "handles.append(model.bn.register_forward_pre_hook(recorded))",
    "handles.append(model.bn.register_forward_pre_hook(lambda layer, given: (given[0] * 2.0,)))",
    "handles.append(model.bn.register_full_backward_hook(recorded))",
    "handles.append(model.relu.register_forward_hook(recorded))",
    "handles.append(model.relu.register_full_backward_pre_hook(recorded))",
    "handles.append(model.register_forward_hook(recorded))",
    "handles.append(model.relu.register_forward_hook(lambda layer, given, out: out * 2.0))",
    "handles.append(model.body[1].register_forward_hook(recorded))", "handles and handles.pop().remove()",
    "if 'held' not in globals():\n    Net.forward = lambda self, x, other=None, flag=False: self.bn(x).sigmoid()",
    "Net.helper = lambda self, x: x * 2.0", "model.helper = types.MethodType(lambda self, x: self.bn(x), model)",
    "model.normed = lambda value: value * 2.0", "model.static = torch.tanh", "Net.static = torch.tanh",
    "Net.prop = 3.0", "Net.inherited = lambda self, x: x * 2.0",
    "model.__class__ = type('Other', (Net,), {'shared': 5.0})",
    "if 'held' not in globals():\n    model.__class__ = type('Other', (Net,), {'forward': lambda self, x: x})",
    "model.forward = lambda *args, forward=model.forward, **kwargs: forward(*args, **kwargs)\nheld = True",
    "model.forward = types.MethodType(Net.forward, model)", "model.relu.forward = lambda value: value * 3.0",
    "model.bn.forward = lambda value: value", "module.F = types.SimpleNamespace(**{**vars(F), 'relu': torch.sigmoid})",
    "module.clamped = torch.tanh", "module.scaled = lambda value, factor=1.0: value * 5.0",
    "module.scaled.__defaults__ = (3.0,)", "module.helped = lambda self, x: x", "module.LOG.append(1)",
    "module.STATE['scale'] = 3.0", "module.Phase = None", "model.items.append(3.0)", "model.items[0] = 4.0",
    "model.table['k'] = 4.0", "model.names.add('aux')", "model.config.scale = 3.0", "module.Config.scale = 3.0",
    "model.array[0] = 3.0", "model.nested[0][0] = 3.0", "model.offset.fill_(2.0)", "model.weights.data.fill_(2.0)",
    "model.count.fill_(2.0)", "del model.flag", "del model.maybe", "model.shared = 3.0",
    "Net.rate = property(lambda self: 3.0)", "module.len = lambda value: 7", "model.relu.__class__ = nn.Tanh",
    "Net.forward.__defaults__ = (None, True)",
    "Net.helper.__code__ = (lambda self, x, other=None, flag=False: x * 2.0).__code__",
    "module.HandGelu.forward = lambda self, value: value * 2.0",
    "module.Inner.forward = lambda self, value: value * 2.0", "model.relu = None", "model.bn = None",
    "model._modules['relu'] = nn.Tanh()", "vars(model)['rate'] = 3.0", "vars(model)['relu'] = torch.tanh",
    "Net.relu = staticmethod(torch.tanh)", "with torch.no_grad():\n    convert(revert(model))",
]  # fmt: skip

_HOLE = re.compile(r"\{(" + "|".join(GRAMMAR) + r")(?: ([^{}]*))?\}")
_WORDS = re.compile(r"(?:self\.|\.|')?[A-Za-z_]\w*")
_CHANGED = re.compile(r"\b(?:model|module|Net)(?:\.|\)\[')([A-Za-z_]\w*)")
Choose = Callable[[str], str]


def _parts(text: str) -> dict[str, str]:
    """Functions and classes by their names."""
    return {re.search(r"(?:def|class) (\w+)", part)[1]: part for part in text.split("\n\n")}  # type: ignore[index]


# Where the tables go to, and how a text names what they hold.
_TABLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "globals": (GLOBALS, ("",)),
    "definitions": (_parts(DEFINITIONS), ("",)),
    "class": (CLASS, ("self.", ".")),
    "children": (CHILDREN, ("self.",)),
    "attributes": (ATTRIBUTES, ("self.", "'")),
    "methods": (_parts(METHODS), ("self.", ".")),
}


@dataclass(frozen=True, repr=False)
class Program:
    """The source of a module that defines Net, and what is done with `model`, a Net, one text after the other."""

    source: str
    actions: tuple[str, ...]
    in_file: bool = True

    def __repr__(self) -> str:
        actions = "\n".join(self.actions)
        return f"{self.source}\n# then{'' if self.in_file else ', without a file'}:\n{actions}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints: the error has shown all of it."""
        printer.text("that program")


def expanded(text: str, choose: Choose) -> str:
    """The text with what is chosen in the place of each {name}, at its indentation."""
    while hole := _HOLE.search(text):
        line = text[text.rfind("\n", 0, hole.start()) + 1 : hole.start()]
        chosen = choose(hole[1]).replace("\n", "\n" + (line if line.isspace() else ""))
        chosen = chosen.replace("@", hole[2]) if hole[2] else chosen
        text = text[: hole.start()] + chosen + text[hole.end() :]
    return text


def _completed(function: str) -> str:
    """A function with what it needs before its first line and its last one."""
    head, body = re.fullmatch(r"((?:@[^\n]*\n)*def [^\n]*:\n)(.*)", function, re.DOTALL).groups()  # type: ignore[union-attr]
    *lines, last = [line for line in body.split("\n") if line.strip()]
    start = ["global COUNT"] if "COUNT +=" in body else []
    start += ["x, other, flag = unpacked(*args, **kwargs)"] if "*args" in head else []
    unset = [
        name
        for name in ("first", "y", "r")
        if (found := re.search(rf"^.*?\b{name}\b.*$", body, re.MULTILINE)) and not _assigns(found[0], name)
    ]
    start += [" = ".join([*unset, "x"])] if unset else []
    if "extra" in body:
        start, lines = [*start, "extra = 0.0"], [*lines, "    x = x + extra"]
    return head + "\n".join([*(f"    {line}" for line in start), *lines, last])


def _assigns(line: str, name: str) -> bool:
    return line.startswith(f"    {name} = ") and not re.search(rf"\b{name}\b", line.partition(" = ")[2])


def module_source(steps: list[str], choose: Choose) -> tuple[str, list[str], list[str]]:
    """The source of a Net whose forward does these steps; the changes of its values; the CHANGES that are possible."""
    body = indent("\n".join([*steps, expanded("{end}", choose)]), "    ")
    forward = _completed(expanded(f"{{decorator}}def forward(self, {{signature}}):\n{body}", choose))
    found: dict[str, dict[str, Any]] = {kind: {} for kind in _TABLES}
    text, size = forward, 0
    while len(text) > size:
        size, words = len(text), set(_WORDS.findall(text))
        words |= {name for name, called in (("Base", ".inherited"), ("self.bn", "'bn'")) if called in text}
        for kind, (table, prefixes) in _TABLES.items():
            for name in [n for n in table if n not in found[kind] and any(prefix + n in words for prefix in prefixes)]:
                part = table[name]
                if "{core}" in part:
                    part = _completed(expanded(part, choose))
                found[kind][name] = part
                text += "\n" + (part if isinstance(part, str) else "\n".join(part))
    for kind, (table, _) in _TABLES.items():
        found[kind] = {name: found[kind][name] for name in table if name in found[kind]}
    members = [f"    {name} = {values[0]}" for name, values in found["class"].items()]
    members += ["    def __init__(self):", "        super().__init__()"]
    members += [f"        self.{name} = {value}" for name, value in found["children"].items()]
    members += [f"        self.{name} = {values[0]}" for name, values in found["attributes"].items()]
    members += [indent(part, "    ") for part in (*found["methods"].values(), forward)]
    lines = [f"{name} = {values[0]}" for name, values in found["globals"].items()]
    lines += found["definitions"].values()
    lines += [f"class Net({'Base' if 'Base' in found['definitions'] else 'nn.Module'}):"]
    values = [
        f"{place}.{name} = {value.replace('self.', 'model.')}"
        for kind, place in (("attributes", "model"), ("class", "Net"), ("globals", "module"))
        for name, values in found[kind].items()
        for value in values[1:]
    ]
    missing = {name for table, _ in _TABLES.values() for name in table} - {n for part in found.values() for n in part}
    changes = [change for change in CHANGES if missing.isdisjoint(_CHANGED.findall(change))]
    return "\n".join([HEADER, *lines, *members, ""]), values, changes


_CHOICES = {name: st.sampled_from(options) for name, options in GRAMMAR.items()}


@st.composite
def _steps(draw: st.DrawFn) -> str:
    return expanded("{step}", lambda name: draw(_CHOICES[name]))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Up to six steps in a forward; up to four calls, each after up to two changes."""

    def choose(name: str) -> str:
        return draw(_CHOICES[name])

    steps = draw(st.lists(_steps(), min_size=1, max_size=6))
    source, values, changes = module_source(steps, choose)
    change = st.sampled_from([values or changes, changes, COPIES]).flatmap(st.sampled_from)
    actions: list[str] = []
    for changed in draw(st.lists(st.lists(change, max_size=2), min_size=1, max_size=4)):
        actions += [*changed, expanded("{call}", choose)]
        actions += ["backward(out)"] if draw(st.booleans()) else []
    return Program(source, tuple(actions), draw(st.integers(0, 9)) < 9)


def ingredients() -> Iterator[tuple[str, str]]:
    """All that the grammar has: (name, production)."""
    for name, options in GRAMMAR.items():
        yield from ((name, option) for option in dict.fromkeys(options))


def program_with(name: str, production: str) -> Program:
    """A small program in which {name} is always this production; the attributes that it names change between calls."""
    leads = {name}
    for _ in GRAMMAR:
        leads |= {other for other, options in GRAMMAR.items() if any(_leads(option, leads) for option in options)}

    def choose(other: str) -> str:
        options = GRAMMAR[other]
        if other == name:
            return production
        nearest = [option for goal in ({name}, leads) for option in options if _leads(option, goal)]
        return [*nearest, *options][0]

    start = "x = self.relu(self.bn(self.conv(x)))"
    source, values, _ = module_source([start, expanded("{step}", choose)], choose)
    call = expanded("{call}", choose)
    actions = [call, "backward(out)"]
    for value in values[:3]:
        actions += [value, call]
    return Program(source, (*actions, "model.eval()", call, "backward(out)"))


def _leads(text: str, goals: set[str]) -> bool:
    return any(hole[1] in goals for hole in _HOLE.finditer(text))
