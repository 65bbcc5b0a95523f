"""`python -m bench overhead`: every case starts the kernels that it is said to, and is compared with another run."""

import json
import os
import subprocess
import sys
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks' extra is not installed")

from rich.console import Console

from bench import callers, callers_timed, overhead
from bench.errors import BenchError
from bench.stub import stubbed
from tritonbn import launch
from tritonbn.plan import make_plan
from tritonbn.timing import Quartiles

ROOT = Path(__file__).resolve().parent.parent


def measured(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """overhead.json and the output of a short run, in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "overhead", "--device", "cpu", "--blocks", "3", "--calls", "2"]
    done = subprocess.run(
        [*command, "--out", str(folder), *options], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "overhead.json").read_text())
    return found, done.stdout


def test_a_run_and_one_compared_with_it(tmp_path: Path) -> None:
    first, _ = measured(tmp_path / "first", "--json", str(tmp_path / "callers.json"))
    assert [row["launches"] for row in first["rows"]] == [1, 2, 2, 4, 1, 1, 1, 1, 2, 3]
    assert (first["stubbed"], first["before"], first["blocks"], first["calls"]) == (True, None, 3, 2)
    assert {"cpu", "commit", "torch", "triton"} <= first["machine"].keys()
    for row in first["rows"]:
        assert row["us"].keys() >= {"torch", "jit", "ours"}
        assert ("unfused" in row["us"]) == ("fused" in row["case"] or "the same" in row["case"])
        assert all(0 < us["low"] <= us["median"] <= us["high"] for us in row["us"].values())
        assert (row["parts_us"] is not None) == ("no_grad" in row["us"])
    second, output = measured(tmp_path / "second", "--before", str(tmp_path / "first" / "overhead.json"))
    assert second["before"] == first["machine"]
    assert [row["before"] for row in second["rows"]] == [row["us"]["ours"] for row in first["rows"]]
    assert f"{second['rows'][0]['before']['median']:.1f} (" in output
    rows = json.loads((tmp_path / "callers.json").read_text())
    check_rows_of_callers(rows)
    assert all(sum(line.startswith(f"{name} ") for line in output.splitlines()) == 4 for name in callers.CASES)
    check_tables_of_callers(rows)


def check_rows_of_callers(rows: list[dict[str, Any]]) -> None:
    ways = [f"{way} {shape}" for shape in ([60, 100], [512, 32]) for way in ("forward", "forward+backward")]
    assert [row["case"] for row in rows] == [f"{name} {way}" for way in ways for name in callers.CASES]
    # A new shape takes the library's own path, which is one launch.
    assert [row["library_launches"] for row in rows if row["name"] != "new-shape"] == [1] * 10 + [2] * 20 + [4] * 10
    for row in rows:
        assert row["commit"] == rows[0]["commit"]
        assert row["handles"] > 0
        assert (row["handles_grown"], row["other_launches"], row["other_operations"]) == (0, 0, []), row["case"]
        assert (row["planning_microseconds"] is not None) == (row["ratio"] is None) == (row["name"] == "new-shape")
        assert (row["wrapper_microseconds"] is not None) == (row["name"] in ("toggled-grad", "functional_call"))
        if row["name"] != "new-shape":
            for name in ("microseconds", "torch_microseconds"):
                assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def check_tables_of_callers(rows: list[dict[str, Any]]) -> None:
    wide = {name: 1234.5 for name in rows[0] if "microseconds" in name}
    out = StringIO()
    shown = Console(file=out)
    for table in callers_timed.tables([row | wide for row in rows]):
        shown.print(table, soft_wrap=True)
    lines = out.getvalue().splitlines()
    assert sum("1234 (1234-1234) 1234 (1234-1234)" in line for line in lines) == len(rows)
    assert max(map(len, lines)) <= 100


def setting(backward: bool = True) -> callers.Setting:
    return callers.Setting((8, 4), torch.device("cpu"), backward)


def arguments(works: list[callers.Work]) -> list[tuple[Any, ...]]:
    """What forwards are called with."""
    return [work.args for work in works if isinstance(work, partial)]


def test_fresh_parameters_are_never_seen_twice() -> None:
    made = callers.CASES["fresh-parameters"](setting(backward=False))
    found = [*arguments(made.ours(3)), *arguments(made.ours(3))]
    assert len({args[0] for args in found}) == 1  # x
    assert len({id(t) for args in found for t in args[1:5]}) == 6 * 4
    made = callers.CASES["functional_call"](setting(backward=False))
    found = [*arguments(made.ours(3)), *arguments(made.ours(3))]
    assert len({id(t) for args in found for t in args[1].values()}) == 6 * 5


def test_gradients_are_toggled_between_calls() -> None:
    made = callers.CASES["toggled-grad"](setting())
    assert made.wrapper is not None
    for prepare in (made.ours, made.torchs):
        works = prepare(4)
        assert works[:2] == works[2:]
        assert len({args[0].weight for args in arguments(works)}) == 1
    t = arguments(made.torchs(1))[0][0]
    for work, wanted in zip(made.torchs(4), (3, 1, 3, 1), strict=True):
        gradients = work()
        assert isinstance(gradients, tuple)
        assert len(gradients) == wanted
        assert t.weight.requires_grad == t.bias.requires_grad == (wanted == 3)


@pytest.mark.parametrize("name", ["two-layouts", "two-dtypes"])
def test_two_inputs_share_their_parameters(name: str) -> None:
    made = callers.CASES[name](setting(backward=False))
    (first, *vectors), (second, *same), (third, *_) = arguments(made.ours(3))
    assert [id(v) for v in vectors] == [id(v) for v in same]
    assert first is third
    assert (first.dtype, first.stride()) != (second.dtype, second.stride())
    steady = [arguments(prepare(2)) for prepare in made.steady]
    assert len({id(args[1]) for found in steady for args in found} | {id(vectors[0])}) == 3


def test_a_forgotten_shape_is_planned_again() -> None:
    plan = make_plan("forward", "rows", (8, 4, 1), 4)
    assert make_plan("forward", "rows", (8, 4, 1), 4) is plan
    callers.forget_shapes()
    assert make_plan("forward", "rows", (8, 4, 1), 4) is not plan


def test_figures_of_callers() -> None:
    seen = {"ours": [13.0, 14.0, 13.0], "torch": [5.0, 5.0, 6.0], "steady 0": [4.0, 4.0, 6.0], "steady 1": [8.0] * 3}
    found = callers_timed.figures(seen | {"wrapper": [1.0] * 3})
    assert (found["microseconds"], found["torch_microseconds"]) == (13.0, 5.0)
    assert (found["steady_microseconds"], found["wrapper_microseconds"], found["ratio"]) == (6.0, 1.0, 2.0)
    found = callers_timed.figures(seen | {"torch's steady": [5.0, 4.0, 3.0], "planning": [2.0, 3.0, 4.0]})
    assert (found["microseconds"], found["torch_microseconds"]) == (7.0, 1.0)  # 7, 8, 6 and 0, 1, 3
    assert (found["planning_microseconds"], found["ratio"]) == (3.0, None)


def test_parts_are_differences() -> None:
    figures = {name: Quartiles(0, us, 99) for name, us in
               {"ours": 20.0, "no_grad": 13.0, "inner": 9.0, "no_launch": 5.0}.items()}  # fmt: skip
    assert overhead.parts(figures) == {"checks and plan": 4.0, "autograd": 7.0, "allocation": 5.0, "launch": 4.0}
    assert overhead.parts({"ours": figures["ours"]}) is None


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [], "machine": {}', '{"rows": [{"case": "x"}], "machine": {}}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="expected the JSON of this command"):
        overhead.earlier(path)
    with pytest.raises(BenchError, match="expected the JSON of this command"):
        overhead.earlier(tmp_path / "absent.json")


def test_the_interpreter_has_no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(BenchError, match="unset TRITON_INTERPRET"), stubbed():
        pass
