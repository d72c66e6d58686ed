"""Properties of trellis.md section j, and the op contract: rows, packing, modes, errors, memory, conditioning."""

import pytest
import torch
from op_inputs import assert_close, assert_states_close, relative
from torch import Tensor
from torch.nn import functional
from two_pass_inputs import SlotCase

from hf_memory.kernels import AnchoredOptions, Gates, SlotOptions, anchored_linear, force_form, two_pass_slots
from hf_memory.kernels.two_pass_slots.maps import READ_MAPS, WRITE_MAPS, SlotMap
from hf_memory.kernels.two_pass_slots.reference import apply_map


POINTS = torch.linspace(-4, 4, 24, dtype=torch.float64).view(4, 6).cos() * 3


def halves(state: Tensor) -> tuple[Tensor, Tensor]:
    return state.chunk(2, 1)


@pytest.mark.parametrize("name", READ_MAPS)
def test_value_and_jacobian_of_a_map(name):
    """Spec (c.3): values and products with the Jacobian, against autograd of the definition."""
    z = POINTS.clone().requires_grad_()
    value = apply_map(name, z, 1e-3)
    assert_close(SlotMap(name, 1e-3)(z), value, 1e-12)
    cotangent = torch.randn_like(z)
    (expected,) = torch.autograd.grad(value, z, cotangent)
    assert_close(SlotMap(name, 1e-3).vjp(z, cotangent), expected, 1e-12)


