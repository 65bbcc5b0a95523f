"""`python -m bench report`: the page and the plots that it makes of results."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

import numpy as np
from matplotlib.figure import Figure

from bench.__main__ import main
from bench.page import markdown, plots
from bench.page.folders import RESULTS
from bench.shapes import SETS, Layer
from tests import results
from tritonbn import launch

FOLDER = "Pretend"


def page(root: Path) -> str:
    """The page for the results in `root`."""
    assert main(["report", "--results", str(root)]) == 0
    return (root / "README.md").read_text()


def line(text: str, *parts: str) -> list[str]:
    """The cells of the only table row that holds all the parts."""
    (found,) = [row for row in text.splitlines() if row.startswith("|") and all(part in row for part in parts)]
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def gpu(root: Path, rows: list[results.Row], **files: Any) -> Path:
    """`root` with the results of a GPU."""
    results.write(root / FOLDER, ops=results.ops(rows, results.wall()), **files)
    return root


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50 is the layer of `results.row`: with it, all was measured."""
    monkeypatch.setitem(SETS, "resnet50-256", lambda: [Layer((256, 64, 56, 56))])


def pair(ours: float, theirs: float, **kind: Any) -> list[results.Row]:
    return [results.row(us=ours, **kind), results.row(us=theirs, provider="eager", **kind)]


def test_committed_page_is_up_to_date() -> None:
    assert main(["report", "--check"]) == 0


def test_without_a_gpu_every_target_is_not_measured(tmp_path: Path) -> None:
    text = page(results.write(tmp_path / "cpu", overhead=overhead()).parent)
    assert "No GPU has been measured yet" in text
    rows = [row for row in text.splitlines() if "| at least " in row or "| at most " in row]
    assert len(rows) == 14
    assert all(row.endswith("| not measured | - |") for row in rows)
    assert "### Operators" not in text


def test_figures_of_a_cpu_are_nobodys_targets(tmp_path: Path) -> None:
    results.write(tmp_path / "cpu", ops=results.ops(results.network(), results.wall(), device="CPU"))
    text = page(tmp_path)
    assert "No GPU has been measured yet" in text
    assert "### Operators" not in text
    assert sorted(path.name for path in (tmp_path / "cpu").iterdir()) == ["ops.json"]


def test_targets_say_what_was_reached(tmp_path: Path) -> None:
    text = page(gpu(tmp_path, pair(80.0, 160.0) + pair(100.0, 120.0, epilogue="bn+add+relu")))
    percent = 100 * (2 * 256 * 64 * 56 * 56 * 2 / 80e-6) / 4e12  # 64.2
    add = 100 * (3 * 256 * 64 * 56 * 56 * 2 / 100e-6) / 4e12  # 77.1
    mean = f"{5 / (2 / percent + 3 / add):.4g}"
    assert line(text, "nchw, forward: percent")[1:] == ["at least 90", mean, "**no**"]
    assert line(text, "bn: speed-up over the best of torch eager")[1:] == ["at least 1.5", "2", "yes"]
    assert line(text, "bn+add+relu: speed-up over")[1:] == ["at least 2", "1.2", "**no**"]
    assert line(text, "nchw, backward: percent")[1:] == ["at least 90", "not measured", "-"]
    assert line(text, "MNIST layers, eager calls")[1:] == ["at least 1", "1.5", "yes"]
    assert "No GPU has been measured" not in text


def test_targets_have_columns_for_each_gpu(tmp_path: Path) -> None:
    gpu(tmp_path, pair(40.0, 80.0))
    results.write(tmp_path / "Other", ops=results.ops(pair(40.0, 44.0), [], device="Other GPU"))
    text = page(tmp_path)
    assert line(text, "line to cross")[2:] == [
        "Other GPU: measured", "Other GPU: reached", f"{results.GPU}: measured", f"{results.GPU}: reached",
    ]  # fmt: skip
    assert line(text, "bn: speed-up over the best of torch eager")[2:] == ["1.1", "**no**", "2", "yes"]


