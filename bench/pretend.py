"""A GPU that is only pretended, so that what needs one can be rehearsed without it: `python -m bench.pretend COMMAND`.

torch.cuda answers as a GPU would; tensors meant for it lie in main memory; Triton's interpreter runs the kernels; a
CUDA graph is a list of what was called, and a replay calls it again; events read a clock; torch.compile does nothing.
Samples are few and tensors small. Times measured so mean nothing: they are rows of a GPU called `NAME`.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretended GPU"
CPU = torch.device("cpu")
L2_BYTES = 256


class Redirect(TorchFunctionMode):
    """Where a function is given a CUDA device, it gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # a name, no place yet
            return func(*args, **(kwargs or {}))
        return func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs or {}))


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> "Generator":
        return super().__new__(cls, CPU)  # type: ignore[call-arg]


class Graph:
    """What was called while it was captured; on the same tensors it is called again."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps each call of ATen, with its results: a repeated call writes into those, for they are what others read."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        # Views, and what is written in place, are new by themselves.
        fresh = [t if t.untyped_storage().data_ptr() not in given else None for t in tensors(results)]

        @torch.no_grad()
        def again() -> None:
            for kept, new in zip(fresh, tensors(func(*args, **kwargs)), strict=True):
                if kept is not None:
                    kept.copy_(new)

        self.graph.calls.append(again)
        return results


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class Capture(ExitStack):
    """torch.cuda.graph"""

    current: Graph | None = None

    def __init__(self, graph: Graph, **_: Any) -> None:
        super().__init__()
        self.graph = graph

    def __enter__(self) -> "Capture":
        Capture.current = self.graph
        self.callback(setattr, Capture, "current", None)
        self.enter_context(Recorder(self.graph))
        return self


class Event:
    def __init__(self, **_: Any) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return max(1e3 * (end.seconds - self.seconds), 1e-3)


def properties(*_: Any) -> Any:
    return SimpleNamespace(
        name=NAME, uuid="none", major=9, minor=0, multi_processor_count=2, total_memory=1 << 30,
        L2_cache_size=L2_BYTES, shared_memory_per_multiprocessor=228 << 10, warp_size=32,
    )  # fmt: skip


def nothing(*_: Any, **__: Any) -> None:
    pass


CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: NAME,
    "get_device_properties": properties,
    "get_device_capability": lambda *_: (9, 0),
    "set_device": nothing,
    "device": nullcontext,
    "synchronize": nothing,
    "empty_cache": nothing,
    "reset_peak_memory_stats": nothing,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "mem_get_info": lambda *_: (1 << 30, 1 << 30),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "Stream": lambda *_: SimpleNamespace(wait_stream=nothing),
    "current_stream": lambda *_: SimpleNamespace(wait_stream=nothing),
    "stream": nullcontext,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": Capture,
    "graph_pool_handle": object,
    "is_current_stream_capturing": lambda: Capture.current is not None,
}


def device_of(_: object) -> Any:
    """For plans, of programs that need no other one: here they run one after the other."""
    return importlib.import_module("tritonbn.device").Device(NAME, 2, L2_BYTES, 1e12, cooperative=False)


# By module, what would take long, each as small as it can be; and what there is none of: kernels for a profiler.
REPLACED: dict[str, dict[str, Any]] = {
    "tritonbn.timing": {"SAMPLES": 2, "MOST_CALLS": 2, "WARM_SECONDS": 0.0},
    "tritonbn.planning": {"device_of": device_of},
    "tritonbn.plan_timing": {"SAMPLES": 2},
    "tritonbn.calibrating": {"SAMPLES": 2, "IN_CACHE": (1 << 10,), "SHAPES": ()},
    "bench.timing": {"COPY_BYTES": 1 << 16},
    "bench.wall": {"CALLS": 2},
    "bench.bandwidth": {"MIB": 1 << 10, "COPIES": (1, 2), "READ_TWICE": (1, 2), "IN_CACHE": (1,)},
    "bench.models.turns": {"CUDA": (1, 1, 1, float("inf"), 0, 1)},
    "bench.models.profiles": {"shares": lambda step, device: None},
}


def install() -> None:
    """From now on this process has the GPU; to be called before anything of the library is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # for tensors as small as these
    for module, values in REPLACED.items():
        found = importlib.import_module(module)
        for name, value in values.items():
            of = getattr(found, name)
            setattr(found, name, type(of)(*value) if hasattr(of, "_fields") else value)
    importlib.import_module("bench.quick_interpreter").hurry()
    # After all imports: torch's compiler looks at what is there.
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    # A compiler refuses to work while a `Recorder` looks on.
    torch.compile = lambda model, **_: model  # type: ignore[assignment]
    keep_launches()


def keep_launches() -> None:
    """Launches belong to a graph, too; what the interpreter does for one is nobody's business."""
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    start = executor.__call__

    def recorded(self: Any, *args: Any, **constants: Any) -> None:
        if Capture.current is not None:
            Capture.current.calls.append(lambda: start(self, *args, **constants))
        with _disable_current_modes():
            start(self, *args, **constants)

    executor.__call__ = recorded


def main(argv: Sequence[str]) -> int:
    install()
    with Redirect():
        code: int = importlib.import_module("bench.__main__").main(argv)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