@pytest.mark.parametrize("name", WRITE_MAPS)
def test_inner_gradient_and_its_derivatives(name):
    """Spec (j) 1, 2: u is the gradient of the loss; du/dz is its Hessian, symmetric; du/dα = -J."""
    phi, target = SlotMap(name, 1e-3), torch.randn(6, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return 0.5 * (apply_map(name, z, 1e-3) - target).square().sum()

    def code(z: Tensor, a: Tensor = target) -> Tensor:
        return phi.code(z, a)

    for z in POINTS:
        gradient = torch.autograd.functional.jacobian(loss, z)
        hessian = torch.autograd.functional.hessian(loss, z)
        assert_close(code(z), gradient, 1e-10)
        products = torch.stack([phi.code_vjp(z, target, basis)[0] for basis in torch.eye(6, dtype=z.dtype)])
        assert_close(products, hessian, 1e-10)
        assert_close(products, products.T, 1e-10)
        jacobian = torch.autograd.functional.jacobian(lambda x: apply_map(name, x, 1e-3), z)
        products = torch.stack([phi.code_vjp(z, target, basis)[1] for basis in torch.eye(6, dtype=z.dtype)])
        assert_close(products, -jacobian.T, 1e-10)


def test_chunk_of_one_is_the_recurrence_and_refinements_lead_there():
    """Spec (j) 3: grid 1 is exact; after p refinements the first p + 1 tokens of a chunk are, and no more."""
    exact, _ = SlotCase(shape=(1, 8, 1, 8), options={"chunk_size": 1})("reference")
    for refinements in (0, 1, 3, 7):
        out, _ = SlotCase(shape=(1, 8, 1, 8), options={"chunk_size": 8, "refinements": refinements})("chunk")
        same = refinements + 1
        assert_close(out[:, :same], exact[:, :same], 1e-10)
        assert same == 8 or relative(out[:, same], exact[:, same]) > 1e-9


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_identity_is_a_delta_rule(chunk_size):
    """Spec (j) 4: with φ = identity the memory of keys is a delta rule that writes target codes."""
    options = {"chunk_size": chunk_size, "write_map": "identity", "read_map": "identity"}
    case = SlotCase(start=False, shape=(2, 70, 2, 8), options=options)
    _, state = case(output_final_state=True)
    tokens = case.tokens()
    step, decay = tokens["step"][..., :1], tokens["log_decay"]
    operands = (tokens["q"], tokens["k"], tokens["targets"], Gates(step, decay))
    grid = AnchoredOptions(chunk_size=chunk_size)
    expected, expected_state = anchored_linear(*operands, output_final_state=True, options=grid)
    assert_close(halves(state["memory"])[0], expected_state["memory_0"].mT, 1e-10)
    if chunk_size > 1:
        return
    memory, found = torch.zeros(2, 2, 6, 8, dtype=torch.float64), []
    for t in range(70):
        k, a = tokens["k"][:, t], tokens["targets"][:, t]
        code = torch.einsum("bhmd,bhd->bhm", memory, k) - a
        keep, rate = decay[:, t].exp().unsqueeze(-1), step[:, t].unsqueeze(-1)
        memory = keep * memory - rate * code.unsqueeze(-1) * k.unsqueeze(-2)
        found.append(torch.einsum("bhmd,bhd->bhm", memory, tokens["q"][:, t]))
    assert_close(expected, torch.stack(found, 1), 1e-10)
    assert_close(halves(state["memory"])[0], memory, 1e-10)


def test_small_steps_lead_to_attention_with_bounded_memory():
    """Spec (j) 5, 6: tiny steps, no decay, one-hot targets: S = Σ γ α wᵀ, which f = softmax reads as attention."""
    rate = 1e-5
    case = SlotCase(shape=(1, 20, 1, 8), start=False, decay=False)
    case.options = {"chunk_size": 1, "write_map": "identity", "read_map": "softmax"}
    case.operands["step"] = torch.full((1, 20, 1, 1), rate, dtype=torch.float64)
    case.operands["targets"] = functional.one_hot(torch.randint(6, (1, 20, 1)), 6).double()
    tokens = case.tokens()
    tokens["q"] = tokens["q"] / rate
    out, state = case(tokens=tokens, output_final_state=True)
    keys = rate * torch.einsum("bthm,bthd->bhmd", tokens["targets"], tokens["k"])
    values = rate * torch.einsum("bthm,bthd->bhmd", tokens["targets"], tokens["v"])
    assert_close(state["memory"], torch.cat([keys, values], 1), 10 * rate)
    weights = torch.einsum("bhmd,bhd->bhm", keys, tokens["q"][:, -1]).softmax(-1)
    assert_close(out[:, -1], torch.einsum("bhmd,bhm->bhd", values, weights), 10 * rate)


@pytest.mark.parametrize("write_map", WRITE_MAPS)
def test_a_memory_that_already_answers_only_decays(write_map):
    """Spec (j) 7."""
    case = SlotCase(shape=(1, 1, 2, 8), options={"chunk_size": 1, "write_map": write_map})
    tokens = case.tokens()
    tokens["v"] = tokens["k"]
    start = case.operands["start"]
    start[2:] = start[:2]
    point = torch.einsum("hmd,bthd->bthm", start[:2], tokens["k"])
    tokens["targets"] = apply_map(write_map, point, 1e-3)
    _, state = case(tokens=tokens, output_final_state=True)
    keep = tokens["log_decay"][:, 0].exp().repeat(1, 2, 1).unsqueeze(-1)
    assert_close(state["memory"], keep * start, 1e-12)


def test_gates_that_do_nothing_and_gates_that_erase():
    """Spec (j) 8."""
    case = SlotCase(options={"chunk_size": 4}, decay=False)
    case.operands["step"] = torch.zeros_like(case.operands["step"])
    _, state = case(output_final_state=True)
    assert torch.equal(state["memory"], case.operands["start"].expand(2, -1, -1, -1))
    case = SlotCase(options={"chunk_size": 1})
    step, decay = case.operands["step"].clone(), case.operands["log_decay"].clone()
    step[:, 20], decay[:, 20] = 0, -torch.inf
    case.operands |= {"step": step, "log_decay": decay}
    out, _ = case()
    assert out[:, 20].eq(0).all() and out[:, 19].ne(0).any() and out[:, 21].ne(0).any()


def test_codes_are_tangent_to_the_normalisation():
    """Spec (j) 9."""
    target = torch.randn_like(POINTS)
    slope = functional.sigmoid(POINTS) * (1 + POINTS * (1 - functional.sigmoid(POINTS)))
    code = SlotMap("ln_silu", 1e-3).code(POINTS, target) / slope
    assert code.sum(-1).abs().max() < 1e-10
    phi = SlotMap("l2_silu", 0.0)
    code = phi.code(POINTS, target) / slope
    assert (phi(POINTS) * code).sum(-1).abs().max() < 1e-10


@pytest.mark.parametrize("write_map", WRITE_MAPS)
def test_a_small_step_lowers_the_inner_loss(write_map):
    """Spec (j) 10."""
    case = SlotCase(shape=(1, 1, 2, 8), decay=False, options={"chunk_size": 1, "write_map": write_map})
    case.operands["step"] = torch.full_like(case.operands["step"], 1e-3)
    tokens = case.tokens()
    _, state = case(output_final_state=True)

    def loss(memory: Tensor) -> Tensor:
        point = torch.einsum("hmd,hd->hm", memory, tokens["k"][0, 0])
        return (apply_map(write_map, point, 1e-3) - tokens["targets"][0, 0]).square().sum(-1)

    assert (loss(state["memory"][0, :2]) < loss(case.operands["start"][:2])).all()


@pytest.mark.parametrize("form", ["reference", "chunk"])
def test_no_output_depends_on_later_tokens(form):
    """Spec (j) 10."""
    case = SlotCase(options={"chunk_size": 4}, shape=(1, 14, 1, 8)).require_grad()
    out, _ = case(form)
    operands = [x for name, x in case.operands.items() if name != "start"]
    for t in (0, 3, 4, 12):
        grads = torch.autograd.grad(out[:, t].sum(), operands, retain_graph=True)
        assert all(grad[:, t + 1 :].eq(0).all() for grad in grads)
        assert all(grad[:, : t + 1].ne(0).any() for grad in grads)


def test_maps_are_set_independently():
    """Spec (j) 13: what is read does not change what is written."""
    states = [SlotCase(options={"read_map": name})(output_final_state=True)[1] for name in READ_MAPS]
    for state in states[1:]:
        assert_states_close(state, states[0], 0)


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"chunk_size": 2, "write_map": "identity"}], ids=str)
def test_gradients_against_finite_differences(options):
    """Spec (j) 14."""
    case = SlotCase(shape=(1, 5, 1, 3), slots=3, options=options).require_grad()
    names = list(case.operands)

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors))
        gates = Gates(named.pop("step"), named.pop("log_decay"))
        return two_pass_slots(**named, gates=gates, options=SlotOptions(**options))[0]

    assert torch.autograd.gradcheck(run, tuple(case.operands.values()))


