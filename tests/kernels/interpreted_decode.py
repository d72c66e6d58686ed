"""Decode kernels in Triton's interpreter against the float64 reference; `test_triton_decode.py` runs this file."""

import pytest
import torch
from op_inputs import Case, assert_close, assert_states_close
from torch import Tensor

from hf_memory import TitansConfig, TitansForCausalLM
from hf_memory.cache import MemoryCache, StaticMemoryCache
from hf_memory.kernels import AnchoredOptions, Gates, State, force_form
from hf_memory.kernels.anchored_linear import triton_decode as linear
from hf_memory.kernels.anchored_mlp.triton_decode import decode_step, supports
from hf_memory.kernels.types import Inputs, check_inputs


LINEAR, NORM, DEEP = {"depth": 1}, {"depth": 1, "norm": True}, {"depth": 2}
INIT = {"decay_target": "init"}

# Long enough for a fold of every row, whatever its phase.
CASES = {
    "linear, online": (LINEAR, {"chunk_size": 1}),
    "linear, gated delta rule": (LINEAR | {"momentum": False}, {"chunk_size": 1, "decay_before_grad": True}),
    "linear": (LINEAR, {"chunk_size": 5}),
    "linear, towards init": (LINEAR | {"decay": False}, {"chunk_size": 4} | INIT),
    "linear, two tiles of keys": (LINEAR | {"shape": (2, 9, 1, 40)}, {"chunk_size": 3}),
    "linear, two folded tiles": (LINEAR | {"shape": (2, 24, 1, 8)}, {"chunk_size": 18}),
    "norm": (NORM, {"chunk_size": 4}),
    "norm, plain descent": (NORM | {"momentum": False, "decay": False}, {"chunk_size": 3} | INIT),
    "deep": (DEEP, {"chunk_size": 4} | INIT),
    "deep, online": (DEEP | {"shape": (2, 6, 1, 8)}, {"chunk_size": 1, "activation": "silu"} | INIT),
    "deep, towards zero, no momentum": (
        DEEP | {"momentum": False, "norm": False}, {"chunk_size": 3, "activation": "gelu_pytorch_tanh"},
    ),
    "deep, three blocks of units": (DEEP | {"shape": (2, 8, 1, 12), "expansion": 3}, {"chunk_size": 3} | INIT),
}  # fmt: skip


def make(memory: dict, options: dict, **fields) -> Case:
    return Case(**({"shape": (2, 9, 2, 8)} | memory | fields), options=options)


def inputs_of(case: Case, start: int, mask: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Inputs:
    """Token `start`, with q, k and v in `dtype` and everything else in float32."""
    tokens = case.sliced(start, start + 1)
    gates = Gates(*(None if x is None else x.float() for x in tokens["gates"]))
    weights = [w.float() for w in case.weights]
    affine = None if case.affine is None else tuple(x.float() for x in case.affine)
    q, k, v = (tokens[name].to(dtype) for name in "qkv")
    inputs = check_inputs(
        q, k, v, gates, weights, affine, mask, AnchoredOptions(**{"overwrite_state": True, **case.options})
    )
    return inputs._replace(q=q, k=k, v=v)


def float_state(state: State) -> State:
    return {name: x.detach().float() if x.is_floating_point() else x for name, x in state.items()}


@pytest.mark.parametrize("processors", [1, 1000], ids=["whole", "split"])
@pytest.mark.parametrize("name", CASES)
def test_a_period_of_tokens_equals_the_reference(name: str, processors: int, monkeypatch):
    """Rows of different phases, one of them masked now and then, over more than one fold of each."""
    memory, options = CASES[name]
    if processors > 1 and memory["depth"] == 2:
        pytest.skip("a deep memory is never split")
    monkeypatch.setattr(linear, "multiprocessors", lambda device: processors)
    width = {"shape": (2, 9, 2, 24)} if processors > 1 and "shape" not in memory else {}
    case = make(memory, options, **width)
    time, prompt = case.shape[1], 3
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, 1] = mask[1, prompt + 1] = mask[1, prompt + 2] = False
    expected, expected_state = case("reference", mask=mask, output_final_state=True)

    _, state = case(
        "reference", tokens=case.sliced(0, prompt), mask=mask[:, :prompt], output_final_state=True
    )  # fmt: skip
    state = {name: x.contiguous() for name, x in float_state(state).items()}
    phases = {tuple(state["phase"].tolist())}
    for t in range(prompt, time):
        inputs = inputs_of(case, t, mask[:, t : t + 1])
        assert supports(inputs, state)
        out, after = decode_step(inputs, state)
        assert after is state
        phases.add(tuple(state["phase"].tolist()))
        assert_close(out, expected[:, t : t + 1], 3e-6, f"token {t}")
    assert_states_close(state, expected_state, 5e-6)
    assert state["phase"].tolist() == expected_state["phase"].tolist()
    assert len(phases) > options["chunk_size"] or options["chunk_size"] == 1


