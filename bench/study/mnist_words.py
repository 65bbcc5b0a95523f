"""The study of MNIST in words: what was seen beside what was expected, and what must be said of it."""

from collections.abc import Iterator, Sequence

from bench.mnist_tables import LABELS, arrivals, spread
from bench.study.expected import Finding, all_gains
from bench.training import ARMS, Row

FINDINGS = ("", "arm", "seen: mean (range)", "expected", "inside?")
DRIFTS = ("last hidden layer once settled, median over units", *LABELS.values())
DRIFT_LABELS = {
    "shift": "shift: range of the median / mean width",
    "growth": "growth: largest width / smallest",
    "width_first": "15-85% width, first",
    "width_last": "15-85% width, last",
}


def finding_lines(found: Sequence[Finding]) -> Iterator[list[str]]:
    for finding in found:
        if finding.unit == "step":
            seen = arrivals([None if value is None else int(value) for value in finding.seen], " ")
            band = f"step {finding.low:,.0f}-{finding.high:,.0f}"
        else:
            seen = "-" if None in finding.seen else spread([value or 0 for value in finding.seen], "{:.2f}", " ")
            band = f"{finding.low:.2f}-{finding.high:.2f} {finding.unit}"
        yield [finding.what, LABELS[finding.arm], seen, band, "yes" if finding.inside else "NO"]


def drift_lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    for name, label in DRIFT_LABELS.items():
        arms = ([row["drift"][name] for row in rows if row["arm"] == arm] for arm in ARMS)
        yield [label, *(spread(values, "{:.2f}", " ") for values in arms)]


def notes(rows: Sequence[Row]) -> list[str]:
    """What must be said beside the figure, with this run's own values."""
    arrived = {arm: arrivals([row["steps_to_90"] for row in rows if row["arm"] == arm], " ") for arm in ARMS}
    growth = {arm: spread([row["drift"]["growth"] for row in rows if row["arm"] == arm], "{:.2f}", " ") for arm in ARMS}
    gains = all_gains(rows)["tritonbn"]
    return [
        "At full length the effect is in the speed more than in the end. Here: first step with 90%:"
        f" {arrived['none']} without batch norm, {arrived['tritonbn']} with it; final accuracy with it:"
        f" {sum(gains) / len(gains):+.2f} points.",
        "It depends on the setting: weights of standard deviation 0.1 and a learning rate of 0.1 are one choice that"
        " reproduces the figure (the paper gives neither). At larger rates the network without batch norm comes close"
        " or leads, at small rates and weights it does not learn: what batch norm mostly buys is tolerance to both.",
        f"Batch norm pins the median of each input; the width between percentiles 15 and 85 still changes, by a factor"
        f" of {growth['tritonbn']} with it and {growth['none']} without: more stable, not constant. That this explains"
        " the gain is disputed (Santurkar et al. 2018, arXiv:1805.11604): see `python -m bench study covariate-shift`.",
    ]
