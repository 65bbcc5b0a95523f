"""Measured constants of a GPU: of this process, and in the user's folder. Only `calibrate` writes them. Pure Python."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from tritonbn import store, tables
from tritonbn.device import Constants, Device
from tritonbn.store import Gpu

FORMAT = 1
_measured: dict[Gpu, Constants] = {}


def find(device: Device) -> Constants | None:
    """What was measured on a GPU like that, by this process or by another one; None if nothing was."""
    if (constants := _measured.get(device.gpu)) is not None:
        return constants
    folder = store.user_folder()
    return None if folder is None else _read(path(folder, device), device.gpu)


def remember(device: Device, constants: Constants) -> None:
    """Have `find` answer with these in this process. Raises ValueError for what no GPU does."""
    constants.check()
    _measured[device.gpu] = constants
    tables.changed(written=True)


def forget() -> None:
    """Drop what was measured in this process."""
    _measured.clear()
    reread()


def reread() -> None:
    """Look at the file again."""
    _read.cache_clear()
    tables.changed(written=True)


def path(folder: Path, device: Device) -> Path:
    """The file of a GPU: in a folder of its own within that of the tables."""
    return store.path(folder / "calibration", device.name)


def write(file: Path, device: Device, constants: Constants) -> None:
    """Replace the file, whole or not at all; its folder is there. Raises OSError."""
    content = constants._asdict() | {"factors": dict(constants.factors)}
    store.write(file, store.header(FORMAT, device.gpu), {"constants": content})
    reread()


@lru_cache(maxsize=64)
def _read(file: Path, gpu: Gpu) -> Constants | None:
    return store.read(file, store.header(FORMAT, gpu), "calibration", _parse)


def _parse(content: Any) -> Constants:
    fields = {name: content["constants"][name] for name in Constants._fields}
    constants = Constants(**fields | {"factors": tuple(fields["factors"].items())})
    constants.check()
    return constants
