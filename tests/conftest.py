"""Where the tests run: on the GPU when there is one, else in Triton's interpreter on CPU tensors."""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined

import triton.language as tl

from bench import quick_interpreter
from tritonbn import dispatch, launch, tickets

if launch.INTERPRETED:
    quick_interpreter.hurry()
# What Triton's interpreter replaces while a kernel runs, before any has: it does not put all of it back.
LANGUAGE = {of: dict(vars(of)) for of in (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)}

# Nothing that is planned from here on reads or writes the user's measured plans, nor do processes that a test starts.
CACHE = tempfile.TemporaryDirectory(prefix="tritonbn-tests-")
os.environ["TRITONBN_CACHE_DIR"] = CACHE.name
os.environ["TRITONBN_AUTOTUNE"] = "0"  # nor measures a GPU, unless that is what is tested


def pytest_unconfigure() -> None:
    CACHE.cleanup()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two workers on two cores: threads of torch's own would only fight."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """No test depends on what others were told about their tensors."""
    dispatch.forget_calls()


@pytest.fixture(autouse=True)
def language() -> Iterator[None]:
    """Kernels that a later test compiles in this process are compiled as they were written."""
    yield
    for of, known in LANGUAGE.items():
        for name in [name for name, value in vars(of).items() if value is not known.get(name)]:
            if name in known:
                setattr(of, name, known[name])
            elif of is tl.tensor:
                delattr(of, name)


@pytest.fixture(scope="module")
def without_kernels() -> Iterator[None]:
    """Where bench code is tested, not kernels: no interpreter; and commands set everybody's threads."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRETED", False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (and -1 in integers), so an element that no kernel writes fails the comparison."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = make(*args, **kwargs)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else -1)

        return wrapper

    class Torch:
        """torch as `launch` and `tickets` see it."""

        empty = staticmethod(poisoned(torch.empty))
        empty_like = staticmethod(poisoned(torch.empty_like))

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(launch, "torch", Torch())
    monkeypatch.setattr(tickets, "torch", Torch())
    monkeypatch.setattr(tickets, "_partials", {})
