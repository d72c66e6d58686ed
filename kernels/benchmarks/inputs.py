"""Shapes and random operands of the benchmarks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..types import Gates, Norm


Tensors = dict[str, Tensor]

LOW_PRECISION = ("q", "k", "v", "targets")
"""Operands that take the dtype of a row; gates, weights and norms stay float32."""

PER_TOKEN = (*LOW_PRECISION, *Gates._fields)
"""Operands with time as second axis."""


class Shape(NamedTuple):
    """Batch, time, heads and width of queries, keys and values."""

    batch: int
    time: int
    heads: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read `BATCHxTIMExHEADSxWIDTH`, for example `4x2048x16x64`.

        Raises:
            ValueError: if `text` is not four positive numbers joined by `x`.
        """
        parts = text.lower().split("x")
        if len(parts) != len(cls._fields) or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"A shape is BATCHxTIMExHEADSxWIDTH, for example 4x2048x16x64, got {text!r}.")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return "x".join(map(str, self))


def attention_inputs(shape: Shape, generator: torch.Generator) -> Tensors:
    """`q, k, v [B, T, H, D]`, float32, keys and queries of unit length."""
    q, k, v = torch.randn(3, *shape, generator=generator, device=generator.device)
    return {"q": functional.normalize(q, dim=-1), "k": functional.normalize(k, dim=-1), "v": v}


def memory_inputs(
    shape: Shape,
    generator: torch.Generator,
    depth: int = 1,
    expansion: int = 4,
    norm: bool = False,
    decay: bool = True,
    momentum: bool = True,
) -> Tensors:
    """Operands of an anchored memory, float32, with gates as a fresh model has them.

    Args:
        shape: shape of queries, keys and values.
        generator: source of random numbers; its device is that of the operands.
        depth: layers of the memory.
        expansion: hidden width of a deep memory in units of its width.
        norm: whether the memory is `x + LayerNorm(...)`; its step size is then ten times smaller.
        decay: whether it forgets.
        momentum: whether it has momentum.
    """
    device = generator.device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    gate = (*shape[:3], depth)
    inputs = attention_inputs(shape, generator)
    inputs["step"] = (0.1 if norm else 1.0) * (normal(*gate) - 2).sigmoid()
    if decay:
        inputs["log_decay"] = functional.logsigmoid(5 - normal(*gate))
    if momentum:
        inputs["log_momentum"] = functional.logsigmoid(normal(*gate))
    widths = [shape.width, *[expansion * shape.width] * (depth - 1), shape.width]
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        inputs[f"weight_{i}"] = normal(shape.heads, fan_in, fan_out) * fan_in**-0.5
    if norm:
        inputs["norm_weight"] = torch.ones(shape.heads, shape.width, device=device)
        inputs["norm_bias"] = torch.zeros(shape.heads, shape.width, device=device)
    return inputs


def sphere_inputs(shape: Shape, generator: torch.Generator) -> Tensors:
    """Operands of `sphere_slots` with as many slots as channels, float32, step sizes as a fresh model has them."""
    inputs = attention_inputs(shape, generator)
    inputs["step"] = (torch.randn(*shape[:3], 1, generator=generator, device=generator.device) - 2.2).sigmoid()
    start = torch.randn(shape.heads, shape.width, shape.width, generator=generator, device=generator.device)
    return inputs | {"slots": torch.linalg.qr(start)[0]}


def slot_inputs(shape: Shape, generator: torch.Generator) -> Tensors:
    """Operands of `two_pass_slots` with as many slots as channels, float32, gates as a fresh model has them."""
    inputs = attention_inputs(shape, generator)
    inputs["v"] = functional.normalize(inputs["v"], dim=-1)
    inputs["targets"] = torch.randn(*shape, generator=generator, device=generator.device)
    logits = torch.randn(2, *shape[:3], 1, generator=generator, device=generator.device)
    inputs["step"], inputs["log_decay"] = (logits[0] - 2.2).sigmoid(), functional.logsigmoid(3.9 - logits[1])
    return inputs


def cast(inputs: Tensors, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensors:
    """Operands as an op gets them in a row of this dtype; everything in float64 for `torch.float64`."""
    return {
        name: x.to(device, dtype if name in LOW_PRECISION or dtype == torch.float64 else torch.float32)
        for name, x in inputs.items()
    }


def window(inputs: Tensors, start: int, stop: int) -> Tensors:
    """Operands of the tokens `start` to `stop`."""
    return {name: x[:, start:stop] if name in PER_TOKEN else x for name, x in inputs.items()}


def gates_of(inputs: Tensors) -> Gates:
    """Gates among the operands."""
    return Gates(*(inputs.get(name) for name in Gates._fields))


def weights_of(inputs: Tensors) -> list[Tensor]:
    """Learned start among the operands."""
    return [x for name, x in inputs.items() if name.startswith("weight_")]


def norm_of(inputs: Tensors) -> Norm | None:
    """LayerNorm among the operands."""
    return Norm(inputs["norm_weight"], inputs["norm_bias"]) if "norm_weight" in inputs else None
