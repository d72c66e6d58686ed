"""`hf-memory convert`: what it makes, what it prints, and one sentence for every wrong input."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_conversion import CONTEXT, save_teacher, save_text
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

from hf_memory.cli import app
from hf_memory.conversion.recipe import read_recipe


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def needed(teacher: Path, text: Path, output: Path) -> dict[str, object]:
    return {"teacher": teacher, "data": text, "output": output, "layers": 1, "context": CONTEXT, "device": "cpu"}


def flags(values: dict[str, object]) -> list[object]:
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def test_a_conversion_from_end_to_end(teacher, text, tmp_path):
    values = needed(teacher, text, tmp_path / "out") | {"tokens": 64, "batch-size": 2, "held-out-blocks": 2}
    result = run(*flags(values), "--memory-option", "chunk_size=8", "--memory-option", "memory_depth=1")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out"
    for said in ("Stage align trains memory: 64 tokens, 2 steps", "trainable: ", "frozen: ", "distill: 2 of 2, loss"):
        assert said in result.stderr
    for printed in ("held-out bits per byte", "The converted model is in"):
        assert printed in result.stdout
    assert list(tmp_path.iterdir()) == [folder]
    written = {entry.name for entry in folder.iterdir()}
    assert written >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    assert written >= {"report.json", "modeling_hybrid.py", "chat_template.jinja"}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["converted"] == {"layers": [1], "of": 2, "memory": "titans", "mode": "replace"}
    assert [curve["stage"] for curve in report["curves"]] == ["align", "distill"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card and "chunk_size: 8" in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.memory_layers == [1] and tokenizer.chat_template
    assert model.generate(**tokenizer("a b", return_tensors="pt"), max_new_tokens=4, do_sample=False).shape[1] == 7


def test_surgery_alone_needs_no_data_and_measures_nothing(teacher, tmp_path):
    result = run(
        "--teacher", teacher, "--output", tmp_path / "out", "--layers", "all", "--stages", "init", "--no-code"
    )
    assert result.exit_code == 0, result.output
    written = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert "README.md" in written and not written & {"report.json", "modeling_hybrid.py"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.memory_layers == [0, 1]


def test_a_teacher_without_a_tokenizer(teacher, text, tmp_path):
    bare = shutil.copytree(teacher, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    result = run(*flags(needed(bare, text, tmp_path / "out")))
    assert result.exit_code == 2 and result.stderr == f"Error: {str(bare)!r} holds no tokenizer that can be read.\n"
    result = run("--teacher", bare, "--output", tmp_path / "out", "--layers", 1, "--stages", "init", "--no-code")
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_a_tokenizer_that_knows_more_than_its_teacher(text, tmp_path):
    small = save_teacher(tmp_path / "small", vocab_size=64)
    result = run(*flags(needed(small, text, tmp_path / "out")))
    assert result.exit_code == 2 and ", but the teacher knows 64 only: put" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_the_teachers_own_folder_is_no_text(teacher, tmp_path, monkeypatch):
    """`--teacher teacher --data teacher` would read its configuration as text, where sampling is meant."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "teacher")
    result = run(*flags(needed("teacher", "teacher", "out")))
    assert result.exit_code == 2 and "is the teacher's own folder, which is no text to learn from" in result.stderr


def test_print_recipe_prints_what_read_recipe_reads(teacher, text, tmp_path):
    values = needed(teacher, text, tmp_path / "out")
    result = run(*flags(values), "--set", "align.lr=1e-4", "--memory-option", "chunk_size=8", "--print-recipe")
    assert result.exit_code == 0 and list(tmp_path.iterdir()) == []
    (tmp_path / "recipe.yaml").write_text(result.stdout, encoding="utf-8")
    again = read_recipe(tmp_path / "recipe.yaml")
    assert again.to_dict() == yaml.safe_load(result.stdout)
    assert again.stages[1].lr == 1e-4 and again.memory_options == {"chunk_size": 8} and again.layers == [1]
    assert run("--recipe", tmp_path / "recipe.yaml", "--print-recipe").stdout == result.stdout


