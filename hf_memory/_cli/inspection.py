"""The command `hf-memory inspect`: a picture of a memory while it reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_memory._cli.loading import UserError, load_model, load_tokenizer


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its id on the Hub.")],
    text: Annotated[str, typer.Argument(help='The text to read; "-" reads it from standard input.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")] = Path("memory.png"),
    memory: Annotated[
        str | None, typer.Option("--memory", "-m", help="Memory file or its Hub id; the text comes behind it.")
    ] = None,
    characters: Annotated[
        int, typer.Option(min=1, max=4000, help="How much of the end is drawn; all before it is read first.")
    ] = 800,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", ...; "auto" takes a GPU if there is one.')] = "auto",
    dtype: Annotated[str, typer.Option(help='"float32", "bfloat16", ...; "auto": as in the checkpoint.')] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Draw what happens in a memory while it reads: surprise, gates and states over the text."""
    text = sys.stdin.read() if text == "-" else text
    if not text:
        raise UserError("The text is empty.")
    loaded = load_model(model, device, dtype, trust_remote_code)
    if not hasattr(loaded, "read"):
        raise UserError(f"{model!r} is a {loaded.config.model_type} without memories: convert it, or choose another.")
    tokenizer = load_tokenizer(model, trust_remote_code)

    from hf_memory._cli.memory import load_memory
    from hf_memory.evaluation.memory_plot import draw_memory
    from hf_memory.evaluation.memory_trace import tokenize_with_labels, trace_memory
    from hf_memory.reading import start_of_text

    start = None if memory is None else load_memory(memory, loaded)
    before = text[:-characters]
    if before:
        start = loaded.read(before, tokenizer, start, allow_growth=True)
    ids, labels = tokenize_with_labels(tokenizer, text[-characters:])
    if start is None:
        beginning = start_of_text(tokenizer)
        ids, labels = beginning + ids, [tokenizer.bos_token for _ in beginning] + labels
    behind = 0 if start is None else int(start.seen_tokens)
    trace = trace_memory(loaded, ids, labels, start)
    title = f"{type(loaded).__name__}: {len(trace):,} tokens" + (f" behind {behind:,} others" if behind else "")
    typer.echo(f"The picture is in {draw_memory(trace, output, title)}.")


__all__ = ["inspect"]
