"""Kernels of deep memories, and of the linear one behind a LayerNorm, in Triton's interpreter.

`test_triton_mlp.py` runs this file.
"""

import pytest
import torch
from op_inputs import Case, assert_close, relative
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from hf_memory.kernels.anchored_mlp.triton_op import mlp_scan
from hf_memory.kernels.coefficients_triton import tile_coefficients
from hf_memory.kernels.state import make_state
from hf_memory.kernels.types import Gates, Norm, check_inputs


NORMED = {"depth": 1, "norm": True}
CASES = {
    "deep, towards init, three chunks": ({"shape": (1, 37, 2, 16), "expansion": 3}, {"chunk_size": 16}),
    "deep, towards zero": ({"shape": (1, 16, 1, 24)}, {"chunk_size": 7, "decay_target": "zero", "activation": "silu"}),
    "deep without momentum": ({"shape": (1, 12, 1, 16), "momentum": False}, {"chunk_size": 4}),
    "deep without decay": ({"shape": (1, 9, 1, 8), "decay": False}, {"chunk_size": 3, "decay_target": "zero"}),
    "deep without norm": (
        {"norm": False, "shape": (1, 63, 1, 8), "expansion": 1},
        {"chunk_size": 20, "activation": "gelu_pytorch_tanh"},
    ),
    "one token": ({"shape": (2, 1, 1, 8)}, {"chunk_size": 1}),
    "online": ({"shape": (1, 5, 1, 8)}, {"chunk_size": 1}),
    "chunks of 64": ({"shape": (1, 100, 1, 16), "expansion": 1}, {"chunk_size": 64}),
    "linear with norm": ({**NORMED, "shape": (2, 37, 2, 16)}, {"chunk_size": 8, "decay_target": "zero"}),
    "linear with norm, two blocks, no momentum": (
        {**NORMED, "shape": (1, 20, 1, 40), "momentum": False}, {"chunk_size": 9},
    ),
    "linear with norm, 100 tokens": ({**NORMED, "shape": (1, 100, 1, 8), "decay": False}, {"chunk_size": 16}),
}  # fmt: skip


def carry_names(case: Case) -> list[str]:
    memory = "offset" if case.options["decay_target"] == "init" else "memory"
    names = [f"{memory}_{i}" for i in range(case.depth)]
    return names + [f"momentum_{i}" for i in range(case.depth)] * case.momentum


def start(case: Case) -> list[Tensor]:
    """A random carry."""
    generator = torch.Generator().manual_seed(3)
    scales = [1.0 if case.options["decay_target"] == "zero" else 0.1] * case.depth + [0.1] * case.depth
    carry = [
        scale * torch.randn(case.shape[0], *w.shape, generator=generator, dtype=torch.float64) * w.shape[-2] ** -0.5
        for scale, w in zip(scales, [*case.weights, *case.weights])
    ]
    return [x.to(case.weights[0].dtype).requires_grad_() for x in carry[: len(carry_names(case))]]


def by_reference(case: Case, carry: list[Tensor]) -> list[Tensor]:
    """Output and carry, token by token with autograd of the loss, from a state without buffered rows."""
    options = {"eps": 1e-6} | case.options
    tokens = (case.q, case.k, case.v, case.gates, case.weights, case.affine)
    from hf_memory.kernels.types import AnchoredOptions

    inputs = check_inputs(*tokens, None, AnchoredOptions(**options))
    chunk, (batch, _, heads, width) = case.options["chunk_size"], case.shape
    rows = torch.zeros(batch, heads, chunk, width, dtype=torch.float64)
    gates = Gates(*(None if x is None else x.new_zeros(batch, heads, chunk, case.depth) for x in case.gates))
    state = make_state(inputs, tuple(carry), rows, rows, gates, torch.zeros(batch, dtype=torch.long))
    out, final = case("reference", initial_state=state, output_final_state=True)
    return [out, *(final[name] for name in carry_names(case))]


def by_kernels(case: Case, carry: list[Tensor], anchored: Tensor | None = None) -> list[Tensor]:
    chunk, (batch, time, *_) = case.options["chunk_size"], case.shape
    anchored = torch.full((batch,), time // chunk * chunk) if anchored is None else anchored
    coefficients = tile_coefficients(case.gates, anchored, chunk)
    base = case.weights if case.options["decay_target"] == "init" else None
    norm = None if case.affine is None else Norm(*case.affine)
    activation = case.options.get("activation", "gelu")
    out, after = mlp_scan(
        case.q, case.k, case.v, coefficients, base, norm, carry, activation=activation, eps=1e-6, tile=chunk
    )
    return [out, *after]


def gradients(case: Case, run, tokens: int | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results for a random carry, and the gradients of all operands for random cotangents of the results."""
    case.require_grad()
    carry = start(case)
    results = run(case, carry)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    loss = sum((x.double() * c).sum() for x, c in zip(results, cotangents))
    operands = case.operands | {f"carried {name}": x for name, x in zip(carry_names(case), carry)}
    if case.options["decay_target"] == "zero":  # the learned start is the carry then
        operands = {name: x for name, x in operands.items() if not name.startswith("weight")}
    return results, dict(zip(operands, torch.autograd.grad(loss, list(operands.values()))))


def settings(name: str) -> dict:
    case, options = CASES[name]
    return {**case, "options": {"decay_target": "init"} | options}


@pytest.mark.parametrize("name", CASES)
def test_outputs_carry_and_gradients_equal_those_of_the_reference(name: str):
    expected, expected_grads = gradients(Case(**settings(name)), by_reference)
    actual, grads = gradients(Case(**settings(name), dtype=torch.float32), by_kernels)
    for ours, theirs in zip(actual, expected):
        assert_close(ours, theirs, 2e-6)
    for operand, grad in expected_grads.items():
        assert_close(grads[operand], grad, 4e-6, f"gradient of {operand}")
