"""Random operands of `sphere_slots`, shared by its tests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from hf_memory.kernels import Gates, SphereOptions, State, sphere_slots


@dataclass
class SphereCase:
    """Slots and their operands; calling it runs the op. Values are small, so that no two forms part by rounding."""

    batch: int = 2
    time: int = 37
    heads: int = 2
    slots: int = 5
    width: int = 8
    decay: bool = False
    step_sets: int = 1
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = (self.batch, self.time, self.heads)
        is_enc = self.options.get("objective") == "enc"
        code, content = (self.width, self.slots) if is_enc else (self.slots, self.width)
        self.q = functional.normalize(normal(*rows, code), dim=-1)
        self.k = functional.normalize(normal(*rows, code), dim=-1)
        self.v = self.scale * normal(*rows, content)
        step = 0.6 * normal(*rows, self.step_sets).sigmoid()
        log_decay = functional.logsigmoid(normal(*rows, 1) + 3)
        self.gates = Gates(step, log_decay if self.decay else None)
        self.start = normal(self.heads, self.slots, self.width)
        self.to(self.dtype)

    def to(self, dtype: torch.dtype) -> "SphereCase":
        self.q, self.k, self.v, self.start = (x.to(dtype) for x in (self.q, self.k, self.v, self.start))
        self.gates = Gates(*(None if x is None else x.to(dtype) for x in self.gates))
        return self

    @property
    def operands(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, "step": self.gates.step, "slots": self.start}
        return named | ({} if self.gates.log_decay is None else {"log_decay": self.gates.log_decay})

    def require_grad(self) -> "SphereCase":
        for x in self.operands.values():
            x.requires_grad_()
        return self

    def sliced(self, start: int, stop: int) -> dict[str, Tensor | Gates]:
        gates = Gates(*(None if x is None else x[:, start:stop] for x in self.gates))
        return {"q": self.q[:, start:stop], "k": self.k[:, start:stop], "v": self.v[:, start:stop], "gates": gates}

    def __call__(self, form: str | None = None, tokens: dict | None = None, **kwargs) -> tuple[Tensor, State | None]:
        tokens = self.sliced(0, self.time) if tokens is None else tokens
        return sphere_slots(**tokens, slots=self.start, options=SphereOptions(form=form, **self.options), **kwargs)
