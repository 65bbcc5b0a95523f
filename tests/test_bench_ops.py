"""`python -m bench ops`: what it writes, in which order, and what becomes of failures; without a GPU, tiny."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

from bench import ops, ops_tables, preview, rows, wall
from bench.__main__ import main, parse
from bench.errors import BenchError
from bench.problem import DIRECTIONS, Problem, layouts_of, make_inputs
from bench.providers import PROVIDERS, Provider, eager_operation
from bench.rows import Bench, rows_of
from bench.shapes import SETS, Layer
from bench.summary import Row
from tritonbn import launch, planning
from tritonbn.device import H200, KNOWN
from tritonbn.timing import measuring

FACTS = {"device": "CPU", "torch": "2", "triton": "3", "commit": "c"}
needs_compiler = pytest.mark.skipif(
    not (torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler on the CPU",
)
TINY = Problem("tiny", Layer((4, 6, 5, 5), 3), "nchw", "bf16", "bn+add+relu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
with_kernels = pytest.mark.skipif(
    not (launch.INTERPRETED or torch.cuda.is_available()), reason="our kernels need a GPU or TRITON_INTERPRET=1"
)


@pytest.fixture
def bench(device: torch.device) -> Iterator[Bench]:
    with measuring(device):
        yield Bench(device, FACTS, bandwidth=1e12, l2_bytes=0 if device.type == "cpu" else 1 << 20, samples=2)


def measured(bench: Bench, *providers: Provider, problem: Problem = TINY) -> dict[tuple[str, str], Row]:
    found = [row for rows in rows_of(problem, providers, DIRECTIONS, bench) for row in rows]
    return {(row["provider"], row["direction"]): row for row in found}


@with_kernels
def test_a_row_knows_what_was_measured(bench: Bench) -> None:
    found = measured(bench, PROVIDERS["tritonbn"], PROVIDERS["eager"])
    assert len(found) == 6
    elements = 4 * 6 * 25
    floors = {"forward": 6 * elements + 75, "backward": 8 * elements + 75, "both": 14 * elements + 150}
    for (provider, direction), row in found.items():
        assert row.keys() == Row.__annotations__.keys()
        assert row["error"] is None
        assert row["us"] is not None
        assert row["us_low"] is not None
        assert row["us_high"] is not None
        assert 0 < row["us_low"] <= row["us"] <= row["us_high"]
        assert row["timed_by"] == ("wall" if bench.device.type == "cpu" else "graph")
        assert (row["shape"], row["count"], row["layout"], row["dtype"]) == ([4, 6, 5, 5], 3, "nchw", "bf16")
        assert (row["gpu"], row["torch"], row["triton"], row["commit"]) == ("CPU", "2", "3", "c")
        assert row["floor_bytes"] == floors[direction]
        assert row["gb_per_s"] == pytest.approx(floors[direction] / row["us"] / 1e3)
        assert row["percent_of_floor"] == pytest.approx(100 * floors[direction] / row["us"] / 1e6)
        assert (row["plan"] is None) == (row["path"] is None) == (provider == "eager")
        assert (row["peak_bytes"] is None) == (bench.device.type == "cpu")


@with_kernels
def test_plan_and_path_are_those_that_ran(bench: Bench) -> None:
    found = measured(bench._replace(path="split"), PROVIDERS["tritonbn"], PROVIDERS["eager"])
    assert {row["path"] for row in found.values() if row["provider"] == "tritonbn"} == {"split"}
    both = found["tritonbn", "both"]["plan"]
    assert both == f"{found['tritonbn', 'forward']['plan']}; {found['tritonbn', 'backward']['plan']}"
    assert both is not None
    assert both.startswith("forward planes [4, 6, 25] x 2 bytes: path split")


def test_who_fails_or_is_wrong_gets_a_row_and_no_time(bench: Bench) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("\n  does not build \nthe rest")

    def twice(epilogue: Any, state: Any) -> Any:
        return lambda x, residual: 2 * eager_operation(epilogue, state)(x, residual)

    def greedy(epilogue: Any, state: Any) -> Any:
        def operate(x: Any, residual: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

        return operate

    found = measured(bench, Provider("a", broken), Provider("b", twice), Provider("c", greedy), PROVIDERS["eager"])
    errors = {provider: {row["error"] for key, row in found.items() if key[0] == provider} for provider, _ in found}
    assert errors["a"] == {"RuntimeError: does not build"}
    assert errors["c"] == {"out of memory"}
    assert errors["eager"] == {None}
    (wrong,) = errors["b"]
    assert wrong is not None
    assert wrong.startswith("wrong result: y: relative error 1.0e+00")
    assert all(row["us"] is None for row in found.values() if row["error"])


def test_inputs_too_large_are_rows_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(rows, "make_inputs", refuse)
    assert {row["error"] for row in measured(bench, PROVIDERS["eager"]).values()} == {"out of memory"}


def test_a_dead_gpu_ends_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(_: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(*_: Any) -> Any:
        raise RuntimeError("illegal")

    monkeypatch.setattr(rows, "synchronize", dead)
    with pytest.raises(BenchError, match="does not answer after: RuntimeError: illegal"):
        measured(bench, Provider("a", broken))


@with_kernels
def test_eager_calls_of_modules_take_turns(bench: Bench) -> None:
    problem = Problem("mnist", Layer((6, 10), 3), "nc", "fp32", "bn+sigmoid")
    found = wall.wall_rows(problem, ["tritonbn", "eager"], bench)
    assert [(row["provider"], row["direction"]) for row in found] == [
        ("tritonbn", "forward"), ("tritonbn", "both"), ("eager", "forward"), ("eager", "both"),
    ]  # fmt: skip
    assert all(row["timed_by"] == "wall" and row["us"] is not None and row["us"] > 0 for row in found)
    assert all(row["percent_of_floor"] is None and row["error"] is None for row in found)


@needs_compiler
@pytest.mark.parametrize("epilogue", ["bn", "bn+sigmoid"])
def test_eager_calls_of_compiled_modules(bench: Bench, epilogue: str) -> None:
    found = wall.wall_rows(Problem("mnist", Layer((6, 10), 3), "nc", "fp32", epilogue), ["eager", "compile"], bench)
    assert [(row["provider"], row["error"]) for row in found] == 2 * [("eager", None)] + 2 * [("compile", None)]


@pytest.mark.parametrize("provider", ["tritonbn", "eager"])
@pytest.mark.parametrize("epilogue", ["bn", "bn+relu", "bn+silu", "bn+sigmoid"])
@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 5), (3, 10, 4, 4), (3, 10, 2, 2, 2)])
def test_modules_are_what_one_would_write(provider: str, epilogue: str, shape: tuple[int, ...]) -> None:
    problem = Problem("tiny", Layer(shape), "nchw", "fp32", epilogue)
    inputs = make_inputs(problem, 1, torch.device("cpu"))
    x = inputs.slots[0].x
    y = torch.nn.functional.batch_norm(x, None, None, training=True)
    activation = epilogue.removeprefix("bn").removeprefix("+")
    expected = getattr(torch.nn.functional, activation)(y) if activation else y
    torch.testing.assert_close(wall.module_for(provider, problem).train()(x), expected, atol=1e-5, rtol=1e-5)


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = main(["ops", "--device", device, "--out", str(tmp_path), *options])
    return code, json.loads((tmp_path / "ops.json").read_text())


@with_kernels
def test_the_file_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--shape",
        "4,6,3,2",
        "--dtype",
        "bf16",
        "--epilogue",
        "bn",
        "--provider",
        "tritonbn",
        "--provider",
        "eager",
    )
    code, found = run(tmp_path, *options, "--provider", "attorch")
    assert code == 0
    facts = found["machine"]
    assert facts["copy_gb_per_s"] > 0
    assert facts["l2_bytes"] >= 0
    assert facts["peers_absent"]["attorch"].startswith(("attorch is not installed", "needs a GPU"))
    keys = [(row["layout"], row["provider"], row["direction"]) for row in found["rows"]]
    assert keys == [(layout, provider, direction) for layout in ("nchw", "channels_last")
                    for provider in ("tritonbn", "eager") for direction in DIRECTIONS]  # fmt: skip
    for row in found["rows"]:
        peer = next(r for r in found["rows"] if r["provider"] == "eager" and r["layout"] == row["layout"]
                    and r["direction"] == row["direction"])  # fmt: skip
        ours = row["provider"] == "tritonbn"
        assert row["ratio_to_best_peer"] == (pytest.approx(peer["us"] / row["us"]) if ours else None)
    assert (found["wall"], found["left_out"]) == ([], [])
    printed = capsys.readouterr().out
    for expected in ("without attorch", "custom 4x6x3x2 nchw bf16 bn  tritonbn: forward", "rows lost to the best peer",
                     "line to cross", "not measured", str(tmp_path / "ops.json")):  # fmt: skip
        assert expected in printed


@pytest.mark.parametrize("budget", ["100", "40"])
def test_eager_calls_beside_compiled_ones_come_last(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take the place of those without; each measurement takes 10 s here."""
    now, called = [0.0], list[str]()

    def wall_rows(problem: Problem, providers: list[str], bench: rows.Bench) -> list[Any]:
        now[0] += 10
        called.append("+".join(providers))
        return [rows.blank(problem, "forward", name, bench) | {"us": now[0]} for name in providers]

    def rows_of(problem: Problem, providers: list[Any], directions: Any, bench: rows.Bench) -> list[Any]:
        now[0] += 10
        called.append("rows")
        return []

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(wall, "wall_rows", wall_rows)
    monkeypatch.setattr(ops, "rows_of", rows_of)
    monkeypatch.setattr(ops_tables, "print_summary", lambda *_: None)
    providers = "--provider", "eager", "--provider", "compile"
    _, found = run(tmp_path, "--set", "mnist", "--dtype", "bf16", "--epilogue", "bn", *providers, "--budget", budget)
    first = ["eager", "eager", "rows", "rows"]
    beside = ["eager+compile", "eager+compile"]
    left = ["mnist fp32 bn (eager calls beside compile)", "mnist fp32 bn+sigmoid (eager calls beside compile)"]
    assert called == (first + beside if budget == "100" else first)
    assert found["left_out"] == ([] if budget == "100" else left)
    times = [(row["epilogue"], row["provider"], row["us"]) for row in found["wall"]]
    assert times == (
        [("bn", "eager", 50), ("bn", "compile", 50), ("bn+sigmoid", "eager", 60), ("bn+sigmoid", "compile", 60)]
        if budget == "100"
        else [("bn", "eager", 10), ("bn+sigmoid", "eager", 20)]
    )


