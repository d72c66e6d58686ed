"""Properties of lattice.md section j and the op contract of `sphere_slots`."""

import pytest
import torch
from op_inputs import assert_close, assert_states_close, relative
from sphere_inputs import SphereCase
from torch.nn import functional

from hf_memory.kernels import AnchoredOptions, Gates, SphereOptions, anchored_linear, force_form, sphere_slots
from hf_memory.kernels.sphere_slots.chunk import SphereRule
from hf_memory.kernels.sphere_slots.reference import descent, inner_loss
from hf_memory.kernels.sphere_slots.types import normalise


OBJECTIVES = pytest.mark.parametrize("objective", ["dec", "sim", "enc"])


def online(objective: str = "dec", **fields) -> SphereCase:
    return SphereCase(options={"objective": objective, "chunk_size": 1}, **fields)


def one_token(case: SphereCase, t: int, slots: torch.Tensor, **options) -> torch.Tensor:
    """Slots `[B, H, M, D]` after token `t`, from the decode form."""
    settings = SphereOptions(**{"chunk_size": 1, **case.options, **options})
    out = sphere_slots(**case.sliced(t, t + 1), slots=case.start, initial_state={"slots": slots},
                       output_final_state=True, options=settings)  # fmt: skip
    return out[1]["slots"]


@OBJECTIVES
def test_gradient_is_the_slope_of_the_loss_and_orthogonal_to_its_slot(objective):
    """(j) 1, for slots of any length."""
    case = online(objective, time=1, batch=1, heads=1)
    slots = case.start[None]
    options, step = SphereOptions(objective, "lazy", 1), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    moved, _ = descent(slots, case.k[:, 0], case.v[:, 0], step, options)
    slopes = torch.zeros_like(slots)
    for index in torch.cartesian_prod(*map(torch.arange, slots.shape)):
        for sign in (1, -1):
            shifted = slots.clone()
            shifted[tuple(index)] += sign * 1e-5
            slopes[tuple(index)] += sign * inner_loss(normalise(shifted), case.k[:, 0], case.v[:, 0], objective) / 2e-5
    assert_close(moved, -slopes, 1e-8)
    assert (moved * slots).sum(-1).abs().max() < 1e-12

    rule = SphereRule(options)
    k, v = (x.transpose(1, 2) for x in (case.k, case.v))
    c = rule.coefficients(k, v, step, None, slots)
    closed = c.write * c.h + (c.keep - 1 + c.pull) * slots
    assert_close(closed, moved, 1e-12)


@OBJECTIVES
@pytest.mark.parametrize("chunk_size", [1, 16])
def test_steps_are_orthogonal_and_slots_stay_unit_vectors(objective, chunk_size):
    """(j) 2 and 13: the norm in closed form is the measured one, and its inverse the cosine between old and new."""
    case = SphereCase(options={"objective": objective, "chunk_size": chunk_size}, time=chunk_size)
    start = normalise(case.start).expand(2, 2, 5, 8)
    tokens = (x.transpose(1, 2) for x in (case.k, case.v, case.gates.step))
    c = SphereRule(SphereOptions(**case.options)).coefficients(*tokens, None, start)
    for t in range(chunk_size):
        new = (c.keep + c.pull)[..., t : t + 1] * start + c.write[..., t : t + 1] * c.h[..., t : t + 1, :]
        assert torch.allclose(new.norm(dim=-1), torch.ones(2, 2, 5, dtype=torch.float64), atol=1e-12)
        cosine = (new * start).sum(-1)
        assert torch.allclose(cosine, 1 / c.norm[..., t], atol=1e-12) and (cosine > 0).all()
        moved = new * c.norm[..., t : t + 1] - start
        assert (moved * start).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 16])
def test_norms_after_ten_thousand_tokens_in_float32(chunk_size):
    case = SphereCase(
        batch=1, time=10_000, heads=1, slots=4, width=16, dtype=torch.float32, options={"chunk_size": chunk_size}
    )
    with torch.no_grad():
        _, state = case(output_final_state=True)
    assert (state["slots"].norm(dim=-1) - 1).abs().max() < 1e-6


