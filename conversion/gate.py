"""Requirements on the figures of a report, such as `kl<0.05`: read before anything loads, checked at the end."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_memory._cli.state_size import readable_size
from hf_memory.conversion.schema import ConversionError


FIGURES = {
    "bits": "held-out bits per token",
    "bits_per_byte": "held-out bits per byte",
    "kl": "KL(teacher || student) in bits per token",
    "agreement": "share of tokens at which both find the same token likeliest",
    "gap": "share of bits that the student needs beyond the teacher's",
    "gap_continued": "the same against the teacher trained on with the same text",
    "recall": "share of right answers of the recall probe, over all lengths and depths",
    "cache_bytes": "bytes of the cache of one sample after 16,384 tokens, or after N as cache_bytes@N",
    "speed": "tokens per second behind the longest context that was timed",
}
"""What can be required, always of the student."""

CACHE_TOKENS = 16 * 1024
_SHARES = ("agreement", "gap", "gap_continued", "recall")
# Shares of a whole: no more than all of it. A gap may be several times the teacher's loss.
_PARTS = ("agreement", "recall")
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_UNITS = {"": 1, "%": 0.01, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FORM = re.compile(
    r"\s*(?P<name>\w+)(?:@(?P<tokens>\d+))?\s*(?P<operator><=|>=|<|>)\s*(?P<number>[-+.\deE]+?)\s*(?P<unit>%|[A-Za-z]+)?\s*"
)


@dataclass(frozen=True)
class Requirement:
    """One requirement.

    Args:
        text: As it was given.
        name: One of `FIGURES`.
        operator: `<`, `<=`, `>` or `>=`.
        limit: What stands behind the operator; shares as numbers from 0 to 1, sizes in bytes.
        tokens: Length at which the cache is meant.
    """

    text: str
    name: str
    operator: str
    limit: float
    tokens: int = CACHE_TOKENS

    def allows(self, value: float | None) -> bool:
        """Whether a value passes; what was not measured, or is not finite, does not."""
        return value is not None and math.isfinite(value) and _OPERATORS[self.operator](value, self.limit)


def parse(text: str) -> Requirement:
    """A requirement from its text.

    Args:
        text: `NAME OPERATOR VALUE` with a name of `FIGURES`; the value is a number, for shares also a percentage
            (`gap<3%`), for the cache also a size (`cache_bytes@32768<64MiB`).

    Raises:
        ConversionError: For anything else.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ConversionError(
            f"`require` takes NAME OPERATOR VALUE, such as kl<0.05, with an operator <, <=, > or >=, got {text!r}."
        )
    name, unit = found["name"], found["unit"] or ""
    if name not in FIGURES:
        raise ConversionError(f"`require` {text!r} names {name}, which is not measured: use {', '.join(FIGURES)}.")
    if found["tokens"] and name != "cache_bytes":
        raise ConversionError(f"`require` {text!r}: only cache_bytes takes a length (@N).")
    if found["tokens"] and int(found["tokens"]) < 1:
        raise ConversionError(f"`require` {text!r}: a length is a whole number of at least 1.")
    if unit not in _UNITS:
        raise ConversionError(f"`require` {text!r}: {unit} is no unit: use %, KiB, MiB or GiB, or none.")
    if unit == "%" and name not in _SHARES or unit.endswith("iB") and name != "cache_bytes":
        raise ConversionError(
            f"`require` {text!r}: {unit} does not belong to {name}; percentages go with {', '.join(_SHARES)}, sizes "
            "with cache_bytes."
        )
    try:
        limit = float(found["number"]) * _UNITS[unit]
    except ValueError:
        raise ConversionError(f"`require` {text!r}: {found['number']!r} is no number.") from None
    if name in _PARTS and not 0 <= limit <= 1:
        raise ConversionError(f"`require` {text!r}: {name} is a share, from 0 to 1 or from 0% to 100%.")
    tokens = int(found["tokens"]) if found["tokens"] else CACHE_TOKENS
    return Requirement(text.strip(), name, found["operator"], limit, tokens)


def figure(report: Mapping[str, Any], name: str, tokens: int = CACHE_TOKENS) -> float | None:
    """A figure of `FIGURES` from a report; `None` where it was not measured."""
    student = report["models"].get(report.get("student", "student"), {})
    whole = student.get("quality", {}).get("whole", {})
    if name in ("gap", "gap_continued"):
        others = report.get("reference") if name == "gap" else report.get("controls", {}).get("continued")
        base = report["models"].get(others, {}).get("quality", {}).get("whole", {}).get("bits_per_token")
        return whole["bits_per_token"] / base - 1 if whole and base else None
    if name == "cache_bytes":
        sizes = {size["tokens"]: size["kv_bytes"] + size["memory_bytes"] for size in student.get("cache", [])}
        return sizes.get(tokens)
    if name == "speed":
        speeds = student.get("speed", [])
        return max(speeds, key=lambda speed: speed["context"])["tokens_per_second"] if speeds else None
    if name == "recall":
        cells = [cell for row in student.get("recall", {}).get("accuracy", []) for cell in row]
        return sum(cells) / len(cells) if cells else None
    return whole.get({"bits": "bits_per_token", "kl": "kl_bits_per_token"}.get(name, name))


def check(report: Mapping[str, Any], texts: Iterable[str]) -> list[dict[str, Any]]:
    """Every requirement with what was measured: the entry `gate` of a report."""
    found = []
    for requirement in map(parse, texts):
        value = figure(report, requirement.name, requirement.tokens)
        found.append(
            {
                "require": requirement.text,
                "name": requirement.name,
                "operator": requirement.operator,
                "limit": requirement.limit,
                "tokens": requirement.tokens,
                "measured": value,
                "passed": requirement.allows(value),
            }
        )
    return found


def failures(report: Mapping[str, Any] | None) -> list[str]:
    """The requirements of a report that were not met, as they were given."""
    return [entry["require"] for entry in (report or {}).get("gate", []) if not entry["passed"]]


def readable(name: str, value: float | None) -> str:
    """A figure as a table shows it."""
    if value is None or not math.isfinite(value):
        return "not measured"
    if name in _SHARES:
        return f"{value:.2%}"
    return readable_size(round(value)) if name == "cache_bytes" else f"{value:,.4g}"


__all__ = ["FIGURES", "Requirement", "check", "failures", "figure", "parse", "readable"]
