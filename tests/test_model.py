"""The model behind the plans: candidates by value, and times that no plan can beat."""

from dataclasses import replace
from math import inf, isfinite
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.sound import assert_sound
from tritonbn import cost, model
from tritonbn.choice import LARGEST_TILE, Choice, Path, Plan, Problem, build
from tritonbn.cost import seconds
from tritonbn.device import H200, KNOWN, Constants, Device
from tritonbn.model import best, neighbours, plans_for
from tritonbn.plan import forced, make_plan
from tritonbn.traffic import Operands, floor_bytes

DEVICES = {device.name: device for device in KNOWN}
MI300X, B200 = DEVICES["AMD Instinct MI300X"], DEVICES["NVIDIA B200"]
ALONE = replace(H200, cooperative=False)
ONE_SM = replace(H200, sms=1)

RESNET_56 = Problem("forward", "planes", (256, 64, 3136), 2)  # 1,605,632 bytes per channel
RESNET_56_BACKWARD = RESNET_56._replace(operation="backward")
SMALL_PLANES = Problem("forward", "planes", (32, 2048, 49), 2)
SMALL_PLANES_BACKWARD = SMALL_PLANES._replace(operation="backward")
CONNECTED = Problem("forward", "rows", (60, 100, 1), 4)
CHANNELS_LAST = Problem("forward", "rows", (256 * 112 * 112, 64, 1), 2)


@pytest.mark.parametrize(
    ("problem", "device", "path", "grid", "once"),
    [
        pytest.param(RESNET_56, H200, "split", (64, 4), False, id="nobody-waits-without-a-measurement"),
        pytest.param(RESNET_56_BACKWARD, H200, "split", (64, 4), False, id="nor-in-the-backward"),
        pytest.param(RESNET_56, B200, "split", (64, 9), False, id="a-large-L2-holds-most-for-a-second-launch"),
        pytest.param(RESNET_56, MI300X, "split", (64, 19), False, id="L2-holds-one-channel"),
        pytest.param(RESNET_56, ONE_SM, "single", (64, 1), False, id="one-multiprocessor-needs-no-second-launch"),
        pytest.param(SMALL_PLANES, H200, "single", (256, 1), False, id="two-programs-of-8-warps-before-one-of-16"),
        pytest.param(SMALL_PLANES_BACKWARD, H200, "single", (256, 1), True, id="7x7-in-registers"),
        pytest.param(CONNECTED, H200, "single", (1, 1), True, id="launch-bound"),
        pytest.param(CONNECTED, MI300X, "single", (1, 1), True, id="launch-bound-anywhere"),
        pytest.param(CHANNELS_LAST, H200, "split", (1, 251), False, id="no-group-fits-L2"),
    ],
)
def test_best(problem: Problem, device: Device, path: str, grid: tuple[int, int], once: bool) -> None:
    plan = best(problem, device)
    assert (plan.path, plan.grid, plan.tile.ONCE) == (path, grid, once)


@pytest.mark.parametrize(
    ("problem", "path", "grid"),
    [
        pytest.param(RESNET_56, "stream", (16, 16), id="16-channels-of-25-MB-stay-in-L2"),
        pytest.param(RESNET_56_BACKWARD, "stream", (8, 30), id="dy-and-x-of-8-channels"),
        pytest.param(CONNECTED, "cooperative", (1, 4), id="few-programs"),
    ],
)
def test_best_of_paths_whose_programs_wait(problem: Problem, path: Path, grid: tuple[int, int]) -> None:
    assert best(problem, H200, path).grid == grid


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_without_measurements_no_program_waits(data: st.DataObject) -> None:
    problem, device = data.draw(problems()), data.draw(devices)
    plan = best(problem, device)
    assert plan.path in ("single", "split")
    assert plan == best(problem, replace(device, cooperative=False))


def paths(problem: Problem, device: Device) -> set[str]:
    return {plan.path for plan in plans_for(problem, device)}


def test_paths_there_are_to_choose_from() -> None:
    assert paths(RESNET_56, H200) == {"split", "single", "stream"}
    assert paths(RESNET_56, ALONE) == {"split", "single"}
    assert paths(CONNECTED, H200) == {"split", "single", "cooperative", "stream"}
    assert paths(RESNET_56._replace(operation="inference"), H200) == {"split"}