@OBJECTIVES
def test_lazy_with_steps_in_proportion_follows_the_same_directions(objective):
    """(j) 3: steps γ n² undo that a long slot turns less."""
    case = online(objective)
    unit = long = normalise(case.start).expand(2, 2, 5, 8)
    for t in range(case.time):
        unit = one_token(case, t, unit)
        step = case.gates.step[:, t : t + 1] * long.square().sum(-1)[:, None]
        token = case.sliced(t, t + 1) | {"gates": Gates(step)}
        options = SphereOptions(objective, "lazy", 1)
        _, state = sphere_slots(
            **token, slots=case.start, initial_state={"slots": long}, output_final_state=True, options=options
        )
        assert (state["slots"].norm(dim=-1) >= long.norm(dim=-1)).all()
        long = state["slots"]
        assert torch.allclose(normalise(long), unit, atol=1e-10)


@OBJECTIVES
def test_one_step_is_project_add_normalise(objective):
    """(j) 4 with projectors written out."""
    case = online(objective)
    slots = normalise(case.start).expand(2, 2, 5, 8)
    new = one_token(case, 0, slots)
    k, v, step = case.k[:, 0], case.v[:, 0], case.gates.step[:, 0]
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(5)):
        s = slots[b, h, i]
        if objective == "enc":
            content, wanted = k[b, h], v[b, h, i] - s @ k[b, h]
        else:
            content, wanted = v[b, h], k[b, h, i]
        if objective == "dec":
            content = content - slots[b, h].T @ k[b, h]
        moved = s + step[b, h, 0] * wanted * (torch.eye(8, dtype=torch.float64) - torch.outer(s, s)) @ content
        assert torch.allclose(new[b, h, i], moved / moved.norm(), atol=1e-12)


@pytest.mark.parametrize(
    "objective, std, steps, bounds",
    [("dec", 0.125, (0.25, 0.5), (5.2e-2, 1.3e-1)), ("dec", 0.5, (0.15, 0.3), (4.1e-2, 1.1e-1)),
     ("dec", 1.0, (0.25, 0.5), (6.5e-2, 1.8e-1)), ("sim", 0.5, (0.15, 0.3), (3.6e-3, 1.2e-2))],
)  # fmt: skip
def test_what_the_grid_costs(objective, std, steps, bounds):
    """Distance of grids 4 and 16 to the exact rule, at most a half above the figures of lattice.md d.3."""
    case = SphereCase(batch=1, time=256, heads=1, slots=64, width=64, scale=std)
    case.q, case.k = (functional.normalize(torch.randn_like(x), dim=-1) for x in (case.q, case.k))
    case.gates = Gates(steps[0] + (steps[1] - steps[0]) * torch.rand_like(case.gates.step))
    case.start = torch.linalg.qr(case.start)[0]
    outs = []
    for case.options in ({"objective": objective, "chunk_size": size} for size in (1, 4, 16)):
        outs.append(case()[0])
    for out, bound in zip(outs[1:], bounds):
        assert relative(out, outs[0]) < 1.5 * bound


@OBJECTIVES
@pytest.mark.parametrize("normalization", ["retract", "lazy"])
def test_no_output_depends_on_later_tokens_or_other_rows(objective, normalization):
    """(j) 6."""
    case = SphereCase(options={"objective": objective, "normalization": normalization, "chunk_size": 4}).require_grad()
    out, _ = case()
    for t in (0, 3, 4, 20):
        grads = torch.autograd.grad(out[0, t].sum(), [case.q, case.k, case.v, case.gates.step], retain_graph=True)
        assert all(grad[0, t + 1 :].eq(0).all() and grad[1].eq(0).all() for grad in grads)
        assert grads[1][0, : t + 1].ne(0).any()


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("normalization", ["retract", "lazy"])
def test_neither_padding_nor_a_step_of_zero_moves_a_slot(normalization, chunk_size):
    """(j) 9; a step of zero still takes its place on the grid."""
    case = SphereCase(options={"chunk_size": chunk_size, "normalization": normalization})
    _, state = case(tokens=case.sliced(0, 6), output_final_state=True)
    for length in (1, 5):
        tokens = case.sliced(6, 6 + length)
        mask = torch.zeros(2, length, dtype=torch.bool)
        out, after = case(tokens=tokens, mask=mask, initial_state=state, output_final_state=True)
        assert out.eq(0).all()
        assert_states_close(after, state, 1e-14)
        tokens["gates"] = Gates(torch.zeros_like(tokens["gates"].step))
        out, after = case(tokens=tokens, initial_state=state, output_final_state=True)
        expected = normalise(state["slots"])
        assert out.ne(0).all() and torch.allclose(normalise(after["slots"]), expected, atol=1e-14)


