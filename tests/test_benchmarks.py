"""The benchmarks refuse what is wrong, and their rows say what they should."""

import importlib.util
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor

from hf_memory.kernels import AnchoredOptions, Gates, anchored_mlp
from hf_memory.kernels.benchmarks import registry, run, titans_pytorch
from hf_memory.kernels.benchmarks.correctness import MODES, WrongResultError, check
from hf_memory.kernels.benchmarks.inputs import Shape
from hf_memory.kernels.benchmarks.registry import OPS, Op
from hf_memory.kernels.benchmarks.rows import RESULTS, Row, read
from hf_memory.kernels.benchmarks.timing import measure, peak_memory, quantile


CPU = torch.device("cpu")
WIDTH = 8
needs_titans_pytorch = pytest.mark.skipif(
    importlib.util.find_spec("titans_pytorch") is None, reason="titans-pytorch is not installed"
)


def spoiled(op: Op, spoil: Callable[[Tensor], Tensor]) -> Op:
    """An op whose outputs differ from its definition."""

    def wrong(inputs, state, final):
        out, state = op.run(inputs, state, final)
        return spoil(out), state

    return replace(op, run=wrong)


@pytest.mark.parametrize("label", OPS)
def test_every_op_passes_its_check(label: str):
    provider = OPS[label].providers(CPU, peers=True)[0]
    for mode in MODES:
        result = check(OPS[label], provider, WIDTH, torch.float32, mode, CPU)
        assert result.error <= result.allowed


def test_low_precision_is_checked_against_what_it_costs():
    op = OPS["anchored_linear/16"]
    result = check(op, op.providers(CPU)[0], WIDTH, torch.bfloat16, "fwd+bwd", CPU)
    assert 1e-4 < result.error <= result.allowed < 5e-2


@pytest.mark.parametrize(
    ("spoil", "mode"),
    [
        (lambda out: 1.001 * out, "fwd"),
        (lambda out: out.roll(1, dims=0), "fwd"),
        (lambda out: out * torch.where(torch.arange(out.shape[1]) == 134, torch.nan, 1.0)[:, None, None], "fwd"),
        (lambda out: 1.001 * out, "decode"),
        (lambda out: out.detach() + 0.999 * (out - out.detach()), "fwd+bwd"),
    ],
    ids=["scaled", "rows mixed up", "last token not finite", "scaled while decoding", "gradient scaled"],
)
def test_a_wrong_op_is_refused(spoil: Callable[[Tensor], Tensor], mode: str):
    op = spoiled(OPS["anchored_linear/16"], spoil)
    with pytest.raises(WrongResultError, match="anchored_linear/16"):
        check(op, op.providers(CPU)[0], WIDTH, torch.float32, mode, CPU)


