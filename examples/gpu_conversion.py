"""A larger teacher and its conversion, in one call for a machine with a GPU.

A byte-level Llama of 20 million parameters is trained on the sources of the standard library and of all installed
packages (tens of megabytes), and then converted at several points beside its controls, as `conversion_curve.py` does
with the demo's teacher. `--minutes` is for everything; what is finished is kept, and the same command goes on.

python examples/gpu_conversion.py --minutes 30 --output runs/gpu_conversion
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer


HERE = Path(__file__).resolve().parent
TEACHER_SHARE = 0.4
"""Of the time, for the training of the teacher."""
SIZES = {
    "full": {"size": "512x8x8", "tokens-per-step": "65536", "layers": "4,8", "tokens": "4000000,16000000"},
    "quick": {"size": "32x2x2", "tokens-per-step": "4096", "layers": "1", "tokens": "8192"},
}


def commands(output: Path, minutes: float, device: str, quick: bool, jobs: int, memories: str) -> dict[str, list[str]]:
    """What is run, by the name of its log."""
    sizes = SIZES["quick" if quick else "full"]
    python, teacher = [sys.executable], output / "teacher"
    common = ["--device", device, "--packages"]
    train = [str(HERE / "train_demo_teacher.py"), "--size", sizes["size"], *common]
    train += ["--tokens-per-step", sizes["tokens-per-step"], "--minutes", f"{TEACHER_SHARE * minutes:.2f}"]
    curve = [str(HERE / "conversion_curve.py"), "--teacher", str(teacher / "model"), *common]
    curve += ["--layers", sizes["layers"], "--tokens", sizes["tokens"], "--memories", memories, "--jobs", str(jobs)]
    curve += ["--blocks", "2" if quick else "64", "--minutes", f"{(1 - TEACHER_SHARE) * minutes:.2f}"]
    return {
        "teacher": [*python, *train, "--output", str(teacher)],
        "curve": [*python, *curve, "--output", str(output / "curve.jsonl")],
    }


def main(
    output: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("runs/gpu_conversion"),
    minutes: Annotated[float, typer.Option(help="For everything together.")] = 30,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    jobs: Annotated[int, typer.Option(help="Conversions at a time.")] = 6,
    memories: Annotated[str, typer.Option(help="Of titans, lattice, trellis.")] = "titans,lattice,trellis",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes.")] = False,
) -> None:
    """Train the teacher unless it is there, then convert it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("No CUDA device here; --device cpu --quick tries the script.")
    output.mkdir(parents=True, exist_ok=True)
    for name, command in commands(output, minutes, device, quick, jobs, memories).items():
        if name == "teacher" and (output / "teacher" / "model").is_dir():
            continue
        began = time.monotonic()
        with (output / f"{name}.log").open("a", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        typer.echo(f"{name}: {time.monotonic() - began:.0f} s, exit status {done.returncode}")
        if done.returncode:
            typer.echo(f"It failed; {output / name}.log says why. The same command goes on.", err=True)
            raise typer.Exit(1)
    typer.echo((output / "curve.log").read_text(encoding="utf-8")[-4000:])


if __name__ == "__main__":
    typer.run(main)
