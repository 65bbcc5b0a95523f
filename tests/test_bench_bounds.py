"""`python -m bench bandwidth` and `environment`: what bounds every plan, and the machine that it was measured on."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench import bandwidth, environment, measure
from bench.__main__ import main
from bench.bandwidth import Bench
from tests import results
from tritonbn import launch, probes
from tritonbn.device import Constants

ASSUMED = Constants(1e12)
ROOT = Path(__file__).resolve().parent.parent
kernels = pytest.mark.skipif(
    not (launch.INTERPRETED or torch.cuda.is_available()), reason="the kernels need a GPU or TRITON_INTERPRET=1"
)


def row(what: str, size: int, us: float | None) -> bandwidth.Row:
    return {"what": what, "bytes": size, "us": us, "us_low": us, "us_high": us, "timed_by": "graph", "error": None}


def test_what_a_second_pass_finds_follows_from_three_times() -> None:
    """One pass takes 10 us, half of it to read. After a reading of 5 us: nothing found, a half, all."""
    rows = [row("one pass", 100, 10.0), row("read", 100, 5.0)]
    for both, part in ((15.0, 0.0), (12.5, 0.5), (10.0, 1.0)):
        assert parts([*rows, row("read, then pass", 100, both)]) == {100: pytest.approx(part)}
    assert not parts([*rows[:1], row("read, then pass", 100, 12.0)])
    assert not parts([*rows, row("read, then pass", 100, None)])


def parts(rows: list[bandwidth.Row]) -> dict[int, float]:
    return dict(probes.second_readings(bandwidth.times_of(rows), "read, then pass"))


def test_constants_of_the_model_stand_beside_what_was_measured() -> None:
    bench = Bench(torch.device("cpu"), 3, l2_bytes=400, sms=4, unit=1)
    rows = [row("copy in L2", 1000, 0.2), row("copy in L2", 2000, 0.8), row("launch", 4, 2.5)]
    rows += [row("0 barriers of 8", 4, 3.0), row("64 barriers of 8", 4, 131.0), row("64 barriers of 4", 4, 99.0)]
    for size, both in ((100, 1.0), (400, 6.0), (1000, 14.5)):
        rows += [row("one pass", size, size / 100), row("read", size, size / 200)]
        rows += [row("read, then pass in reverse", size, both)]
    found = bandwidth.constants(rows, 2.0, bench)
    assert found["copy, GB/s"]["measured"] == 2.0
    assert found["copy in L2 / copy"] == {"assumed": ASSUMED.l2_speed, "measured": pytest.approx(5.0)}
    assert found["launch in a graph, us"] == {"assumed": pytest.approx(1e6 * ASSUMED.launch), "measured": 2.5}
    assert found["barrier, us"] == {"assumed": pytest.approx(1e6 * ASSUMED.barrier), "measured": 2.0}
    # Of 100 bytes all were served, of 400 none: a quarter of the cache. 1000 are too many, and a tenth of them noise.
    assert found["part of L2 that a second pass finds, reverse"]["measured"] == pytest.approx(0.25)
    assert found["part of L2 that a second pass finds, forward"]["measured"] is None


def test_what_was_not_measured_is_not_known() -> None:
    bench = Bench(torch.device("cpu"), 3, 400, 4, 1)
    assert {each["measured"] for each in bandwidth.constants([row("launch", 4, None)], 2.0, bench).values()} == {
        2,
        None,
    }


@kernels
def test_probes_do_what_they_are_timed_for(device: torch.device) -> None:
    """A tail that is no whole tile, and as many tiles as take turns in both orders."""
    p = probes.pair(4 * (3 * probes.BLOCK + 5), device)
    tiles = torch.nn.functional.pad(p.x, (0, 4 * probes.BLOCK - p.x.numel())).view(4, -1)
    probes.read(p)
    torch.testing.assert_close(p.sums.double(), tiles.double().sum(1), rtol=1e-4, atol=1e-3)
    for reverse in (False, True):
        p.y.fill_(torch.nan)
        p.sums.fill_(torch.nan)
        probes.again(reverse)(p)
        assert torch.equal(p.y, -p.x)
        assert p.sums.isfinite().all()
    probes.empty(p)
    programs = 1 if device.type == "cpu" else 8
    for rounds in (3, 4):
        probes.waiting(programs, rounds)(p)
        assert p.zero.item() % (1 << 30) == 0, "nothing is left of those who came"


@kernels
@pytest.mark.parametrize("quick", [False, True])
def test_all_is_measured_and_written(
    quick: bool, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"COPIES": (1, 2), "IN_CACHE": (1,), "READ_TWICE": (1, 2)}.items():
        monkeypatch.setattr(bandwidth, name, value)
    assert main(["bandwidth", "--device", device.type, "--out", str(tmp_path), *["--quick"] * quick]) == 0
    content = json.loads((tmp_path / "bandwidth.json").read_text())
    count = Counter(row["what"] for row in content["rows"] if "barriers" not in row["what"])
    passes = dict.fromkeys(("one pass", "read", "read, then pass", "read, then pass in reverse"), 2)
    assert count == {"copy": 2, "copy in L2": 1, "launch": 1} | ({} if quick else passes)
    barriers = [row["what"].split(" barriers of ") for row in content["rows"] if "barriers" in row["what"]]
    assert [rounds for rounds, _ in barriers] == ["0", str(probes.ROUNDS)] * (1 if device.type == "cpu" else 2)
    assert all(0 < row["us_low"] <= row["us"] <= row["us_high"] for row in content["rows"])
    here = measure.stamp(measure.machine(device))
    assert all(row.items() >= here.items() for row in content["rows"])
    assert content["constants"]["copy, GB/s"]["measured"] == pytest.approx(content["machine"]["copy_gb_per_s"])


def test_without_kernels_it_copies_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert main(["bandwidth", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "only copies by torch" in capsys.readouterr().out
    rows = json.loads((tmp_path / "bandwidth.json").read_text())["rows"]
    assert {row["what"] for row in rows} == {"copy"}
    assert [row["bytes"] for row in rows] == sorted({row["bytes"] for row in rows})


def test_what_fails_is_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(probes, "torchs_copy", refuse)
    assert main(["bandwidth", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "bandwidth.json").read_text())["rows"]
    assert {(row["us"], row["error"]) for row in rows} == {(None, "RuntimeError: no launch")}


COMPILED = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench import machine_code
from tritonbn import probes
from tritonbn.kernels import probes as kernels
found = {}
for name, fixed in (
    ("read_kernel", {"BLOCK": probes.BLOCK}), ("copy_kernel", {"BLOCK": probes.BLOCK, "REVERSE": False}),
    ("copy_kernel", {"BLOCK": probes.BLOCK, "REVERSE": True}), ("empty_kernel", {}), ("barrier_kernel", {}),
):
    kernel = getattr(kernels, name)
    kinds = {"semaphore_ptr": "*i32", "n": "i32", "rounds": "i32"}
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "*fp32") for n in kernel.arg_names}
    at = kernel.arg_names.index
    whole = [n for n, kind in signature.items() if kind.startswith("*")] + ["n"] * ("n" in signature)
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(at(n),): v for n, v in fixed.items()},
        attrs={(at(n),): [["tt.divisibility", 16]] for n in whole},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": probes.WARPS})
    usage, sass = machine_code.disassemble(compiled.asm["cubin"])
    found[f"{name} {fixed.get('REVERSE', '')}".strip()] = [
        machine_code.read_nvidia(usage, sass)["spills"], sass.count("LDG.E.128"), sass.count("LDG"),
        sass.count("STG.E.128"), sass.count("STG"),
    ]
print(json.dumps(found))
"""


