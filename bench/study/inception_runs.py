"""The runs of the Inception study: each arm with each seed, trained, evaluated and kept on the disk."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, TypedDict, cast

from torch import Tensor

import tritonbn
from bench.study.augment import Pixels
from bench.study.checkpoint import Saved, Store
from bench.study.recipe import Recipe
from bench.study.trainer import Norm, Options, Trainer, logits, without_tf32
from tritonbn.timing import measuring

TOP = 5
SECONDS = 20  # between checkpoints: one of the whole network takes some tenths
POPULATION = 100  # batches whose statistics are averaged after training, at most as many as it was trained on


class Point(TypedDict):
    """What is known after some steps."""

    step: int
    seconds: float  # of training, without evaluation
    accuracy: float  # percent of the validation images
    top5: float | None  # percent; None where there are ten classes or less
    loss: float  # mean over the training steps since the last point


class Inference(TypedDict):
    """Accuracy at the end by where the statistics of batch norm are from, in percent."""

    moving: float
    population: float  # the paper's algorithm 2
    folded: float  # the same statistics, folded into the convolutions
    same_answers: float  # percent of the images with one answer from both of them
    batches: int  # that were averaged


class Row(TypedDict):
    """One arm with one seed, as in the JSON file."""

    arm: str
    norm: str | None
    seed: int
    steps: int  # that were made
    seconds: float
    ms_per_step: list[float]  # of each block of steps
    diverged_at: int | None  # the first step with a loss that is not finite
    curve: list[Point]
    inference: Inference | None  # None without batch norm, and after divergence


class Job(NamedTuple):
    """A run to be made."""

    arm: str
    norm: Norm | None
    seed: int
    recipe: Recipe

    @property
    def key(self) -> str:
        return f"{self.arm}-{self.norm or 'none'}-{self.seed}"


class Pace(NamedTuple):
    """Steps of a run, between evaluations, and between checkpoints."""

    steps: int
    evaluate: int
    checkpoint: int | None  # None: at an evaluation, when there are `SECONDS` to lose

    def end(self, step: int) -> int:
        """Up to where to train from here without looking."""
        return min(self.steps, *((step // every + 1) * every for every in (self.evaluate, self.checkpoint) if every))

    def due(self, step: int, since: float) -> bool:
        """Whether to save after this step, `since` seconds after the last time."""
        return since >= SECONDS if self.checkpoint is None else step % self.checkpoint == 0

    @property
    def block(self) -> int:
        return self.end(0)


class Data(NamedTuple):
    train: Pixels
    val: Pixels


class Stop:
    """Whether somebody asked to stop; asked twice, it stops at once."""

    asked = False

    def __call__(self) -> bool:
        return self.asked

    def ask(self, *_: int | FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGINT and SIGTERM wait for the end of a step."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Report = Callable[[Job, int, Row], None]  # with the number of steps just made, or found made


def train(jobs: Sequence[Job], data: Data, pace: Pace, options: Options, store: Store, report: Report) -> list[Row]:
    """All runs, but for what `store` has of them. KeyboardInterrupt when stopped, after saving."""
    with stopping() as stop:
        return [train_one(job, data, pace, options, store, report, stop) for job in jobs]


def train_one(job: Job, data: Data, pace: Pace, options: Options, store: Store, report: Report, stop: Stop) -> Row:
    saved = store.load(job.key)
    if saved is not None:
        report(job, saved["step"], row := cast(Row, saved["row"]))
        if saved["finished"]:
            return row
    with measuring(data.train.images.device):
        trainer = Trainer(job.recipe, job.norm, job.seed, data.train, options)
        run, last = Run(job, trainer, data.val, pace, saved), time.monotonic()
        while not run.over:
            before = run.step
            run.block(stop)
            report(job, run.step - before, run.row)
            stopped = stop()  # once: what is asked later is answered after the next step
            if stopped or pace.due(run.step, time.monotonic() - last):
                store.save(job.key, run.saved())
                last = time.monotonic()
            if stopped:
                raise KeyboardInterrupt
        run.finish()
        store.save(job.key, run.saved())
    return run.row


class Run:
    """A run on its way."""

    def __init__(self, job: Job, trainer: Trainer, val: Pixels, pace: Pace, saved: Saved | None) -> None:
        self.trainer, self.val, self.pace = trainer, val, pace
        self.step, self.losses, self.finished = 0, list[float](), False
        self.row = Row(
            arm=job.arm, norm=job.norm, seed=job.seed, steps=0, seconds=0.0, ms_per_step=[], diverged_at=None,
            curve=[], inference=None,
        )  # fmt: skip
        if saved is not None:
            trainer.restore(saved["state"], saved["chance"])
            self.step, self.losses, self.row = saved["step"], saved["losses"], cast(Row, saved["row"])

    @property
    def over(self) -> bool:
        return self.step == self.pace.steps or self.row["diverged_at"] is not None

    def block(self, stop: Stop) -> None:
        """Train to where there is something to do, timed; then do it, not timed."""
        row = self.row
        losses, seconds = self.trainer.train(self.step, self.pace.end(self.step), stop)
        broken = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if broken is not None:
            row["diverged_at"] = self.step + broken + 1
        self.step += len(losses)
        self.losses += losses
        row["steps"], row["seconds"] = self.step, row["seconds"] + seconds
        row["ms_per_step"].append(1e3 * seconds / len(losses))
        if broken is None and (self.step % self.pace.evaluate == 0 or self.step == self.pace.steps):
            row["curve"].append(self.point())
            self.losses = []

    def point(self) -> Point:
        with self.trainer.precision():
            found, labels = logits(self.trainer.network, self.val), self.val.labels
        return Point(
            step=self.step,
            seconds=self.row["seconds"],
            accuracy=top(found, labels, 1),
            top5=top(found, labels, TOP) if found.shape[1] > 10 else None,
            loss=sum(self.losses) / len(self.losses),
        )

    def finish(self) -> None:
        if self.trainer.recipe.batch_norm and self.row["diverged_at"] is None:
            with without_tf32():
                self.row["inference"] = self.inference(min(POPULATION, self.step))
        self.finished = True

    def inference(self, batches: int) -> Inference:
        """In float32. Replaces the statistics by those of the population: training data that would have come next."""
        trainer, network, labels = self.trainer, self.trainer.network, self.val.labels
        moving = logits(network, self.val)
        tritonbn.recalibrate(network, trainer.inputs(self.step, self.step + batches))
        population, folded = logits(network, self.val), logits(tritonbn.fold(network.eval()), self.val)
        return Inference(
            moving=top(moving, labels, 1),
            population=top(population, labels, 1),
            folded=top(folded, labels, 1),
            same_answers=100.0 * int((population.argmax(1) == folded.argmax(1)).sum()) / len(labels),
            batches=batches,
        )

    def saved(self) -> Saved:
        state, chance = ({}, {}) if self.finished else (self.trainer.tensors(), self.trainer.chance())
        return Saved(
            finished=self.finished, step=self.step, row=dict(self.row), losses=self.losses, state=state, chance=chance
        )


def top(found: Tensor, labels: Tensor, count: int) -> float:
    """Percent of the images whose class is among the `count` likeliest."""
    right = (found.topk(count).indices == labels[:, None]).any(1).sum()
    return 100.0 * int(right) / len(labels)
