"""The page's sections about the studies: what the commands write is what they need, and a miss is in plain sight."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench.__main__ import main
from bench.study import expected
from tests import idx_files
from tests.test_bench_report import line, page

pytestmark = pytest.mark.usefixtures("without_kernels")

STUDIES = {"mnist": "study-mnist", "covariate-shift": "study-covariate-shift"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both commands write in a few steps."""
    folder = idx_files.write(tmp_path_factory.mktemp("mnist"), idx_files.contents(train=120, test=40))
    out = tmp_path_factory.mktemp("out")
    for study in STUDIES:
        options = ["--data", str(folder), "--steps", "4", "--seeds", "1", "--device", "cpu", "--out", str(out)]
        assert main(["study", study, *options]) == 0
    return out


def changed(written: Path, root: Path, name: str, change: Any) -> str:
    """The page where one file is changed."""
    content = json.loads((written / f"{name}.json").read_text())
    change(content)
    (root / "cpu").mkdir(parents=True)
    (root / "cpu" / f"{name}.json").write_text(json.dumps(content))
    return page(root)


def test_what_the_commands_write_is_what_the_page_needs(written: Path, tmp_path: Path) -> None:
    for name in STUDIES.values():
        changed(written, tmp_path / name, name, lambda content: None)
        (tmp_path / "cpu").mkdir(exist_ok=True)
        (tmp_path / "cpu" / f"{name}.json").write_bytes((written / f"{name}.json").read_bytes())
    text = page(tmp_path)
    rows = json.loads((written / "study-mnist.json").read_text())["arms"]
    assert f"{rows[2]['test_accuracy']:.2f}%" in line(text, "| tritonbn |", "%")[4]
    assert line(text, "growth: largest")[3] == f"{rows[2]['drift']['growth']:.2f}"
    assert "Not compared: the values expected are for MNIST" in text
    assert "more stable, not constant" in text
    (figure,) = (
        figure
        for figure in json.loads((written / "study-covariate-shift.json").read_text())["figures"]
        if figure["name"] == "effective beta-smoothness"
    )
    cells = line(text, "effective beta-smoothness")
    assert cells[2:] == [f"{figure['without'][0]:.3g}", f"{figure['with_bn'][0]:.3g}", figure["verdict"]]
    assert "Smoothness of the loss (Santurkar et al. 2018):" in text
    for study, name in STUDIES.items():
        assert f"`python -m bench study {study} --data DIR --steps 4 --seeds 1`" in text
        assert f"(cpu/{name}.png)" in text
        assert line(text, f"(cpu/{name}.json)")


def test_what_lies_outside_is_in_plain_sight(written: Path, tmp_path: Path) -> None:
    def miss(content: Any) -> None:
        finding = expected.Finding("accuracy at 1,000", "%", "torch", [91.0, 92.5], 89.5, 92)
        content["expected"] = {"not_applicable": None, "findings": [finding.content]}
        content["check"][0]["passed"] = False

    text = changed(written, tmp_path, "study-mnist", miss)
    cells = ["accuracy at 1,000", "nn.BatchNorm1d", "91.75 (91.00-92.50)", "89.50-92.00 %", "NO"]
    assert line(text, "accuracy at 1,000") == cells
    assert "**Outside what was expected: 1 of 1.**" in text
    assert "**tritonbn does not follow nn.BatchNorm1d: relative loss difference, first 4 steps.**" in text
    assert "Not compared" not in text


def test_what_is_no_number_is_said(written: Path, tmp_path: Path) -> None:
    def broken(content: Any) -> None:
        content["figures"][0]["with_bn"] = [None]

    text = changed(written, tmp_path / "a", "study-covariate-shift", broken)
    assert line(text, "shift, first hidden layer")[3:] == ["nan", "not finite"]

    def none(content: Any) -> None:
        content["arms"][0]["drift"]["shift"] = None

    assert line(changed(written, tmp_path / "b", "study-mnist", none), "shift: range")[1] == "nan"


@pytest.mark.parametrize("name", STUDIES.values())
def test_broken_file_is_named(written: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu" / f"{name}.json"
    path.parent.mkdir()
    content = json.loads((written / f"{name}.json").read_text())
    del content["notes"]
    path.write_text(json.dumps(content))
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert f"{path}: expected" in capsys.readouterr().err
