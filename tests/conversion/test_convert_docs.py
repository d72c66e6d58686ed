"""docs/convert.md and the help of the command name all settings, and every command they print is accepted."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_memory._cli.convert import EPILOG
from hf_memory.cli import app
from hf_memory.conversion.recipe import Recipe, read_recipe
from hf_memory.conversion.recipe_file import shipped_recipes
from hf_memory.conversion.stage_options import STAGES


ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return re.findall(r"^ *(hf-memory convert .*?)(?: *#.*)?$", joined, flags=re.M)


@pytest.mark.parametrize("command", commands(PAGE + EPILOG + (ROOT / "README.md").read_text(encoding="utf-8")))
def test_printed_commands_are_accepted(command):
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--print-recipe"])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["output"]


def test_there_are_commands_to_try():
    assert len(commands(PAGE)) >= 4 and len(commands(EPILOG)) == 2


def test_the_recipe_on_the_page_is_one(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 1
    (tmp_path / "mine.yaml").write_text(blocks[0], encoding="utf-8")
    assert read_recipe(tmp_path / "mine.yaml").layers == "every:4"


def test_the_page_names_every_setting_of_a_stage_and_every_recipe():
    named = set(re.findall(r"`([\w]+)`", PAGE)) | set(re.findall(r"`([\w]+)[:=]", PAGE))
    settings = {entry.name for schema in STAGES.values() for entry in fields(schema)}
    assert not {*settings, *STAGES, *shipped_recipes()} - named


def test_links_of_the_page_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", PAGE, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / "docs" / target.partition("#")[0]).exists(), target


def test_the_help_has_every_flag_in_a_panel_and_ends_with_examples():
    text = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200"}).stdout
    for panel in ("Model", "Layers", "Memory", "Data", "Training", "Evaluation", "Output"):
        assert f" {panel} " in text
    for entry in fields(Recipe):
        assert not entry.metadata["help"] or f"--{entry.name.replace('_', '-')}" in text
    assert "docs/convert.md" in text.strip().splitlines()[-1]
