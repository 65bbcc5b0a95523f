"""Tuning with times that are made up, so that it is known what must be found; on a GPU with real ones too."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

import tritonbn
from tests import launches
from tritonbn import cost, handles, launch, model, plan_timing, planning, tables, timing, tuning
from tritonbn.choice import Plan, Problem, build
from tritonbn.device import H200
from tritonbn.layers import Layer
from tritonbn.plan import make_plan
from tritonbn.plan_timing import Measure
from tritonbn.tables import epoch
from tritonbn.tuning import Tuned, tune_problem, tune_problems

LAYER = Problem("forward", "planes", (256, 64, 3136), 2)
NEAR = LAYER._replace(shape=(250, 64, 3136))
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of this test, without the library's tables, and nothing known from before."""
    monkeypatch.setenv("TRITONBN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tables.forget()


def plan_of(problem: Problem) -> Plan:
    return make_plan(*problem[:4], H200, problem.costly)


def source(problem: Problem) -> str:
    estimate = plan_of(problem).estimate
    assert estimate is not None
    return estimate.source


class Times:
    """A measure that takes notes: microseconds by what `us` makes of a plan."""

    def __init__(self, us: Callable[[Plan], float | None]) -> None:
        self.us = us
        self.asked: list[Plan] = []

    def __call__(self, plan: Plan) -> float | None:
        self.asked.append(plan)
        return self.us(plan)


# One problem.


@pytest.mark.parametrize(("challenger", "replaced"), [(101.0, False), (98.0, False), (97.2, False), (97.0, True)])
def test_a_challenger_must_be_faster_by_three_percent(challenger: float, replaced: bool) -> None:
    measure = Times(lambda plan: challenger if plan.path == "stream" else 100.0)
    found = tune_problem(LAYER, H200, measure)
    assert found is not None
    assert (found.before.path, found.before_us) == ("split", 100.0)
    assert (found.after.path, found.after_us) == (("stream", 97.0) if replaced else ("split", 100.0))
    assert (found.after == found.before) == (not replaced)
    assert (found.tried, found.dropped) == (len(measure.asked), 0)


def test_what_spills_never_wins() -> None:
    measure = Times(lambda plan: None if plan.num_warps != 8 or plan.path == "single" else 100.0 - plan.splits)
    found = tune_problem(LAYER, H200, measure)
    assert found is not None
    dropped = [plan for plan in measure.asked if measure.us(plan) is None]
    assert found.dropped == len(dropped) > 1
    assert found.tried + found.dropped == len(measure.asked)
    assert (found.after.num_warps, found.after.path) == (8, "stream")
    assert found.after_us == 100 - found.after.splits
    only = tune_problem(LAYER, H200, Times(lambda plan: 100.0 if plan == plan_of(LAYER) else None))
    assert only is not None
    assert (only.after, only.after_us, only.tried) == (only.before, 100.0, 1)


def test_a_present_plan_that_cannot_be_timed_is_no_start() -> None:
    measure = Times(lambda plan: None)
    assert tune_problem(LAYER, H200, measure) is None
    assert measure.asked == [plan_of(LAYER)]


@pytest.mark.parametrize(
    "problem",
    [LAYER, LAYER._replace(operation="backward", costly=True), Problem("forward", "rows", (60, 100, 1), 4),
     Problem("backward", "rows", (256 * 56 * 56, 64, 1), 2), Problem("forward", "planes", (32, 2048, 49), 2)],
)  # fmt: skip
def test_two_rounds_and_no_plan_twice(problem: Problem) -> None:
    """The best of each path and those that the model expects most of; then neighbours of the fastest, no others."""
    candidates = list(model.plans_for(problem, H200))
    slowest = max(candidates, key=lambda plan: cost.seconds(plan, problem, H200))
    winner = model.best(problem, H200, slowest.path)
    measure = Times(lambda plan: 10.0 if plan == winner else 100.0)
    found = tune_problem(problem, H200, measure)
    assert found is not None
    assert len(set(measure.asked)) == len(measure.asked)
    assert measure.asked[0] == plan_of(problem)
    assert {plan.path for plan in measure.asked} == {plan.path for plan in candidates}
    first = [plan for plan in measure.asked if plan in candidates]
    second = [plan for plan in measure.asked if plan not in candidates]
    by_time = [*dict.fromkeys(sorted(candidates, key=lambda plan: cost.seconds(plan, problem, H200)))]
    each = {model.best(problem, H200, path) for path in {plan.path for plan in candidates}}
    assert each | set(by_time[: model.FIRST]) <= set(first)
    assert set(first) <= each | set(by_time[: model.FIRST]) | set(model.neighbours(winner, problem, H200))
    assert set(second) == set(model.neighbours(winner, problem, H200)) - set(candidates)
    assert found.after == winner


def test_each_path_has_its_turn_whatever_the_model_thinks_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "FIRST", 0)
    found = tune_problem(LAYER, H200, Times(lambda plan: 10.0 if plan.path == "single" else 20.0))
    assert found is not None
    assert found.after == model.best(LAYER, H200, "single")


