"""How the Triton form cuts a call, a pure function of its shapes, and the kernels as the compile check wants them."""

from collections.abc import Iterable
from typing import Any

from ..anchored_linear.plan import power_of_two


WIDEST_CHUNK = 16
# Longest side of a memory, by the size of an element of its operands: what the registers of a program hold.
WIDEST_MEMORY = {2: 64, 4: 32}


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


def entries(kernels: Iterable[Any], chain: bool) -> list:
    """Compile-check entries of kernels that use φ (`chain`) or f."""
    from ..compiled import KernelEntry

    found = []
    name = {"MAP": "ln_silu", "EPS": 1e-3 if chain else 1e-6}
    for dtype, itemsize, width in (("bf16", 2, 64), ("fp32", 4, 32)):
        constants = blocks(width, width, WIDEST_CHUNK, itemsize)
        launched = {part: constants.pop(part) for part in ("num_warps", "num_stages")}
        for kernel in kernels:
            names = [n for n in kernel.arg_names if n not in {*constants, *name, "PRECISION"}]
            types = {n: NUMBERS.get(n) or ("*fp32" if n in FLOAT32 else f"*{dtype}") for n in names}
            label = f"two_pass_slots {kernel.__name__} {width}x{width} {dtype}"
            found.append(KernelEntry(label, kernel, types, constants | name, **launched))
    return found
