"""The run on a GPU machine: its steps, and what becomes of a failure, without a GPU."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import triton

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench import gpu, scale
from bench.__main__ import SUBJECTS, main, parse
from bench.measure import commit
from bench.page import targets
from bench.page.folders import RESULTS
from tests import results

ROOT = Path(gpu.__file__).parent.parent


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the run itself asks for one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Pretend 9000")


def options(*words: str) -> argparse.Namespace:
    return parse(["gpu", *words])


def commands(*words: str, seconds: int = 100) -> dict[str, list[str]]:
    """Of `python -m bench gpu` with these options, by step."""
    args = options(*words)
    chosen = gpu.names(args.steps, gpu.scale_of(args))
    return {name: gpu.command(name, seconds, Path("out"), args, gpu.scale_of(args)) for name in chosen}


def replace_steps(monkeypatch: pytest.MonkeyPatch, **scripts: tuple[str, int]) -> None:
    """Let the run consist of Python scripts with limits in seconds."""
    monkeypatch.setattr(gpu, "FULL", scale.FULL._replace(shares=dict.fromkeys(scripts, 1)))
    monkeypatch.setattr(gpu, "command", lambda name, *_: ["-c", scripts[name][0]])
    monkeypatch.setattr(gpu, "limit", lambda _, todo, left: scripts[todo[0]][1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "error: no GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("pretend")
def test_a_failing_step_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_steps(
        monkeypatch,
        fails=("print('why'); raise SystemExit(3)", 60),
        hangs=("import time; print('on it'); time.sleep(60)", 2),
        works=(f"print('done: {tmp_path / 'a'} {ROOT / 'b'}')", 60),
    )
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    table = capsys.readouterr().out.split("last line")[1].splitlines()[1:]
    assert [line.split()[:3] for line in table[:3]] == [
        ["fails", "exit", "3"],
        ["hangs", "over", "2"],
        ["works", "ok", "0"],
    ]
    assert (tmp_path / "works.log").read_text().startswith(f"done: {tmp_path}")
    steps = {step["name"]: step for step in json.loads((tmp_path / "steps.json").read_text())["steps"]}
    assert [(step["result"], step["last_line"]) for step in steps.values()][::2] == [
        ("exit 3", "why"),
        ("ok", "done: a b"),
    ]
    assert 1 <= steps["hangs"]["seconds"] < 30
    here = {"gpu": "NVIDIA Pretend 9000", "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    assert all(step.items() >= here.items() for step in steps.values())


@pytest.mark.usefixtures("pretend")
def test_results_are_written_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = "import json; print([step['name'] for step in json.load(open({!r}))['steps']])"
    replace_steps(monkeypatch, first=("", 60), second=(look.format(str(tmp_path / "steps.json")), 60))
    assert main(["gpu", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "second.log").read_text() == "['first']\n"


@pytest.mark.usefixtures("pretend")
def test_steps_of_earlier_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for script in ("print(1)", "print(2)"):
        replace_steps(monkeypatch, tests=(script, 60))
        assert main(["gpu", "--out", str(tmp_path)]) == 0
    replace_steps(monkeypatch, ops=("print(3)", 60))
    assert main(["gpu", "--out", str(tmp_path)]) == 0
    steps = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert [(step["name"], step["last_line"]) for step in steps] == [("tests", "2"), ("ops", "3")]


@pytest.mark.usefixtures("pretend")
def test_results_of_another_gpu_are_not_mixed_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "ops", "result": "ok", "seconds": 1.0, "last_line": "", "commit": None, "gpu": "pretended GPU"}
    (tmp_path / "steps.json").write_text(json.dumps({"steps": [row]}))
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    expected = "steps.json: expected results of NVIDIA Pretend 9000, got those of pretended GPU; choose another OUT"
    assert expected in capsys.readouterr().err
    assert main(["gpu", "--dry-run", "--steps", "environment", "--out", str(tmp_path / "new")]) == 0
    assert main(["gpu", "--out", str(tmp_path / "new")]) == 2


@pytest.mark.usefixtures("pretend")
def test_tuned_plans_are_measured_only_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And those of an earlier run are none of this one's."""
    table = tmp_path / "plans" / "gpu.json"
    look = f"import os; print(os.listdir({str(table.parent)!r}))"
    replace_steps(monkeypatch, **{"ops-tuned": (look, 60)})
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    assert "not run" in capsys.readouterr().out
    table.parent.mkdir()
    table.touch()
    assert main(["gpu", "--out", str(tmp_path)]) == 0
    assert "['gpu.json']" in capsys.readouterr().out
    gone = f"from pathlib import Path; assert not Path({str(table)!r}).exists()"
    replace_steps(monkeypatch, tune=(gone, 60), **{"ops-tuned": (look, 60)})
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    steps = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert {step["name"]: step["result"] for step in steps} == {"ops-tuned": "not run", "tune": "ok"}