def test_the_second_round_may_win() -> None:
    winner = next(iter(model.neighbours(model.best(LAYER, H200, "split"), LAYER, H200)))
    us = {"split": 50.0, "stream": 60.0, "single": 70.0}
    found = tune_problem(LAYER, H200, Times(lambda plan: 40.0 if plan == winner else us[plan.path]))
    assert found is not None
    assert (found.after, found.after_us) == (winner, 40.0)


def test_text_of_a_result() -> None:
    before, after = model.best(LAYER, H200, "stream"), model.best(LAYER, H200, "split")
    found = Tuned(LAYER, before, after, 100.0, 80.25, 20, 3)
    text = "forward planes [256, 64, 3136] x 2 bytes: 100.0 -> 80.2 us (split, was stream; 20 timed, 3 dropped)"
    assert str(found) == text
    kept = "forward planes [256, 64, 3136] x 2 bytes: 100.0 -> 100.0 us (kept; 1 timed, 0 dropped)"
    assert str(Tuned(LAYER, before, before, 100.0, 100.0, 1, 0)) == kept
    near = Tuned(LAYER, after, next(iter(model.neighbours(after, LAYER, H200))), 100.0, 90.0, 2, 0)
    assert "(another split; 2 timed" in str(near)


# Several.

LAYERS = [
    Layer((60, 100), torch.float32, torch.contiguous_format),
    Layer((256, 64, 56, 56), torch.bfloat16, torch.contiguous_format),
    Layer((256, 512, 7, 7), torch.bfloat16, torch.channels_last),
]


def work(again: bool = False) -> dict[Problem, Layer]:
    return tuning.problems(LAYERS, H200, again)


def timer(problem: Problem, layer: Layer) -> Measure:
    return lambda plan: 10.0 if plan.path == "single" else 20.0


def test_problems_are_those_of_the_layers_and_the_heaviest_come_first() -> None:
    assert list(work().items()) == [
        (Problem("backward", "planes", (256, 64, 3136), 2), LAYERS[1]),
        (Problem("forward", "planes", (256, 64, 3136), 2), LAYERS[1]),
        (Problem("backward", "rows", (12544, 512, 1), 2), LAYERS[2]),
        (Problem("forward", "rows", (12544, 512, 1), 2), LAYERS[2]),
        (Problem("backward", "rows", (60, 100, 1), 4), LAYERS[0]),
        (Problem("forward", "rows", (60, 100, 1), 4), LAYERS[0]),
    ]


def test_near_sizes_are_tuned_once() -> None:
    sizes = [Layer((n, 64, 56, 56), torch.bfloat16, torch.contiguous_format) for n in (256, 250, 260, 128)]
    found = tuning.problems(sizes, H200, again=False)
    assert sorted({problem.shape[0] for problem in found}) == [128, 256]
    assert len(found) == 4


def test_what_is_found_is_used_here_and_by_other_processes(folder: Path) -> None:
    before, began = plan_of(LAYER), epoch()
    assert (before.path, source(LAYER)) == ("split", "the model")
    found = tune_problems(work(), H200, timer, folder, None, None)
    assert len(found) == 6
    assert epoch() > began
    winner = next(result.after for result in found if result.problem == LAYER)
    for problem in (LAYER, NEAR):
        assert plan_of(problem).choice == winner.choice
        assert source(problem) == "tuned in this process"
    assert source(LAYER._replace(shape=(32, 64, 3136))) == "the model"
    tables.forget()
    for problem in (LAYER, NEAR):
        assert plan_of(problem).choice == winner.choice
        assert source(problem) == "the user's table"
    rows = json.loads(tables.path(folder, H200).read_text())["plans"]
    assert rows.keys() == {tables.key(problem) for problem in work(again=True)}
    assert rows[tables.key(LAYER)] == winner.choice._asdict() | {"us": 10.0, "before_us": 20.0}


