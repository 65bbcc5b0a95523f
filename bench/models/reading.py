"""The same steps on real images: how fast they are with the loader, and how long they wait for it."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.image_loader import Loader, loader
from bench.images import Split, splits
from bench.measure import synchronize
from bench.models.crew import Crew
from bench.models.settings import Setting
from bench.models.steps import Work
from bench.models.turns import rotated
from tritonbn.timing import quartiles

ROUNDS = 3
LEAD = 2  # steps of a turn that are not timed

Row = dict[str, Any]


class Turn(NamedTuple):
    """Of one arm."""

    images: int
    seconds: float
    waited: float  # seconds of them
    skipped: int  # files that could not be read, so far


Turns = list[Turn]


class Images:
    """An image folder: training steps read `train`, cropped at random, inference `val`."""

    def __init__(self, root: Path, workers: int) -> None:
        self.name, self.workers = root.resolve().name, workers
        self.train, self.val = splits(root)
        self.classes = len(self.train.classes)

    def split(self, setting: Setting) -> Split:
        return self.train if setting.training else self.val

    def check(self, setting: Setting) -> None:
        """BenchError unless the setting can be measured with these images."""
        split = self.split(setting)
        if setting.image is None:
            raise BenchError(f"--data: expected networks that take images, got {setting.model}")
        if len(split) < setting.batch:
            raise BenchError(f"{split.folder}: expected at least {setting.batch} images, one batch; got {len(split)}")

    def loader(self, setting: Setting, seed: int, pin: bool) -> Loader:
        assert setting.image is not None
        split, training = self.split(setting), setting.training
        return loader(split, setting.batch, setting.image, training=training, workers=self.workers, seed=seed, pin=pin)


def endless(batches: Loader, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch, full batches only."""
    while True:
        try:
            yield from ((images, labels) for images, labels in batches if len(labels) == size)
        except BenchError as error:  # a worker's comes with its traceback around it
            last = str(error).strip().splitlines()[-1]
            raise BenchError(last.partition("BenchError: ")[2] or last) from None


def blank(setting: Setting, provider: str, images: Images, processes: int) -> Row:
    """A row before anything was measured; images/s of all processes."""
    return asdict(setting) | {
        "provider": provider, "processes": processes, "data": images.name, "workers": images.workers,
        "images_per_second": None, "images_per_second_low": None, "images_per_second_high": None,
        "waiting": None,  # share of the time in which the host waited for a batch
        "skipped": None, "error": None,
    }  # fmt: skip


def read(works: Mapping[str, Work], setting: Setting, images: Images, steps: int, seed: int) -> dict[str, Turns]:
    """The arms take turns with one stream of batches."""
    found: dict[str, Turns] = {name: [] for name in works}
    if not works:
        return found
    device = next(iter(works.values())).x.device
    batches = images.loader(setting, seed, pin=device.type == "cuda")
    stream = endless(batches, setting.batch)
    for start in range(ROUNDS):
        for name in rotated(list(works), start):
            seconds, waited = turn(works[name], stream, -(-steps // ROUNDS), device)
            found[name].append(Turn(-(-steps // ROUNDS) * setting.batch, seconds, waited, batches.files.skipped))
    return found


def turn(work: Work, stream: Iterator[tuple[Tensor, Tensor]], steps: int, device: torch.device) -> tuple[float, float]:
    """(seconds of the steps, those of them that were spent waiting for a batch)"""
    waited = start = 0.0
    for step in range(LEAD + steps):
        if step == LEAD:
            synchronize(device)
            waited, start = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        work.feed(*batch)
        work.step()
    synchronize(device)
    return time.perf_counter() - start, waited


def summed(turns: Turns, crew: Crew) -> Row:
    """Of the turns of one arm; the slowest process counts."""
    seconds = crew.slowest(torch.tensor([(turn.seconds, turn.waited) for turn in turns], dtype=torch.float64))
    images = torch.tensor([crew.size * turn.images for turn in turns])
    per_second = quartiles((images / seconds[:, 0]).tolist())
    return {
        "images_per_second": per_second.median,
        "images_per_second_low": per_second.low,
        "images_per_second_high": per_second.high,
        "waiting": float(seconds[:, 1].sum() / seconds[:, 0].sum()),
        "skipped": turns[-1].skipped,
    }
