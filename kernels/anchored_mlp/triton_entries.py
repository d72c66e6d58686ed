"""What the kernels of this folder are compiled for ahead of time."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from .plan import Device, Memory, cut, padded


if TYPE_CHECKING:
    from ..compiled import KernelEntry, Target

# Dtype of q, k and v; depth, width, hidden width and chunk.
CONFIGURATIONS = (
    ("bf16", 2, 64, 256, 16),
    ("bf16", 2, 64, 256, 64),
    ("bf16", 2, 128, 512, 16),
    ("bf16", 1, 64, 64, 16),
    ("bf16", 1, 128, 128, 16),
    ("fp32", 2, 64, 256, 16),
)
INTEGERS = "num_tokens num_tiles first count programs".split()
OPERANDS = "q k v out cot cot_q cot_k cot_v wide narrow".split()
"""Parameters in the dtype of q, k and v; other pointers are float32."""


def entries(kernels: dict[str, tuple[Callable, bool]], target: "Target") -> list["KernelEntry"]:
    """Kernels in the configurations above, with momentum, norm and a base.

    Args:
        kernels: name in the plan -> the kernel, and whether it has a product at depth 1 as well.
        target: what to compile for.
    """
    from ..compiled import KernelEntry

    device, found = Device(target.shared_bytes, target.warp_size), []
    for dtype, depth, width, hidden, tile in CONFIGURATIONS:
        memory = Memory(depth, width, hidden, tile, 2 if dtype == "bf16" else 4)
        constants = {
            "DEPTH": depth, "TILE": tile, "BLOCK": padded(tile), "WIDTH": width, "BLOCK_D": padded(width),
            "HIDDEN": hidden, "ACT": "gelu", "HAS_BASE": True, "HAS_NORM": True, "HAS_MOMENTUM": True,
        }  # fmt: skip
        for kind, (kernel, multiplies) in kernels.items():
            plan = asdict(cut(kind, memory, device))
            launched = {name: plan.pop(name) for name in ("num_warps", "num_stages")}
            own = {name: x for name, x in (constants | plan).items() if name in kernel.arg_names}
            types = dict.fromkeys(set(kernel.arg_names) - {*own, "PRECISION", "KEEP"}, "*fp32")
            types |= {name: f"*{dtype}" for name in OPERANDS if name in types}
            types |= {name: "i32" for name in INTEGERS if name in types} | {"H": "i32:16"}
            types |= {"eps": "fp32"} if "eps" in types else {}
            name = f"anchored_mlp/{tile} {kernel.__name__} {width}x{hidden} depth {depth} {dtype}"
            # Forwards, and as the backward runs it again.
            for keep in [{"KEEP": False}, {"KEEP": True}] if "KEEP" in kernel.arg_names else [{}]:
                label, has_product = name + " again" * bool(keep.get("KEEP")), multiplies or depth > 1
                found.append(KernelEntry(label, kernel, types, own | keep, has_product=has_product, **launched))
    return found
