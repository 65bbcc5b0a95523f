"""Constants of the model of time, measured on the GPU at hand: once per machine, at the first training call.

Figures of memory, L2, launches and barriers take the place of assumed ones, and the time of each path on a shape or two
says by which factor it misses its prediction. Paths whose programs wait for each other are chosen only after that.
"""

import logging
import os
import pathlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from tritonbn import calibration, cost, model, plan_timing, planning, probes, store, tickets, timing
from tritonbn.choice import Layout, Operation, Path, Plan, Problem
from tritonbn.device import Constants, Device
from tritonbn.probes import Probe, Times

# What it did is told at level INFO, which nobody sees who did not ask for it.
log = logging.getLogger("tritonbn")

SAMPLES = 5
WAIT_SECONDS = 60.0  # for another process that measures: most of its time goes into compiling some 20 kernels
OPERATIONS: tuple[Operation, ...] = ("forward", "backward")
IN_CACHE = (1 << 20, 4 << 20)  # bytes of a tensor that is copied within L2
READ_TWICE = (0.25, 0.5, 0.75, 1.0)  # bytes of a tensor that is read a second time, in parts of L2
COPIED = 4  # bytes of a tensor that is copied, in sizes of L2


class Shape(NamedTuple):
    """A problem in bfloat16 on whose shape [N, C, S] the paths are timed; channels: C for an L2 of so many bytes."""

    layout: Layout
    N: int
    S: int
    channels: Callable[[int], int]
    paths: tuple[Path, ...]

    def problem(self, operation: Operation, l2_bytes: int) -> Problem:
        return Problem(operation, self.layout, (self.N, self.channels(l2_bytes), self.S), 2)


def fixed(C: int) -> Callable[[int], int]:
    return lambda l2_bytes: C


