"""The two controls: memories that nothing is written into, and the teacher trained on with the same blocks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_conversion import STEPS, save_teacher, save_text, tiny_recipe

from hf_memory.conversion import training
from hf_memory.conversion.controls import CONTINUED, OFF, Chain, MemoryOff, memory_off
from hf_memory.conversion.data import Batches
from hf_memory.conversion.run import convert
from hf_memory.conversion.surgery import build_student, memory_slots
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


MEMORIES = {
    "titans": {"memory_depth": 1, "chunk_size": 4},
    "titans deep": {"memory_depth": 2, "chunk_size": 4},
    "lattice": {"chunk_size": 4},
    "trellis": {"chunk_size": 4},
}


def student_of(memory: str, mode: str):
    """One layer with a memory, and what else there is drawn at random too."""
    config = tiny_config("llama", num_hidden_layers=1)
    options = {"mode": mode} | ({"window": 2} if mode == "retrofit" else {})
    student = build_student(
        random_model(config), layers=[0], memory=memory.split()[0], memory_options=MEMORIES[memory], **options
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return student.eval()


@pytest.mark.parametrize("mode", ["replace", "retrofit"])
@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_nothing_from_before_the_convolution_passes_a_memory_that_is_off(memory, mode):
    student = student_of(memory, mode)
    (slot,) = memory_slots(student).values()
    # A convolution over so many tokens, or the window beside the memory, which is shorter.
    reach = slot.memory.conv.weight.shape[-1]
    tokens = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(0))
    tokens[1, 20 - reach :] = tokens[0, 20 - reach :]
    assert not torch.equal(tokens[0], tokens[1])
    on = student(tokens).logits[:, -1]
    off = MemoryOff(student)(tokens).logits[:, -1]
    torch.testing.assert_close(off[0], off[1], rtol=0, atol=1e-5)
    assert (on[0] - on[1]).abs().max() > 1e-3
    torch.testing.assert_close(student(tokens).logits[:, -1], on, rtol=0, atol=0)


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_the_states_of_a_memory_that_is_off_stay_as_they_start(memory):
    student = student_of(memory, "replace")
    tokens = torch.randint(128, (1, 24), generator=torch.Generator().manual_seed(0))

    def states(length: int) -> dict[str, torch.Tensor]:
        layer = student(tokens[:, :length], use_cache=True).past_key_values.layers[0]
        return {name: state for name, state in layer.get_states().items() if name.startswith(("memory", "slots"))}

    # On chunk boundaries, where nothing of a chunk is waiting to be folded in.
    with memory_off(student):
        early, late = states(8), states(24)
    anchors = [name for name in early if early[name].ndim >= 4 and early[name].is_floating_point()]
    assert anchors
    for name in anchors:
        if "buffer" not in name:
            torch.testing.assert_close(early[name], late[name], rtol=0, atol=1e-6)


def test_a_model_without_memories_has_none_to_switch_off():
    model = random_model(tiny_config("llama")).eval()
    tokens = torch.randint(128, (1, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(MemoryOff(model)(tokens).logits, model(tokens).logits)


def test_a_chain_has_the_blocks_of_all_stages_in_their_order():
    tokens = np.arange(200)
    parts = [(Batches(tokens, 8, 2, (0, 0)), 3), (Batches(tokens, 16, 1, (0, 1)), 2)]
    chain = Chain(parts, (0, 2))
    expected = [parts[0][0][step] for step in range(3)] + [parts[1][0][step] for step in range(2)]
    assert len(chain) == 5 and chain.seeds == (0, 2)
    for step, blocks in enumerate(expected):
        assert torch.equal(chain[step], blocks)
    with pytest.raises(IndexError, match="There are 5 steps"):
        chain[5]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_both_controls_and_every_stage_survive_a_kill(teacher, text, tmp_path, monkeypatch):
    """Measured behind every stage once, and the control trained once, whatever is killed in between."""
    options = {"controls": ["continued"], "checkpoint_seconds": 0, "recall_samples": 0}
    undisturbed = read_report(convert(tiny_recipe(teacher, text, tmp_path / "a", **options)))
    assert list(undisturbed["models"]) == ["teacher", "student", OFF, CONTINUED]
    assert undisturbed["controls"] == {"off": OFF, "continued": CONTINUED}
    assert [stage["stage"] for stage in undisturbed["stages"]] == ["init", "align", "distill"]
    assert [(curve["stage"], curve["run"]) for curve in undisturbed["curves"]] == [
        ("align", "student"), ("distill", "student"), ("continued", CONTINUED),
    ]  # fmt: skip
    qualities = {name: model["quality"]["whole"] for name, model in undisturbed["models"].items()}
    assert qualities[CONTINUED]["bits_per_token"] < qualities["teacher"]["bits_per_token"]
    assert qualities[CONTINUED]["kl_bits_per_token"] > 0
    assert qualities[OFF]["bits_per_token"] != qualities["student"]["bits_per_token"]
    # All held-out blocks are fewer than those that a stage is measured on.
    assert undisturbed["stages"][-1]["student"]["whole"] == pytest.approx(qualities["student"], rel=1e-5)
    assert undisturbed["stages"][0]["student"]["whole"] != undisturbed["stages"][1]["student"]["whole"]

    recipe, original = tiny_recipe(teacher, text, tmp_path / "b", **options), training._Loop.step
    measured = []
    from hf_memory.conversion import assessment

    evaluate = assessment.evaluate_pair
    monkeypatch.setattr(assessment, "evaluate_pair", lambda *a, **k: measured.append(1) or evaluate(*a, **k))
    for label, step in (("align", 3), ("distill", 0), ("continued", 4), ("continued", 2 * STEPS - 1)):

        def failing(self, number, label=label, step=step):
            if (self.label, number) == (label, step):
                raise RuntimeError("power cut")
            return original(self, number)

        monkeypatch.setattr(training._Loop, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            convert(recipe)
    work = tmp_path / "b.converting"
    assert len(json.loads((work / "stages.json").read_text(encoding="utf-8"))) == 3
    assert [entry.name for entry in (work / "continued.converting" / "checkpoints").iterdir()] == ["continued-000011"]
    monkeypatch.setattr(training._Loop, "step", original)
    again = read_report(convert(recipe))
    assert len(measured) == 3
    assert again["stages"] == undisturbed["stages"] and again["curves"] == undisturbed["curves"]
    for name, model in undisturbed["models"].items():
        assert again["models"][name]["quality"] == model["quality"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_the_control_reads_the_blocks_of_the_student(teacher, text, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    original = training._Loop.step

    def recording(self, step):
        seen.setdefault(self.label, []).append(self.batches[step])
        return original(self, step)

    monkeypatch.setattr(training._Loop, "step", recording)
    recipe = tiny_recipe(teacher, text, tmp_path / "out", controls="continued", recall_samples=0)
    convert(recipe)
    assert len(seen["continued"]) == 2 * STEPS
    assert all(map(torch.equal, seen["continued"], seen["align"] + seen["distill"]))


def test_without_measurements_behind_stages_there_are_none(teacher, text, tmp_path):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", evaluate_stages=False, layers="none", recall_samples=0)
    report = read_report(convert(recipe))
    assert report["stages"] == [] and list(report["models"]) == ["teacher", "student"] and report["controls"] == {}
