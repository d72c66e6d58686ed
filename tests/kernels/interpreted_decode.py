"""Decode kernels in Triton's interpreter against the float64 reference; `test_triton_decode.py` runs this file."""

from dataclasses import replace

import pytest
import torch
from op_inputs import Case, assert_close, assert_states_close
from torch import Tensor

from hf_memory.kernels import AnchoredOptions, Gates, State, decode_launch
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
    "linear, two folded tiles": (LINEAR | {"shape": (2, 40, 1, 8)}, {"chunk_size": 18}),
    "norm": (NORM, {"chunk_size": 4}),
    "norm, plain descent": (NORM | {"momentum": False, "decay": False}, {"chunk_size": 3} | INIT),
    "deep": (DEEP, {"chunk_size": 4} | INIT),
    "deep, online": (DEEP, {"chunk_size": 1, "activation": "silu"} | INIT),
    "deep, towards zero, no momentum": (
        DEEP | {"momentum": False, "norm": False}, {"chunk_size": 3, "activation": "gelu_pytorch_tanh"},
    ),
    "deep, three blocks of units": (DEEP | {"shape": (2, 8, 1, 12), "expansion": 3}, {"chunk_size": 3} | INIT),
}  # fmt: skip


def make(memory: dict, options: dict, **fields) -> Case:
    return Case(**({"shape": (2, 12, 2, 8)} | memory | fields), options=options)


def inputs_of(case: Case, start: int, mask: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Inputs:
    """Token `start`, with q, k and v in `dtype` and everything else in float32."""
    tokens = case.sliced(start, start + 1)
    gates = Gates(*(None if x is None else x.float() for x in tokens["gates"]))
    weights = [w.float() for w in case.weights]
    affine = None if case.affine is None else tuple(x.float() for x in case.affine)
    q, k, v = (tokens[name].to(dtype) for name in "qkv")
    inputs = check_inputs(q, k, v, gates, weights, affine, mask, AnchoredOptions(**case.options))
    return inputs._replace(q=q, k=k, v=v)


def float_state(state: State) -> State:
    return {name: x.float() if x.is_floating_point() else x for name, x in state.items()}


@pytest.mark.parametrize("processors", [1, 1000], ids=["whole", "split"])
@pytest.mark.parametrize("name", CASES)
def test_a_period_of_tokens_equals_the_reference(name: str, processors: int, monkeypatch):
    """Rows of different phases, one of them masked now and then, over more than one fold of each."""
    memory, options = CASES[name]
    if processors > 1 and memory["depth"] == 2:
        pytest.skip("a deep memory is never split")
    monkeypatch.setattr(decode_launch, "PROCESSORS_WITHOUT_GPU", processors)
    width = {"shape": (2, 12, 2, 24)} if processors > 1 and "shape" not in memory else {}
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
        assert supports(inputs)
        out, after = decode_step(inputs, state, in_place=True)
        assert after is state
        phases.add(tuple(state["phase"].tolist()))
        assert_close(out, expected[:, t : t + 1], 3e-6, f"token {t}")
    assert_states_close(state, expected_state, 5e-6)
    assert state["phase"].tolist() == expected_state["phase"].tolist()
    assert len(phases) > options["chunk_size"] or options["chunk_size"] == 1
