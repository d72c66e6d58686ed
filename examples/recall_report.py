"""Table and figure of `recall.py`."""

from itertools import groupby
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE
from rich.table import Table


def best(rows: list[dict]) -> list[list[dict]]:
    """For every model, the rows of all seeds at the learning rate with the best mean accuracy."""

    def key(row: dict) -> str:
        return row["model"]

    chosen = []
    for _, group in groupby(sorted(rows, key=key), key):
        rates: dict[float, list[dict]] = {}
        for row in group:
            rates.setdefault(row["lr"], []).append(row)
        chosen.append(max(rates.values(), key=lambda runs: mean(mean(run["accuracy"].values()) for run in runs)))
    return sorted(chosen, key=lambda runs: runs[0]["state_bytes"])


def table(rows: list[dict]) -> Table:
    """A line per model: accuracy of each length at its best learning rate, mean and range over seeds."""
    lengths = sorted({length for row in rows for length in row["accuracy"]}, key=int)
    out = Table("model", title=rows[0]["task"] if rows else "no rows", box=SIMPLE)
    for column in ("state bytes", "parameters", "lr", "seeds", *(f"at {length}" for length in lengths)):
        out.add_column(column, justify="right", no_wrap=True)
    for runs in best(rows):
        cells = []
        for length in lengths:
            shares = [run["accuracy"][length] for run in runs]
            cells.append(f"{mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
        first = runs[0]
        sizes = (f"{first['state_bytes']:,}", f"{first['parameters']:,}", f"{first['lr']:g}", str(len(runs)))
        out.add_row(first["model"], *sizes, *cells)
    return out


def plot(rows: list[dict], file: Path) -> None:
    """Accuracy of recall over the size of the state, and of the passkey over the length of the input."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_bytes, by_length = figure.subplots(1, 2)
    for runs in best([row for row in rows if row["task"] == "recall"]):
        shares = [100 * mean(run["accuracy"].values()) for run in runs]
        middle = mean(shares)
        spread = [[middle - min(shares)], [max(shares) - middle]]
        by_bytes.errorbar(runs[0]["state_bytes"], middle, spread, fmt="o", capsize=3, label=runs[0]["model"])
    for runs in best([row for row in rows if row["task"] == "passkey"]):
        lengths = sorted(runs[0]["accuracy"], key=int)
        middle = [100 * mean(run["accuracy"][length] for run in runs) for length in lengths]
        by_length.plot([int(length) for length in lengths], middle, "o-", label=runs[0]["model"])
    by_bytes.set(xscale="log", ylim=(0, 105), xlabel="bytes of state", ylabel="values recalled, %")
    by_length.set(xscale="log", ylim=(0, 105), xlabel="tokens of the input", ylabel="digits recalled, %")
    for axes in (by_bytes, by_length):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
