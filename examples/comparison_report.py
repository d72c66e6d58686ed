"""Table and figure of `train_comparison.py`."""

from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table


def label(run: dict, results: dict) -> str:
    """Name of a run: the model, and where several learning rates were tried, which."""
    return run["model"] if len(results["plan"]["lrs"]) == 1 else f"{run['model']} {run['lr']:g}"


def table(results: dict) -> Table:
    """One row per run, bits per byte on held-out text."""
    title = f"bits per byte, held-out packages, blocks of {results['plan']['context']} bytes"
    out = Table("model", title=title, box=SIMPLE)
    for column in ("parameters", "all", "< 256", ">= 256", "bytes/s", "cache bytes"):
        out.add_column(column, justify="right", no_wrap=True)
    for run in results["runs"]:
        late = run["bits_per_byte_late"]
        out.add_row(
            label(run, results),
            f"{run['parameters']:,}",
            f"{run['bits_per_byte']:.3f}",
            f"{run['bits_per_byte_early']:.3f}",
            "" if late is None else f"{late:.3f}",
            f"{run['tokens'] / max(run['seconds'], 1e-9):,.0f}",
            f"{run['cache_bytes']:,}",
        )
    return out


def plot(results: dict, file: Path) -> None:
    """Held-out loss over tokens, over training time, and over the position in the block."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    by_tokens, by_time, by_position = figure.subplots(1, 3)
    for run in results["runs"]:
        name = label(run, results)
        points = [point for point in run["curve"] if point["split"] == "held_out"]
        bits = [point["bits"] for point in points]
        by_tokens.plot([point["tokens"] for point in points], bits, label=name)
        by_time.plot([point["seconds"] for point in points], bits, label=name)
        parts = run["bits_by_position"]
        width = results["plan"]["context"] / len(parts)
        by_position.plot([(i + 0.5) * width for i in range(len(parts))], parts, label=name)
    by_tokens.set(xlabel="bytes read", ylabel="held-out bits per byte")
    by_time.set(xlabel="seconds of training")
    by_position.set(xlabel="position in the block")
    by_tokens.xaxis.set_major_formatter(EngFormatter())
    by_tokens.legend()
    figure.savefig(file, dpi=150)
