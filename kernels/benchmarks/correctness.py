"""No op is timed before it is right.

The standard is the op's reference form in float64 on the CPU. What an op may err is a multiple of what the reference
itself loses when it gets the operands in the precision of the row.
"""

import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .inputs import Shape, Tensors, cast
from .peers import Provider
from .registry import Op
from .timing import captured


MODES = ("fwd", "fwd+bwd", "decode", "fwd-graph", "decode-graph", "first-call")
"""What a row measures: calls from Python, the same replayed from a CUDA graph, or what a fresh process waits for."""

CPU_MODES = MODES[:3]

# One token more than two of the widest tiles; two rows and two heads tell their mix-ups apart.
BATCH, TIME, HEADS = 2, 135, 2
DECODE_FROM = 70

STANDARDS = "HF_MEMORY_BENCHMARK_STANDARDS"
"""Environment variable: a folder in which results of the reference are kept for other processes of a session."""
OWN_ERROR = "error of "

MULTIPLE = 4
# Below this an error says nothing: the reference may lose next to nothing by luck, and products whose operands are in
# half precision lose 2^-9 each, several in a row.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Check(NamedTuple):
    """Worst tensor of a check: its relative RMS error, and what was allowed."""

    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


class WrongResultError(RuntimeError):
    """An op differs from its definition, so its speed means nothing; `worst` is the tensor that differs most."""

    def __init__(self, message: str, worst: Check) -> None:
        super().__init__(message)
        self.worst = worst


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Relative root-mean-square difference; infinite if `x` is not finite."""
    error = (x.detach().cpu().double() - truth).norm() / truth.norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def outputs_and_gradients(forward, inputs: Tensors, cotangent: Tensor | None) -> dict[str, Tensor]:
    """Outputs of a call and, given a cotangent of the outputs, the gradients of all operands."""
    if cotangent is None:
        with torch.no_grad():
            return {"out": forward(inputs)}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = forward(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out))
    return {"out": out} | {f"d {name}": gradient for name, gradient in zip(leaves, gradients)}


@lru_cache(maxsize=8)
def _standard(op: Op, width: int, dtype: torch.dtype) -> tuple[Tensors, Tensors, dict[str, float]]:
    """Operands, float64 results, and the relative errors of the reference in `dtype`.

    The reference goes token by token, so results are kept between processes where `STANDARDS` names a folder.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = cast(op.make(Shape(BATCH, TIME, HEADS, width), generator), dtype)
    inputs["cotangent"] = torch.randn(inputs["v"].shape, generator=generator)
    name = f"{op.label.replace('/', '-')}-{width}-{str(dtype).removeprefix('torch.')}.safetensors"
    kept = Path(os.environ[STANDARDS]) / name if STANDARDS in os.environ else None
    if kept is not None and kept.exists():
        found = load_file(kept)
        own = {name.removeprefix(OWN_ERROR): float(x) for name, x in found.items() if name.startswith(OWN_ERROR)}
        return inputs, {name: found[name] for name in own}, own
    operands = {name: x for name, x in inputs.items() if name != "cotangent"}
    truth = outputs_and_gradients(op.truth, cast(operands, torch.float64), inputs["cotangent"])
    truth = {name: x.detach() for name, x in truth.items()}
    own = outputs_and_gradients(op.truth, operands, inputs["cotangent"])
    own = {name: relative_error(x, truth[name]) for name, x in own.items()}
    if kept is not None:
        errors = {OWN_ERROR + name: torch.tensor(error, dtype=torch.float64) for name, error in own.items()}
        beside = kept.with_suffix(f".{os.getpid()}")
        save_file({name: x.contiguous() for name, x in truth.items()} | errors, beside)
        beside.replace(kept)
    return inputs, truth, own


@lru_cache(maxsize=64)
def check(op: Op, provider: Provider, width: int, dtype: torch.dtype, mode: str, device: torch.device) -> Check:
    """Compare a provider with the float64 reference.

    Args:
        op: what it should compute.
        provider: who computes it.
        width: width of queries, keys and values.
        dtype: precision of the operands.
        mode: one of `MODES`: outputs, for `"fwd+bwd"` and `"first-call"` gradients too, for `"decode"` outputs token
            by token behind a prompt; from the replay of a CUDA graph where the mode says so.
        device: where it computes it.

    Returns:
        The tensor that comes closest to its limit.

    Raises:
        WrongResultError: naming the tensors that are beyond it.
    """
    gradients = mode in ("fwd+bwd", "first-call")
    inputs, truth, own = _standard(op, width, dtype)
    operands = {name: x.to(device) for name, x in inputs.items() if name != "cotangent"}
    if gradients:
        results = outputs_and_gradients(provider.forward, operands, inputs["cotangent"].to(device))
    else:
        decodes = mode.startswith("decode")
        make = partial(_decode if decodes else _forward, provider, operands)
        with torch.no_grad():
            call = captured(make, device) if mode.endswith("-graph") else make()
            results = {"out": call()}
        truth = {"out": truth["out"][:, DECODE_FROM:] if decodes else truth["out"]}
    checks = [
        Check(name, relative_error(x, truth[name]), _allowed(op, own[name], dtype)) for name, x in results.items()
    ]
    worst = max(checks, key=lambda c: c.error / c.allowed)
    if not worst.passed:
        listing = ", ".join(
            f"{c.tensor} is off by {c.error:.1e} (allowed {c.allowed:.1e})" for c in checks if not c.passed
        )
        raise WrongResultError(f"{op.label} by {provider.name} ({provider.form}, {dtype}, {mode}): {listing}.", worst)
    return worst


def _allowed(op: Op, own: float, dtype: torch.dtype) -> float:
    allowed = max(MULTIPLE * own, FLOOR[dtype])
    return min(allowed, op.float32_error) if dtype == torch.float32 else allowed


def _forward(provider: Provider, operands: Tensors) -> Callable[[], Tensor]:
    return lambda: provider.forward(operands)


def _decode(provider: Provider, operands: Tensors) -> Callable[[], Tensor]:
    step = provider.decode(operands, DECODE_FROM)
    return lambda: torch.cat([step(token) for token in range(DECODE_FROM, TIME)], dim=1)
