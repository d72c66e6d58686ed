"""Tables and figure of `recall.py`."""

from collections import defaultdict
from pathlib import Path
from statistics import mean

from recall_tasks import END_OF_CALL
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


HALF = 0.5


def grouped(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values of some of their keys."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return dict(groups)


def counts(row: dict) -> bool:
    """Whether a row enters averages: what failed or was cut by the end of a call is listed instead."""
    return "accuracy" in row and row["cut"] != END_OF_CALL


def score(row: dict) -> float:
    """Mean accuracy over the lengths."""
    return mean(row["accuracy"].values())


def best(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """`(model, width)` -> rows of all seeds at the learning rate with the best mean accuracy, smallest state first.

    Rates with fewer seeds than another are out, as long as one has more.
    """
    chosen = {}
    for key, group in grouped([row for row in rows if counts(row)], "model", "width").items():
        rates = grouped(group, "lr").values()
        chosen[key] = max(rates, key=lambda runs: (len(runs), mean(score(run) for run in runs)))
    return dict(sorted(chosen.items(), key=lambda item: (item[1][0]["state_bytes"], item[0])))


def half_learned(run: dict) -> int | None:
    """The step at which half of the answers in training were right."""
    return next((step for step, _, right in run["curve"] if right > HALF), None)


def table(task: str, rows: list[dict]) -> Table:
    """A line per model and head width: accuracy at its best learning rate, mean and range over seeds."""
    lengths = sorted({length for row in rows if counts(row) for length in row["accuracy"]}, key=int)
    out = Table("model", title=task, box=SIMPLE)
    columns = ("width", "state bytes", "parameters", "lr", "seeds", "half at step", *(f"at {x}" for x in lengths))
    for column in columns:
        out.add_column(column, justify="right", no_wrap=True)
    for (model, width), runs in best(rows).items():
        cells = []
        for length in lengths:
            shares = [run["accuracy"][length] for run in runs]
            cells.append(f"{mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
        first = runs[0]
        halves = " ".join(str(half_learned(run) or "never") for run in runs)
        sizes = (f"{first['state_bytes']:,}", f"{first['parameters']:,}", f"{first['lr']:g}", str(len(runs)), halves)
        out.add_row(model, str(width), *sizes, *cells)
    return out


def failures(rows: list[dict]) -> list[str]:
    """A line for each run that is in no average, or that did not take all of its steps."""
    lines = []
    for row in rows:
        name = f"{row['task']}, {row['model']}, width {row['width']}, lr {row['lr']:g}, seed {row['seed']}"
        if "error" in row:
            lines.append(f"failed: {name}: {row['error'].strip().splitlines()[-1]}")
        elif row["cut"]:
            where = f"at step {row['steps']} of {row['of_steps']} ({row['cut']})"
            lines.append(f"cut: {name} {where}, accuracy {score(row):.0%}")
    return lines


def plot(rows: list[dict], file: Path) -> None:
    """Accuracy of recall over the size of the state, its learning, and accuracy of the passkey over the length."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.8), layout="constrained")
    by_bytes, by_step, by_length = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["model"] for row in rows))
    style = {name: {"color": colormaps["tab10"](i), "marker": "osD^vP*Xh<"[i % 10]} for i, name in enumerate(names)}
    tasks = {task: best(found) for (task,), found in grouped(rows, "task").items()}
    by_model: dict[str, list[list[dict]]] = defaultdict(list)
    for (model, _), runs in tasks.get("recall", {}).items():
        by_model[model].append(runs)
    for model, widths in by_model.items():
        found = [[100 * score(run) for run in runs] for runs in widths]
        middle = [mean(shares) for shares in found]
        spread = [[m - min(s) for m, s in zip(middle, found)], [max(s) - m for m, s in zip(middle, found)]]
        sizes = [runs[0]["state_bytes"] for runs in widths]
        by_bytes.errorbar(sizes, middle, spread, capsize=3, lw=1, label=model, **style[model])
        runs = min(widths, key=lambda runs: list(runs[0]["sizes"]["widths"]).index(runs[0]["width"]))
        steps = [step for step, _, _ in min((run["curve"] for run in runs), key=len)]
        right = [100 * mean(run["curve"][i][2] for run in runs) for i in range(len(steps))]
        by_step.plot(steps, right, color=style[model]["color"], label=f"{model}, width {runs[0]['width']}")
    for (model, _), runs in tasks.get("passkey", {}).items():
        lengths = sorted(runs[0]["accuracy"], key=int)
        middle = [100 * mean(run["accuracy"][length] for run in runs) for length in lengths]
        by_length.plot([int(length) for length in lengths], middle, label=model, **style[model])
    by_bytes.set(xscale="log", xlabel="bytes of state", ylabel="values recalled, % (mean and range of seeds)")
    by_step.set(xlabel="steps", ylabel="values recalled in training, %")
    by_length.set(xscale="log", xlabel="tokens of the input", ylabel="digits recalled, %")
    for axes in (by_bytes, by_step, by_length):
        axes.set_ylim(0, 105)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=150)


def report(rows: list[dict], picture: Path, console: Console) -> None:
    """Print a table of each task and what failed, and draw the figure where matplotlib is installed."""
    for (task,), found in grouped(rows, "task").items():
        console.print(table(task, found))
    for text in failures(rows):
        console.print(text, highlight=False, soft_wrap=True)
    try:
        plot(rows, picture)
    except ImportError:
        console.print("No picture: matplotlib is not installed.")
    else:
        console.print(f"{picture} has the figure.")