def test_summary_has_a_line_per_group(tmp_path: Path) -> None:
    rows = pair(40.0, 80.0) + pair(50.0, 45.0, direction="backward") + [results.row(us=44.0, provider="compile")]
    text = page(gpu(tmp_path, rows))
    summary = text[text.index("### Operators") :].split("**Rows we lose**")[0]
    percent = f"{100 * results.row(us=40.0)['gb_per_s'] / results.COPY:.1f}%"
    assert line(summary, "| forward |") == [
        "resnet50-256", "bf16", "nchw", "bn", "forward", "1", percent, "2.00", "1.10", "1.10",
    ]  # fmt: skip
    assert line(summary, "| backward |")[7:] == ["0.90", "-", "0.90"]
    assert "A plain copy moves 4,000 GB/s" in summary
    assert "apex (no module apex)" in summary


def test_losses_are_in_plain_sight_the_worst_first(tmp_path: Path) -> None:
    rows = pair(40.0, 80.0) + pair(50.0, 45.0, epilogue="bn+relu") + pair(90.0, 30.0, layout="channels_last")
    text = page(gpu(tmp_path, rows))
    open_part = text.split("<details>")[0]
    assert "**Rows we lose**: 2 of 3." in open_part
    lost = [row.split(" | ") for row in open_part.splitlines() if "| eager |" in row]
    assert [(row[3], row[4], row[6], row[9].strip(" |")) for row in lost] == [
        ("channels_last", "bn", "eager", "0.333"), ("nchw", "bn+relu", "eager", "0.900"),
    ]  # fmt: skip
    assert lost[0][7:9] == ["30.0 (29.4-31.5)", "90.0 (88.2-94.5)"]


def test_no_loss_and_no_peer_are_not_the_same(tmp_path: Path) -> None:
    assert "**Rows we lose**: none of 1." in page(gpu(tmp_path / "a", pair(40.0, 80.0)))
    assert "**Rows we lose**: not known" in page(gpu(tmp_path / "b", [results.row(), results.row(us=None, error="x")]))


def test_rows_without_a_time_say_why(tmp_path: Path) -> None:
    failed = results.row(us=None, provider="compile", error="out of memory:\n3 | 4 GB")
    text = page(gpu(tmp_path, [*pair(40.0, 80.0), failed]))
    assert "**Rows without a time**: 1." in text
    assert line(text, "out of memory")[6:] == ["compile", "out of memory: 3 \\| 4 GB"]


def test_tuned_rows_stand_beside_those_before(tmp_path: Path) -> None:
    tuned = [results.row(us=32.0, plan="split"), results.row(us=30.0, layout="channels_last")]
    text = page(gpu(tmp_path, pair(40.0, 80.0), tuned_ops=results.ops(tuned, [])))
    part = text[text.index("### Tuned plans") :]
    before, after = (f"{results.row(us=us)['percent_of_floor']:.1f}%" for us in (40.0, 32.0))
    assert line(part.split("<details>")[0], "resnet50-256")[5:] == ["1", before, after]
    assert line(part, "split")[6:] == ["split", "40.0 (39.2-42.0)", "32.0 (31.4-33.6)", "1.250"]


def test_eager_calls_have_a_column_per_provider(tmp_path: Path) -> None:
    text = page(gpu(tmp_path, pair(40.0, 80.0)))
    assert line(text, "bn+sigmoid", "mnist")[1:] == [
        "60x100", "fp32", "nc", "bn+sigmoid", "forward", "20.0 (19.6-21.0)", "30.0 (29.4-31.5)",
    ]  # fmt: skip


def test_what_was_not_measured_and_how_the_rest_was(tmp_path: Path) -> None:
    rows = [*pair(40.0, 80.0), results.row(us=9.0, epilogue="bn+relu", timed_by="events", cold=False)]
    content = results.ops(rows, []) | {"left_out": ["densenet fp32 bn"] * 2 + ["mnist fp32 bn"]}
    text = page(results.write(tmp_path / FOLDER, ops=content).parent)
    assert "Rows timed: 2 by graph, 1 by events. In 1 rows the cache may hold some of the inputs." in text
    assert "because the time was spent: densenet fp32 bn: 2; mnist fp32 bn: 1." in text


