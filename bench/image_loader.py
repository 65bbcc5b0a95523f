"""Batches of an image folder too large for memory, read by worker processes while the device works."""

import math
import multiprocessing
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.errors import BenchError
from bench.images import Box, Split, UnreadableImage, middle, opened, pixels

# Random crops as in "Going deeper with convolutions" (arXiv:1409.4842, section 6): share of the area, width / height.
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
BORDER = 256 / 224  # for evaluation the shorter side becomes so much longer than the crop from its middle


def random_box(width: int, height: int) -> Box:
    """A box of random area and aspect, from torch's generator; the middle if ten do not fit."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * float(torch.empty(()).uniform_(*AREA))
        aspect = math.exp(float(torch.empty(()).uniform_(*map(math.log, ASPECT))))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            return left, upper, left + w, upper + h
    return middle(width, height)


class Files(Dataset[tuple[Tensor, int]]):
    """A split that is read file by file: ([side, side, 3] uint8, label).

    For training random crops, half of them mirrored; else the middle. In the place of a file that cannot be read stands
    the next one that can, so that batches keep their size; `skipped` counts how often.
    """

    def __init__(self, split: Split, side: int, training: bool) -> None:
        self.split, self.side, self.training = split, side, training
        self._skipped = multiprocessing.Value("q", 0)  # shared with the workers

    @property
    def skipped(self) -> int:
        return int(self._skipped.value)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                image = opened(self.split.files[at])
            except UnreadableImage:
                with self._skipped.get_lock():
                    self._skipped.value += 1
                continue
            return self.crop(image), self.split.labels[at]
        raise BenchError(f"{self.split.folder}: none of {len(self):,} images can be read")

    def crop(self, image: Image.Image) -> Tensor:
        if not self.training:
            return pixels(image, self.side, middle(*image.size, 1 / BORDER))
        found = pixels(image, self.side, random_box(*image.size))
        return found.flip(1) if torch.rand(()) < 0.5 else found


class Loader(DataLoader[tuple[Tensor, int]]):
    """Batches of `Files`: [B, 3, side, side] uint8 in channels_last, and [B] int64."""

    files: Files


def loader(split: Split, batch: int, side: int, *, training: bool, workers: int, seed: int, pin: bool) -> Loader:
    """Batches of a split, for training shuffled and all of one size. `pin`: in memory that the GPU copies from.

    Raises BenchError where there are too few images for one batch, or none that can be read.
    """
    if training and len(split) < batch:
        raise BenchError(f"{split.folder}: expected at least {batch} images, one batch; got {len(split)}")
    Files(split, side, training=False)[0]  # here: from a worker the error would come with its traceback
    files = Files(split, side, training)
    made = Loader(
        files, batch, shuffle=training, drop_last=training, num_workers=workers, pin_memory=pin, collate_fn=collated,
        persistent_workers=workers > 0, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    made.files = files
    return made


def collated(examples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*examples, strict=True)
    return torch.stack(images).permute(0, 3, 1, 2), torch.tensor(labels)
