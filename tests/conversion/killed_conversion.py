"""Start a conversion again and again, and kill it once in every stage at a moment left to chance.

Run as `python killed_conversion.py RECIPE`; prints one line per kill. The libraries are imported once: every
conversion is a fork of this process.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from hf_memory.conversion.recipe import read_recipe
from hf_memory.conversion.run import convert


def log_lines(work: Path, stage: str) -> int:
    file = work / "log.jsonl"
    return file.read_text(encoding="utf-8").count(f'"{stage}"') if file.exists() else 0


def kill_in(stage: str, recipe, work: Path, steps: int) -> None:
    child = os.fork()
    if child == 0:
        convert(recipe)
        os._exit(0)
    wanted = random.randint(1, steps - 2)
    while not (log_lines(work, stage) >= wanted if stage != "init" else (work / "recipe.yaml").exists()):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            sys.exit(f"ended with status {status} before it could be killed in {stage}")
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"had ended before it was killed in {stage}"
    left = sorted(entry.name for entry in (work / "checkpoints").glob("*"))
    print(f"killed in {stage}, {log_lines(work, 'align')} and {log_lines(work, 'distill')} steps, {left}", flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    recipe = read_recipe(sys.argv[1])
    steps = {label: recipe.steps_of(stage) for label, stage in recipe.training_stages.items()}
    for stage in ("init", *steps):
        kill_in(stage, recipe, Path(f"{recipe.output}.converting"), steps.get(stage, 0) or 3)
