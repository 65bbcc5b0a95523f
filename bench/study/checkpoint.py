"""Runs on the disk, each a file that is whole or absent: a killed command goes on where it was."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from bench.console import console
from bench.errors import BenchError
from bench.files import atomic, writable_folder, write_json

SETTINGS = "settings.json"


class Saved(TypedDict):
    """A run after some steps; without `state` and `chance` when it is finished."""

    finished: bool
    step: int
    row: dict[str, Any]  # what was seen so far
    losses: list[float]  # of the steps since the last evaluation
    state: dict[str, Tensor]  # `Trainer.tensors`
    chance: dict[str, Tensor]  # `Trainer.chance`


class Store:
    """The runs in a folder, all with the same settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """BenchError if the folder holds runs with other settings: they must not meet in one table."""
        self.folder = writable_folder(folder)
        path = folder / SETTINGS
        if path.exists():
            different = list(differences(read(path), json.loads(json.dumps(settings))))
            if different:
                raise BenchError(
                    f"{folder}: expected runs with the settings of this command, got others: {'; '.join(different)}. "
                    f"Choose another --out, or delete {folder}"
                )
        else:
            write_json(path, settings)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"

    def save(self, key: str, saved: Saved) -> None:
        with atomic(self.path(key)) as temporary:
            torch.save(saved, temporary)

    def load(self, key: str) -> Saved | None:
        """What was saved; None, with a warning, if it is damaged: then the run begins anew."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as parts:
                if (bad := parts.testzip()) is not None:  # torch.load does not look at checksums
                    raise ValueError(f"{bad} has another checksum")
            found: Saved = torch.load(path, map_location="cpu", weights_only=True)
            if missing := Saved.__annotations__.keys() - found.keys():
                raise ValueError(f"no {', '.join(sorted(missing))}")
        except Exception as error:  # torch and pickle raise many kinds
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            console.print(f"warning: {path} cannot be read ({reason}): this run begins anew", soft_wrap=True)
            return None
        return found


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: expected JSON, got {error}; delete its folder to begin anew") from None


def differences(there: Any, now: Any, name: str = "") -> Iterator[str]:
    """What is not equal, with both values."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*there, *now]):
            yield from differences(there.get(key), now.get(key), f"{name} {key}".strip())
    elif there != now:
        yield f"{name} {json.dumps(there)} there, {json.dumps(now)} now"
