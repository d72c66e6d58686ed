"""Chunk and decode forms of `sphere_slots` against its token-wise reference, whose gradient is autograd of the loss."""

import pytest
import torch
from op_inputs import assert_close, assert_states_close, relative
from slot_inputs import SlotCase


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
FEW = ["dec", "enc-lazy", "sim-none"]


def make(mode: str, chunk_size: int, **fields) -> SlotCase:
    options = {"chunk_size": chunk_size, **MODES[mode]}
    decay = options.get("normalization", "retract") != "retract"
    return SlotCase(options=options, **{"decay": decay, **fields})


def gradients(case: SlotCase, form: str, **kwargs) -> tuple[torch.Tensor, dict, dict]:
    """Output and state of one form, and the gradients of a random projection of both."""
    out, state = case(form, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(5)
    results = [out, *(x for x in state.values() if x.is_floating_point())]
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results)
    return out, state, dict(zip(case.operands, torch.autograd.grad(loss, list(case.operands.values()))))


def assert_equal_forms(case: SlotCase, tolerance: float = 1e-9, **kwargs) -> None:
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
