"""`sphere_slots` in Triton's interpreter against the float64 reference; `test_triton_sphere.py` runs this file."""

from dataclasses import replace

import pytest
import torch
from op_inputs import assert_close, assert_states_close
from sphere_inputs import SphereCase

from hf_memory.evaluation.properties_tiny import random_model, tiny_config
from hf_memory.kernels import Gates, SphereOptions, sphere_slots
from hf_memory.kernels.sphere_slots import triton_op


MODES = {
    "dec": {"objective": "dec"},
    "sim": {"objective": "sim"},
    "enc": {"objective": "enc"},
    "dec-lazy": {"objective": "dec", "normalization": "lazy"},
    "enc-lazy": {"objective": "enc", "normalization": "lazy"},
    "sim-none": {"objective": "sim", "normalization": "none"},
}
# More than one segment of kept states; the boundary of a segment inside a chunk.
SEGMENT = 6


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(triton_op, "SEGMENT", SEGMENT)


def make(mode: str, chunk_size: int, **fields) -> SphereCase:
    """A case whose values float32 holds exactly, so that all forms get the same."""
    options = {"chunk_size": chunk_size, **MODES[mode]}
    fields = {"batch": 1, "time": 7, "heads": 1, "slots": 3, "width": 6, "decay": "normalization" in options} | fields
    return SphereCase(options=options, **fields).to(torch.float32).to(torch.float64)


def results(case: SphereCase, form: str, **kwargs) -> dict[str, torch.Tensor]:
    """Output, state, and gradients of a random projection of both."""
    case = case.require_grad()
    out, state = case(form, output_final_state=True, **kwargs)
    generator = torch.Generator().manual_seed(5)
    floats = {"output": out} | {name: x for name, x in state.items() if x.is_floating_point()}
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in floats.values()]
    loss = sum((x * cotangent.to(x)).sum() for x, cotangent in zip(floats.values(), drawn))
    grads = torch.autograd.grad(loss, list(case.operands.values()))
    return floats | {f"gradient of {name}": grad for name, grad in zip(case.operands, grads)}


def assert_equals_reference(make_case, tolerance: float = 2e-5, **kwargs) -> None:
    expected = results(make_case(), "reference", **kwargs)
    actual = results(make_case().to(torch.float32), "triton", **kwargs)
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, name)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_states_and_gradients_equal_the_reference(mode, chunk_size):
    assert_equals_reference(lambda: make(mode, chunk_size))


@pytest.mark.parametrize("mode, chunk_size", [("dec", 1), ("enc-lazy", 4)])
def test_padding_anywhere(mode, chunk_size):
    mask = torch.rand(2, 7) > 0.3
    assert_equals_reference(lambda: make(mode, chunk_size, batch=2, heads=2), mask=mask)


def test_one_step_per_slot():
    assert_equals_reference(lambda: make("dec", 4, step_sets=3))


@pytest.mark.parametrize("mode", ["dec", "sim", "dec-lazy"])
def test_writes_beyond_the_whole_slot(mode):
    def large() -> SphereCase:
        case = make(mode, 8, scale=6.0, decay=False)
        case.k = (case.k[:, :1] + 0.1 * case.k).float().double()
        case.v = (case.v[:, :1] + 0.3 * case.v).float().double()
        return case

    assert_equals_reference(large, tolerance=1e-4)


@pytest.mark.parametrize("length", [1, 63, 100])
def test_lengths(length):
    case = make("dec", 16, batch=1, time=length)
    expected, state = case("reference", output_final_state=True)
    with torch.no_grad():
        actual, final = case.to(torch.float32)("triton", output_final_state=True)
    assert_close(actual, expected, 1e-5)
    assert_states_close(final, state, 1e-5)


@pytest.mark.parametrize("mode, chunk_size", [("dec", 1), ("dec", 4), ("enc-lazy", 4)])
def test_decoding_continues_from_any_state(mode, chunk_size):
    """Rows of different phases, one of them padded now and then; states of the chunk form go on in the kernel."""
    case, mask = make(mode, chunk_size, batch=2, time=9), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = False
    expected, state = case("reference", mask=mask, output_final_state=True)
    case.to(torch.float32)
    with torch.no_grad():
        out, after = case("chunk", tokens=case.sliced(0, 3), mask=mask[:, :3], output_final_state=True)
        outs = [out]
        for t in range(3, 9):
            out, after = case(
                "triton",
                tokens=case.sliced(t, t + 1),
                mask=mask[:, t : t + 1],
                initial_state=after,
                output_final_state=True,
            )
            outs.append(out)
    assert_close(torch.cat(outs, 1), expected, 1e-5)
    assert_states_close(after, state, 1e-5)


def test_packed_sequences_equal_separate_ones():
    case = make("dec", 4, batch=1, time=12).to(torch.float32)
    bounds = torch.tensor([0, 1, 8, 12])
    with torch.no_grad():
        packed, _ = case("triton", cu_seqlens=bounds)
        for start, stop in zip(bounds, bounds[1:]):
            alone, _ = case("chunk", tokens=case.sliced(start, stop))
            assert_close(packed[:, start:stop], alone, 1e-5)


def test_half_precision_operands_and_float32_states():
    case = make("dec", 4).to(torch.bfloat16)
    gates, start = Gates(case.gates.step.float()), case.start.float()
    outs = []
    for form in ("chunk", "triton"):
        options = SphereOptions(form=form, **case.options)
        out, state = sphere_slots(case.q, case.k, case.v, gates, start, output_final_state=True, options=options)
        assert out.dtype == torch.bfloat16 and state["slots"].dtype == torch.float32
        outs.append((out, state["slots"]))
    assert_close(outs[1][0], outs[0][0], 1e-2)
    assert_close(outs[1][1], outs[0][1], 1e-5)


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_chunk_form():
    case = make("dec", 4, slots=65, width=64, time=2)
    with pytest.raises(ValueError, match="not for torch.float64"):
        case("triton")
    case.to(torch.float32)
    with pytest.raises(ValueError, match="not for 65 slots of width 64"):
        case("triton")
    assert case()[0].isfinite().all()


def test_a_model_trains_and_decodes_through_the_kernels():
    config = tiny_config(
        "lattice", num_hidden_layers=1, hidden_size=8, head_dim=4, num_attention_heads=2, chunk_size=3
    )
    model, ids = random_model(config), torch.randint(128, (1, 6))
    mixer = model.model.layers[0].mixer
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    mixer.options = replace(mixer.options, form="triton")
    actual = model(ids, labels=ids)
    actual.loss.backward()
    assert_close(actual.logits, expected.logits, 1e-4)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-3, name)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        assert_close(model(ids[:, 5:], past_key_values=cache).logits, expected.logits[:, 5:], 1e-4)