def test_slots_are_as_many_channels_as_the_L2_cache_holds() -> None:
    """Per channel 1,605,632 bytes, twice that for the backward; 60% of the cache is there for them."""
    for problem, device, slots in (
        (RESNET_56, H200, {1, 2, 4, 8, 16}),  # 23 would fit
        (RESNET_56_BACKWARD, H200, {1, 2, 4, 8}),  # 11 would fit
        (RESNET_56, B200, {1, 2, 4, 8, 16, 32}),  # 49 would fit
        (RESNET_56, MI300X, {1}),
        (RESNET_56, replace(H200, l2_bytes=2 << 20), set()),  # not one
        (Problem("forward", "planes", (64, 12, 3136), 2), H200, {1, 2, 4, 8, 12}),  # all
    ):
        assert {plan.slots for plan in plans_for(problem, device) if plan.path == "stream"} == slots


def test_splits_that_are_given_are_those_of_the_plan() -> None:
    for splits in (1, 3, 7):
        found = {plan.path: plan.splits for plan in plans_for(RESNET_56, H200, splits)}
        assert found == {"split": splits, "single": 1, "stream": splits}
        assert best(RESNET_56, H200, "split", splits).splits == splits


@pytest.mark.parametrize("path", get_args(Path))
@pytest.mark.parametrize("device", [H200, ALONE, ONE_SM, MI300X], ids=lambda device: device.name)
@pytest.mark.parametrize("problem", [RESNET_56, RESNET_56_BACKWARD, SMALL_PLANES, CONNECTED, CHANNELS_LAST])
def test_a_forced_path_is_taken_or_refused(path: Path, device: Device, problem: Problem) -> None:
    with forced(path):
        if path in paths(problem, device):
            assert make_plan(*problem[:4], device).path == path
        else:
            message = rf"path {path} cannot run {problem.operation} of .* on {device.name}"
            with pytest.raises(ValueError, match=message):
                make_plan(*problem[:4], device)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    N, C, S = draw(st.tuples(st.integers(1, 600), st.integers(1, 600), st.integers(1, 4000)))
    rows = draw(st.booleans())
    operation: Any = draw(st.sampled_from(["forward", "backward", "inference"]))
    costly = operation == "backward" and draw(st.booleans())
    shape = (N * S, C, 1) if rows else (N, C, S)
    return Problem(operation, "rows" if rows else "planes", shape, draw(st.sampled_from([2, 4, 8])), costly)


