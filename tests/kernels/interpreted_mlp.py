"""Kernels of deep memories, and of the linear one behind a LayerNorm, in Triton's interpreter.

`test_triton_mlp.py` runs this file.
"""

import pytest
import torch
from op_inputs import Case, assert_close, relative
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from hf_memory.kernels.anchored_mlp.plan import Memory, scratch_bytes
from hf_memory.kernels.anchored_mlp.triton_op import _Walk, mlp_scan
from hf_memory.kernels.coefficients_triton import tile_coefficients
from hf_memory.kernels.state import make_state
from hf_memory.kernels.triton_form import triton_form, unsupported
from hf_memory.kernels.types import AnchoredOptions, Gates, Norm, check_inputs


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
    tokens = (case.q, case.k, case.v, case.gates, case.weights, case.affine)
    inputs = check_inputs(*tokens, None, AnchoredOptions(**case.options))
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


def gradients(case: Case, run) -> tuple[list[Tensor], dict[str, Tensor]]:
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


def test_without_gradients_nothing_is_kept_and_nothing_changes():
    case = Case(**settings("deep without momentum"), dtype=torch.float32)
    carry = [x.detach() for x in start(case)]
    plain = by_kernels(case, carry)
    for ours, theirs in zip(by_kernels(case.require_grad(), carry), plain):
        assert torch.equal(ours, theirs)


def test_rows_that_end_inside_a_chunk_carry_what_lies_before():
    """Per row: slots behind `anchored` are read but not folded."""
    case = Case(**settings("linear with norm"), dtype=torch.float32)
    carry = [x.detach() for x in start(case)]
    whole = by_kernels(case, carry, torch.tensor([32, 8]))
    case.q, case.k, case.v = (x[:, :8].contiguous() for x in (case.q, case.k, case.v))
    case.gates, case.shape = Gates(*(x[:, :8].contiguous() for x in case.gates)), (2, 8, 2, 16)
    part = by_kernels(case, carry)
    assert_close(whole[0][:, :8], part[0], 1e-6)
    for ours, theirs in zip(whole[1:], part[1:]):
        assert_close(ours[1], theirs[1], 1e-6)


def test_half_precision_costs_what_it_costs_the_chunk_form():
    def run(form: str, dtype: torch.dtype) -> dict[str, Tensor]:
        case = (
            Case(shape=(1, 20, 1, 16), options={"chunk_size": 8, "decay_target": "init"}).to(torch.float16).to(dtype)
        )
        if form == "chunk":
            case.require_grad()
            out = case("chunk")[0]
        else:
            case.gates = Gates(*(x.float() for x in case.gates))
            case.weights, case.affine = [w.float() for w in case.weights], tuple(x.float() for x in case.affine)
            case.require_grad()
            zeros = [torch.zeros(1, *w.shape) for w in case.weights] * 2
            out = by_kernels(case, zeros)[0]
        assert out.dtype == dtype
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        grads = torch.autograd.grad((out.double() * weight).sum(), list(case.operands.values()))
        return {"output": out.detach()} | dict(zip(case.operands, grads))

    truth, kernels = run("chunk", torch.float64), run("triton", torch.float16)
    # One rounding of an operand to half precision is 2.8e-4; a gradient passes through some twenty.
    for name, x in truth.items():
        assert relative(kernels[name], x) <= (2e-3 if name == "output" else 1e-2), name


def test_gates_that_underflow():
    case = Case(shape=(1, 16, 1, 8), options={"chunk_size": 7, "decay_target": "init"}, dtype=torch.float32)
    forget = torch.tensor([0.0, -1e-3, -200.0])[torch.arange(16) % 3].view(1, 16, 1, 1).expand(1, 16, 1, 2)
    case.gates = Gates(case.gates.step, forget.clone(), forget.roll(1, 1).clone())
    results, grads = gradients(case, by_kernels)
    truth, expected = gradients(case.to(torch.float64), by_reference)
    for ours, theirs in zip(results, truth):
        assert_close(ours, theirs, 2e-6)
    for name, grad in expected.items():
        assert_close(grads[name], grad, 4e-6, name)


def test_scratch_is_what_the_plan_says():
    for name, backward in (("deep without norm", True), ("linear with norm", False), ("linear with norm", True)):
        case = Case(**settings(name), dtype=torch.float32)
        hidden, tile = case.weights[0].shape[-1], case.options["chunk_size"]
        state = torch.zeros(case.shape[0], case.shape[2], 2 * sum(w[0].numel() for w in case.weights))
        numbers = (case.depth, hidden, True, tile, "gelu", 1e-6)
        walk = _Walk(case.q, case.k, case.v, None, None, None, state, numbers, backward)
        owned = sum(x.nbytes for x in vars(walk).values() if isinstance(x, Tensor)) + backward * walk.states.nbytes
        memory = Memory(case.depth, case.shape[-1], hidden, tile, 4)
        tiles = -(-case.shape[1] // tile)
        assert owned == scratch_bytes(memory, case.shape[0] * case.shape[2], tiles, True, backward)


def test_one_graph_and_no_recompilation_per_length():
    counter = CompileCounter()
    case = Case(**NORMED, shape=(1, 30, 1, 8), dtype=torch.float32, options={"chunk_size": 4, "decay_target": "init"})
    zeros = [torch.zeros(1, *w.shape) for w in case.weights] * 2

    def run(q, k, v, step):
        coefficients = tile_coefficients(Gates(step, -step, -step), torch.zeros(1, dtype=torch.long), 4)
        return mlp_scan(
            q, k, v, coefficients, case.weights, Norm(*case.affine), zeros, activation="gelu", eps=1e-6, tile=4
        )[0]

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for length in (7, 12, 25):
        tokens = case.sliced(0, length)
        operands = [x.contiguous() for x in (*(tokens[name] for name in "qkv"), tokens["gates"].step)]
        for x in operands:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(*operands), run(*operands))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_chunks_that_failed_on_hardware_take_another_way(dtype: torch.dtype):
    """Two layers in half precision go through float32, a LayerNorm in float32 is left to the chunk form."""
    deep, norm = (
        Case(shape=(1, 20, 1, 16), expansion=1, dtype=dtype, options={"chunk_size": 32}, **fields)
        for fields in ({"depth": 2}, NORMED)
    )
    made = [
        check_inputs(c.q, c.k, c.v, c.gates, c.weights, c.affine, None, AnchoredOptions(**c.options))
        for c in (deep, norm)
    ]
    assert unsupported(made[0]) is None
    assert triton_form(made[0], None, False)[0].dtype == torch.float32
    assert (unsupported(made[1]) is None) == (dtype == torch.float16)