@with_kernels
def test_a_spent_budget_leaves_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--set", "resnet50-256", "--dtype", "bf16", "--epilogue", "bn", "--provider", "eager", "--budget", "0"
    code, found = run(tmp_path, *options)
    assert code == 0
    assert (found["rows"], found["wall"]) == ([], [])
    assert found["left_out"] == ["resnet50-256 bf16 bn+relu (eager calls)"] + 24 * ["resnet50-256 bf16 bn (eager)"]
    assert "left out, the budget was spent: resnet50-256 bf16 bn (eager), 24 problems" in capsys.readouterr().out


def test_what_was_measured_is_written_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(2))

    def stop_at_second(*args: Any) -> Any:
        if next(turns):
            raise KeyboardInterrupt
        return rows_of(*args)

    monkeypatch.setattr("bench.ops.rows_of", stop_at_second)
    code, found = run(tmp_path, "--shape", "4,6", "--shape", "8,6", "--provider", "eager", "--dtype", "fp32",
                      "--epilogue", "bn")  # fmt: skip
    assert code == 130
    assert [row["shape"] for row in found["rows"]] == 3 * [[8, 6]]


@with_kernels
def test_a_failure_of_ours_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setitem(PROVIDERS, "tritonbn", PROVIDERS["tritonbn"]._replace(build=broken))
    options = "--shape", "4,6", "--dtype", "fp32", "--epilogue", "bn", "--provider"
    assert run(tmp_path, *options, "tritonbn")[0] == 1
    assert run(tmp_path, *options, "eager")[0] == 0


