"""Properties of titans.md section j and the op contract: rows, packing, modes, errors, memory."""

import pytest
import torch
from op_inputs import Case, assert_close, assert_states_close
from torch.nn import functional

from hf_memory.kernels import AnchoredOptions, Gates, anchored_linear, anchored_mlp, force_form
from hf_memory.kernels.activations import ACTIVATIONS


LINEAR, DEEP = {"depth": 1}, {"depth": 2}
BOTH = pytest.mark.parametrize("memory", [LINEAR, DEEP], ids=["linear", "deep"])


@BOTH
def test_packed_sequences_equal_separate_ones(memory):
    case = Case(**memory, shape=(1, 40, 2, 8), options={"chunk_size": 4, "decay_target": "init"})
    bounds = torch.tensor([0, 1, 18, 18, 40])
    packed, states = case(cu_seqlens=bounds, output_final_state=True)
    assert states["phase"].tolist() == [1, 1, 0, 2]
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if stop == start:
            continue
        alone, state = case(tokens=case.sliced(start, stop), output_final_state=True)
        assert_close(packed[:, start:stop], alone, 1e-12)
        assert_states_close({name: x[i : i + 1] for name, x in states.items()}, state, 1e-12)
    again, _ = case(cu_seqlens=bounds, initial_state=states)
    one, _ = case(
        tokens=case.sliced(18, 40), initial_state={name: x[3:] for name, x in states.items()}, output_final_state=True
    )
    assert_close(again[:, 18:], one, 1e-12)


@BOTH
def test_rows_never_meet(memory):
    case = Case(**memory, options={"chunk_size": 4, "decay_target": "init"})
    out, _ = case()
    permuted, _ = case(tokens=case.rows(torch.tensor([1, 0]), 0, 37))
    assert torch.equal(permuted[0], out[1]) or torch.allclose(permuted[0], out[1], rtol=1e-12)
    case.v[1] = 1e3
    assert torch.allclose(case()[0][0], out[0], rtol=1e-12)


@BOTH
def test_no_output_depends_on_later_tokens(memory):
    case = Case(**memory, options={"chunk_size": 4, "decay_target": "init"}).require_grad()
    out, _ = case()
    for t in (0, 3, 4, 20):
        grads = torch.autograd.grad(out[:, t].sum(), [case.q, case.k, case.v, *case.gates], retain_graph=True)
        assert all(grad[:, t + 1 :].eq(0).all() for grad in grads)
        assert grads[1][:, : t + 1].ne(0).any()


@BOTH
def test_padding_moves_no_state_even_with_momentum(memory):
    case = Case(**memory, options={"chunk_size": 4, "decay_target": "init"})
    _, state = case(tokens=case.sliced(0, 6), output_final_state=True)
    for length in (1, 5):
        mask = torch.zeros(2, length, dtype=torch.bool)
        out, after = case(tokens=case.sliced(6, 6 + length), mask=mask, initial_state=state, output_final_state=True)
        assert out.eq(0).all()
        for name in state:
            assert torch.allclose(after[name], state[name], rtol=1e-12), name


@BOTH
def test_no_step_and_no_decay_read_the_learned_start(memory):
    case = Case(**memory, decay=False, options={"chunk_size": 4, "decay_target": "init"})
    case.gates = Gates(torch.zeros_like(case.gates.step), None, case.gates.log_momentum)
    out, state = case(output_final_state=True)
    assert state["offset_0"].eq(0).all()
    hidden = torch.einsum("bthi,hio->btho", case.q, case.weights[0])
    if case.depth == 2:
        hidden = torch.einsum("bthi,hio->btho", functional.gelu(hidden), case.weights[1])
        hidden = case.q + functional.layer_norm(hidden, (8,), eps=1e-6) * case.affine[0] + case.affine[1]
    assert_close(out, hidden, 1e-12)