@pytest.mark.usefixtures("pretend")
def test_summary_says_what_is_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results.write(tmp_path, ops=results.ops(results.network(), results.wall()))
    replace_steps(monkeypatch, models=("", 60))
    assert main(["gpu", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert f"ops.json is of an earlier run, commit {results.VERSIONS['commit']}" in output
    assert "incomplete" in output, "not all layers of ResNet-50 are in it"


def test_plans_are_the_models_until_this_run_has_tuned(tmp_path: Path) -> None:
    args, facts = options(), {"commit": "abc"}
    folders = {name: gpu.variables(name, tmp_path, args, facts)["TRITONBN_CACHE_DIR"] for name in scale.FULL.shares}
    tuned = [name for name, folder in folders.items() if folder == str(tmp_path / "plans")]
    assert tuned == ["ops-tuned", "models", "models-mnist", "mnist"]
    assert gpu.variables("ops", tmp_path, args, facts)["TRITONBN_COMMIT"] == "abc"
    assert "CUDA_VISIBLE_DEVICES" not in gpu.variables("ops", tmp_path, args, facts)
    assert gpu.variables("tests", tmp_path, options("--dry-run"), facts)["CUDA_VISIBLE_DEVICES"] == ""


def run_for(script: str, log: Path, limit: float) -> int | None:
    with log.open("w") as output:
        return gpu.finished([sys.executable, "-c", script], output, limit)


def test_who_is_interrupted_may_say_so(tmp_path: Path) -> None:
    script = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as after `nohup make gpu &`
    try:
        with gpu.terminable():
            assert run_for(script, tmp_path / "log", 8) is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "log").read_text() == "so far\n"


CHILD = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
PARENT = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", {CHILD!r}]).pid)
"""


@pytest.mark.parametrize(
    ("rest", "code"), [pytest.param("time.sleep(60)", None, id="killed"), pytest.param("", 0, id="ended")]
)
def test_no_child_is_left(tmp_path: Path, rest: str, code: int | None) -> None:
    assert run_for(PARENT + rest, tmp_path / "log", 8) == code
    assert ended(int((tmp_path / "log").read_text()))


def ended(process: int) -> bool:
    """Is the process gone within a few seconds? A zombie is: nobody may be there to collect it."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_terminated_run_leaves_nothing(tmp_path: Path) -> None:
    script = f"from bench import gpu\nwith gpu.terminable(), open({str(tmp_path / 'log')!r}, 'w') as output:\n"
    script += f"    gpu.finished([{sys.executable!r}, '-c', {PARENT + 'time.sleep(60)'!r}], output, 60)"
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    for _ in range(300):
        if (tmp_path / "log").exists() and (tmp_path / "log").read_text():
            break
        time.sleep(0.1)
    run.terminate()
    assert run.wait(30) != 0
    assert ended(int((tmp_path / "log").read_text()))


def test_interpreter_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run_for("import os; print('TRITON_INTERPRET' in os.environ)", tmp_path / "log", 30) == 0
    assert (tmp_path / "log").read_text() == "False\n"


ALL = "environment bandwidth tests more-tests calibrate ops tune ops-tuned models models-mnist mnist report"
QUICK = "environment bandwidth tests calibrate ops models mnist report"


def limits(*words: str) -> dict[str, int]:
    """Of a run whose every step needs all of its time."""
    args = options(*words)
    of = gpu.scale_of(args)
    todo, left, found = gpu.names(args.steps, of), float(of.total), {}
    for index, name in enumerate(todo):
        found[name] = gpu.limit(of, todo[index:], left)
        left -= found[name]
    return found


@pytest.mark.parametrize(
    ("words", "most", "names"),
    [
        pytest.param((), 540, ALL, id="all"),
        pytest.param(("--quick",), 180, QUICK, id="quick"),
        pytest.param(("--steps", "ops,tests"), 540, "tests ops", id="some-in-their-order"),
        pytest.param(("--steps", "report"), 540, "report", id="one"),
        pytest.param(("--quick", "--steps", "ops, mnist"), 180, "ops mnist", id="quick-some"),
        pytest.param(("--dry-run",), 610, ALL.replace(" more-tests", ""), id="dry"),
    ],
)
def test_limits_fit_the_time(words: tuple[str, ...], most: int, names: str) -> None:
    found = limits(*words)
    assert [*found] == names.split()
    assert most - 25 < sum(found.values()) < most


@pytest.mark.parametrize("words", [(), ("--quick",)], ids=["full", "quick"])
def test_every_step_has_time_to_start_and_to_finish(words: tuple[str, ...]) -> None:
    """Even where no step leaves time for others: imports take some seconds, and who is interrupted has a few less."""
    args = options(*words)
    for name, seconds in limits(*words).items():
        assert seconds >= (8 if name == "report" else 18), name
        words_of_step = gpu.command(name, seconds, Path("out"), args, gpu.scale_of(args))
        if "--budget" in words_of_step:
            budget = int(words_of_step[words_of_step.index("--budget") + 1])
            assert 1 <= budget <= seconds - gpu.GRACE - gpu.START - 0.1 * (seconds - gpu.GRACE), name


def test_time_that_a_step_does_not_need_is_for_those_that_follow() -> None:
    of = scale.FULL._replace(shares={"a": 1, "b": 1, "c": 2})
    assert gpu.limit(of, ["a", "b", "c"], 200) == 50
    assert gpu.limit(of, ["b", "c"], 200) == 66
    assert gpu.limit(of, ["c"], 98) == 98
    assert gpu.limit(of, ["a", "b", "c"], 30) == gpu.LEAST, "short ones get more than their share"
    assert gpu.limit(of, ["b", "c"], 12) == 12, "but no more than there is"
    assert gpu.limit(of, ["c"], -3) == 1, "who comes too late may say so"


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ("--steps", "ops,nonsense"), "expected some of environment, bandwidth, tests, more-tests,", id="unknown"
        ),
        pytest.param(("--steps", ""), "expected some of environment", id="none"),
        pytest.param(("--quick", "--steps", "more-tests"), "got more-tests", id="not-in-a-quick-run"),
    ],
)
def test_unknown_step_is_refused(
    tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [(), ("--quick",), ("--dry-run",)], ids=["full", "quick", "dry"])
