"""Everything that wants a GPU, in one call: rows of the ops beside their peers, of whole models, and a small training.

Made for a machine that one has for minutes. The steps run as processes of their own under one time budget, so that one
that fails, hangs or takes the GPU down leaves the others. Each writes its results as it goes; what it does not need of
its time goes to the steps behind it. What the output folder gets: <device>.jsonl (rows for kernels/benchmarks/results)
and .png (their plots), targets.txt (what the rows say about them), training.json, training.png, session.log, and
session.json, which says how each step ended.

python examples/gpu_session.py --minutes 9 --output session
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer


ROOT = Path(__file__).resolve().parents[1]
# A checkout need not be installed, here and in the steps.
sys.path.insert(0, str(ROOT))
from hf_memory.kernels.benchmarks import rows as benchmark_rows  # noqa: E402
from hf_memory.kernels.benchmarks.correctness import STANDARDS  # noqa: E402
from hf_memory.kernels.benchmarks.registry import OPS  # noqa: E402
from hf_memory.kernels.benchmarks.targets import table  # noqa: E402


BENCHMARKS = "hf_memory.kernels.benchmarks"
TRAINING = [sys.executable, str(ROOT / "examples" / "train_comparison.py")]
MODELS = [sys.executable, str(ROOT / "examples" / "model_speed.py")]
FULL_TRAINING = ["--size", "512x6x8", "--chunk", "64", "--context", "1024", "--batch", "32", "--eval-blocks", "512"]
QUICK_TRAINING = ["--size", "32x2x2", "--context", "64", "--eval-blocks", "4", "--tokens", "512"]
MINUTES = "{minutes}"
"""In a command: the time that a step has for its work."""

GRACE = 10
"""Seconds a step gets to write what it has, after it was asked to stop."""

START = 40
"""Seconds until a training step has imported everything and made its first kernels."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: name in the log.
        command: what to run.
        share: its part of the time that is left when it starts, in units of the shares of the steps behind it.
    """

    name: str
    command: list[str]
    share: float


def flags(name: str, values: str) -> list[str]:
    """An option that is given several times."""
    return [part for value in values.split() for part in (f"--{name}", value)]


def steps(device: str, quick: bool, rows: Path, work: Path) -> list[Step]:
    """What a session does, most wanted first; shares are about the seconds that a step needs on an H200."""
    to = ["--device", device, "--output", str(rows)]
    training = [*TRAINING, "--device", device, "--output", str(work / "training")]
    plot = Step("plot", _module("plot", str(rows)), 10)
    if quick:
        shapes = flags("shape", "1x64x2x16 1x128x2x16")
        return [
            Step("float32", _module("run", *to, "--quick", "--check", "--op", "anchored_linear/16"), 40),
            Step("anchored_mlp", _module("run", *to, "--quick", "--op", "anchored_mlp/16", *shapes), 80),
            Step("matmul", _module("matmul", *to, "--size", "64", "--seconds", "0"), 20),
            Step("models", [*MODELS, *to, "--quick", "--models", "titans-depth-1,llama"], 40),
            Step("training", [*training, "--models", "titans-depth-1,llama", *QUICK_TRAINING], 100),
            plot,
        ]
    training += [*(["--bf16"] if device == "cuda" else []), "--minutes", MINUTES, *FULL_TRAINING]
    return [*_op_steps(to, device), Step("training", training, 60), plot]


def _op_steps(to: list[str], device: str) -> list[Step]:
    # First what the others are compared with, then what is wanted most.
    linear = flags("op", "gated_delta_rule anchored_linear/64 anchored_linear/16 anchored_linear/1")
    passes, wanted = flags("mode", "fwd fwd+bwd"), [*linear, "--op", "anchored_mlp"]
    ours, short = ["--form", "triton"], ["--seconds", "0.3"]
    beside = [*to, *ours, *short, "--peers"]
    deep = flags("shape", "16x2048x16x64 4x2048x16x64")
    compiled = ["--op", "anchored_mlp/64", "--form", "compiled", "--mode", "fwd+bwd", *deep]
    exact = flags("op", "anchored_linear/1 anchored_linear/16")
    float32 = [*exact, "--dtype", "float32", "--mode", "fwd+bwd", "--shape", "1x2048x16x128"]
    cold = flags("op", "anchored_linear/64 anchored_linear_norm/64 anchored_mlp/64")
    norm = ["--op", "anchored_linear_norm", "--shape", "1x8192x16x128"]
    longer = flags("shape", "1x2048x16x128 1x32768x16x128 4x2048x16x64 16x2048x16x64")
    baselines, slots = ["--op", "softmax_attention"], [label for label, op in OPS.items() if "slots" in op.name]
    found = [
        Step("warm-up", _module("first_call", "--device", device, *ours, "--peers", *wanted, *norm[:2]), 50),
        Step("linear", _module("run", *beside, *linear, *passes, *flags("shape", "1x8192x16x128 8x1024x8x64")), 60),
        Step("matmul", _module("matmul", *to, *short), 12),
        Step("deep", _module("run", *beside, "--op", "anchored_mlp", *passes, *deep), 50),
        Step("decode", _module("run", *beside, *wanted, *baselines, "--mode", "decode"), 50),
        Step("graphs", _module("run", *beside, *wanted, *flags("mode", "decode-graph fwd-graph")), 50),
        Step("norm", _module("run", *beside, *norm, *passes), 30),
        Step("float32", _module("run", *beside, *float32), 25),
        Step("first call", _module("run", *to, *ours, *cold, "--mode", "first-call"), 50),
        Step("models", [*MODELS, *to, "--seconds", "1"], 90),
        Step("compiled", _module("run", *to, *compiled, *short), 100),
        Step("lengths", _module("run", *beside, *linear, *baselines, *passes, *longer), 50),
    ]
    if importlib.util.find_spec("titans_pytorch"):
        found.append(Step("titans-pytorch", _module("titans_pytorch", *to), 25))
    if slots:
        where = [*passes, "--shape", "1x8192x16x64"]
        ops = flags("op", " ".join([*slots, "gated_delta_rule"]))
        found.append(Step("slots", _module("run", *beside, *ops, *where), 40))
        decoded = [*flags("op", " ".join(slots)), *flags("mode", "decode decode-graph")]
        found.append(Step("decoded slots", _module("run", *to, *ours, *short, *decoded), 20))
    return found


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"{BENCHMARKS}.{name}", *arguments]


def run_step(step: Step, seconds: float, log: Path, run: str, standards: str) -> dict:
    """Run a step for at most `seconds`, with a folder for what the references give; how it ended."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    work = f"{max(seconds - START, START / 2) / 60:.2f}"
    command = [work if part == MINUTES else part for part in step.command]
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n== {step.name}: at most {seconds:.0f} s\n{' '.join(command)}\n")
        stream.flush()
        environment = os.environ | {"PYTHONPATH": path, benchmark_rows.RUN: run, STANDARDS: standards}
        # With a group of its own, so that what it has started ends with it and leaves the GPU to the next step.
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            stop(process)
    return {"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def stop(process: subprocess.Popen) -> None:
    """End a process that still runs, and its group, politely first."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, wanted)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def collect(work: Path, output: Path) -> None:
    """Copy what the training step has written, finished or not."""
    for source, target in (("results.json", "training.json"), ("comparison.png", "training.png")):
        file = work / "training" / source
        if file.is_file():
            shutil.copy(file, output / target)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = benchmark_rows.RESULTS,
    minutes: Annotated[float, typer.Option(help="For everything together.")] = 9,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes.")] = False,
) -> None:
    """Check, time and train on one machine in one call."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("No CUDA device here; --device cpu --quick tries the script.")
    output.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows, log = output / f"{name.lower().replace(' ', '-')}.jsonl", output / "session.log"
    end, run, ended = time.monotonic() + 60 * minutes, benchmark_rows.now(), []
    with tempfile.TemporaryDirectory() as folder:
        todo = steps(device, quick, rows, Path(folder))
        for i, step in enumerate(todo):
            left = end - time.monotonic() - GRACE
            seconds = max(left * step.share / sum(later.share for later in todo[i:]), 1)
            ended.append(run_step(step, seconds, log, run, folder))
            typer.echo("{step:24} {status!s:>12} {seconds:7.1f} s".format(**ended[-1]))
            collect(Path(folder), output)
            summary = {"device": name, "torch": torch.__version__, "minutes": minutes, "run": run, "steps": ended}
            (output / "session.json").write_text(json.dumps(summary, indent=2) + "\n")
    if rows.is_file():
        reached = table(benchmark_rows.read(rows))
        (output / "targets.txt").write_text(reached + "\n", encoding="utf-8")
        typer.echo(reached)
    if any(step["status"] != 0 for step in ended):
        typer.echo(f"Not all went well, {log} has the reasons.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
