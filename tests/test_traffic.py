"""Bytes that the kernels really load and store, counted in the interpreter, against what the plan says they move."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import Layout
from tests.test_paths import CHOICES, on
from tritonbn import launch, planning, tickets
from tritonbn.activations import IDENTITY, resolve
from tritonbn.autograd import keeps_bits
from tritonbn.launch import Saved
from tritonbn.plan import Plan, forced, make_plan
from tritonbn.traffic import Operands, bytes_moved, floor_bytes

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="counts what Triton's interpreter does")

LAYOUTS = [
    pytest.param(Layout((24, 32)), id="rows"),
    pytest.param(Layout((200, 100)), id="rows-several-tiles"),
    pytest.param(Layout((41, 7)), id="rows-odd"),
    pytest.param(Layout((40, 7)), id="rows-folded"),
    pytest.param(Layout((3, 10, 7, 7)), id="7x7"),
    pytest.param(Layout((20, 8, 7, 7)), id="7x7-several-tiles"),
    pytest.param(Layout((3, 2, 70, 70)), id="planes-several-blocks"),
    pytest.param(Layout((3, 8, 23, 23)), id="odd-planes"),
    pytest.param(Layout((2, 16, 5, 5), torch.channels_last), id="channels-last"),
]


def agrees(counted: int, said: int, plan: Plan) -> bool:
    """Whether so many bytes are what the plan says.

    Odd planes are read in whole accesses, with some of their neighbours', in sectors that memory moves anyway.
    """
    return said <= counted <= said * (1 + 2 * (plan.tile.ALIGN - 1) / plan.shape[2])


@contextmanager
def counted(size: int) -> Iterator[list[int]]:
    """Bytes accessed in tensors of at least `size` elements, or of bits, that kernels started within are given."""
    ranges: list[tuple[int, int]] = []
    total = [0]
    builder = interpreter.InterpreterBuilder
    load, store, start = builder.create_masked_load, builder.create_masked_store, launch._launch

    def count(pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data.astype(bool)]
        total[0] += width * sum(int(((addresses >= low) & (addresses < high)).sum()) for low, high in ranges)

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def note(kernel: Any, grid: Any, plan: Any, *args: Any, **constants: Any) -> None:
        scratch = [*tickets._pool.values(), *tickets._partials.values()]
        tensors = [t for t in args if isinstance(t, Tensor) and not any(t is kept for kept in scratch)]
        full = [t for t in tensors if t.numel() >= size or t.dtype == torch.uint8]
        ranges[:] = sorted({(t.data_ptr(), t.data_ptr() + t.nbytes) for t in full})
        start(kernel, grid, plan, *args, **constants)

    builder.create_masked_load, builder.create_masked_store, launch._launch = counting_load, counting_store, note
    try:
        yield total
    finally:
        builder.create_masked_load, builder.create_masked_store, launch._launch = load, store, start


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
@pytest.mark.parametrize("path", ["single", "split"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_move_what_the_plan_says(layout: Layout, path: Any, name: str, residual: bool, training: bool) -> None:
    x, dy, z = (layout.arrange(torch.randn(layout.shape)).bfloat16() for _ in range(3))
    C = layout.shape[1]
    weight, bias, mean, var = torch.rand(4, C)
    activation = resolve(name)
    added = z if residual else None
    bits_kept = keeps_bits(added, activation)
    with forced(path):
        plan = planning.plan_for("forward" if training else "inference", x)
        with counted(x.numel()) as forward:
            if training:
                _, bits, _, _ = launch.forward(
                    x, added, weight, bias, mean, var, None, 0.1, 1e-5, activation, bits_kept
                )
            else:
                _, bits, _, _ = launch.inference(x, added, weight, bias, mean, var, 1e-5, activation, bits_kept)
        assert agrees(forward[0], bytes_moved(plan, Operands(training, residual, bits_kept)), plan)

        needs_z = activation != IDENTITY and not bits_kept
        saved = Saved(x, weight, bias, added if needs_z else None, bits, mean, var)
        plan = planning.plan_for("backward", x, activation.costly)
        for dx in (True, False):
            for parameters in (True, False):
                for dresidual in {False, residual and activation != IDENTITY}:
                    wanted = dx, parameters, parameters, dresidual
                    with counted(x.numel()) as backward:
                        launch.backward(dy, saved, training, activation, torch.float32, wanted)
                    operands = Operands(training, residual and needs_z, bits_kept, needs_z, dx, parameters, dresidual)
                    assert agrees(backward[0], bytes_moved(plan, operands), plan), operands


BITS = 1 / 8


@pytest.mark.parametrize(
    ("operation", "operands", "per_element"),
    [
        ("forward", Operands(), 3 * 2),
        ("forward", Operands(residual=True, bits=True), 4 * 2 + BITS),
        ("backward", Operands(), 5 * 2),
        ("backward", Operands(activation=True), 5 * 2),
        ("backward", Operands(bits=True, dresidual=True), 6 * 2 + BITS),
        ("backward", Operands(bits=True), 5 * 2 + 2 * BITS),
        ("backward", Operands(activation=True, residual=True, dresidual=True), 7 * 2),
        ("inference", Operands(residual=True), 3 * 2),
        ("backward", Operands(training=False), 3 * 2),
        ("backward", Operands(training=False, parameters=False), 2 * 2),
        ("backward", Operands(training=False, parameters=False, activation=True), 3 * 2),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, float)) else None,
)
def test_streaming_traffic_is_that_of_the_design(operation: Any, operands: Operands, per_element: float) -> None:
    with forced("split"):
        plan = make_plan(operation, "planes", (256, 256, 3136), 2)
    assert bytes_moved(plan, operands) == per_element * 256 * 256 * 3136


@pytest.mark.parametrize(
    ("operation", "operands", "per_element"),
    [
        ("forward", Operands(), 2 * 2),
        ("forward", Operands(residual=True, bits=True), 3 * 2 + BITS),
        ("backward", Operands(activation=True), 3 * 2),
        ("backward", Operands(bits=True, dresidual=True), 4 * 2 + BITS),
    ],
    ids=["forward", "forward-add-relu", "backward-relu", "backward-add-relu"],
)
def test_a_slice_that_one_tile_holds_is_read_once(operation: Any, operands: Operands, per_element: float) -> None:
    with forced("single"):
        plan = make_plan(operation, "planes", (4, 2048, 49), 2)
    assert bytes_moved(plan, operands) == per_element * 4 * 2048 * 49


SMALL = ("rows", "rows-odd", "rows-folded", "7x7", "channels-last")  # programs that take turns are threads
FEW_LAYOUTS = [param for param in LAYOUTS if param.id in SMALL]


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_each_path_moves_the_bytes_of_its_class(
    layout: Layout, name: str, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floor where each program's tile holds its share; else what the reduction read is read once more."""
    x, dy, z = (layout.arrange(torch.randn(layout.shape)).bfloat16() for _ in range(3))
    weight, bias, mean, var = torch.rand(4, layout.shape[1])
    relu, added = resolve("relu"), z if residual else None
    with on(name, monkeypatch):
        plan = planning.plan_for("forward", x)
        with counted(x.numel()) as forward:
            _, bits, _, _ = launch.forward(x, added, weight, bias, mean, var, None, 0.1, 1e-5, relu, residual)
        operands = Operands(True, residual, residual)
        again = 0 if plan.tile.ONCE else x.nbytes
        assert forward[0] == floor_bytes(plan, operands) + again == bytes_moved(plan, operands)

        plan = planning.plan_for("backward", x)
        with counted(x.numel()) as backward:
            saved = Saved(x, weight, bias, None, bits, mean, var)
            launch.backward(dy, saved, True, relu, torch.float32, (True, True, True, residual))
        operands = Operands(True, False, residual, not residual, True, True, residual)
        again = 0 if plan.tile.ONCE else 2 * x.nbytes  # dy, or dresidual in its place, and x
        assert backward[0] == floor_bytes(plan, operands) + again == bytes_moved(plan, operands)
    if CHOICES[name].path == "cooperative":
        assert plan.tile.ONCE


def test_tiles_that_have_no_lane_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of an odd plane's lanes is beyond some channels' ends."""
    x = torch.empty(2, 8, 639, dtype=torch.bfloat16)
    with on("cooperative", monkeypatch):
        plan = planning.plan_for("forward", x)
    assert plan.tile.ALIGN > 1
    assert plan.reduce_tiles == 1
    assert bytes_moved(plan, Operands()) == 2 * x.nbytes
