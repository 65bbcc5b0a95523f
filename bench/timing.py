"""What bounds a timing: the bandwidth of a copy, the L2 cache, and the memory that a call takes."""

from collections.abc import Callable

import torch

from bench.measure import synchronize
from tritonbn.timing import SAMPLES, Call, measure, slots_for

COPY_BYTES = 1 << 30


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes allocated during a run, above what was there before; None on the CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def l2_bytes(device: torch.device) -> int:
    """Of the GPU; 0 on the CPU, where nothing takes turns."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copy_bandwidth(device: torch.device, samples: int = SAMPLES) -> float:
    """Bytes read and written per second by the faster of a plain copy and an elementwise kernel; within `measuring`."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES >> 5
    slots = slots_for(size, l2_bytes(device))
    source = [torch.empty(size // 4, device=device).normal_() for _ in range(slots)]
    target = [torch.empty_like(x) for x in source]
    with torch.no_grad():
        ways: list[Call] = [lambda i: target[i].copy_(source[i]), lambda i: torch.neg(source[i], out=target[i])]
        fastest = min(measure(way, slots, device, size / 1e13, samples).us for way in ways)
    return 2e6 * size / fastest