@pytest.mark.parametrize("write_map", ["identity", "ln_silu"])
def test_decay_products_may_underflow(write_map):
    """Spec (j) 15: 64 tokens that each keep 0.3, a gate at -200, and float32 forwards and backwards."""
    case = SlotCase(shape=(1, 130, 1, 16), slots=8, options={"chunk_size": 64, "write_map": write_map})
    case.operands["log_decay"] = torch.full((1, 130, 1, 1), 0.3, dtype=torch.float64).log()
    case.operands["log_decay"][:, 70] = -200.0
    expected, _ = case("reference")
    case.to(torch.float32).require_grad()
    out, _ = case("chunk")
    assert_close(out, expected, 1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), list(case.operands.values())))


def test_packed_sequences_equal_separate_ones():
    case = SlotCase(shape=(1, 40, 2, 8), options={"chunk_size": 4}, value_width=5)
    bounds = torch.tensor([0, 1, 18, 18, 40])
    packed, states = case(cu_seqlens=bounds, output_final_state=True)
    assert states["phase"].tolist() == [1, 1, 0, 2]
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if stop > start:
            alone, state = case(tokens=case.tokens(start, stop), output_final_state=True)
            assert_close(packed[:, start:stop], alone, 1e-12)
            assert_states_close({name: x[i : i + 1] for name, x in states.items()}, state, 1e-12)
    again, _ = case(cu_seqlens=bounds, initial_state=states)
    one, _ = case(tokens=case.tokens(18, 40), initial_state={name: x[3:] for name, x in states.items()})
    assert_close(again[:, 18:], one, 1e-12)


def test_rows_never_meet():
    case = SlotCase(options={"chunk_size": 4})
    out, _ = case()
    permuted, _ = case(tokens=case.tokens(rows=torch.tensor([1, 0])))
    assert_close(permuted, out.flip(0), 1e-12)
    case.operands["v"][1] = 1e3
    assert_close(case()[0][0], out[0], 1e-12)


def test_padding_moves_no_state():
    case = SlotCase(options={"chunk_size": 4})
    _, state = case(tokens=case.tokens(0, 6), output_final_state=True)
    for length in (1, 5):
        mask = torch.zeros(2, length, dtype=torch.bool)
        tokens = case.tokens(6, 6 + length)
        out, after = case(tokens=tokens, mask=mask, initial_state=state, output_final_state=True)
        assert out.eq(0).all()
        for name in state:
            assert torch.equal(after[name], state[name]), name


