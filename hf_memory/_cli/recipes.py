"""The command `hf-memory recipes`: what recipes come with the package, and what is in one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hf_memory.conversion.recipe import read_recipe
from hf_memory.conversion.recipe_file import find_recipe, read_yaml, shipped_recipes
from hf_memory.conversion.stage_options import AlignStage, DistillStage, TrainingStage


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe, with what its comments say of it.")
    ] = None,
) -> None:
    """List the recipes that come with the package, or print one as YAML."""
    if name is not None:
        file = find_recipe(name)
        # For its sentences: a file that cannot be read, or that is none of ours.
        read_yaml(file)
        typer.echo(file.read_text(encoding="utf-8"), nl=False)
        return
    table = Table("recipe", "layers", "stages", "tokens", "source", title="Recipes", show_lines=True)
    table.columns[3].justify = "right"
    for name, file in shipped_recipes().items():
        # A recipe of the package says nothing about models and text; it is read as if somebody had.
        recipe = read_recipe(file, {"teacher": "teacher", "data": "data", "output": "output"})
        stages = recipe.training_stages
        lines = [f"{label}, {readable_count(stage.tokens)}: {aim(stage)}" for label, stage in stages.items()]
        total = readable_count(sum(stage.tokens for stage in stages.values()))
        layers = f"{recipe.layers}\n{recipe.mode}"
        table.add_row(f"[bold]{name}[/]", layers, "\n".join(lines), total, head(file)["Source"])
    Console().print(table)
    typer.echo(
        "hf-memory recipes NAME prints one; hf-memory convert --recipe NAME uses it, --scale 0.01 tries it small."
    )


def head(file: Path) -> dict[str, str]:
    """The entries `# Key: text` in the comment at the beginning of a recipe; a text may go on in further lines."""
    entries: dict[str, str] = {}
    key = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        word, colon, rest = text.partition(": ")
        if colon and word.isalpha() and word.istitle():
            key, text = word, rest
        if key:
            entries[key] = f"{entries.get(key, '')} {text}".strip()
    return entries


def aim(stage: TrainingStage) -> str:
    """What a stage compares, and what it trains, in a few words."""
    if isinstance(stage, AlignStage):
        compared = {"heads": "head outputs", "matrix": "matrices"}.get(stage.target, f"{stage.target} outputs")
    elif isinstance(stage, DistillStage):
        weights = {"cross entropy": stage.ce_weight, "KL": stage.kl_weight}
        parts = [("" if weight == 1 else f"{weight:g} ") + name for name, weight in weights.items() if weight]
        compared = " + ".join(parts)
    else:
        compared = "the student's own text"
    trained = f"LoRA {stage.lora_rank}" if stage.lora_rank is not None else stage.trainable
    return f"{compared}; trains {trained}"


def readable_count(count: int) -> str:
    """`"2.76B"` tokens."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


__all__ = ["recipes"]
