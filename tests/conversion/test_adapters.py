"""Adapters in place of weights: nothing but them changes, and merged or kept they are what was trained."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_conversion import random_teacher, save_teacher, save_text, tiny_recipe, weights
from transformers import AutoModelForCausalLM

from hf_memory.conversion import training
from hf_memory.conversion.adapters import Adapters, load_adapters, save_adapters
from hf_memory.conversion.checkpoints import WorkFolder
from hf_memory.conversion.run import convert
from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.stage_options import AlignStage, DistillStage
from hf_memory.conversion.stages import make_stage, only_these_train, what_trains
from hf_memory.conversion.surgery import build_student
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


MEMORY = "model.layers.{}.self_attn.memory.{}"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def teacher():
    return random_teacher()


@pytest.fixture
def student(teacher):
    return build_student(teacher, layers=[0, 2], memory_options={"chunk_size": 4})


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(64, (2, 13))


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr("hf_memory.conversion.run._Conversion._report", lambda *args: None)
    monkeypatch.setattr("hf_memory.conversion.report.write_report", lambda *args: None)


def train(stage, blocks: torch.Tensor, steps: int = 5) -> None:
    training.as_masters(stage.parameters_by_name)
    stage.prepare()
    optimizer = torch.optim.AdamW(stage.parameters_by_name.values(), lr=1e-2)
    with only_these_train(stage.student, stage.parameters_by_name):
        for _ in range(steps):
            optimizer.zero_grad()
            stage(blocks)[0].backward()
            optimizer.step()


def test_adapters_start_by_changing_nothing_and_alone_are_trained(teacher, student, blocks):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    expected = student(blocks).logits
    stage = make_stage(DistillStage(lora_rank=2), teacher, student, 1)
    assert torch.equal(student(blocks).logits, expected)
    assert set(stage.parameters_by_name) == {
        f"{MEMORY.format(layer, name)}.lora_{part}.default.weight"
        for layer in (0, 2)
        for name in PROJECTIONS
        for part in "AB"
    }
    assert set(stage.parameters_by_name) <= set(stage.memories)
    train(stage, blocks)
    after = {name.replace(".base_layer.", "."): value for name, value in student.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(student(blocks).logits, expected)


def test_adapters_are_named_by_what_they_adapt(teacher, student):
    stage = make_stage(DistillStage(lora_rank=2), teacher, student)
    lines = what_trains(student, stage.parameters_by_name)
    assert lines[:2] == [
        "trainable adapters: 1,024 parameters",
        "  model.layers.{0,2}.self_attn.memory.{q_proj,k_proj,v_proj,o_proj}: 1,024",
    ]
    assert lines[2] == f"frozen: {student.num_parameters() - 1024:,} parameters"
    assert not any("base_layer" in line for line in lines)


def test_merged_weights_are_those_of_peft(teacher, student, blocks):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    stage = make_stage(DistillStage(lora_rank=2, lora_alpha=6), teacher, student, 1)
    train(stage, blocks)
    trained = {name: value.detach().clone() for name, value in stage.parameters_by_name.items()}
    with torch.no_grad():
        expected = student.eval()(blocks).logits
    changed = stage.finish()
    assert set(changed) == {f"{MEMORY.format(layer, name)}.weight" for layer in (0, 2) for name in PROJECTIONS}
    after = student.state_dict()
    assert list(after) == list(before) and not hasattr(student, "peft_config")
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in changed)
    for name in changed:
        a, b = (trained[name.replace(".weight", f".lora_{part}.default.weight")] for part in "AB")
        assert torch.equal(after[name], before[name] + (b @ a) * 3)  # alpha over rank
    torch.testing.assert_close(student(blocks).logits, expected, atol=1e-4, rtol=1e-4)


def test_weights_in_low_precision_are_merged_in_float32(teacher, blocks):
    student = build_student(teacher, layers=[0], memory_options={"chunk_size": 4}).bfloat16()
    stage = make_stage(AlignStage(lora_rank=2, lora_targets=["v_proj"]), teacher, student, 1)
    training.as_masters(stage.parameters_by_name)
    with torch.no_grad():
        for value in stage.parameters_by_name.values():
            value.normal_(std=0.01)
    a, b = stage.parameters_by_name.values()
    weight = student.get_submodule(MEMORY.format(0, "v_proj")).get_base_layer().weight.clone()
    (merged,) = stage.finish().values()
    assert merged.dtype == torch.float32 and torch.equal(merged, weight.float() + (b @ a) * 8)


def test_the_start_of_adapters_is_fixed_by_the_seed(teacher):
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)
        student = build_student(teacher, layers=[0], memory_options={"chunk_size": 4})
        return make_stage(DistillStage(lora_rank=2), teacher, student, seed).parameters_by_name

    one, again, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_which_layers_get_adapters(teacher, student):
    def found(options) -> set[str]:
        fresh = build_student(teacher, layers=[0, 2], memory_options={"chunk_size": 4})
        return {name.partition(".lora_")[0] for name in make_stage(options, teacher, fresh).parameters_by_name}

    everywhere = found(DistillStage(lora_rank=2, trainable="all"))
    assert len(everywhere) == 3 * 4 and "model.layers.1.self_attn.q_proj" in everywhere
    assert found(DistillStage(lora_rank=2, trainable="all", lora_targets=["up_proj"])) == {
        f"model.layers.{layer}.mlp.up_proj" for layer in range(3)
    }
    # Only where the loss of the stage reaches.
    assert found(AlignStage(lora_rank=2, trainable="all", lora_targets=["up_proj"])) == {
        f"model.layers.{layer}.mlp.up_proj" for layer in (0, 2)
    }
    assert found(AlignStage(lora_rank=2, target="heads")) == {
        MEMORY.format(layer, name) for layer in (0, 2) for name in ("q_proj", "k_proj", "v_proj")
    }
    with pytest.raises(ConversionError, match="up_proj are no linear layers among what `trainable` memory names here"):
        found(DistillStage(lora_rank=2, lora_targets=["up_proj"]))


def test_a_head_that_is_the_embedding_too_gets_no_adapter():
    torch.manual_seed(0)
    tied = random_model(tiny_config("llama", tie_word_embeddings=True)).requires_grad_(False)
    student = build_student(tied, layers=[0])
    with pytest.raises(ConversionError, match="lm_head are no linear layers"):
        make_stage(DistillStage(lora_rank=2, trainable="all", lora_targets=["lm_head"]), tied, student)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("align.target=matrix", "needs a memory that is linear in the values"),
        ("distill.lora_targets=[up_proj]", "up_proj are no linear layers among what `trainable` memory names here"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, setting, sentence):
    def load(*args):
        raise AssertionError("loaded")

    monkeypatch.setattr("hf_memory.conversion.run._Conversion._load_teacher", load)
    source, text = save_teacher(tmp_path / "source"), save_text(tmp_path / "text.txt")
    flags = {"memory_options": {"memory_depth": 2}, "set": [setting, "distill.lora_rank=2"]}
    with pytest.raises(ConversionError, match=sentence):
        convert(tiny_recipe(source, text, tmp_path / "out", **flags))
    assert not (tmp_path / "out.converting").exists()


def test_nothing_converted_nothing_adapted(teacher):
    student = build_student(teacher, layers=[])
    stage = make_stage(AlignStage(lora_rank=2), teacher, student)
    assert stage.parameters_by_name == {} == stage.finish()


def test_kept_adapters_are_loaded_by_peft(teacher, student, blocks, tmp_path):
    options = DistillStage(lora_rank=2, lora_merge=False, trainable="all")
    student.save_pretrained(tmp_path)
    stage = make_stage(options, teacher, student, 1)
    train(stage, blocks)
    kept = stage.finish()
    assert kept == stage.parameters_by_name
    with torch.no_grad():
        expected = student.eval()(blocks).logits
    save_adapters(options, {name: value.detach() for name, value in kept.items()}, tmp_path)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.allclose(plain(blocks).logits, expected, atol=1e-3)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(adapted(blocks).logits, expected)
        other = load_adapters(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tmp_path)
        assert type(other) is type(student) and torch.equal(other(blocks).logits, expected)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(blocks).logits, expected, atol=1e-4, rtol=1e-4)


RANKS = {"set": ["align.lora_rank=2", "distill.lora_rank=3", "distill.trainable=all"], "checkpoint_seconds": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    return save_teacher(folder / "teacher"), save_text(folder / "text.txt")


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[bool, Path]:
    """By whether the last adapters are merged."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_memory.conversion.run._Conversion._report", lambda *args: None)
        patch.setattr("hf_memory.conversion.report.write_report", lambda *args: None)
        return {merge: convert(adapting(source, folder / str(merge), merge)) for merge in (True, False)}