@pytest.mark.parametrize("length", [1, 9])
def test_runs_where_users_run_it(length):
    """no_grad, inference_mode and autocast give what training gives; low precision keeps float32 states."""
    case = SlotCase(shape=(2, length, 2, 8), options={"chunk_size": 4}).to(torch.float32)
    expected, state = case(output_final_state=True)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out, final = case(output_final_state=True)
            assert torch.allclose(out, expected, rtol=1e-6, atol=1e-7)
            assert_states_close(final, state, 1e-6)
            assert case(initial_state=final)[0].isfinite().all()
    out, final = case.to(torch.bfloat16)(output_final_state=True)
    assert out.dtype == torch.bfloat16 and final["memory"].dtype == torch.float32


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("what", ["long", "large", "repeated", "zero"])
def test_finite_in_bf16(what, start):
    case = SlotCase(shape=(1, 400, 1, 16), slots=16, start=start, options={"chunk_size": 16})
    if what == "large":
        case.operands["targets"] = case.operands["targets"] * 1e3
    if what == "repeated":
        case.operands |= {name: case.operands[name][:, :1].expand(1, 400, 1, 16) for name in "kv"}
    if what == "zero":
        case.operands |= {name: torch.zeros_like(case.operands[name]) for name in ("q", "k", "v", "targets")}
    case.to(torch.bfloat16).require_grad()
    out, _ = case()
    grads = torch.autograd.grad(out.float().square().sum(), list(case.operands.values()))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_decode_compiles_to_one_graph():
    case = SlotCase(options={"chunk_size": 4}).to(torch.float32)
    with torch.no_grad():
        _, state = case(tokens=case.tokens(0, 5), output_final_state=True)
        expected, final = state, state
        step = torch.compile(
            lambda tokens, state: case(tokens=tokens, initial_state=state, output_final_state=True),
            fullgraph=True,
            backend="eager",
        )
        torch._dynamo.reset()
        for t in range(5, 15):
            with torch._dynamo.config.patch(error_on_recompile=t > 6):
                out, final = step(case.tokens(t, t + 1), final)
            want, expected = case(tokens=case.tokens(t, t + 1), initial_state=expected, output_final_state=True)
            assert torch.allclose(out, want, rtol=1e-5, atol=1e-6)
    assert_states_close(final, expected, 1e-6)


def test_backward_keeps_the_root_of_the_number_of_chunks():
    """Quadrupling the chunks doubles what is kept."""

    def saved(time: int) -> int:
        case = SlotCase(shape=(1, time, 1, 8), slots=7, options={"chunk_size": 4}).to(torch.float32).require_grad()
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
            case()
        return sum(shape == (1, 2, 7, 8) for shape in shapes)

    assert saved(4 * 256) == 16 and saved(4 * 64) == 8


@pytest.mark.parametrize("chunk_size", [1, 16])
@pytest.mark.parametrize("write_map", WRITE_MAPS)
def test_conditioning_at_realistic_width(write_map, chunk_size):
    """64 slots of width 64, 2,048 tokens, unit keys, values of length 8 with the step that they allow, 2 % forgotten.

    Rounding must stay rounding, and what the first token said must fade, not grow.
    """
    case = SlotCase(shape=(1, 2048, 1, 64), slots=64, start=False)
    case.options = {"chunk_size": chunk_size, "write_map": write_map}
    case.operands["v"] = 8 * case.operands["v"]
    noise = torch.randn(1, 2048, 1, 2, dtype=torch.float64)
    step = 0.2 * noise[..., :1].sigmoid()
    case.operands["step"] = torch.cat([step, step / 64], -1)
    case.operands["log_decay"] = functional.logsigmoid(3.9 + noise[..., 1:])
    with torch.no_grad():
        exact, _ = case()
        changed = case.tokens()
        changed["k"] = torch.cat([-changed["k"][:, :1], changed["k"][:, 1:]], 1)
        other, _ = case(tokens=changed)
        low, _ = case.to(torch.float32)()
    assert_close(low[:, -50:], exact[:, -50:], 2e-6)
    assert relative(other[:, 1:50], exact[:, 1:50]) > 1e-3 and relative(other[:, -50:], exact[:, -50:]) < 1e-10