def test_a_wrong_op_gets_no_row_and_fails_the_run(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(registry.OPS, "anchored_linear/16", spoiled(OPS["anchored_linear/16"], lambda out: 1.01 * out))
    with pytest.raises(typer.Exit):
        run.main(op=["anchored_linear/16"], quick=True, device="cpu", output=tmp_path / "rows.jsonl")
    assert "wrong: anchored_linear/16" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_have_every_field(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    run.main(op=["anchored_mlp/16", "softmax_attention"], quick=True, device="cpu", peers=True, output=file)
    rows = read(file)
    assert [(row.op, row.mode) for row in rows] == [
        (op, mode) for op in ("anchored_mlp", "softmax_attention") for mode in MODES
    ]
    for row in rows:
        assert row.q20_ms <= row.median_ms <= row.q80_ms
        assert row.first_call_ms > 0 and row.peak_mib > 0 and row.runs >= 5
        assert row.error <= row.allowed
        assert row.shape == run.QUICK_SHAPE and row.dtype == "float32"
        assert row.device and row.time and row.threads >= 1
        assert {"python", "torch"} <= set(row.versions)
    assert rows[0].grid == 16 and rows[-1].grid is None
    with pytest.raises(ValueError, match="missing {'op'}"):
        Row.from_json(rows[0].to_json().replace('"op": "anchored_mlp", ', ""))


def test_recorded_rows_can_be_read():
    names = {field.name for field in fields(Row)}
    for file in RESULTS.glob("*.jsonl"):
        assert all(set(vars(row)) == names for row in read(file))


def test_measurements():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)
    mib = 2**18
    assert peak_memory(lambda: torch.zeros(3 * mib) + torch.ones(3 * mib), CPU) == pytest.approx(9, abs=0.1)
    assert peak_memory(lambda: [torch.zeros(mib) for _ in range(2)] and torch.zeros(mib), CPU) == pytest.approx(2, 0.1)
    calls: list[int] = []
    timing = measure(lambda: calls.append(0), CPU, seconds=0.0, min_runs=7)
    assert timing.runs == 7 and len(calls) == 9


@pytest.mark.parametrize("text", ["1x2x3", "1x2x3xD", "0x2x3x4", ""])
def test_a_wrong_shape_is_named(text: str):
    with pytest.raises(ValueError, match="BATCHxTIMExHEADSxWIDTH"):
        Shape.parse(text)


def test_unknown_names_are_refused():
    with pytest.raises(typer.BadParameter, match="Unknown op 'anchored'"):
        run.main(op=["anchored"], device="cpu")
    with pytest.raises(typer.BadParameter, match="Unknown dtype 'fp8'"):
        run.main(dtype=["fp8"], device="cpu")


@needs_titans_pytorch
def test_titans_pytorch_computes_the_recurrence_that_it_is_timed_for():
    from titans_pytorch import MemoryMLP, NeuralMemory

    heads, width, chunk = 2, 8, 16
    # Without its norm, whose scale titans-pytorch also trains while it reads.
    layer = NeuralMemory(
        dim=heads * width,
        heads=heads,
        dim_head=width,
        chunk_size=1,
        batch_size=chunk,
        model=MemoryMLP(dim=width, depth=2, expansion_factor=4),
        mem_model_norm_add_residual=False,
    ).double()
    x = torch.randn(1, 3 * chunk, heads * width, dtype=torch.float64)
    stored, asked = layer.store_norm(x), layer.retrieve_norm(x)

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, width))

    def per_layer(gate: Tensor) -> Tensor:
        return gate.unsqueeze(-1).expand(*gate.shape, 2)

    # Its loss is a mean over channels, ours half a sum.
    step = layer.to_adaptive_step[0](stored).sigmoid() * 2 / width
    keep, momentum = (-layer.to_decay_factor[0](stored)).sigmoid(), layer.to_momentum[0](stored).sigmoid()
    out, _ = anchored_mlp(
        split(layer.to_queries(asked)),
        split(layer.to_keys(stored)),
        split(layer.to_values(stored)),
        Gates(per_layer(step), per_layer(keep.log()), per_layer(momentum.log())),
        list(layer.memory_model_parameters),
        None,
        options=AnchoredOptions(chunk_size=chunk, decay_target="zero"),
    )
    gate = layer.retrieve_gate[0](asked).sigmoid().unsqueeze(-1)
    torch.testing.assert_close(layer.combine_heads((out * gate).flatten(-2)), layer(x)[0], rtol=1e-10, atol=1e-12)


@needs_titans_pytorch
def test_comparison_with_titans_pytorch(tmp_path: Path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = {"tokens": 128, "heads": 2, "width": 8, "rounds": 1, "threads": torch.get_num_threads()}
    titans_pytorch.main(**arguments, output=file)
    assert "x layer" in capsys.readouterr().out
    assert [(row.provider, row.form) for row in read(file)] == [
        ("hf_memory", "chunk"),
        ("hf_memory", "chunk"),
        ("titans_pytorch", "chunk_size=1"),
        ("titans_pytorch", "chunk_size=64"),
    ]
    with pytest.raises(typer.Exit):
        titans_pytorch.main(**arguments, peer_chunk_size=[1], at_least=1e6, output=file)
