"""What is known of one arm in one setting, as in `models.json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import tritonbn
from bench.agreement import loss_difference
from bench.models import arms
from bench.models.arms import BASELINE, Start
from bench.models.profiles import Shares
from bench.models.settings import Setting
from bench.models.turns import WarmUp, ratios, whole
from tritonbn.timing import quartiles

Row = dict[str, Any]
PARTS = ("forward_ms", "backward_ms", "optimizer_ms")
# Between losses of training, or logits relative to the largest: rounding, and what some steps make of it.
TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}


def blank(setting: Setting, provider: str, processes: int) -> Row:
    """A row before anything was measured. Times are milliseconds per step: medians, with quartiles."""
    return asdict(setting) | {
        "provider": provider, "processes": processes, "ms": None, "ms_low": None, "ms_high": None, "steps": 0,
        "forward_ms": None, "backward_ms": None, "optimizer_ms": None,  # of a graph they are not known
        "images_per_second": None,  # of all processes
        "speedup": None, "speedup_low": None, "speedup_high": None,  # times as fast as torch, in turns with it
        "first_step_s": None, "warm_up_s": None, "warm_up_steps": None, "stable": None, "peak_bytes": None,
        "shares_of": None, "shares": None, "kernels": None,  # GPU kernels of a step, of a graph's before capture
        "norms": None, "swapped": None, "fused": None, "left": None, "folded": None,  # layers
        "bn_elements": None,  # of all batch norm outputs, per example
        "first_losses": None, "difference": None, "agrees": None, "finite": None, "notes": [], "error": None,
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


def compared(row: Row, logits: Tensor | None, torchs_row: Row, torchs_logits: Tensor | None) -> Row:
    """By how much losses or logits differ from torch's, and whether that is rounding."""
    if row["provider"] == "none":
        return {}
    if logits is None or torchs_logits is None:
        difference = loss_difference(torchs_row["first_losses"], row["first_losses"])
    else:
        difference = float((logits - torchs_logits).abs().max() / torchs_logits.abs().max())
    agrees = difference <= TOLERANCE[row["dtype"]]
    return {"difference": difference, "agrees": agrees}


def failed(rows: Sequence[Row]) -> list[Row]:
    """Our rows without a time that should have one, and those that do not compute what torch does."""
    ours = [row for row in rows if row["provider"] in arms.OURS]
    return [row for row in ours if row["agrees"] is False or (row["error"] and not row["error"].startswith(NOT_HERE))]


NOT_HERE = "not here: "  # what the machine cannot do is nobody's failure


def baseline(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["provider"] == BASELINE), None)
