"""Launches by kept handles: what is in their key, and that they give the driver what Triton's own launch would."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from bench.stub import StubDriver, active
from tritonbn import handles, private
from tritonbn.activations import IDENTITY, resolve
from tritonbn.occupancy import resident_programs
from tritonbn.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parent.parent
PLAN = make_plan("forward", "rows", (60, 100, 1), 4)
OTHER = make_plan("forward", "planes", (8, 16, 1024), 4)
RELU = resolve("relu")


def scale(x_ptr, y_ptr, b_ptr, n, eps: tl.float64, T: tl.constexpr, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x + b; all [64]. For launches, not for its results."""
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    if b_ptr is not None:
        x += tl.load(b_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x, mask=i < n)


class Kernel(JITFunction):  # type: ignore[misc]
    """A kernel that is compiled, even where others are interpreted, and counts Triton's own launches."""

    by_triton = 0
    last: Any = None

    def run(self, *args: Any, **options: Any) -> Any:
        self.by_triton += not options["warmup"]
        self.last = super().run(*args, **options)
        return self.last


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    stub = StubDriver()
    stub.keep = True
    monkeypatch.setattr(handles, "JITFunction", Kernel)
    with active(stub):
        yield stub


@pytest.fixture
def kernel(stub: StubDriver) -> Kernel:
    return Kernel(scale, do_not_specialize=["n"])


