"""MNIST's file format, read with suspicion: every error names the file, what was expected and what came."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError

SIDE = 28
CLASSES = 10
IMAGE_MAGIC, LABEL_MAGIC = 2051, 2049
GZIP_MAGIC = b"\x1f\x8b"


class Examples(NamedTuple):
    images: NDArray[np.uint8]  # [N, 28, 28]
    labels: NDArray[np.uint8]  # [N]


def unpacked(content: bytes) -> bytes:
    """The bytes themselves, or what is in them when they are a gzip file."""
    return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content


def read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" and not content.startswith(GZIP_MAGIC):
            raise BenchError(f"{path}: is named .gz but is no gzip file")
        return unpacked(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BenchError(f"{path}: expected a whole gzip file, got a corrupt one ({error})") from None
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from None


def header(content: bytes, magic: int, numbers: int, name: str) -> tuple[int, ...]:
    """The numbers after the magic one, all of them big-endian."""
    size = 4 * (1 + numbers)
    if len(content) < size:
        raise BenchError(f"{name}: expected a header of {size} bytes, got {len(content)} bytes in all")
    found, *sizes = struct.unpack(f">{1 + numbers}I", content[:size])
    if found != magic:
        raise BenchError(f"{name}: expected the idx magic number {magic}, got {found}")
    return tuple(sizes)


def body(content: bytes, start: int, size: int, name: str) -> NDArray[np.uint8]:
    if len(content) != start + size:
        raise BenchError(f"{name}: expected {start + size} bytes by its own header, got {len(content)} (unpacked)")
    return np.frombuffer(content, np.uint8, offset=start)


def images(content: bytes, name: str) -> NDArray[np.uint8]:
    count, rows, columns = header(content, IMAGE_MAGIC, 3, name)
    if (rows, columns) != (SIDE, SIDE):
        raise BenchError(f"{name}: expected images of {SIDE}x{SIDE}, got {rows}x{columns}")
    return body(content, 16, count * SIDE * SIDE, name).reshape(count, SIDE, SIDE)


def labels(content: bytes, name: str) -> NDArray[np.uint8]:
    (count,) = header(content, LABEL_MAGIC, 1, name)
    values = body(content, 8, count, name)
    if count and values.max() >= CLASSES:
        raise BenchError(f"{name}: expected labels from 0 to {CLASSES - 1}, got {values.max()}")
    return values


def examples(image_file: bytes, label_file: bytes, image_name: str, label_name: str) -> Examples:
    pair = Examples(images(image_file, image_name), labels(label_file, label_name))
    if len(pair.images) != len(pair.labels):
        raise BenchError(
            f"{label_name}: expected {len(pair.images)} labels, as many as images in {image_name}, "
            f"got {len(pair.labels)}"
        )
    if not len(pair.images):
        raise BenchError(f"{image_name}: expected at least one image, got none")
    return pair
