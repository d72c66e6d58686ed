"""The recipes that come with the package: they carry the published numbers, and each of them runs."""

from pathlib import Path

import pytest
from tiny_conversion import save_teacher, save_text
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_memory._cli.recipes import head, readable_count
from hf_memory.cli import app
from hf_memory.conversion.recipe import ConversionError, Recipe, read_recipe
from hf_memory.conversion.recipe_file import find_recipe, read_yaml, shipped_recipes
from hf_memory.conversion.run import convert


NEEDED = {"teacher": "t", "output": "o", "data": "text.txt"}
# Per stage: tokens, learning rate, blocks per step, tokens per block, what trains.
PUBLISHED = {
    "default": [(5_000_000, 1e-3, 8, 2048, "memory"), (20_000_000, 3e-4, 8, 2048, "memory")],
    "retrofit": [(5_000_000, 1e-3, 8, 2048, "memory"), (20_000_000, 3e-4, 8, 2048, "memory")],
    "mohawk": [
        (80_000_000, 2e-4, 128, 2048, "memory"),
        (160_000_000, 1e-4, 128, 2048, "memory"),
        (2_760_000_000, 1e-4, 128, 2048, "memory"),
    ],
    "mmmamba": [
        (20_000 * 128 * 1024, 1e-3, 128, 1024, "new"),
        (20_000 * 128 * 1024, 5e-4, 128, 1024, "memory"),
        (20_000 * 64 * 1024, 5e-5, 64, 1024, "memory"),
    ],
    "lolcats": [(20_000_000, 1e-2, 8, 1024, "new"), (20_000_000, 1e-4, 8, 1024, "memory")],
    "radlads": [
        (100_000_000, 1e-3, 32, 512, "memory"),
        (500_000_000, 1e-5, 96, 512, "all"),
        (100_000_000, 1e-5, 96, 16384, "all"),
    ],
    "radlads_2a": [(100_000_000, 1e-3, 32, 512, "memory"), (600_000_000, 1e-4, 32, 4096, "all")],
    "mamba_in_llama": [(10_000_000_000, 8e-5, 64, 2048, "memory"), (10_000_000_000, 2e-5, 64, 2048, "all")],
}


def test_the_recipes_carry_the_published_numbers():
    assert set(PUBLISHED) == set(shipped_recipes())
    for name, expected in PUBLISHED.items():
        recipe = read_recipe(name, NEEDED)
        found = [
            (stage.tokens, stage.lr, recipe.batch_size_of(stage), recipe.context_of(stage), stage.trainable)
            for stage in recipe.training_stages.values()
        ]
        assert found == expected, name


def test_the_default_recipe_is_what_happens_without_one():
    assert read_recipe("default", NEEDED) == read_recipe(flags=NEEDED) == Recipe(**NEEDED)


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_says_where_it_comes_from(name):
    entries = head(find_recipe(name))
    assert set(entries) == {"Source", "Budget", "Differs"} and all(entries.values())
    assert not {"teacher", "data", "output"} & set(read_yaml(find_recipe(name)))


def test_a_name_is_found_and_a_file_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mohawk") == shipped_recipes()["mohawk"]
    Path("mohawk").write_text("seed: 1\n", encoding="utf-8")
    assert read_recipe("mohawk", NEEDED).seed == 1
    with pytest.raises(ConversionError, match="There is no recipe 'lolcat', did you mean `lolcats`. Name a YAML file"):
        find_recipe("lolcat")


def test_the_command_lists_and_prints_them():
    listed = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "140"})
    assert listed.exit_code == 0
    for name in PUBLISHED:
        assert name in listed.stdout
    for said in ("2.76B", "3B", "arXiv 2408.10189", "LoRA 8", "cross entropy + 0.1 KL", "matrices", "every:6"):
        assert said in listed.stdout
    printed = CliRunner().invoke(app, ["recipes", "mohawk"])
    assert printed.stdout == find_recipe("mohawk").read_text(encoding="utf-8")
    wrong = CliRunner().invoke(app, ["recipes", "mohack"])
    assert wrong.exit_code == 2 and "did you mean `mohawk`?" in wrong.stderr
    wrong = CliRunner().invoke(app, ["recipes", "nowhere.yaml"])
    assert wrong.stderr == "Error: The recipe 'nowhere.yaml' cannot be read: No such file or directory.\n"


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1000, "1k"), (2_760_000_000, "2.76B"), (20_000_000, "20M")]
)
def test_counts_are_readable(count, text):
    assert readable_count(count) == text


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_recipe_runs(name, tmp_path):
    """At a context and budget that take a second; the stages, losses and schedules are those of the file."""
    teacher = save_teacher(tmp_path / "teacher")
    flags = {"teacher": str(teacher), "output": str(tmp_path / "out"), "data": str(save_text(tmp_path / "text.txt"))}
    flags |= {
        "context": "16",
        "batch_size": "2",
        "tokens": "64",
        "held_out_blocks": "2",
        "device": "cpu",
        "code": False,
    }
    recipe = read_recipe(name, flags)
    folder = convert(recipe)
    assert AutoModelForCausalLM.from_pretrained(folder).config.memory_layers == recipe.layer_numbers(2)
