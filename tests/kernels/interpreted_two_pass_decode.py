"""The decode kernel of `two_pass_slots` in Triton's interpreter against the float64 reference.

`test_triton_two_pass.py` runs this file.
"""

import pytest
import torch
from op_inputs import assert_close, assert_states_close
from torch import Tensor
from two_pass_inputs import SlotCase

from hf_memory import TrellisConfig, TrellisForCausalLM
from hf_memory.cache import MemoryCache, StaticMemoryCache
from hf_memory.kernels import Gates, SlotOptions, State, force_form
from hf_memory.kernels.two_pass_slots import triton_decode
from hf_memory.kernels.two_pass_slots.inputs import check_inputs


PROMPT = 3
# Long enough for two folds of every row, whatever its phase.
CASES = {
    "default maps": ({}, {"chunk_size": 4}),
    "online": ({"shape": (2, 7, 2, 8), "sets": 1}, {"chunk_size": 1, "read_map": "l2_silu"}),
    "one set of gates, narrow values": (
        {"sets": 1, "value_width": 5, "slots": 20}, {"chunk_size": 3, "write_map": "l2_silu", "read_map": "silu"},
    ),
    "wide values": ({"value_width": 24}, {"chunk_size": 3, "write_map": "silu", "read_map": "softmax"}),
    "identity": ({"start": False}, {"chunk_size": 4, "write_map": "identity", "read_map": "identity"}),
    "no decay": ({"decay": False}, {"chunk_size": 3}),
    "a decay for each memory": ({"shape": (2, 11, 1, 8)}, {"chunk_size": 3}),
    "online, a decay for each memory": ({"shape": (2, 7, 1, 8)}, {"chunk_size": 1}),
    "two folded tiles": ({"shape": (2, 38, 1, 8)}, {"chunk_size": 17}),
    "more than a block of slots and width": ({"shape": (2, 11, 1, 36), "slots": 40}, {"chunk_size": 3}),
}  # fmt: skip


def make(settings: dict, options: dict, **fields) -> SlotCase:
    """A case whose values float32 holds exactly, so that all forms get the same."""
    case = SlotCase(**{"shape": (2, 13, 2, 8)} | settings | fields, options=options)
    return case.to(torch.float32).to(torch.float64)


def float_state(state: State) -> State:
    return {name: x.detach().float() if x.is_floating_point() else x for name, x in state.items()}


def decode(
    case: SlotCase, t: int, state: State, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, State]:
    """Token `t` through the kernel, with q, k, v and targets in `dtype`, in place unless the options say otherwise."""
    tokens = case.tokens(t, t + 1)
    gates = Gates(tokens.pop("step").float(), tokens["log_decay"].float() if "log_decay" in tokens else None)
    options = SlotOptions(**{"overwrite_state": True, **case.options})
    low = (tokens[name].to(dtype) for name in ("q", "k", "v", "targets"))
    operands = check_inputs(*low, gates, None, mask, options)
    assert triton_decode.supports(operands, state)
    return triton_decode.decode_step(operands, state)


def prompted(case: SlotCase, prompt: int, form: str = "chunk") -> State:
    _, state = case(form, case.tokens(0, prompt), output_final_state=True)
    return float_state(state)


