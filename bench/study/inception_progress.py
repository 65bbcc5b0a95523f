"""How far the runs are: bars where somebody is looking, lines elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.console import console
from bench.study.inception_runs import Job, Report, Row

LINES = 10  # per run, without a terminal


@contextmanager
def progress(jobs: Sequence[Job], steps: int) -> Iterator[Report]:
    """What is to be called after each block of a run."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]:>8}"),
        TimeRemainingColumn(),
    )
    # Drawn between blocks only: a thread that redraws would take its time from the runs.
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=quiet) as bars:
        counts: dict[str, int] = {}
        for job in jobs:
            counts[name(job)] = counts.get(name(job), 0) + 1
        tasks = {each: bars.add_task(each, total=steps * count, accuracy="") for each, count in counts.items()}

        def report(job: Job, made: int, row: Row) -> None:
            # A run that diverged is over: its other steps count as made.
            bars.update(
                tasks[name(job)],
                advance=made if row["diverged_at"] is None else made + steps - row["steps"],
                accuracy=state(row),
                refresh=True,
            )
            step = row["steps"]
            if quiet and (step * LINES // steps > (step - made) * LINES // steps or row["diverged_at"]):
                told = f"{name(job)}, seed {job.seed}: step {step:,} of {steps:,}, {state(row) or 'not evaluated'}"
                console.print(told, soft_wrap=True)

        yield report


def name(job: Job) -> str:
    return f"{job.arm}, {job.norm}" if job.norm else job.arm


def state(row: Row) -> str:
    if row["diverged_at"] is not None:
        return f"diverged at step {row['diverged_at']:,}"
    return f"{row['curve'][-1]['accuracy']:.2f}%" if row["curve"] else ""
