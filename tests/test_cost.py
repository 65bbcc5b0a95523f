"""What a plan should take, by parts: what a second pass finds in L2, instructions, sums within programs, bounds."""

from dataclasses import replace
from typing import Any

import pytest

from tritonbn import cost
from tritonbn.choice import Path, Plan, Problem, build
from tritonbn.cost import bound, found_again, predicted, programs_at_once
from tritonbn.device import H200, KNOWN, Constants, Device
from tritonbn.model import best

PLANES_56 = 256, 64, 3136
LARGE = Problem("forward", "planes", PLANES_56, 2)
SMALL = Problem("forward", "planes", (16, 64, 784), 2)
NARROW = Problem("forward", "planes", (256, 33, 1225), 2)  # no sample starts at a multiple of two elements


def second_pass(shape: tuple[int, int, int], itemsize: int, operation: Any, megabytes: int) -> float:
    """Percent of what path split reads again that is found in an L2 of so many MB."""
    problem = Problem(operation, "rows" if shape[2] == 1 else "planes", shape, itemsize)
    device = replace(H200, l2_bytes=megabytes << 20)
    plan = best(problem, device, "split")
    at_once = plan.groups * plan.splits <= programs_at_once(plan.num_warps, device)
    read = problem.operands * problem.data
    shares = plan.splits if at_once else plan.apply_splits
    return 100 * found_again(read, problem.data, shares, device.l2_bytes) / read


@pytest.mark.parametrize(
    ("shape", "itemsize", "megabytes", "forward", "backward"),
    [
        pytest.param(PLANES_56, 2, 60, 29, 16, id="four-programs-a-channel"),
        pytest.param(PLANES_56, 2, 50, 19, 11, id="of-an-H100"),
        pytest.param(PLANES_56, 2, 30, 7, 4, id="half-of-L2"),
        pytest.param(PLANES_56, 4, 60, 8, 5, id="fp32"),
        pytest.param((256, 256, 3136), 2, 60, 11, 7, id="one-program-a-channel"),
        pytest.param((256, 1024, 196), 2, 60, 29, 15, id="two-waves"),
        pytest.param((256 * 3136, 64, 1), 2, 60, 25, 12, id="channels-last"),
        pytest.param((256, 512, 49), 2, 60, 100, 100, id="7x7-fits"),
        pytest.param((256, 256, 196), 2, 60, 100, 95, id="14x14-fits"),
    ],
)
def test_a_second_pass_finds_what_a_model_of_l2_finds(
    shape: tuple[int, int, int], itemsize: int, megabytes: int, forward: float, backward: float
) -> None:
    """The model: 16 ways, hashed sets, lines that nobody reads again first; fed with the accesses of the kernels."""
    assert second_pass(shape, itemsize, "forward", megabytes) == pytest.approx(forward, abs=5)
    assert second_pass(shape, itemsize, "backward", megabytes) == pytest.approx(backward, abs=5)


def test_a_second_pass_finds_no_more_than_there_is() -> None:
    for shares in (1, 2, 7, 1000):
        for cache in (0.0, 1.0, 50.0, 99.0, 100.0, 1000.0):
            for written in (0.0, 50.0, 100.0):
                assert 0 <= found_again(100.0, written, shares, cache) <= min(100.0, cache)
        assert found_again(100.0, 100.0, shares, 100.0) == pytest.approx(100.0)


def test_a_share_of_l2_that_was_measured_scales_what_is_found() -> None:
    times = {
        share: predicted(best(LARGE, H200, "split"), LARGE, replace(H200, measured=Constants(4.3e12, l2_share=share)))
        for share in (0.0, 0.3, 0.6, 1.0)
    }
    assert times[0.0] > times[0.3] > times[0.6] == times[1.0] == predicted(best(LARGE, H200, "split"), LARGE, H200)


def both(problem: Problem, path: Path | None = None, device: Device = H200) -> tuple[Plan, Problem, Device]:
    return best(problem, device, path), problem, device


