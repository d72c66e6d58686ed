"""How the kernels of the anchored memories are cut for a device: a pure function, so that it has tests without one."""

from dataclasses import dataclass


MAX_TILE = 64
MAX_WIDTH = {1: 256, 2: 128}


@dataclass(frozen=True)
class Device:
    """What a plan depends on.

    Attributes:
        shared_memory: bytes that one block may use.
        registers: 32-bit registers of one multiprocessor.
        multiprocessors: how many run side by side.
        lanes: threads of a warp.
    """

    shared_memory: int
    registers: int
    multiprocessors: int
    lanes: int = 32


@dataclass(frozen=True)
class Memory:
    """What the kernels are compiled for besides dtypes.

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
    itemsize: int

    @property
    def block(self) -> int:
        return padded(self.tile)

    @property
    def block_d(self) -> int:
        return padded(self.width)


@dataclass(frozen=True)
class Cut:
    """One kernel: rows of the last matrix that are on chip at a time, warps, and pipeline stages."""

    block_j: int
    num_warps: int
    num_stages: int


def padded(size: int) -> int:
    """The power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def group_of(num_tiles: int) -> int:
    """Tiles between two kept states: the smallest whole number not below the root."""
    group = 1
    while group * group < num_tiles:
        group += 1
    return group
