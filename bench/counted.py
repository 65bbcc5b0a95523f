"""Operations of torch within a call that a GPU would have to run, or be waited for: kernels, memsets, copies."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

# They allocate, or describe memory that is there. Where contiguous, to and reshape copy, they call what is not here.
FREE = frozenset(f"aten::{name}" for name in [
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "contiguous", "detach", "detach_", "empty",
    "empty_like", "empty_strided", "expand", "expand_as", "flatten", "lift_fresh", "narrow", "new_empty",
    "new_empty_strided", "permute", "record_stream", "requires_grad_", "reshape", "resolve_conj", "resolve_neg",
    "select", "slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "view_as",
])  # fmt: skip


def other_launches(work: Callable[[], object]) -> list[str]:
    """The operations of torch, by name, that `work` runs beside those of `FREE`; a backward within it included.

    An operation that is made of others counts as those: a clone is one copy_. On CPU tensors they are those that the
    same Python would run on a GPU's.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints a line whenever it starts or stops
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    events = profiler.events()
    assert events is not None
    return [event.name for event in events if _counts(event) and not any(map(_counts, _within(event)))]


def _counts(event: Any) -> bool:
    return event.name.startswith("aten::") and event.name not in FREE


def _within(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _within(child)
