"""The commands `hf-memory read` and `hf-memory memory info`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_memory._cli.loading import UserError, load_model, load_tokenizer
from hf_memory._cli.state_size import readable_size


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_memory.cache import MemoryCache
    from hf_memory.memory_file import MemoryInfo

_CHARACTERS, _SHA256, _START = "characters of this part", "sha256 of this part", "memory in front of this part"


def read(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its id on the Hub.")],
    text: Annotated[str, typer.Argument(metavar="TEXT_FILE", help='UTF-8 text; "-" reads standard input.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Memory file to write.")],
    memory: Annotated[
        str | None, typer.Option("--memory", "-m", help="Go on from this memory file instead of an empty memory.")
    ] = None,
    piece: Annotated[int, typer.Option(min=1, help="Tokens per call of the model.")] = 4096,
    allow_growth: Annotated[
        bool, typer.Option("--allow-growth", help="Read even if some layers keep keys and values of every token.")
    ] = False,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", ...; "auto" takes a GPU if there is one.')] = "auto",
    dtype: Annotated[str, typer.Option(help='"float32", "bfloat16", ...; "auto": as in the checkpoint.')] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Let a model read a text once, and keep its memory as a file.

    After Ctrl-C the same command goes on where it stopped.
    """
    from hf_memory.memory_file import memory_path
    from hf_memory.reading import ReadingInterruptedError

    _check_text(text)
    output = memory_path(output)
    _check_output(output, text)
    part = output.with_name(output.name + ".part")
    loaded = load_model(model, device, dtype, trust_remote_code)
    if not hasattr(loaded, "read"):
        raise UserError(f"{model!r} is a {loaded.config.model_type} without memories: convert it, or choose another.")
    tokenizer = load_tokenizer(model, trust_remote_code)
    start, done = _start(loaded, text, part, memory)
    known = dict(start.notes) if start is not None else {}
    try:
        with _open_text(text, done) as stream:
            filled = loaded.read(stream, tokenizer, start, piece, allow_growth, progress=False)
    except ReadingInterruptedError as stop:
        if not stop.tokens:
            raise UserError("Stopped before the first piece was read; nothing was written.") from None
        done += stop.characters or 0
        stop.memory.notes = known | {_CHARACTERS: str(done), _START: _hash_memory(memory)}
        if text != "-":
            stop.memory.notes[_SHA256] = _hash_start(text, done)
        with _sentences():
            stop.memory.save_pretrained(part)
        how = "run the same command again" if text != "-" else f"pass --memory {part} with the rest"
        typer.echo(f"Stopped. The memory of the first {done:,} characters is in {part}: {how} to go on.", err=True)
        raise typer.Exit(130) from None
    name = "standard input" if text == "-" else Path(text).name
    filled.notes = {key: value for key, value in known.items() if key not in (_CHARACTERS, _SHA256, _START)}
    filled.notes["source"] = " + ".join(filter(None, (filled.notes.get("source"), name)))
    with _sentences():
        filled.save_pretrained(output)
    part.unlink(missing_ok=True)
    info = filled.info
    typer.echo(f"{info.tokens:,} tokens are in {output}, {readable_size(output.stat().st_size)}.")


