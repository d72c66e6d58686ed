"""Every example in its smallest size, and what it promises."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from rich.progress import Progress

from hf_memory.kernels.benchmarks import run as benchmark
from hf_memory.kernels.benchmarks.inputs import Shape


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TINY_TRAINING = {"size": "16x1x2", "context": 32, "batch": 2, "eval_blocks": 4, "tokens": 256}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Import an example as its script would find itself: with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = torch.get_num_threads()

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(before)
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def click_command(main):
    """The command line that `typer.run` makes of a function."""
    app = typer.Typer()
    app.command()(main)
    return typer.main.get_command(app)


def test_readme_shows_how_to_run_every_script():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.glob("*.py") if "typer.run(" in path.read_text(encoding="utf-8")}
    assert scripts == set(re.findall(r"python examples/(\w+\.py)", readme))


def test_text_is_split_by_whole_packages(example):
    stdlib = example("stdlib_text")
    training, held_out = stdlib.source_files()
    names = {path.name for path in held_out}
    assert "decoder.py" in names and "base_events.py" in names
    assert not set(training) & set(held_out)
    assert not any({"site-packages", "test", "json"} & set(path.parts[-2:-1]) for path in training)
    text = stdlib.read(held_out[:2])
    assert len(text) == sum(path.stat().st_size + 1 for path in held_out[:2])
    assert stdlib.read(held_out, limit=10).tobytes() == text[:10].tobytes()


def test_million_tokens_keeps_its_state_size(example, tmp_path: Path, capsys):
    tokens = {"tokens": 1500, "piece": 256, "hidden": 16, "heads": 2, "layers": 1}
    example("million_tokens").main(**tokens, plot_file=tmp_path / "plot.png")
    output = capsys.readouterr().out
    start, end = (re.search(rf"state, {which} piece +([\d,]+) bytes", output)[1] for which in ("first", "last"))
    assert start == end and "(equal)" in output
    assert f"{2 * 4 * 16 * 1500:,} bytes for as many tokens" in output
    assert re.search(r"last 64k tokens +[\d,]+ tokens/s", output)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_million_tokens_reports_what_it_has_on_ctrl_c(example, monkeypatch):
    million = example("million_tokens")
    all_pieces = million.pieces

    def interrupted(tokens: int, length: int):
        for i, piece in enumerate(all_pieces(tokens, length)):
            if i == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(million, "pieces", interrupted)
    config = million.TitansConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with Progress(disable=True) as progress:
        reading = million.read_pieces(million.TitansForCausalLM(config), 10_000, 64, progress)
    assert reading.lengths == [64, 64, 64]
    assert len(set(reading.state_bytes)) == 1
    assert all(speed > 0 for speed in reading.end_speeds())


def test_memory_files_are_kept_and_forked(example, tmp_path: Path, capsys):
    sizes = {"tokens": 1500, "prompt": 200, "forks": 3, "hidden": 16, "layers": 1, "heads": 2, "depth": 1}
    example("memory_files").main(output=tmp_path / "runs", **sizes)
    output = capsys.readouterr().out
    assert "identical to the bit" in output and "library.memory: The memory was made by a model of the same" in output
    document = json.loads((tmp_path / "runs" / "memory_files.json").read_text())
    assert document["file"]["tokens"] == 1500 and len(document["reuse"]) == 4
    assert document["file"]["file_bytes"] == (tmp_path / "runs" / "library.memory").stat().st_size


def test_compressed_caches_cost_little_on_the_teacher(example, tmp_path: Path):
    compressed = example("compressed_caches")
    compressed.main(blocks=2, length=256, piece=32, output=tmp_path / "rows.json")
    rows = {row["cache"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    full, polar = rows["full cache"], rows["PolarQuant, no window"]
    # Four bits a coordinate beside sixteen, of a model in bfloat16; 4 layers, 2 heads of width 64.
    assert full["bytes"] == 4 * polar["bytes"] == 4 * 2 * 2 * 64 * 2 * 256
    assert full["bits"] < polar["bits"] < 1.03 * full["bits"]
    assert all(full["bits"] * 0.98 < row["bits"] < 8 for row in rows.values())
    half = rows["SubGen, 128 tokens, window 64"]
    assert half["bytes"] < 0.52 * full["bytes"] and half["bits"] < 1.05 * full["bits"]
    assert half["bits_first_half"] == pytest.approx(full["bits_first_half"], rel=1e-3)


def test_training_comparison_compares_equals(example, tmp_path: Path, capsys):
    comparison = example("train_comparison")
    comparison.main(output=tmp_path, **TINY_TRAINING)
    results = json.loads((tmp_path / "results.json").read_text())
    runs = {run["model"]: run for run in results["runs"]}
    assert list(runs) == list(comparison.MODELS)
    parameters = [run["parameters"] for run in runs.values()]
    assert max(parameters) <= (1 + comparison.TOLERANCE) * min(parameters)
    for run in runs.values():
        assert run["tokens"] == 256 and run["seconds"] > 0 and run["cache_bytes"] > 0
        assert 6 < run["bits_per_byte"] < 10
        splits = [point["split"] for point in run["curve"]]
        assert splits.count("train") == splits.count("held_out") == 4
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert "bits per byte, held-out packages" in capsys.readouterr().out

    with pytest.raises(typer.BadParameter, match="--resume"):
        comparison.main(output=tmp_path, **TINY_TRAINING)


def test_training_comparison_resumes_to_the_same_result(example, tmp_path: Path, monkeypatch):
    comparison = example("train_comparison")
    arguments = {"models": "titans-depth-1", "lrs": "1e-2", **TINY_TRAINING}
    comparison.main(output=tmp_path / "whole", **arguments)

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(comparison.Clock, "on_step_begin", killed)
        with pytest.raises(RuntimeError, match="killed"):
            comparison.main(output=tmp_path / "resumed", **arguments)
    comparison.main(output=tmp_path / "resumed", resume=True)

    whole, resumed = (
        json.loads((tmp_path / name / "results.json").read_text())["runs"][0] for name in ("whole", "resumed")
    )
    assert resumed["bits_by_position"] == whole["bits_by_position"]
    assert [point["bits"] for point in resumed["curve"]] == [point["bits"] for point in whole["curve"]]


def test_all_models_read_the_same_blocks_in_the_same_order(example):
    comparison = example("train_comparison")
    text = comparison.read(comparison.source_files()[1], limit=10_000)
    blocks, again, other = (comparison.Blocks(text, 64, seed) for seed in (0, 0, 1))
    assert (blocks.blocks == again.blocks).all() and not (blocks.blocks == other.blocks).all()
    assert len(blocks) == 10_000 // 64


def test_time_decides_about_tokens(example):
    comparison = example("train_comparison")
    plan = comparison.Plan(["llama"], 16, 1, 2, 16, 32, 2, 0, [1e-3], 0, "cpu", False, 4)
    configs = comparison.matched_configs(plan)
    short, long = (comparison.affordable_tokens(configs, plan, minutes) for minutes in (0.0, 5))
    assert short == plan.batch * plan.context < long


def test_one_failing_step_of_a_session_leaves_the_others(example, tmp_path: Path, monkeypatch):
    session = example("gpu_session")
    program = [sys.executable, "-c"]

    def steps(*args) -> list:
        return [
            session.Step("fails", [*program, "raise SystemExit(3)"], 0.5),
            session.Step("hangs", [*program, "import time; time.sleep(60)"], 0.1),
            session.Step("training", [*program, "print('trained')"], 1.0),
        ]

    monkeypatch.setattr(session, "steps", steps)
    with pytest.raises(typer.Exit):
        session.main(output=tmp_path, device="cpu", minutes=0.8)
    summary = json.loads((tmp_path / "session.json").read_text())
    assert [step["status"] for step in summary["steps"]] == [3, "out of time", 0]
    assert "trained" in (tmp_path / "session.log").read_text()


def test_session_asks_for_what_there_is(example, tmp_path: Path):
    session = example("gpu_session")
    todo = session.steps("cuda", False, tmp_path / "rows.jsonl", tmp_path)
    assert [step.name for step in todo][:2] == ["warm-up", "linear"]
    commands = {"model_speed.py": example("model_speed").main, "train_comparison.py": example("train_comparison").main}
    for step in todo:
        program, *arguments = step.command[1:]
        if program == "-m":
            module = importlib.import_module(arguments.pop(0))
            main = module.main
        else:
            main = commands[Path(program).name]
        arguments = ["1.5" if argument == session.MINUTES else argument for argument in arguments]
        parsed = click_command(main).make_context(step.name, arguments).params
        if program == "-m" and parsed.get("op"):
            assert benchmark.select(parsed["op"])
            assert all(map(Shape.parse, parsed["shape"] or ()))
            assert not set(parsed.get("mode") or ()) - set(benchmark.MODES)
            assert not set(parsed["form"] or ()) - set(benchmark.OWN_FORMS)


def test_model_speed_halves_a_batch_that_does_not_fit(example, tmp_path: Path, monkeypatch, capsys):
    speed = example("model_speed")
    train = speed.TIMERS["train"]

    def no_room(config, batch, setting):
        if batch > 1:
            raise torch.OutOfMemoryError("too large")
        return train(config, batch, setting)

    monkeypatch.setitem(speed.TIMERS, "train", no_room)
    file = tmp_path / "rows.jsonl"
    speed.main(models="titans-depth-1,llama", quick=True, device="cpu", output=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["mode"], row["form"]) for row in rows] == [
        (mode, model) for mode in speed.MODES for model in ("titans-depth-1", "llama")
    ]
    assert {row["shape"] for row in rows if row["mode"] == "train"} == {"1x64x2x16"}
    assert all(row["peak_mib"] > 0 and "parameters" in row["options"] for row in rows)
    assert "tokens/s" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="Unknown gpt"):
        speed.main(models="gpt", device="cpu")


@pytest.mark.slow
def test_session_fills_its_folder(example, tmp_path: Path):
    example("gpu_session").main(output=tmp_path, device="cpu", quick=True, minutes=10)
    summary = json.loads((tmp_path / "session.json").read_text())
    assert all(step["status"] == 0 for step in summary["steps"])
    names = {path.name for path in tmp_path.iterdir()}
    written = {"session.json", "session.log", "targets.txt", "training.json", "training.png"}
    assert names == written | {"cpu.jsonl", "cpu.png"}
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows} == {"anchored_mlp", "matmul", "model"}
    assert {row["run"] for row in rows} == {summary["run"]}


def test_conversion_curve_compares_with_the_best_control(example, tmp_path: Path):
    curve = example("conversion_curve")
    given = [("continued", 0, 1.0, 1.0), ("continued", 0, 1.1, 1.0), ("off", 2, 1.4, 1.5), ("titans", 2, 1.05, 1.2)]
    rows = [
        {"memory": memory, "layers": layers, "tokens": 100, "bits": bits, "bits_late": late, "teacher_bits_late": 1.1}
        for memory, layers, bits, late in given
    ]
    *_, off, titans = curve.with_gaps(rows)
    assert titans["gap"] == pytest.approx(0.05) and titans["closed"] == pytest.approx(0.3 / 0.4)
    assert off["closed"] is None
    curve.plot([off, titans], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_conversion_curve_gives_every_point_its_recipe(example, tmp_path: Path):
    curve = example("conversion_curve")
    from hf_memory.conversion.recipe import read_recipe, split_assignment

    setting = curve.Setting("teacher", (tmp_path, tmp_path), tmp_path, "cpu", 64, 4, 2048, 8)
    for point in curve.points(["lattice"], [2], [10_000]):
        words = curve.command(point, setting)[4:-2]
        flags: dict = {}
        for name, value in zip(words[::2], words[1::2]):
            name = name.removeprefix("--").replace("-", "_")
            if name == "set":
                flags.setdefault("set", []).append(value)
            elif name == "memory_option":
                flags.setdefault("memory_options", {}).update([split_assignment(value, "memory-option")])
            else:
                flags[name] = value
        recipe = read_recipe(flags=flags)
        assert sum(stage.tokens for stage in recipe.training_stages.values()) == 10_000


@pytest.mark.slow
def test_a_larger_teacher_and_its_conversion_in_one_call(example, tmp_path: Path, capsys):
    example("gpu_conversion").main(output=tmp_path, minutes=1, device="cpu", jobs=1, memories="titans", quick=True)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "teacher: " in capsys.readouterr().out
    assert all(row["teacher"] == "model" for row in rows)


@pytest.fixture
def small_recall(example, monkeypatch):
    """`recall.py` with a preset of models that train in no time; Lattice cannot have a quarter of two slots."""
    recall = example("recall")
    small = {"hidden": 16, "layers": 1, "widths": (8, 2), "pairs": 2, "symbols": 8, "context": 96, "lengths": (32, 64)}
    monkeypatch.setitem(recall.PRESETS, "small", recall.Sizes(**small, batch=192, steps=3, held_out=512))
    monkeypatch.setitem(recall.SECONDS, "small", 60.0)
    return recall


def test_recall_makes_every_run_once_and_keeps_failures(small_recall, tmp_path: Path, capsys, monkeypatch):
    output = tmp_path / "rows.jsonl"
    options = {"preset": "small", "models": ["Lattice, m = d/4", "sliding window"], "lrs": "1e-2", "seeds": 1}
    small_recall.main(output, **options)
    printed = " ".join(capsys.readouterr().out.split())
    rows = {(row["task"], row["width"]): row for row in map(json.loads, output.read_text().splitlines())}
    assert list(rows) == [("recall", 8), ("recall", 2), ("passkey", 8)]  # the most wanted first
    failed = rows.pop(("recall", 2))
    assert "num_slots" in failed["error"] and "failed: recall, Lattice, m = d/4, width 2" in printed
    for row in rows.values():
        assert row["cut"] is None and row["steps"] == 3 and [step for step, _, _ in row["curve"]] == [3]
        assert row["state_bytes"] > 0
    assert set(rows["passkey", 8]["accuracy"]) == {"32", "64"} and set(rows["recall", 8]["accuracy"]) == {"8"}
    assert output.with_suffix(".png").stat().st_size > 1000
    again = []
    monkeypatch.setattr(small_recall, "make", lambda runs, *rest: again.extend(runs) or [])
    small_recall.main(output, **options)
    assert [(run["task"], run["width"]) for run in again] == [("recall", 2)]  # only what failed is tried again


def test_recall_has_a_row_for_what_the_end_of_the_call_cut(small_recall, example):
    run = small_recall.plan("small", ["recall"], ["gated delta rule"], [1e-2], 1)[0] | {"of_steps": 3}
    setting = example("recall_run").Setting("cpu", 60.0, until=0.0, graph=False, triton=False)
    row = example("recall_run").train(run, small_recall.PRESETS["small"], setting)
    assert row["steps"] == 1 and not small_recall.is_complete(row)
    report = example("recall_report")
    assert not report.best([row]) and "at step 1 of 3" in report.failures([row])[0]


def test_recall_reports_the_best_rate_that_has_all_seeds(example):
    shared = {"model": "a", "width": 8, "cut": None, "state_bytes": 1}

    def row(lr: float, seed: int, share: float) -> dict:
        return shared | {"lr": lr, "seed": seed, "accuracy": {"8": share}}

    rows = [row(1e-2, 0, 0.4), row(1e-2, 1, 0.6), row(3e-3, 0, 0.3), row(3e-3, 1, 0.4), row(1e-3, 0, 0.9)]
    assert example("recall_report").best(rows) == {("a", 8): rows[:2]}


def test_recall_asks_what_was_shown(small_recall, example):
    tasks, sizes = example("recall_tasks"), small_recall.PRESETS["small"]
    generator = torch.Generator().manual_seed(0)
    ids, labels = tasks.recall_batch(sizes, 5, generator)
    for row, asked in zip(ids.tolist(), labels.tolist()):
        shown = dict(zip(row[:4:2], row[1:4:2]))
        assert len(shown) == 2 and dict(zip(row[4::2], asked[5::2])) == shown
        assert set(asked[:5] + asked[6:7]) == {tasks.IGNORED}
    for times in (2, 4):
        ids, labels = tasks.passkey_batch(32, 50, generator, times)
        for row, asked in zip(ids.tolist(), labels.tolist()):
            first, *others = [place for place, token in enumerate(row) if token == tasks.MARKER]
            assert len(others) == times - 1 and others[-1] == 27
            expected = [tasks.IGNORED] * 32
            for place in others:
                assert row[place : place + 5] == row[first : first + 5]
                expected[place + 1 : place + 5] = row[place + 1 : place + 5]
            assert asked == expected
