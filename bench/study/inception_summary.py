"""What follows from the runs of the Inception study: steps and seconds to Inception's own best, and what agrees."""

from collections.abc import Callable, Sequence
from typing import TypedDict

from bench.study.inception_runs import Point, Row
from bench.study.recipe import ARMS, BASE
from tritonbn.timing import quartiles

SAME_ANSWERS = 99.0  # percent: rounding may turn a few answers when batch norm is folded, but not more
TRAINS, CHANCE = 2.0, 1.5  # times the accuracy of guessing: above the first it trains, below the second it does not


class Line(TypedDict):
    """An arm with one kind of batch norm, over its seeds. Accuracies are percents."""

    arm: str
    norm: str | None
    seeds: list[int]
    steps_to_target: list[int | None] | None  # per seed; None for never. None for all without a target
    seconds_to_target: list[float | None] | None
    fewer_steps: float | None  # Inception's over this arm's, of means; None unless all seeds arrive
    fewer_seconds: float | None
    ms_per_step: list[float]  # quartiles over blocks of all seeds
    best: list[float | None]  # None for a seed that was never evaluated
    best_step: list[int | None]
    best_top5: list[float | None]
    diverged_at: list[int | None]
    paper: str
    agrees: str | None  # with the paper: "yes", or what is otherwise; None where it cannot be told


class Summary(TypedDict):
    target: float | None  # mean over seeds of the best accuracy of Inception; None if it was not run, or diverged
    lines: list[Line]
    norms_agree: dict[str, bool]  # by arm: whether the seeds' ranges of steps with torch's and our batch norm overlap


def summarize(rows: Sequence[Row], classes: int) -> Summary:
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["norm"]), []).append(row)
    bases = groups.get((BASE, None), [])
    bests = [best(row) for row in bases if row["diverged_at"] is None]
    found = [point["accuracy"] for point in bests if point is not None]
    target = sum(found) / len(found) if found else None
    lines = [line(mine, target) for mine in groups.values()]
    base = next((one for one in lines if one["arm"] == BASE), None)
    for one in lines:
        if base is not None:
            one["fewer_steps"] = ratio(base["steps_to_target"], one["steps_to_target"])
            one["fewer_seconds"] = ratio(base["seconds_to_target"], one["seconds_to_target"])
    for one in lines:
        rivals = [other for other in lines if other["norm"] in (None, one["norm"])]
        one["agrees"] = verdict(one, rivals, 100 / classes)
    return Summary(target=target, lines=lines, norms_agree=norms_agree(lines))


def line(rows: Sequence[Row], target: float | None) -> Line:
    arm, bests = rows[0]["arm"], [best(row) for row in rows]
    # Inception's own best is the target, so that each of its seeds that made the target arrives there with its own.
    own = [None if row["diverged_at"] else point for row, point in zip(rows, bests, strict=True)]
    points = own if arm == BASE else [arrival(row, target) for row in rows]
    return Line(
        arm=arm,
        norm=rows[0]["norm"],
        seeds=[row["seed"] for row in rows],
        steps_to_target=None if target is None else [point and point["step"] for point in points],
        seconds_to_target=None if target is None else [point and point["seconds"] for point in points],
        fewer_steps=None,
        fewer_seconds=None,
        ms_per_step=list(quartiles([ms for row in rows for ms in row["ms_per_step"]])),
        best=[point and point["accuracy"] for point in bests],
        best_step=[point and point["step"] for point in bests],
        best_top5=[max((p["top5"] for p in row["curve"] if p["top5"] is not None), default=None) for row in rows],
        diverged_at=[row["diverged_at"] for row in rows],
        paper=ARMS[arm].paper,
        agrees=None,
    )


def best(row: Row) -> Point | None:
    """Where accuracy was highest, for the first time."""
    return max(row["curve"], key=lambda point: point["accuracy"], default=None)


def arrival(row: Row, target: float | None) -> Point | None:
    if target is None:
        return None
    return next((point for point in row["curve"] if point["accuracy"] >= target), None)


