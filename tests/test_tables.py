"""Tables of measured plans under torture: whatever a file holds, no crash, no wrong plan, and at most one warning."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.sound import assert_sound
from tests.warned import told
from tritonbn import store, tables
from tritonbn.choice import LARGEST_TILE, Choice, Problem
from tritonbn.device import Device
from tritonbn.plan import Plan, make_plan
from tritonbn.tables import Entry, key
from tritonbn.version import __version__

GPU = Device("NVIDIA H200", 132)
PLAIN = Device("NVIDIA H200", 132, cooperative=False)
LAYER = Problem("forward", "planes", (256, 64, 3136), 2)
OTHER = Problem("backward", "rows", (4096, 1024, 1), 2)
SMALL = Problem("backward", "rows", (64, 64, 1), 2)
# Nothing that the model would choose.
MEASURED = Choice("split", 2, 1024, 4, splits=5, apply_tiles=3)
ENTRY = Entry(MEASURED, 120.0, 150.0)
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of this test, without the library's tables, and nothing known from before."""
    monkeypatch.setenv("TRITONBN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tables.forget()


@pytest.fixture
def file(folder: Path) -> Path:
    """Where the user's table of the GPU is to be, in a folder that exists."""
    folder.mkdir()
    return tables.path(folder, GPU)


def plan_of(problem: Problem = LAYER, device: Device = GPU, tuned: bool = True) -> Plan:
    operation, layout, shape, itemsize, costly = problem
    return make_plan(operation, layout, shape, itemsize, device, costly, tuned)


def source(plan: Plan) -> str:
    assert plan.estimate is not None
    return plan.estimate.source


def assert_modelled(problem: Problem = LAYER, device: Device = GPU) -> None:
    """The plan is the model's, exactly, and says so."""
    plan = plan_of(problem, device)
    assert plan == plan_of(problem, device, tuned=False)
    assert plan.choice != MEASURED
    assert source(plan) == "the model"


def assert_ignored(*words: str) -> None:
    """The user's table is told of once, not per look-up nor per shape, and every plan is the model's."""
    tables.forget()
    with told(1, "is ignored", *words):
        for problem in (LAYER, OTHER, LAYER):
            assert_modelled(problem)
        assert_modelled(LAYER, PLAIN)


def row(**changes: Any) -> dict[str, Any]:
    """A valid entry but for the changes."""
    return MEASURED._asdict() | {"us": 120.0, "before_us": 150.0} | changes


def content(entry: Any = None, **changes: Any) -> dict[str, Any]:
    """What a file for the layer holds, but for the changes."""
    header = {"format": 1, "tritonbn": __version__, "gpu": GPU.name, "sms": GPU.sms}
    return header | {"plans": {key(OTHER): row(), key(LAYER): row() if entry is None else entry}} | changes


def without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {n: value for n, value in mapping.items() if n != name}


# What is used, and from where.


def test_the_tests_leave_the_users_tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    given = store.user_folder()
    assert given is not None
    assert given.parent == Path(tempfile.gettempdir())
    assert given.name.startswith("tritonbn-tests-")


def test_a_file_as_it_is_written(file: Path) -> None:
    file.write_text(json.dumps(content()))
    assert file.name == f"NVIDIA-H200-{__version__}.json"
    with told(0):
        plan = plan_of()
    assert (plan.choice, plan.path, plan.splits, source(plan)) == (MEASURED, "split", 5, "the user's table")
    assert plan.tile.BLOCK_R == 2
    assert_modelled(LAYER._replace(itemsize=4))


def test_save_writes_what_is_read() -> None:
    assert_modelled()
    written = tables.save(GPU, {key(LAYER): ENTRY})
    assert written is not None
    assert source(plan_of()) == "the user's table", "plans that were made before are made again"
    tables.save(GPU, {key(OTHER): ENTRY._replace(us=1, before_us=2.5)})
    held = json.loads(written.read_text())
    assert held == content() | {"plans": {key(LAYER): row(), key(OTHER): row(us=1, before_us=2.5)}}
    assert sorted(path.name for path in written.parent.iterdir()) == sorted(
        [written.name, written.with_suffix(".lock").name]
    )


def test_this_process_comes_before_the_user_before_the_library(file: Path) -> None:
    choices = [MEASURED._replace(splits=splits) for splits in (6, 7, 8)]
    for choice, target in zip(choices[:2], (tables.SHIPPED, None), strict=True):
        tables.save(GPU, {key(LAYER): Entry(choice, 2.0, 3.0)}, target)
        assert plan_of().choice == choice
    tables.remember(GPU, {key(LAYER): Entry(choices[2], 2.0, 3.0)})
    assert (plan_of().choice, source(plan_of())) == (choices[2], "tuned in this process")
    tables.forget()
    assert (plan_of().choice, source(plan_of())) == (choices[1], "the user's table")
    file.unlink()
    tables.forget()
    assert (plan_of().choice, source(plan_of())) == (choices[0], "the library's table")


def test_what_was_tuned_alone_is_used_beside_other_processes_too(file: Path) -> None:
    """But for plans whose programs wait for each other: then what was measured next best, at last the model."""
    tables.remember(GPU, {key(LAYER): ENTRY})
    assert (plan_of(device=PLAIN).choice, source(plan_of(device=PLAIN))) == (MEASURED, "tuned in this process")
    waiting = Choice("stream", 2, 1024, 8, splits=2, slots=1)
    tables.remember(GPU, {key(LAYER): Entry(waiting, 2.0, 3.0)})
    assert plan_of().choice == waiting
    assert_modelled(LAYER, PLAIN)
    tables.save(GPU, {key(LAYER): ENTRY})
    assert (plan_of().choice, source(plan_of())) == (waiting, "tuned in this process")
    assert (plan_of(device=PLAIN).choice, source(plan_of(device=PLAIN))) == (MEASURED, "the user's table")


def test_a_gpu_does_not_read_the_table_of_another() -> None:
    tables.save(GPU, {key(LAYER): ENTRY})
    with told(0):
        assert_modelled(LAYER, Device("NVIDIA H100 80GB HBM3", 132))


@pytest.mark.parametrize("us", [float("nan"), float("inf"), 0.0, -1.0, True, "2", None, 10**400], ids=str)
def test_save_refuses_what_no_reader_would_take(us: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="us must be a positive number of microseconds, but got "):
        tables.save(GPU, {key(LAYER): Entry(MEASURED, us, 1.0)})
    with pytest.raises(ValueError, match="splits must be an integer from 1 to 65535, but got 0"):
        tables.save(GPU, {key(LAYER): Entry(MEASURED._replace(splits=0), 1.0, 1.0)})
    assert not folder.exists()


@pytest.mark.parametrize("shipped", sorted(tables.SHIPPED.glob("*.json")), ids=lambda path: path.name)
def test_the_librarys_tables_are_read(shipped: Path) -> None:
    device = Device(*(json.loads(shipped.read_text())[name] for name in ("gpu", "sms")))
    assert shipped == tables.path(shipped.parent, device), "named after the GPU and this version"
    with told(0):
        assert tables._load(shipped, device.gpu)


# What is in the file.


def test_every_prefix_of_a_file_is_ignored(file: Path) -> None:
    tables.save(GPU, {key(LAYER): ENTRY, key(OTHER): ENTRY})
    text = file.read_text()
    for end in range(len(text)):
        file.write_text(text[:end])
        assert_ignored(str(file))
    file.write_text(text)
    tables.forget()
    assert plan_of().choice == MEASURED


def damaged(text: bytes) -> st.SearchStrategy[bytes]:
    """The text with some bytes replaced by others, or other bytes altogether."""
    place = st.integers(0, len(text) - 1)
    cut = st.tuples(place, st.integers(0, 4), st.binary(max_size=4))
    return st.binary(max_size=200) | cut.map(lambda c: text[: c[0]] + c[2] + text[c[0] + c[1] :])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damaged(json.dumps(content()).encode()))
