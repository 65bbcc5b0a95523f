"""Choosing the learning rate L for Inception alone: short runs in factors of 3. No arm with batch norm is tuned."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

from bench.console import console, print_columns
from bench.files import write_json
from bench.mnist_tables import counted
from bench.study.checkpoint import Store
from bench.study.inception_progress import progress
from bench.study.inception_runs import Data, Job, Pace, Row, train
from bench.study.inception_summary import TRAINS, best
from bench.study.inception_tables import present
from bench.study.recipe import BASE, Recipe, recipes
from bench.study.trainer import Options

STEPS = 2000
RATES = (0.0006, 0.002, 0.006, 0.02, 0.06, 0.2)
RESULTS = "study-inception-sweep.json"
COLUMNS = ("L", "best accuracy", "last loss", "diverged at", "works")
WORKS = f"no seed diverges, and each is right {TRAINS:g} times as often as by guessing"


class Tried(TypedDict):
    """A learning rate over its seeds."""

    learning_rate: float
    best: list[float | None]  # percent, per seed
    loss: list[float | None]  # the last one of the curve
    diverged_at: list[int | None]
    works: bool  # `WORKS`


def run(
    base: Recipe, data: Data, pace: Pace, options: Options, settings: dict[str, Any], seeds: range, out: Path
) -> int:
    jobs = [
        Job(f"{BASE}-{rate:g}", None, seed, recipes(replace(base, learning_rate=rate))[BASE])
        for rate in RATES
        for seed in seeds
    ]
    store = Store(out / "sweep", settings | {"recipes": [asdict(job.recipe) for job in jobs]})
    with progress(jobs, pace.steps) as report:
        rows = train(jobs, data, pace, options, store, report)
    per_rate = [rows[start : start + len(seeds)] for start in range(0, len(rows), len(seeds))]
    found = [tried(rate, mine, options.classes) for rate, mine in zip(RATES, per_rate, strict=True)]
    console.print(f"\n{counted(pace.steps, 'step')}, {counted(len(seeds), 'seed')}; works: {WORKS}", soft_wrap=True)
    print_columns([COLUMNS, *map(cells, found)])
    console.print(conclusion(found), soft_wrap=True)
    content = {"machine": settings["machine"], "settings": settings, "tried": found, "runs": rows}
    write_json(out / RESULTS, content)
    console.print(f"Written: {out / RESULTS}; {out / 'sweep'} may go", soft_wrap=True)
    return 0


def tried(rate: float, rows: Sequence[Row], classes: int) -> Tried:
    bests = [point and point["accuracy"] for point in map(best, rows)]
    diverged = [row["diverged_at"] for row in rows]
    trains = all(value is not None and value >= TRAINS * 100 / classes for value in bests)
    return Tried(
        learning_rate=rate,
        best=bests,
        loss=[row["curve"][-1]["loss"] if row["curve"] else None for row in rows],
        diverged_at=diverged,
        works=trains and not any(diverged),
    )


def conclusion(found: Sequence[Tried]) -> str:
    """The paper's L was close to the largest that works, as five times as much diverged."""
    working = [one for one in found if one["works"]]
    if not working:
        return "No learning rate works: more steps, or other rates, are needed to choose one."
    best_one = max(working, key=lambda one: sum(value or 0.0 for value in one["best"]))
    largest = max(one["learning_rate"] for one in working)
    return f"Best: {best_one['learning_rate']:g}. The largest that works: {largest:g}."


def cells(one: Tried) -> list[str]:
    return [
        f"{one['learning_rate']:g}",
        present(one["best"], "{:.2f}%", " "),
        present(one["loss"], "{:.3f}", " "),
        present(one["diverged_at"], "{:.0f}", " "),
        "yes" if one["works"] else "no",
    ]
