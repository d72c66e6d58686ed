"""Chunk and decode forms of `sphere_slots` against its reference, whose gradient is autograd of the stated loss."""

import pytest
import torch
from op_inputs import assert_close, assert_states_close, relative
from sphere_inputs import SphereCase


MODES = {
    "dec": {"objective": "dec"},
    "sim": {"objective": "sim"},
    "enc": {"objective": "enc"},
    "dec-lazy": {"objective": "dec", "normalization": "lazy"},
    "sim-lazy": {"objective": "sim", "normalization": "lazy"},
    "enc-lazy": {"objective": "enc", "normalization": "lazy"},
    "dec-none": {"objective": "dec", "normalization": "none"},
    "sim-none": {"objective": "sim", "normalization": "none"},
    "enc-none": {"objective": "enc", "normalization": "none"},
}
GRIDS = [1, 4, 16]
DTYPES = (torch.float64, torch.float32)
FEW = ["dec", "enc-lazy", "sim-none"]


def make(mode: str, chunk_size: int, **fields) -> SphereCase:
    options = {"chunk_size": chunk_size, **MODES[mode]}
    decay = options.get("normalization", "retract") != "retract"
    return SphereCase(options=options, **{"decay": decay, **fields})


def gradients(case: SphereCase, form: str, **kwargs) -> tuple[torch.Tensor, dict, dict]:
    """Output and state of one form, and the gradients of a random projection of both."""
    out, state = case(form, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(5)
    results = [out, *(x for x in state.values() if x.is_floating_point())]
    # Drawn in float64 whatever the dtype: the generator gives other numbers in another one.
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    loss = sum((x * cotangent.to(x)).sum() for x, cotangent in zip(results, drawn))
    return out, state, dict(zip(case.operands, torch.autograd.grad(loss, list(case.operands.values()))))


def assert_equal_forms(case: SphereCase, tolerance: float = 1e-9, **kwargs) -> None:
    case.require_grad()
    out, state, grads = gradients(case, "reference", **kwargs)
    actual, actual_state, actual_grads = gradients(case, "chunk", **kwargs)
    assert_close(actual, out, tolerance)
    assert_states_close(actual_state, state, tolerance)
    for name, grad in grads.items():
        assert_close(actual_grads[name], grad, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("chunk_size", GRIDS)
@pytest.mark.parametrize("mode", MODES)
def test_chunk_form_is_the_reference(mode, chunk_size):
    assert_equal_forms(make(mode, chunk_size))


@pytest.mark.parametrize("chunk_size", GRIDS)
@pytest.mark.parametrize("mode", MODES)
def test_padding_anywhere(mode, chunk_size):
    assert_equal_forms(make(mode, chunk_size, time=22), mask=torch.rand(2, 22) > 0.3)


@pytest.mark.parametrize("mode", ["dec", "sim-lazy", "enc-lazy", "sim-none"])
def test_one_step_per_slot(mode):
    assert_equal_forms(make(mode, 4, time=13, step_sets=5))


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("mode", FEW)
def test_lengths(mode, length):
    assert_equal_forms(make(mode, 16, batch=1, time=length))


@pytest.mark.parametrize("slots", [1, 12])
@pytest.mark.parametrize("mode", FEW)
def test_any_number_of_slots(mode, slots):
    assert_equal_forms(make(mode, 4, time=11, slots=slots))


@pytest.mark.parametrize("mode", ["dec", "sim", "enc", "dec-lazy"])
def test_writes_beyond_the_whole_slot(mode):
    """Values so large, and keys so alike, that the step takes away more than the slot, or adds to it."""
    case = make(mode, 16, scale=6.0, decay=False)
    case.k = (case.k[:, :1] + 0.1 * case.k).detach()
    case.v = (case.v[:, :1] + 0.3 * case.v).detach()
    assert_equal_forms(case)


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
@pytest.mark.parametrize("mode", ["dec", "enc", "sim-lazy", "dec-none"])
def test_gradient_through_a_carried_state(mode, chunk_size):
    """Calls joined by a state have the gradients of one, wherever the cut lies."""
    case = make(mode, chunk_size, time=21).require_grad()
    operands = list(case.operands.values())
    whole, _ = case("chunk")
    cotangent = torch.randn(whole.shape, dtype=whole.dtype)
    expected = torch.autograd.grad((whole * cotangent).sum(), operands)
    for cut in (chunk_size, chunk_size + 2):
        first, state = case("chunk", tokens=case.sliced(0, cut), output_final_state=True)
        token, state = case("chunk", tokens=case.sliced(cut, cut + 1), initial_state=state, output_final_state=True)
        rest, _ = case("chunk", tokens=case.sliced(cut + 1, 21), initial_state=state)
        loss = (torch.cat([first, token, rest], 1) * cotangent).sum()
        for name, actual, grad in zip(case.operands, torch.autograd.grad(loss, operands), expected):
            assert_close(actual, grad, 1e-9, f"gradient of {name}, cut at {cut}")


@pytest.mark.parametrize("chunk_size", GRIDS)
@pytest.mark.parametrize("mode", MODES)
def test_any_split_gives_the_same(mode, chunk_size):
    case = make(mode, chunk_size)
    mask = torch.rand(2, 37) > 0.3
    with torch.no_grad():
        whole, expected = case("chunk", mask=mask, output_final_state=True)
        for cuts in ([0, 1, 2, 9, 10, 25, 37], list(range(38)), [0, 16, 32, 37]):
            state, pieces = None, []
            for start, stop in zip(cuts, cuts[1:]):
                out, state = case(
                    tokens=case.sliced(start, stop),
                    mask=mask[:, start:stop],
                    initial_state=state,
                    output_final_state=True,
                )
                pieces.append(out)
            assert_close(torch.cat(pieces, 1), whole, 1e-9)
            assert_states_close(state, expected, 1e-9)


@pytest.mark.parametrize("mode", FEW)
def test_reference_continues_from_a_state(mode):
    case = make(mode, 4)
    whole, expected = case("reference", output_final_state=True)
    first, state = case("reference", tokens=case.sliced(0, 10), output_final_state=True)
    rest, final = case("reference", tokens=case.sliced(10, 37), initial_state=state, output_final_state=True)
    assert_close(torch.cat([first, rest], 1), whole, 1e-9)
    assert_states_close(final, expected, 1e-9)


@pytest.mark.parametrize("mode", ["dec", "enc", "sim-lazy"])
def test_float32_errs_no_more_than_the_reference_does(mode):
    settings = {"batch": 1, "time": 256, "slots": 32, "width": 32}
    exact, low = make(mode, 16, **settings).require_grad(), make(mode, 16, **settings).to(torch.float32).require_grad()
    truth, truth_state, truth_grads = gradients(exact, "reference")
    floor, _, floor_grads = gradients(low, "reference")
    actual, actual_state, actual_grads = gradients(low, "chunk")
    assert actual_state["slots"].dtype == torch.float32
    assert relative(actual, truth) <= 4 * relative(floor, truth)
    assert_states_close(actual_state, truth_state, 1e-5)
    for name in truth_grads:
        error, allowed = (relative(g[name], truth_grads[name]) for g in (actual_grads, floor_grads))
        assert error <= 4 * allowed, f"gradient of {name}: {error:.1e} > 4 x {allowed:.1e}"


@pytest.mark.parametrize("mode", ["dec", "sim", "dec-lazy"])
def test_long_texts_at_realistic_width_stay_conditioned(mode):
    """64 slots of width 64, 2,048 tokens on grid 16: what rounding does to outputs and gradients, and what it may."""
    exact, low = (make(mode, 16, batch=1, time=2048, heads=1, slots=64, width=64).to(dtype) for dtype in DTYPES)
    out, state, grads = gradients(exact.require_grad(), "chunk")
    actual, actual_state, actual_grads = gradients(low.require_grad(), "chunk")
    assert_close(actual, out, 1e-5)
    assert_states_close(actual_state, state, 1e-5)
    for name, grad in grads.items():
        assert_close(actual_grads[name], grad, 1e-4, f"gradient of {name}")
