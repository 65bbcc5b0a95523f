"""Where the MNIST benchmark gets its data: a folder, the cache, a mirror, at last scikit-learn's digits."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bench import idx, mnist_download
from bench.console import console
from bench.errors import BenchError

NAMES = tuple(mnist_download.SHA256)  # train images, train labels, test images, test labels


@dataclass(frozen=True)
class Split:
    images: Tensor  # [N, 784] fp32, each pixel 0 or 1
    labels: Tensor  # [N] int64

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Mnist:
    train: Split
    test: Split
    name: str
    origin: str

    def to(self, device: torch.device) -> "Mnist":
        return Mnist(self.train.to(device), self.test.to(device), self.name, self.origin)

    def __str__(self) -> str:
        return f"{self.name}, {len(self.train):,} training and {len(self.test):,} test images"


def load(folder: Path | None) -> Mnist:
    """From `folder` if given; else cached, downloaded, or replaced by the digits, and then it says so."""
    if folder is not None:
        return from_folder(folder)
    try:
        contents, origin = mnist_download.cached_or_downloaded()
    except mnist_download.DownloadError as reason:
        console.print(
            f"No MNIST here ({reason}): training on scikit-learn's digits instead, real but small "
            f"(1,797 images of 8x8, enlarged), so accuracies are not MNIST's. --data DIR takes MNIST files.",
            soft_wrap=True,
        )
        return digits()
    return from_contents(contents, [f"{name} {origin}" for name in NAMES], "MNIST", origin)


def from_folder(folder: Path) -> Mnist:
    if not folder.is_dir():
        raise BenchError(f"--data {folder}: expected a folder, got {'a file' if folder.exists() else 'nothing'}")
    paths = [find(folder, name) for name in NAMES]
    contents = [idx.read(path) for path in paths]
    original = all(mnist_download.is_original(name, content) for name, content in zip(NAMES, contents, strict=True))
    name = "MNIST" if original else "idx files other than the original MNIST"
    return from_contents(contents, [str(path) for path in paths], name, f"from {folder}")


def find(folder: Path, name: str) -> Path:
    """The file itself or its .gz, also where torchvision keeps it."""
    for place in (folder, folder / "MNIST" / "raw"):
        for candidate in (place / name, place / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise BenchError(f"{folder / name}: expected this file or its .gz here or in MNIST/raw, got neither")


def from_contents(contents: list[bytes], names: list[str], name: str, origin: str) -> Mnist:
    train = idx.examples(contents[0], contents[1], names[0], names[1])
    test = idx.examples(contents[2], contents[3], names[2], names[3])
    return Mnist(binary(train), binary(test), name, origin)


def binary(pair: idx.Examples) -> Split:
    """Binary input as in the paper: a pixel is on from 128."""
    images = torch.from_numpy((pair.images >= 128).astype(np.float32).reshape(len(pair.images), -1))
    return Split(images, torch.from_numpy(pair.labels.astype(np.int64)))


def digits() -> Mnist:
    """scikit-learn's 8x8 digits enlarged to 28x28, four fifths for training, always the same ones."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 (a second that only this way needs)

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1)  # [N, 1, 8, 8], values 0 to 16
    large = interpolate(small, size=(idx.SIDE, idx.SIDE), mode="bilinear")
    images, labels = (large.flatten(1) >= 8).float(), torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return Mnist(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        "scikit-learn's digits",
        "enlarged from 8x8 to 28x28",
    )