def test_any_bytes_give_a_sound_plan(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    tables.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plans = [(plan_of(problem), plan_of(problem, tuned=False)) for problem in (LAYER, OTHER)]
    assert len(caught) <= 1
    for plan, modelled in plans:
        assert_sound(plan, GPU, LARGEST_TILE)
        assert plan == modelled or (not caught and source(plan) == "the user's table")


@pytest.mark.parametrize(
    "text",
    ["", "null", "true", "1", "NaN", '"text"', "[]", "[[1]]", "{}", "[" * 100_000, '{"a":' * 100_000, "1" * 5000,
     '{"format": 1' + "0" * 5000 + "}", "\ufeff{}", '"\\ud800"', "{'format': 1}", "\0" * 100],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_json_of_another_kind(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    assert_ignored(str(file))


def test_text_that_is_not_unicode(file: Path) -> None:
    file.write_bytes(json.dumps(content()).encode("utf-16"))
    assert_ignored("decode")


@pytest.mark.parametrize("plans", [None, True, 1, 1.5, "text", [], [row()], [[key(LAYER), row()]]], ids=repr)
def test_plans_of_another_kind(plans: Any, file: Path) -> None:
    file.write_text(json.dumps(content(plans=plans)))
    assert_ignored()


@pytest.mark.parametrize(
    "entry", [False, 1, 1.5, "text", [], {}, list(row().values()), [row()], {"a": row()}], ids=repr
)
def test_entry_of_another_kind(entry: Any, file: Path) -> None:
    file.write_text(json.dumps(content(entry)))
    assert_ignored()


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", value) for value in (0, 2, True, 1.0, "1", None, [1])]
    + [("tritonbn", value) for value in ("0.0.9", "0.1", __version__ + ".post1", 0.1, None)]
    + [("gpu", value) for value in ("NVIDIA H100 80GB HBM3", "nvidia h200", "", None, ["NVIDIA H200"], "\ud800")]
    + [("sms", value) for value in (78, -132, 132.0, "132", None, True)],
    ids=repr,
)
def test_file_of_another_format_version_or_gpu(name: str, value: Any, file: Path) -> None:
    file.write_text(json.dumps(content(**{name: value})))
    assert_ignored(f"expected {name} ", f"got {value!r}")


@pytest.mark.parametrize("name", ["format", "tritonbn", "gpu", "sms", "plans"])
def test_file_without(name: str, file: Path) -> None:
    file.write_text(json.dumps(without(content(), name)))
    assert_ignored(f"KeyError: '{name}'")


NUMBERS = ["block_r", "block_l", "num_warps", "splits", "apply_tiles", "slots", "stages"]
NAN = float("nan")
NOT_INTEGERS: list[Any] = [-1, 1.0, 2.5, True, "4", None, [4], {}, 1 << 40, NAN]
NOT_PATHS: list[Any] = ["fast", "", "Split", "cluster", None, 1, True, ["split"], {}]
NOT_TIMES: list[Any] = [0, -1.0, True, "2", None, NAN, 10**400]
BAD: list[tuple[str, Any]] = [
    *((name, value) for name in NUMBERS for value in NOT_INTEGERS),
    *((name, 0) for name in NUMBERS if name != "slots"),
    *((name, 3) for name in ("block_r", "block_l", "num_warps")),
    *(("path", value) for value in NOT_PATHS),
    *((name, value) for name in ("us", "before_us") for value in NOT_TIMES),
    ("num_warps", 32), ("splits", 65536), ("apply_tiles", 65536), ("slots", 65536), ("stages", 9),
    ("us", float("inf")), ("before_us", [2.0]), ("us", 1e12),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:16])
def test_one_bad_value_and_the_file_is_ignored(name: str, value: Any, file: Path) -> None:
    """The good entry too: whoever wrote the bad one is not to be trusted with it."""
    file.write_text(json.dumps(content(row(**{name: value}))))
    assert_ignored()


@pytest.mark.parametrize("name", [*row()])
def test_entry_without(name: str, file: Path) -> None:
    file.write_text(json.dumps(content(without(row(), name))))
    assert_ignored(f"KeyError: '{name}'")


@pytest.mark.parametrize("remark", [{"remark": "measured at night"}, {"ctas": 1}], ids=repr)
def test_remarks_are_welcome(remark: dict[str, Any], file: Path) -> None:
    """A field that nothing reads changes nothing, such as one of former versions, which was 1 for each path that is
    left; what would change the meaning comes with another format.
    """
    file.write_text(json.dumps(content(row(**remark), date="today")))
    with told(0):
        assert plan_of().choice == MEASURED


# What a file cannot know: the size and the device.

UNSUITABLE = {
    "tile-larger-than-registers": (MEASURED._replace(block_r=256, block_l=4096), LAYER, GPU),
    "tile-that-splits-a-byte-of-bits": (MEASURED._replace(block_l=4), LAYER, GPU),
    "channels-that-split-a-byte-of-bits": (MEASURED._replace(block_l=4), OTHER, GPU),
    "column-of-one-lane": (MEASURED._replace(block_l=1), OTHER, GPU),
    "more-stages-than-shared-memory": (MEASURED._replace(block_r=16, stages=4), LAYER, GPU),
    "share-of-two-tiles": (Choice("cooperative", 2, 1024, 4, splits=5), LAYER, GPU),
    "cooperative-without-room": (Choice("cooperative", 1, 1024, 1, splits=65535), LAYER, GPU),
    "stream-without-room": (Choice("stream", 1, 1024, 16, splits=3, slots=64), LAYER, GPU),
    "cooperative-without-cooperation": (Choice("cooperative", 32, 512, 8, splits=2), SMALL, PLAIN),
    "stream-without-cooperation": (Choice("stream", 2, 1024, 8, splits=2, slots=1), LAYER, PLAIN),
    "inference-as-one-launch": (MEASURED._replace(path="single"), LAYER._replace(operation="inference"), GPU),
    "inference-as-a-stream": (MEASURED._replace(path="stream"), LAYER._replace(operation="inference"), GPU),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUITABLE)
def test_measured_plan_that_cannot_run_here(name: str) -> None:
    """Silently the model's: a table is for sizes near the one measured, and for the interpreter too."""
    choice, problem, device = UNSUITABLE[name]
    with told(0):
        tables.save(device, {key(problem): Entry(choice, 1.0, 2.0), key(LAYER._replace(itemsize=4)): ENTRY})
        found = tables.find(problem, device)
        assert found == [(choice, "the user's table")]
        assert_modelled(problem, device)
        assert plan_of(LAYER._replace(itemsize=4), device).choice == MEASURED


@pytest.mark.parametrize(
    ("choice", "problem", "device"),
    [(Choice("cooperative", 32, 512, 8, splits=2), SMALL, GPU),
     (Choice("stream", 2, 1024, 8, splits=2, slots=1), LAYER, GPU),
     (MEASURED._replace(stages=4), LAYER, GPU), (MEASURED, LAYER._replace(operation="inference"), GPU)],
    ids=["cooperative", "stream", "stages", "inference"],
)  # fmt: skip
def test_measured_plan_that_can(choice: Choice, problem: Problem, device: Device) -> None:
    """So that the refusals above are for the reason they are named after."""
    tables.save(device, {key(problem): Entry(choice, 1.0, 2.0)})
    plan = plan_of(problem, device)
    assert plan.choice == choice
    assert_sound(plan, device, LARGEST_TILE)


def test_offsets_into_the_workspace_stay_below_32_bits() -> None:
    """65535 partials of 3 x 16384 values would not: half as many programs have two tiles each."""
    problem = Problem("forward", "rows", (1 << 16, 1 << 14, 1), 2)
    tables.remember(GPU, {key(problem): Entry(Choice("split", 1, 64, 1, splits=65535), 1.0, 2.0)})
    plan = plan_of(problem)
    assert (source(plan), plan.splits, plan.reduce_tiles) == ("tuned in this process", 1 << 15, 2)
    assert_sound(plan, GPU, LARGEST_TILE)


CHOICES = st.builds(
    Choice,
    path=st.sampled_from(["single", "cooperative", "stream", "split"]),
    block_r=st.integers(0, 20).map(lambda bit: 1 << bit) | st.sampled_from([1, 2, 4, 8, 16]),
    block_l=st.integers(0, 20).map(lambda bit: 1 << bit) | st.sampled_from([8, 64, 128, 512]),
    num_warps=st.integers(0, 4).map(lambda bit: 1 << bit),
    splits=st.integers(1, 64) | st.integers(1, 65535),
    apply_tiles=st.integers(1, 64) | st.integers(1, 65535),
    slots=st.integers(0, 8) | st.integers(0, 65535),
    stages=st.integers(1, 8),
)
ROWS = st.tuples(st.integers(1, 1 << 20), st.integers(1, 1 << 14), st.just(1))
PLANES = st.tuples(st.integers(1, 512), st.integers(1, 700), st.integers(1, 5000))


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    choice=CHOICES,
    layout_and_shape=st.tuples(st.just("rows"), ROWS) | st.tuples(st.just("planes"), PLANES),
    operation=st.sampled_from(["forward", "backward", "inference"]),
    itemsize=st.sampled_from([2, 4, 8]),
    costly=st.booleans(),
    sms=st.integers(1, 200),
    cooperative=st.booleans(),
)
def test_any_choice_runs_soundly_or_not_at_all(
    choice: Choice, layout_and_shape: tuple[Any, Any], operation: Any, itemsize: int, costly: bool, sms: int,
    cooperative: bool,
) -> None:  # fmt: skip
    choice.check()
    device = Device("x", sms, cooperative=cooperative)
    problem = Problem(operation, *layout_and_shape, itemsize, costly)
    tables.forget()
    tables.remember(device, {key(problem): Entry(choice, 1.0, 2.0)})
    plan = plan_of(problem, device)
    event(f"{choice.path}: {source(plan)}")
    if source(plan) == "tuned in this process":
        assert (plan.choice, plan.path, plan.num_warps) == (choice, choice.path, choice.num_warps)
        assert_sound(plan, device, LARGEST_TILE)
    else:
        assert_modelled(problem, device)


# Buckets.


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("C", [64, 100, 512])
@pytest.mark.parametrize("S", [49, 196, 784, 3136])
def test_a_ragged_last_batch_finds_what_was_measured_for_whole_ones(layout: Any, C: int, S: int) -> None:
    shapes = [(n, C, S) if layout == "planes" else (n * S, C, 1) for n in (256, 250)]
    whole, ragged = (Problem("forward", layout, shape, 2) for shape in shapes)
    assert key(whole) == key(ragged)
    choice = MEASURED._replace(splits=3)
    tables.remember(GPU, {key(whole): Entry(choice, 1.0, 2.0)})
    plan = plan_of(ragged)
    assert (plan.choice, plan.shape, source(plan)) == (choice, ragged.shape, "tuned in this process")
    assert_sound(plan, GPU, LARGEST_TILE)


def test_the_name_of_a_bucket() -> None:
    assert key(LAYER) == "forward/planes/16-bit/lanes=256/vector=8/C~64/M~741455"
    assert key(OTHER._replace(costly=True)) == "backward-costly/rows/16-bit/lanes=64/vector=8/C~1024/M~4096"
    assert key(Problem("forward", "rows", (60, 100, 1), 2)) == (
        "forward/rows/16-bit/lanes=100x1x2/vector=8/C~91/M~64"
    )  # fmt: skip
    assert key(Problem("forward", "planes", (1, 1, 1), 8)) == "forward/planes/64-bit/lanes=1/vector=1/C~1/M~1"