def prompted(case: Case, prompt: int) -> State:
    _, state = case("chunk", tokens=case.sliced(0, prompt), output_final_state=True)
    return {name: x.contiguous() for name, x in float_state(state).items()}


@pytest.mark.parametrize(
    ("memory", "dtype"), [(LINEAR, torch.float16), (DEEP, torch.bfloat16)], ids=["linear", "deep"]
)
def test_half_precision_operands(memory: dict, dtype: torch.dtype):
    """The state stays float32, and what is read is what the rounded operands say."""
    case = make(memory, {"chunk_size": 3} | INIT)
    case.q, case.k, case.v = (x.to(dtype).double() for x in (case.q, case.k, case.v))
    state = prompted(case, 3)
    expected, final = case("reference", output_final_state=True)
    for t in range(3, 7):
        out, state = decode_step(inputs_of(case, t, dtype=dtype), state)
        assert out.dtype == dtype and out.is_contiguous()
        assert_close(out, expected[:, t : t + 1], 2e-3 if dtype == torch.float16 else 1e-2)
    expected, final = case("reference", tokens=case.sliced(0, 7), output_final_state=True)
    assert_states_close(state, final, 5e-6)


@pytest.mark.parametrize("memory", [LINEAR, DEEP], ids=["linear", "deep"])
def test_a_state_is_only_overwritten_on_request(memory: dict):
    case = make(memory, {"chunk_size": 3} | INIT).to(torch.float32)
    before = prompted(case, 5)
    kept = {name: x.clone() for name, x in before.items()}
    tokens = case.sliced(5, 6)
    out, after = case("triton", tokens=tokens, initial_state=before, output_final_state=True)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert not {x.data_ptr() for x in before.values()} & {x.data_ptr() for x in after.values()}
    case.options["overwrite_state"] = True
    again, same = case("triton", tokens=tokens, initial_state=before, output_final_state=True)
    assert torch.equal(out, again) and all(same[name] is before[name] for name in before)
    assert_states_close(before, after, 0)


@pytest.mark.parametrize("form", ["triton", "chunk"])
@pytest.mark.parametrize("memory", [LINEAR, NORM, DEEP], ids=["linear", "norm", "deep"])
def test_what_a_prompt_leaves_can_be_overwritten(memory: dict, form: str):
    """As it comes from the prompt: nothing is copied in between."""
    case = make(memory, {"chunk_size": 3, "overwrite_state": True} | INIT).to(torch.float32)
    expected, _ = case("chunk", tokens=case.sliced(0, 6))
    _, state = case(form, tokens=case.sliced(0, 5), output_final_state=True)
    out, after = case("triton", tokens=case.sliced(5, 6), initial_state=state, output_final_state=True)
    assert all(after[name] is x for name, x in state.items())
    assert_close(out, expected[:, 5:], 5e-6)


def test_operands_may_be_views():
    """q, k and v as slices of one projection, expanded gates, a mask that is a slice."""
    case = make(LINEAR, {"chunk_size": 3, "overwrite_state": False}, shape=(2, 6, 2, 8)).to(torch.float32)
    state = prompted(case, 3)
    mask = torch.tensor([[True, False], [False, True]])[:, 1:]
    inputs = inputs_of(case, 4, mask)
    expected, _ = decode_step(inputs, state)
    mixed = torch.cat([x.flatten(2) for x in inputs[:3]], dim=-1).unflatten(-1, (3, 2, 8))
    q, k, v = mixed.unbind(-3)
    out, _ = decode_step(inputs._replace(q=q, k=k, v=v), state)
    assert torch.equal(out, expected)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    gates = Gates(*(x.mT.contiguous().mT for x in inputs.gates))
    out, _ = decode_step(inputs._replace(q=q, k=k, v=v, gates=gates), state)
    assert torch.equal(out, expected)


