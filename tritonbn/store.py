"""JSON files of measurements, one per GPU and version: written whole, under a lock, and checked before they are used.

A file that cannot be read, or is of another GPU, version or format, is told of once and otherwise as if it were not
there: all of it where one entry is wrong, for files are written whole and someone else had a hand in this one. Pure
Python.
"""

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tritonbn.version import __version__

try:
    import fcntl
except ImportError:  # pragma: no cover  # not a POSIX system: the last of several writers wins
    fcntl = None  # type: ignore[assignment]

Gpu = tuple[str, int]  # its name and the number of its multiprocessors
T = TypeVar("T")

_told: set[tuple[str, Path]] = set()


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


def path(folder: Path, name: str) -> Path:
    """The file of the GPU of that name in a folder."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-{__version__}.json"


@contextmanager
def locked(file: Path, seconds: float | None = None) -> Iterator[bool]:
    """Alone among the processes that write this file; False if it is another's turn for more than `seconds`."""
    with file.with_suffix(".lock").open("w") as lock:
        yield fcntl is None or _acquired(lock, seconds)


def _acquired(lock: Any, seconds: float | None) -> bool:
    if seconds is None:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return True
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # somebody else has it
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        else:
            return True


def write(file: Path, header: dict[str, Any], content: dict[str, Any]) -> None:
    """Replace the file, whole or not at all. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-", suffix=".json")
    try:
        with os.fdopen(handle, "w") as temporary:
            json.dump(header | content, temporary, indent=1)
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def header(number: int, gpu: Gpu) -> dict[str, Any]:
    """What a file of format `number` says first."""
    return {"format": number, "tritonbn": __version__, "gpu": gpu[0], "sms": gpu[1]}


def read(file: Path, first: dict[str, Any], what: str, parse: Callable[[Any], T]) -> T | None:
    """`parse` of a file that begins with `first`; None with a warning, once, if it is no such file."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        why = str(error)
    else:
        try:
            return parse(_checked(json.loads(text), first))
        except _Foreign as error:
            why = str(error)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
    tell("read", file, f"the {what} {file} is ignored: {why}")
    return None


class _Foreign(Exception):
    """The file is of another format, version or GPU."""


def _checked(content: Any, first: dict[str, Any]) -> Any:
    for name, expected in first.items():
        if content[name] != expected or type(content[name]) is not type(expected):
            raise _Foreign(f"expected {name} {expected!r}, got {content[name]!r}")
    return content


def tell(what: str, file: Path, message: str) -> None:
    """Warn, but once per file."""
    if (what, file) not in _told:
        _told.add((what, file))
        warnings.warn(message, stacklevel=3)


def forget() -> None:
    """Tell of every file again."""
    _told.clear()
