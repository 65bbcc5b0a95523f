"""A GPU that does nothing: kernels are compiled for sm_90, their launches end where the CUDA driver would begin.

CPU tensors stand in for those of a GPU, so that the Python of a whole call can be timed, and tested, on any machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from bench.errors import BenchError
from tritonbn import handles, launch

# Of an H100: what Triton asks of a device before it loads a kernel.
PROPERTIES = {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}


class Launch(NamedTuple):
    """What a driver was given."""

    metadata: Any  # of the compiled kernel
    grid: tuple[int, int, int]
    stream: int
    packed: Any
    described: bool  # for hooks
    args: tuple[Any, ...]


class StubDriver:
    """What Triton's runtime takes for the active driver."""

    def __init__(self, target: GPUTarget | None = None) -> None:
        self.target = target or GPUTarget("cuda", 90, 32)
        self.stream = 0
        self.count = 0
        self.spills = 0
        self.keep = False  # the launches, not just their number
        self.launches: list[Launch] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, *args: Any) -> tuple[object, int, int, int, int]:
        """(module, function, registers, spills, most threads)."""
        return object(), 1, 40, self.spills, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: object, metadata: Any) -> Any:
        """The launcher of one kernel: called with grid, stream, function, metadata, hooks and all arguments."""

        def start(
            grid_x: int, grid_y: int, grid_z: int, stream: int, function: int, packed: Any, launch_metadata: Any,
            enter: Any, leave: Any, *args: Any,
        ) -> None:  # fmt: skip
            self.count += 1
            if self.keep:
                grid = grid_x, grid_y, grid_z
                self.launches.append(Launch(metadata, grid, stream, packed, launch_metadata is not None, args))

        return start


@contextmanager
def active(stub: StubDriver) -> Iterator[None]:
    """Within, Triton's driver is `stub`."""
    real = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(stub)
    handles.forget()
    try:
        yield
    finally:
        vars(triton.runtime.driver).update(real)
        handles.forget()


@contextmanager
def stubbed() -> Iterator[StubDriver]:
    """Within, CPU tensors take the kernels, and nothing runs. Not in the interpreter, which has no launches.

    Kernels that were launched within remember the stub: on a machine with a GPU, for processes of their own.
    Raises BenchError if the kernels were defined for the interpreter.
    """
    if launch.INTERPRETED:
        raise BenchError("launches are compiled ones: unset TRITON_INTERPRET")
    stub = StubDriver()
    with active(stub):
        launch.INTERPRETED = True  # what lets CPU tensors in
        try:
            yield stub
        finally:
            launch.INTERPRETED = False