devices = st.builds(
    Device, st.just("x"), st.integers(1, 304), st.integers(0, 256 << 20), st.floats(1e11, 1e13), st.booleans(),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(problem=problems(), device=devices, more=st.floats(1, 10))
@example(Problem("backward", "planes", (1, 37, 623), 8), Device("x", 19, 0, 1e11, False), 1.0)
def test_no_plan_beats_the_floor_and_bandwidth_never_hurts(problem: Problem, device: Device, more: float) -> None:
    candidates = list(plans_for(problem, device))
    assert candidates[0].path == "split"
    faster = replace(device, bandwidth=more * device.bandwidth)
    for plan in candidates:
        assert_sound(plan, device)
        time = seconds(plan, problem, device)
        assert isfinite(time)
        floor = plan.launches * device.constants.launch + floor_bytes(plan, Operands()) / device.bandwidth
        assert time >= floor * (1 - 1e-12)  # the same sum in another order
        assert seconds(plan, problem, faster) <= time * (1 + 1e-12)
    assert seconds(best(problem, device), problem, device) == min(
        seconds(plan, problem, device) for plan in candidates if not plan.cooperative
    )


def differences(one: Choice, other: Choice) -> set[str]:
    return {name for name in Choice._fields if getattr(one, name) != getattr(other, name)}


@settings(max_examples=200, deadline=None)
@given(problem=problems(), device=devices)
def test_neighbours_can_run_and_differ_in_one_thing(problem: Problem, device: Device) -> None:
    for plan in plans_for(problem, device):
        near = list(neighbours(plan, problem, device))
        assert plan not in near
        assert len(set(near)) == len(near)
        times = [seconds(other, problem, device) for other in near]
        assert times == sorted(times)
        for other in near:
            assert len(differences(plan.choice, other.choice)) == 1
            assert other.path == plan.path
            assert_sound(other, device, LARGEST_TILE)
            assert model.check(other, device) is other


def test_neighbours_of_a_split_plan() -> None:
    plan = best(RESNET_56, H200, "split")
    assert plan.choice == Choice("split", 16, 256, 8, splits=4, apply_tiles=4)
    near = {other.choice for other in neighbours(plan, RESNET_56, H200)}
    expected = [{"block_r": 8}, {"block_r": 32}, {"block_l": 128}, {"block_l": 512}, {"num_warps": 4}]
    expected += [{"num_warps": 16}, {"splits": 2}, {"splits": 8}, {"apply_tiles": 2}, {"apply_tiles": 8}]
    expected += [{"stages": 2}, {"stages": 3}]
    assert near == {plan.choice._replace(**change) for change in expected}  # type: ignore[arg-type]


def test_what_changes_nothing_is_no_neighbour() -> None:
    """A tile that holds all has no loop and no second pass."""
    plan = best(CONNECTED, H200)
    assert {frozenset(differences(plan.choice, near.choice)) for near in neighbours(plan, CONNECTED, H200)} <= {
        frozenset({"block_r"}), frozenset({"block_l"}), frozenset({"num_warps"}),
    }  # fmt: skip


SHARES = {"slots", "splits"}


def test_neighbours_wait_for_no_more_programs_than_there_is_room_for() -> None:
    plan = best(RESNET_56, H200, "stream")
    assert plan.grid == (16, 16)
    near = [other for other in neighbours(plan, RESNET_56, H200) if differences(plan.choice, other.choice) <= SHARES]
    assert {other.grid for other in near} == {(8, 16), (16, 8)}, "264 at a time: neither 32 x 16 nor 16 x 32"
    with pytest.raises(ValueError, match=r"needs all of 32 x 16 programs at a time, but .* room for 264"):
        model.check(built(RESNET_56, plan, slots=32), H200)


def built(problem: Problem, plan: Plan, **changes: Any) -> Plan:
    return build(problem, plan.choice._replace(**changes))


def test_more_stages_than_shared_memory_holds() -> None:
    plan = best(RESNET_56_BACKWARD, H200, "split")
    staged = built(RESNET_56_BACKWARD, plan, block_r=64, stages=3)
    assert (staged.tile.BLOCK_R, staged.tile.BLOCK_L) == (64, 256)
    with pytest.raises(ValueError, match="3 stages take 294912 bytes of shared memory, more than 147456"):
        model.check(staged, H200)
    assert model.check(built(RESNET_56_BACKWARD, plan, stages=3), H200).tile.STAGES == 3


@settings(max_examples=500, deadline=None)
@given(groups=st.integers(1, 3000), tiles=st.integers(1, 5000), sms=st.integers(1, 200))
def test_splits_are_the_fewest_that_fill_whole_waves(groups: int, tiles: int, sms: int) -> None:
    """To 95%; else those that fill them best."""

    def use(splits: int) -> float:
        return groups * splits / (-(-groups * splits // (2 * sms)) * 2 * sms)

    candidates = range(1, min(tiles, max(4, 8 * sms // groups)) + 1)
    expected = next((splits for splits in candidates if use(splits) >= 0.95), max(candidates, key=use))
    assert model._splits(groups, tiles, Device("x", sms)) == expected


KINDS = [
    f"{path}/{layout}/{operation}/{size}"
    for path in get_args(Path)
    for layout in ("rows", "planes")
    for operation in ("forward", "backward")
    for size in ("L2", "memory")
]
measurements = st.builds(
    Constants, st.floats(1e11, 1e13), st.floats(1e-6, 1e-5), st.floats(1e-7, 1e-5), st.floats(0.5, 5), st.floats(0, 1),
    st.dictionaries(st.sampled_from(KINDS), st.floats(0.3, 3)).map(lambda found: tuple(found.items())), st.just(True),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(problem=problems(), device=devices, constants=measurements)
def test_no_plan_that_was_not_built_would_have_been_better(
    problem: Problem, device: Device, constants: Constants
) -> None:
    """Of all that there are, those of waiting paths only if measured, and with doubt."""
    device = replace(device, measured=constants)

    def time(plan: Plan) -> float:
        known = not plan.cooperative or cost.kind(plan.path, problem, device) in device.factors
        return seconds(plan, problem, device) * (model.DOUBT if plan.cooperative else 1) if known else inf

    assert time(best(problem, device)) == min(map(time, plans_for(problem, device)))
