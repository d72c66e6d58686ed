"""What fixed states remember: associative recall against state size, and a passkey in inputs of growing length.

Models of equal size (within 2 % of parameters) learn two synthetic tasks from scratch, each with several seeds and the
same learning rates. Each run that ends is a row of `--output`, also one that fails or is cut off, and none that is
complete is made twice: the script can be stopped and started at will. What is wanted most comes first.

- `recall`: pairs of a key and a value, then every key once more, in another order; the model has to name the values
  (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927). The width of heads changes the state's size.
- `passkey`: four digits behind a marker, somewhere in noise; behind the marker at the end they are asked for. Trained
  at 512 tokens, with half of the rows showing and asking it often, tested at up to 16,384, shown once.

python examples/recall.py --jobs 2 --output runs/recall.jsonl
python examples/recall.py --preset gpu --device cuda --jobs 12 --minutes 4 --output runs/recall-gpu.jsonl
"""

import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import torch
import typer
from recall_report import report
from recall_run import Setting, work
from recall_tasks import END_OF_CALL, MODELS, TASKS, Sizes
from rich.console import Console


PRESETS = {
    "cpu": Sizes(widths=(32, 8), pairs=8, symbols=16, batch=1024, steps=500, held_out=2**16),
    "gpu": Sizes(),
}
SECONDS = {"cpu": 90.0, "gpu": 240.0}
KEYS = ("preset", "task", "model", "width", "lr", "seed", "of_steps")
LOG_WIDTH = 170
START = 25
"""Seconds that a run should have at least, else it is not begun."""


def plan(preset: str, tasks: list[str], models: list[str], lrs: list[float], seeds: int) -> list[dict]:
    """All runs, most wanted first: recall at the first width, then one seed of all else before the next."""
    sizes = PRESETS[preset]
    middle = sizes.widths[0]
    found = [
        {"preset": preset, "task": task, "model": name, "width": width, "lr": lr, "seed": seed}
        for seed in range(seeds)
        for lr in lrs
        for task in tasks
        for width in (sizes.widths if task == "recall" else (middle,))
        for name in TASKS[task]
        if not models or name in models
    ]
    return sorted(found, key=lambda run: (run["task"], run["width"]) != ("recall", middle))


def read_rows(file: Path) -> list[dict]:
    """Rows of a file; of several of one run, the newest."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return list({tuple(row[name] for name in KEYS): row for row in rows}.values())


def is_complete(row: dict) -> bool:
    """Whether a row is what its run leads to: another try would not change it."""
    return "error" not in row and row["cut"] != END_OF_CALL


@dataclass
class Worker:
    """A process that makes runs, and the one that it is at."""

    process: BaseProcess
    connection: Connection
    run: dict

    @classmethod
    def start(cls, threads: int) -> "Worker":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, threads), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours, {})

    def give(self, run: dict, sizes: Sizes, setting: Setting) -> None:
        self.run = run
        self.connection.send((run, sizes, setting))

    def row(self) -> dict:
        """What the process answers; a row also where it died."""
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return self.run | {"error": f"The process ended with code {self.process.exitcode}."}


def make(runs: list[dict], sizes: Sizes, setting: Setting, jobs: int, threads: int) -> Iterator[dict]:
    """Rows of runs as they end, `jobs` at a time."""
    waiting, eager, busy, idle = list(runs), set(), [], []
    while True:
        while waiting and len(busy) < jobs and time.time() < setting.until - START:
            run = waiting.pop(0)
            graph = setting.graph and (run["task"], run["model"]) not in eager
            worker = idle.pop() if idle else Worker.start(threads)
            worker.give(run, sizes, replace(setting, graph=graph))
            busy.append(worker)
        if not busy:
            return
        ready = wait([worker.connection for worker in busy], max(0, setting.until - time.time()))
        for worker in [worker for worker in busy if worker.connection in ready or not ready]:
            busy.remove(worker)
            row = worker.row() if ready else worker.run | {"error": "Nothing had come when the time was up."}
            if "error" in row or "graph_error" in row:  # what it did to the device must not reach the next run
                worker.process.kill()
            else:
                idle.append(worker)
            if "graph_error" in row:
                eager.add((row["task"], row["model"]))
                waiting.insert(0, worker.run)
            yield row


def line(row: dict) -> str:
    """A row in short."""
    name = f"{row['task']:8} {row['model']:18} width {row['width']:<3} lr {row['lr']:<6g} seed {row['seed']}"
    if "accuracy" not in row:
        return f"{name}  {row.get('error') or 'no CUDA graph, again without: ' + row['graph_error']}"
    shown = "  ".join(f"{length}: {share:.0%}" for length, share in row["accuracy"].items())
    cut = f", cut: {row['cut']}" if row["cut"] else ""
    return f"{name}  {shown}  step {row['steps']} in {row['seconds']:.0f} s + {row['seconds_asking']:.0f} s{cut}"


def check(preset: str, tasks: list[str], models: list[str]) -> None:
    """Refuse names that do not exist."""
    for kind, given, known in (("preset", [preset], PRESETS), ("task", tasks, TASKS), ("model", models, MODELS)):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"Unknown {kind} {name!r}, use one of: {'; '.join(known)}.")


def main(
    output: Annotated[Path, typer.Option(help="File of rows.")] = Path("runs/recall.jsonl"),
    preset: Annotated[str, typer.Option(help=f"Sizes: {', '.join(PRESETS)}.")] = "cpu",
    tasks: Annotated[str, typer.Option(help="Which tasks.")] = ",".join(TASKS),
    models: Annotated[list[str] | None, typer.Option(help="Which model; several times for several, else all.")] = None,
    lrs: Annotated[str, typer.Option(help="Peak learning rates; every model gets each.")] = "3e-3,1e-2",
    seeds: Annotated[int, typer.Option(help="Seeds per model and learning rate.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Steps of a run; by default those of the preset.")] = None,
    seconds: Annotated[float | None, typer.Option(help="A run stops here; by default what the preset has.")] = None,
    minutes: Annotated[float, typer.Option(help="The whole call ends here; what is cut then is made again.")] = 1e4,
    jobs: Annotated[int, typer.Option(help="Runs side by side, each a process.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of a run.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    triton: Annotated[bool, typer.Option(help="Matrix memories in their Triton form.")] = False,
) -> None:
    """Make the runs that are missing in the output file, then print and plot all of it."""
    until = time.time() + 60 * minutes
    chosen = tasks.split(",")
    check(preset, chosen, models or [])
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    sizes = replace(PRESETS[preset], steps=steps or PRESETS[preset].steps)
    wanted = plan(preset, chosen, models or [], [float(lr) for lr in lrs.split(",")], seeds)
    wanted = [run | {"of_steps": sizes.steps} for run in wanted]
    complete = {tuple(row[name] for name in KEYS) for row in read_rows(output) if is_complete(row)}
    missing = [run for run in wanted if tuple(run[name] for name in KEYS) not in complete]
    console.print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there, {jobs} at a time.")
    output.parent.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, seconds or SECONDS[preset], until, device == "cuda", triton and device == "cuda")
    with output.open("a", encoding="utf-8") as stream:
        for row in make(missing, sizes, setting, jobs, threads):
            console.print(line(row), highlight=False, soft_wrap=True)
            if "graph_error" not in row:
                stream.write(json.dumps(row) + "\n")
                stream.flush()
    report(read_rows(output), output.with_suffix(".png"), console)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