def test_without_a_folder_it_holds_for_this_process(folder: Path) -> None:
    tune_problems(work(), H200, timer, None, None, None)
    assert source(LAYER) == "tuned in this process"
    assert not folder.exists()


def test_what_the_tables_know_is_left_out_unless_again(folder: Path) -> None:
    tune_problems({LAYER: LAYERS[1]}, H200, timer, folder, None, None)
    assert set(work(again=True)) - set(work()) == {LAYER}
    tables.forget()
    assert set(work(again=True)) - set(work()) == {LAYER}
    (result,) = tune_problems({LAYER: LAYERS[1]}, H200, timer, folder, None, None)
    assert (result.before.path, result.after == result.before) == ("single", True), "the incumbent is the table's"


def test_each_is_told_before_it_begins() -> None:
    told: list[tuple[int, int, str]] = []
    unmeasurable = lambda problem, layer: timer(problem, layer) if problem != LAYER else lambda plan: None  # noqa: E731
    tune_problems(work(), H200, unmeasurable, None, None, lambda *line: told.append(line))
    assert told == [
        (0, 6, "backward [256, 64, 56, 56]"),
        (1, 6, "forward [256, 64, 56, 56]"),
        (2, 6, "backward [256, 512, 7, 7]"),
        (3, 6, "forward [256, 512, 7, 7]"),
        (4, 6, "backward [60, 100]"),
        (5, 6, "forward [60, 100]"),
        (6, 6, "5 problems tuned"),
    ]


@pytest.mark.parametrize(("budget", "count"), [(0.0, 0), (5.0, 1), (10.0, 1), (10.5, 2), (45.0, 5), (1e9, 6)])
def test_no_problem_begins_when_the_budget_is_spent(budget: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes ten seconds."""
    now = [1000.0]

    def slow(problem: Problem, layer: Layer) -> Measure:
        now[0] += 10.0
        return timer(problem, layer)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told: list[str] = []
    found = tune_problems(work(), H200, slow, None, budget, lambda done, total, text: told.append(f"{done} {text}"))
    monkeypatch.undo()
    assert [result.problem for result in found] == list(work(again=True))[:count]
    assert told[-1] == f"{count} {count} problems tuned"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_found_before_an_interruption_is_kept(error: type[BaseException], folder: Path) -> None:
    def interrupted(problem: Problem, layer: Layer) -> Measure:
        if layer is LAYERS[0]:
            raise error
        return timer(problem, layer)

    with pytest.raises(error):
        tune_problems(work(), H200, interrupted, folder, None, None)
    tables.forget()
    assert {problem.shape for problem in work()} == {(60, 100, 1)}
    assert source(LAYER) == "the user's table"


def test_what_does_not_fit_memory_is_told_of_and_the_rest_is_tuned() -> None:
    def greedy(problem: Problem, layer: Layer) -> Measure:
        if problem.shape[0] == 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timer(problem, layer)

    with pytest.warns(UserWarning, match=r"\[256, 64, 56, 56\] is not tuned: out of memory") as caught:
        found = tune_problems(work(), H200, greedy, None, None, None)
    assert len(caught) == 2
    assert [result.problem.shape for result in found] == [(12544, 512, 1)] * 2 + [(60, 100, 1)] * 2


def test_a_folder_that_cannot_be_written_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, real = [], tables.save

    def save(*given: Any) -> Path | None:
        tries.append(given)
        return real(*given)

    monkeypatch.setattr(tables, "save", save)
    file = tmp_path / "file"
    file.write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = tune_problems(work(), H200, timer, file / "folder", None, None)
    assert len(found) == 6
    assert len(tries) == 1, "it is not tried again"
    (warning,) = caught
    assert str(warning.message).startswith("tuned plans are not kept: cannot write ")
    assert source(LAYER) == "tuned in this process"


# The whole of `tune`, with a CPU in place of the GPU.


class Timed:
    """`timing.measure` in its place: the call runs in each slot, and its time is made up."""

    def __init__(self) -> None:
        self.least: list[float] = []
        self.slots: set[int] = set()

    def __call__(self, call: timing.Call, slots: int, device: torch.device, least: float, samples: int) -> Any:
        assert (device, samples) == (CPU, plan_timing.SAMPLES)
        for slot in range(slots):
            call(slot)
        self.least.append(least)
        self.slots.add(slots)
        return timing.Timing(100.0 - len(self.least), 0.0, 0.0, "wall")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """Everything but CUDA itself: one CPU is the GPU."""
    if not launch.INTERPRETED:
        pytest.skip("the kernels do not take CPU tensors")
    stub = Timed()
    monkeypatch.setattr(timing, "gpu", lambda what, device: CPU)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(timing, "measure", stub)
    monkeypatch.setattr(timing, "slots_for", lambda size, cache: 2)
    return stub


class Net(nn.Module):
    """Convolution, batch norm and ReLU; then batch norm of few features, called by its argument's name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.last = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        y: Tensor = self.last(input=x.mean((2, 3)))
        return y


@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_is_tuned_and_stays_as_it_is(
    fuse: bool, timed: Timed, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tritonbn.convert(Net(), fuse=fuse)
    model.norm.eval()
    x, state = torch.randn(4, 3, 4, 4), {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    with launches.recorded() as ran:
        found = tritonbn.tune(model, x)
    assert [result.problem for result in found] == [
        Problem("backward", "planes", (4, 4, 16), 4),
        Problem("forward", "planes", (4, 4, 16), 4),
        Problem("backward", "rows", (4, 4, 1), 4),
        Problem("forward", "rows", (4, 4, 1), 4),
    ]
    assert {"forward_kernel", "statistics_kernel", "normalize_kernel", "backward_kernel", "gradient_sums_kernel",
            "input_gradient_kernel"} <= set(ran)  # fmt: skip
    assert len(timed.least) == sum(result.tried for result in found)
    assert set(timed.least) == {plan_timing.LEAST_SECONDS}
    assert timed.slots == {2}
    assert all(result.dropped == 0 for result in found), "of the interpreter's launches spills are not known"
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert (model.training, model.norm.training, model.last.training) == (True, False, True)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7))), "no random number"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tritonbn.tune 0/4 backward [4, 4, 4, 4]"
    assert lines[-1] == "tritonbn.tune 4/4 4 problems tuned"
    assert len(lines) == 5
    for result in found:
        estimate = make_plan(*result.problem[:4], planning.device_of(x.device)).estimate
        assert estimate is not None
        assert estimate.source == "tuned in this process"
    (file,) = folder.glob("*.json")
    assert len(json.loads(file.read_text())["plans"]) == 4
    assert tritonbn.tune(model, x, progress=False) == []
    assert len(tritonbn.tune(model, x, progress=False, again=True, budget=1e9)) == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_shapes_are_tuned(dtype: torch.dtype, timed: Timed, folder: Path) -> None:
    told: list[tuple[int, int, str]] = []
    found = tritonbn.tune(
        [(4, 4, 2, 2), [6, 8]], dtype=dtype, memory_format=torch.contiguous_format, save=False,
        progress=lambda *line: told.append(line),
    )  # fmt: skip
    assert {result.problem.shape for result in found} == {(4, 4, 4), (6, 8, 1)}
    assert {result.problem.itemsize for result in found} == {dtype.itemsize}
    assert told[-1] == (4, 4, "4 problems tuned")
    assert not folder.exists()


