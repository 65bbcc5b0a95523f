"""What can be said of an operation without a GPU: its plan, its bytes, and the time that they take at the least."""

from collections.abc import Iterable

from bench.console import print_columns
from bench.problem import DTYPES, Problem
from tritonbn.device import KNOWN, Device
from tritonbn.plan import Layout, Operation, Plan, make_plan


def planned(problem: Problem, operation: Operation) -> Plan:
    """The plan for an H200."""
    N, C = problem.layer.shape[:2]
    S = problem.layer.numel // (N * C)
    layout: Layout = "planes"
    if S == 1 or problem.layout == "channels_last":
        layout, N, S = "rows", N * S, 1
    return make_plan(operation, layout, (N, C, S), DTYPES[problem.dtype].itemsize)


def floor_us(problem: Problem, device: Device) -> float:
    """Microseconds that forward and backward take at the least on a GPU, at the bandwidth of a copy."""
    return problem.floor_bytes("both") / device.bandwidth * 1e6


def short(device: Device) -> str:
    """H200 of NVIDIA H200, A100 of NVIDIA A100-SXM4-80GB."""
    return device.name.split()[-1 if device.name.startswith("AMD") else 1].split("-")[0]


def show(problems: Iterable[Problem]) -> None:
    """A line for each problem."""
    heads = [
        "set",
        "shape",
        "layers",
        "layout",
        "dtype",
        "epilogue",
        "forward",
        "backward",
        "MB forward",
        "MB backward",
    ]
    lines = [heads + [f"us {short(device)}" for device in KNOWN]]
    for problem in problems:
        forward, backward = (planned(problem, operation) for operation in ("forward", "backward"))
        megabytes = (problem.floor_bytes(direction) / 1e6 for direction in ("forward", "backward"))
        lines.append(
            [problem.set, "x".join(map(str, problem.layer.shape)), str(problem.layer.count), problem.layout,
             problem.dtype, problem.epilogue, brief(forward), brief(backward), *(f"{mb:.2f}" for mb in megabytes),
             *(digits(floor_us(problem, device)) for device in KNOWN)]
        )  # fmt: skip
    print_columns(lines)


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def brief(plan: Plan) -> str:
    """Path, tile and grid."""
    return f"{plan.path} {plan.tile.BLOCK_R}x{plan.tile.BLOCK_L} {plan.geometry}, {plan.grid[0]}x{plan.grid[1]}"