@pytest.mark.parametrize("name", CASES)
def test_tokens_over_several_chunks_equal_the_reference(name: str):
    """Rows of different phases, each masked now and then, over more than two folds."""
    case = make(*CASES[name])
    if "a decay for each" in name:
        decay = case.operands["log_decay"]
        case.operands["log_decay"] = torch.cat([decay, 3 * decay], dim=-1).float().double()
    time, chunk = case.shape[1], case.options["chunk_size"]
    prompt = max(PROMPT, chunk - 1)
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, 1] = mask[1, prompt + 1] = mask[1, prompt + 2] = False
    expected, expected_state = case("reference", mask=mask, output_final_state=True)
    _, state = case("reference", case.tokens(0, prompt), mask=mask[:, :prompt], output_final_state=True)
    state, phases, folds = float_state(state), set(), torch.zeros(2)
    for t in range(prompt, time):
        phases.add(tuple(state["phase"].tolist()))
        before = {name: x.clone() for name, x in state.items()}
        out, after = decode(case, t, state, mask[:, t : t + 1])
        assert after is state
        assert_close(out, expected[:, t : t + 1], 3e-6, f"token {t}")
        folds += mask[:, t] & (state["phase"] == 0)
        for row in (~mask[:, t]).nonzero().flatten():
            assert (out[row] == 0).all() and all(torch.equal(x[row], before[name][row]) for name, x in state.items())
    assert_states_close(state, expected_state, 5e-6)
    assert state["phase"].tolist() == expected_state["phase"].tolist()
    assert folds.min() >= 2 and (chunk == 1 or any(a != b for a, b in phases))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_operands(dtype: torch.dtype):
    """The state stays float32, and what is read is what the rounded operands say."""
    case = make({"shape": (2, 8, 1, 8)}, {"chunk_size": 3})
    for name in ("q", "k", "v", "targets"):
        case.operands[name] = case.operands[name].to(dtype).double()
    expected, final = case("reference", output_final_state=True)
    state = prompted(case, PROMPT)
    for t in range(PROMPT, case.shape[1]):
        out, state = decode(case, t, state, dtype=dtype)
        assert out.dtype == dtype and out.is_contiguous()
        assert_close(out, expected[:, t : t + 1], 2e-3 if dtype == torch.float16 else 1e-2)
    assert_states_close(state, final, 5e-6)


def test_gates_that_erase():
    case = make({"shape": (1, 9, 2, 8)}, {"chunk_size": 4})
    case.operands["log_decay"] = case.operands["log_decay"] - 60.0
    case.operands["log_decay"][:, 5] = -200.0
    expected, final = case("reference", output_final_state=True)
    state = prompted(case, PROMPT)
    for t in range(PROMPT, case.shape[1]):
        out, state = decode(case, t, state)
        assert_close(out, expected[:, t : t + 1], 1e-5, f"token {t}")
    assert_states_close(state, final, 1e-5)


@pytest.mark.parametrize("time", [5, 6], ids=["within a chunk", "at its end"])
def test_a_state_is_only_overwritten_on_request(time: int):
    case = make({}, {"chunk_size": 3}).to(torch.float32)
    before = prompted(case, time)
    kept = {name: x.clone() for name, x in before.items()}
    tokens = case.tokens(time, time + 1)
    out, after = case("triton", tokens, initial_state=before, output_final_state=True)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert not {x.data_ptr() for x in before.values()} & {x.data_ptr() for x in after.values()}
    case.options["overwrite_state"] = True
    again, same = case("triton", tokens, initial_state=before, output_final_state=True)
    assert torch.equal(out, again) and all(same[name] is before[name] for name in before)
    assert_states_close(before, after, 0)


@pytest.mark.parametrize("form", ["triton", "chunk"])
@pytest.mark.parametrize("prompt", [2, 5])
def test_what_a_prompt_leaves_can_be_overwritten(form: str, prompt: int):
    """As it comes from the prompt, with nothing copied in between; the learned start stays as it was."""
    case = make({"shape": (1, 6, 2, 8)}, {"chunk_size": 3, "overwrite_state": True}).to(torch.float32)
    start = case.operands["start"].clone()
    expected, _ = case("chunk", case.tokens(0, prompt + 1))
    _, state = case(form, case.tokens(0, prompt), output_final_state=True)
    out, after = case("triton", case.tokens(prompt, prompt + 1), initial_state=state, output_final_state=True)
    assert all(after[name] is x for name, x in state.items())
    assert_close(out, expected[:, prompt:], 5e-6)
    assert torch.equal(case.operands["start"], start)


