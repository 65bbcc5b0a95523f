"""What a call costs those who do not call as a benchmark does: with other tensors each time, or by other ways.

A case is one call of batch norm in training, forward alone (recorded by autograd) or with its backward:

- steady: the function, each time with the same tensors.
- fresh-parameters: weight, bias and running statistics are other objects at each call, never seen before.
- toggled-grad: between calls weight and bias stop or start to require gradients, as those of a discriminator while its
  generator is trained.
- two-layouts: contiguous and channels_last inputs [N / 4, C, 2, 2] in turn, with the same parameters.
- two-dtypes: float32 and bfloat16 inputs in turn, with the same float32 parameters.
- functional_call: torch.func.functional_call of a module with parameters and buffers that are other ones at each call.
- module, module-momentum-none: BatchNorm1d, which counts its batches; with the average over all batches.
- fused-container: nn.Sequential of a batch norm and a ReLU, which ours computes in one operation.
- compiled-operator: what compiled code calls at run time: torch.library's operators, without autograd. Of torch's the
  same: aten's operators.
- new-shape: N that was never seen before: what the call costs more than a steady one, ours and torch's alike. Kernels
  were compiled for its tile. The library decides on the plan here; in all other cases the path is forced. Planning
  alone is that of an H200, which has more to choose from than the CPU.

Each is compared with steady calls of the function in the same run: `ratio`, which leaves out what the caller does
beside, `wrapper`: toggling, and functional_call of a module that does nothing. Where inputs take turns, steady is the
mean of theirs.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tritonbn
from tritonbn import choice, dispatch, geometry, handles, model, plan, planning, traffic
from tritonbn.activations import IDENTITY
from tritonbn.functional import batch_norm
from tritonbn.plan import Operation, Path, Plan, make_plan

TORCH = torch.nn.functional.batch_norm
SHAPES: tuple[tuple[tuple[int, int], Path], ...] = ((60, 100), "single"), ((512, 32), "split")
MOMENTUM, EPS = 0.1, 1e-5
NEW_SHAPES = 28  # as many N as have the tile of 60 x 100 are not 60 and no multiple of 16
COUNTED = 20  # calls after which nothing may be compiled any more, and calls that are watched then

Work = Callable[[], object]
Prepare = Callable[[int], list[Work]]  # at most so many calls, to be made one after the other; itself it is not timed


# All that is known here of the library's inside.


def kept_handles() -> int:
    """How many compiled kernels are kept to be launched again."""
    return len(handles._handles)


def forget_handles() -> None:
    handles.forget()


def forget_shapes() -> None:
    """Have every shape be a new one; compiled kernels stay."""
    dispatch.forget_calls()
    for module in (choice, geometry, model, plan, planning, traffic):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def compiled_operator(t: "Tensors", backward: bool) -> object:
    """What compiled code runs in the place of the function; it has taken the function apart already."""
    ops = torch.ops.tritonbn
    y, _, mean, rstd = ops.batch_norm.default(
        t.x, t.weight, t.bias, None, t.mean, t.var, None, True, MOMENTUM, EPS, *IDENTITY, True, False
    )
    if not backward:
        return y
    return ops.batch_norm_backward.default(
        t.g, t.x, t.weight, None, None, None, mean, rstd, True, *IDENTITY, EPS, t.weight.dtype,
        [True, True, True, False],
    )  # fmt: skip


class Tensors(NamedTuple):
    """x and g [N, C, ...], parameters and statistics [C]."""

    x: Tensor
    g: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor


class Setting:
    """Makes the tensors and calls of the cases of a shape and a direction."""

    def __init__(self, shape: tuple[int, int], device: torch.device, backward: bool) -> None:
        self.N, self.C = shape
        self.device = device
        self.backward = backward

    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight, bias, mean and var, new ones."""
        one, zero = torch.ones(self.C, device=self.device), torch.zeros(self.C, device=self.device)
        return nn.Parameter(one), nn.Parameter(zero), zero.clone(), one.clone()

    def input(self, *shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> tuple[Tensor, Tensor]:
        """x and g, [N, C] if no shape is given; channels_last if `last`."""
        memory_format = torch.channels_last if last else torch.contiguous_format
        x, g = (
            torch.randn(shape or (self.N, self.C), dtype=dtype, device=self.device).contiguous(
                memory_format=memory_format
            )
            for _ in range(2)
        )
        return x.requires_grad_(), g

    def tensors(self) -> Tensors:
        return Tensors(*self.input(), *self.vectors())

    def work(self, call: Callable[[], Tensor], g: Tensor, *inputs: Tensor) -> Work:
        """The call, and its gradients by those inputs if there is to be a backward."""
        return partial(_both_ways, call, inputs, g) if self.backward else call

    def function(self, function: Callable[..., Tensor], t: Tensors) -> Work:
        """A call of batch norm as a function."""
        call = partial(function, t.x, t.mean, t.var, t.weight, t.bias, True, MOMENTUM, EPS)
        return self.work(call, t.g, *(v for v in (t.x, t.weight, t.bias) if v.requires_grad))

    def module(self, module: nn.Module, norm: nn.Module, x: Tensor, g: Tensor) -> Work:
        """A call of a module with the batch norm in it."""
        return self.work(partial(module, x), g, x, norm.weight, norm.bias)  # type: ignore[arg-type]


def _both_ways(call: Callable[[], Tensor], inputs: tuple[Tensor, ...], g: Tensor) -> object:
    return torch.autograd.grad(call(), inputs, g)


def in_turn(*works: Work) -> Prepare:
    """The same works again and again."""
    return lambda calls: [works[index % len(works)] for index in range(calls)]


class Made(NamedTuple):
    """What is timed for a case."""

    ours: Prepare
    torchs: Prepare
    steady: tuple[Prepare, ...] = ()  # what ours is compared with; (): the steady function
    wrapper: Prepare | None = None  # what the caller does beside
    grad: bool = True
    beyond: Prepare | None = None  # torch's steady call: figures are what ours and torch's cost beyond steady ones
    planning: Prepare | None = None


def _steady(s: Setting) -> Made:
    t = s.tensors()
    return Made(in_turn(s.function(batch_norm, t)), in_turn(s.function(TORCH, t)))


def _fresh_parameters(s: Setting) -> Made:
    x, g = s.input()
    kept = []  # so that none gets the id of another one

    def prepare(function: Callable[..., Tensor], calls: int) -> list[Work]:
        made = [Tensors(x, g, *s.vectors()) for _ in range(calls)]
        if function is batch_norm:
            kept.extend(made)
        return [s.function(function, t) for t in made]

    return Made(partial(prepare, batch_norm), partial(prepare, TORCH))


def _toggled_grad(s: Setting) -> Made:
    def toggled(t: Tensors, on: bool, work: Work) -> object:
        t.weight.requires_grad_(on)
        t.bias.requires_grad_(on)
        return work()

    def both(function: Callable[..., Tensor]) -> Prepare:
        t, works = s.tensors(), []
        for on in (True, False):
            toggled(t, on, tuple)
            works.append(partial(toggled, t, on, s.function(function, t)))
        return in_turn(*works)

    recorded, fixed, other = (s.tensors() for _ in range(3))
    toggled(fixed, False, tuple)
    return Made(
        both(batch_norm),
        both(TORCH),
        tuple(in_turn(s.function(batch_norm, t)) for t in (recorded, fixed)),
        in_turn(*(partial(toggled, other, on, tuple) for on in (True, False))),
    )


def _two_inputs(s: Setting, *inputs: tuple[Tensor, Tensor]) -> Made:
    """In turn with the same parameters; steady ones have their own."""

    def both(function: Callable[..., Tensor]) -> Prepare:
        vectors = s.vectors()
        return in_turn(*(s.function(function, Tensors(*given, *vectors)) for given in inputs))

    steady = (in_turn(s.function(batch_norm, Tensors(*given, *s.vectors()))) for given in inputs)
    return Made(both(batch_norm), both(TORCH), tuple(steady))


def _two_layouts(s: Setting) -> Made:
    shape = s.N // 4, s.C, 2, 2
    return _two_inputs(s, s.input(*shape), s.input(*shape, last=True))


def _two_dtypes(s: Setting) -> Made:
    return _two_inputs(s, s.input(), s.input(dtype=torch.bfloat16))


class Nothing(nn.BatchNorm1d):
    """The parameters of a batch norm, and a forward that does not use them."""

    def forward(self, input: Tensor) -> Tensor:
        """input: any -> itself."""
        return input


def _functional_call(s: Setting) -> Made:
    x, g = s.input()
    kept: list[dict[str, Tensor]] = []  # as above

    def prepare(module: nn.Module, calls: int) -> list[Work]:
        state = {name: t.detach() for name, t in module.state_dict().items()}
        works: list[Work] = []
        for _ in range(calls):
            given = {name: t.clone() for name, t in state.items()}
            if isinstance(module, tritonbn.BatchNorm1d):
                kept.append(given)
            inputs = x, given["weight"].requires_grad_(), given["bias"].requires_grad_()
            call = partial(torch.func.functional_call, module, given, (x,))
            works.append(call if isinstance(module, Nothing) else s.work(call, g, *inputs))
        return works

    kinds: tuple[type[nn.Module], ...] = tritonbn.BatchNorm1d, nn.BatchNorm1d, Nothing
    ours, theirs, nothing = (partial(prepare, kind(s.C, device=s.device)) for kind in kinds)
    return Made(ours, theirs, wrapper=nothing)


def _module(s: Setting, momentum: float | None = MOMENTUM) -> Made:
    x, g = s.input()
    ours, theirs = (kind(s.C, momentum=momentum, device=s.device) for kind in (tritonbn.BatchNorm1d, nn.BatchNorm1d))
    return Made(in_turn(s.module(ours, ours, x, g)), in_turn(s.module(theirs, theirs, x, g)))


def _fused_container(s: Setting) -> Made:
    x, g = s.input()
    theirs = nn.Sequential(nn.BatchNorm1d(s.C, device=s.device), nn.ReLU())
    ours = tritonbn.convert(copy.deepcopy(theirs), fuse=True)
    return Made(in_turn(s.module(ours, ours[0], x, g)), in_turn(s.module(theirs, theirs[0], x, g)))


def torchs_operator(t: Tensors, backward: bool) -> object:
    """What compiled code runs where it takes torch's function apart no further."""
    ops = torch.ops.aten
    y, mean, rstd = ops.native_batch_norm.default(t.x, t.weight, t.bias, t.mean, t.var, True, MOMENTUM, EPS)
    if not backward:
        return y
    return ops.native_batch_norm_backward.default(
        t.g, t.x, t.weight, t.mean, t.var, mean, rstd, True, EPS, [True, True, True]
    )


def _compiled_operator(s: Setting) -> Made:
    t = Tensors(*(v.detach() for v in s.tensors()))
    ours, theirs = (in_turn(partial(work, t, s.backward)) for work in (compiled_operator, torchs_operator))
    return Made(ours, theirs, grad=False)


def _new_shape(s: Setting) -> Made:
    t, theirs = s.tensors(), s.tensors()
    operations: tuple[Operation, ...] = ("forward", "backward") if s.backward else ("forward",)

    def planned(N: int) -> list[Plan]:
        return [make_plan(operation, "rows", (N, s.C, 1), 4) for operation in operations]

    def kinds(N: int) -> list[Any]:
        return [(p.path, p.tile, p.num_warps) for p in planned(N)]

    sizes = [N for N in range(s.N // 2 + 1, 2 * s.N) if N % 16 and N != s.N and kinds(N) == kinds(s.N)]
    sizes = sizes[:: max(1, len(sizes) // NEW_SHAPES)][:NEW_SHAPES]
    inputs = [s.input(N, s.C) for N in sizes]
    steady, torchs_steady = s.function(batch_norm, t), s.function(TORCH, theirs)

    def prepare(function: Callable[..., Tensor], of: Tensors, calls: int) -> list[Work]:
        forget_shapes()
        steady()  # finds again what does not depend on the shape
        return [s.function(function, of._replace(x=x, g=g)) for x, g in inputs[:calls]]

    def planning(calls: int) -> list[Work]:
        forget_shapes()
        planned(s.N)
        return [partial(planned, N) for N in sizes[:calls]]

    def again(calls: int) -> list[Work]:
        steady()
        return [steady] * calls

    for work in prepare(batch_norm, t, NEW_SHAPES):  # compiles
        work()
    return Made(
        partial(prepare, batch_norm, t), partial(prepare, TORCH, theirs), (again,), None, True,
        in_turn(torchs_steady), planning,
    )  # fmt: skip


CASES: dict[str, Callable[[Setting], Made]] = {
    "steady": _steady,
    "fresh-parameters": _fresh_parameters,
    "toggled-grad": _toggled_grad,
    "two-layouts": _two_layouts,
    "two-dtypes": _two_dtypes,
    "functional_call": _functional_call,
    "module": _module,
    "module-momentum-none": partial(_module, momentum=None),
    "fused-container": _fused_container,
    "compiled-operator": _compiled_operator,
    "new-shape": _new_shape,
}
