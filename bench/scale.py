"""How much `python -m bench gpu` does: the steps in their order, their shares of the time, and their sizes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Scale(NamedTuple):
    """Sizes are options of the commands."""

    total: int  # seconds of all steps together
    shares: Mapping[str, int]  # of each step, of all that are chosen
    tests: Sequence[str] | None  # files that begin so; None: all
    ops: Sequence[str]
    tune: Sequence[str]
    network: Sequence[str]
    mnist_network: Sequence[str]
    mnist_steps: str


RESNET50 = ("--model", "resnet50", "--batch", "256", "--dtype", "bf16", "--layout", "channels_last")
# As it is trained in the paper's experiment.
MLP = ("--model", "mnist-mlp", "--batch", "60", "--dtype", "fp32")
LAYERS = ("--set", "resnet50-256", "--dtype", "bf16", "--set", "mnist")

FIRST = ("determinism", "semantics", "torch_suite")  # of the tests: they say most
# What is left up to nine and three minutes is for what is around the steps.
FULL = Scale(
    525,
    {"environment": 10, "bandwidth": 32, "tests": 125, "more-tests": 30, "calibrate": 20, "ops": 110, "tune": 50,
     "ops-tuned": 32, "models": 80, "models-mnist": 16, "mnist": 20, "report": 20},
    None,
    LAYERS,
    ("--set", "resnet50-256"),
    (*RESNET50, "--mode", "eager,graph,compile", "--steps", "40"),  # measured in this order
    (*MLP, "--mode", "eager,graph", "--steps", "300"),
    "5000",
)  # fmt: skip
# Without tuning: what it had time for would be next to nothing.
QUICK = Scale(
    174,
    {"environment": 10, "bandwidth": 15, "tests": 32, "calibrate": 20, "ops": 38, "models": 32, "mnist": 15,
     "report": 18},
    FIRST,
    LAYERS,
    (),
    (*RESNET50, "--mode", "eager", "--provider", "torch,fused", "--steps", "10"),
    (),
    "1000",
)  # fmt: skip
TINY = ("--shape", "2,8,4,4", "--dtype", "bf16")
DRY = Scale(
    600,
    {name: 3 if name.startswith("models") else 1 for name in FULL.shares if name != "more-tests"},
    ("tiles",),
    (*TINY, "--layout", "channels_last", "--epilogue", "bn+add+relu", "--set", "mnist"),
    TINY,
    ("--model", "mnist-mlp", "--batch", "16", "--dtype", "bf16", "--mode", "eager", "--steps", "1"),
    ("--model", "mnist-mlp", "--batch", "16", "--dtype", "fp32", "--mode", "compile-graph", "--steps", "1"),
    "5",
)
