"""How fast a row could be on a named GPU: bytes, operations and the serial chain, counted from the formulas.

The formulas stand in the README of each op. A floor is the largest of three times, each as if it were alone: operands,
results and gradients once through memory; the products at the dense peak; the products that wait for each other. The
third is an estimate: `PRODUCT_SECONDS` is assumed, not measured. No recomputation is counted, and no state that a
kernel has to spill, so that a plan which needs either is seen to pay for it.
"""

from collections.abc import Callable
from typing import NamedTuple


PRODUCT_SECONDS = 2.5e-7
"""A product of one tile that waits for another one: its latency and that of bringing its operands in place."""

TILE = 64
"""Tokens of a tile of the plain linear memory, whose grid does not bind it."""

BACKWARD_OPERATIONS = 2
"""Products of a backward, in units of its forward: one for each operand."""


class Gpu(NamedTuple):
    """A card. `marks` is in the name that its driver gives it; rates per second, dense, without sparsity."""

    name: str
    marks: str
    bytes: float
    half_operations: float


GPUS = (
    Gpu("H200", "H200", 4.8e12, 989e12),
    Gpu("H100", "H100 80GB HBM3", 3.35e12, 989e12),
)

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# float32 operands take three TF32 products, which run at half the rate of bfloat16.
OPERATIONS_SHARE = {"float32": 1 / 6, "bfloat16": 1.0, "float16": 1.0}


class Cost(NamedTuple):
    """What a call has to move and to compute, and how many products wait for each other."""

    bytes: float
    operations: float
    links: float


class Floor(NamedTuple):
    """Milliseconds that each resource needs by itself."""

    memory_ms: float
    products_ms: float
    chain_ms: float

    @property
    def ms(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """Which of them it is."""
        return ("memory", "products", "chain")[self.index(self.ms)]


class _Work(NamedTuple):
    """Of one token and head, forward: operations, vectors of the row's dtype that are read or written, float32 gates,
    links of the chain, and float32 numbers that a decoded token reads or writes."""

    operations: float
    vectors: int
    gates: int
    links: float
    decode: float


def _buffered(state: int, row: int, grid: int) -> float:
    """Numbers per decoded token of a state read each time and rewritten once per chunk, and rows until then."""
    return 2 * state if grid == 1 else state * (1 + 2 / grid) + grid / 2 * row


def _linear(d: int, grid: int, time: int) -> _Work:
    n = TILE
    return _Work(2 * (5 * d**2 + 2.5 * n * d + n**2), 4, 3, 2 / n, _buffered(2 * d**2, 2 * d, grid))


def _gated_delta_rule(d: int, grid: int, time: int) -> _Work:
    n = TILE
    return _Work(2 * (3 * d**2 + 2.5 * n * d), 4, 2, 2 / n, _buffered(d**2, 2 * d, grid))


def _linear_norm(d: int, grid: int, time: int) -> _Work:
    operations = 2 * (6 * d**2 + 2 * grid * d + grid**2)
    return _Work(operations, 4, 3, 2 / grid, _buffered(2 * d**2, 2 * d, grid))


def _mlp(d: int, grid: int, time: int) -> _Work:
    # Expansion 4; the chain is up through both layers, back through the second, and the fold.
    row = d + 2 * (4 * d) + d
    return _Work(104 * d**2 + 20 * grid * d, 4, 6, 4 / grid, _buffered(16 * d**2, row, grid))


def _two_pass_slots(d: int, grid: int, time: int) -> _Work:
    row = 2 * d + 2 * d + 4  # written, directions, gates; targets are kept, but not read again
    return _Work(12 * d**2 + 8 * grid * d, 5, 2, 2 / grid, _buffered(2 * d**2, row, grid))


def _sphere_slots(d: int, grid: int, time: int) -> _Work:
    return _Work(12 * d**2 + 10 * grid * d, 4, 2, 2 / grid, d**2 * (2 if grid == 1 else 3))


def _softmax_attention(d: int, grid: int, time: int) -> _Work:
    return _Work(2 * time * d, 4, 0, 0.0, 0.0)


WORK: dict[str, Callable[[int, int, int], _Work]] = {
    "anchored_linear": _linear,
    "anchored_linear_norm": _linear_norm,
    "anchored_mlp": _mlp,
    "gated_delta_rule": _gated_delta_rule,
    "softmax_attention": _softmax_attention,
    "sphere_slots": _sphere_slots,
    "two_pass_slots": _two_pass_slots,
}
"""Name of an op, or how the names of its variants begin -> its work, from width, grid and tokens."""


def cost(op: str, shape: tuple[int, int, int, int], grid: int | None, dtype: str, mode: str) -> Cost | None:
    """Count a call.

    Args:
        op: name of the op in a row.
        shape: batch, time, heads, width; for `"matmul"` one head and `[time, width]` times `[width, width]`.
        grid: chunk size, where there is one.
        dtype: of queries, keys and values.
        mode: of the row; modes under CUDA graphs cost the same.

    Returns:
        Bytes, operations and links of one call (of one token of each row in decode), or `None` where nobody counted.
    """
    batch, time, heads, width = shape
    element = ELEMENT_BYTES[dtype]
    if op == "matmul":
        return Cost(element * (2 * time * width + width**2), 2 * time * width**2, 0)
    known = [name for name in WORK if op.startswith(name)]
    mode = mode.removesuffix("-graph")
    if not known or mode not in ("fwd", "fwd+bwd", "decode"):
        return None
    work = WORK[max(known, key=len)](width, grid or 1, time)
    if mode == "decode":
        cached = 2 * time * width * element if op == "softmax_attention" else 4 * work.decode
        return Cost(batch * heads * cached, 0, 0)
    tokens = batch * time * heads
    vector = width * element
    if mode == "fwd":
        return Cost(tokens * (work.vectors * vector + 4 * work.gates), tokens * work.operations, time * work.links)
    # The backward reads what the forward read and a cotangent, and writes the gradients.
    traffic = (3 * work.vectors - 1) * vector + 3 * 4 * work.gates
    return Cost(tokens * traffic, (1 + BACKWARD_OPERATIONS) * tokens * work.operations, 2 * time * work.links)


def gpu_of(device: str) -> Gpu | None:
    """The card with this name, if its rates are known."""
    return next((gpu for gpu in GPUS if gpu.marks in device), None)


def floor(counted: Cost, gpu: Gpu, dtype: str) -> Floor:
    """Least time of a cost on a card."""
    return Floor(
        1e3 * counted.bytes / gpu.bytes,
        1e3 * counted.operations / (gpu.half_operations * OPERATIONS_SHARE[dtype]),
        1e3 * counted.links * PRODUCT_SECONDS,
    )
