"""Compiled kernels, kept: a launch by Triton's JIT costs Python some ten microseconds each time, a kept one two.

The first launch of a kind is Triton's own and leaves its compiled kernel here. Later ones hand it the same arguments as
Triton does, tensors as addresses, and check nothing: what Triton compiles for is in the key, all of it, and nothing
else, so that calls of all shapes and layers share a kernel. Triton's own launch is taken wherever that is not enough:
with hooks of profilers, in the interpreter, on AMD (where Triton compiles for the sizes of tensors too), for a compiled
kernel of a make that is not known, and for a version of Triton that was not tested.
"""

import re
from collections.abc import Sequence
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import torch

from tritonbn import private
from tritonbn.cost import WARPS_PER_SM
from tritonbn.occupancy import resident_programs
from tritonbn.plan import Plan
from tritonbn.private import JITFunction, driver

# Entries, one for each kernel, tile and sort of arguments; beyond it the oldest are forgotten.
LIMIT = 4096

_HIP = torch.version.hip is not None

Key = tuple[Any, ...]


class TooManyPrograms(ValueError):
    """Programs that wait for each other would not all be resident."""


class Kernel(NamedTuple):
    """What is known of a kernel: its tensors come first, then sizes, then floating-point numbers, then constants."""

    jit: Any  # kept, so that its id remains its own
    sizes: int  # index of the first size: names of tensors end in _ptr
    numbers: int  # index of the first number: its type is given


class Handle(NamedTuple):
    """A compiled kernel on its device, and how it is launched."""

    compiled: Any
    run: Any  # (grid x, y, z, stream, function, metadata, launch metadata, enter hook, exit hook, *arguments)
    function: int
    metadata: Any
    constants: tuple[Any, ...]  # the arguments after those that change, in the kernel's order
    sort: tuple[Any, ...]  # of the plans that it is compiled for


# What calls of one record launched before: by kernel and what else may differ from one such call to the next, the table
# that the handle is in (another one once all were forgotten), the number of tensors, and the handle.
Launches = dict[Any, tuple[dict[Key, Handle], int, Handle]]

_kernels: dict[int, Kernel] = {}
_handles: dict[Key, Handle] = {}
_fitting: dict[Key, bool] = {}
_lock = Lock()


def forget() -> None:
    """Drop all handles, as after a change of Triton's driver or settings."""
    global _handles
    _handles = {}  # another one: what records keep is of this one
    _fitting.clear()