@pytest.mark.parametrize(
    "other",
    [LAYER._replace(layout="rows", shape=(256 * 3136, 64, 1)), LAYER._replace(itemsize=4),
     LAYER._replace(operation="backward"), LAYER._replace(operation="inference"),
     LAYER._replace(operation="backward", costly=True), LAYER._replace(shape=(256, 128, 3136)),
     LAYER._replace(shape=(256, 32, 3136)), LAYER._replace(shape=(128, 64, 3136)),
     LAYER._replace(shape=(512, 64, 3136)), LAYER._replace(shape=(256, 64, 3137))],
    ids=["layout", "dtype", "backward", "inference", "costly", "channels-double", "channels-half", "batch-half",
         "batch-double", "odd-plane"],
)  # fmt: skip
def test_what_was_measured_for_another_kind_is_not_found(other: Problem) -> None:
    tables.remember(GPU, {key(LAYER): ENTRY})
    assert key(other) != key(LAYER)
    assert tables.find(other, GPU) == []


def test_costly_is_a_bucket_of_its_own() -> None:
    assert key(OTHER) != key(OTHER._replace(costly=True))


# The file system.


@contextmanager
def not_root() -> Iterator[None]:
    """Permissions hold for us."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@contextmanager
def folder_with(mode: int, monkeypatch: pytest.MonkeyPatch, file_mode: int = 0o644) -> Iterator[Path]:
    """The user's folder with a table, of those modes, in one that all may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "cache"
        monkeypatch.setattr(tables, "SHIPPED", Path(name) / "shipped")
        monkeypatch.setenv("TRITONBN_CACHE_DIR", str(folder))
        tables.save(GPU, {key(LAYER): ENTRY})
        tables.forget()
        tables.path(folder, GPU).chmod(file_mode)
        folder.chmod(mode)
        try:
            with not_root():
                yield folder
        finally:
            folder.chmod(0o755)


