"""Calibration with made-up figures, so that it is known what follows from them; on a GPU with real ones too."""

import errno
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tritonbn
from tests.warned import told
from tritonbn import calibrating as calibrate
from tritonbn import calibration, cost, launch, model, planning, store, tables, timing
from tritonbn.choice import Plan, Problem
from tritonbn.device import Constants, Device
from tritonbn.plan import make_plan
from tritonbn.probes import Probe

CUDA = torch.device("cuda", 0)
L2 = 50 << 20
GPU = Device("Made up", 132, L2, 3e12)
ALONE = Device("Made up", 132, L2, 3e12, cooperative=False)
LARGE = Problem("forward", "planes", (256, 64, 3136), 2)
SMALL = Problem("forward", "rows", (4096, 128, 1), 2)
# What the figures below say.
SAID = Constants(2e12, 2.5e-6, 1e-6, 3.0, 0.5, waiting=True)


class Figures:
    """Timers whose figures are those of a GPU with the constants `SAID`, on which paths miss their predictions."""

    def __init__(self, share: float = 0.5, **factors: float | None) -> None:
        self.share, self.factors = share, factors
        self.asked: list[str] = []

    def probe(self, probe: Probe) -> float:
        self.asked.append(probe.what)
        whole = 1e6 * 2 * probe.bytes / SAID.bandwidth
        served = min(1.0, self.share * L2 / probe.bytes)
        times = {
            "copy": whole, "copy in L2": whole / 3, "launch": 2.5, "0 barriers of 264": 3.0, "64 barriers of 264": 67.0,
            "one pass": whole, "read": whole / 2, "read, then pass in reverse": whole / 2 + whole * (1 - served / 2),
        }  # fmt: skip
        return times[probe.what]

    def plan(self, problem: Problem, plan: Plan) -> float | None:
        self.asked.append(plan.path)
        device = Device(*GPU.gpu, L2, measured=SAID._replace(l2_share=self.share))
        factor = self.factors.get(plan.path, 1.0)
        return None if factor is None else 1e6 * factor * cost.predicted(plan, problem, device)


def measured(gpu: Device = GPU, **figures: Any) -> Device:
    made = Figures(**figures)
    return Device(*gpu.gpu, L2, gpu.bandwidth, gpu.cooperative, calibrate.measured(gpu, made.probe, made.plan))


def path(problem: Problem, device: Device) -> str:
    return make_plan(*problem[:4], device).path


# What follows from figures.


def test_constants_are_what_the_figures_say() -> None:
    constants = measured(split=1.25, stream=0.75).constants
    assert constants[:5] == pytest.approx(SAID[:5])
    assert constants.waiting
    factors = dict(constants.factors)
    assert factors.pop("split/planes/forward/memory") == pytest.approx(1.25)
    assert factors["stream/rows/backward/memory"] == pytest.approx(0.75)
    assert factors["cooperative/rows/forward/L2"] == pytest.approx(1)
    assert {kind.split("/")[0] for kind in factors} == {"single", "split", "cooperative", "stream"}
    constants.check()


def test_without_cooperation_nothing_that_waits_is_timed() -> None:
    made = Figures()
    constants = calibrate.measured(ALONE, made.probe, made.plan)
    assert not {"cooperative", "stream", "64 barriers of 264"} & set(made.asked)
    assert (constants.barrier, constants.waiting) == (Constants(1.0).barrier, False)


@pytest.mark.parametrize(
    ("problem", "figures", "expected"),
    [
        pytest.param(LARGE, {}, "stream", id="as-predicted"),
        pytest.param(LARGE, {"stream": 2.0}, "split", id="stream-is-slow"),
        pytest.param(LARGE, {"split": 2.0, "single": 2.0}, "stream", id="two-launches-are-slow"),
        pytest.param(LARGE, {"stream": None}, "split", id="stream-spills"),
        pytest.param(LARGE, {"share": 0.0}, "split", id="a-second-pass-finds-nothing-in-L2"),
        pytest.param(SMALL, {"cooperative": 0.7, "stream": 2.0}, "cooperative", id="cooperative-is-fast"),
        pytest.param(SMALL, {"cooperative": 2.0, "stream": 2.0}, "split", id="cooperative-is-slow"),
        pytest.param(SMALL, {"cooperative": 0.7, "stream": 2.0, "split": 0.5}, "split", id="split-is-faster"),
    ],
)
def test_the_choice_follows_from_the_figures(problem: Problem, figures: dict[str, Any], expected: str) -> None:
    device = measured(**figures)
    assert path(problem, GPU) == "split"
    assert path(problem, device) == expected
    assert path(problem, Device(*GPU.gpu, L2, cooperative=False, measured=device.measured)) == "split"


