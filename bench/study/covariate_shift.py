"""What batch norm does, by both explanations on the same runs: `python -m bench study covariate-shift`.

Networks of the MNIST experiment are trained with and without batch norm, from the same weights on the same batches, and
looked at after each hundredth of the run. Ioffe & Szegedy 2015 (arXiv:1502.03167) say that batch norm keeps hidden
distributions from drifting; Santurkar et al. 2018 (arXiv:1805.11604), that it makes the loss smoother.

Drift, of the inputs of each hidden layer's sigmoids for 2,000 fixed training images with batch statistics; each figure
is the median over the layer's units. Shift: range of the median over time / mean 15-85% width. Growth: largest width /
smallest. Change: 1-Wasserstein distance between a unit's inputs at two moments, one hundredth of the run apart, / the
mean of both widths; median over time. Nothing before step 1,000 counts. Smoothness is that of the loss of one fixed
training batch of 60, in training mode, see `bench.study.landscape`; median over time, before step 1,000 and after.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import mnist as job_of
from bench.console import console, print_columns
from bench.files import write_json
from bench.mnist_tables import LABELS, counted
from bench.study import covariate_picture
from bench.study.covariate_figures import COLUMNS, Figure, figures
from bench.study.landscape import FACTORS
from bench.study.watched import watch
from bench.training import BATCH, PROBE_IMAGES

NAME = "study-covariate-shift"
NOTES = (
    "Measured with one learning rate, on one small network. A figure that is smaller with batch norm goes with its"
    " faster training here; that does not make it the cause.",
    "Arms are compared at equal steps, where the one with batch norm is further in its training: its loss is smaller.",
    "The unit of parameters is in all gradients, and batch norm makes the scale of weights irrelevant: compare lengths"
    " beside that of the gradient itself. A long gradient also moves the loss further, down included.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job_of.add_arguments(parser)
    parser.add_argument(
        "--norm", choices=("tritonbn", "torch"), default="tritonbn", help="the batch norm (default: %(default)s)"
    )
    parser.set_defaults(steps=10_000, seeds=3, out=Path("out/study"))


def run(args: argparse.Namespace) -> int:
    job = job_of.prepare(args, ours=args.norm == "tritonbn")
    rows = train(job, args)
    found = figures(rows)
    heading = f"{job.data.name}, {counted(args.steps, 'step')}, {counted(args.seeds, 'seed')}"
    console.print(f"\n{heading}: mean (range)\n", soft_wrap=True)
    show(found)
    path, picture = job.out / f"{NAME}.json", job.out / f"{NAME}.png"
    results = job.content | {
        "settings": job_of.settings(args)
        | {"norm": args.norm, "step_sizes": list(FACTORS), "batch_looked_at": BATCH, "images_looked_at": PROBE_IMAGES},
        "figures": [figure._asdict() | {"factor": figure.factor, "verdict": figure.verdict} for figure in found],
        "notes": NOTES,
        "arms": rows,
    }
    write_json(path, results)
    covariate_picture.draw(rows, f"{job.data}; {counted(args.steps, 'step')} of {BATCH}", picture)
    for line in ("", *NOTES, f"Written: {path} and {picture}"):
        console.print(line, soft_wrap=True)
    return 0


def train(job: job_of.Job, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all seeds, with a bar for each arm where somebody is looking."""
    data, arms = job.data.to(job.device), ("none", args.norm)
    with job_of.bars("loss") as progress:
        tasks = {arm: progress.add_task(LABELS[arm], total=args.steps * args.seeds, loss="") for arm in arms}

        def advance(arm: str, count: int, loss: float) -> None:
            progress.update(tasks[arm], advance=count, loss=f"{loss:.4f}", refresh=True)

        return [row for seed in range(args.seeds) for row in watch(data, seed, args.steps, arms, advance)]


def show(found: Sequence[Figure]) -> None:
    """A line for each figure, under the explanation that it belongs to."""
    lines: list[Sequence[str]] = [COLUMNS]
    for explanation, belonging in itertools.groupby(found, lambda figure: figure.explanation):
        lines += [[""] * len(COLUMNS), [f"{explanation}:", *[""] * (len(COLUMNS) - 1)]]
        lines += [figure.line for figure in belonging]
    print_columns(lines)