def assert_not_kept(*words: str) -> None:
    """What is tuned cannot be saved, told of once, but works in this process."""
    entries = {key(OTHER): ENTRY}
    with told(1, "tuned plans are not kept", *words):
        assert tables.save(GPU, entries) is None
        assert tables.save(GPU, entries) is None
    tables.remember(GPU, entries)
    assert (plan_of(OTHER).choice, source(plan_of(OTHER))) == (MEASURED, "tuned in this process")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_read_only_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_with(0o555, monkeypatch) as folder:
        assert plan_of().choice == MEASURED, "it can be read"
        assert_not_kept(str(folder), "Permission denied")
        assert plan_of().choice == MEASURED
        assert len(list(folder.iterdir())) == 2, "nothing but the table and its lock"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_folder_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_with(0o000, monkeypatch):
        assert_ignored("Permission denied")
        assert_not_kept("Permission denied")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_with(0o755, monkeypatch, 0o000):
        assert_ignored("Permission denied")


def test_folder_in_place_of_the_file(file: Path) -> None:
    file.mkdir()
    assert_ignored("Is a directory")
    assert_not_kept(str(file), "directory")
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == [], "no leftovers"


def test_folder_in_place_of_the_lock(file: Path) -> None:
    file.with_suffix(".lock").mkdir()
    assert_modelled()
    assert_not_kept("Is a directory")