def options(plan: Plan) -> dict[str, Any]:
    """What Triton is told beside the kernel's constants."""
    # Products and sums are fused in all kernels alike.
    given: dict[str, Any] = {"num_warps": plan.num_warps, "enable_fp_fusion": True}
    if not _HIP:
        # NVIDIA's assembler would rather spill a few values than exceed a register count of its own choosing; of all
        # that there are for so many threads, most kernels still take 128. Cooperative ones must: they count on it.
        warps = max(plan.num_warps, WARPS_PER_SM) if plan.cooperative else plan.num_warps
        given["maxnreg"] = min(255, 65536 // (32 * warps))
    if plan.cooperative:
        given["launch_cooperative_grid"] = True
    return given


def start(
    kernel: Any,
    grid: tuple[int, ...],
    plan: Plan,
    *args: Any,
    launches: Launches | None = None,
    which: Any = None,
    **constants: Any,
) -> None:
    """Launch `kernel` on the device of its first argument; args: tensors, None and numbers, in the kernel's order.

    constants: its compile-time arguments beside T, which is the plan's tile.
    launches: those of calls by this plan, whose tensors have the same dtypes, and are there or not, if kernel, `which`
    and constants are the same. Raises TooManyPrograms where programs that wait for each other do not fit the GPU.
    """
    device = args[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, grid, plan, *args, launches=launches, which=which, **constants)
        return
    if type(kernel) is not JITFunction or kernel.pre_run_hooks or _HIP or not private.is_launch_plain():
        _must_fit(kernel, grid, plan, args, constants)
        kernel[grid](*args, T=plan.tile, **constants, **options(plan))
        return
    short = None
    if launches is not None:
        short = id(kernel), which, *constants.values()
        if (found := launches.get(short)) is not None and found[0] is _handles:
            _, sizes, (_, run, function, metadata, fixed, _) = found
            addresses = [None if t is None else t.data_ptr() for t in args[:sizes]]
            low = 0
            for address in addresses:
                if address is not None:
                    low |= address
            if low & 15 == 0:
                run(
                    grid[0], grid[1] if len(grid) > 1 else 1, 1, driver.active.get_current_stream(device),
                    function, metadata, None, None, None, *addresses, *args[sizes:], *fixed,
                )  # fmt: skip
                return
    key, addresses = _key(kernel, plan, device, args, constants)
    handle = _handles.get(key)
    if handle is None:
        _must_fit(kernel, grid, plan, args, constants)
        compiled = kernel[grid](*args, T=plan.tile, **constants, **options(plan))
        _keep(key, kernel, plan, compiled, args, constants)
        return
    if launches is not None and key[3] is None:  # all are aligned
        launches[short] = _handles, len(addresses), handle
    _, run, function, metadata, fixed, _ = handle
    run(
        grid[0], grid[1] if len(grid) > 1 else 1, grid[2] if len(grid) > 2 else 1,
        driver.active.get_current_stream(device), function, metadata, None, None, None,
        *addresses, *args[len(addresses) :], *fixed,
    )  # fmt: skip


def _must_fit(kernel: Any, grid: tuple[int, ...], plan: Plan, args: Sequence[Any], constants: dict[str, Any]) -> None:
    if plan.cooperative and args[0].get_device() >= 0 and not fits_at_once(kernel, grid, plan, args, constants):
        raise TooManyPrograms(f"the {prod(grid)} programs of {kernel.__name__} do not fit the GPU at a time: {plan}")


def fits_at_once(
    kernel: Any, grid: tuple[int, ...], plan: Plan, args: Sequence[Any], constants: dict[str, Any]
) -> bool:
    """Whether all programs of this `start` are resident together, as cooperative ones must be; compiles if needed.

    False where it is not known: in the interpreter, which runs programs one after the other, and on AMD.
    """
    if not isinstance(kernel, JITFunction) or _HIP:
        return False
    device = args[0].get_device()
    key = *_key(kernel, plan, device, args, constants)[0], grid
    known = _fitting.get(key)
    if known is None:
        with torch.cuda.device(device):
            compiled = kernel.warmup(*args, grid=grid, T=plan.tile, **constants, **options(plan))
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        compiled.run  # noqa: B018  # loads it: registers are known then
        at_once = resident_programs(
            compiled.n_regs, compiled.metadata.shared, compiled.metadata.num_warps,
            torch.cuda.get_device_properties(device),
        )  # fmt: skip
        known = prod(grid) <= at_once
        put(_fitting, key, known, LIMIT)
    return known


def spills(plan: Plan) -> int | None:
    """The most that a kernel spills of those that launches by such a plan take; None if none was kept."""
    sort = _sort(plan)
    return max((h.compiled.n_spills or 0 for h in list(_handles.values()) if h.sort == sort), default=None)


def put(table: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    """table[key] = value; beyond the limit the oldest entries go."""
    with _lock:
        while len(table) >= limit and key not in table:
            del table[next(iter(table))]
        table[key] = value


def _sort(plan: Plan) -> tuple[Any, ...]:
    """What kernels are compiled for, of a plan."""
    return plan.operation, plan.launches, plan.cooperative, plan.num_warps, plan.tile


def _key(
    kernel: Any, plan: Plan, device: int, args: Sequence[Any], constants: dict[str, Any]
) -> tuple[Key, list[int | None]]:
    """Everything that Triton compiles for, and the addresses of the tensors.

    That is the dtype of each tensor, where there is one and whether it is aligned to 16 bytes, and of each size whether
    it exceeds 32 bits (nothing else: `_know` sees to that); not of numbers, whose type the kernel gives.
    """
    _, sizes, numbers = _kernels.get(id(kernel)) or _know(kernel)
    tensors = args[:sizes]
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    dtypes = [None if t is None else t.dtype for t in tensors]
    low = 0
    for address in addresses:
        if address is not None:
            low |= address
    aligned = None if low & 15 == 0 else tuple([address is None or address & 15 == 0 for address in addresses])
    wide = tuple([size.bit_length() > 31 for size in args[sizes:numbers]])
    how = plan.tile, plan.num_warps, plan.cooperative
    return (id(kernel), how, device, aligned, wide, *dtypes, *constants.items()), addresses


def _know(kernel: Any) -> Kernel:
    """Read the kernel's signature, which `_key` relies on."""

    def kind(parameter: Any) -> str:
        if parameter.is_constexpr:
            return "c"
        if parameter.annotation_type.startswith(("fp", "bf")):
            return "n"
        return "t" if parameter.name.endswith("_ptr") else "s" if parameter.do_not_specialize else "?"

    kinds = "".join(map(kind, kernel.params))
    if not re.fullmatch("t+s*n*c*", kinds):
        raise TypeError(
            f"{kernel.__name__}: expected tensors *_ptr, sizes that Triton does not specialize for, numbers typed fp*, "
            "constants in this order"
        )
    sizes = kinds.count("t")
    known = _kernels[id(kernel)] = Kernel(kernel, sizes, sizes + kinds.count("s"))
    return known


def _keep(key: Key, kernel: Any, plan: Plan, compiled: Any, args: Sequence[Any], constants: dict[str, Any]) -> None:
    """Keep what Triton's launch compiled, unless it or the arguments are of a make that is not known."""
    _, sizes, numbers = _kernels[id(kernel)]
    rest, values = kernel.arg_names[len(args) :], {"T": plan.tile, **constants}
    if not (
        private.is_kept_launch_tested()
        and private.is_launchable(compiled)
        and all(type(size) is int for size in args[sizes:numbers])  # True is an integer here, but not to Triton
        and set(rest) == set(values)  # else there are defaults, or constants among the arguments
    ):
        return
    fixed = tuple(values[name] for name in rest)
    handle = Handle(compiled, compiled.run, compiled.function, compiled.packed_metadata, fixed, _sort(plan))
    put(_handles, key, handle, LIMIT)
