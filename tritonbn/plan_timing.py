"""How a plan is timed: cold, in CUDA graphs, on random tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from triton.errors import TritonError

from tritonbn import handles, launch, timing
from tritonbn.activations import IDENTITY, resolve
from tritonbn.choice import Plan, Problem
from tritonbn.device import Device

SAMPLES = 10
LEAST_SECONDS = 2e-6  # of any kernel

Measure = Callable[[Plan], float | None]
Make = Callable[[], Tensor]


def measure_of(
    problem: Problem,
    make: Make,
    device: torch.device,
    gpu: Device,
    samples: int = SAMPLES,
    least: float = LEAST_SECONDS,
) -> Measure:
    """Microseconds of plans for a problem; None for those that spill or cannot run. On CUDA within `measuring`.

    make: a new tensor of the problem, unset.  least: seconds that each plan takes at the least.
    """
    slots = timing.slots_for(problem.data, gpu.l2_bytes)
    call = operation(problem, make, slots)
    least = max(least, problem.operands * problem.data / gpu.constants.bandwidth)

    def measure(plan: Plan) -> float | None:
        try:
            call(plan, 0)  # compiles
        except TritonError:  # too much shared memory, say
            return None
        if not launch.holds(plan, device):  # others ran
            return None
        # Of launches that are Triton's own, as in the interpreter, spills are not known: then no programs wait.
        spills = handles.spills(plan)
        if spills or (spills is None and plan.cooperative):
            return None
        return timing.measure(lambda slot: call(plan, slot), slots, device, least, samples).us

    return measure


def operation(problem: Problem, make: Make, slots: int) -> Callable[[Plan, int], object]:
    """The operation by a plan on the tensors of a slot, which are random: the user's generator stays as it is."""
    backwards = problem.operation == "backward"
    xs = [make() for _ in range(slots)]
    dys = [make() for _ in range(slots if backwards else 0)]
    generator = torch.Generator(xs[0].device).manual_seed(0)
    for tensor in (*xs, *dys):
        tensor.normal_(generator=generator)
    kind = launch.arithmetic_dtype(xs[0])
    weight, bias, mean, var = (torch.ones(xs[0].shape[1], dtype=kind, device=xs[0].device) for _ in range(4))
    activation = resolve("silu") if problem.costly else IDENTITY

    def forward(plan: Plan, slot: int) -> object:
        return launch.forward(xs[slot], None, weight, bias, mean, var, None, 0.1, 1e-5, planned=plan)

    def backward(plan: Plan, slot: int) -> object:
        saved = launch.Saved(xs[slot], weight, bias if problem.costly else None, None, None, mean, var)
        wanted = (True, True, True, False)
        return launch.backward(dys[slot], saved, True, activation, kind, wanted, planned=plan)

    return backward if backwards else forward
