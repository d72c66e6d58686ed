"""Fields of a schema that say what they accept, and instances of plain values, or one sentence on what is wrong."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import field, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError


class ConversionError(ValueError):
    """A sentence for the user: what was given, and what is accepted or what to do."""


class FileMapping(dict):
    """A mapping that was read from a file, and the line of each of its keys.

    Args:
        values: What it holds.
        file: As the user named it.
        line: Of the mapping itself, counted from 1.
        lines: Of its keys.
    """

    def __init__(self, values: Mapping[str, Any], file: str, line: int, lines: Mapping[str, int]) -> None:
        super().__init__(values)
        self.file, self.line, self.lines = file, line, dict(lines)


class FileList(list):
    """A list that was read from a file, and the line of each of its values."""

    def __init__(self, values: list[Any], lines: list[int]) -> None:
        super().__init__(values)
        self.lines = lines


def plain(value: Any) -> Any:
    """The same without knowledge of files: dicts and lists."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value that does not come from the file: a sentence about it names no line."""
    values[key] = value
    if isinstance(values, FileMapping):
        values.lines.pop(key, None)


def place(values: Mapping[str, Any], key: str | None = None) -> str:
    """In front of a sentence about a mapping, or about one of its keys: `"recipe.yaml, line 12: "`, or nothing."""
    if not isinstance(values, FileMapping) or key is not None and key not in values.lines:
        return ""
    return f"{values.file}, line {values.line if key is None else values.lines[key]}: "


def nearest(name: str, known: Collection[str]) -> str:
    """`", did you mean `lr`?"`, or nothing when no known name is close."""
    found = difflib.get_close_matches(name, known, 1)
    return f", did you mean `{found[0]}`?" if found else ""


def unknown_key(
    values: Mapping[str, Any], known: Collection[str], where: str = "", unnamed: Collection[str] = ()
) -> ConversionError | None:
    """A sentence about the first key that is not known; `None` when all are. It names those known but `unnamed`."""
    key = next((str(key) for key in values if key not in known and key not in unnamed), None)
    if key is None:
        return None
    hint = nearest(key, known)
    return ConversionError(
        f"{place(values, key)}Unknown key `{where}{key}`{f'{hint} The' if hint else '; the'} keys there are: "
        f"{', '.join(known) or 'none'}."
    )


def option(
    default: Any, accepts: str, holds: Callable[[Any], bool] = lambda value: True, help: str = "", **settings: Any
) -> Any:
    """A field of the schema.

    Args:
        default: Its default; a list or dict is copied.
        accepts: What it accepts, as it stands in the sentence about a wrong value.
        holds: Whether a value of the right type is accepted.
        help: One line for the command line; empty for fields that have no flag.
    """

    def check(value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value) or value is not None and not holds(value):
            raise ValueError(f"must be {accepts}, got {value!r}")

    settings["default_factory" if isinstance(default, (list, dict)) else "default"] = (
        default.copy if isinstance(default, (list, dict)) else default
    )
    return field(metadata={"accepts": accepts, "help": help, "validator": check}, **settings)


def count(default: int | None, help: str = "") -> Any:
    accepts = "a whole number of at least 1"
    return option(default, accepts, lambda value: not isinstance(value, bool) and value >= 1, help)


def share(default: float, help: str = "") -> Any:
    return option(default, "a number from 0 to 1", lambda value: 0 <= value <= 1, help)


def positive(default: float | None, help: str = "") -> Any:
    return option(default, "a number above 0", lambda value: value > 0, help)


def not_negative(default: float, help: str = "") -> Any:
    return option(default, "a number of at least 0", lambda value: value >= 0, help)


def one_of(default: str, choices: tuple[str, ...], help: str = "") -> Any:
    return option(default, "one of " + ", ".join(choices), choices.__contains__, help)


def build(schema: type, values: Mapping[str, Any], where: str = "") -> Any:
    """An instance of a class of the schema from plain values.

    Args:
        schema: `Recipe` or a stage.
        values: By field name; numbers may come as text. A `FileMapping` gives sentences that begin with its line.
        where: In front of the field names in sentences, such as `"align."`.

    Raises:
        ConversionError: An unknown key, a value of the wrong type or out of range.
    """
    known = {entry.name: entry for entry in fields(schema)}
    if (unknown := unknown_key(values, known, where)) is not None:
        raise unknown
    accepted_values = {}
    for key, value in values.items():
        entry = known[key]
        accepted_values[key] = value = plain(as_number(value, entry.type))
        try:
            # One by one, for a sentence that can name the field.
            for validator in schema.__validators__[key]:
                validator(value)
        except (TypeError, ValueError) as error:
            raise ConversionError(
                f"{place(values, key)}`{where}{key}` must be {entry.metadata['accepts']}, got {plain(values[key])!r}."
            ) from error
    try:
        return schema(**accepted_values)
    except (StrictDataclassError, ConversionError) as error:
        sentence = str(error if isinstance(error, ConversionError) else error.__cause__).rstrip(".")
        named = re.match(r"`(\w+)`", sentence)
        line = place(values, named[1]) if named else ""
        raise ConversionError(
            f"{line or place(values)}{sentence}{f' (stage {where[:-1]})' if where else ''}."
        ) from error


def as_number(value: Any, annotation: Any) -> Any:
    """Text as a number where the field takes numbers only: YAML reads `1e-3` as text."""
    if not isinstance(value, str) or annotation not in (
        int,
        int | None,
        float | int,
        float | int | None,
        str | float | int,
    ):
        return value
    for number in (int, float):
        try:
            found = number(value)
        except ValueError:
            continue
        # 1e9 tokens are a whole number.
        return int(found) if number is float and annotation in (int, int | None) and found.is_integer() else found
    return value