def test_probes_compile_to_wide_accesses() -> None:
    """For sm_90, without a GPU: spills, 128-bit loads of all loads, 128-bit stores of all stores."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    per_thread = probes.BLOCK // (32 * probes.WARPS) // 4
    assert found["read_kernel"] == [0, per_thread, per_thread, 0, 1]
    assert found["copy_kernel False"] == found["copy_kernel True"] == [0, *4 * [per_thread]]
    assert found["empty_kernel"] == [0, 0, 0, 0, 0]
    assert found["barrier_kernel"][0] == 0


def test_page_shows_assumptions_beside_measurements(tmp_path: Path) -> None:
    rows = [row("copy", 1 << 20, 1.5), row("launch", 4, None) | {"error": "RuntimeError: x"}]
    constants = {"barrier, us": {"assumed": 1.5, "measured": 1.25}, "launch, us": {"assumed": 3.0, "measured": None}}
    content = {"machine": results.MACHINE, "rows": rows, "constants": constants}
    results.write(tmp_path / "gpu", bandwidth=content)
    assert main(["report", "--results", str(tmp_path)]) == 0
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "### What bounds every plan" in lines
    for line in ("| barrier, us | 1.5 | 1.25 |", "| launch, us | 3 | - |", "| launch | 4 | RuntimeError: x | graph |",
                 "| copy | 1,048,576 | 1.50 (1.50-1.50) | graph |"):  # fmt: skip
        assert line in lines


# The machine.


@pytest.mark.parametrize("known", [True, False])
def test_driver_is_asked_about_this_gpu(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi in words; one that knows GPUs by other names answers for the first."""
    asked: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command[1])
        if command[1] == "--id=GPU-12" and not known:
            raise subprocess.CalledProcessError(6, command)
        return SimpleNamespace(stdout="580.159.04, 700.00, 1980, 3201, 34, 4, [N/A]\nof another GPU")

    monkeypatch.setattr(subprocess, "run", run)
    assert environment.queried("GPU-12") == {
        "driver": "580.159.04", "power_limit_w": "700.00", "sm_mhz": "1980", "memory_mhz": "3201",
        "temperature_c": "34", "memory_used_mib": "4", "ecc": None,
    }  # fmt: skip
    assert asked[0] == "--id=GPU-12"
    assert len(asked) == 1 + (not known)


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert set(environment.queried("GPU-12").values()) == {None}


def test_environment_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {name: "1.0" for name in environment.PACKAGES if name != "timm"}
    monkeypatch.setattr(environment, "version", known.get)
    assert main(["environment", "--device", "cpu", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["packages"] == known | {"timm": None}
    assert facts["commit"] == measure.commit()
    text = capsys.readouterr().out
    assert "without timm: its networks cannot be measured" in text
    assert text.count("without") == 1


def test_commit_is_that_of_the_checkout_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITONBN_COMMIT", raising=False)
    monkeypatch.setattr(measure, "__file__", "/nowhere/measure.py")
    assert measure.commit() is None, "a copy without history"
    monkeypatch.setenv("TRITONBN_COMMIT", "0123abc")
    assert measure.commit() == "0123abc"