def test_bounds_by_name() -> None:
    backward = LARGE._replace(operation="backward")
    for problem, path, expected in (
        (LARGE, "split", "memory"),
        (backward, "stream", "L2"),
        (SMALL, None, "launch"),
        (Problem("forward", "rows", (512, 64, 1), 4), "single", "latency"),
        (backward._replace(costly=True), "split", "memory"),
        (NARROW, "split", "issue"),
    ):
        assert bound(*both(problem, path)) == expected  # type: ignore[arg-type]


def test_narrow_accesses_cost_what_their_instructions_do() -> None:
    """Not four times as much, as bytes in flight alone would have it: addresses are shared by fewer elements."""
    plan, _, _ = both(NARROW, "split")
    assert plan.access_bits == 16
    wide = Problem("forward", "planes", (256, 33, 1232), 2)
    ratio = predicted(*both(NARROW, "split")) / predicted(*both(wide, "split"))
    assert 1.0 <= ratio * 1232 / 1225 <= 1.7
    assert bound(*both(NARROW, "split")) == "issue"


def test_exponentials_take_instructions_and_a_faster_clock_helps() -> None:
    """On a GPU of half the clock; at its own, an H200's memory takes longer than the exponentials of 16 bits."""
    plain = LARGE._replace(operation="backward")
    costly = plain._replace(costly=True)
    plan = best(costly, H200, "split")
    slower = replace(H200, clock=H200.clock / 2)
    assert predicted(plan, plain, slower) < predicted(plan, costly, slower)
    assert predicted(plan, plain, H200) == predicted(plan, costly, H200) < predicted(plan, costly, slower)


def test_few_warps_have_few_schedulers() -> None:
    """A tile that one warp works on is issued by one scheduler of four."""
    problem = Problem("forward", "rows", (256, 64, 1), 2)
    plan = best(problem, H200, "single")
    narrow = build(problem, plan.choice._replace(num_warps=1))
    part, other = (cost._Pass(1, 0, 0, 1, 1, 1e6).part(each, H200) for each in (plan, narrow))
    assert part[1] == other[1] == "issue"
    assert other[0] == 4 * part[0]


@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize(
    "problem",
    [SMALL, Problem("forward", "rows", (60, 100, 1), 2), Problem("forward", "planes", (32, 2048, 49), 2)],
    ids=["plane", "rows-side-by-side", "planes-side-by-side"],
)
def test_sums_within_a_program_take_about_a_microsecond_at_most(problem: Problem, operation: Any) -> None:
    """Its shuffles alone take a tenth; the forward has three, one of them before the other two."""
    problem = problem._replace(operation=operation)
    for path in ("single", "split"):
        plan = best(problem, H200, path)
        programs = plan.grid[0] * plan.grid[1]
        assert 1e-7 < cost.folds(plan, programs, H200) < 1.2e-6
        assert cost.folds(plan, programs, H200) <= cost.folds(plan, 1000 * programs, H200), "programs share an SM"


def test_a_plan_that_works_on_one_channel_at_a_time_sums_as_often() -> None:
    stream = best(LARGE, H200, "stream")
    assert stream.slots == 16
    one = build(LARGE, stream.choice._replace(slots=1, splits=256))
    with pytest.MonkeyPatch.context() as patch:
        times = [[predicted(plan, LARGE, H200) for plan in (stream, one)]]
        patch.setattr(cost, "SHARED_ROUND", cost.SHARED_ROUND + 1e-6)  # of two sets
        times += [[predicted(plan, LARGE, H200) for plan in (stream, one)]]
    more = [after - before for before, after in zip(*times, strict=True)]
    assert more == pytest.approx([2 * 2.5e-6, 2 * 64e-6]), "while one slot sums, others work"


def test_every_known_gpu_has_a_clock() -> None:
    assert all(1e9 <= device.clock <= 3e9 for device in KNOWN)
