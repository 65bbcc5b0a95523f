"""The paper's figure 1 over seeds: `python -m bench study mnist`, the job of `bench mnist` at full length."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import agreement, mnist_tables
from bench import mnist as job_of
from bench.console import console, print_columns
from bench.files import write_json
from bench.study import expected, kept, mnist_picture, mnist_words
from bench.training import Row

NAME = "study-mnist"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    job_of.add_arguments(parser)
    parser.set_defaults(steps=expected.STEPS, seeds=expected.GAIN_SEEDS, out=Path("out/study"))
    parser.epilog = (
        f"Finished seeds are kept in OUT/{NAME}/ and not trained again. At {expected.STEPS} steps on MNIST the results"
        " are compared with the values expected; the exit code is 1 where one lies outside."
    )


def run(args: argparse.Namespace) -> int:
    job = job_of.prepare(args)
    rows, machines = train(job, args)
    reason = expected.inapplicable(rows, job.data.name)
    found = [] if reason else expected.check(rows)
    follows = agreement.check(rows)
    notes = mnist_words.notes(rows)
    results = job.content | {
        "settings": job_of.settings(args),
        "kernels_compared": job.kernels,
        "expected": {"not_applicable": reason or None, "findings": [finding.content for finding in found]},
        "check": [asdict(finding) | {"passed": finding.passed} for finding in follows],
        "notes": notes,
        "machines": machines,
        "arms": rows,
    }
    path, picture = job.out / f"{NAME}.json", job.out / f"{NAME}.png"
    write_json(path, results)
    mnist_picture.draw(rows, str(job.data), picture)
    console.print(mnist_tables.summary(rows, job.data.name), mnist_tables.agreement(follows, job.kernels), crop=False)
    print_columns([mnist_words.DRIFTS, *mnist_words.drift_lines(rows)])
    if found:
        console.print("\nEvery seed against the band for one run:")
        outside = {index for index, finding in enumerate(found, 1) if not finding.inside}
        print_columns([mnist_words.FINDINGS, *mnist_words.finding_lines(found)], red=outside)
    for line in ("", *([f"Not compared: {reason}."] if reason else []), *notes, f"Written: {path} and {picture}"):
        console.print(line, soft_wrap=True)
    good = all(finding.inside for finding in found) and all(finding.passed is not False for finding in follows)
    return 0 if good else 1


def train(job: job_of.Job, args: argparse.Namespace) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of all seeds, those kept by an earlier run among them, and which machine and commit each seed is of."""
    follows = ("seeds", "evaluated_at")  # any number of seeds goes on; the other follows from the steps
    identity = {name: value for name, value in job_of.settings(args).items() if name not in follows}
    identity |= {"data": job.data.name, "data_sha256": kept.digest(job.data), "batch_norm_path": job.path}
    identity |= {name: job.facts[name] for name in ("device", "threads")}
    paths = [job.out / NAME / f"seed-{seed}.json" for seed in range(args.seeds)]
    earlier = [kept.read(path, identity) for path in paths]  # all, before minutes are spent on one of them
    data, results = job.data.to(job.device), []
    for seed, path in enumerate(paths):
        result, text = earlier[seed], f"from {path}"
        if result is None:
            rows = job_of.train(data, args.steps, [seed])
            result = {"machine": job.facts, "arms": rows}
            kept.write(path, identity, result)
            text = f"{sum(row['seconds'] for row in rows):.0f} s of training, kept in {path}"
        results.append(result)
        console.print(f"{f'seed {seed}:':<16}{text}", soft_wrap=True)
    machines = [{"seed": seed} | result["machine"] for seed, result in enumerate(results)]
    return [row for result in results for row in result["arms"]], machines
