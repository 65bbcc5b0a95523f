"""Every path gives the same numbers: each forced, against the exact result and for each way to take turns."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import Layout
from tests.launches import recorded
from tests.test_determinism import step
from tests.test_epilogue import check as check_epilogue
from tests.test_numerics import check
from tests.together import together
from tritonbn import dispatch, handles, launch, planning
from tritonbn.activations import resolve
from tritonbn.choice import Choice, Operation, Plan, build
from tritonbn.device import Device
from tritonbn.plan import forced, make_plan

pytestmark = pytest.mark.usefixtures("poison")

# Tiles of a few rows, so that small tensors have many.
CHOICES = {
    "cooperative": Choice("cooperative", 4, 64, 1, splits=1 << 20),
    "stream": Choice("stream", 4, 64, 1, splits=3, slots=2),
    "stream-one-slot": Choice("stream", 2, 64, 1, splits=2, slots=1),
    "stream-one-program": Choice("stream", 4, 64, 1, splits=1),
    "staged": Choice("split", 2, 64, 1, splits=2, apply_tiles=2, stages=3),
}
KERNELS = {
    "cooperative": ["cooperative_forward_kernel", "cooperative_backward_kernel"],
    "stream": ["cooperative_forward_kernel", "cooperative_backward_kernel"],
    "split": ["statistics_kernel", "normalize_kernel", "gradient_sums_kernel", "input_gradient_kernel"],
}


@contextmanager
def on(name: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Iterator[None]:
    """Every plan takes the choice of that name; interpreted programs take turns."""
    choice = CHOICES[name]
    with ExitStack() as stack:
        if launch.INTERPRETED:
            monkeypatch.setattr(planning, "device_of", lambda device: Device(cooperative=True))
            stack.enter_context(together(seed))
        stack.enter_context(forced(choice=choice))
        yield


LAYOUTS: list[Any] = cases.LAYOUTS
EACH = [pytest.param(name, *layout.values, id=f"{name}-{layout.id}") for name in CHOICES for layout in LAYOUTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "layout"), EACH)
def test_layouts(
    name: str, layout: Layout, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on(name, monkeypatch), recorded() as kernels:
        check(layout, cases.gaussian(0.5, 2.0), dtype, device)
    assert kernels[: len(KERNELS[CHOICES[name].path])] == KERNELS[CHOICES[name].path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_programs_that_have_no_lane(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd planes start up to 7 lanes after their tiles do: in the last block only some channels have lanes."""
    with on("cooperative", monkeypatch):
        check(Layout((2, 8, 639)), cases.gaussian(0.5, 2.0), dtype, device)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", ["cooperative", "stream"])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_epilogues(
    layout: Layout, name: str, activation: str, residual: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on(name, monkeypatch):
        check_epilogue(layout, resolve(activation), residual, torch.float32, device)


@pytest.mark.parametrize("name", ["cooperative", "stream"])
@pytest.mark.parametrize("fill", cases.FILLS)
def test_hard_data(fill: cases.Fill, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        CHOICES, name, CHOICES[name]._replace(block_r=16)
    )  # as many values as real tiles have, or fewer
    for layout in (Layout((100, 100)), Layout((60, 10, 7, 7))):
        with on(name, monkeypatch):
            check(layout, fill, torch.float32, device)


@pytest.mark.parametrize("name", ["cooperative", "stream", "stream-one-slot", "staged"])
@pytest.mark.parametrize("layout", cases.FEW_LAYOUTS)
def test_whoever_comes_first(layout: Layout, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever the order of the programs, and counters that the next launch can use as they are."""

    def run(seed: int) -> list[Tensor]:
        with on(name, monkeypatch, seed):
            return step(layout, torch.float32, device)

    first = run(0)
    for seed in range(1, 6):
        assert all(torch.equal(a, b) for a, b in zip(first, run(seed), strict=True))


def test_without_cooperation_nothing_waits() -> None:
    """Programs that run one after another would wait for ever: no plan, forced or not, may ask for it."""
    alone = Device(cooperative=False)
    for path in ("cooperative", "stream"):
        with forced(path), pytest.raises(ValueError, match=f"path {path} cannot run forward of .* on NVIDIA H200"):
            make_plan("forward", "planes", (256, 64, 3136), 2, alone)
        with forced(choice=CHOICES[path]), pytest.raises(ValueError, match="waits for other programs"):
            make_plan("forward", "rows", (24, 32, 1), 2, alone)
    for shape in ((256, 64, 12544), (256, 64, 3136), (256, 512, 49), (60, 100, 1)):
        assert make_plan("forward", "planes", shape, 2, alone).path in ("single", "split")
    assert not planning.device_of(torch.device("cpu")).cooperative


def test_beside_other_processes_no_plan_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was found before the process group was: a cooperative grid would wait for its collectives."""
    x = torch.randn(64, 32, requires_grad=True)
    waiting = CHOICES["cooperative"]
    found = dispatch.recognize((x, None, None, None, None, None, None), True)
    calls = []

    def plan(operation: Operation, tensor: Tensor, costly: bool = False) -> Plan:
        calls.append(operation)
        problem = planning.problem_of(operation, tensor, costly)
        choice = waiting if planning.alone() else Choice("split", 4, 64, 1)
        return build(problem, choice)

    monkeypatch.setattr(dispatch, "plan_for", plan)
    assert [found.plan("forward", x).plan.path for _ in range(3)] == ["cooperative"] * 3
    assert len(calls) == 1
    monkeypatch.setattr(dispatch, "alone", lambda: False)
    monkeypatch.setattr(planning, "alone", lambda: False)
    assert found.plan("forward", x).plan.path == "split"


@pytest.mark.skipif(not launch.INTERPRETED, reason="pretends that programs do not fit")
@pytest.mark.parametrize("name", ["cooperative", "stream"])
def test_what_does_not_fit_at_a_time_falls_back(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers by a plan whose programs need no other, and no second attempt."""
    start, attempts = launch._launch, []

    def refuse(kernel: Any, grid: Any, plan: Plan, *args: Any, **constants: Any) -> None:
        if plan.cooperative:
            attempts.append(kernel.__name__)
            raise handles.TooManyPrograms("too many")
        start(kernel, grid, plan, *args, **constants)

    monkeypatch.setattr(launch, "_launch", refuse)
    monkeypatch.setattr(launch, "_too_many", {})
    with on(name, monkeypatch):
        check_epilogue(Layout((37, 100)), resolve("relu"), True, torch.float32, device)
    assert sorted(attempts) == ["cooperative_backward_kernel", "cooperative_forward_kernel"]
