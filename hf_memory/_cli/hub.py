"""The commands `hf-memory card` and `hf-memory push`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved model.")]


def card(
    folder: FolderArgument,
    license: Annotated[str | None, typer.Option(help="License of the weights, such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Of the text, such as en; repeatable.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that this one was made from.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of training data; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that was written by hand.")] = False,
) -> None:
    """Fill the model card (README.md) of a folder from its configuration, recipe and report."""
    from hf_memory._cli.loading import UserError
    from hf_memory.conversion.card import refill_card
    from hf_memory.evaluation.properties_subject import quiet

    if not folder.is_dir():
        raise UserError(f"There is no folder {str(folder)!r}.")
    metadata = {"license": license, "language": language, "base_model": base_model, "datasets": dataset}
    if base_model is not None:
        metadata["base_model_relation"] = "finetune"
    with quiet():
        file = refill_card(folder, metadata, force)
    typer.echo(f"The card is in {file}.")


def push(
    folder: FolderArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to: NAME, USER/NAME or ORGANISATION/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    no_code: Annotated[
        bool, typer.Option("--no-code", help="Without the code that loads the model where hf-memory is not installed.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Push to a repository that holds a model of another type.")
    ] = False,
) -> None:
    """Push a folder to the Hub: weights, tokenizer, code and card in one commit. Run again, it goes on."""
    from hf_memory.conversion.card import refill_card
    from hf_memory.evaluation.properties_subject import quiet
    from hf_memory.hub.push import push_folder, stage_folder

    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory() as scratch:
        with quiet():
            stage = stage_folder(folder, scratch, code=not no_code, write_card=refill_card, say=say)
        pushed = push_folder(
            stage,
            repo,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            message=message,
            replace=force,
            say=say,
        )
    typer.echo(pushed.url)