def test_steps_are_commands_that_exist(words: tuple[str, ...]) -> None:
    found = commands(*words, "--out", "out", "--data", "data")
    parsed = {}
    for name, (_, module, *rest) in found.items():
        assert module in ("bench", "bench.pretend", "pytest")
        if module != "pytest":
            assert rest[0] in SUBJECTS
            assert (module == "bench.pretend") == (words == ("--dry-run",) and name != "report")
            parsed[name] = parse(rest)
    out = Path("out")
    for name in ("environment", "bandwidth", "calibrate", "ops", "models", "mnist"):
        assert parsed[name].out == out
    for name in ("environment", "bandwidth", "calibrate", "models", "mnist"):
        assert parsed[name].device == "cuda"
    assert parsed["mnist"].data == Path("data").resolve()
    assert parsed["report"].results == out
    if "--quick" not in words:
        assert (parsed["ops-tuned"].out, parsed["ops-tuned"].provider) == (out / "tuned", ["tritonbn"])
        assert (parsed["tune"].out, parsed["tune"].results, parsed["tune"].again) == (out / "plans", out, True)
        assert (parsed["models-mnist"].out, parsed["models-mnist"].device) == (out / "mnist", "cuda")


@pytest.mark.parametrize(("words", "modes"), [((), "eager graph compile"), (("--quick",), "eager")])
def test_what_is_measured_is_what_the_targets_are_of(words: tuple[str, ...], modes: str) -> None:
    parsed = {name: parse(rest) for name, (_, module, *rest) in commands(*words).items() if module == "bench"}
    ops, resnet = parsed["ops"], parsed["models"]
    assert (ops.set, ops.dtype, ops.provider) == (["resnet50-256", "mnist"], ["bf16"], None)
    assert resnet.mode == modes.split()
    whole = {"models": targets.RESNET50, "models-mnist": targets.MNIST}
    for step in whole.keys() & parsed.keys():
        assert parsed[step].training
        for name in ("model", "batch", "dtype"):
            assert getattr(parsed[step], name) == [whole[step][name]]
    assert resnet.layout == [targets.RESNET50["layout"]]