@pytest.mark.skipif(not launch.INTERPRETED, reason="a run on the CPU needs Triton's interpreter")
def test_what_bench_ops_writes_is_what_the_page_needs(tmp_path: Path) -> None:
    words = "--device cpu --shape 4,8,2,2 --layout nchw --dtype fp32 --epilogue bn+relu --direction forward"
    words += " --provider eager --provider tritonbn"
    assert main(["ops", *words.split(), "--out", str(tmp_path / FOLDER)]) == 0
    path = tmp_path / FOLDER / "ops.json"
    content = json.loads(path.read_text())
    assert "### Operators" not in page(tmp_path)
    content["machine"]["device"] = results.GPU
    path.write_text(json.dumps(content))
    (row,) = (row for row in content["rows"] if row["provider"] == "tritonbn")
    cells = line(page(tmp_path).partition("Every row of ours")[2], "custom", "4x8x2x2")
    assert cells[1:8] == ["4x8x2x2", "fp32", "nchw", "bn+relu", "forward", row["plan"], "eager"]


def overhead() -> results.Row:
    figure = {"low": 9.0, "median": 10.0, "high": 12.0}
    row = {"case": "batch_norm [60, 100]", "launches": 1, "us": {"torch": figure, "ours": figure}, "before": None}
    parts = {"checks": 1.25, "launch": 2.0}
    return {"machine": results.MACHINE | {"device": "CPU"}, "stubbed": True, "rows": [row | {"parts_us": parts}]}


def test_overhead(tmp_path: Path) -> None:
    text = page(results.write(tmp_path / "cpu", overhead=overhead()).parent)
    cells = ["batch_norm [60, 100]", "1", "10.0 (9.0-12.0)", "-", "-", "-", "10.0 (9.0-12.0)"]
    assert line(text, "batch_norm", "(9.0-12.0)") == cells
    assert line(text, "batch_norm", "1.2", "2.0") == ["batch_norm [60, 100]", "1.2", "2.0"]
    assert "no figure" in text


def test_machines_versions_and_commands(tmp_path: Path) -> None:
    names = ("name", "result", "seconds", "last_line", "commit")
    steps = [("tests", "exit 1", 61.2, "1 failed, 2 passed", None), ("report", "ok", 1.0, "never on the page", None)]
    files: dict[str, Any] = {"steps": {"steps": [dict(zip(names, step, strict=True)) for step in steps]}}
    files["machine"] = results.MACHINE | {"commit": "abcdef0123456-dirty"}
    text = page(gpu(tmp_path, pair(40.0, 80.0), **files))
    versions = "python 3.12.3, torch 2.11.0, triton 3.6.0, cuda 13.0"
    assert line(text, f"({FOLDER}/ops.json)")[1:] == [f"{results.GPU}, Pretend CPU, 4 threads", versions, "0123456789"]
    assert line(text, f"({FOLDER}/machine.json)")[3] == "abcdef0123-dirty"
    assert line(text, "1 failed") == ["tests", "exit 1", "1 failed, 2 passed", "unknown", "61"]
    assert "never on the page" not in text
    assert "`make gpu`" in text


def test_committed_mnist_results_keep_their_figures() -> None:
    text = (RESULTS / "README.md").read_text()
    content = json.loads((RESULTS / "cpu" / "study-mnist.json").read_text())
    mean = sum(row["test_accuracy"] for row in content["arms"] if row["arm"] == "torch") / content["settings"]["seeds"]
    (summary,) = [row for row in text.splitlines() if row.startswith("| nn.BatchNorm1d |")]
    assert f"{mean:.2f}%" in summary.split("|")[5]
    assert "python -m bench study mnist --data DIR --steps 50000 --seeds 3" in text
    assert "(cpu/study-mnist.png)" in text


def test_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        root = gpu(tmp_path / name, results.network())
        page(root)
        os.utime(root / "README.md", (0, 0))
        first = {path.name: path.read_bytes() for path in root.rglob("*.*")}
        page(root)
        assert {path.name: path.read_bytes() for path in root.rglob("*.*")} == first
        written.append(first)
    assert written[0] == written[1]
    assert sorted(written[0]) == ["README.md", "ops-ratio.png", "ops-roofline.png", "ops.json"]


def test_check_writes_nothing_and_notices_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["report", "--results", str(gpu(tmp_path, pair(40.0, 80.0))), "--check"]
    assert main(check) == 1
    assert "not up to date" in capsys.readouterr().out
    assert not (tmp_path / "README.md").exists()
    page(tmp_path)
    assert main(check) == 0
    gpu(tmp_path, pair(40.0, 81.0))
    assert main(check) == 1


