"""The command `hf-memory convert`: its options are the fields of the recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_memory.conversion.recipe import ConversionError, Recipe, read_recipe, split_assignment


# Flags that are no field of the recipe, or another form of one.
_OTHERS: dict[str, tuple[Any, Any, str]] = {
    "recipe": (Path | None, None, "YAML file with these and more settings; flags win over it."),
    "stages": (str | None, None, 'Which stages run: "init" alone is the surgery, default "init,align,distill".'),
    "tokens": (str | None, None, "Budget of every stage that trains."),
    "lr": (str | None, None, "Learning rate of every stage that trains."),
    "set": (list[str] | None, None, "STAGE.KEY=VALUE, any setting of a stage, such as align.lr=1e-3; repeatable."),
    "memory_option": (list[str] | None, None, "NAME=VALUE, a field of the memory's configuration; repeatable."),
    "no_code": (bool, False, "Leave out the copy of the code that lets the model load without hf_memory."),
    "restart": (bool, False, "Delete what an unfinished conversion to the same output left."),
    "print_recipe": (bool, False, "Print the whole recipe as YAML and do nothing."),
}
_REPEATED = ("data", "report_to")


def command() -> Callable[..., None]:
    """The command, with a signature for typer: one option per field of the recipe that has a help text."""

    def convert(**given: Any) -> None:
        """Convert a pretrained Transformer: memories in place of attention, then training towards the teacher."""
        run(given)

    options = {}
    for entry in fields(Recipe):
        if entry.metadata.get("help"):
            kind = bool if entry.type is bool else list[str] | None if entry.name in _REPEATED else str | None
            default = entry.default if kind is not bool and entry.default not in (None, "", MISSING) else None
            text = entry.metadata["help"] + ("" if default is None else f" Default: {default}.")
            options[entry.name] = (kind, False if kind is bool else None, text)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[
                kind,
                typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False, metavar=_metavar(kind)),
            ],
        )
        for name, (kind, default, text) in (options | _OTHERS).items()
    ]
    convert.__signature__ = inspect.Signature(parameters)
    convert.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return convert


def _metavar(kind: Any) -> str | None:
    return None if kind is bool else "FILE" if kind == Path | None else "VALUE"


def run(given: dict[str, Any]) -> None:
    """Convert as the flags say, and print the table of the report."""
    own = {name: given.pop(name) for name in ("recipe", "memory_option", "no_code", "restart", "print_recipe")}
    flags = {name: value for name, value in given.items() if value not in (None, False, [])}
    if own["memory_option"]:
        flags["memory_options"] = dict(split_assignment(text, "memory-option") for text in own["memory_option"])
    if own["no_code"]:
        flags["code"] = False
    recipe = read_recipe(own["recipe"], flags)
    if own["print_recipe"]:
        typer.echo(recipe.to_yaml(), nl=False)
        return

    from huggingface_hub.utils import logging as hub_logging

    from hf_memory.conversion.processes import is_main_process
    from hf_memory.conversion.report import rich_table
    from hf_memory.conversion.run import convert, read_report
    from hf_memory.evaluation.properties_subject import quiet

    # What the Hub's client would warn of, such as a network that is not there, ends in a sentence of ours.
    hub_logging.set_verbosity_error()
    with quiet():
        try:
            folder = convert(recipe, restart=own["restart"])
        except ConversionError:
            # Several processes fail together; one says why.
            if not is_main_process():
                raise typer.Exit(2) from None
            raise
    if not is_main_process():
        return
    report = read_report(folder)
    if report is not None:
        Console().print(rich_table(report))
    typer.echo(f"The converted model is in {folder}.")


__all__ = ["command", "run"]