def vector(dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """[64], aligned to 16 bytes but for `offset` elements."""
    store = torch.zeros(96, dtype=dtype)
    shift = -store.data_ptr() % 16 // store.itemsize
    return store[shift + offset :][:64]


def start(kernel: Kernel, *args: Any, plan: Plan = PLAN, grid: tuple[int, ...] = (2,), act: Any = IDENTITY) -> None:
    handles.start(kernel, grid, plan, *args, ACT=act)


def test_first_launch_is_tritons_and_later_ones_give_the_driver_the_same(kernel: Kernel, stub: StubDriver) -> None:
    x, y = vector(), vector()
    for grid in ((2,), (2,), (3, 4), (5, 6, 7)):
        start(kernel, x, y, None, 64, 0.5, grid=grid)
    assert kernel.by_triton == 1
    first, *later = stub.launches
    assert [launch.grid for launch in stub.launches] == [(2, 1, 1), (2, 1, 1), (3, 4, 1), (5, 6, 7)]
    assert first.args == (x, y, None, 64, 0.5, PLAN.tile, IDENTITY)
    for launch in later:
        assert launch.args == (x.data_ptr(), y.data_ptr(), None, 64, 0.5, PLAN.tile, IDENTITY)
        assert (launch.metadata, launch.packed, launch.stream) == (first.metadata, first.packed, first.stream)


def test_numbers_and_tensors_are_those_of_the_call(kernel: Kernel, stub: StubDriver) -> None:
    start(kernel, vector(), vector(), vector(), 64, 0.5)
    x, y, b = vector(), vector(), vector()
    start(kernel, x, y, b, 64, 0.25)
    assert kernel.by_triton == 1
    assert stub.launches[1].args[:5] == (x.data_ptr(), y.data_ptr(), b.data_ptr(), 64, 0.25)


def test_the_stream_is_the_current_one(kernel: Kernel, stub: StubDriver) -> None:
    for stub.stream in (0, 7, 8):
        start(kernel, vector(), vector(), None, 64, 0.5)
    assert kernel.by_triton == 1
    assert [launch.stream for launch in stub.launches] == [0, 7, 8]


BASE: dict[str, Any] = {"x": {}, "y": {}, "b": {}, "n": 64, "plan": PLAN, "act": IDENTITY}
OTHERS: dict[str, dict[str, Any]] = {
    "dtype-of-the-first": {"x": {"dtype": torch.bfloat16}},
    "dtype-of-an-output": {"y": {"dtype": torch.float16}},
    "no-tensor": {"b": None},
    "first-unaligned": {"x": {"offset": 1}},
    "second-unaligned": {"y": {"offset": 1}},
    "optional-unaligned": {"b": {"offset": 3}},
    "two-unaligned": {"x": {"offset": 1}, "y": {"offset": 1}},
    "unaligned-and-no-tensor": {"x": {"offset": 1}, "b": None},
    "64-bit-size": {"n": 1 << 31},
    "plan": {"plan": OTHER},
    "constant": {"act": RELU},
    "constant-of-a-constant": {"act": resolve("leaky_relu(0.5)")},
}


def begin(kernel: Kernel, case: dict[str, Any]) -> tuple[handles.Key, Any]:
    """Our key of a launch, and what Triton launches by itself."""
    given = BASE | case
    tensors = [None if how is None else vector(**how) for how in (given["x"], given["y"], given["b"])]
    args = (*tensors, given["n"], 0.5)
    key, _ = handles._key(kernel, given["plan"], -1, args, {"ACT": given["act"]})  # -1: the CPU
    start(kernel, *args, plan=given["plan"], act=given["act"])
    return key, kernel.last


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_each_part_of_the_key_has_a_handle_of_its_own(case: dict[str, Any], kernel: Kernel) -> None:
    base, of_base = begin(kernel, {})
    other, of_other = begin(kernel, case)
    assert base != other
    assert kernel.by_triton == 2
    assert of_base is not of_other
    begin(kernel, {})
    begin(kernel, case)
    assert kernel.by_triton == 2
    assert handles._handles[base].run is of_base.run
    assert handles._handles[other].run is of_other.run


def test_launches_of_one_key_are_one_kernel_to_triton(kernel: Kernel) -> None:
    """The other way round: combinations of two differences, each launched by Triton."""
    tensors = [case for case in OTHERS.values() if case.keys() <= {"x", "y", "b"}]
    cases = [{}, *OTHERS.values(), *(a | b for a, b in itertools.combinations(tensors, 2))]
    compiled: dict[handles.Key, Any] = {}
    for case in cases:
        handles.forget()
        key, own = begin(kernel, case)
        assert compiled.setdefault(key, own) is own
    assert kernel.by_triton == len(cases)


def test_kernels_and_devices_have_handles_of_their_own(stub: StubDriver) -> None:
    first, second = (Kernel(scale, do_not_specialize=["n"]) for _ in range(2))
    args = (vector(), vector(), None, 64, 0.5)
    keys = [handles._key(kernel, PLAN, device, args, {})[0] for kernel in (first, second) for device in (0, 1)]
    assert len(set(keys)) == 4


def test_calls_of_all_shapes_and_plans_share_what_is_compiled_for_them(kernel: Kernel) -> None:
    """A handle is of what Triton compiles for: not of a shape, a call or a plan."""
    for n in (64, 65, 1 << 20):
        for plan in (PLAN, make_plan("forward", "rows", (59, 100, 1), 4)):
            start(kernel, vector(), vector(), None, n, 0.5, plan=plan)
    assert kernel.by_triton == 1
    assert len(handles._handles) == 1
    assert handles._kernels[id(kernel)].jit is kernel


def test_launch_hooks_get_tritons_own_launch(kernel: Kernel, stub: StubDriver) -> None:
    def hook(metadata: Any) -> None:
        pass

    runtime = triton.knobs.runtime
    args = (vector(), vector(), None, 64, 0.5)
    start(kernel, *args)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        before = kernel.by_triton
        chain = getattr(runtime, name)
        if chain is None:  # before Triton 3.5
            setattr(runtime, name, hook)
        else:
            chain.add(hook)
        try:
            start(kernel, *args)
            assert kernel.by_triton == before + 1
        finally:
            if chain is None:
                setattr(runtime, name, None)
            else:
                chain.remove(hook)
        start(kernel, *args)
        assert kernel.by_triton == before + 1
    assert not stub.launches[-1].described


def test_hooks_of_the_kernel_are_called(kernel: Kernel) -> None:
    called = []
    args = (vector(), vector(), None, 64, 0.5)
    start(kernel, *args)
    kernel.pre_run_hooks.append(lambda *args, **options: called.append(args))
    start(kernel, *args)
    assert kernel.by_triton == 2
    assert len(called) == 1


def test_what_is_not_known_is_not_kept(stub: StubDriver) -> None:
    class Odd(Kernel):
        def run(self, *args: Any, **options: Any) -> Any:
            super().run(*args, **options)
            return object()

    kernel = Odd(scale, do_not_specialize=["n"])
    for _ in range(2):
        start(kernel, vector(), vector(), None, 64, 0.5)
    assert not handles._handles


def test_true_is_not_one(kernel: Kernel) -> None:
    """Equal as keys, but another type to Triton."""
    start(kernel, vector(), vector(), None, True, 0.5)
    assert not handles._handles


def test_kernels_that_keys_do_not_describe_are_refused(stub: StubDriver) -> None:
    def mixed(n, x_ptr, T: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(x_ptr, n)

    with pytest.raises(TypeError, match="mixed: expected tensors"):
        handles.start(Kernel(mixed), (1,), PLAN, vector(), 1)


def test_the_oldest_handles_are_forgotten_when_there_are_too_many(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "LIMIT", 3)
    slopes = [resolve(f"leaky_relu({slope})") for slope in (0.1, 0.2, 0.3, 0.4)]
    for act in slopes:
        start(kernel, vector(), vector(), None, 64, 0.5, act=act)
    assert len(handles._handles) == 3
    for act in slopes[1:]:  # they are still there
        start(kernel, vector(), vector(), None, 64, 0.5, act=act)
    assert kernel.by_triton == 4
    start(kernel, vector(), vector(), None, 64, 0.5, act=slopes[0])
    assert kernel.by_triton == 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", ["3.5.1", "4.0.0"])
def test_an_untested_triton_launches_itself_and_says_so_once(
    version: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(private, "_told", set())
    args = (vector(), vector(), None, 64, 0.5)
    with pytest.warns(UserWarning, match=f"launched by Triton.*expected one of the tested.*got {version}"):
        start(kernel, *args)
    for _ in range(2):  # warnings are errors here
        start(kernel, *args)
    assert kernel.by_triton == 3


@pytest.mark.parametrize(
    ("knobs", "name", "value"),
    [("runtime", "debug", True), ("runtime", "add_stages_inspection_hook", lambda *_: ("", "")),
     ("compilation", "instrumentation_mode", "consan")],
)  # fmt: skip
def test_settings_that_triton_compiles_for_are_read_at_each_launch(
    knobs: str, name: str, value: Any, kernel: Kernel, stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (vector(), vector(), None, 64, 0.5)
    start(kernel, *args)
    space = getattr(triton.knobs, knobs)
    if not hasattr(space, name):
        pytest.skip("not in this Triton")
    monkeypatch.setattr(Kernel, "run", lambda self, *args, **options: setattr(self, "by_triton", self.by_triton + 1))
    with monkeypatch.context() as patch:
        patch.setattr(space, name, value)
        start(kernel, *args)
        assert kernel.by_triton == 2
        assert len(handles._handles) == 1
    start(kernel, *args)
    assert kernel.by_triton == 2


@pytest.mark.parametrize(
    ("num_warps", "path", "expected"),
    [
        pytest.param(4, "single", {"maxnreg": 255}, id="most-of-a-thread"),
        pytest.param(8, "split", {"maxnreg": 255}, id="256"),
        pytest.param(16, "single", {"maxnreg": 128}, id="half"),
        pytest.param(32, "single", {"maxnreg": 64}, id="1024-threads"),
        pytest.param(8, "cooperative", {"maxnreg": 128, "launch_cooperative_grid": True}, id="cooperative"),
    ],
)
@pytest.mark.skipif(torch.version.hip is not None, reason="registers are NVIDIA's")
def test_options(num_warps: int, path: str, expected: dict[str, Any]) -> None:
    plan: Any = SimpleNamespace(num_warps=num_warps, cooperative=path == "cooperative")
    assert handles.options(plan) == {"num_warps": num_warps, "enable_fp_fusion": True} | expected


def gpu(major: int, minor: int, sms: int, shared: int) -> Any:
    return SimpleNamespace(
        major=major, minor=minor, multi_processor_count=sms, shared_memory_per_multiprocessor=shared << 10
    )


V100, A100, RTX3090, L40, H100 = (
    gpu(7, 0, 80, 96), gpu(8, 0, 108, 164), gpu(8, 6, 82, 100), gpu(8, 9, 142, 100), gpu(9, 0, 132, 228),
)  # fmt: skip


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "device", "per_sm"),
    [
        pytest.param(37, 0, 4, V100, 12, id="best-practices-guide-128-threads"),
        pytest.param(37, 0, 10, V100, 4, id="best-practices-guide-320-threads"),
        pytest.param(128, 0, 8, H100, 2, id="128-registers"),
        pytest.param(129, 0, 8, H100, 1, id="registers-come-in-eights"),
        pytest.param(255, 0, 8, H100, 1, id="all-registers"),
        pytest.param(255, 0, 16, H100, 0, id="too-many-registers"),
        pytest.param(32, 0, 8, H100, 8, id="64-warps"),
        pytest.param(32, 0, 8, RTX3090, 6, id="48-warps"),
        pytest.param(16, 0, 1, H100, 32, id="32-blocks"),
        pytest.param(16, 0, 1, RTX3090, 16, id="16-blocks"),
        pytest.param(16, 0, 1, L40, 24, id="24-blocks"),
        pytest.param(32, 75 << 10, 4, H100, 3, id="shared-with-its-reserve"),
        pytest.param(32, 76 << 10, 4, H100, 2, id="shared-beyond-its-reserve"),
        pytest.param(32, 163 << 10, 4, A100, 1, id="all-shared-memory"),
        pytest.param(32, 228 << 10, 4, H100, 0, id="more-than-all-shared-memory"),
    ],
)
def test_occupancy(registers: int, shared: int, num_warps: int, device: Any, per_sm: int) -> None:
    assert resident_programs(registers, shared, num_warps, device) == per_sm * device.multi_processor_count


def test_a_grid_fits_if_all_its_programs_are_resident(
    kernel: Kernel, stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    blocks = 132 * (48 // PLAN.num_warps if PLAN.num_warps > 1 else 32)  # the stub's kernels have 40 registers
    args = (vector(), vector(), None, 64, 0.5)
    for grid, fits in (((blocks,), True), ((blocks + 1,), False), ((blocks // 2, 2), True), ((blocks, 2), False)):
        for _ in range(2):
            assert handles.fits_at_once(kernel, grid, PLAN, args, {"ACT": IDENTITY}) is fits
    assert kernel.by_triton == 0
    assert len(handles._fitting) == 4
    assert stub.count == 0


def test_spills_are_those_of_the_plans_kernels(kernel: Kernel, stub: StubDriver) -> None:
    stub.spills = 3
    start(kernel, vector(), vector(), None, 64, 0.5)
    stub.spills = 0
    start(kernel, vector(), vector(), None, 64, 0.5, plan=OTHER)
    assert handles.spills(PLAN) == 3
    assert handles.spills(OTHER) == 0
    assert handles.spills(make_plan("backward", "rows", (60, 100, 1), 4)) is None


def test_nothing_fits_where_programs_do_not_run_at_once() -> None:
    assert not handles.fits_at_once(lambda: None, (1,), PLAN, (), {})


SCRIPT = """
import itertools, torch
from bench.stub import stubbed
from tritonbn import handles, private
from tritonbn.functional import batch_norm
from tritonbn.plan import forced

ACTS = (None, False), ("relu", True), ("silu", True)
seen = set()
with stubbed() as stub:
    stub.keep = True
    for path, dtype, (act, add) in itertools.product(("single", "split"), (torch.float32, torch.bfloat16), ACTS):
        x, r = (torch.randn(64, 32, dtype=dtype, requires_grad=True) for _ in range(2))
        w, b = (torch.ones(32, requires_grad=True) for _ in range(2))
        mean, var = torch.zeros(32), torch.ones(32)
        def call():
            with forced(path):
                for training in (True, False):
                    y = batch_norm(x, mean, var, w, b, training, activation=act, residual=r if add else None)
                    torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
        def address(value):
            return value.data_ptr() if isinstance(value, torch.Tensor) else value
        stub.launches.clear(); handles.forget(); call(); first = list(stub.launches)
        stub.launches.clear(); call(); second = list(stub.launches)
        fixed = {t.data_ptr() for t in (x, r, w, b, mean, var)}
        assert len(first) == len(second) >= 4
        for old, new in zip(first, second):
            assert any(isinstance(a, torch.Tensor) for a in old.args)
            assert not any(isinstance(a, torch.Tensor) for a in new.args), new.metadata.name
            assert (old.metadata, old.grid, old.packed) == (new.metadata, new.grid, new.packed)
            assert len(old.args) == len(new.args)
            for before, now in zip(old.args, new.args):
                if not isinstance(before, torch.Tensor) or address(before) in fixed:
                    assert address(before) == now
                else:
                    assert type(now) is int and now
            seen.add(old.metadata.name)
print(len(seen), handles.__name__)
"""


def test_all_kernels_are_launched_by_handles_as_by_triton() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["7", "tritonbn.handles"]