def test_one_folder_alone_gets_its_own_page(tmp_path: Path) -> None:
    gpu(tmp_path, pair(40.0, 80.0))
    text = page(tmp_path / FOLDER)
    assert f"## {FOLDER}" in text
    assert "](ops.json)" in text
    assert "](ops-roofline.png)" in text


def ops_text(rows: Any) -> str:
    return json.dumps(results.ops(rows, []))


def broken(name: str, text: str, message: str, kind: str) -> Any:
    return pytest.param(name, text, message, id=kind)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        broken("ops.json", '{"machine": ', "ops.json: expected JSON, got", "cut-off"),
        broken("other.json", "nonsense", "other.json: expected JSON, got", "unknown-file"),
        broken("ops.json", "[]", "ops.json: expected an object, got list", "list"),
        broken("ops.json", '{"machine": {}, "rows": []}', "missing: wall", "no-wall"),
        broken("ops.json", ops_text(3), "rows: expected a list, got int", "rows"),
        broken("ops.json", ops_text([{"us": 1}]), "rows[0]: expected cold, count,", "row"),
        broken("ops.json", '{"machine": {}, "rows": [], "wall": []}', "machine: expected commit", "machine"),
        broken("steps.json", "{}", "missing: steps", "steps"),
        broken("steps.json", '{"steps": [{"name": "ops"}]}', "missing: commit, last_line, result, seconds", "step"),
    ],
)
def test_broken_file_is_named(
    tmp_path: Path, name: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (results.write(tmp_path / FOLDER) / name).write_text(text)
    assert main(["report", "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(tmp_path / FOLDER / name) in said
    assert not (tmp_path / "README.md").exists()


def test_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "expected folders with JSON files, got none" in capsys.readouterr().err
    assert main(["report", "--results", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: expected a folder, got nothing" in capsys.readouterr().err


def test_plots_choose_the_headline_and_leave_out_what_has_no_time() -> None:
    rows = [*pair(40.0, 80.0, dtype="fp32"), *pair(40.0, 80.0), *pair(9.0, 8.0, set="densenet")]
    rows += [results.row(us=None, provider="compile", error="x"), *pair(5.0, 6.0, direction="both")]
    shown = plots.shown(rows)  # type: ignore[arg-type]
    assert [(row["dtype"], row["set"]) for row in shown] == [("bf16", "resnet50-256")] * 2 + [("bf16", "densenet")] * 2
    compared = plots.compared(rows)  # type: ignore[arg-type]
    assert [(speedup, row["dtype"], row["direction"]) for speedup, row in compared] == [(2.0, "bf16", "forward")]


def points(figure: Figure) -> list[tuple[float, float]]:
    """What is drawn but for the line in each panel, which is its first."""
    lines = [line for axes in figure.axes for line in axes.lines[1:]]
    return [(float(x), float(y)) for line in lines for x, y in np.asarray(line.get_data()).T]


def test_plots_hold_every_point() -> None:
    rows = results.network()
    drawn = points(plots.roofline(rows, "GPU"))  # type: ignore[arg-type]
    size = 256 * 64 * 112 * 112 * 2 / 1e6
    assert max(x for x, _ in drawn) == size
    assert sorted(y for _, y in drawn) == sorted(row["percent_of_floor"] for row in rows)
    figure = plots.ratio(rows, "GPU")  # type: ignore[arg-type]
    ours = sorted(row["ratio_to_best_peer"] for row in rows if row["provider"] == "tritonbn")
    assert sorted(y for _, y in points(figure)) == ours
    for axes in figure.axes:
        assert list(np.asarray(axes.lines[0].get_ydata())) == [1, 1]
        assert axes.get_ylim()[0] < ours[0] < ours[-1] < axes.get_ylim()[1]


def test_only_layers_with_a_peer_make_a_ratio(tmp_path: Path) -> None:
    text = page(gpu(tmp_path, [results.row()]))
    assert plots.ROOFLINE in text
    assert plots.RATIO not in text
    assert not (tmp_path / FOLDER / plots.RATIO).exists()


def test_table_cells_stay_in_their_cells() -> None:
    assert markdown.table(("a", "b"), [("x|y\nz", None)]) == "| a | b |\n| --- | --: |\n| x\\|y z | - |"
    assert markdown.table(("a",), []) == ""
