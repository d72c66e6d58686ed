"""Sizes of a call of the plain linear memory, and the constants that they mean for its kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ..launch import dot_precision, launch, multiprocessors
from .plan import LinearPlan, plan


if TYPE_CHECKING:
    from ..compiled import KernelEntry, Target

STAGES = 2

# Dtype, width and chunk size of what is compiled ahead of time.
CONFIGURATIONS = (
    ("bf16", 128, 1),
    ("bf16", 128, 64),
    ("bf16", 64, 16),
    ("bf16", 256, 1),
    ("fp32", 64, 1),
    ("fp32", 128, 64),
)
FLOAT32 = (
    "base grad rows ends offset momentum last_offset last_momentum system system_out cot_grad cot_rows cot_ends "
    "cot_offset cot_momentum cot_last_offset cot_last_momentum"
)
TYPES = dict.fromkeys(FLOAT32.split(), "*fp32") | {
    "anchored": "*i64",
    "num_tokens": "i32",
    "num_tiles": "i32",
    "H": "i32:16",
}
"""Types of parameters that are not in the dtype of q, k and v."""


@dataclass(frozen=True)
class LinearCall:
    """Sizes of a call and how it is cut."""

    batch: int
    num_tokens: int
    heads: int
    key_width: int
    value_width: int
    chunk_size: int
    at_decayed: bool
    has_base: bool
    has_momentum: bool
    plan: LinearPlan

    @classmethod
    def of(cls, q: Tensor, v: Tensor, base: Tensor | None, momentum: Tensor | None, chunk: int, at_decayed: bool):
        batch, num_tokens, heads, width = q.shape
        cut = plan(batch * heads, width, v.shape[-1], q.element_size(), chunk, multiprocessors(q.device))
        has_base, has_momentum = base is not None, momentum is not None
        return cls(batch, num_tokens, heads, width, v.shape[-1], chunk, at_decayed, has_base, has_momentum, cut)

    @property
    def num_tiles(self) -> int:
        return triton.cdiv(self.num_tokens, self.plan.tile)

    @property
    def series(self) -> int:
        return self.batch * self.heads

    @property
    def solves(self) -> bool:
        """Whether a tile holds several gradient chunks."""
        return self.chunk_size < self.plan.tile or self.at_decayed

    @property
    def tiles(self) -> int:
        """Tiles of all series."""
        return self.series * self.num_tiles

    def scratch(self, like: Tensor, *shape: int) -> Tensor:
        """Uninitialised `[B, H, NT, ...]` in the dtype of `like`."""
        return like.new_empty(self.batch, self.heads, self.num_tiles, *shape)

    @property
    def tiles_per_chunk(self) -> int:
        return max(1, self.chunk_size // self.plan.tile)

    def constants(self, kernel: Callable) -> dict[str, object]:
        """Those of the call's constants that a kernel takes."""
        known = {
            "K": self.key_width,
            "V": self.value_width,
            "KB": self.plan.key_block,
            "GB": self.plan.gradient_block,
            "VB": self.plan.value_block,
            "CB": self.plan.chain_block,
            "TILE": self.plan.tile,
            "BLOCK": self.plan.block,
            "CHUNK": self.chunk_size,
            "TILES_PER_CHUNK": self.tiles_per_chunk,
            "AT_DECAYED": self.at_decayed,
            "SOLVE": self.solves,
            "HAS_BASE": self.has_base,
            "HAS_MOMENTUM": self.has_momentum,
        }
        return {name: value for name, value in known.items() if name in kernel.arg_names}

    def launch(self, kernel: Callable, programs: int, *tensors: Tensor | None, **own: object) -> None:
        """Start a kernel, whose parameters are its tensors, the sizes, the call's constants and its own."""
        sizes = (self.num_tokens, self.num_tiles, self.heads)
        constants = self.constants(kernel) | own | {"PRECISION": dot_precision(torch.float32)}
        launch(kernel, programs, *tensors, *sizes, **constants, num_warps=self.plan.warps, num_stages=STAGES)


def compile_calls(kernels: tuple[Callable, ...], target: "Target") -> list["KernelEntry"]:
    """Kernels in the configurations of `CONFIGURATIONS`, with momentum and decay to a learned start."""
    from ..compiled import KernelEntry

    found = []
    for dtype, width, chunk in CONFIGURATIONS:
        cut = plan(16, width, width, 2 if dtype == "bf16" else 4, chunk, target.processors)
        call = LinearCall(1, 8192, 16, width, width, chunk, False, True, True, cut)
        own = {"KEEP": True, "SOLVE_PRECISION": target.precision}
        if dtype == "bf16" and target.backend == "cuda":
            own["SOLVE_PRECISION"] = "tf32"
        for kernel in kernels:
            constants = call.constants(kernel) | {name: x for name, x in own.items() if name in kernel.arg_names}
            types = {n: TYPES.get(n, f"*{dtype}") for n in kernel.arg_names if n not in {*constants, "PRECISION"}}
            name = f"anchored_linear/{chunk} {kernel.__name__} {width} {dtype}"
            if call.solves or kernel.__name__ not in ("prepare_kernel", "output_backward_kernel"):
                found.append(KernelEntry(name, kernel, types, constants, cut.warps, STAGES))
    return found
