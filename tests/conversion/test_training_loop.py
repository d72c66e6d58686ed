"""Schedules, the early end of a stage, what is not finite, trackers, and a model that has its name already."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_conversion import CONTEXT, save_teacher, save_text, tiny_recipe, weights

from hf_memory.conversion import processes, training
from hf_memory.conversion.progress import Interruption, sigterm_like_ctrl_c
from hf_memory.conversion.recipe import ConversionError
from hf_memory.conversion.run import convert
from hf_memory.conversion.stage_options import AlignStage
from hf_memory.conversion.training import STOP_STEPS, learning_rate


STEPS = STOP_STEPS + 8
SHORT = {"stages": "init,align", "tokens": STEPS * 2 * CONTEXT, "checkpoint_seconds": 0}


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


def rates(steps: int, **options: object) -> list[float]:
    stage = AlignStage(**options)
    return [learning_rate(stage, 2.0, step, steps) for step in range(steps)]


def test_schedules_by_hand():
    options = {"warmup": 0.2, "floor": 0.5}
    assert rates(10, schedule="constant", **options) == [1.0] + [2.0] * 9
    assert rates(10, schedule="linear", **options) == pytest.approx([1.0, 2.0] + [2 - k / 8 for k in range(8)])
    assert rates(10, schedule="wsd", decay=0.4, **options) == pytest.approx([1.0] + [2.0] * 6 + [1.75, 1.5, 1.25])
    assert rates(10, schedule="wsd", decay=0, **options) == [1.0] + [2.0] * 9
    cosine = rates(10, schedule="cosine", **options)
    assert cosine[1] == 2.0 and cosine[6] == pytest.approx(1.5) and cosine == [1.0, *sorted(cosine[1:], reverse=True)]


def scripted(monkeypatch, losses: list[float]) -> None:
    """The loop takes these for the losses of its steps, in order of step."""
    original = training._Loop.gradients

    def gradients(self, step, rows, shared=True):
        return original(self, step, rows, shared) | {"loss": torch.tensor(losses[step])}

    monkeypatch.setattr(training._Loop, "gradients", gradients)


def logged(monkeypatch) -> list[dict]:
    """The log of the last conversion, which is gone with its folder."""
    seen = []
    original = training._Loop.save

    def save(self, step, ended):
        seen[:] = self.log.read()
        return original(self, step, ended)

    monkeypatch.setattr(training._Loop, "save", save)
    return seen


def test_a_stage_ends_when_the_mean_of_twenty_losses_is_low_enough(teacher, text, tmp_path, monkeypatch, capfd):
    # One high loss keeps the mean of 20 up until it has passed out of them: 0.5 + 10 / 20 at first, then 0.5.
    scripted(monkeypatch, [0.5, 0.5, 10.5] + [0.5] * (STEPS - 3))
    seen = logged(monkeypatch)
    recipe = tiny_recipe(teacher, text, tmp_path / "whole", **SHORT, set=["align.stop_below=0.9"])
    convert(recipe)
    assert [line["step"] for line in seen] == list(range(1, STOP_STEPS + 4))
    assert "align ends: the mean loss of 20 steps is below 0.9" in capfd.readouterr().err

    # Cut off in between, it ends at the same step with the same weights.
    original = training._Loop.step

    def failing(self, step):
        if step == STOP_STEPS + 1:
            monkeypatch.setattr(training._Loop, "step", original)
            raise RuntimeError("power cut")
        return original(self, step)

    monkeypatch.setattr(training._Loop, "step", failing)
    recipe.output = str(tmp_path / "cut")
    with pytest.raises(RuntimeError, match="power cut"):
        convert(recipe)
    convert(recipe)
    assert [line["step"] for line in seen] == list(range(1, STOP_STEPS + 4))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_stage_that_ended_early_is_not_taken_up_again(teacher, text, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5] * STEPS)
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **SHORT, set=["align.stop_below=0.9"])
    with monkeypatch.context() as patch:
        patch.setattr("hf_memory.conversion.run._Conversion._write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(recipe)
    assert [entry.name for entry in (tmp_path / "out.converting" / "checkpoints").iterdir()] == ["align-000020"]
    monkeypatch.setattr(training._Loop, "step", lambda *args: 1 / 0)
    convert(recipe)


def poison(monkeypatch, place: str, when: int) -> None:
    """From its `when`th call on, a module of the student has a NaN among its outputs, or in its gradient."""
    calls, in_gradient, name = 0, place.endswith("!"), place.removesuffix("!")
    original = training._Loop.__init__

    def spoil(module, args, output):
        nonlocal calls
        calls += 1
        if calls < when:
            return output
        if in_gradient:
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output
        return output.index_fill(-1, torch.tensor([0]), float("nan"))

    def patched(self, *args):
        original(self, *args)
        self.stage.student.get_submodule(name).register_forward_hook(spoil)

    monkeypatch.setattr(training._Loop, "__init__", patched)


@pytest.mark.parametrize(
    ("place", "what", "found"),
    [
        ("model.layers.1.self_attn.memory.q_proj", "loss", "the output of layer 1 (model.layers.1.self_attn."),
        ("model.layers.0.mlp", "loss", "the output of layer 0 (model.layers.0.mlp)"),
        ("lm_head", "loss", "the output of lm_head"),
        ("model.layers.1.mlp.up_proj!", "gradient", "the gradient at the output of layer 1 (model.layers.1.mlp.up_"),
    ],
)
def test_what_is_not_finite_is_traced_to_its_layer(teacher, text, tmp_path, monkeypatch, place, what, found):
    poison(monkeypatch, place, when=3)
    flags = SHORT | {"stages": "init,distill", "set": ["distill.trainable=all"]}
    with pytest.raises(ConversionError) as caught:
        convert(tiny_recipe(teacher, text, tmp_path / "out", **flags))
    sentence = str(caught.value)
    assert f"The {what} of stage distill is nan in step 3 of {STEPS}; it began in {found}" in sentence
    assert "(last good checkpoint: distill-000002)" in sentence
    assert [entry.name for entry in (tmp_path / "out.converting" / "checkpoints").iterdir()] == ["distill-000002"]


class Diary:
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, tracker = "diary", True, None
    told: list[dict] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        self.file = Path(logging_dir) / run_name / "diary.json"

    def start(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def store_init_configuration(self, values: dict) -> None:
        self.told.append({"settings": values})

    def log(self, values: dict, step: int, **kwargs: object) -> None:
        self.told.append(values | {"at": step})

    def finish(self) -> None:
        self.file.write_text(json.dumps(len(self.told)), encoding="utf-8")


def test_trackers_hear_what_the_log_hears(teacher, text, tmp_path, monkeypatch):
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Diary)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setattr(Diary, "told", [])
    flags = {"report_to": ["tensorboard"], "tokens": 3 * 2 * CONTEXT}
    folder = convert(tiny_recipe(teacher, text, tmp_path / "out", **flags))
    settings, *steps = Diary.told
    assert settings["settings"]["layers"] == "[1]" and settings["settings"]["stages.1.name"] == "align"
    assert str(tmp_path) not in str(settings)
    assert [values["at"] for values in steps] == [1, 2, 3, 4, 5, 6]
    assert {"align/loss", "align/layer 1", "align/lr", "align/gradient_norm"} <= set(steps[0])
    assert {"distill/loss", "distill/kl", "distill/tokens_per_second"} <= set(steps[3])
    # What trackers write goes with the model, where the Hub looks for it.
    assert (folder / "runs" / "out" / "diary.json").read_text(encoding="utf-8") == "7"


def test_a_second_run_of_a_tracker_is_its_own(tmp_path, monkeypatch):
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Diary)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setattr(Diary, "told", [])
    accelerator = processes.make_accelerator(torch.device("cpu"), torch.float32, ["tensorboard"], tmp_path)
    for name in ("first", "second"):
        with processes.tracked(accelerator, name, {"name": name}):
            accelerator.log({"loss": 1.0}, step=1)
    assert Diary.told == [
        {"settings": {"name": "first"}},
        {"loss": 1.0, "at": 1},
        {"settings": {"name": "second"}},
        {"loss": 1.0, "at": 1},
    ]
    assert (tmp_path / "first" / "diary.json").read_text(encoding="utf-8") == "2"


def test_a_model_that_got_its_name_before_a_kill_is_finished(teacher, text, tmp_path, capfd):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **(SHORT | {"stages": "init"}))
    folder = convert(recipe)
    left = tmp_path / "out.converting"

    def leave_behind() -> None:
        (left / "checkpoints" / "align-000003").mkdir(parents=True)
        (left / "published").touch()
        (left / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    leave_behind()
    assert convert(recipe) == folder
    assert "was finished before" in capfd.readouterr().err and not left.exists()
    leave_behind()
    with pytest.raises(ConversionError, match="exists already: remove it, or choose another name"):
        convert(tiny_recipe(teacher, text, tmp_path / "out", **(SHORT | {"stages": "init", "layers": "all"})))


def test_a_checkpoint_that_cannot_be_read_is_named(teacher, text, tmp_path, monkeypatch):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("hf_memory.conversion.run._Conversion._write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(recipe)
    file = tmp_path / "out.converting" / "checkpoints" / f"align-{STEPS:06}" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=rf"The checkpoint '.*align-{STEPS:06}' cannot be read"):
        convert(recipe)


def test_data_that_vanished_leaves_the_checkpoint(teacher, text, tmp_path, monkeypatch):
    own = Path(tmp_path, "text.txt")
    own.write_bytes(text.read_bytes())
    recipe = tiny_recipe(teacher, own, tmp_path / "out", **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("hf_memory.conversion.run._Conversion._write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(recipe)
    own.unlink()
    with pytest.raises(ConversionError, match="There is no file or folder"):
        convert(recipe)
    own.write_bytes(text.read_bytes())
    # Nothing is trained again.
    monkeypatch.setattr(training._Loop, "step", lambda *args: 1 / 0)
    convert(recipe)


def test_sigterm_is_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_like_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_signals_at_once_are_one_wish_and_a_later_one_insists(monkeypatch):
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.asked
        monkeypatch.setattr("hf_memory.conversion.progress.SECONDS_TO_INSIST", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_only_launchers_that_keep_models_whole(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = processes.make_accelerator(torch.device("cpu"), torch.float32)
    assert accelerator.gradient_accumulation_steps == 1
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", processes.DistributedType.FSDP)
    with pytest.raises(ConversionError, match="keeps models whole: launch it without FSDP"):
        processes.make_accelerator(torch.device("cpu"), torch.float32)
