"""What `tritonbn.explain` says, by value, and that it changes nothing."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonbn
from tests import launches
from tritonbn import explain, launch, planning, tables
from tritonbn.plan import forced

BY_TORCH = "On the device cpu torch computes batch norm; on an NVIDIA H200 these plans would run:"
INTERPRETED = "In Triton's interpreter, on the CPU; device and times are an NVIDIA H200's:"


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)


def test_a_connected_layer() -> None:
    assert explain(torch.empty(60, 100, device="meta")).splitlines() == [
        "forward rows [60, 100] x 4 bytes: path single, 1 launch, 1 x 1 programs of 16 warps, column tiles 128 x 64 "
        "(128 channels), 128-bit access; moves 48,000 bytes; floor 48,000 bytes = 0.0 us at 4.3 TB/s of NVIDIA H200; "
        "predicted 4.9 us by assumed constants, bound by launch; plan from the model",
        "backward rows [60, 100] x 4 bytes: path single, 1 launch, 1 x 1 programs of 16 warps, column tiles 128 x 64 "
        "(128 channels), 128-bit access; moves 72,000 bytes; floor 72,000 bytes = 0.0 us at 4.3 TB/s of NVIDIA H200; "
        "predicted 5.0 us by assumed constants, bound by launch; plan from the model",
    ]


def test_a_large_layer_in_both_layouts() -> None:
    x = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16, device="meta")
    forward, backward = explain(x).splitlines()
    assert "forward planes [256, 64, 3136] x 2 bytes: path split, 2 launches, 64 x 4 programs of 8 warps" in forward
    assert "plane tiles 256 x 16 (1 channels), 128-bit access; moves 308,281,344 bytes" in forward
    assert "floor 205,520,896 bytes = 47.8 us at 4.3 TB/s of NVIDIA H200; predicted 71.6 us by assumed" in forward
    assert forward.endswith("by assumed constants, bound by memory; plan from the model")
    assert "moves 513,802,240 bytes; floor 308,281,344 bytes = 71.7 us" in backward
    last = explain(x.to(memory_format=torch.channels_last)).splitlines()
    assert [line.split(":")[0] for line in last] == [
        "forward rows [802816, 64] x 2 bytes", "backward rows [802816, 64] x 2 bytes",
    ]  # fmt: skip
    with forced("split"):
        assert "path split, 2 launches" in explain(x)
        assert "plan from the model, path or splits forced" in explain(x)


@pytest.mark.parametrize(("interpreted", "remark"), [(False, BY_TORCH), (True, INTERPRETED)])
def test_tensors_of_the_cpu(interpreted: bool, remark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the interpreter torch computes; inside, no program can wait for another one."""
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    x = torch.empty(256, 64, 14, 14)
    first, forward, backward = explain(x).splitlines()
    assert first == remark
    device = torch.device("cpu" if interpreted else "meta")
    for operation, line in (("forward", forward), ("backward", backward)):
        assert line == str(planning.plan_for(operation, x, device=device))  # type: ignore[arg-type]
    if interpreted:
        assert not planning.device_of(device).cooperative


def test_what_is_said_is_what_runs(device: torch.device) -> None:
    if device.type == "cpu" and not launch.INTERPRETED:
        pytest.skip("torch computes")
    for path, names in (("split", ["statistics_kernel", "normalize_kernel"]), ("single", ["forward_kernel"])):
        with forced(path), launches.recorded() as ran:  # type: ignore[arg-type]
            x = torch.randn(8, 8, 4, 4, device=device)
            tritonbn.functional.batch_norm(x, None, None, training=True)
            assert f"path {path}, {len(names)} launch" in explain(x)
        assert ran == names


def test_deterministic_mode_takes_nothing_measured() -> None:
    x = torch.empty(64, 64, 28, 28, device="meta")
    problem, gpu = planning.problem_of("forward", x), planning.device_of(x.device)
    with forced("single"):
        choice = planning.plan_for("forward", x).choice
    tables.remember(gpu, {tables.key(problem): tables.Entry(choice, 1.0, 2.0)})
    try:
        assert "plan from tuned in this process" in explain(x)
        if not torch.cuda.is_available():  # nor do the interpreter's plans follow from what a GPU measured
            assert "tuned" not in explain(torch.empty(64, 64, 28, 28))
        torch.use_deterministic_algorithms(True)
        assert "tuned" not in explain(x)
    finally:
        torch.use_deterministic_algorithms(False)
        tables.forget()


