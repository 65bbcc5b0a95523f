"""GPU facts that the planner uses."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import NamedTuple


class Constants(NamedTuple):
    """What the model of time takes a GPU to do: estimates, unless `calibrate` measured them."""

    bandwidth: float  # of memory, bytes per second that a large copy reads and writes
    launch: float = 3e-6  # seconds of a launch inside of a CUDA graph
    barrier: float = 1.5e-6  # seconds until programs that wait for each other go on
    # L2 delivers so many times what memory does; a part of it is filled by what is written, and by other kernels.
    l2_speed: float = 1.5
    l2_share: float = 0.6
    # Of kinds of plans (see `cost.kind`), measured time by predicted time.
    factors: tuple[tuple[str, float], ...] = ()
    waiting: bool = False  # plans whose programs wait for each other were measured, too

    def check(self) -> None:
        """Raise ValueError for what no GPU does: it may come from a file that anyone has written to."""
        values = [(name, getattr(self, name), *limits) for name, limits in _LIMITS.items()]
        for name, value, low, high in [*values, *((kind, factor, 1e-4, 1e4) for kind, factor in self.factors)]:
            if type(value) not in (int, float) or not (isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, but got {value!r}")
        if type(self.waiting) is not bool:
            raise ValueError(f"waiting must be true or false, but got {self.waiting!r}")


_LIMITS = {
    "bandwidth": (1e6, 1e18), "launch": (1e-9, 1.0), "barrier": (1e-9, 1.0), "l2_speed": (1e-4, 1e4),
    "l2_share": (0.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A GPU; the default is the one that plans are made for where there is none."""

    name: str = "NVIDIA H200"
    sms: int = 132
    l2_bytes: int = 60 << 20
    bandwidth: float = 4.3e12  # bytes per second that a large copy reads and writes, as far as nothing is measured
    cooperative: bool = True  # can launch a grid whose programs wait for each other
    measured: Constants | None = None  # on this very GPU
    clock: float = 1.755e9  # of its multiprocessors under load, in Hz

    @cached_property
    def constants(self) -> Constants:
        """What was measured, or else is assumed."""
        return self.measured or Constants(self.bandwidth)

    @cached_property
    def factors(self) -> dict[str, float]:
        """Of the constants: measured time by predicted time."""
        return dict(self.constants.factors)

    @property
    def gpu(self) -> tuple[str, int]:
        """What measurements hold for: the name and the number of multiprocessors."""
        return self.name, self.sms


H200 = Device()

# SMs, L2 and bandwidth by the data sheets, of the bandwidth 0.9: an estimate of what a plain copy reaches, which
# `python -m bench ops` measures. Clocks are assumed: the boost clock of an A100, and of the others what they hold under
# load, 0.89 (H100, H200) and 0.94 (B200) of the highest they reach.
KNOWN = (
    Device("NVIDIA A100-SXM4-80GB", 108, 40 << 20, 1.8e12, clock=1.41e9),
    Device("NVIDIA H100 80GB HBM3", 132, 50 << 20, 3.0e12),
    H200,
    Device("NVIDIA B200", 148, 126 << 20, 7.2e12, clock=1.85e9),
    # L2 is 4 MB per die here, and the 256 MB behind it is shared with the memory side: no second pass is planned on it.
    Device("AMD Instinct MI300X", 304, 4 << 20, 4.8e12, clock=2.1e9),
)


def described(name: str, sms: int, l2_bytes: int, data_sheet_bandwidth: float, cooperative: bool) -> Device:
    """The device of that name: known ones by the table, others by what the driver says (0: it says nothing)."""
    known = next((device for device in KNOWN if device.name == name), None)
    # A GPU of which nothing is known has memory for its multiprocessors as an A100 has.
    bandwidth = known.bandwidth if known else 0.9 * data_sheet_bandwidth or sms * 1.6e10
    found = Device(name, sms, (known.l2_bytes if known else l2_bytes) or 4 << 20, bandwidth, cooperative)
    return replace(found, clock=known.clock) if known else found