def test_a_plan_that_waits_must_promise_more_than_the_prediction_may_be_wrong_by() -> None:
    device = measured(cooperative=None)
    split, stream = (cost.seconds(model.best(LARGE, device, p), LARGE, device) for p in ("split", "stream"))
    for promise, expected in ((1.05, "split"), (1.15, "stream")):
        factor = split / stream / promise
        assert path(LARGE, measured(cooperative=None, stream=factor)) == expected


def test_plans_tell_whether_constants_are_measured() -> None:
    device = measured(split=1.25, stream=None)
    plan = make_plan(*LARGE[:4], device)
    assert plan.estimate is not None
    assert plan.estimate.constants == "calibrated"
    assert plan.estimate.bandwidth == pytest.approx(2e12)
    assert plan.estimate.seconds == pytest.approx(1.25 * cost.predicted(plan, LARGE, device))
    assert "us by calibrated constants, bound by memory; plan from the model" in str(plan)
    assumed = make_plan(*LARGE[:4], device, tuned=False)
    assert assumed.estimate == make_plan(*LARGE[:4], GPU).estimate, "deterministic mode takes nothing measured"
    assert "by assumed constants" in str(assumed)


# The file, and when it is measured.


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITONBN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("TRITONBN_AUTOTUNE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget()


def forget() -> None:
    """As a new process."""
    calibration.forget()
    store.forget()
    tritonbn.autotune(True)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Figures:
    """A GPU with these figures, as far as anybody asks."""
    made = Figures(split=2.0)
    properties = SimpleNamespace(name=GPU.name, multi_processor_count=GPU.sms, L2_cache_size=L2)
    for name, value in {
        "is_available": lambda: True, "get_device_properties": lambda *_: properties, "device": nullcontext,
        "is_current_stream_capturing": lambda: False, "current_device": lambda: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(calibrate, "timers", lambda device, gpu: (made.probe, made.plan))
    monkeypatch.setattr(calibrate, "untouched", nullcontext)
    monkeypatch.setattr(timing, "measuring", nullcontext)
    return made


def constants() -> Constants | None:
    return planning.device_of(CUDA).measured


def first_call() -> None:
    calibrate.on_first_call(CUDA)


def test_the_first_call_measures_for_all_processes(
    figures: Figures, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert constants() is None
    before = tables.epoch()
    with caplog.at_level(logging.INFO, "tritonbn"), told(0):
        first_call()
    assert tables.epoch() > before, "plans are made anew"
    (record,) = caplog.records
    assert record.getMessage().startswith("calibrated Made up in ")
    found, count = constants(), len(figures.asked)
    assert found is not None
    assert found[:5] == pytest.approx(SAID[:5])
    for _ in range(2):
        first_call()
        forget()
        first_call()
    assert constants() == found, "what is read is what was written"
    assert len(figures.asked) == count
    (file,) = folder.rglob("*.json")
    assert file == calibration.path(folder, GPU)
    content = json.loads(file.read_text())
    assert {name: content[name] for name in ("gpu", "sms", "format")} == {"gpu": "Made up", "sms": 132, "format": 1}


def test_calibrate_measures_again(figures: Figures, folder: Path) -> None:
    first = tritonbn.calibrate()
    figures.factors["split"] = 4.0
    second = tritonbn.calibrate(CUDA, save=False)
    kind = "split/rows/forward/memory"
    assert [dict(found.factors)[kind] for found in (first, second)] == pytest.approx([2.0, 4.0])
    assert constants() == second
    forget()
    assert constants() == first


@pytest.mark.usefixtures("figures")
def test_calibrate_refuses_what_tune_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="calibrate measures on a GPU, but got the device cpu"):
        tritonbn.calibrate("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="calibrate cannot run while a CUDA graph is captured"):
        tritonbn.calibrate()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"calibrate measures on a GPU, but torch.cuda.is_available\(\) is False"):
        tritonbn.calibrate()


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def patched(of: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, name, value)
        yield


@contextmanager
def by_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITONBN_AUTOTUNE", "0")
        yield


@contextmanager
def switched_off() -> Iterator[None]:
    tritonbn.autotune(False)
    yield
    tritonbn.autotune(True)


@contextmanager
def another_thread() -> Iterator[None]:
    with calibrate._measuring:
        yield


@pytest.mark.parametrize(
    "not_now",
    [
        pytest.param(deterministic, id="deterministic"),
        pytest.param(by_environment, id="environment"),
        pytest.param(switched_off, id="autotune"),
        pytest.param(another_thread, id="another-thread"),
        pytest.param(lambda: patched(torch.cuda, "is_current_stream_capturing", lambda: True), id="capture"),
    ],
)
def test_not_now_but_later(not_now: Callable[[], Any], figures: Figures, folder: Path) -> None:
    with not_now():
        first_call()
        assert not figures.asked
        assert not folder.exists()
    first_call()
    assert constants() is not None


def test_other_devices_are_none_of_its_business(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate.on_first_call(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    first_call()
    assert not figures.asked


@pytest.mark.parametrize(
    ("local_rank", "rank", "measures"), [("0", 8, True), ("1", 0, False), (None, 0, True), (None, 3, False)]
)
def test_of_several_processes_one_measures(
    local_rank: str | None, rank: int, measures: bool, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that waits; alone again, a process measures that too."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    first_call()
    assert bool(figures.asked) == measures
    assert "stream" not in figures.asked
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    forget()
    first_call()
    found = constants()
    assert found is not None
    assert found.waiting
    count = len(figures.asked)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    forget()
    first_call()
    assert constants() == found, "others read the file"
    assert len(figures.asked) == count


@pytest.mark.parametrize("error", [RuntimeError("too many blocks in cooperative launch"), torch.OutOfMemoryError("no")])
def test_what_goes_wrong_is_told_once_and_costs_nothing(
    error: Exception, figures: Figures, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(figures, "plan", fail)
    with told(1, "cuda:0 is not calibrated, plans are made by assumed constants", str(error)):
        for _ in range(3):
            first_call()
    assert constants() is None
    assert list(folder.rglob("*.json")) == []
    with pytest.raises(type(error)):
        tritonbn.calibrate()


def test_figures_that_no_gpu_has_are_not_taken(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "probe", lambda probe: 1e-9)
    with told(1, "bandwidth must be a number from 1e+06 to 1e+18"):
        first_call()
    assert constants() is None


BAD: list[tuple[str, Any]] = [
    *((name, value) for name in SAID._fields[:5] for value in (-1, True, "1", None)),
    *((name, 0.0) for name in SAID._fields[:4]), ("l2_share", 1.5),
    ("factors", {"split/planes/forward/L2": 0.0}), ("factors", {"a": "1"}), ("factors", [1]), ("factors", None),
    ("waiting", 1), ("bandwidth", float("nan")), ("launch", float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:20])
def test_a_file_with_a_bad_value_is_ignored_and_replaced(name: str, value: Any, figures: Figures, folder: Path) -> None:
    first_call()
    file = calibration.path(folder, GPU)
    content = json.loads(file.read_text())
    content["constants"][name] = value
    file.write_text(json.dumps(content))
    forget()
    count = len(figures.asked)
    with told(1, "the calibration", "is ignored"):
        assert constants() is None
        first_call()
    assert len(figures.asked) == 2 * count
    forget()
    with told(0):
        assert constants() is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda content: "{", "JSONDecodeError", id="broken"),
        pytest.param(lambda content: json.dumps(content | {"gpu": "another"}), "expected gpu 'Made up'", id="gpu"),
        pytest.param(lambda content: json.dumps(content | {"sms": 1}), "expected sms 132", id="sms"),
        pytest.param(lambda content: json.dumps(content | {"tritonbn": "0"}), "expected tritonbn", id="version"),
        pytest.param(lambda content: json.dumps(content | {"format": 2}), "expected format 1, got 2", id="format"),
        pytest.param(lambda content: json.dumps(content | {"constants": {}}), "KeyError", id="empty"),
    ],
)
def test_a_foreign_file_is_ignored(change: Callable[[Any], str], words: str, figures: Figures, folder: Path) -> None:
    first_call()
    file = calibration.path(folder, GPU)
    file.write_text(change(json.loads(file.read_text())))
    forget()
    with told(1, "is ignored", words):
        assert constants() is None
        assert constants() is None


def test_one_process_at_a_time(figures: Figures, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for it does not measure again; and it does not wait for ever."""
    fcntl = pytest.importorskip("fcntl", reason="no locks of this kind here")
    file = calibration.path(folder, GPU)
    file.parent.mkdir(parents=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(calibrate, "WAIT_SECONDS", 0.1)
        with told(0):
            first_call()
        assert (figures.asked, constants()) == ([], None)
        forget()
        monkeypatch.setattr(calibrate, "WAIT_SECONDS", 60.0)
        second = threading.Thread(target=first_call)
        second.start()
        calibration.write(file, GPU, SAID)
    second.join(30)
    assert (figures.asked, constants()) == ([], SAID)


def test_a_file_system_without_locks_is_not_waited_for(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without flock, say: the calibration holds for this process, and a warning says so."""
    fcntl = pytest.importorskip("fcntl", reason="no locks of this kind here")

    def unsupported(lock: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(calibrate, "WAIT_SECONDS", 3600.0)
    with told(1, "the calibration is not kept", "No locks available"):
        first_call()
    assert constants() is not None


def test_where_nothing_can_be_written_it_holds_for_this_process(figures: Figures, folder: Path) -> None:
    folder.write_text("a file")
    with told(2, "the calibration", "Not a directory"):  # read, and not kept
        first_call()
    assert constants() is not None


def test_a_user_without_a_home(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "user_folder", lambda: None)
    first_call()
    assert constants() is not None


def test_a_disk_that_is_full(figures: Figures, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with told(1, "the calibration is not kept", "No space left on device"):
        first_call()
    assert constants() is not None
    assert list(folder.rglob("*.json")) == []


# The timers themselves.


@pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels do not take CPU tensors")
def test_timers_time_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where no program waits; the user's random numbers stay."""
    device, gpu = torch.device("cpu"), Device("x", 2, 256, cooperative=False)
    for of, name, value in ((calibrate, "IN_CACHE", (1 << 10,)), (calibrate, "SAMPLES", 1), (timing, "MOST_CALLS", 2)):
        monkeypatch.setattr(of, name, value)
    small = [shape._replace(N=4, S=min(shape.S, 4), channels=calibrate.fixed(8)) for shape in calibrate.SHAPES[:4]]
    monkeypatch.setattr(calibrate, "SHAPES", small)
    torch.manual_seed(7)
    found = calibrate.measured(gpu, *calibrate.timers(device, gpu))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert found.bandwidth > 0
    assert {kind.split("/")[0] for kind, _ in found.factors} == {"single", "split"}
    assert all(factor > 0 for _, factor in found.factors)


def test_shapes_are_of_the_size_that_they_are_named_after() -> None:
    for shape in calibrate.SHAPES:
        for l2_bytes in (40 << 20, 50 << 20, 126 << 20):
            device = Device("x", 132, l2_bytes, measured=SAID)
            problem = shape.problem("forward", l2_bytes)
            held = problem.data <= l2_bytes
            assert problem.data < 1 << 21 if shape.channels(1) == shape.channels(1 << 30) else not held
            for path in shape.paths:
                for operation in calibrate.OPERATIONS:
                    plan = model.best(shape.problem(operation, l2_bytes), device, path)
                    if path in ("single", "cooperative"):
                        assert held == plan.tile.ONCE, "in registers"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a real GPU")
def test_on_a_gpu() -> None:
    torch.cuda.manual_seed(7)
    stream, random = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    calibrate.on_first_call(CUDA)
    found = constants()
    assert found is not None
    assert found.waiting
    assert len(found.factors) >= 16
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.memory_allocated() <= before + (8 << 20)
    assert os.environ["TRITONBN_CACHE_DIR"]
