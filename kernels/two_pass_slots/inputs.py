"""Options and checked operands of `two_pass_slots`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..types import FORMS, Gates
from .maps import READ_MAPS, WRITE_MAPS, SlotMap


@dataclass(frozen=True)
class SlotOptions:
    """What defines the function besides its tensors.

    Args:
        chunk_size: gradient grid: all gradients of a chunk are taken at the memories of its start. It counts valid
            tokens of each row; 1 is the exact recurrence.
        write_map: φ, through which a memory must reproduce the target code: `"identity"`, `"silu"`, `"l2_silu"` or
            `"ln_silu"`.
        read_map: f between the two passes; one of those, or `"softmax"`.
        write_eps: epsilon of φ. At a memory of zeros its Jacobian has the size 0.5 / √eps.
        read_eps: epsilon of f.
        refinements: how often the gradients of a chunk are taken again, each at the memory that the last ones make of
            the token before; after p times the first p + 1 tokens of a chunk are exact.
        hypergrad: factor of what the outer gradient gets through the point where an inner one is taken: 1 for the
            gradient of the function as it is, 0 for its first-order approximation. Changes no output.
        form: `"reference"`, `"chunk"` or `"triton"`; `None` lets the device of the tensors decide.
        overwrite_state: let a call of one token overwrite the tensors of its `initial_state`, which saves a copy of
            the whole state per token. For callers who own them; a form that always makes new tensors does not care.
    """

    chunk_size: int = 16
    write_map: str = "ln_silu"
    read_map: str = "ln_silu"
    write_eps: float = 1e-3
    read_eps: float = 1e-6
    refinements: int = 0
    hypergrad: float = 1.0
    form: str | None = None
    overwrite_state: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}.")
        if not 0 <= self.refinements < self.chunk_size:
            raise ValueError(
                f"refinements must be at least 0 and below chunk_size ({self.chunk_size}), one short of which a chunk "
                f"is exact, got {self.refinements}."
            )
        if not 0 <= self.hypergrad <= 1:
            raise ValueError(f"hypergrad must be between 0 and 1, got {self.hypergrad}.")
        for name, accepted in (("write_map", WRITE_MAPS), ("read_map", READ_MAPS), ("form", (None, *FORMS))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {getattr(self, name)!r}.")

    @property
    def write(self) -> SlotMap:
        return SlotMap(self.write_map, self.write_eps)

    @property
    def read(self) -> SlotMap:
        return SlotMap(self.read_map, self.read_eps)


class SlotOperands(NamedTuple):
    """Checked operands of one call as they came; those of tokens share a dtype, gates and start are in the working
    precision.

    Attributes:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        targets: `[B, T, H, m]`.
        gates: `[B, T, H, 1]` for both memories, or `[B, T, H, 2]`.
        start: `[2 H, m, D]`, D the larger one of K and V; `None` for zeros.
        mask: `[B, T]` bool.
        options: see there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    targets: Tensor
    gates: Gates
    start: Tensor | None
    mask: Tensor | None
    options: SlotOptions

    @property
    def width(self) -> int:
        """Of the memories."""
        return max(self.q.shape[-1], self.v.shape[-1])

    def joined(self) -> "SlotInputs":
        """The same with the two memories as 2 H heads."""

        def both(gate: Tensor | None) -> Tensor | None:
            if gate is None:
                return None
            return gate.expand(*gate.shape[:3], 2).transpose(2, 3).flatten(2).unsqueeze(-1)

        q, k, v = (functional.pad(x, (0, self.width - x.shape[-1])) for x in (self.q, self.k, self.v))
        written = torch.cat([k, v], dim=2)
        return SlotInputs(q, written, self.targets, Gates(*map(both, self.gates)), self.start, self.mask, self.options)


class SlotInputs(NamedTuple):
    """Operands of one call with the two memories as heads of one.

    The memories of keys and those of values are 2 H heads, those of keys first, of one width D: that of the wider
    kind. The other is padded with zeros, which no step changes.

    Attributes:
        q: queries `[B, T, H, D]`.
        written: keys and values `[B, T, 2 H, D]`.
        targets: `[B, T, H, m]`, the same for both.
        gates: `[B, T, 2 H, 1]`.
        start: `[2 H, m, D]`, `None` for zeros.
        mask: `[B, T]` bool.
        options: see there.
    """

    q: Tensor
    written: Tensor
    targets: Tensor
    gates: Gates
    start: Tensor | None
    mask: Tensor | None
    options: SlotOptions

    @property
    def tokens(self) -> dict[str, Tensor]:
        """What a state keeps of each token, by its name there."""
        gates = {name: gate for name, gate in self.gates._asdict().items() if gate is not None}
        return {"written": self.written, "targets": self.targets} | gates

    @property
    def precision(self) -> torch.dtype:
        """Working precision: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def upcast(self) -> "SlotInputs":
        """The same with everything in the working precision."""
        q, written, targets = (x.to(self.precision) for x in (self.q, self.written, self.targets))
        return self._replace(q=q, written=written, targets=targets)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    targets: Tensor,
    gates: Gates,
    start: Tensor | None,
    mask: Tensor | None,
    options: SlotOptions,
) -> SlotOperands:
    """Validate shapes with one-sentence errors, and bring tokens to one dtype."""
    if q.dim() != 4:
        raise ValueError(f"`q` must be [batch, time, heads, width], got {q.dim()} dimensions.")
    if gates.log_momentum is not None:
        raise ValueError("Slot memories have no momentum: leave `gates.log_momentum` out.")
    batch, time, heads, _ = q.shape
    width = max(q.shape[-1], v.shape[-1])
    rows = (batch, time, heads)
    expected = [("k", k, tuple(q.shape)), ("v", v, (*rows, v.shape[-1]))]
    expected += [("targets", targets, (*rows, targets.shape[-1]))]
    for name, gate in (("step", gates.step), ("log_decay", gates.log_decay)):
        if gate is not None:
            if gate.shape[-1] not in (1, 2):
                raise ValueError(f"`{name}` has {gate.shape[-1]} sets, accepted are 1 (for both memories) and 2.")
            expected.append((name, gate, (*rows, gate.shape[-1])))
    if start is not None:
        expected.append(("start", start, (2 * heads, targets.shape[-1], width)))
    if mask is not None:
        expected.append(("mask", mask, (batch, time)))
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected {shape}.")

    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    dtype = torch.promote_types(common, torch.float32)
    return SlotOperands(
        *(x.to(common) for x in (q, k, v, targets)),
        Gates(*(None if gate is None else gate.to(dtype) for gate in gates)),
        None if start is None else start.to(dtype),
        None if mask is None else mask.bool(),
        options,
    )