def test_file_in_place_of_the_folder(folder: Path) -> None:
    folder.write_text("a file")
    assert_ignored("Not a directory")
    assert_not_kept(str(folder))
    assert folder.read_text() == "a file"


def test_link_to_nowhere(file: Path) -> None:
    file.symlink_to(file.parent / "nowhere")
    with told(0):
        assert_modelled()
        assert tables.save(GPU, {key(LAYER): ENTRY}) == file
    assert plan_of().choice == MEASURED


@pytest.mark.usefixtures("file")
def test_gpu_with_a_name_too_long_for_a_file() -> None:
    device = Device("x" * 300, 132)
    with told(1, "name too long"):
        assert_modelled(LAYER, device)
    with told(1, "tuned plans are not kept"):
        assert tables.save(device, {key(LAYER): ENTRY}) is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "/dev/null", "NVIDIA  H200 (rev. 2)", "", "é", "a\0b\n"])
def test_no_name_of_a_gpu_leaves_the_folder(name: str, folder: Path) -> None:
    device = Device(name, 132)
    file = tables.save(device, {key(LAYER): ENTRY})
    assert file is not None
    assert file.parent == folder
    assert plan_of(LAYER, device).choice == MEASURED


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TRITONBN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert store.user_folder() is None
    with told(0):
        assert_modelled()
    assert_not_kept("no home folder", "TRITONBN_CACHE_DIR")
    tables.save(GPU, {key(LAYER): ENTRY}, tables.SHIPPED)
    tables.forget()
    assert source(plan_of()) == "the library's table"


def test_where_the_users_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("TRITONBN_CACHE_DIR", "")
    assert store.user_folder() == tmp_path / ".cache" / "tritonbn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.user_folder() == tmp_path / "xdg" / "tritonbn"
    monkeypatch.setenv("TRITONBN_CACHE_DIR", str(tmp_path / "ours"))
    assert store.user_folder() == tmp_path / "ours"


def test_save_replaces_a_file_that_is_ignored(file: Path) -> None:
    file.write_text("{")
    with told(1, "is ignored"):
        assert_modelled()
        assert tables.save(GPU, {key(LAYER): ENTRY}) == file
        assert plan_of().choice == MEASURED
    assert json.loads(file.read_text())["plans"] == {key(LAYER): row()}


# Other processes, without torch: what they import starts in no time.

