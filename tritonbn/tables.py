"""Measured plans: what was tuned in this process, the user's cache, and the tables that come with the library.

A table is a JSON file per GPU name. Only `tritonbn.tune` and `python -m bench tune` write one. A file that cannot be
read, or is not for this GPU and version, is told of once and otherwise as if it were not there: all of it where one
entry is wrong, for files are written whole and someone else had a hand in this one. Pure Python.
"""

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

from tritonbn.choice import Choice, Problem
from tritonbn.device import Device
from tritonbn.version import __version__

try:
    import fcntl
except ImportError:  # pragma: no cover  # not a POSIX system: the last of several writers wins
    fcntl = None  # type: ignore[assignment]

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


_tuned: dict[tuple[tuple[str, int], str], Entry] = {}
_told: set[tuple[str, Path]] = set()
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
    return f"{kind}/lanes={lanes}/vector={tile.V}/C~{_half_octave(C)}/M~{_half_octave(N * S)}"


def _half_octave(n: int) -> int:
    return round(2 ** (round(2 * log2(n)) / 2))


def find(problem: Problem, device: Device) -> list[tuple[Choice, str]]:
    """The measured choices for a problem of this kind, each with where it is from, the first one first.

    A choice may be one that cannot run here: of a near size, or of a process that was alone on the GPU.
    """
    name, found = key(problem), []
    if (tuned := _tuned.get((device.gpu, name))) is not None:
        found.append((tuned.choice, "tuned in this process"))
    for folder, origin in ((user_folder(), "the user's table"), (SHIPPED, "the library's table")):
        if folder is not None and (entry := _read(path(folder, device), device.gpu).get(name)) is not None:
            found.append((entry.choice, origin))
    return found


def remember(device: Device, entries: dict[str, Entry]) -> None:
    """Have `find` answer with these in this process."""
    _tuned.update({(device.gpu, name): entry for name, entry in entries.items()})
    changed(written=True)


def forget() -> None:
    """Read files again, and drop what was tuned in this process."""
    _tuned.clear()
    _told.clear()
    _read.cache_clear()
    changed(written=True)


def user_folder() -> Path | None:
    """$TRITONBN_CACHE_DIR, or tritonbn in the user's cache folder; None for a user without a home."""
    if given := os.environ.get("TRITONBN_CACHE_DIR"):
        return Path(given)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "tritonbn"
    try:
        return Path.home() / ".cache" / "tritonbn"
    except RuntimeError:
        return None


def path(folder: Path, device: Device) -> Path:
    """The file of a GPU in a folder."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', device.name).strip('-')}-{__version__}.json"


def save(device: Device, entries: dict[str, Entry], folder: Path | None = None) -> Path | None:
    """Add entries to the file of the GPU, whole or not at all, beside those of other processes; None if it cannot be.

    What cannot be written is told of once. Raises ValueError for entries that no reader would take.
    """
    for entry in entries.values():
        entry.check()
    folder = folder or user_folder()
    if folder is None:
        _tell("write", Path(), "tuned plans are not kept: there is no home folder, set TRITONBN_CACHE_DIR")
        return None
    file = path(folder, device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            _write(file, device, _load(file, device.gpu) | entries)
    except OSError as error:
        _tell("write", file, f"tuned plans are not kept: cannot write {file}: {error.strerror}")
        return None
    _read.cache_clear()
    changed(written=True)
    return file


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among the processes that write this file."""
    with file.with_suffix(".lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(file: Path, device: Device, entries: dict[str, Entry]) -> None:
    rows = {n: e.choice._asdict() | {"us": e.us, "before_us": e.before_us} for n, e in sorted(entries.items())}
    content = {"format": FORMAT, "tritonbn": __version__, "gpu": device.name, "sms": device.sms, "plans": rows}
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-", suffix=".json")
    try:
        with os.fdopen(handle, "w") as temporary:
            json.dump(content, temporary, indent=1)
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@lru_cache(maxsize=64)
def _read(file: Path, gpu: tuple[str, int]) -> dict[str, Entry]:
    """`_load`, once."""
    return _load(file, gpu)


def _load(file: Path, gpu: tuple[str, int]) -> dict[str, Entry]:
    """The entries of a file, empty if there is none; with a warning, once, if it is not what it should be."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(file, str(error))
    try:
        content = json.loads(text)
        for name, expected in (
            ("format", FORMAT),
            ("tritonbn", __version__),
            ("gpu", gpu[0]),
            ("sms", gpu[1]),
        ):
            if content[name] != expected or type(content[name]) is not type(expected):
                return _ignored(file, f"expected {name} {expected!r}, got {content[name]!r}")
        return {str(name): _entry(row) for name, row in content["plans"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _ignored(file, f"{type(error).__name__}: {error}")


def _ignored(file: Path, why: str) -> dict[str, Entry]:
    _tell("read", file, f"the table of tuned plans {file} is ignored: {why}")
    return {}


def _tell(what: str, file: Path, message: str) -> None:
    """Warn, but once per file."""
    if (what, file) not in _told:
        _told.add((what, file))
        warnings.warn(message, stacklevel=3)


def _entry(row: dict[str, Any]) -> Entry:
    """The entry of a row; fields beside its own are remarks, for what changes the meaning changes FORMAT."""
    entry = Entry(Choice(**{name: row[name] for name in Choice._fields}), row["us"], row["before_us"])
    entry.check()
    return entry