@without_gpu
def test_without_a_gpu_it_shows_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops", "--set", "resnet50-256", "--set", "mnist"]) == 0
    printed = capsys.readouterr().out
    assert "no GPU" in printed
    assert "python -m bench codegen" in printed
    lines = [line.split() for line in printed.splitlines() if line.startswith(("resnet50-256", "mnist"))]
    assert len(lines) == 25
    largest = next(line for line in lines if line[1:4] == ["256x64x112x112", "1", "nchw"])
    megabytes = 256 * 64 * 112 * 112 * 2 / 1e6
    assert [f"{2 * megabytes:.2f}", f"{3 * megabytes:.2f}"] == largest[-2 - len(KNOWN) : -len(KNOWN)]
    heads = next(line.split("  ") for line in printed.splitlines() if line.startswith("set "))
    h200 = [head.strip() for head in heads if head.strip()].index("us H200") - len([h for h in heads if h.strip()])
    assert largest[h200] == f"{5 * megabytes * 1e6 / H200.bandwidth * 1e6:.3g}"


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "nc"])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_previewed_plans_are_those_of_a_launch(operation: Any, layout: str) -> None:
    shapes = (256, 64, 56, 56), (256, 512, 7, 7), (8, 3, 2, 5, 5), (8, 1, 5, 5), (60, 100), (8, 3, 131)
    for shape in (shape for shape in shapes if layout in layouts_of(shape)):
        problem = Problem("tiny", Layer(shape), layout, "bf16", "bn")
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=problem.memory_format)
        assert preview.planned(problem, operation) == planning.plan_for(operation, x)


