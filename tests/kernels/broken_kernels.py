"""Kernels that the compile check must refuse, and one that it must not. Compiled, never run."""

import triton
import triton.language as tl

from hf_memory.kernels.compiled import KernelEntry, Target


@triton.jit
def product_kernel(a, b, out, bias, ROWS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b + bias`."""
    rows, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    x = tl.load(a + rows[:, None] * INNER + inner[None, :])
    y = tl.load(b + inner[:, None] * ROWS + rows[None, :])
    z = tl.dot(x, y, input_precision=PRECISION)
    if bias is not None:
        z += tl.load(bias + rows)[None, :]
    tl.store(out + rows[:, None] * ROWS + rows[None, :], z)


def entry(name: str, dtype: str = "bf16", size: int = 16, inner: int = 16, **fields) -> KernelEntry:
    types = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32"}
    constexprs = {"bias": None, "ROWS": size, "INNER": inner, **fields.pop("constexprs", {})}
    return KernelEntry(name, product_kernel, types, constexprs, **fields)


def compile_entries(target: Target) -> list[KernelEntry]:
    return [
        entry("right"),
        entry("without matrix instructions", "fp32", constexprs={"PRECISION": "ieee"}),
        entry("spilling", size=128, num_warps=1),
        entry("too large", size=128, inner=512, num_warps=8),
        entry("misspelt", constexprs={"WIDTH": 16}),
    ]