def test_channels_last_shapes_are_rows(timed: Timed) -> None:
    found = tritonbn.tune([(4, 4, 2, 2)], memory_format=torch.channels_last, save=False, progress=False)
    assert {result.problem[1:3] for result in found} == {("rows", (16, 4, 1))}


def test_operations_are_those_of_the_plan(timed: Timed) -> None:
    """Both operations, with exponentials or not, by each plan: the kernels of the plan run, on the slot's tensors."""
    layer = Layer((8, 16, 4, 4), torch.float32, torch.contiguous_format)
    results = {}
    for operation, costly in (("forward", False), ("backward", False), ("backward", True)):
        problem = Problem(operation, "planes", (8, 16, 16), 4, costly)  # type: ignore[arg-type]
        call = plan_timing.operation(problem, lambda: layer.empty(CPU), 2)
        by_path = {plan.path: plan for plan in model.plans_for(problem, H200) if not plan.cooperative}
        assert by_path.keys() == {"single", "split"}
        for path, plan in by_path.items():
            with launches.recorded() as ran:
                first, again, second = call(plan, 0), call(plan, 0), call(plan, 1)
            assert len(ran) == 3 * (1 if path == "single" else 2)
            outputs = [out[0] for out in (first, again, second)]  # type: ignore[index]
            results[operation, costly, path] = outputs[0]
            assert torch.equal(outputs[0], outputs[1])
            assert not torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(results["backward", True, "split"], results["backward", False, "split"])


