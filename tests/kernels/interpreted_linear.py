"""Kernels of the plain linear memory in Triton's interpreter; `test_triton_linear.py` runs this file."""

import pytest
import torch
from op_inputs import Case, assert_close, assert_states_close, relative
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from hf_memory.kernels import AnchoredOptions, Gates, force_form
from hf_memory.kernels import coefficients as torch_coefficients
from hf_memory.kernels.coefficients_triton import tile_coefficients


LINEAR = {"depth": 1, "norm": False}
TO_START = {"decay_target": "init"}

CASES = {
    "online": ({"shape": (1, 63, 1, 16)}, {"chunk_size": 1}),
    "online, two blocks of keys": ({"shape": (1, 100, 1, 24)}, {"chunk_size": 1, "decay_target": "init"}),
    "gated delta rule": (
        {"shape": (1, 63, 2, 16), "momentum": False}, {"chunk_size": 1, "decay_before_grad": True},
    ),
    "delta rule": ({"shape": (1, 63, 1, 16), "momentum": False, "decay": False}, {"chunk_size": 1}),
    "chunks that fill no tile": ({"shape": (1, 63, 2, 8)}, {"chunk_size": 7}),
    "a chunk is a tile": ({"shape": (1, 70, 1, 16)}, {"chunk_size": 32, "decay_target": "init"}),
    "chunks of two tiles": ({"shape": (1, 130, 1, 16)}, {"chunk_size": 64}),
    "chunks of three tiles, towards init": ({"shape": (1, 100, 1, 16)}, {"chunk_size": 48, "decay_target": "init"}),
    "one token": ({"shape": (1, 1, 2, 16)}, {"chunk_size": 16}),
}  # fmt: skip


def gradients(case: Case, form: str, calls: list[tuple[int, int]] | None = None, **kwargs) -> tuple[dict, dict]:
    """Outputs and final state, and the gradients of all operands for random cotangents of both."""
    case.require_grad()
    mask, outputs, state = kwargs.pop("mask", None), [], None
    for start, stop in calls or [(0, case.shape[1])]:
        part = None if mask is None else mask[:, start:stop]
        tokens = case.sliced(start, stop)
        out, state = case(form, tokens, initial_state=state, output_final_state=True, mask=part, **kwargs)
        outputs.append(out)
    results = {"output": torch.cat(outputs, 1)} | {n: x for n, x in state.items() if x.is_floating_point()}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in results.values()
    )
    operands = case.operands
    return results, dict(zip(operands, torch.autograd.grad(loss, list(operands.values()))))


def check(case: dict, options: dict, tolerance: float = 2e-6, **kwargs) -> None:
    truth = gradients(Case(**LINEAR, **case, options=options), "chunk", **kwargs)
    found = gradients(Case(**LINEAR, **case, options=options, dtype=torch.float32), "triton", **kwargs)
    for expected, actual in zip(truth, found):
        for name, x in expected.items():
            assert_close(actual[name], x, tolerance, name)


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients_equal_those_of_float64(name: str):
    check(*CASES[name])


@pytest.mark.parametrize("chunk", [16, 48])
def test_padded_rows_and_calls_that_end_inside_chunks(chunk: int):
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[1, :20] = False
    mask[2, 40:] = False
    check({"shape": (3, 50, 1, 8)}, {"chunk_size": chunk}, calls=[(0, 33), (33, 50)], mask=mask)


def test_packed_rows():
    check({"shape": (1, 60, 1, 8)}, {"chunk_size": 4}, cu_seqlens=torch.tensor([0, 1, 38, 60]))


def test_a_start_of_any_strides():
    case = Case(**LINEAR, shape=(1, 20, 2, 16), dtype=torch.float32, options={"decay_target": "init"})
    with torch.no_grad():
        expected, _ = case("triton")
        case.weights = [w.mT.contiguous().mT for w in case.weights]
        found, _ = case("triton")
    assert_close(found, expected, 1e-6)


def test_a_backward_inside_autocast_keeps_its_digits():
    case = Case(**LINEAR, shape=(1, 20, 1, 16), dtype=torch.float32, options={"decay_target": "init"}).require_grad()
    out, _ = case("triton")
    expected = torch.autograd.grad(out.square().sum(), case.weights[0], retain_graph=True)[0]
    loss = out.square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, case.weights[0])[0]
    assert_close(found, expected, 1e-6)


def test_against_autograd_of_the_loss():
    case = {"shape": (1, 40, 1, 8)}
    truth = gradients(Case(**LINEAR, **case, options={"chunk_size": 4}), "reference")
    found = gradients(Case(**LINEAR, **case, options={"chunk_size": 4}, dtype=torch.float32), "triton")
    for expected, actual in zip(truth, found):
        for name, x in expected.items():
            assert_close(actual[name], x, 2e-6, name)


@pytest.mark.parametrize(("time", "options"), [(70, {"chunk_size": 16}), (140, {"chunk_size": 96, **TO_START})])
def test_half_precision_costs_what_it_costs_the_chunk_form(time: int, options: dict):
    """Its chain keeps states in registers: within tiles of several chunks, and within chunks of several tiles."""

    def run(form: str, dtype: torch.dtype) -> dict[str, Tensor]:
        case = Case(**LINEAR, shape=(1, time, 1, 32), options=options).to(torch.float16).to(dtype)
        if dtype == torch.float16:  # gates and weights stay float32
            case.gates = Gates(*(gate.float() for gate in case.gates))
            case.weights = [w.float() for w in case.weights]
        results, grads = gradients(case, form)
        return {"output": results["output"]} | {f"d {name}": x for name, x in grads.items()}

    truth, plain, kernels = run("chunk", torch.float64), run("chunk", torch.float16), run("triton", torch.float16)
    for name, x in truth.items():
        assert relative(kernels[name], x) <= 3 * relative(plain[name], x), name
    assert kernels["output"].dtype == torch.float16


