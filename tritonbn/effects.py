"""What a forward does besides computing its output from its inputs: a trace would do it once, its graph never again."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Untraceable(Exception):
    """A graph would not do what the forward does; says why, as the end of a sentence about the forward."""


def surroundings() -> tuple[Any, ...]:
    """What the operations recorded depend on besides their inputs. Equal at all nodes: then it need not be recorded."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        nesting,
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # torch.utils.checkpoint sets them
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.backends.cudnn.enabled,
        torch.cuda.current_stream() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    )


@contextmanager
def without_effects(module: nn.Module) -> Iterator[None]:
    """Undo what the block does to attributes of module and its children and to the random generators; Untraceable then.

    The graph would do it never again.
    """
    held = [
        (place, place.copy())
        for owner in module.modules()
        for place in (vars(owner), *vars(owner).values())
        if isinstance(place, (dict, list, set))
    ]
    versions = [(t, t._version) for place, _ in held for t in _tensors(place) if not t.is_inference()]
    generators = random.getstate(), torch.get_rng_state(), _numpy_state()
    try:
        yield
    finally:
        changed = [(place, copy) for place, copy in held if not _same(place, copy)]
        for place, copy in changed:
            place.clear()
            place.extend(copy) if isinstance(place, list) else place.update(copy)
        drew = _restore(*generators)
    if changed:
        raise Untraceable("it sets attributes of the module")
    if any(t._version != version for t, version in versions):
        raise Untraceable("it writes to a tensor that is neither an input, a parameter nor a buffer")
    if drew:
        raise Untraceable("it draws random numbers itself")


def _tensors(place: Any) -> Iterator[Tensor]:
    return (value for value in (place.values() if isinstance(place, dict) else place) if isinstance(value, Tensor))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, set):
        return bool(a == b)
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and value is b[key] for key, value in a.items())
    return all(x is y for x, y in zip(a, b, strict=True))


def _numpy_state() -> Any:
    return sys.modules["numpy"].random.get_state(legacy=False) if "numpy" in sys.modules else None


def _restore(python: Any, torchs: Tensor, numpys: Any) -> bool:
    """Set the generators back; whether one of them had moved."""
    moved = random.getstate() != python or not torch.equal(torch.get_rng_state(), torchs)
    random.setstate(python)
    torch.set_rng_state(torchs)
    if numpys is not None:
        moved |= str(_numpy_state()["state"]) != str(numpys["state"])
        sys.modules["numpy"].random.set_state(numpys)
    return moved