def beyond(positions: int) -> Callable[[int], int]:
    """So many channels, a multiple of 64, that a tensor is 1.5 times as large as L2 or more."""
    return lambda l2_bytes: 64 * max(1, -(-3 * l2_bytes // (2 * 2 * 64 * positions)))


# Tensors that L2 holds, small enough for registers of all programs together, and tensors that it does not; `single` on
# slices that it holds in registers. Tiles are alike in both, so that they share compiled kernels.
SHAPES = (
    Shape("planes", 32, 784, fixed(16), ("split", "cooperative", "stream")),
    Shape("planes", 32, 49, fixed(512), ("single",)),
    Shape("planes", 256, 784, beyond(256 * 784), ("split", "stream", "single")),
    Shape("rows", 4096, 1, fixed(128), ("split", "cooperative", "stream")),
    Shape("rows", 128, 1, fixed(1024), ("single",)),
    Shape("rows", 32 * 784, 1, beyond(32 * 784), ("split", "stream")),
)

TimeProbe = Callable[[Probe], float]  # microseconds
TimePlan = Callable[[Problem, Plan], float | None]  # microseconds; None for a plan that spills or cannot run

_enabled = True
settled: set[torch.device] = set()  # devices for which this process has nothing left to do
_measuring = threading.Lock()


def autotune(enabled: bool) -> None:
    """Whether the first training call on a GPU that was never calibrated calibrates it (it does, unless told not to).

    For this process; the environment variable TRITONBN_AUTOTUNE=0 says no for all that see it. What was measured before
    is used in either case, except in torch's deterministic mode.
    """
    global _enabled
    _enabled = bool(enabled)
    settled.clear()


def calibrate(device: torch.device | str | None = None, save: bool = True) -> Constants:
    """Measure what plans are made of on a GPU that is otherwise idle, and have them follow from it.

    Some 45 measurements of a few hundredths of a second each, in memory for about 15 times L2, and some seconds to
    compile the kernels where Triton has not done so before. It runs by itself at the first training call, see
    `autotune`; this is to do it now, and again.

    Args:
        device: the GPU, by default the current one.
        save: keep it in the user's folder (`$TRITONBN_CACHE_DIR`, or tritonbn in the cache folder) for all processes
            that use a GPU of this name; else it holds for this one.

    Returns:
        The constants of the model: bandwidth of memory in bytes per second; seconds of a launch and of a barrier; the
        speed of L2 in times of memory's, and its part that a second pass finds; and factors by path, layout, direction
        and size: measured time by predicted time.

    Raises RuntimeError without a GPU or under CUDA graph capture, ValueError for other devices, and what measuring
    raises. Random numbers, streams and memory are afterwards as they were.
    """
    where = timing.gpu("calibrate", device)
    gpu = planning.device_of(where)
    constants = _timed(where, gpu)
    with _turn(gpu, None) if save else nullcontext((None, True)) as (file, _):
        _keep(gpu, constants, file)
    return constants


def on_first_call(device: torch.device) -> None:
    """Calibrate the GPU if nobody has, before a training call makes its plans; nothing where nothing is to be done.

    To be called in eager code wherever a new plan of training is looked up. It does nothing under CUDA graph capture,
    in deterministic mode, after `autotune(False)` and with TRITONBN_AUTOTUNE=0, until that has changed. Only one thread
    and one process of a machine measures; others wait for its result, but not for more than `WAIT_SECONDS`. Where
    torch.distributed is initialized that is local rank 0, and the others take what is there: no rank waits for another.
    Never raises: what goes wrong is told in one warning, and plans are those of the assumed constants.
    """
    if device in settled or not _enabled:
        return
    if device.type != "cuda" or torch.version.hip:  # what is not tested does not run by itself
        settled.add(device)
        return
    if os.environ.get("TRITONBN_AUTOTUNE") == "0":
        return
    if torch.are_deterministic_algorithms_enabled() or not _measuring.acquire(blocking=False):
        return
    try:
        with torch.cuda.device(device):
            if not torch.cuda.is_current_stream_capturing():
                settled.add(device)  # whatever comes of it
                _once(device)
    except Exception as error:
        message = f"{device} is not calibrated, plans are made by assumed constants: {type(error).__name__}: {error}"
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # they are errors here
            log.warning(message)
    finally:
        _measuring.release()


def _once(device: torch.device) -> None:
    """Calibrate, unless this or another process did."""
    gpu = planning.device_of(device)
    if _complete(gpu) or not _first_of_the_machine():
        return
    with _turn(gpu, WAIT_SECONDS) as (file, ours):
        calibration.reread()  # another process may have measured meanwhile
        if ours and not _complete(planning.device_of(device)):
            _keep(gpu, _timed(device, gpu), file)


@contextmanager
def _turn(gpu: Device, seconds: float | None) -> Iterator[tuple[pathlib.Path | None, bool]]:
    """(the file of the GPU, or None where it cannot be written; whether no other process is at it)."""
    folder = store.user_folder()
    file = None if folder is None else calibration.path(folder, gpu)
    with ExitStack() as stack:
        ours = True
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                ours = stack.enter_context(store.locked(file, seconds))
            except OSError as error:
                _not_kept(file, error)
                file = None
        yield file, ours


def _keep(gpu: Device, constants: Constants, file: pathlib.Path | None) -> None:
    """For this process and, if it can be, in the file for others."""
    calibration.remember(gpu, constants)
    if file is not None:
        try:
            calibration.write(file, gpu, constants)
        except OSError as error:
            _not_kept(file, error)


def _complete(gpu: Device) -> bool:
    """Whether nothing is left to measure: beside other processes, paths whose programs wait are left out."""
    return gpu.measured is not None and (gpu.measured.waiting or not gpu.cooperative)


def _first_of_the_machine() -> bool:
    """Whether this process is alone, or of those that torch.distributed has here the one that measures."""
    if planning.alone():
        return True
    rank = os.environ.get("LOCAL_RANK")
    return (int(rank) if rank else torch.distributed.get_rank()) == 0


def _not_kept(file: pathlib.Path, error: OSError) -> None:
    store.tell("write", file, f"the calibration is not kept: cannot write {file}: {error.strerror}")


def _timed(device: torch.device, gpu: Device) -> Constants:
    """Measure on a stream of its own, and leave everything as it was."""
    begun = time.perf_counter()
    with untouched(device), timing.measuring(device):
        constants = measured(gpu, *timers(device, gpu))
    constants.check()
    log.info("calibrated %s in %.1f s", gpu.name, time.perf_counter() - begun)
    return constants


def timers(device: torch.device, gpu: Device) -> tuple[TimeProbe, TimePlan]:
    """What times probes and plans on the device."""

    def time_probe(probe: Probe) -> float:
        return probes.timed(probe, device, gpu.l2_bytes, SAMPLES).us

    def time_plan(problem: Problem, plan: Plan) -> float | None:
        N, C, S = problem.shape
        shape = (N, C) if problem.layout == "rows" else (N, C, S)
        make = lambda: torch.empty(shape, dtype=torch.bfloat16, device=device)  # noqa: E731
        least = max(plan_timing.LEAST_SECONDS, cost.predicted(plan, problem, gpu) / 2)
        return plan_timing.measure_of(problem, make, device, gpu, SAMPLES, least)(plan)

    return time_probe, time_plan


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Random numbers, counters of captured launches and memory are afterwards as they were."""
    with torch.no_grad(), torch.random.fork_rng([device.index or 0]), tickets.returned():
        try:
            yield
        finally:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


def measured(gpu: Device, time_probe: TimeProbe, time_plan: TimePlan) -> Constants:
    """The constants that follow from the times of probes and of plans: pure but for the timers."""
    times: Times = {}
    for probe in probes_for(gpu):
        times[probe.what, probe.bytes] = time_probe(probe)
    constants = constants_of(times, gpu)
    device = replace(gpu, measured=constants)
    factors: dict[str, float] = {}
    for shape in SHAPES:
        for operation in OPERATIONS:
            problem = shape.problem(operation, gpu.l2_bytes)
            for path in shape.paths:
                try:
                    plan = model.best(problem, device, path)
                except ValueError:  # not on this GPU
                    continue
                us = time_plan(problem, plan)
                if us is not None:
                    kind = cost.kind(path, problem, device)
                    factors[kind] = 1e-6 * us / cost.predicted(plan, problem, device)
    return constants._replace(factors=tuple(factors.items()), waiting=gpu.cooperative)


def probes_for(gpu: Device) -> Iterator[Probe]:
    """All but the plans."""
    yield Probe("copy", COPIED * gpu.l2_bytes, probes.torchs_copy, slots=1)
    yield from map(probes.in_cache, IN_CACHE)
    yield probes.LAUNCH
    if gpu.cooperative:
        yield from probes.barriers(2 * gpu.sms)
    for part in READ_TWICE:
        # The second pass of path split begins with what was read last.
        for probe in probes.passes(int(part * gpu.l2_bytes) // 16 * 16, gpu.l2_bytes):
            if probe.what != "read, then pass":
                yield probe


def constants_of(times: Times, gpu: Device) -> Constants:
    """What the times say; assumed, what was not timed."""
    assumed = Constants(gpu.bandwidth)
    size = COPIED * gpu.l2_bytes
    bandwidth = 2e6 * size / times["copy", size]
    speed, share = probes.cache_speed(times), probes.cache_share(times, "read, then pass in reverse", gpu.l2_bytes)
    barrier = probes.barrier_us(times, 2 * gpu.sms)
    return Constants(
        bandwidth,
        1e-6 * times["launch", 4],
        assumed.barrier if barrier is None else 1e-6 * barrier,
        assumed.l2_speed if speed is None else speed / bandwidth,
        assumed.l2_share if share is None else min(1.0, max(0.0, share)),  # beyond is noise
    )
