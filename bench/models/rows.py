"""What is known of one arm in one setting, as in `models.json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import tritonbn
from bench.models import arms
from bench.models.arms import BASELINE, Start
from bench.models.profiles import Shares
from bench.models.settings import Setting
from bench.models.turns import WarmUp, ratios, whole
from tritonbn.timing import quartiles

Row = dict[str, Any]
PARTS = ("forward_ms", "backward_ms", "optimizer_ms")
# Of losses or logits, relative to the largest: rounding, and what a deep network makes of it.
TOLERANCE = {"fp32": 1e-2, "bf16": 2e-2, "fp16": 2e-2}
WORSE = 2  # times as far from the exact result as torch's


def blank(setting: Setting, provider: str, processes: int) -> Row:
    """A row before anything was measured. Times are milliseconds per step: medians, with quartiles."""
    return asdict(setting) | {
        "provider": provider, "processes": processes, "ms": None, "ms_low": None, "ms_high": None, "steps": 0,
        "forward_ms": None, "backward_ms": None, "optimizer_ms": None,  # of a graph they are not known
        "images_per_second": None,  # of all processes
        "speedup": None, "speedup_low": None, "speedup_high": None,  # times as fast as torch, in turns with it
        "first_step_s": None, "warm_up_s": None, "warm_up_steps": None, "stable": None,
        "peak_bytes": None,  # allocated for a step, the weights with it; of a graph's before it was captured, too
        "shares_of": None, "shares": None, "kernels": None,  # GPU kernels of a step
        "norms": None, "swapped": None, "fused": None, "left": None, "folded": None,  # layers
        "bn_elements": None,  # of all batch norm outputs, per example
        "first_losses": None,
        "difference": None, "deviation": None, "agrees": None,  # of losses or outputs, from torch's and from exact ones
        "finite": None, "notes": [], "error": None,
    }  # fmt: skip


def coverage(provider: str, network: nn.Module, begin: Start) -> Row:
    """How many batch norms there were, and what became of them."""
    found = tritonbn.report(network)
    norms = len(tritonbn.report(begin.network).rows)
    left = found.convertible + found.left_alone
    # torch's folding leaves nothing behind that the report could see.
    folded = 0 if provider == "none" else norms - found.replaced - left
    return {"norms": norms, "swapped": found.replaced, "fused": found.fused, "left": left, "folded": folded,
            "bn_elements": begin.elements}  # fmt: skip


def warmed(found: WarmUp, before: Row | None = None) -> Row:
    """What the warm-up took, together with one before: a graph is warmed up twice, as steps and as a graph."""
    first, seconds, steps = found[:3]
    if before is not None:
        first, seconds, steps = before["first_step_s"], seconds + before["warm_up_s"], steps + before["warm_up_steps"]
    return {"first_step_s": first, "warm_up_s": seconds, "warm_up_steps": steps, "stable": found.stable}


def times(rounds: Sequence[Tensor], torchs: Sequence[Tensor] | None, images: int) -> Row:
    """Of the milliseconds [block, parts] of each round, for so many images per step."""
    parts = torch.cat(list(rounds))
    ms = quartiles(whole(parts).tolist())
    found: Row = {"ms": ms.median, "ms_low": ms.low, "ms_high": ms.high, "steps": len(parts)}
    found["images_per_second"] = 1e3 * images / ms.median
    if parts.shape[1] == len(PARTS):
        found |= dict(zip(PARTS, parts.median(dim=0).values.tolist(), strict=True))
    if torchs is not None and len(torchs) == len(rounds):
        speedup = ratios(list(rounds), list(torchs))
        found |= {"speedup": speedup.median, "speedup_low": speedup.low, "speedup_high": speedup.high}
    return found


def profiled(row: Row, found: Shares | None) -> None:
    """Write the shares into the row."""
    if found is None:
        row["notes"].append("the profiler saw nothing")
        return
    row |= {"shares_of": found.of, "shares": found.share, "kernels": found.kernels}
    if found.changed_layout:
        row["notes"].append("cuDNN changes layouts")


def compared(row: Row, result: Tensor, torchs: Tensor, exact: Tensor | None) -> Row:
    """By how much losses or logits differ from torch's and from exact ones; agrees: whether that is rounding.

    It is where torch's own are as far from the exact ones: networks at their start make much of little.
    """
    if row["provider"] == "none":
        return {}
    found: Row = {"difference": relative(result, torchs), "agrees": None}
    tolerance = TOLERANCE[row["dtype"]]
    if found["difference"] <= tolerance:
        found["agrees"] = True
    if exact is not None:
        found["deviation"] = relative(result, exact)
        if not found["agrees"]:
            found["agrees"] = found["deviation"] <= WORSE * relative(torchs, exact) + tolerance
    return found


def relative(values: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value; NaN if any is."""
    return float((values - exact).abs().max() / exact.abs().max())


def of_torch(row: Row, rows: Sequence[Row]) -> Row | None:
    """Torch's row of the same setting."""
    keys = (*Setting.__dataclass_fields__, "processes")
    return next((r for r in rows if r["provider"] == BASELINE and all(r[key] == row[key] for key in keys)), None)


def failed(rows: Sequence[Row]) -> list[Row]:
    """Our rows without a time that should have one, and those that do not compute what torch does.

    What is not here, and what torch cannot do in the same words, is nobody's failure.
    """
    found = []
    for row in rows:
        if row["provider"] not in arms.OURS:
            continue
        torchs = of_torch(row, rows)
        shared = torchs is not None and torchs["error"] == row["error"]
        if row["agrees"] is False or (row["error"] and not shared and not row["error"].startswith(NOT_HERE)):
            found.append(row)
    return found


NOT_HERE = "not here: "  # before what the machine cannot do
