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
            `start`, `start + 1` and so on; `None` where there is none.
        module: import name of an optional package.
        devices: device types it runs on.
        same_function: whether it computes the op; otherwise it is timed beside it and not checked.
    """

    name: str
    form: str
    package: str
    forward: Callable[[Tensors], Tensor]
    decode: Callable[[Tensors, int], Callable[[int], Tensor]] | None
    module: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    same_function: bool = True

    @property
    def is_installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module) is not None

    def offers(self, mode: str) -> bool:
        """Whether a mode of the rows can be measured."""
        return self.decode is not None or not mode.startswith("decode")


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


def _momentum_operands(inputs: Tensors) -> dict[str, Tensor | float]:
    start = inputs["weight_0"].expand(inputs["q"].shape[0], -1, -1, -1)
    gates = {
        "log_alpha": inputs["log_decay"].squeeze(-1),
        "log_mu": inputs["log_momentum"].squeeze(-1),
        "eta": inputs["step"].squeeze(-1),
    }
    return {
        **{name: inputs[name] for name in ("q", "k", "v")},
        **gates,
        "scale": 1.0,
        "initial_state": torch.stack([start, torch.zeros_like(start)]),
    }


# What the models around these ops do with keys, and the rule of this package does not.
_AS_IS = {"use_qk_l2norm_in_kernel": False, "use_p_times_alpha": False}


def _fla_momentum_delta_rule(inputs: Tensors) -> Tensor:
    from fla.ops.momentum_delta_rule import chunk_momentum_delta_rule, chunk_momentum_delta_rule_ref

    operands = _momentum_operands(inputs)
    if inputs["q"].dtype != torch.float32:
        return chunk_momentum_delta_rule(**operands, **_AS_IS)[0]
    # The op refuses float32; this is what it runs.
    memory, momentum = operands.pop("initial_state")
    operands |= {"p": operands["k"], "beta": torch.ones_like(operands["eta"])}
    return chunk_momentum_delta_rule_ref(**operands, initial_S=memory, initial_M=momentum)[0]


def _fla_momentum_delta_rule_decode(inputs: Tensors, start: int) -> Callable[[int], Tensor]:
    from fla.ops.momentum_delta_rule import fused_recurrent_momentum_delta_rule

    def run(first: int, end: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        operands = _momentum_operands(window(inputs, first, end))
        if state is not None:
            operands["initial_state"] = state
        return fused_recurrent_momentum_delta_rule(**operands, **_AS_IS, output_final_state=True)

    _, state = run(0, start, None)

    def step(token: int) -> Tensor:
        nonlocal state
        out, state = run(token, token + 1, state)
        return out

    return step


def fla_ttt_linear(chunk_size: int) -> Provider:
    """TTT-Linear of flash-linear-attention: its residual enters before the norm, and it has a fast bias, no momentum
    and no decay."""

    def forward(inputs: Tensors) -> Tensor:
        from fla.ops.ttt import chunk_ttt_linear

        start = inputs["weight_0"].expand(inputs["q"].shape[0], -1, -1, -1).contiguous()
        norm = (inputs[name].to(inputs["v"].dtype) for name in ("norm_weight", "norm_bias"))
        step = inputs["step"].to(inputs["v"].dtype)
        operands = (inputs["q"], inputs["k"], inputs["v"], *norm, step)
        return chunk_ttt_linear(*operands, scale=1.0, chunk_size=chunk_size, initial_state=start)[0]

    return _beside("ttt linear", forward)


def _fla_gated_slot_attention(inputs: Tensors) -> Tensor:
    from fla.ops.gsa import chunk_gsa

    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    # A gate per slot, as many slots as channels: what the model around the op has by default at this width.
    gate = inputs["log_decay"].to(v.dtype).expand_as(v).contiguous()
    return chunk_gsa(q, k, v, inputs["targets"].to(v.dtype), gate, scale=1.0)[0]


def _fla_gated_oja_rule(inputs: Tensors) -> Tensor:
    from fla.ops.gated_oja_rule import chunk_gated_oja_rule

    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    step = inputs["step"].squeeze(-1)
    # Lattice has no decay: a gate of one per channel of the values.
    return chunk_gated_oja_rule(q, k, v, torch.zeros_like(v, dtype=torch.float32), step, scale=1.0)[0]


def _beside(form: str, forward: Callable[[Tensors], Tensor]) -> Provider:
    """A kernel of flash-linear-attention for a neighbouring function."""
    return Provider("fla", form, "fla-core", forward, None, module="fla", devices=("cuda",), same_function=False)


FLA_GATED_SLOT_ATTENTION = _beside("gated slot attention", _fla_gated_slot_attention)
FLA_GATED_OJA_RULE = _beside("gated Oja rule", _fla_gated_oja_rule)
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
FLA_MOMENTUM_DELTA_RULE = Provider(
    "fla",
    "plain PyTorch",
    "fla-core",
    _fla_momentum_delta_rule,
    _fla_momentum_delta_rule_decode,
    module="fla",
)
