"""What other libraries offer for the same functions. Each is imported when it is first called."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .inputs import Tensors, window


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: who.
        form: which of its forms.
        package: distribution whose version goes into the rows.
        forward: operands -> outputs `[B, T, H, D]`.
        decode: `(operands, start)` -> a function that returns the outputs `[B, 1, H, D]` of one token when called with
            `start`, `start + 1` and so on.
        module: import name of an optional package.
        devices: device types it runs on.
    """

    name: str
    form: str
    package: str
    forward: Callable[[Tensors], Tensor]
    decode: Callable[[Tensors, int], Callable[[int], Tensor]]
    module: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def is_installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module) is not None


def softmax_attention(inputs: Tensors) -> Tensor:
    """Causal softmax attention, spelled out."""
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def _sdpa(inputs: Tensors) -> Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _sdpa_decode(inputs: Tensors, start: int) -> Callable[[int], Tensor]:
    # A cache that already holds every key, as a preallocated one does.
    q, k, v = (inputs[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))

    def step(token: int) -> Tensor:
        now = slice(token, token + 1)
        out = functional.scaled_dot_product_attention(q[:, :, now], k[:, :, : token + 1], v[:, :, : token + 1])
        return out.transpose(1, 2)

    return step


def _fla_operands(inputs: Tensors) -> dict[str, Tensor | float]:
    gates = {"g": inputs["log_decay"].squeeze(-1), "beta": inputs["step"].squeeze(-1)}
    return {"q": inputs["q"], "k": inputs["k"], "v": inputs["v"], **gates, "scale": 1.0}


def _fla_gated_delta_rule(inputs: Tensors) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(**_fla_operands(inputs))[0]


def _fla_gated_delta_rule_decode(inputs: Tensors, start: int) -> Callable[[int], Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    _, state = chunk_gated_delta_rule(**_fla_operands(window(inputs, 0, start)), output_final_state=True)

    def step(token: int) -> Tensor:
        nonlocal state
        operands = _fla_operands(window(inputs, token, token + 1))
        out, state = fused_recurrent_gated_delta_rule(**operands, initial_state=state, output_final_state=True)
        return out

    return step


SDPA = Provider("torch", "sdpa", "torch", _sdpa, _sdpa_decode)
FLA_GATED_DELTA_RULE = Provider(
    "fla",
    "chunk",
    "fla-core",
    _fla_gated_delta_rule,
    _fla_gated_delta_rule_decode,
    module="fla",
    devices=("cuda",),
)
