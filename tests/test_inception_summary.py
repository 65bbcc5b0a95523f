"""What the Inception study makes of its runs, here of curves made by hand."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

import numpy as np

from bench.study import inception_pictures, inception_tables
from bench.study.inception_runs import Inference, Point, Row
from bench.study.inception_summary import Line, Summary, summarize, wrong_folds

CLASSES = 10


def run(arm: str, seed: int, accuracies: list[float], ms: float = 10.0, **other: Any) -> Row:
    """Evaluated each 100 steps, which take `ms` each."""
    curve = [
        Point(step=100 * i, seconds=i * ms / 10, accuracy=accuracy, top5=None, loss=1.0)
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    made: Any = {
        "arm": arm, "norm": "tritonbn" if arm.startswith("BN") else None, "seed": seed, "steps": 100 * len(curve),
        "seconds": len(curve) * ms / 10, "ms_per_step": [ms, ms + 2], "diverged_at": None, "curve": curve,
        "inference": None,
    }  # fmt: skip
    row: Row = made | other
    return row


INCEPTION = [run("Inception", 0, [20, 50, 60, 58]), run("Inception", 1, [20, 30, 40, 64])]  # target 62


def line(summary: Summary, arm: str, norm: str | None = None) -> Line:
    (found,) = [one for one in summary["lines"] if one["arm"] == arm and norm in (None, one["norm"])]
    return found


def test_target_is_the_mean_of_inceptions_own_bests() -> None:
    summary = summarize(INCEPTION, CLASSES)
    assert summary["target"] == 62.0
    base = line(summary, "Inception")
    assert base["best"] == [60, 64]
    assert base["best_step"] == base["steps_to_target"] == [300, 400], "each seed arrives at its own best"
    assert base["seconds_to_target"] == [3, 4]
    assert base["fewer_steps"] == base["fewer_seconds"] == 1
    assert base["agrees"] == "yes"


def test_steps_and_seconds_to_the_target() -> None:
    runs = [*INCEPTION, run("BN-x5", 0, [61.9, 62, 50, 70], ms=20), run("BN-x5", 1, [62.1, 0, 0, 0], ms=20)]
    summary = summarize(runs, CLASSES)
    ours = line(summary, "BN-x5")
    assert [cells[-1] for cells in inception_tables.paper_lines(summary)] == ["yes", "yes: 2.33x"]
    assert ours["steps_to_target"] == [200, 100], "the first time, also where it falls again"
    assert ours["seconds_to_target"] == [4, 2]
    assert ours["fewer_steps"] == pytest.approx(350 / 150)
    assert ours["fewer_seconds"] == pytest.approx(3.5 / 3)
    assert ours["ms_per_step"] == [20, 21, 22]
    assert (ours["best"], ours["best_step"], ours["agrees"]) == ([70, 62.1], [400, 100], "yes")


def test_never_is_no_number() -> None:
    summary = summarize([*INCEPTION, run("BN-x5", 0, [10, 90]), run("BN-x5", 1, [10, 61])], CLASSES)
    ours = line(summary, "BN-x5")
    assert ours["steps_to_target"] == [200, None]
    assert ours["fewer_steps"] is ours["fewer_seconds"] is None
    assert ours["agrees"] == "never arrives in 1 of 2 runs"
    cells = dict(zip(inception_tables.columns(summary), list(inception_tables.lines(summary, " "))[1], strict=True))
    assert cells["steps\nto target"] == "never in 1 of 2"
    assert cells["seconds\nto target"] == cells["fewer\nsteps"] == "-"
    assert cells["best\naccuracy"] == "75.50% (61.00-90.00)"
    alone = summarize([*INCEPTION, run("BN-x5", 0, [10, 61])], CLASSES)
    assert next(reversed(list(inception_tables.lines(alone, " "))))[1] == "never"


def test_without_inception_there_is_no_target() -> None:
    summary = summarize([run("BN-x5", 0, [10, 90])], CLASSES)
    assert summary["target"] is None
    ours = line(summary, "BN-x5")
    assert [ours["steps_to_target"], ours["fewer_steps"], ours["agrees"]] == [None, None, None]
    assert "Inception was not run" in inception_tables.target(summary)
    assert next(inception_tables.lines(summary, " "))[1] == "-"


def test_divergence_is_no_result() -> None:
    broken = run("Inception", 2, [99], diverged_at=150)
    summary = summarize([*INCEPTION, broken, run("Inception-x5", 0, [], diverged_at=7)], CLASSES)
    assert summary["target"] == 62.0, "of the seeds that did not diverge"
    base = line(summary, "Inception")
    assert base["agrees"] == "diverges in 1 of 3 runs"
    assert (base["steps_to_target"], base["seconds_to_target"]) == ([300, 400, None], [3, 4, None])
    quick = summarize([*INCEPTION, broken, run("BN-x5", 0, [62])], CLASSES)
    assert line(quick, "BN-x5")["fewer_steps"] == 3.5
    five = line(summary, "Inception-x5")
    assert five["agrees"] == "yes"
    assert list(inception_tables.lines(summary, " "))[1][1] == "diverged at 7"
    assert summarize([broken], CLASSES)["target"] is None


@pytest.mark.parametrize(
    ("arm", "accuracies", "expected"),
    [
        ("BN-Baseline", [70.0], "yes"),
        ("BN-Baseline", [1, 1, 1, 1, 70.0], "not fewer steps"),
        ("BN-x5", [1, 70.0], "fewer steps, not the fewest"),
        ("BN-x30", [70.0], "fewer steps, not the best"),
        ("BN-x30", [80.0], "yes"),
        ("BN-x5-Sigmoid", [61.0], "yes"),
        ("BN-x5-Sigmoid", [15.0], "does not train"),
        ("BN-x5-Sigmoid", [63.0], "arrives"),
        ("Inception-x5", [63.0], "does not diverge"),
        ("Inception-Sigmoid", [11.0], "yes"),
        ("Inception-Sigmoid", [40.0], "trains"),
    ],
)
def test_what_agrees_with_the_paper(arm: str, accuracies: list[float], expected: str) -> None:
    rival = run("BN-x5" if arm != "BN-x5" else "BN-Baseline", 0, [75.0])
    summary = summarize([*INCEPTION, rival, run(arm, 0, accuracies)], CLASSES)
    assert line(summary, arm)["agrees"] == expected
    factor = line(summary, arm)["fewer_steps"]
    told = expected if factor is None else f"{expected}: {factor:.2f}x"
    assert [arm, line(summary, arm)["paper"], told] == [
        cell.split(",")[0] if index == 0 else cell
        for index, cell in enumerate(list(inception_tables.paper_lines(summary))[2])
    ]


@pytest.mark.parametrize(
    ("theirs", "agree"),
    [([[1, 70.0], [70.0]], True), ([[1, 1, 70.0], [1, 1, 70.0]], False), ([[1, 1], [1, 1]], False)],
    ids=["within", "apart", "never"],
)
def test_batch_norms_agree_within_the_range_of_seeds(theirs: list[list[float]], agree: bool) -> None:
    ours = [run("BN-x5", seed, [1, 70.0]) for seed in (0, 1)]
    others = [run("BN-x5", seed, accuracies, norm="torch") for seed, accuracies in enumerate(theirs)]
    summary = summarize([*INCEPTION, *ours, *others], CLASSES)
    assert summary["norms_agree"] == {"BN-x5": agree}
    assert ("apart" in inception_tables.norms_text(summary)) is not agree
    assert line(summary, "BN-x5", "torch")["steps_to_target"] != []
    assert inception_tables.norms_text(summarize(INCEPTION, CLASSES)) == ""


def test_batch_norms_that_never_arrive_agree_in_nothing() -> None:
    runs = [run("BN-x5-Sigmoid", 0, [1, 2], norm=norm) for norm in ("torch", "tritonbn")]
    summary = summarize([*INCEPTION, *runs], CLASSES)
    assert summary["norms_agree"] == {}
    assert inception_tables.norms_text(summary) == ""


def test_folding_that_changes_answers_is_named() -> None:
    good, bad = (
        Inference(moving=50, population=50, folded=50, same_answers=share, batches=3) for share in (99.0, 98.9)
    )
    runs = [run("BN-x5", 0, [50], inference=good), run("BN-x30", 1, [50], inference=bad)]
    assert wrong_folds(runs) == ["BN-x30, tritonbn, seed 1: 98.9%"]


def test_top5_has_a_column_where_there_are_more_classes() -> None:
    rows = [run("Inception", 0, [20.0, 30.0])]
    for point, top5 in zip(rows[0]["curve"], (44.0, 43.0), strict=True):
        point["top5"] = top5
    summary = summarize(rows, 100)
    assert inception_tables.columns(summary)[-2] == inception_tables.TOP5
    assert next(inception_tables.lines(summary, " "))[-2] == "44.00%"


def test_picture_holds_the_mean_curves_the_target_and_the_marks(tmp_path: Path) -> None:
    rows = [*INCEPTION, run("BN-x5", 0, [50, 80], ms=20), run("BN-x5", 1, [30, 90], ms=40)]
    summary = summarize(rows, CLASSES)
    over_steps, over_seconds = inception_pictures.drawn(rows, summary, "title").axes
    steps = [np.asarray(one.get_data()) for one in over_steps.lines]
    np.testing.assert_allclose(steps[0], [[100, 200, 300, 400], [20, 40, 50, 61]])
    np.testing.assert_allclose(steps[2], [[100, 200], [40, 85]])
    np.testing.assert_allclose(steps[3], [[200], [85]])
    assert list(np.asarray(steps[4])[1]) == [62, 62]
    np.testing.assert_allclose(np.asarray(over_seconds.lines[2].get_data()), [[3, 6], [40, 85]])
    assert len(over_steps.collections) == 2, "bands"
    inception_pictures.figure_2(rows, summary, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_runs_that_all_diverged_at_once(tmp_path: Path) -> None:
    rows = [run("Inception", 0, [], diverged_at=1)]
    inception_pictures.figure_2(rows, summarize(rows, CLASSES), "title", tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
