"""Kernels compiled ahead are those that launches look for: with them compiled, a launch compiles nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks are an extra: pip install -e .[bench]")

from bench import ahead
from tritonbn import launch

ROOT = Path(__file__).resolve().parent.parent

# Without a GPU: the driver is one that does nothing, so launches end where they would begin.
SCRIPT = """
import json, sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

from bench import ahead
from bench.problem import EPILOGUES, Problem
from bench.shapes import Layer
from bench.stub import stubbed
from tritonbn import functional, launch, model, plan_timing, planning, tuning
from tritonbn.device import H200
from tritonbn.layers import Layer as Tuned

cache = Path(sys.argv[1])
kernels = lambda: len(list(cache.glob("*/*.cubin")))
planning.device_of = launch.device_of = tuning.planning.device_of = lambda device: H200
found = {}


def operate(problem):
    x = torch.zeros(problem.layer.shape, dtype=problem.torch_dtype).to(memory_format=problem.memory_format)
    x.requires_grad_()
    epilogue = EPILOGUES[problem.epilogue]
    residual = torch.zeros_like(x).requires_grad_() if epilogue.residual else None
    weight, bias, mean, var = torch.ones(4, x.shape[1])
    y = functional.batch_norm(
        x, mean, var, weight.requires_grad_(), bias.requires_grad_(), training=True,
        activation=epilogue.activation, residual=residual,
    )
    y.backward(torch.zeros_like(y))


problems = [
    Problem("custom", Layer((4, 8, 4, 4)), layout, dtype, epilogue)
    for layout, dtype, epilogue in (
        ("channels_last", "bf16", "bn"), ("nchw", "fp32", "bn+relu"), ("nchw", "bf16", "bn+add+relu"),
        ("nchw", "bf16", "bn+silu"),
    )
] + [Problem("custom", Layer((1024, 8, 16, 16)), "nchw", "bf16", "bn+add+relu")]


def main():
    launches = [each for problem in problems for each in ahead.of_problem(problem, torch.device("cpu"))]
    target = GPUTarget("cuda", 90, 32)
    count = ahead.compile_ahead(launches, target=target)
    found["operations"] = [count, kernels()]
    with stubbed() as stub:
        for problem in problems:
            operate(problem)
        found["operations"] += [kernels(), stub.count, sorted({each.kernel for each in launches})]

    layer = Tuned((64, 16, 8, 8), torch.bfloat16, torch.contiguous_format)
    work = tuning.problems([layer], H200, again=True)
    before = kernels()
    wanted = [each for what, layer in work.items() for each in ahead.of_tuning(what, layer, H200)]
    count = ahead.compile_ahead(wanted, target=target)
    found["tuning"] = [count, kernels() - before]
    plans = 0
    with stubbed() as stub:
        for problem, layer in work.items():
            call = plan_timing.operation(problem, lambda: layer.empty("cpu"), 1)
            near = model.neighbours(model.best(problem, H200), problem, H200)
            for plan in {*model.first_round(problem, H200), *near}:
                call(plan, 0)
                plans += 1
        found["tuning"] += [kernels() - before, plans]
    found["none left"] = ahead.compile_ahead([*dict.fromkeys(launches)] * 2, 0.0, target)
    json.dump(found, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    script, cache, result = tmp_path / "script.py", tmp_path / "cache", tmp_path / "found.json"
    script.write_text(SCRIPT)
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ours |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(cache), str(result)], cwd=ROOT, env=ours, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    read: dict[str, Any] = json.loads(result.read_text())
    return read


def test_a_launch_finds_what_was_compiled_ahead(found: dict[str, Any]) -> None:
    count, compiled, after, launched, kernels = found["operations"]
    assert count == compiled == after
    assert launched >= count
    assert {"forward_kernel", "backward_kernel", "statistics_kernel"} <= set(kernels)
    count, compiled, after, plans = found["tuning"]
    assert compiled == after
    assert count > 10
    assert plans > 10
    assert found["none left"] <= 4, "no time: nothing but what had begun"


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert ahead.compile_ahead([]) == 0


def test_tensors_are_given_as_dtypes() -> None:
    assert [ahead.argument(kind) for kind in ("*bf16", "*u8", "fp64")] == [torch.bfloat16, torch.uint8, 1.0]
    small, large = ahead.argument("i32"), ahead.argument("i64")
    assert isinstance(small, int)
    assert isinstance(large, int)
    assert small < 2**31 <= large
