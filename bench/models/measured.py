"""One setting, all arms: built, warmed up, profiled, compared, timed in turns. What fails is a row that says why."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench.errors import BenchError
from bench.models import arms, profiles, reading, rows, turns
from bench.models.arms import BASELINE, SEED, Start
from bench.models.crew import Crew
from bench.models.firsts import exact_results, first_results
from bench.models.reading import Images
from bench.models.rows import NOT_HERE, Row
from bench.models.settings import Setting
from bench.models.steps import State, Work
from bench.rows import survived
from bench.timing import peak_bytes

Tick = Callable[[str], None]


class Bench(NamedTuple):
    """Where, how long and on which images all settings of a run are measured."""

    device: torch.device
    steps: int
    crew: Crew
    images: Images | None = None
    tick: Tick = lambda _: None  # told what is done next


class Arm:
    """A provider at work, and its row."""

    def __init__(self, row: Row) -> None:
        self.row, self.provider = row, str(row["provider"])
        self.work: Work
        self.state: State  # of its start
        self.result: Tensor  # losses of the first steps, or logits
        self.rounds: list[Tensor] = []


class Comparison:
    """The arms of one setting, in their order; those that failed have an error in their row and are gone."""

    def __init__(self, setting: Setting, providers: Sequence[str], bench: Bench) -> None:
        self.setting, self.bench, self.device, self.crew = setting, bench, bench.device, bench.crew
        self.rows = {name: rows.blank(setting, name, self.crew.size) for name in arms.names(setting, providers)}
        self.with_data: list[Row] = []
        self.arms: dict[str, Arm] = {}
        self.exact: Tensor | None = None  # what the first steps should give

    def measure(self) -> None:
        """Fill the rows; within `measuring`."""
        if why := impossible(self.setting, self.bench):
            for row in self.rows.values():
                row["error"] = NOT_HERE + why
            return
        try:
            self.build()
            if self.setting.graphed:
                self.capture()
            for arm in self.living("first steps"):
                self.attempt([arm.row], partial(self.first_steps, arm))
            self.compare()
            self.time()
            if self.bench.images is not None:
                self.read(self.bench.images)
        finally:
            self.arms.clear()
            torch.compiler.reset()
            self.free()

    def living(self, stage: str) -> Iterator[Arm]:
        """Those that have not failed; the progress bar is told of each."""
        for name in list(self.arms):
            self.bench.tick(f"{name} {stage}")
            yield self.arms[name]

    def attempt(self, rows: Sequence[Row], action: Callable[[], object]) -> None:
        """Do it; where it fails in any process, the rows say why, and the memory is free for others."""
        text = None
        try:
            action()
        except BenchError:
            raise
        except Exception as error:  # whatever a network, a compiler or a GPU raises
            text = self.explained(error)
        if self.crew.any(text is not None):
            self.drop(rows, text or "it failed in another process")

    def drop(self, rows: Sequence[Row], text: str) -> None:
        for row in rows:
            row["error"] = text
            arm = self.arms.pop(row["provider"], None)
            if arm is not None:
                vars(arm).pop("work", None)  # others may still hold the arm
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def explained(self, error: Exception) -> str:
        """In a line. What follows from it may hide that memory ran out: a capture ends in an error of its own."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
            cause = cause.__context__
        if cause is None:
            return survived(error, self.device)
        text = f"out of memory at batch {self.setting.batch}: {str(cause).split('. GPU')[0].strip()}"
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            text += f"; {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB were in use"
        return text

    def build(self) -> None:
        """All arms from one network, each warmed up."""
        begin: list[Start] = []
        classes = None if self.bench.images is None else self.bench.images.classes
        make = partial(arms.start, self.setting, self.device, classes, SEED + self.crew.rank)
        self.attempt(list(self.rows.values()), lambda: begin.append(make()))
        if begin:
            self.attempt([], partial(self.refer, begin[0]))  # it may take more memory than the others
        for name, row in self.rows.items() if begin else ():
            self.bench.tick(f"{name} warm-up")
            before = allocated(self.device)
            self.arms[name] = arm = Arm(row)
            # Apart: processes that share a network wait for each other as soon as it is built in all of them.
            self.attempt([row], partial(self.construct, arm, begin[0]))
            if name in self.arms:
                self.attempt([row], partial(self.prepare, arm, before))

    def refer(self, begin: Start) -> None:
        self.exact = exact_results(begin, self.setting, self.crew)

    def construct(self, arm: Arm, begin: Start) -> None:
        network = arms.network_of(arm.provider, begin)
        arm.row |= rows.coverage(arm.provider, network, begin)
        arm.work = Work(network, begin.x, begin.y, self.setting)
        arm.state = arm.work.state()

    def prepare(self, arm: Arm, before: int) -> None:
        """The first steps, until they take the same time; what one is made of; its memory, with `before` allocated."""
        work, row, graphs = arm.work, arm.row, compiled_graphs()
        work.called = shared = self.crew.shared(work.network) if work.training else work.network
        if self.setting.compiled:
            work.called = torch.compile(shared, dynamic=False)
        torch.manual_seed(SEED)
        row |= rows.warmed(turns.warm_up(work, self.device, self.crew.size > 1))
        held = allocated(self.device) - before
        peak = peak_bytes(work.step, self.device)
        row["peak_bytes"] = None if peak is None else held + peak
        if compiled_graphs() - graphs > 1:
            row["notes"].append(f"compiled as {compiled_graphs() - graphs} graphs")
        if self.setting.compiled and self.device.type != "cuda":
            row["notes"].append("no shares: compiled code is one operator of the CPU")
        else:
            rows.profiled(row, profiles.shares(work.step, self.device))

    def capture(self) -> None:
        """After all eager steps, when the memory they took is free again; the graphs share what they need."""
        self.free()
        pool = torch.cuda.graph_pool_handle()
        for arm in self.living("capture"):
            self.attempt([arm.row], partial(self.replayed, arm, pool))

    def replayed(self, arm: Arm, pool: Any) -> None:
        arm.work.capture(pool)
        arm.row |= rows.warmed(turns.warm_up(arm.work, self.device), arm.row)

    def first_steps(self, arm: Arm) -> None:
        """From the first weights again."""
        work, row = arm.work, arm.row
        work.restore(arm.state)
        arm.result = first_results(work, self.crew)
        if work.training:
            row["first_losses"] = arm.result.tolist()
        row["finite"] = bool(arm.result.isfinite().all())
        if not row["finite"]:
            raise FloatingPointError(f"the {'loss' if work.training else 'output'} is not finite: not timed")

    def compare(self) -> None:
        if (torchs := self.arms.get(BASELINE)) is not None:
            for arm in self.arms.values():
                arm.row |= rows.compared(arm.row, arm.result, torchs.result, self.exact)

    def time(self) -> None:
        """All arms in turns."""
        graphs = compiled_graphs()
        works = {name: arm.work for name, arm in self.arms.items()}
        for found in turns.take_turns(works, self.bench.steps, self.device, self.crew, self.failed):
            for name, milliseconds in found.items():
                self.arms[name].rounds.append(milliseconds)
            self.bench.tick("in turns")
        torchs, images = self.arms.get(BASELINE), self.setting.batch * self.crew.size
        for arm in self.arms.values():
            arm.row |= rows.times(arm.rounds, torchs.rounds if torchs else None, images)
            arm.row["finite"] = bool(arm.work.result.isfinite().all())
            if compiled_graphs() > graphs:
                arm.row["notes"].append("something was compiled again while this was timed")

    def failed(self, name: str, error: Exception) -> None:
        self.drop([self.rows[name]], self.explained(error))

    def read(self, images: Images) -> None:
        """The same arms once more, with images from files."""
        self.bench.tick("with data")
        self.with_data = [reading.blank(self.setting, name, images, self.crew.size) for name in self.arms]
        works, found = {name: arm.work for name, arm in self.arms.items()}, dict[str, reading.Turns]()
        read = partial(reading.read, works, self.setting, images, self.bench.steps, self.crew.rank)
        self.attempt(self.with_data, lambda: found.update(read()))
        for row in self.with_data:
            if row["error"] is None:
                row |= reading.summed(found[row["provider"]], self.crew)


def impossible(setting: Setting, bench: Bench) -> str | None:
    """Why a setting cannot be measured on this machine."""
    if setting.graphed and bench.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if setting.graphed and bench.crew.size > 1:
        return "a graph does not hold the steps of several processes: run it without --ddp"
    return None


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])