def test_operands_may_be_views():
    """q, k and v as slices of one projection, gates of any strides, a mask that is a slice."""
    case = make({"sets": 2}, {"chunk_size": 3}).to(torch.float32)
    state, tokens = prompted(case, PROMPT), case.tokens(4, 5)
    mask = torch.tensor([[True, False], [False, True]])[:, 1:]
    expected, _ = case("triton", dict(tokens), initial_state=state, mask=mask)
    mixed = torch.cat([tokens[name].flatten(2) for name in "qkv"], dim=-1).unflatten(-1, (3, 2, 8))
    slices = dict(zip("qkv", mixed.unbind(-3)))
    turned = {name: x.transpose(2, 3).contiguous().transpose(2, 3) for name, x in tokens.items()}
    for views in (tokens | slices, turned):
        out, _ = case("triton", dict(views), initial_state=state, mask=mask)
        assert torch.equal(out, expected)


def test_what_the_kernel_does_not_take_goes_to_the_other_form():
    for settings, options in (
        ({}, {"chunk_size": 4, "refinements": 1}),
        ({}, {"chunk_size": 65}),
        ({"shape": (1, 4, 1, 130), "slots": 70}, {"chunk_size": 4}),
    ):
        case = make(settings, options)
        state = prompted(case, PROMPT)
        case.to(torch.float32)
        out, _ = case("triton", case.tokens(3, 4), initial_state=state)
        assert torch.equal(out, case("chunk", case.tokens(3, 4), initial_state=state)[0])
    # Kernels have no backward: for what autograd watches, state included, there is the other form.
    case = make({}, {"chunk_size": 4}).to(torch.float32)
    state = prompted(case, PROMPT)
    watched = state | {"memory": state["memory"].clone().requires_grad_()}
    out, _ = case("triton", case.tokens(3, 4), initial_state=watched)
    torch.autograd.grad(out.sum(), watched["memory"])
    with torch.no_grad():
        assert not case("triton", case.tokens(3, 4), initial_state=watched)[0].requires_grad
    case.options["overwrite_state"] = True
    with pytest.raises(ValueError, match="'memory'.* not contiguous"):
        case("triton", case.tokens(3, 4), initial_state=state | {"memory": state["memory"].mT.contiguous().mT})


@pytest.mark.parametrize("overwrite", [False, True])
def test_decoding_compiles_to_one_graph(overwrite: bool):
    case = make({}, {"chunk_size": 3, "overwrite_state": overwrite}).to(torch.float32).require_grad()
    with torch.no_grad():
        final = prompted(case, 4)
        expected, want_state = case("chunk", case.tokens(4, 9), initial_state=final, output_final_state=True)
        final = {name: x.clone() for name, x in final.items()}
        step = torch.compile(
            lambda tokens, state: case("triton", tokens, initial_state=state, output_final_state=True),
            fullgraph=True,
            backend="eager",
        )
        torch._dynamo.reset()
        for t in range(4, 9):
            with torch._dynamo.config.patch(error_on_recompile=t > 5):
                out, final = step(case.tokens(t, t + 1), final)
            assert_close(out, expected[:, t - 4 : t - 3], 3e-6)
    assert_states_close(final, want_state, 5e-6)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_model_decodes_where_its_cache_lies(kind: str):
    """As without the kernel; forks, states that somebody kept and the learned start stay as they were."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    config = TrellisConfig(
        **sizes, num_attention_heads=2, chunk_size=3, num_slots=16, learn_initial_memory=True, initializer_range=0.2
    )
    model = TrellisForCausalLM(config).eval()
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
            torch.testing.assert_close(logits, expected[:, t : t + 1], atol=1e-4, rtol=1e-3)
            addresses.add(cache.layers[0].states["memory.memory"].data_ptr())
            if t == 5:
                fork = cache.clone()
        for tokens in (ids[:, 6:], ids[:, 6:7]):
            with force_form("triton" if tokens.shape[1] == 1 else None):
                logits = model(tokens, past_key_values=fork.clone()).logits
            torch.testing.assert_close(logits, expected[:, 6 : 6 + tokens.shape[1]], atol=1e-4, rtol=1e-3)
    # A dynamic layer copies once, as somebody holds what the prompt left.
    assert len(addresses) == 1 and (kept["memory.memory"].data_ptr() in addresses) == (kind == "static")
    if kind == "dynamic":
        assert all(torch.equal(kept[name], copies[name]) for name in copies)
    assert all(torch.equal(x, parameters[name]) for name, x in model.named_parameters())
