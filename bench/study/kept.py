"""Finished parts of a long run, each in a file of its own: a run of the same settings goes on where the last ended."""

import hashlib
import json
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.files import atomic
from bench.mnist_data import Mnist


def read(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What `write` kept there for the same identity; None if nothing was."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        theirs, found = dict(content["identity"]), dict(content["result"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{path}: expected what this command kept, got {type(error).__name__}: {error}") from None
    if theirs != identity:
        differences = (
            f"{name} {theirs.get(name)!r} instead of {value!r}"
            for name, value in identity.items()
            if theirs.get(name) != value
        )
        raise BenchError(
            f"{path}: kept by a run with {'; '.join(differences)}: expected the same settings, another --out,"
            f" or {path.parent} deleted"
        )
    return found


def write(path: Path, identity: dict[str, Any], result: dict[str, Any]) -> None:
    """Whole or not at all; a NaN stays one, so that what is read is what was written."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"identity": identity, "result": result}))


def digest(data: Mnist) -> str:
    """Of all images and labels: the same pixels in another folder are the same data."""
    found = hashlib.sha256()
    for split in (data.train, data.test):
        found.update(split.images.bool().numpy().tobytes())
        found.update(split.labels.numpy().tobytes())
    return found.hexdigest()