PRELUDE = """
import json, os, signal, sys, time, types, warnings
from pathlib import Path
package = types.ModuleType("tritonbn")
package.__path__ = [sys.argv[1]]
sys.modules["tritonbn"] = package
from tritonbn import store, tables
from tritonbn.choice import Choice
from tritonbn.device import Device
from tritonbn.tables import Entry
warnings.simplefilter("error")
GPU, go, stop = Device("NVIDIA H200", 132), Path(sys.argv[2]), Path(sys.argv[3])
def entry(splits):
    return Entry(Choice("split", 2, 1024, 4, splits=splits), 120.0, 150.0)
"""
WRITER = """
me, rounds = int(sys.argv[4]), int(sys.argv[5])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for i in range(rounds):
    assert tables.save(GPU, {f"writer {me}, entry {i}": entry(1 + 100 * me + i)}) is not None
"""
READER = """
file, held, reads = tables.path(store.user_folder(), GPU), 0, 0
print("ready", flush=True)
while not stop.exists():
    entries = tables._load(file, GPU.gpu)  # a torn file would be told of, and warnings are errors
    assert len(entries) >= held, f"{held} entries became {len(entries)}"
    held, reads = len(entries), reads + 1
print(json.dumps([held, reads]))
"""
KILLED = """
Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
tables.save(GPU, {"lost": entry(9)})
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process with a script and arguments; all have ended when the test has."""
    processes = []

    def started(script: str, *arguments: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PRELUDE + script, str(ROOT / "tritonbn"), str(tmp_path / "go")]
        processes.append(
            subprocess.Popen(
                [*command, str(tmp_path / "stop"), *map(str, arguments)], stdout=subprocess.PIPE, text=True
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def test_eight_writers_and_a_reader(start: Callable[..., subprocess.Popen[str]], tmp_path: Path, folder: Path) -> None:
    """No entry is lost, and no reader ever sees less than a whole file."""
    rounds = 20
    reader = start(READER)
    writers = [start(WRITER, me, rounds) for me in range(8)]
    for process in (reader, *writers):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    assert [writer.wait(60) for writer in writers] == [0] * 8
    (tmp_path / "stop").touch()
    told_by_reader = json.loads(reader.communicate(timeout=60)[0])
    assert reader.returncode == 0
    assert told_by_reader[0] == 8 * rounds
    assert told_by_reader[1] > rounds
    file = tables.path(folder, GPU)
    splits = {name: entry["splits"] for name, entry in json.loads(file.read_text())["plans"].items()}
    assert splits == {f"writer {me}, entry {i}": 1 + 100 * me + i for me in range(8) for i in range(rounds)}
    assert sorted(path.name for path in folder.iterdir()) == sorted([file.name, file.with_suffix(".lock").name])


def test_writer_killed_before_the_file_is_replaced(start: Callable[..., subprocess.Popen[str]], folder: Path) -> None:
    tables.save(GPU, {key(LAYER): ENTRY})
    file = tables.path(folder, GPU)
    before = file.read_bytes()
    assert start(KILLED).wait(60) == -signal.SIGKILL
    assert file.read_bytes() == before
    assert len(list(folder.iterdir())) == 3, "the table, its lock and what was left"
    with told(0):
        tables.forget()
        assert plan_of().choice == MEASURED
        assert tables.save(GPU, {key(OTHER): ENTRY}) == file, "its lock went with it"
    assert set(json.loads(file.read_text())["plans"]) == {key(LAYER), key(OTHER)}


def test_a_writer_waits_for_another_one(file: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no locks of this kind here")
    writer = threading.Thread(target=tables.save, args=(GPU, {key(LAYER): ENTRY}))
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer.start()
        time.sleep(0.2)
        assert writer.is_alive()
        assert not file.exists()
    writer.join(60)
    assert file.exists()


def test_where_there_are_no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fcntl", None)
    tables.save(GPU, {key(LAYER): ENTRY})
    tables.save(GPU, {key(OTHER): ENTRY})
    assert plan_of().choice == plan_of(OTHER).choice == MEASURED


def test_write_that_fails_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say."""
    tables.save(GPU, {key(LAYER): ENTRY})
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    assert_not_kept("No space left on device")
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 2
    assert plan_of().choice == MEASURED