def test_full_forgetting_erases_in_one_token():
    case = Case(**LINEAR, options={"chunk_size": 1, "decay_target": "zero"})
    step, log_decay, log_momentum = (x.clone() for x in case.gates)
    step[:, 20], log_decay[:, 20], log_momentum[:, 20] = 0, -torch.inf, -torch.inf
    case.gates = Gates(step, log_decay, log_momentum)
    out, _ = case()
    assert out[:, 20].eq(0).all() and out[:, 19].ne(0).any() and out[:, 21].ne(0).any()


def test_one_chunk_over_everything_is_linear_attention():
    case = Case(**LINEAR, momentum=False, decay=False)
    step = torch.ones_like(case.gates.step)
    out, _ = anchored_linear(case.q, case.k, case.v, Gates(step), options=AnchoredOptions(chunk_size=64))
    scores = torch.einsum("bthd,bshd->bhts", case.q, case.k).tril()
    assert_close(out, torch.einsum("bhts,bshd->bthd", scores, case.v), 1e-12)


@pytest.mark.parametrize("tile", [1, 3, 8, 64])
def test_online_solve_does_not_depend_on_its_tile(tile, monkeypatch):
    case = Case(**LINEAR, options={"chunk_size": 1})
    expected, state = case("reference", output_final_state=True)
    monkeypatch.setattr("hf_memory.kernels.prefill.SOLVE_TILE", tile)
    out, final = case("chunk", output_final_state=True)
    assert_close(out, expected, 1e-12)
    assert_states_close(final, state, 1e-12)