@pytest.mark.parametrize(
    ("x", "got"),
    [
        pytest.param(torch.empty(5), r"\[5\] of torch.float32", id="one-dimension"),
        pytest.param(torch.empty(()), r"\[\] of torch.float32", id="no-dimension"),
        pytest.param(torch.empty(4, 5, dtype=torch.int64), r"\[4, 5\] of torch.int64", id="integers"),
        pytest.param(torch.empty(4, 5, dtype=torch.complex64), r"\[4, 5\] of torch.complex64", id="complex"),
        pytest.param(torch.empty(4, 5, dtype=torch.float8_e4m3fn), r"\[4, 5\] of torch.float8", id="8-bit"),
        pytest.param(torch.empty(0, 5), r"\[0, 5\] of torch.float32", id="no-samples"),
        pytest.param(torch.empty(4, 0, 3), r"\[4, 0, 3\] of torch.float32", id="no-channels"),
    ],
)
def test_what_batch_norm_does_not_take(x: Tensor, got: str) -> None:
    expected = r"expected \[N, C, ...\], not empty, of float32, bfloat16, float16, float64; got "
    with pytest.raises(ValueError, match=expected + got):
        explain(x)


@pytest.mark.parametrize("other", [[1, 2], (64, 64), None, "x", nn.Linear])
def test_neither_tensor_nor_module(other: Any) -> None:
    with pytest.raises(TypeError, match=f"expected a Tensor or a Module, but got {type(other).__name__}"):
        explain(other)


def test_more_than_indices_reach() -> None:
    x = torch.empty(1, 2, 1 << 30, device="meta", dtype=torch.float16)
    assert explain(x) == "[1, 2, 1073741824]: torch computes it, 32-bit indices do not reach all of it"


def test_a_model_tells_of_each_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

        def forward(self, x: Tensor, scale: float) -> Tensor:
            x = self.norm(x * scale) + self.norm(x[:, :, ::2, ::2].contiguous()).mean()
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    with torch.device("meta"):
        model, x = tritonbn.convert(Net()), torch.empty(64, 8, 16, 16)
    told = explain(model, x, scale=2.0)
    assert [re.sub(r": path .*", "", line) for line in told.splitlines()] == [
        "norm:",
        "  forward planes [64, 8, 256] x 4 bytes",
        "  backward planes [64, 8, 256] x 4 bytes",
        "  forward planes [64, 8, 64] x 4 bytes",
        "  backward planes [64, 8, 64] x 4 bytes",
        "head.1:",
        "  forward rows [64, 4] x 4 bytes",
        "  backward rows [64, 4] x 4 bytes",
    ]
    norm = tritonbn.BatchNorm2d(8, device="meta")
    assert explain(norm, input=x).splitlines() == ["BatchNorm2d:", *(f"  {line}" for line in explain(x).splitlines())]


def test_layers_that_torch_computes_say_why() -> None:
    with torch.device("meta"):
        model = nn.Sequential(tritonbn.BatchNorm2d(8), tritonbn.BatchNorm2d(8), tritonbn.BatchNorm2d(8))
        x = torch.empty(4, 8, 2, 2)
    model[1].half()
    model[2].num_batches_tracked = torch.zeros((), device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tritonbn.BatchNorm2d, "forward", lambda self, x: x)  # torch refuses half parameters
        told = [line.strip() for line in explain(model, x).splitlines()]
    assert told[0] == "0:"
    assert told[1].startswith("forward planes [4, 8, 4]")
    assert told[3:] == [
        "1:",
        "[4, 8, 2, 2]: torch computes it, weights and statistics are not all [C] on the device of the input, of its "
        "dtype (or float32 for 16 bits)",
        "2:",
        "[4, 8, 2, 2]: torch computes it, num_batches_tracked is no int64 on the device of the input",
    ]


def test_a_model_on_the_cpu_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    model = nn.Sequential(tritonbn.BatchNorm1d(4), nn.ReLU(), tritonbn.BatchNorm1d(4))
    told = explain(model, torch.randn(3, 4)).splitlines()
    assert (told[0], told[1], told[4], len(told)) == (BY_TORCH, "0:", "2:", 7)


def test_a_model_that_calls_none_of_ours() -> None:
    with pytest.raises(ValueError, match=r"expected a model that calls tritonbn modules .* but it called none"):
        explain(nn.BatchNorm1d(4), torch.randn(3, 4))
