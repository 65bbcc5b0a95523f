"""Kernels that do one thing each, to see what it costs: read, copy, start, wait for each other."""

import triton
import triton.language as tl

from .cooperative import slot_barrier


@triton.jit
def read_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr):
    """sums[i] = sum of tile i of x, by program i.  x: [n] fp32, sums: [cdiv(n, BLOCK)] fp32.  Reads x once."""
    i = tl.program_id(0)
    at = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)  # [BLOCK] fp32
    tl.store(sums_ptr + i, tl.sum(x))


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """y = -x; program i owns tile i, or counts from the last one.  x, y: [n] fp32.  Reads x once, writes y once."""
    i = tl.program_id(0)
    if REVERSE:
        i = tl.num_programs(0) - 1 - i
    at = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)  # [BLOCK] fp32
    tl.store(y_ptr + at, -x, mask=at < n)


@triton.jit
def empty_kernel(x_ptr):
    """Nothing."""


@triton.jit(do_not_specialize=["rounds"])
def barrier_kernel(semaphore_ptr, rounds):
    """All programs (0, j) wait for each other, `rounds` times.  semaphore: [1] int32, its lower 30 bits zero again."""
    for _ in tl.range(0, rounds):
        slot_barrier(semaphore_ptr)
