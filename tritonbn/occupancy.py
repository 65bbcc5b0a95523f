"""How many programs of a compiled kernel run at a time: CUDA's rules of occupancy, as in its cuda_occupancy.h."""

from typing import Any

# What a multiprocessor holds, where it is not 64 warps and 32 blocks; by compute capability.
_WARPS = {(7, 5): 32, (8, 6): 48, (8, 7): 48, (8, 9): 48, (12, 0): 48, (12, 1): 48}
_BLOCKS = {(7, 5): 16, (8, 6): 16, (8, 7): 16, (8, 9): 24, (12, 0): 24, (12, 1): 24}
# A multiprocessor has four partitions of so many 32-bit registers; a warp takes 256 at a time from one of them.
_PARTITIONS = 4
_PARTITION_REGISTERS = 16384
_REGISTER_UNIT = 256
# Bytes of shared memory that the system takes of each block from 8.0 on, and in what units they are given.
_RESERVED = 1024
_SHARED_UNIT = 128


def resident_programs(registers: int, shared: int, num_warps: int, device: Any) -> int:
    """Programs of `num_warps` warps that a device holds at a time; 0 if not even one.

    registers: of a thread.  shared: bytes of a block.  device: `torch.cuda.get_device_properties` of it.
    """
    capability = device.major, device.minor
    warp_registers = _up(32 * registers, _REGISTER_UNIT)
    by_warps = min(_WARPS.get(capability, 64), _PARTITIONS * (_PARTITION_REGISTERS // max(warp_registers, 1)))
    reserved = _RESERVED if capability >= (8, 0) else 0
    block_bytes = _up(shared, _SHARED_UNIT) + reserved
    blocks = min(by_warps // num_warps, _BLOCKS.get(capability, 32))
    if block_bytes:
        blocks = min(blocks, device.shared_memory_per_multiprocessor // block_bytes)
    return int(blocks) * int(device.multi_processor_count)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
