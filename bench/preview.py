"""What can be said of an operation without a GPU: its plan, its bytes, and the time that they take at the least."""

from collections.abc import Iterable

from bench.console import print_columns
from bench.problem import DTYPES, Problem
from tritonbn.plan import Layout, Operation, Plan, make_plan

# Memory bandwidth by data sheet, in bytes per second; a copy reaches some 90% of it.
GPUS = {"A100-80GB": 2.04e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}


def planned(problem: Problem, operation: Operation) -> Plan:
    """The plan for an H200."""
    N, C = problem.layer.shape[:2]
    S = problem.layer.numel // (N * C)
    layout: Layout = "planes"
    if S == 1 or problem.layout == "channels_last":
        layout, N, S = "rows", N * S, 1
    return make_plan(operation, layout, (N, C, S), DTYPES[problem.dtype].itemsize)


def floor_us(problem: Problem, gpu: str) -> float:
    """Microseconds that forward and backward take at the least at the GPU's bandwidth."""
    return problem.floor_bytes("both") / GPUS[gpu] * 1e6


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
    lines = [heads + [f"us {name}" for name in GPUS]]
    for problem in problems:
        forward, backward = (planned(problem, operation) for operation in ("forward", "backward"))
        megabytes = (problem.floor_bytes(direction) / 1e6 for direction in ("forward", "backward"))
        lines.append(
            [problem.set, "x".join(map(str, problem.layer.shape)), str(problem.layer.count), problem.layout,
             problem.dtype, problem.epilogue, brief(forward), brief(backward), *(f"{mb:.2f}" for mb in megabytes),
             *(f"{floor_us(problem, name):.3g}" for name in GPUS)]
        )  # fmt: skip
    print_columns(lines)


def brief(plan: Plan) -> str:
    """Path, tile and grid."""
    return f"{plan.path} {plan.tile.BLOCK_R}x{plan.tile.BLOCK_L} {plan.geometry}, {plan.groups}x{plan.splits}"
