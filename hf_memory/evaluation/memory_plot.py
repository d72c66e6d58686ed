"""The picture of a memory that reads: curves over the text, and the text under the curves."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_memory.evaluation.memory_trace import MemoryTrace


LINE_WIDTH = 100
"""Characters in a line of the picture."""

_SIGNS = {"\n": "↵", "\t": "→", "\r": "␍", "": "·"}
_DPI = 110


@dataclass
class Line:
    """Tokens `start` to `stop` of a trace, which stand in one line of the picture.

    Attributes:
        edges: `[stop - start + 1]` where each token begins, in characters, and where the last one ends.
    """

    start: int
    stop: int
    edges: np.ndarray


def draw_memory(trace: MemoryTrace, path: str | os.PathLike, title: str = "") -> Path:
    """Write the picture of a trace as PNG (or what else matplotlib knows by the suffix).

    Args:
        trace: what was seen.
        path: file to write.
        title: what stands above.

    Returns:
        The file.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install 'hf-memory[plot]'.") from error
    path = Path(path)
    labels = [_shown(label) for label in trace.labels]
    lines = break_lines(labels)
    has_gates = bool(trace.layers)
    heights = [1.1, *([0.7, 0.7] if has_gates else []), 0.8, 0.28]
    figure = Figure(figsize=(14, 0.9 + len(lines) * (sum(heights) + 0.35)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.01, hspace=0.0)
    if title:
        figure.suptitle(title, fontsize=11)
    rows = figure.subfigures(len(lines), 1, squeeze=False, hspace=0.06)[:, 0]
    for line, part in zip(lines, rows):
        axes = part.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        _draw_surprise(axes[0], trace, line)
        if has_gates:
            _draw_gates(axes[1], trace.write, trace, line, "write", "viridis")
            _draw_gates(axes[2], trace.forget, trace, line, "forget", "magma")
        _draw_norms(axes[-2], trace, line)
        _draw_text(axes[-1], labels, trace, line)
        for axis in axes:
            axis.set_xlim(0, LINE_WIDTH)
            axis.tick_params(axis="x", bottom=False, labelbottom=False)
            axis.tick_params(labelsize=7)
    _write(figure, path)
    return path


def break_lines(labels: list[str], width: int = LINE_WIDTH) -> list[Line]:
    """Lines of at most `width` characters; a token that is longer has one for itself."""
    lines, start, edges = [], 0, [0]
    for index, label in enumerate(labels):
        if edges[-1] and edges[-1] + len(label) > width:
            lines.append(Line(start, index, np.array(edges)))
            start, edges = index, [0]
        edges.append(edges[-1] + min(len(label), width))
    return [*lines, Line(start, len(labels), np.array(edges))]


def _shown(label: str) -> str:
    # What has no width of its own would vanish.
    label = _SIGNS.get(label) or label.translate(str.maketrans({k: v for k, v in _SIGNS.items() if k}))
    return "".join(sign if sign.isprintable() else "·" for sign in label)


def _draw_surprise(axis: Any, trace: MemoryTrace, line: Line) -> None:
    values = trace.surprise[line.start : line.stop].numpy()
    highest = float(np.nanmax(trace.surprise.numpy(), initial=1.0))
    axis.bar(line.edges[:-1], values, np.diff(line.edges), align="edge", color="tab:red", alpha=0.8, linewidth=0)
    axis.set_ylim(0, 1.05 * highest)
    axis.set_ylabel("surprise\nbits", fontsize=7)


def _draw_gates(axis: Any, gates: Any, trace: MemoryTrace, line: Line, name: str, colors: str) -> None:
    _, layers, heads = gates.shape
    everything = gates.flatten(1).numpy()
    mesh = axis.pcolormesh(
        line.edges,
        np.arange(layers * heads + 1),
        everything[line.start : line.stop].T,
        cmap=colors,
        vmin=0,
        vmax=max(float(np.nanmax(everything)), 1e-9),
    )
    named = _some(layers)
    axis.set_yticks([heads * (i + 0.5) for i in named], [f"{trace.layers[i]}" for i in named])
    for boundary in range(heads, layers * heads, heads):
        axis.axhline(boundary, color="white", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_ylabel(f"{name}\nlayer, head", fontsize=7)
    bar = axis.figure.colorbar(mesh, ax=axis, pad=0.005, fraction=0.02, aspect=8)
    bar.ax.tick_params(labelsize=6)


def _draw_norms(axis: Any, trace: MemoryTrace, line: Line) -> None:
    norms = trace.norms.numpy()
    named = _some(len(trace.norm_layers))
    for column, layer in enumerate(trace.norm_layers):
        heights = norms[line.start : line.stop, column]
        label = f"layer {layer}" if column in named else None
        axis.stairs(heights, line.edges, baseline=None, label=label, linewidth=1.2)
    low, high = float(norms.min(initial=0)), float(norms.max(initial=1e-9))
    axis.set_ylim(min(low, 0), 1.08 * high)
    axis.set_ylabel("state\nnorm", fontsize=7)
    if line.start == 0 and trace.norm_layers:
        axis.legend(fontsize=6, ncols=len(named), loc="upper left", frameon=False)


def _some(count: int) -> range:
    """At most eight of `count` layers, evenly spread, to be named."""
    return range(0, count, -(-count // 8) or 1)


def _draw_text(axis: Any, labels: list[str], trace: MemoryTrace, line: Line) -> None:
    surprise = np.nan_to_num(trace.surprise.numpy())
    highest = max(float(surprise.max()), 1e-9)
    for index in range(line.start, line.stop):
        left, right = line.edges[index - line.start : index - line.start + 2]
        shade = 0.45 * surprise[index] / highest
        axis.axvspan(left, right, color="tab:red", alpha=shade, linewidth=0)
        for offset, sign in enumerate(labels[index][: right - left]):
            axis.text(
                left + offset + 0.5, 0.45, sign, ha="center", va="center", family="monospace", fontsize=9,
                color="0.55" if sign in "↵→␍·" else "black", parse_math=False,
            )  # fmt: skip
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    for side in ("top", "left", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _write(figure: Any, path: Path) -> None:
    # Drawn before anything is opened, and put in place at once: no half picture.
    image = io.BytesIO()
    figure.savefig(image, dpi=_DPI, format=path.suffix.removeprefix(".") or "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(image.getvalue())
    beside.replace(path)
