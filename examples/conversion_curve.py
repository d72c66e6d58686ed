"""What a conversion costs in bits, over the number of converted layers and the budget of tokens, for several memories.

Every point is a conversion of its own by `hf-memory convert`, beside two controls on as many tokens of the same text:
the teacher trained on (a hybrid without converted layers, cross entropy, the better of two learning rates), and the
same student whose Titans memory never writes (inner step size 0). Points are made once: the folder keeps them, and an
interrupted conversion goes on. The rows go to `--output`, with a picture beside it.

python examples/conversion_curve.py --tokens 131072 --layers 2 --memories titans --output runs/curve.jsonl
python examples/conversion_curve.py --device cuda --jobs 10 --output runs/curve.jsonl
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stdlib_text import library_text


matplotlib.use("Agg")

HERE = Path(__file__).resolve().parent
CONTINUED, OFF = "continued", "off"
# What a fine-tuned Transformer is given: none of them is better at every budget.
CONTINUED_LRS = (1e-4, 3e-4)
MEMORIES: dict[str, list[str]] = {
    "titans": ["memory_depth=1", "chunk_size=1", "memory_momentum=false"],
    "lattice": [],
    "trellis": [],
}
CONTEXT = 2048
LR = 1e-3
"""Of the memories in the last stage; what the teacher has too learns at a third of it."""
ALIGN_SHARE = 0.25
"""Of the tokens, for the stage that aligns blocks; the teacher that is trained on spends them in its one stage."""
TARGETS = {"half": 0.03, "all": 0.08}


@dataclass(frozen=True)
class Point:
    """One conversion.

    Attributes:
        memory: a memory, or `"continued"` or `"off"`.
        layers: how many layers are converted, counted from the first.
        tokens: budget of all stages together.
        lr: learning rate of the last stage.
    """

    memory: str
    layers: int
    tokens: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.memory}-{self.layers}-{self.tokens}-{self.lr:g}"


@dataclass(frozen=True)
class Setting:
    """What all points share.

    Attributes:
        teacher: folder of the model.
        text: training and held-out folder.
        work: folder of the conversions.
        device: where they run.
        window: tokens that attention beside a memory sees; 0 replaces attention.
        batch: blocks per step.
        context: tokens per block.
        blocks: held-out blocks that are read.
    """

    teacher: str
    text: tuple[Path, Path]
    work: Path
    device: str
    window: int
    batch: int
    context: int
    blocks: int


def points(memories: list[str], layers: list[int], budgets: list[int]) -> list[Point]:
    """All points, controls first, large budgets first: they take longest."""
    found = []
    for tokens in sorted(budgets, reverse=True):
        found += [Point(CONTINUED, 0, tokens, rate) for rate in CONTINUED_LRS]
        for count in sorted(layers, reverse=True):
            found += [Point(memory, count, tokens, LR) for memory in [*memories, OFF]]
    return found


def command(point: Point, setting: Setting) -> list[str]:
    """The command line of a point."""
    trains = point.layers > 0
    memory, options = ("titans", [*MEMORIES["titans"], "theta_max=0"]) if point.memory == OFF else (point.memory, [])
    layers = "none" if not trains else ",".join(map(str, range(point.layers)))
    aligned = round(ALIGN_SHARE * point.tokens) if trains else 0
    training, held_out = setting.text
    flags = {
        "teacher": setting.teacher,
        "output": setting.work / point.name,
        "memory": memory if trains else "titans",
        "layers": layers,
        "data": training,
        "held-out": held_out,
        "held-out-blocks": setting.blocks,
        "recall-samples": 0,
        "context": setting.context,
        "batch-size": setting.batch,
        "device": setting.device,
        "stages": "init,align,distill" if trains else "init,distill",
    }
    if trains and setting.window:
        flags |= {"mode": "retrofit", "window": setting.window}
    stage = {"distill.tokens": point.tokens - aligned, "distill.lr": point.lr, "distill.trainable": "all"}
    stage |= {"distill.ce_weight": 1}
    if trains:
        stage |= {"align.tokens": aligned, "align.lr": 3e-3, "distill.kept_lr": 3e-4, "distill.kl_weight": 1}
    else:
        stage |= {"distill.kl_weight": 0}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += [word for name, value in stage.items() for word in ("--set", f"{name}={value}")]
    if trains:
        words += [word for option in options or MEMORIES[memory] for word in ("--memory-option", option)]
    return [sys.executable, "-m", "hf_memory.cli", "convert", *words, "--no-code", "--no-evaluate-stages"]


def run(point: Point, setting: Setting, end: float | None) -> str | None:
    """Make a point unless it is there; the last line of what went wrong, if something did."""
    if (setting.work / point.name).is_dir():
        return None
    limit = None if end is None else end - time.monotonic()
    if limit is not None and limit < 1:
        return "no time left"
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(command(point, setting), capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return "no time left"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def row(point: Point, setting: Setting) -> dict[str, Any]:
    """What a finished point's report says."""
    report = json.loads((setting.work / point.name / "report.json").read_text(encoding="utf-8"))
    models = report["models"]
    parts = {name: models[name]["quality"]["parts"] for name in ("teacher", "student")}
    whole = {name: models[name]["quality"]["whole"]["bits_per_byte"] for name in parts}
    return asdict(point) | {
        "teacher": Path(setting.teacher).name,
        "window": setting.window if point.layers else None,
        "context": setting.context,
        "batch": setting.batch,
        "teacher_bits": whole["teacher"],
        "bits": whole["student"],
        "teacher_bits_late": parts["teacher"][-1]["bits_per_byte"],
        "bits_late": parts["student"][-1]["bits_per_byte"],
        "kl": models["student"]["quality"]["whole"]["kl_bits_per_token"],
        "device": report["environment"].get("device", setting.device),
    }