def test_zero_gamma_stops_learning():
    case = Case(**DEEP, decay=False, options={"chunk_size": 4, "decay_target": "init"})
    case.affine = (torch.zeros_like(case.affine[0]), case.affine[1])
    _, state = case(output_final_state=True)
    assert state["offset_0"].eq(0).all() and state["offset_1"].eq(0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_derivatives(name):
    act = ACTIVATIONS[name]
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(act.value(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert_close(act.slope(x), slope, 1e-12)
    assert_close(act.curvature(x), curvature, 1e-12)


def test_gradients_against_finite_differences():
    case = Case(**DEEP, shape=(1, 5, 1, 3), options={"chunk_size": 2, "decay_target": "init"}).require_grad()
    names = list(case.operands)

    def run(*tensors):
        named = dict(zip(names, tensors))
        return anchored_mlp(
            named["q"],
            named["k"],
            named["v"],
            Gates(named["step"], named["log_decay"], named["log_momentum"]),
            [named["weight_0"], named["weight_1"]],
            (named["norm_weight"], named["norm_bias"]),
            options=AnchoredOptions(chunk_size=2, decay_target="init"),
        )[0]

    assert torch.autograd.gradcheck(run, tuple(case.operands.values()))


@BOTH
@pytest.mark.parametrize("length", [1, 9])
def test_runs_where_users_run_it(memory, length):
    """no_grad, inference_mode and autocast give what training gives; low precision keeps float32 states."""
    case = Case(**memory, shape=(2, length, 2, 8), options={"chunk_size": 4}).to(torch.float32)
    expected, state = case(output_final_state=True)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out, final = case(output_final_state=True)
            assert torch.allclose(out, expected, rtol=1e-6, atol=1e-7)
            assert_states_close(final, state, 1e-6)
            again, _ = case(initial_state=final, output_final_state=True)
            assert again.isfinite().all()
    case.to(torch.bfloat16)
    out, final = case(output_final_state=True)
    assert out.dtype == torch.bfloat16 and final["memory_0"].dtype == torch.float32


@BOTH
@pytest.mark.parametrize("what", ["long", "large", "repeated", "zero"])
def test_finite_in_bf16(memory, what):
    case = Case(**memory, shape=(1, 600, 2, 16), options={"chunk_size": 16, "decay_target": "init"})
    if what == "large":
        case.q, case.v = case.q * 1e3, case.v * 1e3
    if what == "repeated":
        case.k = case.k[:, :1].expand_as(case.k)
    if what == "zero":
        case.q, case.k, case.v = (torch.zeros_like(x) for x in (case.q, case.k, case.v))
    case.gates = Gates(0.1 * case.gates.step, case.gates.log_decay, case.gates.log_momentum)
    case.to(torch.bfloat16).require_grad()
    out, _ = case()
    grads = torch.autograd.grad(out.float().square().sum(), list(case.operands.values()))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@BOTH
def test_decode_compiles_to_one_graph(memory):
    case = Case(**memory, options={"chunk_size": 4, "decay_target": "init"}).to(torch.float32)
    case.require_grad()
    with torch.no_grad():
        _, state = case(tokens=case.sliced(0, 5), output_final_state=True)
        expected, final = state, state
        step = torch.compile(
            lambda tokens, state: case(tokens=tokens, initial_state=state, output_final_state=True),
            fullgraph=True,
            backend="eager",
        )
        torch._dynamo.reset()
        for t in range(5, 15):
            with torch._dynamo.config.patch(error_on_recompile=t > 6):
                out, final = step(case.sliced(t, t + 1), final)
            want, expected = case(tokens=case.sliced(t, t + 1), initial_state=expected, output_final_state=True)
            assert torch.allclose(out, want, rtol=1e-5, atol=1e-6)
    assert_states_close(final, expected, 1e-6)


def test_backward_keeps_the_root_of_the_number_of_chunks():
    """Quadrupling the chunks doubles what is kept."""

    def saved(time: int) -> int:
        case = Case(**DEEP, shape=(1, time, 1, 16), expansion=4, options={"chunk_size": 4, "decay_target": "init"})
        case.to(torch.float32).require_grad()
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
            case()
        return sum(shape == (1, 1, 16, 64) for shape in shapes)

    assert saved(4 * 256) == 2 * 16  # memory and momentum of the first layer
    assert saved(4 * 64) == 2 * 8


def test_errors_are_one_sentence():
    case = Case(**DEEP)
    broken = [
        (lambda: case(mask=torch.ones(2, 5)), "mask"),
        (lambda: case(tokens=case.sliced(0, 9) | {"k": case.k[:, :8]}), "`k`"),
        (lambda: case(cu_seqlens=torch.tensor([0, 37])), "one row"),
        (lambda: AnchoredOptions(chunk_size=0), "chunk_size"),
        (lambda: AnchoredOptions(decay_target="half"), "decay_target"),
        (lambda: AnchoredOptions(decay_before_grad=True), "chunk_size=1"),
        (lambda: case("triton?"), "form"),
        (lambda: case(initial_state={}), "missing or not expected"),
        (lambda: force_form("fast").__enter__(), "form"),
        (lambda: case(tokens=case.sliced(0, 0)), "at least one token"),
    ]
    for call, word in broken:
        with pytest.raises(ValueError, match=word) as error:
            call()
        assert "\n" not in str(error.value)
    other = Case(**DEEP, options={"chunk_size": 8})
    _, state = other(output_final_state=True)
    with pytest.raises(ValueError, match="keys"):
        case(initial_state=state)


def test_every_misshapen_tensor_of_a_state_is_named():
    """A decode kernel would read past the end of one."""
    case = Case(**DEEP, options={"chunk_size": 4})
    _, state = case(output_final_state=True)
    for name, x in state.items():
        with pytest.raises(ValueError, match=f"'{name}'"):
            case(tokens=case.sliced(0, 1), initial_state=state | {name: x[..., :-1]})
    with pytest.raises(ValueError, match="'phase'.*int32.*int64"):
        case(tokens=case.sliced(0, 1), initial_state=state | {"phase": state["phase"].int()})


def test_state_of_another_rule_is_refused():
    """Same shapes, another meaning: what forgetting leads to, and whether there is momentum."""
    _, state = Case(**DEEP, options={"decay_target": "init"})(output_final_state=True)
    for other in (Case(**DEEP), Case(**DEEP, momentum=False, options={"decay_target": "init"})):
        with pytest.raises(ValueError, match="other options"):
            other(initial_state=state)


def test_forms_can_be_forced():
    case = Case(**DEEP, options={"chunk_size": 4})
    with force_form("reference"):
        out, _ = case("chunk")
    assert torch.equal(out, case("reference")[0])
