"""Sizes of a call of the plain linear memory, and the constants that they mean for its kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ..launch import dot_precision, launch, multiprocessors, warp_size
from .plan import LinearPlan, plan


if TYPE_CHECKING:
    from ..compiled import KernelEntry, Target

# Dtype, width and chunk size of what is compiled ahead of time, and whether it is the gated delta rule.
CONFIGURATIONS = (
    ("bf16", 128, 1, False),
    ("bf16", 128, 64, False),
    ("bf16", 64, 16, False),
    ("bf16", 256, 1, False),
    ("fp32", 64, 1, False),
    ("fp32", 128, 64, False),
    ("bf16", 128, 1, True),
)
# Tensors that a memory without momentum and learned start does not have.
ABSENT = ("base", "momentum", "momenta", "f", "cot_last_momentum", "cot_momenta")
FLOAT32 = (
    "base grad rows ends offset momentum last_offset last_momentum system system_out cot_grad cot_rows cot_ends "
    "cot_offset cot_momentum cot_last_offset cot_last_momentum cot_anchor"
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

    @property
    def chains(self) -> int:
        """Programs of the chain."""
        return self.series * triton.cdiv(self.value_width, self.plan.chain_block)

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
            "GV": self.plan.gradient_columns,
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

    def uses(self, kernel: Callable) -> bool:
        """Whether the call starts a kernel."""
        if kernel.__name__.startswith("chain"):
            return kernel.__name__.startswith("chain_stream") == self.plan.streams
        return self.solves or kernel.__name__ != "prepare_kernel"

    def launch(self, kernel: Callable, programs: int, *tensors: Tensor | None, **own: object) -> None:
        """Start a kernel, whose parameters are its tensors, the sizes, the call's constants and its own."""
        sizes = (self.num_tokens, self.num_tiles, self.heads)
        constants = self.constants(kernel) | own | {"PRECISION": dot_precision(torch.float32)}
        launch(
            kernel,
            programs,
            *tensors,
            *sizes,
            **constants,
            num_warps=self.plan.threads // warp_size(),
            num_stages=self.plan.stages,
        )


def compile_calls(kernels: tuple[Callable, ...], target: "Target") -> list["KernelEntry"]:
    """Kernels in all `CONFIGURATIONS`: with momentum and a learned start, or the gated delta rule."""
    from ..compiled import KernelEntry

    found = []
    for dtype, width, chunk, is_gated_delta_rule in CONFIGURATIONS:
        cut = plan(16, width, width, 2 if dtype == "bf16" else 4, chunk, target.processors)
        full = not is_gated_delta_rule
        call = LinearCall(1, 8192, 16, width, width, chunk, is_gated_delta_rule, full, full, cut)
        own = {"KEEP": True, "SOLVE_PRECISION": target.precision} | dict.fromkeys(() if full else ABSENT)
        if dtype == "bf16" and target.backend == "cuda":
            own["SOLVE_PRECISION"] = "tf32"
        for kernel in kernels:
            constants = call.constants(kernel) | {name: x for name, x in own.items() if name in kernel.arg_names}
            types = {n: TYPES.get(n, f"*{dtype}") for n in kernel.arg_names if n not in {*constants, "PRECISION"}}
            name = f"{'anchored_linear' if full else 'gated_delta_rule'}/{chunk} {kernel.__name__} {width} {dtype}"
            if call.uses(kernel):
                found.append(KernelEntry(name, kernel, types, constants, cut.threads // target.warp_size, cut.stages))
    return found