def test_what_a_slot_knows_is_not_written_again():
    """(j) 10: a value along the slot leaves it alone, and a key of one slot touches no other."""
    case = online(time=1)
    slots = normalise(case.start).expand(2, 2, 5, 8)
    case.k = functional.one_hot(torch.tensor(3), 5).to(case.k).expand(2, 1, 2, 5)
    moved = one_token(case, 0, slots)
    others = [0, 1, 2, 4]
    assert torch.equal(moved[:, :, others], slots[:, :, others]) and not torch.allclose(moved[:, :, 3], slots[:, :, 3])
    case.v = 2.5 * slots[:, None, :, 3]
    assert torch.allclose(one_token(case, 0, slots), slots, atol=1e-14)


def test_repeated_similarity_writes_arrive_at_the_value():
    """(j) 11."""
    case = online("sim", time=400)
    case.k = functional.one_hot(torch.tensor(2), 5).to(case.k).expand(2, 400, 2, 5)
    case.v = case.v[:, :1].expand(2, 400, 2, 8)
    _, state = case(output_final_state=True)
    assert torch.allclose(state["slots"][:, :, 2], functional.normalize(case.v[:, 0], dim=-1), atol=1e-10)


@OBJECTIVES
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_rotations_and_permutations_go_through(objective, chunk_size):
    """(j) 12."""
    case = SphereCase(options={"objective": objective, "chunk_size": chunk_size})
    out, state = case(output_final_state=True)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    order = torch.randperm(5)
    turned = SphereCase(options=case.options)
    turned.start = (case.start @ rotation)[:, order]
    if objective == "enc":
        turned.q, turned.k, turned.v = case.q @ rotation, case.k @ rotation, case.v[..., order]
    else:
        turned.q, turned.k, turned.v = case.q[..., order], case.k[..., order], case.v @ rotation
    again, after = turned(output_final_state=True)
    assert_close(after["slots"], (state["slots"] @ rotation)[:, :, order], 1e-12)
    assert_close(again, out[..., order] if objective == "enc" else out @ rotation, 1e-12)


def test_similarity_without_normalisation_is_linear_attention():
    """(j) 14, against an independent loop."""
    case = SphereCase(options={"objective": "sim", "normalization": "none"})
    case.start = torch.zeros_like(case.start)
    out, _ = case()
    memory = torch.zeros(2, 2, 5, 8, dtype=torch.float64)
    for t in range(case.time):
        memory = memory + case.gates.step[:, t, :, :, None] * case.k[:, t, :, :, None] * case.v[:, t, :, None]
        assert torch.allclose(out[:, t], torch.einsum("bhm,bhmd->bhd", case.q[:, t], memory), atol=1e-12)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_decoding_without_projection_is_the_delta_rule(chunk_size, decay):
    """(j) 14, against an independent loop (grid 1), and on every grid against `anchored_linear`."""
    case = SphereCase(decay=decay, options={"normalization": "none", "chunk_size": chunk_size}).require_grad()
    out, _ = case()
    theirs, _ = anchored_linear(
        case.q, case.k, case.v, case.gates, case.start, options=AnchoredOptions(chunk_size=chunk_size)
    )
    assert_close(out, theirs, 1e-12)
    operands = list(case.operands.values())
    cotangent = torch.randn_like(out)
    for actual, expected in zip(*(torch.autograd.grad((x * cotangent).sum(), operands) for x in (out, theirs))):
        assert_close(actual, expected, 1e-10)
    if chunk_size > 1 or decay:
        return
    memory = case.start.detach().expand(2, 2, 5, 8)
    for t in range(case.time):
        k, v, step = (x[:, t].detach() for x in (case.k, case.v, case.gates.step))
        error = v - torch.einsum("bhm,bhmd->bhd", k, memory)
        memory = memory + step[..., None] * k[..., None] * error[:, :, None]
        assert torch.allclose(out[:, t].detach(), torch.einsum("bhm,bhmd->bhd", case.q[:, t], memory), atol=1e-12)


