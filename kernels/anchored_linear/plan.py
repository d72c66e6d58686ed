"""How the Triton form cuts a call of the plain linear memory: a pure function of shapes, dtype and device limits."""

from dataclasses import dataclass

from ..launch import H200_MULTIPROCESSORS


# Widest tile: half-precision operands fill tensor cores at 64; float32 operands take three products each, whose parts
# would spill at that width.
WIDEST_TILE = {2: 64, 4: 32}
NARROWEST_TILE = 16
WIDEST_STATE = 256
WIDEST_RESIDENT = 128


def power_of_two(n: int) -> int:
    """The next power of two that tensor cores take as a width, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def tile_width(chunk_size: int, itemsize: int) -> int | None:
    """Slots of a tile: several gradient chunks, or an equal part of one; `None` if a long chunk has no such part."""
    widest = WIDEST_TILE[itemsize]
    if chunk_size <= widest:
        return widest // chunk_size * chunk_size
    part = max(width for width in range(1, widest + 1) if chunk_size % width == 0)
    return part if part >= NARROWEST_TILE else None


@dataclass(frozen=True)
class LinearPlan:
    """Widths of blocks.

    Attributes:
        tile: slots of a tile.
        block: the same as a power of two.
        key_block: rows of the memory in one product.
        gradient_block, gradient_columns: rows and columns of a product where queries and keys get their gradients,
            which takes eight accumulators.
        value_block: columns in one product, where tiles run in parallel.
        chain_block: columns of one program of the chain.
        streams: whether the chain keeps its states in memory, where they do not fit registers.
        stages: of the pipelines inside loops; operands in flight cost float32 and wide kernels too many registers.
        threads: of every program; with half as many, kernels of the backward spill on some targets.
    """

    tile: int
    block: int
    key_block: int
    gradient_block: int
    gradient_columns: int
    value_block: int
    chain_block: int
    streams: bool
    stages: int
    threads: int = 256


def plan(
    series: int,
    key_width: int,
    value_width: int,
    itemsize: int,
    chunk_size: int,
    multiprocessors: int = H200_MULTIPROCESSORS,
) -> LinearPlan:
    """Cut a call.

    Args:
        series: batch times heads.
        key_width, value_width: shape of the memory, at most 256 each.
        itemsize: bytes of an element of q, k and v.
        chunk_size: gradient grid.
        multiprocessors: of the device.

    Raises:
        ValueError: for a chunk size without a tile.
    """
    tile = tile_width(chunk_size, itemsize)
    if tile is None:
        raise ValueError(f"No tile divides chunk_size={chunk_size}.")
    widest = power_of_two(value_width)
    # The chain is as long as the sequence: as many programs as there are multiprocessors, but no more than needed.
    chain = min(widest, 32 if itemsize == 2 else 16)
    while chain > 16 and series * -(-value_width // chain) < multiprocessors:
        chain //= 2
    block = power_of_two(tile)
    wide = 64 if itemsize == 2 else 16
    return LinearPlan(
        tile=tile,
        block=block,
        key_block=min(power_of_two(key_width), wide),
        gradient_block=min(power_of_two(key_width), wide, 32),
        gradient_columns=min(widest, wide, 32),
        value_block=min(widest, wide),
        chain_block=chain,
        stages=2 if itemsize == 2 and key_width <= WIDEST_RESIDENT else 1,
        streams=itemsize == 4 or key_width > WIDEST_RESIDENT,
    )
