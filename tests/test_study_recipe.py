"""The recipes of the Inception study against the paper's table, by value."""

import math
from dataclasses import asdict

import pytest

from bench.study.recipe import ARMS, BASE, MODIFICATIONS, SAME_DATA, Recipe, recipes, same_data

GIVEN = Recipe(learning_rate=0.01, l2=5e-4, decay=0.9, momentum=0.8, batch=16)
# Batch norm, activation, learning rate, L2, decay, dropout, response normalization, thorough shuffling, distortion.
PAPER = {
    "Inception": (False, "relu", 0.01, 5e-4, 0.9, 0.4, True, False, 0.4),
    "BN-Baseline": (True, "relu", 0.01, 5e-4, 0.9, 0.4, True, False, 0.4),
    "BN-x5": (True, "relu", 0.05, 1e-4, 0.531441, 0.0, False, True, 0.1),
    "BN-x30": (True, "relu", 0.3, 1e-4, 0.531441, 0.0, False, True, 0.1),
    "BN-x5-Sigmoid": (True, "sigmoid", 0.05, 1e-4, 0.531441, 0.0, False, True, 0.1),
    "Inception-x5": (False, "relu", 0.05, 5e-4, 0.9, 0.4, True, False, 0.4),
    "Inception-Sigmoid": (False, "sigmoid", 0.01, 5e-4, 0.9, 0.4, True, False, 0.4),
}


def values(recipe: Recipe) -> tuple[object, ...]:
    return (
        recipe.batch_norm, recipe.activation, recipe.learning_rate, recipe.l2, recipe.decay, recipe.dropout,
        recipe.response_normalization, recipe.thorough_shuffling, recipe.jitter,
    )  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_arms_are_those_of_the_paper(arm: str) -> None:
    recipe = recipes(GIVEN)[arm]
    assert (recipe.momentum, recipe.batch) == (0.8, 16)
    for found, expected in zip(values(recipe), PAPER[arm], strict=True):
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


CHANGED: dict[str, dict[str, object]] = {
    "learning-rate": {"learning_rate": 0.01},
    "no-dropout": {"dropout": 0.4},
    "l2": {"l2": 5e-4},
    "decay": {"decay": 0.9},
    "no-lrn": {"response_normalization": True},
    "shuffling": {"thorough_shuffling": False},
    "photometric": {"jitter": 0.4},
}


@pytest.mark.parametrize("name", MODIFICATIONS)
def test_each_modification_can_be_taken_out_alone(name: str) -> None:
    everything, without = recipes(GIVEN), recipes(GIVEN, [name])
    for arm in ("BN-x5", "BN-x30", "BN-x5-Sigmoid"):
        assert asdict(without[arm]) == asdict(everything[arm]) | CHANGED[name]
    for arm in ("Inception", "BN-Baseline"):
        assert without[arm] == everything[arm]


def test_without_all_modifications_only_batch_norm_is_left() -> None:
    made = recipes(GIVEN, list(MODIFICATIONS))
    assert made["BN-x30"] == made["BN-x5"] == made["BN-Baseline"]
    assert asdict(made["BN-x30"]) == asdict(made[BASE]) | {"batch_norm": True}
    assert made["Inception-x5"] == made[BASE]


def test_same_data_is_told_from_other_data() -> None:
    assert not same_data(recipes(GIVEN).values())
    assert same_data(recipes(GIVEN, SAME_DATA).values())
    assert not same_data(recipes(GIVEN, SAME_DATA[:1]).values())
    assert same_data([recipes(GIVEN)[arm] for arm in ("Inception", "BN-Baseline")])


def test_learning_rate_decays_exponentially_six_times_faster_with_batch_norm() -> None:
    made = recipes(Recipe(learning_rate=0.01, decay=0.9))
    slow, fast = made["Inception"], made["BN-x5"]
    assert [slow.rate(step) for step in (0, 500, 1000, 2000)] == pytest.approx([0.01, 0.01 * 0.9**0.5, 0.009, 0.0081])
    assert [fast.rate(step) for step in (0, 1000)] == pytest.approx([0.05, 0.05 * 0.9**6])
    assert math.log(fast.rate(700) / 0.05) == pytest.approx(6 * math.log(slow.rate(700) / 0.01))
