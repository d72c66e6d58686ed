"""The picture of a report. matplotlib, an optional dependency, is imported when one is drawn."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_memory._cli.state_size import readable_size


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart for the colour-blind; line styles tell the same in grey.
_STYLES = (
    {"color": "#000000", "linestyle": "-"},
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": ":"},
    {"color": "#E69F00", "linestyle": "--"},
)


def plot(report: dict[str, Any], file: Path | str) -> None:
    """
    Draw what a report (`hf_memory.conversion.report`) has: the loss of every stage over the tokens it has read, the
    held-out loss by position, and the growth of the cache.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list[dict[str, Any]]] = {}
    for curve in report.get("curves", []):
        if curve["tokens"]:
            curves.setdefault(curve["stage"], []).append(curve)
    styles = _style_by_name(report, curves)
    panels = [lambda axes, stage=stage: _losses(axes, stage, curves[stage], styles) for stage in curves]
    if any(model.get("quality") for model in report["models"].values()):
        panels.append(lambda axes: _by_position(axes, report, styles))
    if any(model.get("cache") for model in report["models"].values()):
        panels.append(lambda axes: _growth(axes, report, styles))
    columns = len(panels) if len(panels) <= 3 else (len(panels) + 1) // 2
    lines = -(-len(panels) // max(columns, 1))
    figure = Figure(figsize=(4.8 * max(columns, 1), 3.8 * max(lines, 1)), layout="constrained")
    figure.suptitle(report["title"], fontsize="medium")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.grid(alpha=0.25)
        panel(axes)
    figure.savefig(file, dpi=150)


def _style_by_name(report: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, str]]:
    names = [*report["models"], *(curve["run"] for runs in curves.values() for curve in runs)]
    return {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(dict.fromkeys(names))}


def _losses(axes: Axes, stage: str, curves: list[dict[str, Any]], styles: dict[str, dict[str, str]]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for curve in curves:
        # A line through a single point would not be seen.
        marker = "." if len(curve["tokens"]) == 1 else None
        axes.plot(curve["tokens"], curve["loss"], label=curve["run"], marker=marker, **styles[curve["run"]])
    axes.set(title=f"stage {stage}", xlabel="tokens read", ylabel=textwrap.fill(curves[0].get("unit", "loss"), 36))
    if all(loss > 0 for curve in curves for loss in curve["loss"]):
        lowest, highest = (f(loss for curve in curves for loss in curve["loss"]) for f in (min, max))
        if highest > 5 * lowest:
            axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(fontsize="small")


def _by_position(axes: Axes, report: dict[str, Any], styles: dict[str, dict[str, str]]) -> None:
    spans = {name: model["quality"]["curve"] for name, model in report["models"].items() if model.get("quality")}
    per_byte = all(span["bits_per_byte"] is not None for curve in spans.values() for span in curve)
    key = "bits_per_byte" if per_byte else "bits_per_token"
    for name, curve in spans.items():
        middles = [(span["start"] + span["end"]) / 2 for span in curve]
        axes.plot(middles, [span[key] for span in curve], label=name, marker=".", **styles[name])
    unit = "byte" if per_byte else "token"
    axes.set(title="held-out text", xlabel="position in the block, tokens", ylabel=f"bits per {unit}")
    axes.legend(fontsize="small")


def _growth(axes: Axes, report: dict[str, Any], styles: dict[str, dict[str, str]]) -> None:
    """Models whose caches are alike share a line; where a part of one does not grow, that part is drawn too."""
    from matplotlib.ticker import FuncFormatter

    alike: dict[tuple, list[str]] = {}
    for name, model in report["models"].items():
        if model.get("cache"):
            key = tuple((size["tokens"], size["kv_bytes"], size["memory_bytes"]) for size in model["cache"])
            alike.setdefault(key, []).append(name)
    for sizes, names in alike.items():
        tokens, kv, memory = zip(*sizes)
        total = [first + second for first, second in zip(kv, memory)]
        axes.plot(tokens, total, label=" = ".join(names), **styles[names[0]])
        if memory[0] and kv[-1]:
            axes.plot(tokens, memory, label="its memory alone", color=styles[names[0]]["color"], linestyle=":")
    axes.set(title="cache of one sample", xlabel="tokens", ylabel="size", xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_size(round(value)).replace(".0 ", " ")))
    axes.legend(fontsize="small")
