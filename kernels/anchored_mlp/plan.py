"""How the kernels of the anchored memories are cut for a device: pure functions, tested without one."""

import functools
from dataclasses import dataclass

import torch


WIDEST_TILE = 64
WIDEST_STATE = {1: 256, 2: 128}
"""Key and value width that the kernels take, by depth."""
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


def unsupported(depth: int, width: int, value_width: int, tile: int, has_norm: bool) -> str | None:
    """Why `mlp_scan` does not take a memory, as the end of a sentence; `None` if it does."""
    if depth not in WIDEST_STATE:
        return f"for one or two layers, not for {depth}"
    if depth == 1 and not has_norm:
        return "not for one layer without a LayerNorm"
    if width != value_width:
        return f"for equal key and value widths, not for {width} and {value_width}"
    if width > WIDEST_STATE[depth]:
        return f"up to a width of {WIDEST_STATE[depth]} at depth {depth}, not for {width}"
    if not 1 <= tile <= WIDEST_TILE:
        return f"for chunks of 1 to {WIDEST_TILE} tokens, not for {tile}"
    return None


def group_of(num_tiles):
    """Tiles between two kept states: the smallest whole number not below the root. Takes symbolic numbers."""
    return torch.sym_int(torch.sym_sqrt(num_tiles - 1)) + 1


def cut(kernel: str, memory: Memory, device: Device) -> Cut:
    """The cut of one of `KERNELS`: the widest block at which no target spills (README.md)."""
    block, block_j = padded(memory.tile), 32
    small, single = device.shared_memory < 200 * 1024 and device.lanes == 32, memory.itemsize == 4
    if kernel == "reverse" or kernel == "advance" and block == 64:
        block_j = 16
    elif kernel == "advance" and small and memory.width > 64:
        block_j = 64  # eight columns for each warp
    elif kernel in ("read", "read_backward", "keys") and block == 64 and small or kernel == "keys" and single:
        block_j = 16
    elif kernel == "read_backward" and block < 64 and memory.width > 64 and device.lanes == 32:
        block_j = 64
    warps = 8 if memory.width > 64 or kernel == "keys" and single else 4
    return Cut(min(block_j, padded(memory.hidden)), warps)


def state_bytes(memory: Memory, has_momentum: bool) -> int:
    """Memory and momentum of one batch row and head, float32."""
    return 4 * (2 if has_momentum else 1) * memory.depth * memory.width * memory.hidden


def kept_bytes(memory: Memory, series: int, num_tiles: int, has_momentum: bool) -> int:
    """What a forward keeps for its backward besides its operands: a state in front of each group.

    Args:
        memory: what the kernels are compiled for.
        series: batch rows times heads.
        num_tiles: chunks of a row.
        has_momentum: whether momenta are carried.
    """
    return series * -(-num_tiles // group_of(num_tiles)) * state_bytes(memory, has_momentum)


def scratch_bytes(memory: Memory, series: int, num_tiles: int, has_momentum: bool, backward: bool) -> int:
    """What a call needs while it runs, on top of operands and results; arguments as in `kept_bytes`."""
    group, block = group_of(num_tiles), padded(memory.tile)
    planes = (8 if backward else 3) if memory.depth > 1 else int(backward)
    rows = memory.itemsize * block * (planes * memory.hidden + (3 if backward else 1) * memory.width)
    rows += 4 * block * (4 * memory.width + block) * backward
    states = (group + 1) * (2 if backward else 1) * state_bytes(memory, has_momentum)
    return series * (states + group * rows)
