"""The picture of a report. matplotlib, an optional dependency, is imported when one is drawn."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_memory._cli.state_size import readable_size


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# A line at what was required.
_REQUIRED = {"color": "red", "linestyle": ":", "linewidth": 1.2}
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
    distance from the teacher behind each stage, the held-out loss by position, the growth of the cache, and what was
    recalled by length and depth. What was required is a dotted red line.

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
    if report.get("stages"):
        panels.append(lambda axes: _by_stage(axes, report))
    if any(model.get("quality") for model in report["models"].values()):
        panels.append(lambda axes: _by_position(axes, report, styles))
    if any(model.get("cache") for model in report["models"].values()):
        panels.append(lambda axes: _growth(axes, report, styles))
    recalls = {name: model["recall"] for name, model in report["models"].items() if model.get("recall")}
    columns = max(1, len(panels) if len(panels) <= 3 else (len(panels) + 1) // 2)
    lines = -(-len(panels) // columns)
    height, below = 3.8 * max(lines, 1), 3.0 if recalls else 0
    figure = Figure(figsize=(4.8 * columns, height + below), layout="constrained")
    figure.suptitle(report["title"], fontsize="medium")
    above, *rest = figure.subfigures(2, 1, height_ratios=(height, below)) if recalls else (figure,)
    for index, panel in enumerate(panels):
        axes = above.add_subplot(lines, columns, index + 1)
        axes.grid(alpha=0.25)
        panel(axes)
    if recalls:
        _recall_maps(rest[0], recalls)
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
    for required, limit in _bits_required(report, key):
        axes.axhline(limit, label=required, **_REQUIRED)
    axes.set(title="held-out text", xlabel="position in the block, tokens", ylabel=f"bits per {unit}")
    axes.legend(fontsize="small")


def _bits_required(report: dict[str, Any], key: str) -> list[tuple[str, float]]:
    """Requirements on the mean over all positions, and their limits in the unit of the plot."""
    limits, controls = [], report.get("controls", {})
    bases = {"gap": report.get("reference"), "gap_continued": controls.get("continued")}
    names = {"bits_per_byte": "bits_per_byte", "bits_per_token": "bits"}
    for entry in report.get("gate", []):
        if entry["name"] == names[key]:
            limits.append((entry["require"], entry["limit"]))
        elif entry["name"] in bases:
            whole = report["models"].get(bases[entry["name"]], {}).get("quality", {}).get("whole", {})
            limits += [(entry["require"], (1 + entry["limit"]) * whole[key])] if whole.get(key) else []
    return limits


def _by_stage(axes: Axes, report: dict[str, Any]) -> None:
    """KL from the teacher behind every stage."""
    stages = report["stages"]
    values = [stage["student"]["whole"]["kl_bits_per_token"] for stage in stages]
    axes.bar([stage["stage"] for stage in stages], values, width=0.5, color=_STYLES[1]["color"])
    for entry in report.get("gate", []):
        if entry["name"] == "kl":
            axes.axhline(entry["limit"], label=entry["require"], **_REQUIRED)
            axes.legend(fontsize="small")
    blocks = stages[0]["blocks"]
    axes.set(title="behind every stage", ylabel="KL(teacher || student), bits per token")
    axes.set_xlabel(f"mean over {blocks} held-out block{'s' if blocks > 1 else ''}")


def _recall_maps(figure: SubFigure, recalls: dict[str, dict[str, Any]]) -> None:
    """Share of right answers by length and depth, one map per model."""
    first = next(iter(recalls.values()))
    every = figure.subplots(1, len(recalls), sharey=True, squeeze=False)[0]
    for axes, (name, recall) in zip(every, recalls.items()):
        image = axes.imshow(recall["accuracy"], vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for row, cells in enumerate(recall["accuracy"]):
            for column, share in enumerate(cells):
                ink = "black" if share > 0.5 else "white"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize="small", color=ink)
        axes.set_xticks(range(len(recall["depths"])), [f"{depth:g}" for depth in recall["depths"]])
        axes.set_yticks(range(len(recall["lengths"])), [f"{length:,}" for length in recall["lengths"]])
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("depth (1: right before the question)", fontsize="small")
    every[0].set_ylabel("tokens")
    texts = f"{first['samples']} text{'s' if first['samples'] > 1 else ''}"
    figure.suptitle(f"recalled of {texts} per cell; guessing gets one in {first['choices']}", fontsize="medium")
    figure.colorbar(image, ax=list(every), fraction=0.03)


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
    for entry in report.get("gate", []):
        if entry["name"] == "cache_bytes":
            axes.plot(entry["tokens"], entry["limit"], marker="v", linestyle="", label=entry["require"], color="red")
    axes.set(title="cache of one sample", xlabel="tokens", ylabel="size", xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_size(round(value)).replace(".0 ", " ")))
    axes.legend(fontsize="small")