def with_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the gap to the best teacher that was trained on as many tokens, and what the memory closes.

    `gap` is the share of bits more than that teacher needs, `closed` how much of the difference between the control
    with its memory off and the original teacher, beyond the first 1,024 tokens, the student makes good.
    """
    found = []
    for one in rows:
        same = [other for other in rows if other["tokens"] == one["tokens"]]
        continued = [other["bits"] for other in same if other["memory"] == CONTINUED]
        off = [o["bits_late"] for o in same if o["memory"] == OFF and o["layers"] == one["layers"]]
        gap = one["bits"] / min(continued) - 1 if continued else None
        closed = None
        if off and one["memory"] not in (CONTINUED, OFF):
            closed = (off[0] - one["bits_late"]) / (off[0] - one["teacher_bits_late"])
        found.append(one | {"gap": gap, "closed": closed})
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("memory", "layers", "tokens", "bits per byte", "behind the continued teacher", "closed beyond 1,024")
    for one in rows:
        gap = "-" if one["gap"] is None else f"{one['gap']:+.1%}"
        closed = "-" if one["closed"] is None else f"{one['closed']:.0%}"
        shown.add_row(one["memory"], str(one["layers"]), f"{one['tokens']:,}", f"{one['bits']:.4f}", gap, closed)
    return shown


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Gaps over tokens, one panel for each number of layers, with the targets for half and for all of them."""
    from matplotlib import pyplot

    counts = sorted({one["layers"] for one in rows if one["layers"]})
    figure, axes = pyplot.subplots(1, len(counts), figsize=(4 * len(counts), 3.6), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], counts):
        for memory in dict.fromkeys(one["memory"] for one in rows if one["layers"]):
            mine = [o for o in rows if (o["memory"], o["layers"]) == (memory, count) and o["gap"] is not None]
            mine.sort(key=lambda one: one["tokens"])
            style = {"color": "grey", "linestyle": "--"} if memory == OFF else {}
            label = "memory off" if memory == OFF else memory
            axis.plot([o["tokens"] for o in mine], [100 * o["gap"] for o in mine], marker="o", label=label, **style)
        aim = TARGETS["all" if count == max(counts) else "half"]
        axis.axhline(100 * aim, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="tokens", title=f"{count} of {max(counts)} layers")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="% more bits than the continued teacher")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    output: Annotated[Path, typer.Option(help="Rows; picture and models go beside.")] = Path("runs/curve.jsonl"),
    teacher: Annotated[str, typer.Option(help="Folder of a byte-level model.")] = str(HERE / "demo_teacher"),
    memories: Annotated[str, typer.Option(help="Of titans, lattice, trellis.")] = ",".join(MEMORIES),
    layers: Annotated[str, typer.Option(help="How many layers, from the first.")] = "1,2,3,4",
    tokens: Annotated[str, typer.Option(help="Budgets.")] = "500000,2000000,8000000",
    window: Annotated[int, typer.Option(help="Of attention beside the memory; 0: none, memory alone.")] = 64,
    batch: Annotated[int, typer.Option(help="Blocks per step.")] = 4,
    packages: Annotated[bool, typer.Option("--packages", help="Train on the installed packages too.")] = False,
    blocks: Annotated[int, typer.Option(help="Held-out blocks.")] = 24,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Conversions at a time.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Stop then; the same command goes on.")] = None,
) -> None:
    """Convert at every point, and show the gaps."""
    unknown = set(memories.split(",")) - set(MEMORIES)
    if unknown:
        raise typer.BadParameter(f"Unknown memories {sorted(unknown)}, known are {', '.join(MEMORIES)}.")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    work = output.with_suffix("")
    todo = points(memories.split(","), numbers(layers), numbers(tokens))
    text = library_text(work / "text", max(numbers(tokens)), seed=0, packages=packages)
    setting = Setting(teacher, text, work, device, window, batch, CONTEXT, blocks)
    console, failures = Console(), 0
    with Progress(console=console) as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("conversions", total=len(todo))
        for point, failure in zip(todo, pool.map(lambda point: run(point, setting, end), todo)):
            bar.advance(task)
            if failure:
                failures += 1
                console.print(f"{point.name}: {failure}", markup=False)
    rows = with_gaps([row(point, setting) for point in todo if (work / point.name / "report.json").is_file()])
    output.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    console.print(table(rows))
    if any(one["layers"] and one["gap"] is not None for one in rows):
        plot(rows, output.with_suffix(".png"))
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