def info(
    source: Annotated[str, typer.Argument(metavar="MEMORY", help="Memory file, folder with one, or Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a memory file holds, after checking that it is whole."""
    from hf_memory.memory_file import find_memory_file, read_info

    with _sentences():
        path = find_memory_file(source)
        described = read_info(path)
    if as_json:
        document = dataclasses.asdict(described) | {"file": str(path), "file_bytes": path.stat().st_size}
        typer.echo(json.dumps(document, indent=2))
        return
    Console(width=None if sys.stdout.isatty() else 160).print(_table(path, described))


def load_memory(source: str, model: PreTrainedModel) -> MemoryCache:
    """The memory of a file or Hub id for a model that can have one."""
    from hf_memory.cache import MemoryCache

    if not hasattr(model, "read"):
        raise UserError(f"A {model.config.model_type} model has no memory to load: --memory needs one that has.")
    with _sentences():
        return MemoryCache.from_pretrained(source, model=model)


@contextmanager
def _sentences() -> Iterator[None]:
    """What memory files say about paths, disks and networks is for the user as it is."""
    try:
        yield
    except OSError as error:
        raise UserError(str(error)) from error


def _check_text(text: str) -> None:
    if text == "-" or Path(text).is_file():
        return
    if Path(text).exists():
        raise UserError(f'{text!r} is no regular file: pipe the text in, and give "-" in its place.')
    raise UserError(f"There is no file {text!r} to read.")


def _check_output(output: Path, text: str) -> None:
    """Refuse before the first token what would fail behind the last one."""
    if text != "-" and output.exists() and output.samefile(text):
        raise UserError(f"The memory would take the place of the text {text!r}: give another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"No file can be written to {str(output.parent)!r}: {error.strerror}.") from error


def _start(model: PreTrainedModel, text: str, part: Path, memory: str | None) -> tuple[MemoryCache | None, int]:
    """Memory to start from, and the characters of the text that are in it already."""
    if part.is_file() and text != "-":
        begun = load_memory(str(part), model)
        done, digest = int(begun.notes.get(_CHARACTERS, 0)), begun.notes.get(_SHA256)
        if digest != _hash_start(text, done):
            raise UserError(f"{part} is the begun memory of another text than {text!r}: move or delete it.")
        if begun.notes.get(_START) != _hash_memory(memory):
            raise UserError(f"{part} was begun with another --memory than this command has: move or delete it.")
        typer.echo(f"Going on behind the first {done:,} characters, which are in {part}.", err=True)
        return begun, done
    return (None if memory is None else load_memory(memory, model)), 0


@contextmanager
def _open_text(text: str, skipped: int) -> Iterator[TextIO]:
    """The text behind its first `skipped` characters, with a bar on standard error."""
    if text == "-":
        yield sys.stdin
        return
    from rich import progress

    console = Console(stderr=True)
    try:
        with progress.open(
            text, "rt", encoding="utf-8", description="reading", console=console, disable=not console.is_terminal
        ) as stream:
            stream.read(skipped)
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(f"{text!r} is not UTF-8 text: it has an {error.reason}.") from error


def _hash_start(text: str, characters: int) -> str:
    """Hash of the first characters of a file."""
    with open(text, encoding="utf-8") as stream:
        return hashlib.sha256(stream.read(characters).encode()).hexdigest()


def _hash_memory(memory: str | None) -> str:
    """Hash of a memory file to go on from."""
    from hf_memory.memory_file import find_memory_file

    if memory is None:
        return "none"
    with _sentences():
        return hashlib.sha256(find_memory_file(memory).read_bytes()).hexdigest()


def _table(path: Path, described: MemoryInfo) -> Table:
    model = described.model
    table = Table("", "", title=escape(str(path)), show_header=False)
    table.add_row("tokens read", f"{described.tokens:,}")
    if described.rows > 1:
        table.add_row("texts side by side", str(described.rows))
    for what, size in described.parts.items():
        table.add_row(what, f"{readable_size(size)} ({size:,} bytes)")
    table.add_row("file", f"{path.stat().st_size:,} bytes, format {described.format_version}, hash as written")
    table.add_section()
    table.add_row("model", _printable(model.model_type) + (f", {escape(model.name)}" if model.name else ""))
    table.add_row("configuration", model.config_hash[:12])
    weights = "not known" if model.weights is None else f"{model.weights.exact[:12]}, {model.weights.dtype}"
    table.add_row("weights", weights)
    if described.notes:
        table.add_section()
        for key, value in described.notes.items():
            table.add_row(_printable(key), _printable(value))
    return table


def _printable(text: str) -> str:
    """Text of a file for the terminal, which it must not be able to command."""
    return escape("".join(character if character.isprintable() else "\ufffd" for character in text))


__all__ = ["info", "load_memory", "read"]
