"""Random operands of the anchored memories, shared by the op tests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from hf_memory.kernels import AnchoredOptions, Gates, State, anchored_linear, anchored_mlp


@dataclass
class Case:
    """A memory and its operands; calling it runs the op."""

    depth: int = 2
    kind: str = "head"
    norm: bool | None = None
    momentum: bool = True
    decay: bool = True
    shape: tuple[int, int, int, int] = (2, 37, 2, 8)
    expansion: int = 2
    dtype: torch.dtype = torch.float64
    decay_bias: float = 3.0
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        batch, time, heads, width = self.shape
        self.q, self.v = normal(*self.shape), normal(*self.shape)
        self.k = functional.normalize(normal(*self.shape), dim=-1)
        sets = self.depth if self.kind == "head" else (width if self.depth == 1 else 2 * width)
        step = 0.3 * torch.sigmoid(normal(batch, time, heads, sets))
        log_decay = functional.logsigmoid(normal(batch, time, heads, sets) + self.decay_bias)
        log_momentum = functional.logsigmoid(normal(batch, time, heads, sets))
        self.gates = Gates(step, log_decay if self.decay else None, log_momentum if self.momentum else None)
        widths = [width, *[self.expansion * width] * (self.depth - 1), width]
        self.weights = [normal(heads, a, b) * a**-0.5 for a, b in zip(widths, widths[1:], strict=False)]
        has_norm = self.depth > 1 if self.norm is None else self.norm
        self.affine = (1 + 0.1 * normal(heads, width), 0.1 * normal(heads, width)) if has_norm else None
        self.to(self.dtype)

    def to(self, dtype: torch.dtype) -> "Case":
        self.q, self.k, self.v = (x.to(dtype) for x in (self.q, self.k, self.v))
        self.gates = Gates(*(None if x is None else x.to(dtype) for x in self.gates))
        self.weights = [w.to(dtype) for w in self.weights]
        self.affine = None if self.affine is None else tuple(x.to(dtype) for x in self.affine)
        return self

    @property
    def operands(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v}
        named |= {name: x for name, x in self.gates._asdict().items() if x is not None}
        named |= {f"weight_{i}": w for i, w in enumerate(self.weights)}
        return named | ({} if self.affine is None else {"norm_weight": self.affine[0], "norm_bias": self.affine[1]})

    def require_grad(self) -> "Case":
        for x in self.operands.values():
            x.requires_grad_()
        return self

    def sliced(self, start: int, stop: int) -> dict[str, Tensor | Gates]:
        gates = Gates(*(None if x is None else x[:, start:stop] for x in self.gates))
        return {"q": self.q[:, start:stop], "k": self.k[:, start:stop], "v": self.v[:, start:stop], "gates": gates}

    def rows(self, index: Tensor | slice, start: int, stop: int) -> dict[str, Tensor | Gates]:
        part = self.sliced(start, stop)
        gates = Gates(*(None if x is None else x[index] for x in part["gates"]))
        return {name: part[name][index] for name in "qkv"} | {"gates": gates}

    def __call__(self, form: str | None = None, tokens: dict | None = None, **kwargs) -> tuple[Tensor, State | None]:
        tokens = {"q": self.q, "k": self.k, "v": self.v, "gates": self.gates} if tokens is None else tokens
        options = AnchoredOptions(**{"form": form, **self.options})
        if self.depth == 1:
            return anchored_linear(**tokens, weight=self.weights[0], norm=self.affine, options=options, **kwargs)
        return anchored_mlp(**tokens, weights=self.weights, norm=self.affine, options=options, **kwargs)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).detach().norm() / expected.detach().norm().clamp(min=1e-30))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "output") -> None:
    error = relative(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS error {error:.2e} > {tolerance:.0e}"


def assert_states_close(actual: State, expected: State, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, name)
