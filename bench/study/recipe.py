"""How the arms of the paper's table are trained (arXiv:1502.03167, sections 4.2.1 and 4.2.2), on small images."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench.networks.bn_inception import DROPOUT, Activation

# Chosen by `--sweep` for Inception alone; the arms with batch norm follow by the paper's factors and are never tuned.
# The sweep was short and of a narrow network: width 0.25, 600 steps, 5,000 images of CIFAR-10, one seed, on a CPU. Best
# accuracy of 0.0006, 0.002, 0.006, 0.02, 0.06, 0.2: 23, 28, 29, 25, 19, 10%. None diverged: above 0.02 it hardly
# learns. To be confirmed at full width and length.
LEARNING_RATE = 0.006
# The paper gives neither these nor the momentum: usual values, chosen before any arm with batch norm was trained.
L2 = 5e-4
DECAY = 0.95  # per 1,000 steps: half of the rate is left after 13,500
MOMENTUM = 0.9
BATCH = 32  # the paper's: a step is an update from 32 images
STRONG, WEAK = 0.4, 0.1  # photometric distortion
FASTER_DECAY, LESS_L2 = 6, 5

MODIFICATIONS = {
    "learning-rate": "the learning rate times 5 or 30",
    "no-dropout": f"no dropout (otherwise {DROPOUT:.0%})",
    "l2": f"L2 regularization divided by {LESS_L2}",
    "decay": f"the learning rate decays {FASTER_DECAY} times faster",
    "no-lrn": "no local response normalization",
    "shuffling": "batches are drawn anew each epoch (otherwise the same examples are always in a batch together)",
    "photometric": f"brightness, contrast and saturation vary by {WEAK:.0%} (otherwise {STRONG:.0%})",
}
SAME_DATA = ("shuffling", "photometric")  # without these two all arms see the same batches of the same pixels


@dataclass(frozen=True)
class Recipe:
    """Everything that makes one arm."""

    batch_norm: bool = False
    activation: Activation = "relu"
    learning_rate: float = LEARNING_RATE
    l2: float = L2  # of the weights, not of biases and batch norm's parameters
    decay: float = DECAY  # what is left of the learning rate after 1,000 steps
    momentum: float = MOMENTUM
    batch: int = BATCH
    dropout: float = DROPOUT
    response_normalization: bool = True
    thorough_shuffling: bool = False
    jitter: float = STRONG

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        return self.learning_rate * float(self.decay ** (step / 1000))


class Arm(NamedTuple):
    """A line of the paper's table: what distinguishes it, and what the paper saw."""

    batch_norm: bool
    activation: Activation
    factor: int  # of the learning rate
    modified: bool  # by all of `MODIFICATIONS`
    paper: str


ARMS = {
    "Inception": Arm(False, "relu", 1, False, "sets the target"),
    "BN-Baseline": Arm(True, "relu", 1, False, "2.3x fewer steps"),
    "BN-x5": Arm(True, "relu", 5, True, "14.8x fewer steps, the fewest"),
    "BN-x30": Arm(True, "relu", 30, True, "11.5x fewer steps, best at the end"),
    "BN-x5-Sigmoid": Arm(True, "sigmoid", 5, True, "trains, never arrives"),
    "Inception-x5": Arm(False, "relu", 5, False, "diverges"),
    "Inception-Sigmoid": Arm(False, "sigmoid", 1, False, "stays at chance"),
}
BASE = "Inception"
DEFAULT_ARMS = tuple(ARMS)[:5]  # those of the paper's table; its text tells of the others


def recipes(base: Recipe, without: Collection[str] = ()) -> dict[str, Recipe]:
    """The recipe of each arm; `without` takes modifications out of all of them."""
    return {name: recipe(base, arm, without) for name, arm in ARMS.items()}


def recipe(base: Recipe, arm: Arm, without: Collection[str]) -> Recipe:
    changes: dict[str, dict[str, Any]] = {
        "no-dropout": {"dropout": 0.0},
        "l2": {"l2": base.l2 / LESS_L2},
        "decay": {"decay": base.decay**FASTER_DECAY},
        "no-lrn": {"response_normalization": False},
        "shuffling": {"thorough_shuffling": True},
        "photometric": {"jitter": WEAK},
    }
    made = replace(base, batch_norm=arm.batch_norm, activation=arm.activation)
    if "learning-rate" not in without:
        made = replace(made, learning_rate=base.learning_rate * arm.factor)
    for name, change in changes.items():
        if arm.modified and name not in without:
            made = replace(made, **change)
    return made


def same_data(chosen: Collection[Recipe]) -> bool:
    """Whether arms with one seed see the same pixels in the same steps."""
    return len({(one.thorough_shuffling, one.jitter, one.batch) for one in chosen}) == 1
