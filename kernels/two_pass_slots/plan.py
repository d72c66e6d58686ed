"""How the Triton form cuts a call, a pure function of its shapes, and the kernels as the compile check wants them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..anchored_linear.plan import power_of_two
from .inputs import SlotOptions


WIDEST_CHUNK = 16
# Longest side of a memory, by the size of an element of its operands: what the registers of a program hold.
WIDEST_MEMORY = {2: 64, 4: 32}
LARGEST_DECODED = 16384
"""Numbers of a padded memory that a decoded token holds in registers."""


def unsupported(options: SlotOptions, dtype: torch.dtype, slots: int, width: int) -> str | None:
    """Why the kernels cannot compute a call of many tokens, as the end of a sentence; `None` if they can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"not for {dtype}"
    if options.write_map == "identity":
        return "not for write_map='identity'"
    if options.refinements:
        return "not for refinements"
    widest = WIDEST_MEMORY[dtype.itemsize]
    if max(slots, width) > widest:
        return f"for up to {widest} slots of width {widest} in {dtype}, not for {slots} slots of width {width}"
    if options.chunk_size > WIDEST_CHUNK:
        return f"for chunks of up to {WIDEST_CHUNK} tokens, not for chunk_size={options.chunk_size}"
    return None


def too_large_to_decode(slots: int, width: int) -> str | None:
    """Why the kernel cannot compute a single token, as the end of a sentence; `None` if it can."""
    if power_of_two(slots) * power_of_two(width) <= LARGEST_DECODED:
        return None
    return f"for up to {LARGEST_DECODED} numbers of slots times width, not for {slots} slots of width {width}"


class DecodePlan(NamedTuple):
    """How a token is cut, one program per row and head.

    Attributes:
        slots, width: of a memory, as powers of two; a program holds both memories.
        rows: of a buffer, likewise.
        fold: block of a memory that a fold moves at a time.
        num_warps: of a program.
    """

    slots: int
    width: int
    rows: int
    fold: tuple[int, int]
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's block sizes."""
        blocks = {"MB": self.slots, "DB": self.width, "BLOCK_ROWS": self.rows}
        return blocks | {"FOLD_M": self.fold[0], "FOLD_D": self.fold[1]}


def decode_plan(programs: int, slots: int, width: int, chunk_size: int, processors: int) -> DecodePlan:
    """Cut a token: a memory takes 32 registers of a thread.

    Programs that have a multiprocessor to themselves take twice the warps.
    """
    slots, width = power_of_two(slots), power_of_two(width)
    num_warps = min(16, max(4, slots * width // 1024) * (2 if programs <= processors else 1))
    return DecodePlan(slots, width, power_of_two(chunk_size), (32, 32), num_warps)


def blocks(slots: int, width: int, chunk_size: int, itemsize: int) -> dict[str, int]:
    """Arguments that all kernels share: sizes, the powers of two that hold them, and warps."""
    return {
        "M": slots,
        "D": width,
        "MB": power_of_two(slots),
        "DB": power_of_two(width),
        "TILE": chunk_size,
        "BLOCK": power_of_two(chunk_size),
        # float32 operands come in three parts.
        "num_warps": 8 if itemsize == 4 else 4,
        "num_stages": 1,
    }


FLOAT32 = (
    "grad", "rows", "ends", "start", "last",
    "cot_grad", "cot_rows", "cot_ends", "cot_start", "cot_last", "cot_states", "cot_directions", "cot_targets",
)  # fmt: skip
NUMBERS = {"num_tokens": "i32", "num_tiles": "i32", "H": "i32:16", "hypergrad": "fp32"}


def entries(kernels: Iterable[Any], chain: bool, name: str = "ln_silu") -> list:
    """Compile-check entries of kernels that use φ (`chain`) or f, called `name`."""
    from ..compiled import KernelEntry

    found = []
    chosen = {"MAP": name, "EPS": 1e-3 if chain else 1e-6}
    for dtype, itemsize, width in (("bf16", 2, 64), ("fp32", 4, 32)):
        constants = blocks(width, width, WIDEST_CHUNK, itemsize)
        launched = {part: constants.pop(part) for part in ("num_warps", "num_stages")}
        for kernel in kernels:
            names = [n for n in kernel.arg_names if n not in {*constants, *chosen, "PRECISION"}]
            types = {n: NUMBERS.get(n) or ("*fp32" if n in FLOAT32 else f"*{dtype}") for n in names}
            label = f"two_pass_slots {kernel.__name__} {width}x{width} {dtype}"
            label += "" if name == "ln_silu" else f" {name}"
            found.append(KernelEntry(label, kernel, types, constants | chosen, **launched))
    return found