def args(*options: str) -> Any:
    found = parse(["ops", *options])
    ops.defaults(found)
    return found


def test_the_important_comes_first() -> None:
    chosen = args("--set", "mobilenet", "--set", "resnet50-256", "--set", "mnist")
    units = ops.units(ops.problems(chosen), [PROVIDERS[n] for n in ("compile-max-autotune", "compile", "eager")])
    problems = [unit.problem for unit in units]
    first = [(p.set, p.dtype, p.epilogue, p.layer.shape, unit.providers[0].name)
             for p, unit in zip(problems, units, strict=True)]  # fmt: skip
    assert first[0] == ("resnet50-256", "bf16", "bn", (256, 256, 56, 56), "eager")
    order = list(dict.fromkeys((s, d, e, name) for s, d, e, _, name in first))
    assert order[:6] == [
        ("resnet50-256", "bf16", "bn", "eager"), ("resnet50-256", "bf16", "bn+add+relu", "eager"),
        ("resnet50-256", "bf16", "bn", "compile"), ("resnet50-256", "bf16", "bn+add+relu", "compile"),
        ("mnist", "bf16", "bn", "eager"), ("mnist", "bf16", "bn+sigmoid", "eager"),
    ]  # fmt: skip
    dtypes = [p.dtype for p in problems]
    assert dtypes == sorted(dtypes, key=["bf16", "fp16", "fp32"].index)
    names = [name for _, dtype, _, _, name in first if dtype == "bf16"]
    tuned = names.index("compile-max-autotune")
    assert set(names[tuned:]) == {"compile-max-autotune"}
    assert len(set(problems)) == 3 * (2 * 4 * (12 + 19) + 2)


def test_quick_is_the_headlines() -> None:
    found = list(ops.problems(args("--quick")))
    assert {(p.set, p.dtype, p.epilogue) for p in found} == {
        ("resnet50-256", "bf16", "bn"), ("resnet50-256", "bf16", "bn+add+relu"), ("mnist", "bf16", "bn"),
        ("mnist", "bf16", "bn+sigmoid"),
    }  # fmt: skip
    assert "compile-max-autotune" not in args("--quick").provider
    assert [p.set for p in ops.wall_problems(args("--quick"))] == ["mnist", "mnist"]


def test_eager_calls_are_those_of_the_smallest_layers() -> None:
    found = list(ops.wall_problems(args()))
    assert {p.set for p in found} == set(SETS)
    assert [(p.layer.shape, p.dtype, p.epilogue) for p in found if p.set == "mnist"] == [
        ((60, 100), "fp32", "bn"), ((60, 100), "fp32", "bn+sigmoid"),
    ]  # fmt: skip
    resnet = next(p for p in found if p.set == "resnet50-256")
    assert (resnet.layer.shape, resnet.dtype, resnet.epilogue) == ((256, 512, 7, 7), "bf16", "bn+relu")
    assert list(ops.wall_problems(args("--shape", "4,6"))) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--set", "vgg"), ("--shape", "4"), ("--dtype", "int8"), ("--layout", "nhcw"), ("--epilogue", "relu"),
     ("--direction", "up"), ("--provider", "cudnn"), ("--path", "fast"), ("--budget", "long")],
)  # fmt: skip
def test_bad_options_are_usage_errors(option: str, value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["ops", option, value])
    assert stop.value.code == 2


def test_losses_and_failures_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(torch.device("cpu"), FACTS, 1e12, 0)
    ours, eager = (rows.blank(TINY, "forward", provider, bench) for provider in ("tritonbn", "eager"))
    failed = rows.blank(TINY, "both", "tritonbn", bench)
    ours["us"], eager["us"], ours["ratio_to_best_peer"], ours["path"] = 20.0, 10.0, 0.5, "split"
    failed["error"] = "out of memory"
    ops_tables.print_summary([ours, eager, failed], [])
    printed = capsys.readouterr().out
    assert "1 of 1 rows lost to the best peer, 1 of ours failed" in printed
    where = "tiny 4x6x5x5 nchw bf16 bn+add+relu"
    assert f"{where} forward: 0.50x, 20.0 us, eager 10.0 us, path split" in printed
    assert f"{where} both: out of memory" in printed


def test_plain_pytest_does_not_collect_benchmarks(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
