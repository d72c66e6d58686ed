"""The command `hf-memory convert`: its options are the fields of the recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, NamedTuple, get_args

import typer
from rich.console import Console

from hf_memory.conversion.recipe import ConversionError, Recipe, read_recipe, split_assignment


# Flags that are no field of the recipe, or another form of one.
_OTHERS: dict[str, tuple[Any, str]] = {
    "recipe": (str | None, "A recipe by name (see `hf-memory recipes`) or a YAML file; flags win over it."),
    "scale": (str | None, "Multiply all budgets of the recipe, to try it small: 0.01."),
    "stages": (str | None, 'Which stages run: "init" alone is the surgery, default "init,align,distill".'),
    "tokens": (str | None, "Budget of every stage that trains."),
    "lr": (str | None, "Learning rate of every stage that trains."),
    "set": (list[str] | None, "STAGE.KEY=VALUE, any setting of a stage, such as align.lr=1e-3; repeatable."),
    "memory_option": (list[str] | None, "NAME=VALUE, a field of the memory's configuration; repeatable."),
    "no_code": (bool, "Leave out the copy of the code that lets the model load without hf_memory."),
    "restart": (bool, "Delete what an unfinished conversion to the same output left."),
    "print_recipe": (bool, "Print the whole recipe as YAML and do nothing."),
}
_PANELS = {
    "Model": ("teacher", "output", "revision", "trust_remote_code", "device_map", "teacher_bits", "stream"),
    "Layers": ("layers", "cache_budget", "auto_tokens", "auto_blocks", "mode", "window"),
    "Memory": ("memory", "memory_option"),
    "Data": ("data", "sampled_tokens", "data_config", "text_column", "held_out", "context", "batch_size"),
    "Training": (
        "recipe",
        "scale",
        "stages",
        "tokens",
        "lr",
        "set",
        "seed",
        "dtype",
        "device",
        "checkpoint_seconds",
        "report_to",
    ),
    "Evaluation": (
        *("held_out_blocks", "require", "evaluate_stages"),
        *("controls", "continued_lr", "recall_samples"),
    ),
    "Output": ("save_dtype", "no_code", "restart", "print_recipe"),
}
EPILOG = """Half of the layers of a small model, on a text of yours:

  hf-memory convert --teacher Qwen/Qwen3-0.6B --layers odd --data text.txt --output my-hybrid

A published recipe at a hundredth of its budget:

  hf-memory convert --recipe radlads --scale 0.01 --teacher Qwen/Qwen3-0.6B --data text.txt --output my-hybrid

The same command continues what was cut off. All of it from the beginning: docs/convert.md"""


class Flag(NamedTuple):
    """One option of the command.

    Args:
        kind: Its type for typer.
        help: One line.
        metavar: What stands for its value in the help; nothing for a switch.
        negative: Whether it is a switch that is on unless `--no-...` is given.
    """

    kind: Any
    help: str
    metavar: str
    negative: bool = False


def command() -> Callable[..., None]:
    """The command, with a signature for typer: one option per field of the recipe that has a help text."""

    def convert(**given: Any) -> None:
        """Convert a pretrained Transformer: memories in place of attention, then training towards the teacher.

        The result is a folder with the model, its tokenizer, a report and a card. It loads like other models.
        Nothing but --teacher, --data and --output is needed.
        """
        run(given)

    known = {entry.name: _flag(entry) for entry in fields(Recipe) if entry.metadata.get("help")}
    known |= {name: Flag(kind, text, "" if kind is bool else "VALUE") for name, (kind, text) in _OTHERS.items()}
    panels = {name: panel for panel, names in _PANELS.items() for name in names}
    order = [name for names in _PANELS.values() for name in names if name in known]
    parameters = []
    for name in (*order, *(name for name in known if name not in panels)):
        flag, dashed = known[name], name.replace("_", "-")
        settings = typer.Option(
            f"--{dashed}/--no-{dashed}" if flag.negative else f"--{dashed}",
            help=flag.help,
            show_default=False,
            metavar=flag.metavar,
            rich_help_panel=panels.get(name, "Training"),
        )
        annotation = Annotated[flag.kind, settings]
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if flag.kind is bool else None,
                annotation=annotation,
            )
        )
    convert.__signature__ = inspect.Signature(parameters)
    convert.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return convert


def _flag(entry: Field) -> Flag:
    """The option of a field of the recipe; what it takes is left to the recipe's own checks."""
    text, accepts = entry.metadata["help"], entry.metadata["accepts"]
    if entry.type is bool:
        return Flag(bool | None, text, "", negative=entry.default is True)
    if entry.default not in (None, "", MISSING):
        text += f" Default: {entry.default}."
    parts = {entry.type, *get_args(entry.type)}
    if accepts.startswith("one of "):
        metavar = accepts.removeprefix("one of ").replace(", ", "|")
    else:
        metavar = "NUMBER" if parts & {int, float} and str not in parts else "VALUE"
    return Flag(list[str] | None if list[str] in parts else str | None, text, metavar)


def run(given: dict[str, Any]) -> None:
    """Convert as the flags say, print the report, and exit with 1 when a requirement is not met."""
    own = {name: given.pop(name) for name in ("recipe", "memory_option", "no_code", "restart", "print_recipe")}
    flags = {name: value for name, value in given.items() if value is not None and value != []}
    if own["memory_option"]:
        flags["memory_options"] = dict(split_assignment(text, "memory-option") for text in own["memory_option"])
    if own["no_code"]:
        flags["code"] = False
    recipe = read_recipe(own["recipe"], flags)
    if own["print_recipe"]:
        typer.echo(recipe.to_yaml(), nl=False)
        return

    from huggingface_hub.utils import logging as hub_logging

    from hf_memory.conversion.gate import failures
    from hf_memory.conversion.processes import is_main_process
    from hf_memory.conversion.report import rich_report
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
        Console().print(rich_report(report))
    typer.echo(f"The converted model is in {folder}.")
    if failed := failures(report):
        typer.echo(f"Not met: {', '.join(failed)}. The model and its report are kept.", err=True)
        raise typer.Exit(1)


__all__ = ["EPILOG", "command", "run"]
