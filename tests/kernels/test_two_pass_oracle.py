"""`two_pass_slots`: chunk and decode forms against the reference, whose inner gradient is autograd of the loss."""

import pytest
import torch
from op_inputs import assert_close, assert_states_close, relative
from two_pass_inputs import SlotCase

from hf_memory.kernels.two_pass_slots.maps import WRITE_MAPS


def gradients(case: SlotCase, form: str, **kwargs) -> tuple[torch.Tensor, dict, dict]:
    """Output and state of one form, and the gradients of a random projection of both."""
    out, state = case(form, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(5)
    results = [out, *(x for x in state.values() if x.is_floating_point())]
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results)
    return out, state, dict(zip(case.operands, torch.autograd.grad(loss, list(case.operands.values()))))


def assert_equal_forms(case: SlotCase, tolerance: float = 1e-9, **kwargs) -> None:
    case.require_grad()
    expected, state, grads = gradients(case, "reference", **kwargs)
    actual, actual_state, actual_grads = gradients(case, "chunk", **kwargs)
    assert_close(actual, expected, tolerance)
    assert_states_close(actual_state, state, tolerance)
    for name, grad in grads.items():
        assert_close(actual_grads[name], grad, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("write_map", WRITE_MAPS)
def test_chunk_form_is_the_reference(write_map, chunk_size):
    assert_equal_forms(SlotCase(options={"chunk_size": chunk_size, "write_map": write_map}))


@pytest.mark.parametrize(
    "settings",
    [
        {"sets": 1},
        {"decay": False},
        {"start": False},
        {"value_width": 5},
        {"value_width": 11, "slots": 1, "options": {"write_map": "silu"}},
        {"options": {"read_map": "softmax"}},
        {"options": {"read_map": "identity", "write_map": "l2_silu"}},
    ],
    ids=str,
)
def test_variations(settings):
    settings = {"shape": (2, 19, 2, 8), **settings}
    assert_equal_forms(SlotCase(**{**settings, "options": {"chunk_size": 4, **settings.get("options", {})}}))


@pytest.mark.parametrize("refinements", [1, 3])
@pytest.mark.parametrize("write_map", ["identity", "ln_silu"])
def test_refinements(write_map, refinements):
    options = {"chunk_size": 6, "write_map": write_map, "refinements": refinements}
    assert_equal_forms(SlotCase(shape=(2, 19, 2, 8), options=options))


@pytest.mark.parametrize("hypergrad", [0.0, 0.5])
@pytest.mark.parametrize("options", [{"chunk_size": 4}, {"write_map": "identity"}, {"refinements": 2}], ids=str)
def test_hypergrad_scales_what_passes_through_the_point(options, hypergrad):
    """Spec (j) 12."""
    full = SlotCase(shape=(2, 19, 2, 8), options={"chunk_size": 4, **options}).require_grad()
    less = SlotCase(shape=(2, 19, 2, 8), options={"chunk_size": 4, **options, "hypergrad": hypergrad})
    assert_equal_forms(less)
    expected, _, full_grads = gradients(full, "chunk")
    out, _, grads = gradients(less, "chunk")
    assert torch.equal(out, expected)
    assert relative(grads["k"], full_grads["k"]) > 1e-2


@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 4}, {"write_map": "identity"}], ids=str)
def test_padding_anywhere(options):
    mask = torch.rand(2, 37) > 0.3
    assert_equal_forms(SlotCase(options={"chunk_size": 4, **options}), mask=mask)


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("write_map", ["identity", "ln_silu"])
def test_lengths(write_map, length):
    assert_equal_forms(SlotCase(shape=(1, length, 1, 8), options={"write_map": write_map}))


@pytest.mark.parametrize(
    "options", [{"chunk_size": 4}, {"chunk_size": 7, "write_map": "identity"}, {"chunk_size": 4, "refinements": 1}],
    ids=str,
)  # fmt: skip
def test_gradient_through_a_carried_state(options):
    """Calls joined by a state have the gradients of one, wherever the cut lies."""
    case = SlotCase(shape=(2, 21, 2, 6), options=options).require_grad()
    operands = list(case.operands.values())
    whole, _ = case("chunk")
    cotangent = torch.randn(whole.shape, dtype=whole.dtype)
    expected = torch.autograd.grad((whole * cotangent).sum(), operands)
    for cut in (options["chunk_size"], options["chunk_size"] + 2):
        first, state = case("chunk", case.tokens(0, cut), output_final_state=True)
        token, state = case("chunk", case.tokens(cut, cut + 1), initial_state=state, output_final_state=True)
        rest, _ = case("chunk", case.tokens(cut + 1), initial_state=state)
        loss = (torch.cat([first, token, rest], 1) * cotangent).sum()
        for name, actual, grad in zip(case.operands, torch.autograd.grad(loss, operands), expected):
            assert_close(actual, grad, 1e-9, f"gradient of {name}, cut at {cut}")


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 1}, {"chunk_size": 4}, {"chunk_size": 16}, {"chunk_size": 4, "refinements": 2}],
    ids=str,
)
@pytest.mark.parametrize("write_map", ["identity", "ln_silu"])
def test_any_split_gives_the_same(write_map, options):
    """Spec (j) 11, cuts inside chunks and single tokens included."""
    case = SlotCase(options={**options, "write_map": write_map}, value_width=5)
    mask = torch.rand(2, 37) > 0.3
    with torch.no_grad():
        whole, expected = case("chunk", mask=mask, output_final_state=True)
        for cuts in ([0, 1, 2, 9, 10, 25, 37], list(range(38)), [0, 16, 32, 37]):
            state, pieces = None, []
            for start, stop in zip(cuts, cuts[1:]):
                arguments = {"mask": mask[:, start:stop], "initial_state": state, "output_final_state": True}
                out, state = case(None, case.tokens(start, stop), **arguments)
                pieces.append(out)
            assert_close(torch.cat(pieces, 1), whole, 1e-9)
            assert_states_close(state, expected, 1e-9)


def test_reference_continues_from_a_state():
    case = SlotCase(options={"chunk_size": 4, "refinements": 1})
    whole, expected = case("reference", output_final_state=True)
    first, state = case("reference", case.tokens(0, 10), output_final_state=True)
    rest, final = case("reference", case.tokens(10), initial_state=state, output_final_state=True)
    assert_close(torch.cat([first, rest], 1), whole, 1e-9)
    assert_states_close(final, expected, 1e-9)


@pytest.mark.parametrize("write_map", ["identity", "ln_silu"])
def test_float32_errs_no_more_than_the_reference_does(write_map):
    settings = {"shape": (1, 96, 1, 32), "slots": 32, "options": {"write_map": write_map}}
    exact, low = SlotCase(**settings).require_grad(), SlotCase(**settings).to(torch.float32).require_grad()
    truth, truth_state, truth_grads = gradients(exact, "reference")
    floor, _, floor_grads = gradients(low, "reference")
    actual, actual_state, actual_grads = gradients(low, "chunk")
    assert actual_state["memory"].dtype == torch.float32
    assert relative(actual, truth) <= 4 * relative(floor, truth)
    assert_states_close(actual_state, truth_state, 1e-4)
    for name in truth_grads:
        error, allowed = (relative(g[name], truth_grads[name]) for g in (actual_grads, floor_grads))
        assert error <= 4 * allowed, f"gradient of {name}: {error:.1e} > 4 x {allowed:.1e}"
