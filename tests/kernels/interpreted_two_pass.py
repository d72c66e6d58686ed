"""Kernels of `two_pass_slots` in Triton's interpreter against the reference; `test_triton_two_pass.py` runs this."""

import pytest
import torch
from op_inputs import assert_close, relative
from two_pass_inputs import SlotCase

from hf_memory.kernels import force_form
from hf_memory.kernels.types import State


CASES = {
    "chunk 16": ({"shape": (1, 35, 1, 8)}, {"chunk_size": 16}),
    "two rows, two heads": (
        {"shape": (2, 6, 2, 8), "value_width": 5, "slots": 20, "sets": 1},
        {"chunk_size": 4, "write_map": "l2_silu"},
    ),
    "softmax": ({"start": False}, {"chunk_size": 5, "write_map": "silu", "read_map": "softmax"}),
    "first order": ({"decay": False}, {"chunk_size": 4, "hypergrad": 0.5, "read_map": "identity"}),
    "exact": ({"shape": (1, 3, 1, 8)}, {"chunk_size": 1, "read_map": "l2_silu"}),
}


def make(name: str, **fields) -> SlotCase:
    settings, options = CASES[name]
    return SlotCase(**{"shape": (1, 9, 1, 8), **settings, **fields}, options=options)


def run(case: SlotCase, form: str, **kwargs) -> tuple[torch.Tensor, State, dict]:
    """Output, state, and gradients of a random projection of both."""
    out, state = case(form, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(5)
    results = [out, *(x for x in state.values() if x.is_floating_point())]
    noise = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    loss = sum((x.double() * y).sum() for x, y in zip(results, noise))
    return out, state, dict(zip(case.operands, torch.autograd.grad(loss, list(case.operands.values()))))


def assert_equals_reference(name: str, **kwargs) -> None:
    exact, low = make(name).require_grad(), make(name, dtype=torch.float32).require_grad()
    truth, truth_state, truth_grads = run(exact, "reference", **kwargs)
    out, state, grads = run(low, "triton", **kwargs)
    assert_close(out, truth, 2e-6)
    assert state.keys() == truth_state.keys()
    for key, value in truth_state.items():
        assert_close(state[key], value, 5e-6, key)
    for key, value in truth_grads.items():
        assert_close(grads[key], value, 1e-5, f"gradient of {key}")


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_reference(name):
    assert_equals_reference(name)


def test_padding_anywhere():
    assert_equals_reference("first order", mask=torch.arange(9)[None] % 3 != 1)


def test_gates_that_underflow():
    case = make("two rows, two heads", dtype=torch.float32)
    case.operands["log_decay"] = case.operands["log_decay"] - 60.0
    case.operands["log_decay"][:, 5] = -200.0
    expected, _ = case("reference")
    case.require_grad()
    out, _, grads = run(case, "triton")
    assert_close(out, expected, 1e-5)
    assert all(x.isfinite().all() for x in grads.values())


def test_calls_joined_by_a_state():
    case = make("first order", dtype=torch.float32)
    with torch.no_grad(), force_form("triton"):
        whole, expected = case(output_final_state=True)
        state, pieces = None, []
        for start, stop in ((0, 6), (6, 7), (7, 9)):
            out, state = case(None, case.tokens(start, stop), initial_state=state, output_final_state=True)
            pieces.append(out)
    assert_close(torch.cat(pieces, 1), whole, 2e-6)
    assert_close(state["memory"], expected["memory"], 2e-6)


def test_half_precision_loses_no_more_than_its_products_must():
    """In float16: the interpreter multiplies the bits of bfloat16 as if they were integers."""
    truth, _ = make("chunk 16")("reference")
    out, state = make("chunk 16", dtype=torch.float16)("triton", output_final_state=True)
    assert out.dtype == torch.float16 and state["memory"].dtype == torch.float32
    assert relative(out, truth) < 4e-3


def test_what_the_kernels_cannot_do_is_said():
    for options, message in (
        ({"write_map": "identity"}, "not for write_map='identity': use form='chunk'"),
        ({"chunk_size": 128}, "not for chunk_size=128"),
        ({"refinements": 1}, "not for refinements"),
    ):
        with pytest.raises(ValueError, match=message):
            SlotCase(shape=(1, 3, 1, 8), dtype=torch.float32, options=options)("triton")
    with pytest.raises(ValueError, match="not for torch.float64"):
        SlotCase(shape=(1, 3, 1, 8))("triton")
    with pytest.raises(ValueError, match="not for 24 slots of width 64"):
        SlotCase(shape=(1, 3, 1, 64), slots=24, dtype=torch.float32)("triton")
