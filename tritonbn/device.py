"""What a plan must know of a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU; the default is the one that plans are made for where there is none."""

    name: str = "NVIDIA H200"
    sms: int = 132
    l2_bytes: int = 60 << 20
    bandwidth: float = 4.3e12  # bytes per second that a large copy reads and writes
    cooperative: bool = True  # can launch a grid whose programs wait for each other

    @property
    def gpu(self) -> tuple[str, int]:
        """What measurements hold for: the name and the number of multiprocessors."""
        return self.name, self.sms


H200 = Device()

# SMs, L2 and bandwidth by the data sheets, of the bandwidth 0.9: an estimate of what a plain copy reaches, which
# `python -m bench ops` measures.
KNOWN = (
    Device("NVIDIA A100-SXM4-80GB", 108, 40 << 20, 1.8e12),
    Device("NVIDIA H100 80GB HBM3", 132, 50 << 20, 3.0e12),
    H200,
    Device("NVIDIA B200", 148, 126 << 20, 7.2e12),
    # L2 is 4 MB per die here, and the 256 MB behind it is shared with the memory side: no second pass is planned on it.
    Device("AMD Instinct MI300X", 304, 4 << 20, 4.8e12),
)


def described(name: str, sms: int, l2_bytes: int, data_sheet_bandwidth: float, cooperative: bool) -> Device:
    """The device of that name: known ones by the table, others by what the driver says (0: it says nothing)."""
    known = next((device for device in KNOWN if device.name == name), None)
    # A GPU of which nothing is known has memory for its multiprocessors as an A100 has.
    bandwidth = known.bandwidth if known else 0.9 * data_sheet_bandwidth or sms * 1.6e10
    return Device(name, sms, (known.l2_bytes if known else l2_bytes) or 4 << 20, bandwidth, cooperative)