@OBJECTIVES
def test_small_steps_follow_the_gradient_on_the_sphere(objective):
    """(j) 15: the error of the direction falls in proportion to the step."""
    case = online(objective)
    slots = normalise(case.start).expand(2, 2, 5, 8)
    errors = []
    for step in (1e-2, 1e-3):
        case.gates = Gates(torch.full_like(case.gates.step, step))
        one = torch.ones(2, 2, 1, 1, dtype=torch.float64)
        direction, _ = descent(slots, case.k[:, 0], case.v[:, 0], one, SphereOptions(objective, chunk_size=1))
        errors.append(relative((one_token(case, 0, slots) - slots) / step, direction))
    assert errors[0] < 0.1 and 0.05 < errors[1] / errors[0] < 0.2


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize(
    "options", [{"objective": "dec"}, {"objective": "enc"}, {"objective": "sim", "normalization": "lazy"}]
)
def test_gradients_against_finite_differences(options, chunk_size):
    """(j) 16."""
    case = SphereCase(batch=1, time=5, heads=1, slots=3, width=4, options=options | {"chunk_size": chunk_size})
    case.require_grad()

    def run(q, k, v, step, slots):
        return sphere_slots(q, k, v, Gates(step), slots, options=SphereOptions(**case.options))[0]

    assert torch.autograd.gradcheck(run, tuple(case.operands.values()))