def test_what_the_kernels_do_not_take_goes_to_the_other_form():
    for memory, options in (
        (LINEAR | {"kind": "channel"}, {"chunk_size": 4}),
        ({"depth": 3}, {"chunk_size": 4} | INIT),
        (LINEAR, {"chunk_size": 65}),
    ):
        case = make(memory, options)
        state = prompted(case, 3)
        assert not supports(inputs_of(case, 3), state)
        case.to(torch.float32)
        out, _ = case("triton", tokens=case.sliced(3, 4), initial_state=state)
        assert torch.equal(out, case("chunk", tokens=case.sliced(3, 4), initial_state=state)[0])
    case = make(LINEAR, {"chunk_size": 4})
    state = prompted(case, 3)
    inputs = inputs_of(case, 3)
    assert supports(inputs, state)
    assert not supports(inputs_of(case, 3, dtype=torch.float64), state)
    assert not supports(inputs, state | {"keys": state["keys"].double()})
    # Kernels have no backward: for what autograd watches, state included, there is the other form.
    watched = state | {"memory_0": state["memory_0"].clone().requires_grad_()}
    for operands in ((inputs._replace(q=inputs.q.clone().requires_grad_()), state), (inputs, watched)):
        assert not supports(*operands)
        with torch.no_grad():
            assert supports(*operands)
    with pytest.raises(ValueError, match="'memory_0'.* not contiguous"):
        decode_step(inputs, state | {"memory_0": state["memory_0"].mT})


@pytest.mark.parametrize(("memory", "overwrite"), [(LINEAR, False), (DEEP, True)], ids=["linear", "deep"])
def test_decoding_compiles_to_one_graph(memory: dict, overwrite: bool):
    case = make(memory, {"chunk_size": 3, "overwrite_state": overwrite} | INIT).to(torch.float32).require_grad()
    with torch.no_grad():
        final = prompted(case, 4)
        expected, want_state = case("chunk", tokens=case.sliced(4, 9), initial_state=final, output_final_state=True)
        final = {name: x.clone() for name, x in final.items()}
        step = torch.compile(
            lambda tokens, state: case("triton", tokens=tokens, initial_state=state, output_final_state=True),
            fullgraph=True,
            backend="eager",
        )
        torch._dynamo.reset()
        for t in range(4, 9):
            with torch._dynamo.config.patch(error_on_recompile=t > 5):
                out, final = step(case.sliced(t, t + 1), final)
            assert_close(out, expected[:, t - 4 : t - 3], 3e-6)
    assert_states_close(final, want_state, 5e-6)


@pytest.mark.parametrize(("depth", "kind"), [(1, "static"), (2, "dynamic")])
def test_a_model_decodes_where_its_cache_lies(depth: int, kind: str):
    """As without the kernels; forks, states that somebody kept and the learned start stay as they were."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    config = TitansConfig(**sizes, num_attention_heads=2, chunk_size=3, memory_depth=depth, memory_expansion=2)
    model = TitansForCausalLM(config).eval()
    ids = torch.randint(50, (2, 10))
    parameters = {name: x.clone() for name, x in model.named_parameters()}
    cache = MemoryCache(config) if kind == "dynamic" else StaticMemoryCache(config, max_cache_len=16)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :4], past_key_values=cache)
        kept = cache.layers[0].get_states()
        copies, addresses = {name: x.clone() for name, x in kept.items()}, set()
        for t in range(4, 7):
            with force_form("triton"):
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, t : t + 1], atol=1e-5, rtol=1e-4)
            addresses.add(cache.layers[0].states["memory.keys"].data_ptr())
            if t == 5:
                fork = cache.clone()
        for tokens in (ids[:, 6:], ids[:, 6:7]):
            with force_form("triton" if tokens.shape[1] == 1 else None):
                logits = model(tokens, past_key_values=fork.clone()).logits
            torch.testing.assert_close(logits, expected[:, 6 : 6 + tokens.shape[1]], atol=1e-5, rtol=1e-4)
    # A dynamic layer copies once, as somebody holds what the prompt left.
    assert len(addresses) == 1 and (kept["memory.keys"].data_ptr() in addresses) == (kind == "static")
    if kind == "dynamic":
        assert all(torch.equal(kept[name], copies[name]) for name in copies)
    assert all(torch.equal(x, parameters[name]) for name, x in model.named_parameters())
