"""Start a conversion again and again, and kill it at moments left to chance.

Run as `python killed_conversion.py RECIPE` to kill it once in every stage, or with a seed behind the recipe at ten
random moments: at any time within the steps, in the middle of writing a checkpoint, during the evaluation, and while
the finished model gets its name. Prints one line per kill. The libraries are imported once: every conversion is a fork
of this process.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_memory.conversion.recipe import Recipe, read_recipe
from hf_memory.conversion.run import convert


def log_lines(work: Path, stage: str) -> int:
    file = work / "log.jsonl"
    return file.read_text(encoding="utf-8").count(f'"{stage}"') if file.exists() else 0


def all_lines(work: Path) -> int:
    return log_lines(work, "align") + log_lines(work, "distill")


def kill_when(reached: Callable[[], bool], delay: float, recipe: Recipe) -> bool:
    """Start it, and kill it so many seconds after something is reached; false if it was finished before that."""
    child = os.fork()
    if child == 0:
        convert(recipe)
        os._exit(0)
    while not reached():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"ended with status {status} before it could be killed"
            return False
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def kill_in(stage: str, recipe: Recipe, work: Path, steps: int) -> None:
    wanted = random.randint(1, steps - 2)

    def reached() -> bool:
        return log_lines(work, stage) >= wanted if stage != "init" else (work / "recipe.yaml").exists()

    assert kill_when(reached, random.uniform(0, 0.05), recipe), f"had ended before it was killed in {stage}"
    left = sorted(entry.name for entry in (work / "checkpoints").glob("*"))
    print(f"killed in {stage}, {log_lines(work, 'align')} and {log_lines(work, 'distill')} steps, {left}", flush=True)


def kill_at_random(recipe: Recipe, work: Path, seed: int, total: int) -> None:
    """Six kills within the steps, two while a checkpoint is half written, two behind the steps."""
    chance = random.Random(seed)
    model = work / "result" / Path(recipe.output).name
    steps = [("step", step) for step in sorted(chance.sample(range(total), 6))]
    writes = [("checkpoint", step) for step in sorted(chance.sample(range(total), 2))]
    for what, step in [*sorted(steps + writes, key=lambda moment: moment[1]), ("evaluation", 0), ("name", 0)]:

        def reached(what: str = what, step: int = step) -> bool:
            if what == "evaluation":
                return (model / "model.safetensors").exists()
            if what == "name":
                return (model / "README.md").exists()
            return all_lines(work) >= step and (what == "step" or any(work.glob("checkpoints/*.partial")))

        if Path(recipe.output).exists() and not work.exists():
            # The last moment came too late, and nothing was left to kill: once more from the beginning.
            shutil.rmtree(recipe.output)
        delay = chance.uniform(0, {"step": 0.1, "checkpoint": 0.002, "evaluation": 0.04, "name": 0.002}[what])
        killed = kill_when(reached, delay, recipe)
        left = sorted(entry.name for entry in (work / "checkpoints").glob("*"))
        print(
            f"{'killed' if killed else 'ended'}: {what} {step} + {delay:.3f} s, {all_lines(work)} steps, {left}",
            flush=True,
        )


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    recipe = read_recipe(sys.argv[1])
    work = Path(f"{recipe.output}.converting")
    steps = {label: recipe.steps_of(stage) for label, stage in recipe.training_stages.items()}
    if len(sys.argv) > 2:
        kill_at_random(recipe, work, int(sys.argv[2]), sum(steps.values()))
    else:
        for stage in ("init", *steps):
            kill_in(stage, recipe, work, steps.get(stage, 0) or 3)
