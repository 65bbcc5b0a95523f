"""Bytes of full tensors that an operation moves by its plan: the price of batch norm. Vectors of size C are left out.

With s bytes per element: forward 3s (2s where a program's tile holds its share), and s for a residual; backward 5s
(3s), and with a residual and ReLU 6s + 1/8 (4s + 1/8), where the first pass writes what the second one reads. Of these,
the path "stream" finds what it reads again in L2: memory moves what it moves for a tile that holds everything.
"""

from typing import NamedTuple

from tritonbn.choice import Plan


class Operands(NamedTuple):
    """Which full tensors an operation has beside x and y, or dy."""

    training: bool = True  # statistics of the batch
    residual: bool = False  # read by the forward, and by the backward where the derivative is computed from it
    bits: bool = False  # written by the forward, read by the backward
    activation: bool = False  # the backward computes its derivative: from x, and the residual if there is one
    dx: bool = True
    parameters: bool = True  # dweight or dbias
    dresidual: bool = False


def bytes_moved(plan: Plan, operands: Operands, again: bool = True) -> int:
    """Bytes read and written by the kernels of `plan`, with what they read `again` or without."""
    if plan.operation == "backward":
        return _backward(plan, operands, again)
    second = _again(plan)[0] if plan.operation == "forward" and again else 0
    tensors = (2 + operands.residual) * _values(plan) + second
    return tensors * plan.itemsize + operands.bits * plan.bit_bytes


def floor_bytes(plan: Plan, operands: Operands) -> int:
    """Bytes that must be read and written: each full tensor once, whatever the path."""
    return bytes_moved(plan, operands, again=False)


class PairOperands(NamedTuple):
    """Which full tensors the sum of two batch norms has beside x, other and y, or dy."""

    training: bool = True  # statistics of the batch
    bits: bool = False  # written by the forward, read by the backward
    activation: bool = False  # the backward computes its derivative from x and other
    dx: bool = True
    dother: bool = True
    parameters: bool = True  # a gradient of a weight or bias


def pair_bytes(plan: Plan, operands: PairOperands) -> int:
    """Bytes read and written by the kernels of `kernels/pair.py` by `plan`, see `make_pair_plan`.

    With s bytes per element: forward 5s (3s where a program's tile holds its share) + 1/8, backward 8s + 2/8 (5s + 1/8)
    where bits tell the derivative. Two operations, the first one the other's residual, move 2s and 3s more.
    """
    tensors, bits = _pair_passes(plan, operands)
    return tensors * _values(plan) * plan.itemsize + bits * operands.bits * plan.bit_bytes


def _pair_passes(plan: Plan, operands: PairOperands) -> tuple[int, int]:
    """How many times a full tensor is read or written, and the bits."""
    once = plan.path == "single"
    if plan.operation != "backward":
        return (3 if once or plan.operation == "inference" else 5), 1
    written = operands.dx + operands.dother
    if operands.training and written:
        return (3 if once else 6) + written, 1 if once else 2
    if operands.parameters:
        return 3 + written, 1
    return (1 + 2 * operands.activation + written, 1) if written else (0, 0)


def pair_pays(plans: tuple[Plan, Plan], apart: tuple[Plan, Plan]) -> bool:
    """Whether forward and backward in one pass move less than two operations by the plans `apart`, with add + ReLU."""
    one = sum(pair_bytes(plan, PairOperands(bits=True)) for plan in plans)
    forward, backward = (bytes_moved(plan, Operands()) for plan in apart)
    added = bytes_moved(apart[0], Operands(residual=True, bits=True))
    added += bytes_moved(apart[1], Operands(bits=True, dresidual=True))
    return one < forward + backward + added


def _backward(plan: Plan, operands: Operands, again: bool) -> int:
    values = _values(plan)
    written = operands.dx + operands.dresidual
    second = operands.training and operands.dx
    if not (operands.parameters or second):
        if not written:
            return 0
        read = 1 + operands.activation + operands.residual
        return (read + written) * values * plan.itemsize + operands.bits * plan.bit_bytes
    tensors = (2 + operands.residual + written) * values
    bits = operands.bits * plan.bit_bytes
    if second and again:
        values_again, bits_again = _again(plan)
        # It is read instead of dy, residual and bits, but where programs read what others write of odd planes.
        replaced = operands.dresidual and (plan.path == "split" or plan.tile.ALIGN == 1)
        tensors += (2 if replaced else 2 + operands.residual) * values_again
        bits += 0 if replaced else operands.bits * bits_again
    return tensors * plan.itemsize + bits


def _values(plan: Plan) -> int:
    N, C, S = plan.shape
    return N * C * S


def _again(plan: Plan) -> tuple[int, int]:
    """Values, and bytes of bits, that a second pass reads: all, or all but what each program kept, its first tile."""
    if plan.path in ("split", "stream") and not plan.tile.ONCE:
        return _values(plan), plan.bit_bytes
    tile, C = plan.tile, plan.shape[1]
    values, bits = _values(plan), plan.bit_bytes
    S = plan.width * tile.V
    blocks = -(-(S + tile.ALIGN - 1) // tile.BLOCK_L) if tile.GROUP == 1 else 1
    for first in range(0, plan.tiles, plan.reduce_tiles):
        rows = min(tile.BLOCK_R, plan.rows - first // blocks * tile.BLOCK_R)
        if tile.GROUP == 1:
            lane = first % blocks * tile.BLOCK_L
            last = min(lane + tile.BLOCK_L, S + tile.ALIGN - 1)
            leads = [c * S % tile.ALIGN for c in range(C)]
            values -= rows * sum(max(0, min(last - lead, S) - max(lane - lead, 0)) for lead in leads)
            bits -= rows * C * -(-(last - lane) // 8)
        else:
            values -= _values(plan) // plan.rows * rows
            bits -= plan.bit_bytes // plan.rows * rows
    return values, bits
