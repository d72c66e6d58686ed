"""What a run should reach, beside what it measured: `python -m hf_memory.kernels.benchmarks.targets [ROWS]`.

The targets are stated for bfloat16 on an H200. A ratio compares rows of one run on one device and no others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from .matmul import rate
from .rows import Row, read, results_file
from .run import floor_of


LONG, SMALL, DEEP_SHAPES = "1x8192x16x128", "8x1024x8x64", ("16x2048x16x64", "4x2048x16x64")
SLOTS_SHAPE = "1x8192x16x64"
FLA = {"op": "gated_delta_rule", "provider": "fla"}
OURS = {"provider": "hf_memory", "form": "triton"}
COMPILED = {"provider": "hf_memory", "form": "compiled"}


class Rows:
    """Rows of one run on one device."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def get(self, dtype: str = "bfloat16", **wanted: str | int) -> Row | None:
        """The newest row with these fields, if there is one."""
        wanted["dtype"] = dtype
        found = [row for row in self._rows if all(getattr(row, name) == value for name, value in wanted.items())]
        return found[-1] if found else None

    def ms(self, **wanted: str | int) -> float | None:
        """Its median time."""
        row = self.get(**wanted)
        return row and row.median_ms


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: what is measured.
        limit: what it should reach.
        measure: the measured value, `None` where rows are missing.
        at_least: whether more is better.
        unit: of both, `"x"` for a ratio.
    """

    what: str
    limit: float
    measure: Callable[[Rows], float | None]
    at_least: bool = False
    unit: str = "x"

    def line(self, rows: Rows) -> tuple[str, str, str, str]:
        """What, target, measured, and whether it is met: `yes`, `no`, or `open` without rows."""
        value = self.measure(rows)
        sign = "≥" if self.at_least else "≤"
        limit = f"{sign} {self.limit:g} {self.unit}".rstrip()
        if value is None:
            return self.what, limit, "-", "open"
        met = value >= self.limit if self.at_least else value <= self.limit
        return self.what, limit, f"{value:.3g} {self.unit}".rstrip(), "yes" if met else "no"


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _ratio(ours: dict, theirs: dict, rows: Rows) -> float | None:
    return _quotient(rows.ms(**ours), rows.ms(**theirs))


def _milliseconds(wanted: dict, rows: Rows) -> float | None:
    return rows.ms(**wanted)


def _error(wanted: dict, rows: Rows) -> float | None:
    row = rows.get(dtype="float32", **wanted)
    return row and row.error


def _share_of_matmul(wanted: dict, rows: Rows) -> float | None:
    ours, peak = rows.get(**wanted), rows.get(op="matmul")
    return _quotient(ours and 100 * rate(ours), peak and rate(peak))


def _share_of_floor(wanted: dict, rows: Rows) -> float | None:
    # Served from a graph or from Python, whichever is faster.
    found = [row for mode in ("decode", "decode-graph") if (row := rows.get(mode=mode, **wanted))]
    row = min(found, key=lambda row: row.median_ms, default=None)
    floor = row and floor_of(row)
    return floor and 100 * floor.ms / row.median_ms


def _seconds(wanted: dict, rows: Rows) -> float | None:
    return _quotient(rows.ms(mode="first-call", **wanted), 1e3)


def _against_fla(what: str, op: str, grid: int, limits: dict[str, float], shape: str = LONG) -> list[Target]:
    targets = []
    for mode, limit in limits.items():
        where = {"shape": shape, "mode": mode}
        ours = {"op": op, "grid": grid, **OURS, **where}
        targets.append(Target(f"{what}, {shape}, {mode} / fla", limit, partial(_ratio, ours, FLA | where)))
    return targets


def _linear() -> list[Target]:
    targets = _against_fla("linear, grid 64", "anchored_linear", 64, {"fwd": 0.9, "fwd+bwd": 1.1})
    for grid in (16, 1):
        targets += _against_fla(f"linear, grid {grid}", "anchored_linear", grid, {"fwd": 1.4, "fwd+bwd": 1.7})
    for grid in (16, 1):
        ours = {"op": "anchored_linear", "grid": grid, "mode": "fwd+bwd", **OURS}
        targets.append(Target(f"linear, grid {grid}, float32, error", 1e-5, partial(_error, ours), unit=""))
    fla = {"op": "anchored_linear", "grid": 1, "mode": "fwd+bwd", "provider": "fla"}
    targets.append(Target("the same by fla's chunk form (fails)", 1e-5, partial(_error, fla), at_least=True, unit=""))
    targets += _against_fla("linear with norm, grid 64", "anchored_linear_norm", 64, {"fwd": 1.5, "fwd+bwd": 2.0})
    small = {"op": "anchored_linear", "grid": 64, "shape": SMALL, **OURS}
    eager = small | {"mode": "fwd"}
    targets.append(Target(f"linear, grid 64, {SMALL}, fwd", 0.12, partial(_milliseconds, eager), unit="ms"))
    graph = {"shape": SMALL, "mode": "fwd-graph"}
    ratio = partial(_ratio, small | graph, FLA | graph)
    return [*targets, Target(f"linear, grid 64, {SMALL}, fwd in a graph / fla", 1.0, ratio)]


def _deep() -> list[Target]:
    large, small = DEEP_SHAPES
    op = {"op": "anchored_mlp", "grid": 64, "mode": "fwd+bwd"}
    share = partial(_share_of_matmul, op | OURS | {"shape": large})
    targets = [
        Target(f"deep, chunk 64, {large}, fwd+bwd, of the matmul rate", 20, share, at_least=True, unit="%"),
        Target(
            f"deep, chunk 64, {small}, fwd+bwd", 2.3, partial(_milliseconds, op | OURS | {"shape": small}), unit="ms"
        ),
    ]
    for shape in DEEP_SHAPES:
        where = op | {"shape": shape}
        speedup = partial(_ratio, where | COMPILED, where | OURS)
        targets.append(Target(f"deep, chunk 64, {shape}, compiled chunk form / ours", 3, speedup, at_least=True))
    return targets


def _serving() -> list[Target]:
    targets = []
    for what, op, grid, shape in (
        ("linear, grid 64", "anchored_linear", 64, "64x2048x16x128"),
        ("deep, chunk 16", "anchored_mlp", 16, "64x2048x16x64"),
    ):
        share = partial(_share_of_floor, {"op": op, "grid": grid, "shape": shape, **OURS})
        targets.append(Target(f"decode, {what}, {shape}, of the byte floor", 70, share, at_least=True, unit="%"))
    for op in ("anchored_linear", "anchored_linear_norm", "anchored_mlp"):
        seconds = partial(_seconds, {"op": op, "grid": 64, **OURS})
        targets.append(Target(f"first call, cold caches, {op}", 10, seconds, unit="s"))
    return targets


def _slots() -> list[Target]:
    return [
        *_against_fla("Lattice, grid 16", "sphere_slots", 16, {"fwd+bwd": 3.0}, SLOTS_SHAPE),
        *_against_fla("Lattice, exact", "sphere_slots", 1, {"fwd+bwd": 12.0}, SLOTS_SHAPE),
        *_against_fla("Trellis, chunk 16", "two_pass_slots", 16, {"fwd+bwd": 2.5}, SLOTS_SHAPE),
    ]


TARGETS = [*_linear(), *_deep(), *_serving(), *_slots()]


def table(rows: list[Row]) -> str:
    """The targets beside what the newest run among the rows has measured.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("There are no rows to compare with the targets.")
    run, device = rows[-1].run, rows[-1].device
    of_run = Rows([row for row in rows if (row.run, row.device) == (run, device)])
    lines = [("what", "target", "measured", "met"), *(target.line(of_run) for target in TARGETS)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    title = f"{device}, run {run}" + ("" if "H200" in device else " (the targets are stated for an H200)")
    return "\n".join([title, *("  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in lines)])


def main(
    rows: Annotated[Path | None, typer.Argument(help="A results file. Default: that of this device.")] = None,
) -> None:
    """Compare the newest run of a results file with the targets."""
    file = rows or results_file(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        typer.echo(table(read(file)))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error


if __name__ == "__main__":
    typer.run(main)
