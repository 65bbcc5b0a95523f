"""What can be said to `python -m bench study inception`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from bench.mnist import positive
from bench.study.recipe import (
    ARMS,
    BATCH,
    DECAY,
    DEFAULT_ARMS,
    L2,
    LEARNING_RATE,
    MODIFICATIONS,
    MOMENTUM,
    SAME_DATA,
)
from bench.study.trainer import DTYPES, SMALL_SIDE

STEPS = 15_000
# Options that make another study of it, with their defaults; what remains is the machine's business.
TELLING = {
    "arm": None, "norm": None, "evaluate": 200, "lr": LEARNING_RATE, "l2": L2, "decay": DECAY, "momentum": MOMENTUM,
    "batch": BATCH, "without": None, "same_data": False, "dtype": "fp32", "image": 32, "width": 1.0, "graph": True,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modifications = "; ".join(f"{name}: {what}" for name, what in MODIFICATIONS.items())
    parser.epilog = (
        f"The paper's modifications, all in BN-x5, BN-x30 and BN-x5-Sigmoid: {modifications}. "
        "Interrupted or killed, the same command goes on where it was, with the same batches, noise and rates; on a "
        "CPU that gives the same curves, while a GPU sums in no fixed order, resumed or not."
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", required=True, help="with train/<class>/<image> and val/<class>/<image>")
    add("--arm", action="append", choices=list(ARMS), metavar="ARM", help=f"repeatable; {default_arms()}")
    add("--norm", action="append", choices=["torch", "tritonbn"], help="repeatable (default: both; tritonbn on a CPU)")
    add("--steps", type=positive, help=f"of a run (default: {STEPS:,})")
    add("--seeds", type=positive, default=3, help="runs per arm, each with its own seed (default: %(default)s)")
    add("--evaluate", type=positive, default=TELLING["evaluate"], metavar="N", help="each N steps (default: 200)")
    add("--checkpoint", type=positive, metavar="N", help="save each N steps (default: at an evaluation, every 20 s)")
    add("--lr", type=above(0), default=LEARNING_RATE, help="L, of Inception (default: %(default)s, see --sweep)")
    add("--l2", type=above(0, or_equal=True), default=L2, help="L2 regularization of Inception (default: %(default)s)")
    add("--decay", type=decay, default=DECAY, help="of L in 1,000 steps (default: %(default)s)")
    add("--momentum", type=momentum, default=MOMENTUM, help="of SGD (default: %(default)s)")
    add("--batch", type=positive, default=BATCH, help="images per step (default: %(default)s, the paper's)")
    add("--without", action="append", choices=list(MODIFICATIONS), metavar="NAME",
        help="take a modification out of all arms (repeatable, see below)")  # fmt: skip
    add("--same-data", action="store_true", help=f"the same as {' '.join(f'--without {name}' for name in SAME_DATA)}")
    add("--sweep", action="store_true", help="train Inception alone with learning rates in factors of 3, to choose L")
    add("--dtype", choices=list(DTYPES), default="fp32", help="bf16 is autocast (default: %(default)s)")
    add("--image", type=positive, default=32, metavar="SIDE",
        help=f"of images, scaled; above {SMALL_SIDE} with the original stem (default: %(default)s)")  # fmt: skip
    add("--width", type=above(0), default=1.0, help="of the network, to try things out (default: %(default)s)")
    add("--no-graph", dest="graph", action="store_false", help="on a GPU, no CUDA graph of the step")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--threads", type=positive, help="of the CPU (default: torch's choice)")
    add("--out", type=Path, metavar="DIR", default=Path("out/study-inception"),
        help="for results and checkpoints (default: %(default)s)")  # fmt: skip


def default_arms() -> str:
    others = [name for name in ARMS if name not in DEFAULT_ARMS]
    return f"{', '.join(DEFAULT_ARMS)} (default: these), {', '.join(others)}"


def number(text: str, valid: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not valid(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return value


def above(least: float, or_equal: bool = False) -> Callable[[str], float]:
    """A finite number."""
    words = "a number from" if or_equal else "a number above"

    def convert(text: str) -> float:
        return number(text, lambda v: (least < v or (or_equal and v == least)) and v < 1e6, f"{words} {least:g}")

    return convert


def decay(text: str) -> float:
    return number(text, lambda value: 0 < value <= 1, "a number above 0, at most 1")


def momentum(text: str) -> float:
    return number(text, lambda value: 0 <= value < 1, "a number from 0, below 1")


def without(args: argparse.Namespace) -> set[str]:
    return {*(args.without or ()), *(SAME_DATA if args.same_data else ())}


def command(args: argparse.Namespace) -> str:
    """What repeats the study, but for the paths and the machine."""
    words = [f"python -m bench study inception --data DIR --steps {args.steps or STEPS} --seeds {args.seeds}"]
    for name, default in TELLING.items():
        value, option = getattr(args, name), "--no-graph" if name == "graph" else f"--{name.replace('_', '-')}"
        if value != default:
            values = [""] if isinstance(value, bool) else value if isinstance(value, list) else [value]
            words += [f"{option} {each}".strip() for each in values]
    return " ".join(words)
