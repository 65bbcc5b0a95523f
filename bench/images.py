"""Images in folders, as ImageNet has them: `DIR/train/<class>/<file>` and `DIR/val/<class>/<file>`.

Pixels stay bytes until they are on the device; `normalized` makes numbers of them.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bench.errors import BenchError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
# Of ImageNet's training images, by channel, where 1 is white: what everybody uses.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Box = tuple[int, int, int, int]  # left, upper, right, lower


class UnreadableImage(Exception):
    """A file that is no image, or only the beginning of one."""


@dataclass(frozen=True)
class Split:
    """The files of `train` or `val`, sorted by class and name, and the index of each one's class."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)


def splits(root: Path) -> tuple[Split, Split]:
    """The training and the validation images; BenchError for folders that are not what is expected."""
    if not root.is_dir():
        raise BenchError(f"--data {root}: expected a folder, got {'a file' if root.exists() else 'nothing'}")
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        found = ", ".join(entry.name for entry in entries(root)[:5]) or "nothing"
        raise BenchError(
            f"--data {root}: expected the folders train and val in it; no {', '.join(missing)}, got {found}"
        )
    train, val = split(root / "train"), split(root / "val")
    if train.classes != val.classes:
        only = (sorted(set(a.classes) - set(b.classes)) for a, b in ((train, val), (val, train)))
        differing = (
            f"only in {name}: {listed(names)}" for name, names in zip(("train", "val"), only, strict=True) if names
        )
        raise BenchError(f"--data {root}: expected the same classes in train and val; {'; '.join(differing)}")
    return train, val


def split(folder: Path) -> Split:
    """One folder per class; BenchError if there is none, or one holds no image."""
    classes = [entry.name for entry in entries(folder) if entry.is_dir()]
    if not classes:
        found = f"{len(entries(folder))} files" if entries(folder) else "an empty folder"
        raise BenchError(f"{folder}: expected a folder per class, got {found}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        mine = images_in(folder / name)
        if not mine:
            raise BenchError(f"{folder / name}: expected images ({', '.join(SUFFIXES)}), got none")
        files += mine
        labels += [label] * len(mine)
    return Split(folder, tuple(classes), tuple(files), tuple(labels))


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, without hidden files."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise BenchError(f"cannot read {folder}: {error.strerror}") from None


def images_in(folder: Path) -> list[Path]:
    """Also those in folders within it."""
    found: list[Path] = []
    for entry in entries(folder):
        if entry.is_dir():
            found += images_in(Path(entry.path))
        elif entry.name.lower().endswith(SUFFIXES):
            found.append(Path(entry.path))
    return found


def listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def opened(path: Path) -> Image.Image:
    """The decoded image in RGB; raises UnreadableImage, which says why."""
    try:
        with Image.open(path) as image:
            decoded: Image.Image = image.convert("RGB")
            return decoded
    except UnidentifiedImageError:  # its message is the path
        raise UnreadableImage("no image that Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None


def pixels(image: Image.Image, side: int, box: Box) -> Tensor:
    """The box of an image as [side, side, 3] uint8; nothing outside of it counts."""
    if box != (0, 0, *image.size):
        image = image.crop(box)  # `resize` with a box looks beyond it
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image))


def middle(width: int, height: int, share: float = 1.0) -> Box:
    """The square in the middle, of `share` of the shorter side."""
    side = max(1, round(min(width, height) * share))
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


class Memory(NamedTuple):
    """A split in memory, without the files that could not be read."""

    images: Tensor  # [N, 3, side, side] uint8
    labels: Tensor  # [N] int64
    skipped: list[str]  # the files left out, by their path in the data folder, each with what is wrong


def in_memory(split: Split, side: int) -> Memory:
    """All images of a split, the square in the middle of each scaled to `side`. BenchError if none can be read."""
    size, memory = len(split) * 3 * side**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory / 2:
        raise BenchError(
            f"{split.folder}: {len(split):,} images of {side}x{side} take {size / 1e9:,.1f} GB; "
            f"expected at most half of the memory, {memory / 2e9:,.1f} GB"
        )

    def decode(path: Path) -> Tensor | UnreadableImage:
        try:
            image = opened(path)
        except UnreadableImage as error:
            return error
        return pixels(image, side, middle(*image.size))

    images = torch.empty(len(split), 3, side, side, dtype=torch.uint8)
    labels, skipped = list[int](), list[str]()
    with ThreadPoolExecutor() as pool:  # decoding and scaling leave Python's lock to others
        for path, label, image in zip(split.files, split.labels, pool.map(decode, split.files), strict=True):
            if isinstance(image, Tensor):
                images[len(labels)] = image.permute(2, 0, 1)
                labels.append(label)
            else:
                skipped.append(f"{path.relative_to(split.folder.parent)}: {image}")
    if not labels:
        raise BenchError(f"{split.folder}: none of {len(split):,} images can be read; {skipped[0]}")
    return Memory(images[: len(labels)], torch.tensor(labels), skipped)


def normalized(images: Tensor) -> Tensor:
    """Bytes [N, 3, H, W] as float32 with mean 0 and variance 1 over ImageNet; keeps device and memory format."""
    mean, std = (255 * torch.tensor(of, device=images.device).view(3, 1, 1) for of in (MEAN, STD))
    return (images.float() - mean) / std
