"""Fields of a schema that say what they accept, and instances of plain values, or one sentence on what is wrong."""

import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError


class ConversionError(ValueError):
    """A sentence for the user: what was given, and what is accepted or what to do."""


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
        values: By field name; numbers may come as text.
        where: In front of the field names in sentences, such as `"align."`.

    Raises:
        ConversionError: An unknown key, a value of the wrong type or out of range.
    """
    known = {entry.name: entry for entry in fields(schema)}
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        accepted = ", ".join(known) or "none"
        raise ConversionError(f"Unknown key `{where}{unknown[0]}`; the keys there are: {accepted}.")
    accepted_values = {}
    for key, value in values.items():
        entry = known[key]
        accepted_values[key] = value = as_number(value, entry.type)
        try:
            # One by one, for a sentence that can name the field.
            for validator in schema.__validators__[key]:
                validator(value)
        except (TypeError, ValueError) as error:
            raise ConversionError(
                f"`{where}{key}` must be {entry.metadata['accepts']}, got {values[key]!r}."
            ) from error
    try:
        return schema(**accepted_values)
    except StrictDataclassError as error:
        raise ConversionError(
            f"{str(error.__cause__).rstrip('.')}{f' (stage {where[:-1]})' if where else ''}."
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
            return number(value)
        except ValueError:
            continue
    return value
