"""What a property returns, and the report of a whole run."""

from __future__ import annotations

import dis
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from rich.table import Table


Status = Literal["pass", "fail", "refused", "not-applicable", "error"]

_STATUS_STYLE = {"pass": "green", "fail": "bold red", "refused": "yellow", "not-applicable": "dim", "error": "red"}


class NotApplicableError(Exception):
    """Raised inside a property that asks for something the model does not offer."""


@dataclass(frozen=True)
class Result:
    """
    Outcome of one property on one model.

    Args:
        name: name of the property.
        status: `"pass"`; `"fail"` (a deviation above `tolerance`); `"refused"` (the model raised an error of its own
            that says so, instead of computing something else); `"not-applicable"`; `"error"` (it crashed).
        measured: largest deviation found, in the unit the property documents; `None` where nothing was measured.
        tolerance: largest deviation allowed.
        detail: one line: the worst case, or the reason.
        seconds: wall time.
    """

    name: str
    status: Status
    measured: float | None = None
    tolerance: float | None = None
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """Results of `check_model`, in the order the properties ran."""

    model: str
    parameters: int
    dtype: str
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> list[Result]:
        """Results with status `fail` or `error`; empty when the model keeps every property that applies to it."""
        return [result for result in self.results if result.status in ("fail", "error")]

    def __getitem__(self, name: str) -> Result:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def table(self) -> Table:
        """The report as a `rich` table, one row per property."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"{self.model} ({self.parameters:,} parameters, {self.dtype})")
        for column in ("property", "status", "measured", "tolerance", "seconds", "detail"):
            table.add_column(column, justify="right" if column in ("measured", "tolerance", "seconds") else "left")
        for result in self.results:
            style = _STATUS_STYLE[result.status]
            table.add_row(
                result.name,
                f"[{style}]{result.status}[/{style}]",
                _format(result.measured),
                _format(result.tolerance),
                f"{result.seconds:.1f}",
                escape(result.detail),
            )
        return table

    def to_dict(self) -> dict:
        import torch
        import transformers

        results = [asdict(result) for result in self.results]
        for result in results:
            # JSON has no infinity; a non-finite deviation is written as a string.
            for key in ("measured", "tolerance"):
                if result[key] is not None and not math.isfinite(result[key]):
                    result[key] = str(result[key])
        return {
            "model": self.model,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "failed": [result.name for result in self.failed],
            "results": results,
        }

    def to_json(self) -> str:
        """The report with the versions it was made with, as a JSON string."""
        return json.dumps(self.to_dict(), indent=2)


class Worst:
    """Keeps the largest deviation over the cases of one property, and the cases that were refused."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.measured: float | None = None
        self.label = ""
        self.failing: dict[str, None] = {}
        self.refusals: dict[str, list[str]] = {}

    def add(self, deviation: float, label: str) -> None:
        """`label` reads "kind of case, which one"; the report names every kind that failed and the worst case."""
        if self.measured is None or deviation > self.measured:
            self.measured, self.label = deviation, label
        if deviation > self.tolerance:
            self.failing.setdefault(label.split(", ")[0])

    def attempt(self, label: str, case: Callable[[], float]) -> None:
        """Runs one case; a refusal is noted instead of ending the property."""
        try:
            self.add(case(), label)
        except Exception as error:
            if not is_refusal(error):
                raise
            self.refusals.setdefault(one_line(error), []).append(label)

    def result(self) -> Result:
        """`name` and `seconds` are filled in by the runner."""
        refused = "; ".join(f"{', '.join(labels)}: {message}" for message, labels in self.refusals.items())
        failing = "fails: " + "; ".join(self.failing) if self.failing else ""
        if self.measured is None:
            status = "refused" if refused else "not-applicable"
            return Result("", status, tolerance=self.tolerance, detail=refused or "nothing was measured")
        status = "pass" if self.measured <= self.tolerance else "fail"
        refused = f"refused: {refused}" if refused else ""
        detail = "; ".join(part for part in (failing, f"worst: {self.label}", refused) if part)
        return Result("", status, self.measured, self.tolerance, detail)


def is_refusal(error: BaseException) -> bool:
    """
    Whether an exception is a sentence meant for the user rather than a crash: one of the types used for refusing an
    argument, raised by a `raise` statement in Python code outside of torch.
    """
    if not isinstance(error, (ValueError, NotImplementedError, RuntimeError)) or not str(error).strip():
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code = traceback.tb_frame.f_code
    # The instruction rather than the source line: sources may be missing, or edited since they were imported.
    is_raised = code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raised and "/torch/" not in code.co_filename.replace("\\", "/")


def one_line(error: BaseException, limit: int = 200) -> str:
    """First sentence-like line of an error message, with its type when the message is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"
