"""The benchmarks refuse what is wrong, and their rows say what they should."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import typer
from torch import Tensor

from hf_memory.kernels import AnchoredOptions, Gates, anchored_mlp
from hf_memory.kernels.benchmarks import first_call, floors, matmul, plot, registry, run, targets, titans_pytorch
from hf_memory.kernels.benchmarks.correctness import CPU_MODES, WrongResultError, check, relative_error
from hf_memory.kernels.benchmarks.inputs import Shape
from hf_memory.kernels.benchmarks.peers import FLA_MOMENTUM_DELTA_RULE
from hf_memory.kernels.benchmarks.registry import OPS, Op
from hf_memory.kernels.benchmarks.rows import RESULTS, Row, append, read
from hf_memory.kernels.benchmarks.timing import captured, measure, peak_memory, quantile


CPU = torch.device("cpu")
WIDTH = 8
needs_fla = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed")
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
    for mode in CPU_MODES:
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
    ops = ["anchored_mlp/16", "softmax_attention"]
    run.main(op=ops, form=["chunk"], quick=True, device="cpu", peers=True, output=file)
    rows = read(file)
    assert [(row.op, row.mode) for row in rows] == [
        (op, mode) for op in ("anchored_mlp", "softmax_attention") for mode in CPU_MODES
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
    with pytest.raises(typer.BadParameter, match="Unknown form 'fast'"):
        run.main(form=["fast"], device="cpu")
    with pytest.raises(typer.BadParameter, match="CUDA graphs need a GPU"):
        run.main(mode=["fwd", "fwd-graph"], device="cpu")


def test_float32_has_a_limit_of_its_own():
    op = replace(OPS["anchored_linear/16"], float32_error=1e-9)
    with pytest.raises(WrongResultError, match="allowed 1.0e-09"):
        check(op, op.providers(CPU)[0], WIDTH, torch.float32, "fwd", CPU)
    assert all(OPS[f"anchored_linear/{grid}"].float32_error == 1e-5 for grid in (1, 16, 64))


@needs_fla
def test_fla_computes_the_momentum_rule_where_its_precision_lasts():
    op = OPS["anchored_linear/1"]
    inputs = op.make(Shape(2, 70, 2, WIDTH), torch.Generator().manual_seed(0))
    inputs["log_momentum"] /= 50
    out = FLA_MOMENTUM_DELTA_RULE.forward(inputs)
    torch.testing.assert_close(out, op.truth(inputs), rtol=1e-3, atol=1e-4)
    # The op itself takes half precision only.
    low = {name: x.bfloat16() if name in ("q", "k", "v") else x for name, x in inputs.items()}
    assert 1e-4 < relative_error(FLA_MOMENTUM_DELTA_RULE.forward(low), out.double()) < 0.1


@needs_fla
def test_what_a_peer_is_off_by_is_a_result(tmp_path: Path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = {"op": ["anchored_linear/1"], "form": ["chunk"], "peers": True, "quick": True, "device": "cpu"}
    run.main(**arguments, mode=["fwd", "decode"], output=file)
    ours, peer, _, decoded = read(file)
    assert ours.error <= ours.allowed <= 1e-5 and decoded.error <= decoded.allowed
    assert peer.provider == "fla" and peer.error > 1e-2
    assert [line.endswith("inexact") for line in capsys.readouterr().out.splitlines()[2:4]] == [False, True]


def test_an_op_that_raises_fails_the_run_and_leaves_the_other_rows(tmp_path: Path, monkeypatch, capsys):
    def fails(inputs, state, final):
        raise ValueError("no such tile")

    monkeypatch.setitem(registry.OPS, "anchored_linear/1", replace(OPS["anchored_linear/1"], run=fails))
    file = tmp_path / "rows.jsonl"
    with pytest.raises(typer.Exit):
        run.main(op=["anchored_linear/1", "anchored_linear/16"], mode=["fwd"], quick=True, device="cpu", output=file)
    assert (
        "skipped: anchored_linear/1 by hf_memory chunk, 1x160x2x16, fwd: ValueError: no such"
        in capsys.readouterr().out
    )
    assert [row.grid for row in read(file)] == [16]


def test_compiled_chunk_form_is_one_graph(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    op = OPS["anchored_linear_norm/16"]
    provider = next(p for p in op.providers(CPU, peers=True) if p.form == "compiled")
    assert "compiled" not in [p.form for p in op.providers(CPU)]
    inputs = op.make(Shape(1, 32, 1, WIDTH), torch.Generator().manual_seed(0))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out = provider.forward(leaves)
    torch.testing.assert_close(out, op.truth(inputs), rtol=1e-4, atol=1e-5)
    torch.autograd.grad(out.sum(), list(leaves.values()))


def test_a_graph_is_captured_from_a_call_that_was_not_warmed_up_with(monkeypatch):
    # What Python does around a capture; the capture itself needs a GPU.
    cuda = MagicMock()
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    calls: list[list[int]] = []

    def make() -> Callable[[], Tensor]:
        calls.append([])
        mine = calls[-1]
        return lambda: mine.append(0) or torch.tensor(float(len(calls)))

    replay = captured(make, torch.device("cuda"))
    assert [len(made) for made in calls] == [3, 1]
    assert replay() == 2.0 and [len(made) for made in calls] == [3, 1]
    cuda.CUDAGraph.return_value.replay.assert_called_once_with()
    cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value)


def test_shapes_fit_the_op_and_the_mode():
    cuda, deep, linear = torch.device("cuda"), OPS["anchored_mlp/64"], OPS["anchored_linear/64"]
    assert {shape.width for mode in run.MODES for shape in run.default_shapes(deep, mode, "bfloat16", cuda)} == {64}
    shapes = partial(run.default_shapes, dtype="bfloat16", device=cuda)
    assert list(map(str, shapes(linear, "decode"))) == ["1x2048x16x128", "64x2048x16x128"]
    assert list(map(str, shapes(linear, "fwd-graph"))) == ["8x1024x8x64"]
    assert len(shapes(linear, "fwd+bwd")) == 5


def test_what_the_triton_form_does_not_take_is_no_job():
    """Slot memories on a GPU, at the sizes that the README of each op gives for its kernels."""
    pytest.importorskip("triton")
    slots = [op for op in OPS.values() if "slots" in op.name]
    cuda, dtypes = torch.device("cuda"), ["float32", "bfloat16"]
    found = list(run.jobs(slots, None, dtypes, run.MODES, cuda, False, []))

    def measured(label: str, form: str) -> set[tuple[str, str, int]]:
        mine = [job for job in found if job.op.label == label and job.provider.form == form]
        return {(job.mode, job.dtype, job.shape.width) for job in mine}

    at_64 = {(mode, dtype, 64) for mode in run.MODES for dtype in dtypes}
    at_32 = {(mode, dtype, 32 if dtype == "float32" else width) for mode, dtype, width in at_64}
    decoding = {which for which in at_64 if which[0].startswith("decode")}
    triton = {op.label: measured(op.label, "triton") for op in slots}
    trellis = {"two_pass_slots/16": at_32, "two_pass_slots_identity/1": decoding}
    assert triton == {"sphere_slots/1": at_64, "sphere_slots/16": at_64} | trellis
    assert measured("two_pass_slots_identity/1", "chunk") == at_64
    norm = [OPS["anchored_linear_norm/64"]]
    behind_norm = run.jobs(norm, None, dtypes, run.MODES, cuda, False, ["triton"])
    assert {job.mode for job in behind_norm if job.dtype == "float32"} == {"decode", "decode-graph"}
    named = [Shape(1, 8192, 16, 128)]
    assert list(run.jobs(slots, named, dtypes, ["fwd", "first-call"], cuda, False, ["triton"])) == []


def test_nothing_to_measure_is_said():
    with pytest.raises(typer.BadParameter, match="Nothing to measure on 'cpu': no form of two_pass_slots/16"):
        run.main(op=["two_pass_slots"], form=["triton"], device="cpu")


def test_first_call_starts_from_empty_caches(monkeypatch):
    job = run.Job(OPS["anchored_linear/16"], registry.OPS["anchored_linear/16"].providers(CPU)[0],
                  Shape(1, 66, 1, WIDTH), "float32", "first-call", CPU)  # fmt: skip
    found = first_call._first_call(job)
    assert found["milliseconds"] > 0 and found["peak_mib"] > 0
    seen = {}

    def fake(command, env, **options):
        seen.update(env)
        seen["module"], seen["job"] = command[2], command[-1]
        return subprocess.CompletedProcess(command, 0, '{"milliseconds": 7.0, "peak_mib": 1.0}', "")

    monkeypatch.setattr(first_call.subprocess, "run", fake)
    assert first_call.measure_first_call(job).median_ms == 7.0
    assert not any(Path(seen[name]).exists() for name in first_call.CACHES)
    again = first_call._job(json.loads(seen["job"]))
    assert seen["module"] == first_call.__name__
    assert (again.op, again.shape, again.provider.form) == (job.op, job.shape, "chunk")
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no kernel")
    monkeypatch.setattr(first_call.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(first_call.FirstCallError, match="no kernel"):
        first_call.measure_first_call(job)


def test_matmul_gets_a_row(tmp_path: Path):
    matmul.main(size=64, dtype="float32", device="cpu", seconds=0.0, output=tmp_path / "rows.jsonl")
    (row,) = read(tmp_path / "rows.jsonl")
    assert row.error <= row.allowed and matmul.rate(row) == pytest.approx(2 * 64**3 / (1e-3 * row.median_ms))


def test_floors_are_what_the_pages_say():
    for label, shape, kib in (
        ("anchored_linear/64", (64, 2048, 16, 128), 164),
        ("anchored_mlp/16", (1, 1, 1, 64), 308),
    ):
        op = OPS[label]
        counted = floors.cost(op.name, shape, op.grid, "bfloat16", "decode")
        assert counted.bytes == shape[0] * shape[2] * kib * 1024
    slots = floors.cost("two_pass_slots", (1, 1, 1, 64), 16, "bfloat16", "decode")
    assert slots.bytes == pytest.approx(44.1 * 1024, rel=1e-3)
    deep = floors.cost("anchored_mlp", (1, 1, 1, 64), 16, "bfloat16", "fwd")
    assert deep.operations == (88 + 16) * 64**2 + 20 * 16 * 64
    linear = floors.cost("anchored_linear", (1, 8192, 16, 128), 1, "bfloat16", "fwd")
    assert linear.bytes == 8192 * 16 * (4 * 128 * 2 + 3 * 4) and linear.links == 2 * 8192 / 64
    h200 = floors.gpu_of("NVIDIA H200")
    floor = floors.floor(linear, h200, "bfloat16")
    assert floor.memory_ms == pytest.approx(0.0283, rel=0.01) and floor.bound == "chain"
    assert floors.gpu_of("AMD EPYC, 2 cores") is None


def test_every_op_has_a_floor():
    for op in OPS.values():
        for mode in CPU_MODES:
            counted = floors.cost(op.name, (1, 256, 2, 64), op.grid, "bfloat16", mode)
            assert counted is not None and counted.bytes > 0
        assert floors.cost(op.name, (1, 256, 2, 64), op.grid, "bfloat16", "first-call") is None


def made_up(op: str, shape: str, ms: float, provider: str = "hf_memory", form: str = "triton", **changes) -> Row:
    fixed = {"dtype": "bfloat16", "mode": "fwd", "grid": 64, "options": "", "error": 1e-3, "allowed": 2e-2}
    times = {"median_ms": ms, "q20_ms": ms, "q80_ms": ms, "runs": 5, "first_call_ms": ms, "peak_mib": 1.0}
    where = {"device": "NVIDIA H200", "run": "now"}
    return Row(op=op, shape=shape, provider=provider, form=form, **fixed | times | where | changes)


def test_targets_compare_rows_of_one_run_and_device():
    fla = partial(made_up, "gated_delta_rule", targets.LONG, provider="fla", form="chunk", grid=1)
    ours = made_up("anchored_linear", targets.LONG, 0.88)

    def first_line(rows: list[Row]) -> list[str]:
        return targets.table(rows).splitlines()[2].split()

    assert first_line([fla(1.0), ours])[-3:] == ["0.88", "x", "yes"]
    assert first_line([fla(1.0), fla(0.5), ours])[-3:] == ["1.76", "x", "no"]
    for other in ({"run": "earlier"}, {"device": "NVIDIA H100 80GB HBM3"}):
        assert first_line([fla(1.0, **other), ours])[-2:] == ["-", "open"]
    with pytest.raises(ValueError, match="no rows"):
        targets.table([])


def test_each_target_is_measured_by_the_rows_that_it_needs():
    wanted = [
        made_up("anchored_mlp", "16x2048x16x64", 5.0, mode="fwd+bwd"),
        made_up("anchored_mlp", "16x2048x16x64", 20.0, form="compiled", mode="fwd+bwd"),
        made_up("matmul", "1x8192x1x8192", 1.4, provider="torch", form="matmul", grid=None),
        made_up("anchored_linear", "64x2048x16x128", 0.09, mode="decode"),
        made_up("anchored_linear", "64x2048x16x128", 0.045, mode="decode-graph"),
        made_up("anchored_mlp", "4x2048x16x64", 12e3, mode="first-call"),
        made_up("anchored_linear", "1x2048x16x128", 1.0, dtype="float32", mode="fwd+bwd", grid=1, error=6e-7),
    ]
    lines = [target.line(targets.Rows(wanted)) for target in targets.TARGETS]
    measured = {line[0]: (line[2], line[3]) for line in lines if line[3] != "open"}
    assert measured == {
        "linear, grid 1, float32, error": ("6e-07", "yes"),
        "deep, chunk 64, 16x2048x16x64, fwd+bwd, of the matmul rate": ("20.3 %", "yes"),
        "deep, chunk 64, 16x2048x16x64, compiled chunk form / ours": ("4 x", "yes"),
        "decode, linear, grid 64, 64x2048x16x128, of the byte floor": ("79.6 %", "yes"),
        "first call, cold caches, anchored_mlp": ("12 s", "no"),
    }


def test_plot_has_a_line_for_each_provider_and_the_floor(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rows = [
        made_up(op, f"1x{time}x16x128", time / 1e4, provider, form, grid=grid)
        for op, provider, form, grid in (
            ("anchored_linear", "hf_memory", "triton", 64),
            ("anchored_linear", "hf_memory", "chunk", 64),
            ("gated_delta_rule", "fla", "chunk", 1),
        )
        for time in (2048, 8192)
    ]
    (axes,) = plot.draw(rows).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"hf_memory, triton", "hf_memory, chunk", "fla, chunk (gated_delta_rule/1)", "floor"}
    assert list(lines["hf_memory, triton"].get_xdata()) == [2048, 8192]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    for row in rows:
        append(row, tmp_path / "rows.jsonl")
    plot.main(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="two lengths"):
        plot.draw(rows[:1])


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