def adapting(source: tuple[Path, Path], output: Path, merge: bool):
    return tiny_recipe(*source, output, **(RANKS | {"set": [*RANKS["set"], f"distill.lora_merge={merge}"]}))


def test_a_conversion_leaves_a_plain_model(source, undisturbed):
    theirs, ours = weights(source[0]), weights(undisturbed[True])
    assert set(ours) == set(weights(undisturbed[False]))
    kept = {name for name in theirs if name in ours}
    adapted = {name for name in kept if name.split(".")[-2] in PROJECTIONS}
    assert adapted and not any(torch.equal(ours[name], theirs[name]) for name in adapted)
    assert all(torch.equal(ours[name], theirs[name]) for name in kept - adapted)
    # Beside kept adapters lie the weights of the stage before: the teacher's where align did not reach.
    beside = weights(undisturbed[False])
    assert all(torch.equal(beside[name], theirs[name]) for name in kept)
    adapters = load_file(undisturbed[False] / "adapter" / "adapter_model.safetensors")
    config = json.loads((undisturbed[False] / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 and len(adapters) == 2 * len(config["target_modules"])
    for name in ("model.layers.0.self_attn.q_proj", MEMORY.format(1, "k_proj")):
        a, b = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(ours[f"{name}.weight"], beside[f"{name}.weight"] + (b @ a) * (16 / 3))


@pytest.mark.parametrize(("label", "step"), [("align", 3), ("distill", 0), ("distill", 4), ("distill", 5)])
@pytest.mark.parametrize("merge", [True, False])
def test_a_conversion_that_was_cut_off_ends_the_same(source, undisturbed, tmp_path, monkeypatch, label, step, merge):
    recipe = adapting(source, tmp_path / "out", merge)
    original = training._Loop.step

    def failing(self, number):
        if (self.label, number) == (label, step):
            raise RuntimeError("power cut")
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training._Loop, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            convert(recipe)
    folder = convert(recipe)
    for name in ["model.safetensors", *([] if merge else ["adapter/adapter_model.safetensors"])]:
        one, other = load_file(folder / name), load_file(undisturbed[merge] / name)
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_kill_behind_the_last_step_merges_once(source, undisturbed, tmp_path, monkeypatch):
    recipe = adapting(source, tmp_path / "out", True)

    def failing(self, *args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Adapters, "merge", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            convert(recipe)
    with monkeypatch.context() as patch:
        patch.setattr("hf_memory.conversion.run._Conversion._final_model", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            convert(recipe)
    assert WorkFolder(tmp_path / "out").last_good() == "distill-000006"
    ours, expected = weights(convert(recipe)), weights(undisturbed[True])
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_every_name_that_is_given_must_be_one_of_a_linear_layer(teacher, student):
    options = DistillStage(lora_rank=2, lora_targets=["q_proj", "up_proj", "k_prj"])
    with pytest.raises(ConversionError, match="`lora_targets` up_proj, k_prj are no linear layers among what"):
        make_stage(options, teacher, student)


def test_adapters_of_no_layer_are_not_kept(source, tmp_path):
    flags = {"layers": "none", "set": ["distill.lora_rank=2", "distill.lora_merge=false"]}
    folder = convert(tiny_recipe(*source, tmp_path / "out", **flags))
    assert not (folder / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert load_adapters(model, folder) is model
