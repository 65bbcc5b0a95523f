"""The run on a GPU machine: its steps, and what becomes of a failure, without a GPU."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench import gpu
from bench.__main__ import SUBJECTS, main, parse

ROOT = Path(gpu.__file__).parent.parent


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the run itself asks for one."""
    facts = {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30, "L2_cache_size": 50 << 20}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Pretend 9000")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(**facts))
    monkeypatch.setattr(gpu, "driver", lambda: "580.1")


def options(*words: str) -> argparse.Namespace:
    return parse(["gpu", *words])


def planned(*words: str) -> list[gpu.Step]:
    """The steps of `python -m bench gpu` with these options."""
    args = options(*words)
    return gpu.steps(Path("out"), args, gpu.names(args.steps, gpu.QUICK_SHARES if args.quick else gpu.SHARES))


def replace_steps(monkeypatch: pytest.MonkeyPatch, **scripts: tuple[str, float]) -> None:
    """Let the run consist of Python scripts with limits in seconds."""
    found = [gpu.Step(name, ["-c", script], limit) for name, (script, limit) in scripts.items()]  # type: ignore[arg-type]
    monkeypatch.setattr(gpu, "steps", lambda *_: found)


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
    assert [line.split()[:3] for line in table] == [
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
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["device"] == "NVIDIA Pretend 9000"
    assert facts["driver"] == "580.1"
    assert facts["l2_bytes"] == 50 << 20
    assert facts["capability"] == "9.0"


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


@pytest.mark.parametrize(
    ("words", "most", "names"),
    [
        pytest.param((), 540, "tests more-tests ops tune ops-tuned models mnist report", id="all"),
        pytest.param(("--quick",), 180, "tests ops tune ops-tuned models mnist report", id="quick"),
        pytest.param(("--steps", "ops,tests"), 540, "tests ops", id="some"),
        pytest.param(("--steps", "report"), 540, "report", id="one"),
        pytest.param(("--quick", "--steps", "ops, mnist"), 180, "ops mnist", id="quick-some"),
    ],
)
def test_limits_fit_the_time(words: tuple[str, ...], most: int, names: str) -> None:
    steps = planned(*words)
    assert [step.name for step in steps] == names.split()
    assert most - 20 < sum(step.limit for step in steps) < most
    for step in steps:
        if "--budget" in step.command:
            budget = int(step.command[step.command.index("--budget") + 1])
            assert 0 < budget < step.limit - 10


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("--steps", "ops,nonsense"), "expected some of tests, more-tests,", id="unknown"),
        pytest.param(("--steps", ""), "expected some of tests", id="none"),
        pytest.param(("--quick", "--steps", "more-tests"), "got more-tests", id="not-in-a-quick-run"),
    ],
)
def test_unknown_step_is_refused(
    tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_are_commands_that_exist(tmp_path: Path) -> None:
    args = options("--out", str(tmp_path), "--data", str(tmp_path / "data"))
    parsed = {}
    for step in gpu.steps(tmp_path, args, [*gpu.SHARES]):
        _, module, *words = step.command
        assert module in ("bench", "pytest")
        if module == "bench" and words[0] in SUBJECTS:
            parsed[step.name] = parse(words)
    assert parsed["ops"].out == tmp_path
    assert parsed["ops-tuned"].out == tmp_path / "tuned"
    assert (parsed["mnist"].out, parsed["mnist"].data) == (tmp_path, tmp_path / "data")
    assert parsed["mnist"].device == "cuda"
    assert parsed["report"].results == tmp_path
    models = parsed["models"]
    assert (models.out, models.device, models.training) == (tmp_path, "cuda", True)
    assert (models.model, models.batch, models.dtype, models.layout) == (
        ["resnet50"],
        [256],
        ["bf16"],
        ["channels_last"],
    )
    assert models.mode == ["eager", "graph", "compile"]


def test_files_of_the_gpu_come_first() -> None:
    tests, more = (gpu.files_of(name, quick=False) for name in ("tests", "more-tests"))
    quick = gpu.files_of("tests", quick=True)
    every = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")}
    assert sorted(tests + more) == sorted(every - {"tests/test_codegen.py"})
    assert tests[0] == "tests/test_determinism.py"
    assert {"tests/test_numerics.py", "tests/test_epilogue.py", "tests/test_large.py"} <= set(tests)
    assert "tests/test_bench_gpu.py" in more
    assert quick == ["tests/test_determinism.py", "tests/test_semantics.py", "tests/test_torch_suite.py"]


def test_pytest_takes_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "-n" not in gpu.pytest_options()
    (tmp_path / "test_it.py").write_text("def test_it() -> None: pass\n")
    command = [sys.executable, "-m", "pytest", *gpu.pytest_options(), str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "1 passed" in answer.stdout


def made(*words: str) -> list[str]:
    """What make would run, whichever make runs this test."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is missing")
    ours = ("MFLAGS", "ARGS", "OUT", "QUICK", "STEPS", "VENV", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if "MAKE" not in name and name not in ours}
    command = [make, "--dry-run", *words]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout.splitlines()


def test_make_gpu_takes_the_python_at_hand() -> None:
    assert [line.split() for line in made("VENV=", "PYTHON=python3", "gpu")] == [["python3", "-m", "bench", "gpu"]]


def test_make_gpu_hands_on_its_options() -> None:
    line = made("VENV=", "PYTHON=python3", "gpu", "OUT=a", "QUICK=1", "STEPS=ops,tests", "ARGS=--data X")[-1]
    assert line.split()[3:] == ["gpu", "--out", "a", "--quick", "--steps", "ops,tests", "--data", "X"]


def test_make_bench_hands_on_its_arguments() -> None:
    assert made("bench", "ARGS=--data X")[-1].endswith(" -m bench mnist --data X")
