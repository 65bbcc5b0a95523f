"""Measured plans: what was tuned in this process, the user's cache, and the tables that come with the library.

A table is a JSON file per GPU name, see `store.py`. Only `tritonbn.tune` and `python -m bench tune` write one. Pure
Python.
"""

from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

from tritonbn import store
from tritonbn.choice import Choice, Problem
from tritonbn.device import Device
from tritonbn.store import Gpu

FORMAT = 1
SHIPPED = Path(__file__).parent / "tuned"
MOST_US = 1e12  # no kernel takes a week


class Entry(NamedTuple):
    """A choice, microseconds of it and of the plan that was there before."""

    choice: Choice
    us: float
    before_us: float

    def check(self) -> None:
        """Raise ValueError for what cannot have been measured."""
        self.choice.check()
        for name, value in (("us", self.us), ("before_us", self.before_us)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_US:
                raise ValueError(f"{name} must be a positive number of microseconds, but got {value!r}")


_tuned: dict[tuple[Gpu, str], Entry] = {}
_epoch = 0
_written = 0


def changed(written: bool = False) -> None:
    """Plans may be others from now on; `written`: because tables are."""
    global _epoch, _written
    _epoch += 1
    _written += written


def written() -> int:
    """A number that changes whenever `find` may give another answer."""
    return _written


def epoch() -> int:
    """A number that changes whenever plans may: what was looked up before is to be looked up again."""
    return _epoch


def key(problem: Problem) -> str:
    """What a measured choice holds for: sizes are rounded to half octaves, so a ragged last batch finds it too."""
    N, C, S = problem.view
    tile = problem.geometry[0]
    lanes = f"{tile.GROUP}x{tile.SPAN}x{tile.FOLD}" if tile.SPAN * tile.FOLD > 1 else tile.BLOCK_L
    kind = f"{problem.operation}{'-costly' if problem.costly else ''}/{problem.layout}/{8 * problem.itemsize}-bit"
    vector = f"{tile.access}{'-odd' if tile.ALIGN > 1 else ''}"
    return f"{kind}/lanes={lanes}/vector={vector}/C~{_half_octave(C)}/M~{_half_octave(N * S)}"


def _half_octave(n: int) -> int:
    return round(2 ** (round(2 * log2(n)) / 2))


def find(problem: Problem, device: Device) -> list[tuple[Choice, str]]:
    """The measured choices for a problem of this kind, each with where it is from, the first one first.

    A choice may be one that cannot run here: of a near size, or of a process that was alone on the GPU.
    """
    gpu = device.gpu
    files = _files(gpu)
    if not (_tuned or files):
        return []
    name, found = key(problem), []
    if (tuned := _tuned.get((gpu, name))) is not None:
        found.append((tuned.choice, "tuned in this process"))
    for entries, origin in files:
        if (entry := entries.get(name)) is not None:
            found.append((entry.choice, origin))
    return found


def remember(device: Device, entries: dict[str, Entry]) -> None:
    """Have `find` answer with these in this process."""
    _tuned.update({(device.gpu, name): entry for name, entry in entries.items()})
    changed(written=True)


def forget() -> None:
    """Read files again, and drop what was tuned in this process."""
    _tuned.clear()
    store.forget()
    _files.cache_clear()
    changed(written=True)


def path(folder: Path, device: Device) -> Path:
    """The table of a GPU in a folder."""
    return store.path(folder, device.name)


@lru_cache(maxsize=64)
def _files(gpu: Gpu) -> list[tuple[dict[str, Entry], str]]:
    """What the files of the GPU hold, each with whose it is, without those that hold nothing; read until `forget`."""
    folders = ((store.user_folder(), "the user's table"), (SHIPPED, "the library's table"))
    tables = [(_load(store.path(folder, gpu[0]), gpu), origin) for folder, origin in folders if folder is not None]
    return [(entries, origin) for entries, origin in tables if entries]


def save(device: Device, entries: dict[str, Entry], folder: Path | None = None) -> Path | None:
    """Add entries to the file of the GPU, whole or not at all, beside those of other processes; None if it cannot be.

    What cannot be written is told of once. Raises ValueError for entries that no reader would take.
    """
    for entry in entries.values():
        entry.check()
    folder = folder or store.user_folder()
    if folder is None:
        store.tell("write", Path(), "tuned plans are not kept: there is no home folder, set TRITONBN_CACHE_DIR")
        return None
    file = path(folder, device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with store.locked(file):
            merged = sorted((_load(file, device.gpu) | entries).items())
            rows = {n: e.choice._asdict() | {"us": e.us, "before_us": e.before_us} for n, e in merged}
            store.write(file, store.header(FORMAT, device.gpu), {"plans": rows})
    except OSError as error:
        store.tell("write", file, f"tuned plans are not kept: cannot write {file}: {error.strerror}")
        return None
    _files.cache_clear()
    changed(written=True)
    return file


def _load(file: Path, gpu: Gpu) -> dict[str, Entry]:
    """The entries of a file; none if there is no such file, or it is not what it should be."""
    return store.read(file, store.header(FORMAT, gpu), "table of tuned plans", _parse) or {}


def _parse(content: Any) -> dict[str, Entry]:
    return {str(name): _entry(row) for name, row in content["plans"].items()}


def _entry(row: dict[str, Any]) -> Entry:
    """The entry of a row; fields beside its own are remarks, for what changes the meaning changes FORMAT."""
    entry = Entry(Choice(**{name: row[name] for name in Choice._fields}), row["us"], row["before_us"])
    entry.check()
    return entry
