"""Everything that wants a GPU, in one call: correctness, timing rows, and a small training comparison.

Made for a machine that one has for minutes. The steps run as processes of their own under one time budget, so that one
that fails, hangs or takes the GPU down leaves the others; each writes its results as it goes. What the output folder
gets: <device>.jsonl (rows for kernels/benchmarks/results), training.json, training.png, session.log, and session.json,
which says how each step ended.

python examples/gpu_session.py --minutes 9 --output session
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "kernels" / "benchmarks" / "results"
BENCHMARK = [sys.executable, "-m", "hf_memory.kernels.benchmarks.run"]
TRAINING = [sys.executable, str(ROOT / "examples" / "train_comparison.py")]
FULL_TRAINING = ["--size", "512x6x8", "--chunk", "64", "--context", "1024", "--batch", "32", "--eval-blocks", "512"]
QUICK_TRAINING = ["--size", "32x2x2", "--context", "64", "--eval-blocks", "4", "--tokens", "512"]
GRACE = 10
"""Seconds a step gets to write what it has, after it was asked to stop."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: name in the log.
        command: what to run.
        share: part of the time that is left when it starts.
    """

    name: str
    command: list[str]
    share: float


def steps(device: str, quick: bool, rows: Path, work: Path, training_minutes: float) -> list[Step]:
    """What a session does, most wanted first; each row comes behind a check in its own precision."""
    bench = [*BENCHMARK, "--device", device, "--output", str(rows), "--peers"]
    training = [*TRAINING, "--device", device, "--output", str(work / "training")]
    if quick:
        return [
            Step("float32", [*bench, "--quick", "--check", "--op", "anchored_linear/16"], 0.4),
            Step("anchored_mlp", [*bench, "--quick", "--op", "anchored_mlp/16"], 0.8),
            Step("training", [*training, "--models", "titans-depth-1,llama", *QUICK_TRAINING], 1.0),
        ]
    training += ["--minutes", f"{training_minutes:.2f}", *FULL_TRAINING]
    return [
        Step("anchored_mlp", [*bench, "--op", "anchored_mlp"], 0.4),
        Step("anchored_linear", [*bench, "--op", "anchored_linear"], 0.4),
        Step("baselines", [*bench, "--op", "gated_delta_rule", "--op", "softmax_attention"], 0.4),
        Step("with norm", [*bench, "--op", "anchored_linear_norm"], 0.5),
        Step("float32", [*bench, "--check", "--dtype", "float32", "--shape", "1x256x2x64"], 1.0),
        Step("training", [*training, *(["--bf16"] if device == "cuda" else [])], 1.0),
    ]


def run_step(step: Step, seconds: float, log: Path) -> dict:
    """Run a step for at most `seconds`; how it ended."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n== {step.name}: at most {seconds:.0f} s\n{' '.join(step.command)}\n")
        stream.flush()
        process = subprocess.Popen(
            step.command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path}
        )
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "out of time"
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return {"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def collect(work: Path, output: Path) -> None:
    """Copy what the training step has written, finished or not."""
    for source, target in (("results.json", "training.json"), ("comparison.png", "training.png")):
        file = work / "training" / source
        if file.is_file():
            shutil.copy(file, output / target)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = ROOT
    / "kernels"
    / "benchmarks"
    / "results",
    minutes: Annotated[float, typer.Option(help="For everything together.")] = 9,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes.")] = False,
    training_share: Annotated[float, typer.Option(help="Part of the time that is kept for the training.")] = 0.5,
) -> None:
    """Check, time and train on one machine in one call."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("No CUDA device here; --device cpu --quick tries the script.")
    output.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows, log = output / f"{name.lower().replace(' ', '-')}.jsonl", output / "session.log"
    end = time.monotonic() + 60 * minutes
    kept = 60 * minutes * training_share
    ended = []
    with tempfile.TemporaryDirectory() as folder:
        # Starting Python and making the first kernels comes out of the training's time.
        for step in steps(device, quick, rows, Path(folder), max(kept - 40, 20) / 60):
            last = step.name == "training"
            left = end - time.monotonic() - GRACE - (0 if last else kept)
            seconds = max(left if last else step.share * left, 1)
            ended.append(run_step(step, seconds, log))
            typer.echo("{step:24} {status!s:>12} {seconds:7.1f} s".format(**ended[-1]))
            collect(Path(folder), output)
            summary = {"device": name, "torch": torch.__version__, "minutes": minutes, "steps": ended}
            (output / "session.json").write_text(json.dumps(summary, indent=2) + "\n")
    if any(step["status"] != 0 for step in ended):
        typer.echo(f"Not all went well, {log} has the reasons.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
