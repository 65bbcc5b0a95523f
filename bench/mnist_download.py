"""MNIST from a public mirror, kept in a cache of whole and checked files only."""

import hashlib
import http.client
import os
import queue
import threading
import urllib.request
import zlib
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from bench import idx
from bench.console import console
from bench.files import atomic

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
# Of the unpacked files: mirrors compress them differently.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SECONDS_TO_ANSWER = 5.0  # per mirror: without a network the benchmark starts after ten seconds at most
CHUNK = 1 << 16


class DownloadError(Exception):
    """No mirror gave the original file."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "tritonbn" / "mnist"


def is_original(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256[name]


def cached_or_downloaded() -> tuple[list[bytes], str]:
    """The four files unpacked, and in words where they came from."""
    folder, mirrors = cache_folder(), list(MIRRORS)
    contents = {name: cached(folder, name) for name in SHA256}
    missing = [name for name, content in contents.items() if content is None]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name in missing:
            packed = download(name, mirrors, progress)
            keep(folder / f"{name}.gz", packed)
            contents[name] = idx.unpacked(packed)
    origin = f"from {urlsplit(mirrors[0]).netloc}" if missing else f"from the cache {folder}"
    return [content for content in contents.values() if content is not None], origin


def cached(folder: Path, name: str) -> bytes | None:
    try:
        content = idx.unpacked((folder / f"{name}.gz").read_bytes())
    except (OSError, EOFError, zlib.error):
        return None
    return content if is_original(name, content) else None


def keep(path: Path, packed: bytes) -> None:
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(packed)
    except OSError as error:
        console.print(f"Not kept for the next run: {path} ({error.strerror})", soft_wrap=True)


def download(name: str, mirrors: list[str], progress: Progress) -> bytes:
    """The packed file from the first mirror that has it; a mirror that fails is not asked again."""
    reasons = []
    while mirrors:
        try:
            packed = fetch(f"{mirrors[0]}{name}.gz", name, progress)
            if is_original(name, idx.unpacked(packed)):
                return packed
            reason = f"{name} has a wrong checksum"
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        reasons.append(f"{urlsplit(mirrors.pop(0)).netloc}: {reason}")
    raise DownloadError("; ".join(reasons) or "no mirror left")


def fetch(url: str, name: str, progress: Progress) -> bytes:
    packed = bytearray()
    with answer(url, SECONDS_TO_ANSWER) as response:
        task = progress.add_task(name, total=int(response.headers.get("Content-Length") or 0) or None)
        try:
            while chunk := response.read(CHUNK):
                packed += chunk
                progress.advance(task, len(chunk))
        except BaseException:
            progress.remove_task(task)
            raise
    return bytes(packed)


def answer(url: str, seconds: float) -> Any:
    """urlopen with a time limit that covers the look-up of the name too, which a socket's does not."""
    result: queue.Queue[IO[bytes] | Exception] = queue.Queue()

    def ask() -> None:
        try:
            result.put(urllib.request.urlopen(url, timeout=seconds))
        except Exception as error:  # handed on to the thread that waits
            result.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = result.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(response, Exception):
        raise response
    return response