@pytest.mark.parametrize("kind", ["repeated", "one slot", "turning over"])
@pytest.mark.parametrize("objective", ["dec", "sim"])
def test_repeated_tokens_leave_the_grid_bounded(objective, kind):
    """Large values written again and again: at the largest step, no running slot outgrows what one chunk can add."""
    case = SphereCase(
        batch=1, time=256, heads=1, slots=16, width=64, options={"objective": objective, "chunk_size": 16}
    )
    k = case.k[:, :1] if kind == "repeated" else functional.one_hot(torch.tensor(3), 16).to(case.k)
    case.k = k.expand(1, 256, 1, 16)
    case.v = 100 * (case.v[:, :1] + 0.05 * case.v)
    if kind == "turning over":
        case.v = case.v * torch.where(torch.arange(256) // 16 % 2 == 0, 1.0, -1.0)[:, None, None]
    case.q = functional.one_hot(torch.tensor(3), 16).to(case.k).expand(1, 256, 1, 16)
    case.gates = Gates(torch.ones_like(case.gates.step))
    case.to(torch.float32).require_grad()
    out, _ = case()
    assert out.norm(dim=-1).max() < 2 * 16
    grads = torch.autograd.grad(out.square().sum(), list(case.operands.values()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_packed_sequences_equal_separate_ones(chunk_size):
    case = SphereCase(batch=1, time=40, options={"chunk_size": chunk_size})
    bounds = torch.tensor([0, 1, 18, 18, 40])
    packed, states = case(cu_seqlens=bounds, output_final_state=True)
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if stop == start:
            continue
        alone, state = case(tokens=case.sliced(start, stop), output_final_state=True)
        assert_close(packed[:, start:stop], alone, 1e-12)
        assert_states_close({name: x[i : i + 1] for name, x in states.items()}, state, 1e-12)
    again, _ = case(cu_seqlens=bounds, initial_state=states)
    last = {name: x[3:] for name, x in states.items()}
    one, _ = case(tokens=case.sliced(18, 40), initial_state=last, output_final_state=True)
    assert_close(again[:, 18:], one, 1e-12)


@pytest.mark.parametrize("length", [1, 9])
def test_runs_where_users_run_it(length):
    """no_grad, inference_mode and autocast give what training gives; low precision keeps float32 states."""
    case = SphereCase(time=length, dtype=torch.float32, options={"chunk_size": 4})
    expected, state = case(output_final_state=True)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out, final = case(output_final_state=True)
            assert torch.allclose(out, expected, rtol=1e-6, atol=1e-7)
            assert_states_close(final, state, 1e-6)
            again, _ = case(initial_state=final, output_final_state=True)
            assert again.isfinite().all()
    out, final = case.to(torch.bfloat16)(output_final_state=True)
    assert out.dtype == torch.bfloat16 and final["slots"].dtype == torch.float32


@pytest.mark.parametrize("normalization", ["retract", "lazy"])
@pytest.mark.parametrize("what", ["long", "large", "repeated", "zero"])
def test_finite_in_bf16(what, normalization):
    case = SphereCase(batch=1, time=600, slots=16, width=16, options={"normalization": normalization})
    if what == "large":
        case.q, case.v = case.q * 1e3, case.v * 1e3
    if what == "repeated":
        case.k, case.v = case.k[:, :1].expand_as(case.k), case.v[:, :1].expand_as(case.v)
    if what == "zero":
        case.q, case.k, case.v, case.start = (torch.zeros_like(x) for x in (case.q, case.k, case.v, case.start))
    case.to(torch.bfloat16).require_grad()
    out, _ = case()
    grads = torch.autograd.grad(out.float().square().sum(), list(case.operands.values()))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_decode_compiles_to_one_graph():
    case = SphereCase(dtype=torch.float32, options={"chunk_size": 4})
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
        case = SphereCase(
            batch=1, time=time, heads=1, slots=16, width=64, dtype=torch.float32, options={"chunk_size": 4}
        )
        case.require_grad()
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
            case()
        return sum(shape == (1, 1, 16, 64) for shape in shapes)

    assert saved(4 * 256) - saved(4 * 64) == 2 * (16 - 8)


def test_errors_are_one_sentence():
    case = SphereCase()
    lazy = SphereOptions(normalization="lazy")
    broken = [
        (lambda: case(mask=torch.ones(2, 5)), "mask"),
        (lambda: case(tokens=case.sliced(0, 9) | {"k": case.k[:, :8]}), "`k`"),
        (lambda: case(tokens=case.sliced(0, 9) | {"v": case.v[:, :9, :, :5]}), "5 slots of width 8"),
        (lambda: case(tokens=case.sliced(0, 9) | {"gates": Gates(case.gates.step[..., 0])}), "step"),
        (lambda: case(tokens=case.sliced(0, 37) | {"gates": Gates(case.gates.step, case.gates.step)}), "retract"),
        (lambda: sphere_slots(case.q, case.k, case.v, Gates(*[case.gates.step] * 3), case.start, options=lazy), "mom"),
        (lambda: case(cu_seqlens=torch.tensor([0, 37])), "one row"),
        (lambda: SphereOptions(chunk_size=0), "chunk_size"),
        (lambda: SphereOptions(objective="code"), "objective"),
        (lambda: SphereOptions(normalization="frobenius"), "normalization"),
        (lambda: case("triton?"), "form"),
        (lambda: case(initial_state={}), "missing or not expected"),
        (lambda: case(initial_state=SphereCase(slots=6)(output_final_state=True)[1]), "slots"),
        (lambda: case(initial_state=online()(output_final_state=True)[1]), "phase"),
    ]
    for call, word in broken:
        with pytest.raises(ValueError, match=word) as error:
            call()
        assert "\n" not in str(error.value)


def test_forms_can_be_forced():
    case = SphereCase(options={"chunk_size": 4})
    with force_form("reference"):
        out, _ = case("chunk")
    assert torch.equal(out, case("reference")[0])