def test_momentum_near_one_and_equal_keys_keep_their_digits():
    """Where the inverse of a tile's system alone would lose a factor of ten."""
    case = Case(**LINEAR, shape=(1, 130, 1, 16), options={"chunk_size": 1}, decay_bias=5.0)
    case.k = torch.nn.functional.normalize(case.k + 8, dim=-1)
    case.gates = case.gates._replace(step=0.3 * case.gates.step, log_momentum=torch.full_like(case.gates.step, -0.01))
    with torch.no_grad():
        truth, _ = case("chunk")
        plain, _ = case.to(torch.float32)("chunk")
        found, _ = case("triton")
    assert relative(found, truth) <= max(2 * relative(plain, truth), 1e-6)


def test_gates_that_underflow():
    case = Case(**LINEAR, shape=(1, 70, 1, 8), options={"chunk_size": 4}, dtype=torch.float32)
    forget = torch.tensor([0.0, -1e-3, -200.0, -torch.inf])[torch.arange(70) % 4].view(1, 70, 1, 1)
    case.gates = case.gates._replace(log_decay=forget, log_momentum=forget.roll(1, 1).clone())
    with torch.no_grad():
        truth, expected = case.to(torch.float64)("chunk", output_final_state=True)
        found, state = case.to(torch.float32)("triton", output_final_state=True)
    assert_close(found, truth, 2e-6)
    assert_states_close(
        {n: x for n, x in state.items() if "_0" in n}, {n: x for n, x in expected.items() if "_0" in n}, 2e-6
    )
    finite = Gates(*(x.clamp(min=-1e4).requires_grad_() for x in case.gates))
    tokens = {"q": case.q, "k": case.k, "v": case.v, "gates": finite}
    with force_form("triton"):
        case(tokens=tokens)[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in finite)


@pytest.mark.parametrize(("tile", "momentum"), [(33, True), (16, False)])
def test_coefficients_of_tiles(tile: int, momentum: bool):
    """Several gate sets and rows that end anywhere, against the matrices that PyTorch builds."""
    batch, slots, heads, sets = 2, 70, 1, 2
    generator = torch.Generator().manual_seed(0)

    def gate(scale: float) -> Tensor:
        x = torch.rand(batch, slots, heads, sets, generator=generator, dtype=torch.float64)
        return (scale * x).requires_grad_()

    gates = Gates(gate(1.0), gate(-3.0), gate(-1.0) if momentum else None)
    anchored = torch.tensor([slots, 37])
    found = tile_coefficients(Gates(*(x if x is None else x.float() for x in gates)), anchored, tile)

    tiles = -(-slots // tile)
    padded = (None if x is None else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tiles * tile - slots)) for x in gates)
    series = (None if x is None else x.unflatten(1, (tiles, tile)).permute(1, 0, 3, 4, 2) for x in padded)
    built = torch_coefficients.build(*series)
    end = (anchored - torch.arange(0, tiles * tile, tile)[:, None]).clamp(0, tile)
    last = torch_coefficients.at_end(built, end)
    pairs = [(found.grad[..., :tile, :tile], built.grad), (found.rows[..., 0, :tile], built.beta)]
    pairs += [(found.rows[..., 2, :tile], last.grad.squeeze(-2)), (found.ends[..., 0], last.beta.squeeze(-1))]
    if momentum:
        pairs += [(found.rows[..., 1, :tile], built.f), (found.rows[..., 3, :tile], last.grad_momentum.squeeze(-2))]
        pairs += [(found.ends[..., 1], last.f.squeeze(-1)), (found.ends[..., 2], last.m.squeeze(-1))]
    losses = [0.0, 0.0]
    for ours, theirs in pairs:
        theirs = theirs.movedim(0, 3)
        assert_close(ours, theirs, 1e-6)
        weight = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
        weight = weight.tril() if theirs.dim() == 6 else weight
        losses = [losses[0] + (ours * weight.float()).sum(), losses[1] + (theirs * weight).sum()]
    leaves = [x for x in gates if x is not None]
    for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in losses)):
        assert_close(ours, theirs, 1e-6)


def test_what_the_kernels_cannot_compute_is_refused_when_asked_for():
    case = Case(depth=1, kind="channel", shape=(1, 4, 1, 8))
    with pytest.raises(ValueError, match="Triton form is not for .*use form='chunk'"):
        case("triton")
    case = Case(**LINEAR, shape=(1, 4, 1, 8), dtype=torch.float32, options={"chunk_size": 67})
    with pytest.raises(ValueError, match="not for chunk_size=67"):
        case("triton")
    assert AnchoredOptions(form="triton").form == "triton"


def test_one_graph_and_no_recompilation_per_length():
    counter = CompileCounter()

    def run(q, k, v, step):
        gates = Gates(step, -step, -step)
        return Case.__call__(case, "triton", {"q": q, "k": k, "v": v, "gates": gates})[0]

    case = Case(**LINEAR, shape=(1, 50, 1, 8), dtype=torch.float32, options={"chunk_size": 4})
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for length in (9, 20, 37, 50):
        tokens = case.sliced(0, length)
        operands = [x.contiguous() for x in (*(tokens[name] for name in "qkv"), tokens["gates"].step)]
        for x in operands:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(*operands), run(*operands))
    assert counter.frame_count == 1
