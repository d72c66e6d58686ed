"""Layers chosen by what they cost: the search against brute force, cut off and continued, and what it leaves."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny_conversion import save_teacher, save_text, tiny_recipe, weights
from transformers import AutoModelForCausalLM

from hf_memory.conversion import auto_layers, run
from hf_memory.conversion.processes import make_accelerator
from hf_memory.conversion.recipe import ConversionError, read_recipe
from hf_memory.conversion.run import convert
from hf_memory.conversion.sensitivity import (
    Choice,
    converted,
    plot_choices,
    read_choices,
    search_layers,
    sensitivity_table,
    write_choices,
)
from hf_memory.conversion.surgery import build_student, memory_parameters


LAYERS = 4
MEMORY = {"memory_depth": 1, "chunk_size": 8}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(teacher_folder, text, tmp_path_factory) -> Path:
    """A conversion that nothing disturbed."""
    return convert(auto_recipe(teacher_folder, text, tmp_path_factory.mktemp("whole") / "whole"))


@pytest.fixture
def teacher(teacher_folder):
    return AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float64).eval()


@pytest.fixture
def student(teacher):
    return build_student(teacher, layers=range(LAYERS), memory_options=MEMORY).eval()


@pytest.fixture
def blocks():
    return torch.randint(260, (3, 24), generator=torch.Generator().manual_seed(0))


def accelerator():
    return make_accelerator(torch.device("cpu"), torch.float32)


@torch.no_grad()
def divergence(teacher, student, blocks) -> float:
    """KL(teacher || student) in bits, summed over the vocabulary as it is defined."""
    expected, given = (model(input_ids=blocks, use_cache=False).logits.softmax(-1) for model in (teacher, student))
    return (expected * (expected.log() - given.log())).sum(-1).mean().item() / math.log(2)


def take_memories(source, target) -> None:
    memories = memory_parameters(source)
    for name, value in memory_parameters(target).items():
        value.data.copy_(memories[name])


@pytest.mark.parametrize("mode", ["replace", "retrofit"])
@pytest.mark.parametrize("layers", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_a_student_with_borrowed_layers_is_the_student_of_these_layers(teacher, blocks, layers, mode):
    options = {"memory_options": MEMORY, "mode": mode, "window": 4 if mode == "retrofit" else None}
    everywhere = build_student(teacher, layers=range(LAYERS), **options).eval()
    some = build_student(teacher, layers=layers, **options).eval()
    take_memories(everywhere, some)
    before = everywhere(input_ids=blocks, use_cache=False).logits
    with converted(everywhere, teacher, layers):
        found = everywhere(input_ids=blocks, use_cache=False).logits
    assert torch.equal(found, some(input_ids=blocks, use_cache=False).logits)
    assert torch.equal(everywhere(input_ids=blocks, use_cache=False).logits, before)


def test_the_search_takes_the_cheapest_each_time(teacher, student, blocks):
    """Every cost equals that of a student built for these layers alone."""
    choices = search_layers(
        teacher, student, blocks, range(LAYERS), lambda chosen: len(chosen) == 3, accelerator=accelerator()
    )
    chosen: list[int] = []
    for choice in choices:
        costs = {}
        for layer in set(range(LAYERS)) - set(chosen):
            built = build_student(teacher, layers=[*chosen, layer], memory_options=MEMORY).eval()
            take_memories(student, built)
            costs[layer] = divergence(teacher, built, blocks)
        assert choice.costs == pytest.approx(costs, rel=1e-5)
        assert choice.layer == min(costs, key=costs.get)
        chosen.append(choice.layer)
    assert len(chosen) == 3


def test_a_search_goes_on_from_what_is_known(teacher, student, blocks, tmp_path):
    def enough(chosen):
        return len(chosen) == 3

    arguments = (teacher, student, blocks, [0, 1, 3], enough)
    whole = search_layers(*arguments, accelerator=accelerator())
    write_choices(whole[:1], tmp_path / "choices.json", 72)
    known, made = read_choices(tmp_path / "choices.json"), []
    again = search_layers(*arguments, known=known, accelerator=accelerator(), on_forward=lambda: made.append(1))
    assert again == whole and len(made) == 2 + 1
    assert sorted(choice.layer for choice in again) == [0, 1, 3]


def test_processes_share_the_blocks(teacher, student, blocks):
    """The sums over the rows of two processes are those of one."""

    class Half:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, index, reduce):
            self.process_index, self.reduce = index, reduce

        def autocast(self):
            return accelerator().autocast()

    sums: list[torch.Tensor] = []

    def first(tensor, how):
        sums.append(tensor)
        return tensor

    arguments = (teacher, student, blocks, range(LAYERS), lambda chosen: len(chosen) == 1)
    search_layers(*arguments, accelerator=Half(0, first))
    both = search_layers(*arguments, accelerator=Half(1, lambda tensor, how: tensor + sums[0]))
    assert both[0].costs == pytest.approx(search_layers(*arguments, accelerator=accelerator())[0].costs, rel=1e-5)


def test_picture_and_table(tmp_path):
    choices = [Choice({0: 3.0, 1: 0.5, 2: 1.0}, 1), Choice({0: 3.5, 2: 1.25}, 2)]
    table = sensitivity_table(choices)
    assert list(table.columns[2].cells) == ["", "1", "2"] and list(table.columns[3].cells) == ["", "0.5000", "1.2500"]
    pytest.importorskip("matplotlib")
    plot_choices(choices, tmp_path / "picture.png", "title")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def auto_recipe(teacher, text, output, **flags):
    return tiny_recipe(teacher, text, output, **({"layers": "auto:2", "auto_blocks": 2, "auto_tokens": 96} | flags))


def test_a_conversion_with_auto(teacher_folder, text, whole, tmp_path):
    """The choice is written down, and with it the same recipe gives a model without a search."""
    folder = whole
    written = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    chosen = written["chosen_layers"]
    figures = json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))
    assert written["layers"] == "auto:2" and chosen == figures["layers"] and len(chosen) == 2
    assert [len(step["costs"]) for step in figures["steps"]] == [4, 3]
    assert AutoModelForCausalLM.from_pretrained(folder).config.memory_layers == chosen
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["converted"]["layers"] == chosen
    assert [curve["stage"] for curve in report["curves"]] == ["auto", "align", "distill"]

    again = read_recipe(
        folder / "recipe.yaml",
        {"teacher": str(teacher_folder), "data": str(text), "output": str(tmp_path / "again"), "stages": "init"},
    )
    assert AutoModelForCausalLM.from_pretrained(convert(again)).config.memory_layers == chosen
    assert not (tmp_path / "again" / "sensitivity.json").exists()


def test_the_alignment_is_kept(teacher_folder, text, tmp_path, monkeypatch):
    """With no stage behind it, the chosen memories are those that were aligned."""
    aligned = {}

    class Watched(auto_layers.LayerSearch):
        def choose(self, done):
            chosen, tensors = super().choose(done)
            aligned.update(tensors)
            return chosen, tensors

    monkeypatch.setattr(run, "LayerSearch", Watched)
    folder = convert(auto_recipe(teacher_folder, text, tmp_path / "out", stages="init"))
    model, saved = AutoModelForCausalLM.from_pretrained(folder), weights(folder)
    names = memory_parameters(model)
    assert names and all(torch.equal(saved[name], aligned[f"weight.{name}"]) for name in names)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    started = build_student(teacher, layers=model.config.memory_layers, memory_options=MEMORY)
    assert not all(torch.equal(value, saved[name]) for name, value in memory_parameters(started).items())


class Stop(Exception):
    """A kill."""


@pytest.mark.parametrize("when", ["aligning", "choosing", "distilling"])
def test_cut_off_anywhere_it_ends_in_the_same_weights(teacher_folder, text, whole, tmp_path, monkeypatch, when):
    recipe = auto_recipe(teacher_folder, text, tmp_path / "out", checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        if when == "choosing":
            number = itertools.count()

            def write_and_stop(choices, *arguments):
                write_choices(choices, *arguments)
                if next(number) == 0:
                    raise Stop

            patch.setattr(auto_layers, "write_choices", write_and_stop)
        else:
            label, step = ("auto", 2) if when == "aligning" else ("distill", 1)
            save = run.WorkFolder.save

            def save_and_stop(self, checkpoint):
                folder = save(self, checkpoint)
                if (checkpoint.stage, checkpoint.step) == (label, step):
                    raise Stop
                return folder

            patch.setattr(run.WorkFolder, "save", save_and_stop)
        with pytest.raises(Stop):
            convert(recipe)
    folder = convert(recipe)
    expected, found = weights(whole), weights(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    choices = [(path / "sensitivity.json").read_text(encoding="utf-8") for path in (whole, folder)]
    assert choices[0] == choices[1]


def test_a_choice_that_got_lost_is_one_sentence(teacher_folder, tmp_path, monkeypatch):
    recipe = auto_recipe(teacher_folder, save_text(tmp_path / "text.txt"), tmp_path / "out", checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        patch.setattr(run._Conversion, "_final_model", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            convert(recipe)
    (tmp_path / "out.converting" / "sensitivity.json").unlink()
    with pytest.raises(ConversionError, match="is missing or incomplete, and a later stage has begun: pass --restart"):
        convert(recipe)
