"""How the kernels of the anchored memories are cut for a device: pure functions, tested without one."""

import functools
from dataclasses import dataclass

import torch


MAX_TILE = 64
KERNELS = ("advance", "read", "read_backward", "reverse", "keys", "base")


@dataclass(frozen=True)
class Device:
    """What a plan depends on.

    Attributes:
        shared_memory: bytes that one block may use.
        lanes: threads of a warp, 32 or 64.
    """

    shared_memory: int
    lanes: int = 32


H200 = Device(shared_memory=227 * 1024)


@functools.cache
def device_of(device: torch.device) -> Device:
    """What is known of a device; under the interpreter, which has none, of an H200."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.shared_memory_per_block_optin, properties.warp_size)


@dataclass(frozen=True)
class Memory:
    """What the kernels are compiled for.

    Attributes:
        depth: 1 or 2 matrices.
        width: key and value width.
        hidden: rows of the last matrix; the width itself at depth 1.
        tile: tokens of a chunk.
        itemsize: bytes of an element of q, k and v.
    """

    depth: int
    width: int
    hidden: int
    tile: int
    itemsize: int = 2


@dataclass(frozen=True)
class Cut:
    """One kernel: columns of the hidden width that are on chip at a time, warps, and pipeline stages."""

    BLOCK_J: int
    num_warps: int
    num_stages: int = 1


def padded(size: int) -> int:
    """The power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def group_of(num_tiles):
    """Tiles between two kept states: the smallest whole number not below the root. Takes symbolic numbers."""
    return torch.sym_int(torch.sym_sqrt(num_tiles - 1)) + 1


def cut(kernel: str, memory: Memory, device: Device) -> Cut:
    """The cut of one of `KERNELS`; what it needs was read off the compiler (README.md)."""
    block, block_d = padded(memory.tile), padded(memory.width)
    wide = memory.itemsize == 2 and (block < 64 or kernel in ("keys", "base")) and kernel != "reverse"
    return Cut(min(32 if wide else 16, padded(memory.hidden)), 4 if block_d <= 64 else 8)