WRONG = {
    "no teacher": ({"teacher": None}, "`teacher` is missing: name a folder or a Hub id."),
    "unknown folder": ({"teacher": "./nowhere"}, "There is no file or folder './nowhere'."),
    "unknown id": ({"teacher": "nobody/nothing"}, "'nobody/nothing' is no folder here and not in the local cache"),
    "a model type": ({"teacher": "llama"}, "`teacher` 'llama' names an architecture: name a saved model."),
    "no such layer": ({"layers": "0,2"}, "Layer 2 does not exist: the teacher has 2 layers, 0 to 1."),
    "layers in other words": ({"layers": "some"}, "`layers` must be layer numbers such as 1,3,5, or one of all"),
    "no data": ({"data": None}, "`data` is missing: name a text file, a folder or a dataset"),
    "empty data": ({"data": os.devnull}, "holds no text, but a block to train on and one to hold out"),
    "no such file": ({"data": "nowhere.txt"}, "There is no file or folder 'nowhere.txt' to read data from."),
    "unknown memory": ({"memory": "sponge"}, "`memory` must be one of titans, lattice, trellis, got 'sponge'."),
    "unknown option": (
        {"memory-option": "colour=red"},
        "Unknown key `memory_options.colour`; the keys there are: variant, memory_depth, ",
    ),
    "impossible option": ({"memory-option": "chunk_size=0"}, "`chunk_size` must be at least 1, got 0."),
    "heads": ({"memory-option": "num_attention_heads=3"}, "its `num_attention_heads` is 4 as in the teacher, not 3"),
    "option without value": ({"memory-option": "chunk_size"}, "`memory-option` takes NAME=VALUE, got 'chunk_size'."),
    "too long": ({"context": 999}, "`context` 999 is beyond the 64 positions that the teacher knows."),
    "device": ({"device": "abacus"}, "Device 'abacus' is not available here."),
    "number": ({"batch-size": "two"}, "`batch_size` must be a whole number of at least 1, got 'two'."),
    "unknown tracker": ({"report-to": "diary"}, "`report_to` takes aim, comet_ml, mlflow, tensorboard, "),
    "missing tracker": ({"report-to": "clearml"}, "`report_to` names clearml, which is not installed: install it, or"),
    "recipe": ({"recipe": "nowhere.yaml"}, "The recipe 'nowhere.yaml' cannot be read: No such file or directory."),
}


@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_input_is_one_sentence_and_leaves_nothing(teacher, text, tmp_path, changes, sentence):
    values = needed(teacher, text, tmp_path / "deep" / "out") | changes
    result = run(*flags({name: value for name, value in values.items() if value is not None}))
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.strip().count("\n") == 0 and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_family_is_refused_before_anything_is_loaded(text, tmp_path):
    sizes = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(tmp_path / "bloom")
    (tmp_path / "bloom" / "model.safetensors").unlink()
    result = run(*flags(needed(tmp_path / "bloom", text, tmp_path / "out")))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: BloomForCausalLM cannot be converted: its attention does not go through")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.converting").exists()


def test_an_output_that_exists_is_not_touched(teacher, text, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine", encoding="utf-8")
    result = run(*flags(needed(teacher, text, output)), "--restart")
    assert result.exit_code == 2
    assert result.stderr == f"Error: The output {str(output)!r} exists already: remove it, or choose another name.\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (output / "precious").read_text(encoding="utf-8") == "mine"


def test_an_output_that_cannot_be_written_is_one_sentence(teacher, text, tmp_path):
    (tmp_path / "file").touch()
    result = run(*flags(needed(teacher, text, tmp_path / "file" / "out")))
    assert result.exit_code == 2
    assert "cannot be written: Not a directory." in result.stderr


def test_processes_but_one_are_silent(teacher, text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = run(*flags(needed(teacher, text, tmp_path / "out") | {"context": 999}))
    assert result.exit_code == 2 and result.output == ""


def test_retrofit_through_the_command(teacher, tmp_path):
    values = {"teacher": teacher, "output": tmp_path / "out", "mode": "retrofit", "window": 8, "stages": "init"}
    assert run(*flags(values), "--no-code").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(teacher)
    ids = torch.randint(260, (1, 8))
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
