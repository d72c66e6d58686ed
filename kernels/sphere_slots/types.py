"""What `sphere_slots` takes and keeps: options, checked operands, and the layout of a state.

| state | shape | meaning |
|---|---|---|
| `slots` | `[B, H, M, D]` | the running slots, one per row |
| `start` | `[B, H, M, D]` | the slots at the last chunk boundary, where coefficients are taken (`chunk_size > 1`) |
| `phase` | `[B]` int64 | valid tokens since that boundary (`chunk_size > 1`) |

All in float32 (float64 for float64 inputs). With two states no token has to be kept: coefficients come from `start`,
the update goes to `slots`, and a complete chunk makes them one again.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Gates, State


FORMS = ("reference", "chunk", "triton")
OBJECTIVES = ("dec", "sim", "enc")
NORMALIZATIONS = ("retract", "lazy", "none")
# Shorter slots than this are divided by it instead of by their length: a slot of zeros has no direction.
EPS = 1e-6


@dataclass(frozen=True)
class SphereOptions:
    """What defines the function of a slot memory besides its tensors.

    Args:
        objective: inner loss, with φ the slots as rows (scaled to unit length unless `normalization="none"`).
            `"dec"`: ½‖k φ - v‖², `"sim"`: -⟨k φ, v⟩, `"enc"`: ½‖φ k - v‖².
        normalization: `"retract"` brings every slot back to unit length, which is also how it forgets. `"lazy"` lets
            slots grow and looks at their direction only. `"none"` drops normalisation and projection: linear
            attention (`sim`) and the delta rule (`dec`).
        chunk_size: grid on which coefficients are frozen; counts valid tokens of each row, 1 is the exact rule.
        form: `"reference"`, `"chunk"` or `"triton"`; `None` lets the device of the tensors decide.

    Raises:
        ValueError: for a value that is not accepted.
    """

    objective: str = "dec"
    normalization: str = "retract"
    chunk_size: int = 16
    form: str | None = None

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}.")
        for name, value, accepted in (
            ("objective", self.objective, OBJECTIVES),
            ("normalization", self.normalization, NORMALIZATIONS),
            ("form", self.form, (None, *FORMS)),
        ):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}.")


class SphereInputs(NamedTuple):
    """Checked operands of one call; q, k and v share a dtype, everything else is in the working precision."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    slots: Tensor
    mask: Tensor | None
    options: SphereOptions

    @property
    def precision(self) -> torch.dtype:
        """Working precision: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def upcast(self) -> "SphereInputs":
        """The same with q, k and v in the working precision."""
        q, k, v = (x.to(self.precision) for x in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v)


def lengths(slots: Tensor) -> Tensor:
    """Length of every slot `[..., M, D]`, `[..., M, 1]`, at least `EPS`."""
    return slots.square().sum(-1, keepdim=True).clamp(min=EPS**2).sqrt()


def normalise(slots: Tensor) -> Tensor:
    """Slots of unit length."""
    return slots / lengths(slots)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, slots: Tensor, mask: Tensor | None, options: SphereOptions
) -> SphereInputs:
    """Validate shapes and option combinations with one-sentence errors; gates and slots to the working precision."""
    if q.dim() != 4:
        raise ValueError(f"`q` must be [batch, time, heads, width], got {q.dim()} dimensions.")
    if slots.dim() != 3:
        raise ValueError(f"`slots` must be [heads, slots, width], got {slots.dim()} dimensions.")
    gates = Gates(*gates)
    batch, time, heads, _ = q.shape
    number, width = slots.shape[1:]
    code, content = (width, number) if options.objective == "enc" else (number, width)
    expected = {
        "slots": (slots, (heads, number, width)),
        "q": (q, (batch, time, heads, code)),
        "k": (k, (batch, time, heads, code)),
        "v": (v, (batch, time, heads, content)),
        "log_decay": (gates.log_decay, (batch, time, heads, 1)),
        "mask": (mask, (batch, time)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, expected {shape} for {number} slots of width {width} and "
                f'objective="{options.objective}".'
            )
    if tuple(gates.step.shape) not in ((batch, time, heads, 1), (batch, time, heads, number)):
        raise ValueError(
            f"`step` has shape {tuple(gates.step.shape)}, expected {(batch, time, heads)} and one value, or one for "
            f"each of {number} slots."
        )
    if gates.log_momentum is not None:
        raise ValueError("Slots take plain steps: drop `log_momentum`.")
    if gates.log_decay is not None and options.normalization == "retract":
        raise ValueError(
            'normalization="retract" forgets by bringing slots back to unit length, which undoes any decay: drop '
            '`log_decay`, or choose "lazy".'
        )
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    dtype = torch.promote_types(common, torch.float32)
    gates = Gates(*(None if gate is None else gate.to(dtype) for gate in gates))
    q, k, v = (x.to(common) for x in (q, k, v))
    return SphereInputs(q, k, v, gates, slots.to(dtype), None if mask is None else mask.bool(), options)


def check_state(inputs: SphereInputs, state: State) -> None:
    """Refuse a state of another batch, shape or grid.

    Raises:
        ValueError: with the name of what is missing or misshapen.
    """
    shape = (inputs.q.shape[0], *inputs.slots.shape)
    expected = {"slots": shape}
    if inputs.options.chunk_size > 1:
        expected |= {"start": shape, "phase": shape[:1]}
    if odd := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"`initial_state` was made with other options: {', '.join(odd)} missing or not expected.")
    for name in expected:
        if tuple(state[name].shape) != expected[name]:
            raise ValueError(
                f"`initial_state[{name!r}]` has shape {tuple(state[name].shape)}, expected {expected[name]}."
            )


def carried(inputs: SphereInputs, state: State | None) -> tuple[Tensor, Tensor]:
    """Slots at the last chunk boundary, and running slots; the learned start where there is no state."""
    if state is None:
        slots = inputs.slots if inputs.options.normalization == "none" else normalise(inputs.slots)
        slots = slots.expand(inputs.q.shape[0], *slots.shape)
        return slots, slots
    slots = state["slots"].to(inputs.precision)
    return state.get("start", slots).to(inputs.precision), slots


def make_state(options: SphereOptions, start: Tensor, slots: Tensor, phase: Tensor) -> State:
    """Assemble a state; a grid of one has no other start than the running slots."""
    return {"slots": slots} if options.chunk_size == 1 else {"slots": slots, "start": start, "phase": phase}
