"""A conversion that was cut off anywhere ends in the weights of one that was not."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from killed_conversion import log_lines
from tiny_conversion import CONTEXT, STEPS, save_teacher, save_text, tiny_recipe, weights

from hf_memory.conversion import training
from hf_memory.conversion.checkpoints import Checkpoint, WorkFolder, first_difference
from hf_memory.conversion.recipe import ConversionError, Recipe
from hf_memory.conversion.run import convert


# Small enough to be killed in the middle, every step worth a checkpoint.
OFTEN = {"checkpoint_seconds": 0, "set": ["distill.trainable=all", "align.accumulate=2"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr("hf_memory.conversion.run._Conversion._report", lambda *args: None)
    monkeypatch.setattr("hf_memory.conversion.report.write_report", lambda *args: None)


@pytest.fixture(scope="module")
def undisturbed(teacher, text, tmp_path_factory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_memory.conversion.run._Conversion._report", lambda *args: None)
        patch.setattr("hf_memory.conversion.report.write_report", lambda *args: None)
        return weights(convert(tiny_recipe(teacher, text, output, **OFTEN)))


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights(folder)
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def stop_at(monkeypatch, label: str, step: int, error: BaseException) -> None:
    """Raise in the middle of a step of a stage, once."""
    original = training._Loop.step

    def failing(self, number):
        if (self.label, number) == (label, step):
            monkeypatch.setattr(training._Loop, "step", original)
            raise error
        return original(self, number)

    monkeypatch.setattr(training._Loop, "step", failing)


def kill(recipe: Recipe, folder: Path, *arguments: str) -> list[str]:
    """What `killed_conversion.py` prints about a recipe."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    program = Path(__file__).with_name("killed_conversion.py")
    environment = os.environ | {"PYTHONPATH": str(program.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(folder / "recipe.yaml"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_at_random_moments_change_no_bit(teacher, text, undisturbed, tmp_path, seed):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    said = kill(recipe, tmp_path, str(seed))
    assert len(said) == 10 and sum(line.startswith("killed") for line in said) >= 9
    # The last kill may have hit before or after the model got its name; the same command settles either.
    if not (tmp_path / "out").exists() or (tmp_path / "out.converting" / "published").exists():
        assert convert(recipe) == tmp_path / "out"
    assert_same(tmp_path / "out", undisturbed)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_a_kill_in_every_stage_changes_no_bit(teacher, text, undisturbed, tmp_path, capfd):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    said = kill(recipe, tmp_path)
    assert [line.split(",")[0] for line in said] == [
        "killed in init",
        "killed in align",
        "killed in distill",
    ]
    assert not (tmp_path / "out").exists()
    folder = convert(recipe)
    assert "Continuing from the checkpoint" in capfd.readouterr().err
    assert_same(folder, undisturbed)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "recipe.yaml"]


@pytest.mark.parametrize("label", ["align", "distill"])
def test_a_resume_between_checkpoints_repeats_the_steps_since(
    teacher, text, undisturbed, tmp_path, monkeypatch, label
):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    recipe.checkpoint_seconds = 3600  # only at the end of a stage
    stop_at(monkeypatch, label, 5, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        convert(recipe)
    work = tmp_path / "out.converting"
    assert log_lines(work, label) == 5
    checkpoints = [entry.name for entry in (work / "checkpoints").glob("*")]
    assert checkpoints == ([] if label == "align" else [f"align-{STEPS:06}"])
    assert_same(convert(recipe), undisturbed)


def test_the_log_has_every_step_once(teacher, text, tmp_path, monkeypatch):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    recipe.checkpoint_seconds = 3600
    for label, step in (("align", 2), ("distill", 3)):  # before and after the first checkpoint
        stop_at(monkeypatch, label, step, RuntimeError("power cut"))
        with pytest.raises(RuntimeError):
            convert(recipe)
    log = tmp_path / "out.converting" / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8") + '{"stage": "distill", "st', encoding="utf-8")
    seen = []
    monkeypatch.setattr(
        "hf_memory.conversion.run._Conversion._report", lambda self, *args: seen.extend(self.work.log().read())
    )
    convert(recipe)
    assert [(line["stage"], line["step"]) for line in seen] == [
        (stage, step + 1) for stage in ("align", "distill") for step in range(STEPS)
    ]
    assert seen[-1]["tokens"] == STEPS * 2 * CONTEXT
    assert {"loss", "layer 1", "lr", "gradient_norm", "tokens_per_second"} <= set(seen[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_asked_to_stop_finishes_the_step_and_saves(
    teacher, text, undisturbed, tmp_path, monkeypatch, capfd, number
):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    recipe.checkpoint_seconds = 3600
    original, handler = training._Loop.step, signal.getsignal(number)

    def interrupted(self, step):
        if (self.label, step) == ("align", 4):
            os.kill(os.getpid(), number)
        return original(self, step)

    monkeypatch.setattr(training._Loop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(recipe)
    monkeypatch.setattr(training._Loop, "step", original)
    assert "Stopped after the checkpoint align-000005; the same command continues from it." in capfd.readouterr().err
    assert signal.getsignal(number) == handler
    assert_same(convert(recipe), undisturbed)


def test_a_full_disk_leaves_the_last_checkpoint_intact(teacher, text, undisturbed, tmp_path, monkeypatch):
    """A limit on the size of files makes the write itself fail, half-way."""
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    original, limits = training._Loop.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, step, ended):
        if (self.label, step) == ("align", 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return original(self, step, ended)

    monkeypatch.setattr(training._Loop, "save", save)
    try:
        with pytest.raises(ConversionError) as caught:
            convert(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (" in str(caught.value)
    assert "the last complete checkpoint, align-000003, is intact" in str(caught.value)
    assert [entry.name for entry in (tmp_path / "out.converting" / "checkpoints").iterdir()] == ["align-000003"]
    monkeypatch.setattr(training._Loop, "save", original)
    assert_same(convert(recipe), undisturbed)


def test_a_full_disk_is_one_sentence_wherever_it_shows(teacher, text, tmp_path, monkeypatch):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", layers="auto:1", auto_tokens=2 * 2 * CONTEXT, **OFTEN)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf_memory.conversion.auto_layers.write_choices", full)
    with pytest.raises(ConversionError, match="cannot be written .*; the last complete checkpoint, auto-000002, is"):
        convert(recipe)


def test_a_loss_that_is_not_finite_names_stage_step_and_checkpoint(teacher, text, tmp_path, monkeypatch):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    from hf_memory.conversion.stages import Distill

    original = Distill.forward

    def broken(self, blocks):
        loss, figures = original(self, blocks)
        return (loss * float("nan") if self.calls == 2 else loss), figures

    calls = iter(range(100))
    monkeypatch.setattr(Distill, "calls", property(lambda self: next(calls)), raising=False)
    monkeypatch.setattr(Distill, "forward", broken)
    with pytest.raises(ConversionError) as caught:
        convert(recipe)
    assert "The loss of stage distill is nan in step 3 of 6" in str(caught.value)
    assert "last good checkpoint: distill-000002" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_recipe_is_refused_unless_told_to_restart(teacher, text, undisturbed, tmp_path, monkeypatch):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **OFTEN)
    stop_at(monkeypatch, "align", 2, RuntimeError("power cut"))
    with pytest.raises(RuntimeError):
        convert(recipe)
    changed = tiny_recipe(
        teacher, text, tmp_path / "out", **(OFTEN | {"set": ["distill.trainable=all", "align.lr=1"]})
    )
    with pytest.raises(ConversionError) as caught:
        convert(changed)
    assert "`align.lr` was 0.001, now it is 1: give the old value to continue, or pass --restart" in str(caught.value)
    # The same layers in other words are the same recipe, and the time between checkpoints is of no consequence.
    same = tiny_recipe(teacher, text, tmp_path / "out", **(OFTEN | {"layers": "odd", "checkpoint_seconds": 60}))
    stop_at(monkeypatch, "align", 4, RuntimeError("power cut"))
    with pytest.raises(RuntimeError):
        convert(same)
    text_before = text.read_bytes()
    try:
        text.write_bytes(text_before + b"more of it")
        with pytest.raises(ConversionError, match="The data is not what checkpoint align-000002 was trained with"):
            convert(same)
    finally:
        text.write_bytes(text_before)
    assert_same(convert(recipe, restart=True), undisturbed)


def test_one_process_at_a_time(teacher, text, tmp_path):
    recipe = tiny_recipe(teacher, text, tmp_path / "out")
    held, done = threading.Event(), threading.Event()

    def hold():
        with WorkFolder(recipe.output):
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        with pytest.raises(ConversionError, match="Another process is converting to"):
            convert(recipe)
    finally:
        done.set()
        holder.join()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_complete_or_not_there(tmp_path):
    output = tmp_path / "out"
    with WorkFolder(output) as work:
        (work.path / "recipe.yaml").touch()
        for stage, step in (("align", 9), ("distill", 2)):
            work.save(Checkpoint(stage, step, {"step": step}, {"weight.a": torch.arange(3.0)}))
        (work.checkpoints / "distill-000003.partial").mkdir()
        (work.checkpoints / "align-000009").mkdir()  # as if it had been killed before the old one was removed
    with WorkFolder(output) as work:
        found = work.latest(["align", "distill"])
        assert (found.stage, found.step, found.numbers) == ("distill", 2, {"step": 2})
        assert torch.equal(found.tensors["weight.a"], torch.arange(3.0))
        assert [entry.name for entry in work.checkpoints.iterdir()] == ["distill-000002"]


def test_a_checkpoint_that_cannot_be_read_takes_no_other_with_it(tmp_path):
    with WorkFolder(tmp_path / "out") as work:
        (work.path / "recipe.yaml").touch()
        work.save(Checkpoint("align", 2, {}, {"weight.a": torch.arange(3.0)}))
        (work.checkpoints / "align-000003").mkdir()
        with pytest.raises(ConversionError, match="align-000003' cannot be read .*: put it back, or pass --restart"):
            work.latest(["align"])
        (work.checkpoints / "align-000003").rmdir()
        assert work.latest(["align"]).step == 2


def test_a_damaged_file_is_one_sentence(teacher, text, tmp_path, monkeypatch):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", layers="auto:1", auto_tokens=2 * CONTEXT, **OFTEN)
    stop_at(monkeypatch, "distill", 2, RuntimeError("power cut"))
    with pytest.raises(RuntimeError):
        convert(recipe)
    for name in ("recipe.yaml", "stages.json", "sensitivity.json"):
        file = tmp_path / "out.converting" / name
        whole = file.read_bytes()
        # A disk that lost its power may have a name, and nothing under it.
        file.write_bytes(b"")
        with pytest.raises(ConversionError, match=f"{name}' cannot be read .*: put it back, or pass --restart"):
            convert(recipe)
        file.write_bytes(whole)
    convert(recipe)


def test_differences_are_named_by_their_place():
    assert first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == ("b.c", 2, 3)
    assert first_difference({"layers": [1]}, {"layers": [1, 2]}) == ("layers", [1], [1, 2])
    stages = {"stages": [{"name": "align", "lr": 1}]}
    assert first_difference(stages, json.loads(json.dumps(stages))) is None