@pytest.mark.parametrize("write_map, write_eps", [("ln_silu", 1e-3), ("ln_silu", 1.0), ("identity", 1.0)])
def test_a_small_epsilon_lets_the_first_chunk_drown_the_others(write_map, write_eps):
    """Two chunks of pairs are written, then each value is asked for: how close is what is found, per chunk?

    At zero memories the Jacobian of a normalising map is 0.5 / √ε, 16 at 1e-3. What the first chunk writes is then so
    long that the map's division leaves later chunks next to nothing. A large ε, or no division, keeps the newest best.
    """
    case = SlotCase(shape=(16, 32, 1, 32), slots=32, start=False, dtype=torch.float32)
    case.options = {"write_map": write_map, "write_eps": write_eps, "chunk_size": 1 if write_map == "identity" else 16}
    case.operands["step"] = torch.full((16, 32, 1, 1), 0.1)
    case.operands["log_decay"] = torch.full((16, 32, 1, 1), 0.98).log()
    written = case.tokens()
    asking = {name: torch.zeros_like(x) for name, x in written.items()} | {"q": written["k"]}
    found, state = case(
        tokens={name: torch.cat([x, asking[name]], 1) for name, x in written.items()}, output_final_state=True
    )
    first, second = functional.cosine_similarity(found[:, 32:], written["v"], dim=-1).mean((0, 2)).view(2, 16).mean(1)
    length = state["memory"].norm(dim=(-2, -1)).mean()
    if write_eps < 1:
        assert first > 0.5 and second < 0.1 and length > 15
    else:
        assert second > first > 0.3 and second > 0.5 and length < 3


def test_gradients_at_realistic_width_in_float32():
    case = SlotCase(shape=(1, 512, 1, 64), slots=64, start=False)
    case.operands["log_decay"] = functional.logsigmoid(3.9 + torch.randn(1, 512, 1, 1, dtype=torch.float64))
    cotangent = torch.randn(1, 512, 1, 64, dtype=torch.float64)
    grads = []
    for dtype in (torch.float64, torch.float32):
        case.to(dtype).require_grad()
        out, _ = case()
        grads.append(torch.autograd.grad(out, list(case.operands.values()), cotangent.to(dtype)))
    for name, exact, low in zip(case.operands, *grads):
        assert_close(low, exact, 1e-4, f"gradient of {name}")


def test_errors_are_one_sentence():
    case = SlotCase(options={"chunk_size": 4})
    broken = [
        (lambda: case(mask=torch.ones(2, 5)), "mask"),
        (lambda: case(tokens=case.tokens() | {"k": case.operands["k"][:, :8]}), "`k`"),
        (lambda: case(tokens=case.tokens() | {"step": torch.ones(2, 37, 2, 3)}), "`step` has 3 sets"),
        (lambda: case(tokens=case.tokens() | {"q": torch.ones(2, 3)}), "`q` must be"),
        (lambda: case(cu_seqlens=torch.tensor([0, 37])), "one row"),
        (lambda: SlotOptions(chunk_size=0), "chunk_size"),
        (lambda: SlotOptions(write_map="softmax"), "write_map"),
        (lambda: SlotOptions(read_map="max"), "read_map"),
        (lambda: SlotOptions(refinements=16), "below chunk_size"),
        (lambda: SlotOptions(hypergrad=2.0), "between 0 and 1"),
        (lambda: case("triton?"), "form"),
        (lambda: case(initial_state={}), "missing or not expected"),
    ]
    for call, word in broken:
        with pytest.raises(ValueError, match=word) as error:
            call()
        assert "\n" not in str(error.value)
    tokens = case.tokens()
    gates = Gates(tokens.pop("step"), log_momentum=tokens.pop("log_decay"))
    with pytest.raises(ValueError, match="no momentum"):
        two_pass_slots(**tokens, gates=gates)
    _, state = SlotCase(options={"chunk_size": 8})(output_final_state=True)
    with pytest.raises(ValueError, match="written"):
        case(initial_state=state)
    _, state = case(output_final_state=True)
    for dtype in (torch.int32, torch.float32):
        with pytest.raises(ValueError, match=r"initial_state\['phase'\].*torch.int64"):
            case(initial_state=state | {"phase": state["phase"].to(dtype)})


def test_forms_can_be_forced():
    case = SlotCase(options={"chunk_size": 4})
    with force_form("reference"):
        out, _ = case("chunk")
    assert torch.equal(out, case("reference")[0])
