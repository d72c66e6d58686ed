"""Time against length on logarithmic axes: `python -m hf_memory.kernels.benchmarks.plot [ROWS] --output PNG`.

A panel for each op and mode that was measured at two lengths or more, a line for each provider, peers of other ops at
the same shapes among them, and the floor of the card.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from .inputs import Shape
from .registry import OWN
from .rows import Row, read, results_file
from .run import floor_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, str, int, int, int, str]
"""Op with its grid, mode, batch, heads, width and dtype: what a panel holds fixed."""


def _label(row: Row) -> str:
    return row.op if row.grid is None else f"{row.op}/{row.grid}"


def _key(row: Row) -> Key:
    shape = Shape.parse(row.shape)
    return (_label(row), row.mode, shape.batch, shape.heads, shape.width, row.dtype)


def _by(row: Row) -> str:
    inexact = row.error is not None and row.error > row.allowed
    return f"{row.provider}, {row.form}" + (", inexact" if inexact else "")


def _time(row: Row) -> int:
    return Shape.parse(row.shape).time


def newest(rows: list[Row]) -> list[Row]:
    """The last row of each measurement in the newest run."""
    if not rows:
        return []
    run = (rows[-1].run, rows[-1].device)
    kept = {(_key(row), _time(row), row.provider, row.form): row for row in rows if (row.run, row.device) == run}
    return list(kept.values())


def panels(rows: list[Row]) -> dict[Key, dict[str, list[Row]]]:
    """Lines of each panel by their label, ours first; only panels of ours with two lengths."""
    own, peers = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=_time):
        if row.provider == OWN:
            own[_key(row)][_by(row)].append(row)
        elif row.op not in ("matmul", "model"):
            peers[_key(row)[1:]][f"{_by(row)} ({_label(row)})"].append(row)
    return {
        key: {**lines, **peers[key[1:]]}
        for key, lines in own.items()
        if any(len({_time(row) for row in line}) > 1 for line in lines.values())
    }


def draw(rows: list[Row]) -> "Figure":
    """The picture of a list of rows.

    Raises:
        ValueError: if no op of ours was measured at two lengths.
    """
    from matplotlib.figure import Figure

    found = panels(newest(rows))
    if not found:
        raise ValueError("no op of this package was measured at two lengths in the newest run")
    names = list(dict.fromkeys((key[0], *key[2:]) for key in found))
    modes = list(dict.fromkeys(key[1] for key in found))
    size = (5.2 * len(modes), 3.4 * len(names) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(rows[-1].device)
    grid = figure.subplots(len(names), len(modes), squeeze=False)
    styles = _styles(found)
    for i, (op, *rest) in enumerate(names):
        for j, mode in enumerate(modes):
            lines = found.get((op, mode, *rest))
            if lines is None:
                grid[i][j].set_axis_off()
            else:
                _draw_panel(grid[i][j], lines, styles)
                batch, heads, width, dtype = rest
                grid[i][j].set_title(f"{op}, {mode}: {batch} x T x {heads} x {width}, {dtype}", fontsize=9)
    handles = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(modes), fontsize=8)
    return figure


def _styles(found: dict[Key, dict[str, list[Row]]]) -> dict[str, dict]:
    """Colour and dashes of each line, the same in all panels."""
    providers = {label: line[0].provider for lines in found.values() for label, line in lines.items()}
    return {
        label: {"color": f"C{i % 10}", "linestyle": "-" if provider == OWN else "--"}
        for i, (label, provider) in enumerate(providers.items())
    }


def _draw_panel(axes: "Axes", lines: dict[str, list[Row]], styles: dict[str, dict]) -> None:
    for label, line in lines.items():
        low, high = ([getattr(row, name) for row in line] for name in ("q20_ms", "q80_ms"))
        times = [_time(row) for row in line]
        axes.plot(times, [row.median_ms for row in line], marker="o", ms=3, label=label, **styles[label])
        axes.fill_between(times, low, high, color=styles[label]["color"], alpha=0.2, linewidth=0)
    own = {_time(row): row for line in lines.values() for row in line if row.provider == OWN}
    floors = {time: floor.ms for time, row in sorted(own.items()) if (floor := floor_of(row))}
    if floors:
        axes.plot(list(floors), list(floors.values()), color="grey", linestyle=":", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per token" if "decode" in line[0].mode else "ms")
    ticks = sorted({_time(row) for line in lines.values() for row in line})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def main(
    rows: Annotated[Path | None, typer.Argument(help="A results file. Default: that of this device.")] = None,
    output: Annotated[Path | None, typer.Option(help="The picture. Default: beside the rows, .png.")] = None,
) -> None:
    """Draw the newest run of a results file."""
    file = rows or results_file(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    target = output or file.with_suffix(".png")
    try:
        figure = draw(read(file))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    typer.echo(f"Wrote {target}")


if __name__ == "__main__":
    typer.run(main)
