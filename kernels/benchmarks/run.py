"""Check and time the ops: `python -m hf_memory.kernels.benchmarks.run --help`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from .correctness import MODES, WrongResultError, check
from .inputs import Shape, Tensors, cast
from .peers import Provider
from .registry import OPS, Op
from .rows import Row, append, device_name, results_file, timing_fields, versions
from .timing import Timing, measure


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULT_SHAPES = {
    "cpu": ("1x2048x4x64",),
    "cuda": ("1x8192x16x128", "4x2048x16x64", "16x2048x16x64", "8x1024x8x64"),
}
DECODE_SHAPES = {"cpu": ("1x2048x4x64",), "cuda": ("1x2048x16x128", "64x2048x16x128")}
QUICK_SHAPE = "1x160x2x16"
# A state does not depend on how much was read, so the prompt of a decode row can be short.
PROMPT = 64


@dataclass(frozen=True)
class Job:
    """One row to fill."""

    op: Op
    provider: Provider
    shape: Shape
    dtype: str
    mode: str
    device: torch.device

    def run(self, seconds: float, only_check: bool = False) -> Row | None:
        """Check the op, and time it unless only the check was asked for.

        Raises:
            WrongResultError: if it is wrong.
        """
        result = check(self.op, self.provider, self.shape.width, DTYPES[self.dtype], self.mode, self.device)
        if only_check:
            return None
        timing = self._time(seconds)
        return Row(
            op=self.op.name,
            provider=self.provider.name,
            form=self.provider.form,
            shape=str(self.shape),
            dtype=self.dtype,
            mode=self.mode,
            grid=self.op.grid,
            options=self.op.options,
            **timing_fields(timing),
            error=result.error,
            allowed=result.allowed,
            device=device_name(self.device),
            versions=versions(self.provider.package),
        )

    def _time(self, seconds: float) -> Timing:
        generator = torch.Generator(self.device).manual_seed(0)
        inputs = cast(self.op.make(self.shape, generator), DTYPES[self.dtype], self.device)
        if self.mode == "decode":
            return self._time_decode(inputs, seconds)
        if self.mode == "fwd":
            return measure(lambda: self.provider.forward(inputs), self.device, seconds, inference=True)
        return measure(forward_backward(self.provider.forward, inputs), self.device, seconds)

    def _time_decode(self, inputs: Tensors, seconds: float) -> Timing:
        # A whole chunk per call: folding it into the memory is part of what a token costs.
        tokens = max(self.op.grid or 1, 16)
        start = self.shape.time - tokens if self.op.run is None else min(PROMPT, self.shape.time - tokens)

        def call() -> None:
            for token in range(start, start + tokens):
                step(token)

        with torch.no_grad():
            step = self.provider.decode(inputs, start)
        return measure(call, self.device, seconds, per=tokens, inference=True)


def forward_backward(forward: Callable[[Tensors], Tensor], inputs: Tensors) -> Callable[[], None]:
    """A call that makes the outputs and the gradients of all operands."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    cotangent = torch.randn_like(inputs["v"])

    def call() -> None:
        torch.autograd.grad(forward(leaves), list(leaves.values()), cotangent)

    return call


def jobs(
    ops: list[Op], shapes: list[Shape] | None, dtypes: list[str], modes: list[str], device: torch.device, peers: bool
) -> Iterator[Job]:
    """Everything to measure; without `shapes`, those that fit the mode."""
    for op in ops:
        for mode in modes:
            defaults = DECODE_SHAPES if mode == "decode" else DEFAULT_SHAPES
            for shape in shapes or map(Shape.parse, defaults[device.type]):
                for dtype in dtypes:
                    for provider in op.providers(device, peers):
                        yield Job(op, provider, shape, dtype, mode, device)


def select(names: list[str]) -> list[Op]:
    """Ops by label (`anchored_mlp/16`) or by name (`anchored_mlp`: all its grids); all for an empty list.

    Raises:
        ValueError: for an unknown name.
    """
    known = {*OPS, *(op.name for op in OPS.values())}
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown op {name!r}, the ops are {sorted(known)}.")
    return [op for op in OPS.values() if not names or op.name in names or op.label in names]


HEADER = f"{'op':30}{'by':18}{'shape':16}{'dtype':9}{'mode':8}{'median ms':>10}{'20 %':>9}{'80 %':>9}{'MiB':>8}"


def line(job: Job, row: Row | None) -> str:
    """What a job found, to be read under `HEADER`."""
    by = f"{job.provider.name} {job.provider.form}"
    text = f"{job.op.label:30}{by:18}{str(job.shape):16}{job.dtype:9}{job.mode:8}"
    if row is None:
        return f"{text}{'right':>10}"
    return f"{text}{row.median_ms:10.3g}{row.q20_ms:9.3g}{row.q80_ms:9.3g}{row.peak_mib:8.1f}"


def main(
    op: Annotated[list[str] | None, typer.Option(help="Name, or name/grid. Default: all.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="BATCHxTIMExHEADSxWIDTH.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DTYPES)}.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODES)}. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    peers: Annotated[bool, typer.Option("--peers", help="Time what other libraries offer, where installed.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check the ops, time nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One tiny shape, a few runs.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for the runs of one row.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="File that the rows are appended to.")] = None,
) -> None:
    """Check ops against the float64 reference, time them, and append a row for each to a results file."""
    on = torch.device(device)
    if quick:
        shape, seconds = shape or [QUICK_SHAPE], 0.0
    try:
        ops = select(op or [])
        shapes = [Shape.parse(text) for text in shape] if shape else None
        dtypes = _known(dtype or [DEFAULT_DTYPE[on.type]], DTYPES, "dtype")
        todo = list(jobs(ops, shapes, dtypes, _known(mode or list(MODES), MODES, "mode"), on, peers))
        if check:
            todo = list({(j.op, j.provider, j.shape.width, j.dtype, j.mode): j for j in todo}.values())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    file = output or results_file(on)
    written, wrong = 0, 0
    typer.echo(f"{device_name(on)}\n{HEADER}")
    for job in todo:
        try:
            row = job.run(seconds, only_check=check)
        except WrongResultError as error:
            wrong += 1
            typer.echo(f"wrong: {error}")
        except RuntimeError as error:
            # Out of memory, or a peer that does not take the shape or the dtype: the next row may still be filled.
            typer.echo(f"skipped: {job.op.label} by {job.provider.name}, {job.shape}: {error}")
        else:
            typer.echo(line(job, row))
            if row:
                append(row, file)
                written += 1
    if written:
        typer.echo(f"{written} rows appended to {file}")
    if wrong:
        raise typer.Exit(1)


def _known(names: list[str], accepted: Iterable[str], what: str) -> list[str]:
    for name in names:
        if name not in accepted:
            raise ValueError(f"Unknown {what} {name!r}, use one of {', '.join(accepted)}.")
    return names


if __name__ == "__main__":
    typer.run(main)
