"""The interpreter of these tests computes what Triton's own does, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritonbn import launch

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
import torch
from tritonbn.functional import batch_norm
if sys.argv[1] == "quick":
    from bench import quick_interpreter
    quick_interpreter.hurry()
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for shape in ((9, 100), (2, 3, 5, 7)):
        torch.manual_seed(0)
        x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
        mean, var = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
        for training, activation in ((True, "relu"), (True, "gelu"), (False, "silu")):
            y = batch_norm(x, mean, var, None, None, training, activation=activation, residual=residual)
            results += [y.detach(), *torch.autograd.grad(y.square().sum(), (x, residual)), mean.clone(), var.clone()]
torch.save(results, sys.argv[2])
"""


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are not interpreted here")
def test_results_are_those_of_tritons_interpreter(tmp_path: Path) -> None:
    results = []
    for how in ("quick", "as it is"):
        path = tmp_path / how
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", PROGRAM, how, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(path))
    assert len(results[0]) == len(results[1]) == 90
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
