"""What the anchored-memory ops take and return: gates, options, and the layout of a state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


State = dict[str, Tensor]
"""Recurrent state of an op: named tensors, each with the batch as leading dimension. See `kernels/state.py`."""

FORMS = ("reference", "chunk", "triton")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "silu")
DECAY_TARGETS = ("zero", "init")


class Gates(NamedTuple):
    """Per-token coefficients of the inner optimiser (Titans eqs. 13, 14), each `[B, T, H, G]`.

    `G` counts gate sets: one per memory layer ("head" granularity), or one per channel. `anchored_linear` takes
    `G = 1` or `G = V` (columns of the memory); `anchored_mlp` takes `G = depth`, or for depth 2 `G = 2 K` (first the
    rows of the first matrix, then the columns of the second).

    Attributes:
        step: inner learning rate θ >= 0.
        log_decay: log(1 - α) <= 0, the logarithm of what is kept of the memory; `None` means nothing is forgotten.
        log_momentum: log(η) <= 0; `None` means plain gradient descent, without a momentum state.
    """

    step: Tensor
    log_decay: Tensor | None = None
    log_momentum: Tensor | None = None


class Norm(NamedTuple):
    """Affine of the LayerNorm behind the memory, `[H, V]` each; its presence also adds the residual `q + LN(...)`."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class AnchoredOptions:
    """What defines the function of an anchored memory besides its tensors.

    Args:
        chunk_size: gradient grid: all gradients of a chunk are taken at the memory of the chunk's start. It counts
            valid tokens of each row and is a property of the model, not a tile size; 1 is the exact online rule.
        decay_target: what forgetting returns to, `"zero"` or `"init"` (the learned start).
        activation: nonlinearity between the layers of a deep memory.
        decay_before_grad: take the gradient at the decayed memory (gated delta rule); plain linear memory, grid 1.
        eps: epsilon of the LayerNorm inside the memory.
        form: `"reference"`, `"chunk"` or `"triton"`; `None` lets the device of the tensors decide.
        overwrite_state: let a call of one token overwrite the tensors of its `initial_state`, which saves a copy of
            the whole state per token. For callers who own them; a form that always makes new tensors does not care.
    """

    chunk_size: int = 16
    decay_target: str = "zero"
    activation: str = "gelu"
    decay_before_grad: bool = False
    eps: float = 1e-6
    form: str | None = None
    overwrite_state: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}.")
        for name, value, accepted in (
            ("decay_target", self.decay_target, DECAY_TARGETS),
            ("activation", self.activation, ACTIVATIONS),
            ("form", self.form, (None, *FORMS)),
        ):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}.")
        if self.decay_before_grad and self.chunk_size != 1:
            raise ValueError(
                f"decay_before_grad is defined for the online rule only: set chunk_size=1 (got {self.chunk_size})."
            )


class Inputs(NamedTuple):
    """Checked operands of one call; q, k and v share a dtype, everything else is in the working precision."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    weights: tuple[Tensor, ...]
    norm: Norm | None
    mask: Tensor | None
    options: AnchoredOptions

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which side of each memory matrix its gates act on: `"head"` (scalar), `"in"` (rows) or `"out"` (columns)."""
        if self.gates.step.shape[-1] == self.depth:
            return ("head",) * self.depth
        return ("out",) if self.depth == 1 else ("in", "out")

    @property
    def base(self) -> tuple[Tensor | None, ...]:
        """What the memory decays towards; the state holds the difference to it."""
        return self.weights if self.options.decay_target == "init" else (None,) * self.depth

    @property
    def precision(self) -> torch.dtype:
        """Working precision: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def upcast(self) -> "Inputs":
        """The same with q, k and v in the working precision."""
        q, k, v = (x.to(self.precision) for x in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v)

    def gate_sets(self, gate: Tensor | None) -> tuple[Tensor | None, ...]:
        """Split `[..., G]` into one `[..., 1 or channels]` tensor per memory layer."""
        if gate is None:
            return (None,) * self.depth
        return gate.chunk(self.depth, dim=-1)


def _expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected {tuple(shape)}.")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: Sequence[Tensor],
    norm: Norm | tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    options: AnchoredOptions,
) -> Inputs:
    """Validate shapes and option combinations with one-sentence errors; gates and weights to the working precision."""
    if q.dim() != 4:
        raise ValueError(f"`q` must be [batch, time, heads, width], got {q.dim()} dimensions.")
    batch, time, heads, key_width = q.shape
    if time == 0:
        raise ValueError(f"A call needs at least one token, got `q` of shape {tuple(q.shape)}.")
    value_width, depth = v.shape[-1], len(weights)
    _expect("k", k, q.shape)
    _expect("v", v, (batch, time, heads, value_width))
    widths = [key_width, *(w.shape[-1] for w in weights)]
    for i, weight in enumerate(weights):
        _expect(f"weights[{i}]", weight, (heads, widths[i], widths[i + 1]))
    if widths[-1] != value_width:
        raise ValueError(f"The memory returns width {widths[-1]} but `v` has width {value_width}.")
    accepted = {depth} if depth > 2 else {depth, value_width if depth == 1 else 2 * key_width}
    if gates.step.shape[-1] not in accepted:
        raise ValueError(f"Gates have {gates.step.shape[-1]} sets, depth {depth} takes {sorted(accepted)}.")
    for name, gate in zip(Gates._fields, gates):
        if gate is not None:
            _expect(name, gate, (batch, time, heads, gates.step.shape[-1]))
    if norm is not None:
        norm = Norm(*norm)
        if key_width != value_width:
            raise ValueError(f"A residual needs equal key and value widths, got {key_width} and {value_width}.")
        _expect("norm.weight", norm.weight, (heads, value_width))
        _expect("norm.bias", norm.bias, (heads, value_width))
    if options.decay_before_grad and (norm is not None or depth > 1):
        raise ValueError("decay_before_grad is defined for the plain linear memory only: drop the norm, or the flag.")
    if mask is not None:
        _expect("mask", mask, (batch, time))
        mask = mask.bool()

    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    dtype = torch.promote_types(common, torch.float32)

    def up(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return Inputs(
        q.to(common),
        k.to(common),
        v.to(common),
        Gates(*map(up, gates)),
        tuple(map(up, weights)),
        None if norm is None else Norm(*map(up, norm)),
        mask,
        options,
    )