def test_results_go_where_the_page_looks_for_them() -> None:
    assert commands()["report"][-1] == str(RESULTS)
    assert commands("--out", "out")["report"][-1] == "out"


def test_files_of_the_gpu_come_first() -> None:
    tests, more = (gpu.files_of(name, None) for name in ("tests", "more-tests"))
    quick = gpu.files_of("tests", scale.QUICK.tests)
    every = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")}
    assert sorted(tests + more) == sorted(every - {"tests/test_codegen.py"})
    assert tests[0] == "tests/test_determinism.py"
    assert {"tests/test_numerics.py", "tests/test_epilogue.py", "tests/test_large.py"} <= set(tests)
    assert "tests/test_bench_gpu.py" in more
    assert "tests/test_semantics.py" in quick
    assert set(quick) < set(tests)


NUMBERED = """
import time
import pytest

@pytest.mark.parametrize("number", range(5))
def test_it(number: int) -> None:
    time.sleep(PAUSE)
"""


def run_numbered(folder: Path, pause: float, *words: str) -> str:
    """The output of two files of five tests each, one process, as the step runs them."""
    for name in ("a", "b"):
        (folder / f"test_{name}.py").write_text(NUMBERED.replace("PAUSE", str(pause)))
    command = [
        sys.executable,
        "-m",
        "pytest",
        *gpu.pytest_options(True),
        *words,
        *map(str, sorted(folder.glob("*.py"))),
    ]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, check=False).stdout


def test_pytest_takes_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "-n" not in gpu.pytest_options(False)
    assert "10 passed" in run_numbered(tmp_path, 0)


def test_rounds_take_some_tests_of_every_file_first(tmp_path: Path) -> None:
    output = run_numbered(tmp_path, 0, "--rounds", "2", "-vv")
    order = re.findall(r"test_([ab]).py::test_it\[(\d)\] PASSED", output)
    assert " ".join(map("".join, order)) == "a0 a2 a4 b0 b2 b4 a1 a3 b1 b3"


def test_what_the_time_does_not_suffice_for_is_skipped_and_counted(tmp_path: Path) -> None:
    output = run_numbered(tmp_path, 4.0, "--budget", "10", "-rs")
    found = re.search(r"(\d+) passed, (\d+) skipped", output)
    assert found is not None, output
    passed, skipped = map(int, found.groups())
    assert passed + skipped == 10
    assert 1 <= passed <= 3
    assert f"SKIPPED [{skipped}]" in output
    assert "the budget was spent" in output


def made(*words: str) -> list[str]:
    """What make would run, whichever make runs this test."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is missing")
    ours = ("MFLAGS", "ARGS", "OUT", "QUICK", "DRY", "STEPS", "VENV", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if "MAKE" not in name and name not in ours}
    command = [make, "--dry-run", *words]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "python"),
    [
        pytest.param(("VENV=", "PYTHON=py"), "py", id="no-venv"),
        pytest.param(("VENV={folder}/none", "PYTHON=py"), "py", id="venv-not-made"),
        pytest.param(("VENV={folder}/made", "PYTHON=py"), "{folder}/made/bin/python", id="venv-made"),
    ],
)
def test_make_gpu_takes_the_python_at_hand_and_installs_nothing(
    words: tuple[str, ...], python: str, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "ready").touch()
    found = made(*(word.format(folder=tmp_path) for word in words), "gpu")
    assert [line.split() for line in found] == [[python.format(folder=tmp_path), "-m", "bench", "gpu"]]


def test_make_gpu_hands_on_its_options() -> None:
    line = made("VENV=", "PYTHON=python3", "gpu", "OUT=a", "QUICK=1", "STEPS=ops,tests", "ARGS=--data X")[-1]
    assert line.split()[3:] == ["gpu", "--out", "a", "--quick", "--steps", "ops,tests", "--data", "X"]
    assert made("gpu", "DRY=1")[-1].split()[-2:] == ["gpu", "--dry-run"]


def test_make_bench_hands_on_its_arguments() -> None:
    assert made("bench", "ARGS=--data X")[-1].endswith(" -m bench mnist --data X")