def ratio(base: Sequence[float | None] | None, mine: Sequence[float | None] | None) -> float | None:
    """Mean over mean; None unless all arrived."""
    if base is None or mine is None:
        return None
    reached = [value for value in base if value is not None], [value for value in mine if value is not None]
    if not reached[0] or len(reached[1]) < len(mine) or not sum(reached[1]):
        return None
    return (sum(reached[0]) / len(reached[0])) / (sum(reached[1]) / len(reached[1]))


def mean_best(one: Line) -> float:
    """Over seeds; one that was never evaluated counts as 0."""
    return sum(value or 0.0 for value in one["best"]) / len(one["best"])


def verdict(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    """Whether the paper's finding holds here: "yes", or what is otherwise."""
    diverged = sum(step is not None for step in one["diverged_at"])
    if one["arm"] != "Inception-x5" and diverged:
        return "diverges" + of(diverged, one)
    return EXPECTED[one["arm"]](one, lines, guessing)


def of(count: int, one: Line) -> str:
    seeds = len(one["seeds"])
    return "" if count == seeds else f" in {count} of {seeds} runs"


def sets_target(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    return "yes" if mean_best(one) >= TRAINS * guessing else "does not train"


def fewer(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    if one["steps_to_target"] is None:
        return None
    never = sum(step is None for step in one["steps_to_target"])
    if never:
        return "never arrives" + of(never, one)
    return "yes" if (one["fewer_steps"] or 0) > 1 else "not fewer steps"


def fewest(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    others = max((other["fewer_steps"] or 0 for other in lines if other is not one), default=0)
    found = fewer(one, lines, guessing)
    return "fewer steps, not the fewest" if found == "yes" and (one["fewer_steps"] or 0) < others else found


def best_at_the_end(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    found = fewer(one, lines, guessing)
    return "fewer steps, not the best" if found == "yes" and mean_best(one) < max(map(mean_best, lines)) else found


def only_trains(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    if one["steps_to_target"] is None:
        return None
    if any(step is not None for step in one["steps_to_target"]):
        return "arrives"
    return "yes" if mean_best(one) >= TRAINS * guessing else "does not train"


def diverges(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    spared = sum(step is None for step in one["diverged_at"])
    return "does not diverge" + of(spared, one) if spared else "yes"


def stays(one: Line, lines: Sequence[Line], guessing: float) -> str | None:
    return "yes" if mean_best(one) < CHANCE * guessing else "trains"


EXPECTED: dict[str, Callable[[Line, Sequence[Line], float], str | None]] = {
    "Inception": sets_target,
    "BN-Baseline": fewer,
    "BN-x5": fewest,
    "BN-x30": best_at_the_end,
    "BN-x5-Sigmoid": only_trains,
    "Inception-x5": diverges,
    "Inception-Sigmoid": stays,
}


def norms_agree(lines: Sequence[Line]) -> dict[str, bool]:
    """Per arm with both where any run arrives: whether the ranges of steps to the target overlap, never the longest."""
    found = {}
    for ours in lines:
        theirs = next((one for one in lines if (one["arm"], one["norm"]) == (ours["arm"], "torch")), None)
        if ours["norm"] != "tritonbn" or theirs is None:
            continue
        if ours["steps_to_target"] is None or theirs["steps_to_target"] is None:
            continue
        a, b = ([float("inf") if s is None else s for s in one["steps_to_target"] or ()] for one in (ours, theirs))
        if min(*a, *b) < float("inf"):
            found[ours["arm"]] = min(a) <= max(b) and min(b) <= max(a)
    return found


def wrong_folds(rows: Sequence[Row]) -> list[str]:
    """The runs whose folded network answers otherwise."""
    checked = [(row, row["inference"]) for row in rows]
    return [
        f"{row['arm']}, {row['norm']}, seed {row['seed']}: {found['same_answers']:.1f}%"
        for row, found in checked
        if found is not None and found["same_answers"] < SAME_ANSWERS
    ]
