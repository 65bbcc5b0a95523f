"""The paper's ImageNet study in small: steps and seconds to Inception's own best accuracy, with and without BN."""

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import images
from bench.console import console, print_columns
from bench.errors import BenchError
from bench.files import writable_folder, write_json
from bench.measure import machine, pick_device
from bench.mnist import MOST_STEPS, at_most
from bench.mnist_tables import counted
from bench.study import inception_options, inception_pictures, inception_sweep, inception_tables
from bench.study.augment import Pixels
from bench.study.checkpoint import Store
from bench.study.inception_progress import progress
from bench.study.inception_runs import POPULATION, Data, Job, Pace, train
from bench.study.inception_summary import SAME_ANSWERS, summarize, wrong_folds
from bench.study.recipe import ARMS, DEFAULT_ARMS, Recipe, recipes, same_data
from bench.study.trainer import Norm, Options

RESULTS = "study-inception"
add_arguments = inception_options.add_arguments


class Loaded(NamedTuple):
    """The data on the device, and what is said about it."""

    data: Data
    classes: int
    facts: dict[str, Any]
    skipped: list[str]


def run(args: argparse.Namespace) -> int:
    at_most("--steps", args.steps or 0, MOST_STEPS, "steps")
    at_most("--threads", args.threads or 0, os.cpu_count() or 1, "threads, one per CPU")
    if args.batch < 2:
        raise BenchError(f"--batch {args.batch}: expected at least 2 images, for batch norm to average over")
    out = writable_folder(args.out)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(args.data, args.image, args.batch, device)
    steps = args.steps or (inception_sweep.STEPS if args.sweep else inception_options.STEPS)
    pace = Pace(steps, min(args.evaluate, steps), args.checkpoint)
    options = Options(args.width, loaded.classes, args.dtype, args.graph, pace.block)
    base = Recipe(learning_rate=args.lr, l2=args.l2, decay=args.decay, momentum=args.momentum, batch=args.batch)
    facts = machine(device)
    settings = {
        "machine": facts,
        "data": loaded.facts,
        "steps": steps,
        "evaluate": pace.evaluate,
        "width": args.width,
        "dtype": args.dtype,
        "graph": args.graph and device.type == "cuda",
        "tf32_convolutions": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
    }
    introduce(facts, loaded, args)
    if args.sweep:
        return inception_sweep.run(base, loaded.data, pace, options, settings, range(args.seeds), out)
    return study(args, loaded, base, pace, options, settings, out)


def study(
    args: argparse.Namespace,
    loaded: Loaded,
    base: Recipe,
    pace: Pace,
    options: Options,
    settings: dict[str, Any],
    out: Path,
) -> int:
    every = recipes(base, inception_options.without(args))
    settings |= {"recipes": {name: asdict(recipe) for name, recipe in every.items()}}
    # In the file, but not in the way of going on with more of them.
    chosen = {"arms": arms(args), "norms": norms(args), "seeds": args.seeds, "checkpoint": pace.checkpoint}
    jobs = planned(every, chosen["arms"], chosen["norms"], args.seeds)
    same = same_data([job.recipe for job in jobs])
    store = Store(out / "runs", settings)
    with progress(jobs, pace.steps) as report:
        rows = train(jobs, loaded.data, pace, options, store, report)

    summary = summarize(rows, loaded.classes)
    content = {
        "machine": settings["machine"],
        "command": inception_options.command(args),
        "settings": {name: value for name, value in settings.items() if name not in ("machine", "data")}
        | chosen
        | {"same_data": same, "population_batches": POPULATION, "same_answers": SAME_ANSWERS},
        "data": loaded.facts | {"skipped": loaded.skipped},
        **summary,
        "runs": rows,
    }
    heading = inception_tables.heading(content)
    console.print(inception_tables.summary_table(summary, heading), crop=False)
    console.print(inception_tables.data_text(same), soft_wrap=True)
    if text := inception_tables.norms_text(summary):
        console.print(text, soft_wrap=True)
    console.print()
    print_columns([inception_tables.PAPER, *inception_tables.paper_lines(summary)])
    if found := list(inception_tables.inference_lines(rows)):
        console.print(f"\n{inception_tables.STATISTICS}", soft_wrap=True)
        print_columns([inception_tables.INFERENCE, *found])
    console.print()
    paths = [out / f"{RESULTS}.json", out / f"{RESULTS}.png"]
    write_json(paths[0], content)
    inception_pictures.figure_2(rows, summary, heading, paths[1])
    console.print(f"Written: {' and '.join(map(str, paths))}; {out / 'runs'} may go", soft_wrap=True)
    if wrong := wrong_folds(rows):
        console.print(f"FAIL: folded, the network answers otherwise: {'; '.join(wrong)}", soft_wrap=True)
    return 1 if wrong else 0


def arms(args: argparse.Namespace) -> list[str]:
    """In the paper's order, each once."""
    return [name for name in ARMS if name in (args.arm or DEFAULT_ARMS)]


def norms(args: argparse.Namespace) -> list[Norm]:
    """Ours alone on the CPU: there it is torch's arithmetic, and the second run would only take time."""
    if args.norm:
        return list(dict.fromkeys(args.norm))
    return ["torch", "tritonbn"] if pick_device(args.device).type == "cuda" else ["tritonbn"]


def planned(every: dict[str, Recipe], arms: Sequence[str], norms: Sequence[Norm], seeds: int) -> list[Job]:
    """All arms with one seed before the next: an unfinished study has something to compare."""
    return [
        Job(arm, norm, seed, every[arm])
        for seed in range(seeds)
        for arm in arms
        for norm in (norms if every[arm].batch_norm else [None])
    ]


def load(root: Path, side: int, batch: int, device: torch.device) -> Loaded:
    """BenchError where there is not one batch to train on."""
    train, val = images.splits(root)
    held = [images.in_memory(split, side) for split in (train, val)]
    if len(held[0].labels) < batch:
        raise BenchError(f"{train.folder}: expected at least {batch} images, one batch; got {len(held[0].labels)}")
    digest = hashlib.sha256()
    for memory in held:
        digest.update(memory.images.numpy().data)
        digest.update(memory.labels.numpy().data)
    facts = {
        "name": f"{root.resolve().name}, {side}x{side}",
        "train": len(held[0].labels),
        "val": len(held[1].labels),
        "classes": list(train.classes),
        "side": side,
        "sha256": digest.hexdigest(),  # of pixels and labels
    }
    skipped = [text for memory in held for text in memory.skipped]
    return Loaded(Data(*(Pixels.of(memory, device) for memory in held)), len(train.classes), facts, skipped)


def introduce(facts: dict[str, Any], loaded: Loaded, args: argparse.Namespace) -> None:
    where = facts["cpu"] if facts["device"] == "CPU" else f"{facts['device']}, {facts['cpu']}"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "tritonbn", "python"))
    data = loaded.facts
    counts = f"{data['train']:,} training and {data['val']:,} validation images, {loaded.classes} classes"
    for name, text in (
        ("data", f"{data['name']}, {counts}"),
        ("device", f"{where}, {counted(facts['threads'], 'thread')}, {args.dtype}"),
        ("versions", f"{versions}, commit {facts['commit'] or 'unknown'}"),
    ):
        console.print(f"{name + ':':<16}{text}", soft_wrap=True)
    if loaded.skipped:
        console.print(f"skipped:        {counted(len(loaded.skipped), 'file')} that cannot be read", soft_wrap=True)
        for line in loaded.skipped:
            console.print(f"                {line}", soft_wrap=True)
