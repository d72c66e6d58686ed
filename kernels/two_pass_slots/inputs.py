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
    """

    chunk_size: int = 16
    write_map: str = "ln_silu"
    read_map: str = "ln_silu"
    write_eps: float = 1e-3
    read_eps: float = 1e-6
    refinements: int = 0
    hypergrad: float = 1.0
    form: str | None = None

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


class SlotInputs(NamedTuple):
    """Checked operands of one call; those of tokens share a dtype, gates and start are in the working precision.

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
) -> SlotInputs:
    """Validate shapes with one-sentence errors, bring tokens to one dtype, and join the two memories."""
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
    q, k, value = (functional.pad(x.to(common), (0, width - x.shape[-1])) for x in (q, k, v))

    def both(gate: Tensor | None) -> Tensor | None:
        if gate is None:
            return None
        return gate.to(dtype).expand(*rows, 2).transpose(2, 3).flatten(2).unsqueeze(-1)

    return SlotInputs(
        q,
        torch.cat([k, value], dim=2),
        targets.to(common),
        Gates(*map(both, gates)),
        None if start is None else start.to(dtype),
        None if mask is None else mask.bool(),
        options,
    )
