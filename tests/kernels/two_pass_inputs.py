"""Random operands of `two_pass_slots`, shared by its tests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from hf_memory.kernels import Gates, SlotOptions, State, two_pass_slots


@dataclass
class SlotCase:
    """Operands for one set of options; calling it runs the op. Keys and values have unit length."""

    shape: tuple[int, int, int, int] = (2, 37, 2, 8)
    slots: int = 6
    value_width: int | None = None
    sets: int = 2
    decay: bool = True
    start: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        *rows, heads, width = self.shape
        value_width = self.value_width or width
        tokens = (*rows, heads)
        self.operands = {
            "q": functional.normalize(normal(*tokens, width), dim=-1),
            "k": functional.normalize(normal(*tokens, width), dim=-1),
            "v": functional.normalize(normal(*tokens, value_width), dim=-1),
            "targets": normal(*tokens, self.slots),
            "step": 0.3 * normal(*tokens, self.sets).sigmoid(),
        }
        if self.decay:
            self.operands["log_decay"] = functional.logsigmoid(normal(*tokens, 1) + 3)
        if self.start:
            self.operands["start"] = normal(2 * heads, self.slots, max(width, value_width))
        self.to(self.dtype)

    def to(self, dtype: torch.dtype) -> "SlotCase":
        self.operands = {name: x.detach().to(dtype) for name, x in self.operands.items()}
        return self

    def require_grad(self) -> "SlotCase":
        for x in self.operands.values():
            x.requires_grad_()
        return self

    def tokens(self, first: int = 0, last: int | None = None, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        return {name: x[rows][:, first:last] for name, x in self.operands.items() if name != "start"}

    def __call__(self, form: str | None = None, tokens: dict | None = None, **kwargs) -> tuple[Tensor, State | None]:
        tokens = dict(self.tokens() if tokens is None else tokens)
        gates = Gates(tokens.pop("step"), tokens.pop("log_decay", None))
        options = SlotOptions(**{"form": form, **self.options})
        return two_pass_slots(**tokens, gates=gates, start=self.operands.get("start"), options=options, **kwargs)
