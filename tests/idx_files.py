"""A small data set in MNIST's files, learnable within a hundred steps."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def image_file(images: NDArray[np.uint8], magic: int = 2051) -> bytes:
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


def label_file(labels: NDArray[np.uint8], magic: int = 2049) -> bytes:
    return struct.pack(">2I", magic, len(labels)) + labels.tobytes()


def patterns(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Each label is a fixed random picture; a tenth of the pixels is inverted."""
    pictures = np.random.default_rng(0).integers(0, 2, (10, 28, 28))
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    noise = random.random((count, 28, 28)) < 0.1
    return ((pictures[labels] ^ noise) * 255).astype(np.uint8), labels.astype(np.uint8)


def contents(train: int = 600, test: int = 100) -> dict[str, bytes]:
    """The four files by name."""
    files = []
    for seed, count in ((1, train), (2, test)):
        images, labels = patterns(count, seed)
        files += [image_file(images), label_file(labels)]
    return dict(zip(NAMES, files, strict=True))


def write(folder: Path, files: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder
