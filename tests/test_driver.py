"""Kernels launched through Triton's own CUDA launcher: `fake_cuda.c` writes down what the driver is given.

`test_launch.py` replaces the launcher; here it is the one of this Triton, compiled, and kept handles must give the
driver what Triton's own launches give it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
COMPILER = shutil.which("gcc") or shutil.which("clang")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="Triton's launcher is compiled, with gcc or clang"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's CUDA driver is for Linux"),
]

# Every launch of the library three times: the first is Triton's own unless it is kept already, the last by a handle.
SCRIPT = """
import json, os, struct, sys
import torch, triton
from triton.backends.nvidia.driver import CudaDriver
from tritonbn import handles, launch, planning
from tritonbn.device import H200
from tritonbn.functional import batch_norm
from tritonbn.plan import forced

driver = CudaDriver()
driver.get_current_device, driver.get_current_stream = lambda: 0, lambda device: 7
driver.get_device_capability = lambda device=0: (9, 0)
triton.runtime.driver.set_active(driver)
launch.INTERPRETED = True  # what lets CPU tensors in
planning.device_of = launch.device_of = lambda device: H200
start, log = handles.start, os.environ["FAKE_CUDA_LOG"]
found = []


def parameter(value):
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return struct.unpack("<Q", struct.pack("<d", value))[0] if isinstance(value, float) else value


def read(line, given):
    where, attributes, values = line.split("|")
    sizes = [0xFFFFFFFF if type(value) is int else -1 for value in given]
    return where, attributes.split(), [int(value, 16) & size for value, size in zip(values.split(), sizes)]


def thrice(kernel, grid, plan, *args, launches=None, which=None, **constants):
    given = [value for value in args if value is not None]
    os.environ["FAKE_CUDA_PARAMETERS"] = str(len(given))
    open(log, "w").close()
    for _ in range(3):
        start(kernel, grid, plan, *args, **constants)
    launches = [read(line, given) for line in open(log)]
    found.append({
        "kernel": kernel.__name__, "path": plan.path, "grid": list(grid), "threads": 32 * plan.num_warps,
        "expected": [parameter(value) for value in given], "launches": launches,
        "kept": sum(handle.sort == handles._sort(plan) for handle in handles._handles.values()),
    })


launch._launch = thrice
for path in ("single", "split", "cooperative", "stream"):
    for shape in ((512, 32), (16, 8, 7, 7)):
        for follows in ({}, {"activation": "relu", "residual": None}):
            x = torch.randn(shape, requires_grad=True)
            w, b = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
            if "residual" in follows:
                follows["residual"] = torch.randn(shape, requires_grad=True)
            mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
            try:
                with forced(path):
                    batch_norm(x, mean, var, w, b, training=True, **follows).sum().backward()
            except ValueError as error:  # not all paths can run all shapes
                assert "cannot run" in str(error), error
            with torch.no_grad():
                batch_norm(x, mean, var, w, b, training=False, **follows)
json.dump(found, sys.stdout)
"""


def launches(folder: Path) -> list[dict[str, Any]]:
    """What `SCRIPT` found, with the fake driver built into the folder."""
    library = folder / "libcuda.so.1"
    command = [str(COMPILER), "-shared", "-fPIC", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(ROOT / "tests" / "fake_cuda.c")], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache"),
        "FAKE_CUDA_LOG": str(folder / "log"), "FAKE_CUDA_PARAMETERS": "0", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_the_driver_is_given_what_the_library_gives_and_handles_give_the_same(tmp_path: Path) -> None:
    """Addresses, sizes and numbers in the kernel's order; grid, threads of a block, stream; whether it is cooperative.

    One test, for compiling the launchers takes long.
    """
    found = launches(tmp_path)
    for row in found:
        first, *later = row["launches"]
        assert len(later) == 2
        assert all(other == first for other in later), row["kernel"]
        assert row["kept"], "a handle was kept for this plan"
        where, attributes, values = first
        assert values == row["expected"], row["kernel"]
        *grid, threads, _, stream, _ = map(int, where.split())
        assert [*grid, threads, stream] == [*[*row["grid"], 1, 1][:3], row["threads"], 7]
        assert attributes == ["2:1"] * row["kernel"].startswith("cooperative")  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    assert {row["kernel"] for row in found} == {
        "forward_kernel", "statistics_kernel", "normalize_kernel", "inference_kernel", "backward_kernel",
        "gradient_sums_kernel", "input_gradient_kernel", "cooperative_forward_kernel", "cooperative_backward_kernel",
    }  # fmt: skip
    assert {row["path"] for row in found} == {"single", "split", "cooperative", "stream"}