def test_plans_that_cannot_run_are_dropped(timed: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer((8, 16, 4, 4), torch.float32, torch.contiguous_format)
    problem = Problem("forward", "planes", (8, 16, 16), 4)
    single, split = (model.best(problem, H200, path) for path in ("single", "split"))
    measure = tuning._timer(CPU)(problem, layer)
    assert measure(single) == 99.0
    assert measure(split) == 98.0
    waiting = build(problem, split.choice._replace(path="stream", slots=1))
    assert measure(waiting) is None, "others ran in their place"
    for spills, us in ((None, 97.0), (0, 96.0), (1, None)):
        monkeypatch.setattr(handles, "spills", lambda plan, spills=spills: spills)
        assert measure(single) == us

    def refuse(*_: Any, **__: Any) -> Any:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(launch, "_launch", refuse)
    assert measure(single) is None


COMPILED = """
import torch
from bench.stub import stubbed
from tritonbn import model, timing, tuning
from tritonbn.choice import Problem
from tritonbn.device import H200
from tritonbn.layers import Layer

timing.slots_for = lambda size, cache: 1
timing.measure = lambda call, *_: timing.Timing(7.0, 0.0, 0.0, "graph")
layer = Layer((60, 100), torch.float32, torch.contiguous_format)
problem = Problem("forward", "rows", (60, 100, 1), 4)
plans = [model.best(problem, H200, path) for path in ("single", "split")]
with stubbed() as stub:
    measure = tuning._timer(torch.device("cpu"))(problem, layer)
    torch.use_deterministic_algorithms(True)
    print(measure(plans[0]), stub.count)
    stub.spills = 4
    print(measure(plans[1]), stub.count)
"""


def test_of_compiled_kernels_spills_are_known() -> None:
    """In deterministic mode too, in which nothing measured is used."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["7.0 1", "None 3"]


# What stops it.


def test_without_a_gpu_the_model_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tritonbn.BatchNorm1d(4)
    model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    for given in ((model, torch.randn(3, 4)), ([(3, 4)],)):
        with pytest.raises(RuntimeError, match=r"tune measures on a GPU, but torch.cuda.is_available\(\) is False"):
            tritonbn.tune(*given)


def test_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="tune cannot run while a CUDA graph is captured"):
        tritonbn.tune([(60, 100)])


def test_the_device_is_a_gpu_and_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(ValueError, match="tune measures on a GPU, but got the device cpu"):
        tritonbn.tune([(60, 100)], device="cpu")
    given = (None, "cuda", torch.device("cuda"), "cuda:1", torch.device("cuda", 0))
    assert [str(timing.gpu("tune", device)) for device in given] == ["cuda:3", "cuda:3", "cuda:3", "cuda:1", "cuda:0"]


def test_a_models_device_is_that_of_its_layers(timed: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.device("cuda", 2)
    layer = Layer((4, 4), torch.float32, torch.contiguous_format, where)
    chosen: list[Any] = []
    monkeypatch.setattr(tuning, "layers_of", lambda *_: {"a": [layer._replace(device=CPU)], "b": [layer]})
    monkeypatch.setattr(tuning, "tune_layers", lambda layers, device, **_: chosen.append((layers, device)))
    tritonbn.tune(nn.Identity(), progress=False)
    tritonbn.tune(nn.Identity(), device="cuda:1", progress=False)
    assert chosen == [([layer._replace(device=CPU), layer], device) for device in (where, "cuda:1")]


def test_a_model_without_our_modules(timed: Timed) -> None:
    with pytest.raises(ValueError, match="expected a model that calls tritonbn modules"):
        tritonbn.tune(nn.BatchNorm1d(4), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5,), torch.float32), ((0, 5), torch.float32), ((4, 5), torch.int32), ((4, 5), torch.cfloat)]
)
def test_shapes_that_are_none(shape: tuple[int, ...], dtype: torch.dtype, timed: Timed) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, C, ...\], not empty, of float32, .*; got \["):
        tritonbn.tune([(8, 8), shape], dtype=dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a real GPU")
def test_on_a_gpu(folder: Path) -> None:
    shape = (32, 64, 14, 14)
    found = tritonbn.tune([shape], progress=False)
    assert [result.problem.operation for result in found] == ["backward", "forward"]
    for result in found:
        assert 0 < result.after_us <= result.before_us < 1e4
        assert result.tried > 4
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    assert tritonbn.explain(x).count("plan from tuned in this process") == 2
    assert len(list(folder.glob("*.json"))) == 1
