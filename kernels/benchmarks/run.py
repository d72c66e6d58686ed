"""Check and time the ops: `python -m hf_memory.kernels.benchmarks.run --help`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from . import floors
from .correctness import CPU_MODES, MODES, Check, WrongResultError, check
from .inputs import Shape, Tensors, cast
from .peers import Provider
from .registry import COMPILED, OPS, OWN, Op
from .rows import Row, append, device_name, results_file, timing_fields, versions
from .timing import Timing, captured, measure


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULT_MODES = {"cpu": CPU_MODES, "cuda": MODES[:-1]}
SHAPES = ("1x8192x16x128", "1x32768x16x128", "4x2048x16x64", "16x2048x16x64", "8x1024x8x64")
DECODE_SHAPES = ("1x2048x16x128", "64x2048x16x128", "1x2048x16x64", "64x2048x16x64")
SHAPES_OF_MODE = {
    "fwd": SHAPES,
    "fwd+bwd": SHAPES,
    "decode": DECODE_SHAPES,
    "fwd-graph": ("8x1024x8x64",),
    "decode-graph": DECODE_SHAPES,
    "first-call": ("1x8192x16x128", "4x2048x16x64"),
}
AT_LARGEST_WIDTH = ("decode", "decode-graph", "first-call")
"""Modes that take an op's largest width only."""
OWN_FORMS = ("triton", "chunk", COMPILED)
CPU_SHAPE = "1x2048x4x64"
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

    @property
    def is_refused(self) -> bool:
        """Whether it asks our Triton form for what it is not made for."""
        is_triton = (self.provider.name, self.provider.form) == (OWN, "triton")
        return is_triton and self.op.refuses(self.shape.width, DTYPES[self.dtype], self.mode) is not None

    def check(self) -> Check | None:
        """Whether the op is right; `None` for a peer that computes another function.

        Raises:
            WrongResultError: if it is ours and wrong, or not finite. How far a peer is off is a result for its row.
        """
        if not self.provider.same_function:
            return None
        try:
            return check(self.op, self.provider, self.shape.width, DTYPES[self.dtype], self.mode, self.device)
        except WrongResultError as error:
            if self.provider.name == OWN or error.worst.error == float("inf"):
                raise
            return error.worst

    def time(self, checked: Check | None, seconds: float) -> Row:
        """Time the op for about `seconds`; the row of it."""
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
            error=checked and checked.error,
            allowed=checked and checked.allowed,
            device=device_name(self.device),
            versions=versions(self.provider.package),
        )

    def inputs(self) -> Tensors:
        """Operands of the row, the same for every provider."""
        generator = torch.Generator(self.device).manual_seed(0)
        return cast(self.op.make(self.shape, generator), DTYPES[self.dtype], self.device)

    def _time(self, seconds: float) -> Timing:
        if self.mode == "first-call":
            from .first_call import measure_first_call

            return measure_first_call(self)
        if self.provider.form == COMPILED:
            # What other rows have compiled would count against this one's limit of compilations.
            torch.compiler.reset()
        inputs, memory = self.inputs(), self.device.type != "cpu" or self.provider.form != COMPILED
        if self.mode == "fwd+bwd":
            return measure(forward_backward(self.provider.forward, inputs), self.device, seconds, memory=memory)
        decodes = self.mode.startswith("decode")
        # A whole chunk per call: folding it into the memory is part of what a token costs.
        tokens = max(self.op.grid or 1, 16) if decodes else 1
        start = self.shape.time - tokens if self.op.run is None else min(PROMPT, self.shape.time - tokens)
        make = partial(_decode, self.provider, inputs, start, tokens) if decodes else lambda: forward

        def forward() -> Tensor:
            return self.provider.forward(inputs)

        with torch.no_grad():
            call = captured(make, self.device) if self.mode.endswith("-graph") else make()
        return measure(call, self.device, seconds, per=tokens, inference=True, memory=memory)


def _decode(provider: Provider, inputs: Tensors, start: int, tokens: int) -> Callable[[], None]:
    step = provider.decode(inputs, start)

    def call() -> None:
        for token in range(start, start + tokens):
            step(token)

    return call


def forward_backward(forward: Callable[[Tensors], Tensor], inputs: Tensors) -> Callable[[], None]:
    """A call that makes the outputs and the gradients of all operands."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    cotangent = torch.randn_like(inputs["v"])

    def call() -> None:
        # A peer that computes another function may have no use for an operand.
        torch.autograd.grad(forward(leaves), list(leaves.values()), cotangent, allow_unused=True)

    return call


def default_shapes(op: Op, mode: str, dtype: str, device: torch.device) -> list[Shape]:
    """Shapes of a mode that fit the op."""
    if device.type == "cpu":
        return [Shape.parse(CPU_SHAPE)]
    shapes = [shape for shape in map(Shape.parse, SHAPES_OF_MODE[mode]) if shape.width in op.widths]
    largest = max(shape.width for shape in shapes)
    shapes = [shape for shape in shapes if mode not in AT_LARGEST_WIDTH or shape.width == largest]
    if dtype == "float32" and op.float32_width is not None:
        return list(dict.fromkeys(shape._replace(width=op.float32_width) for shape in shapes))
    return shapes


def providers(op: Op, device: torch.device, peers: bool, forms: list[str]) -> list[Provider]:
    """Who is measured: our forms, those named if some are, and peers if asked for."""
    if not forms:
        return op.providers(device, peers)
    found = op.providers(device, peers or COMPILED in forms)
    return [p for p in found if (p.form in forms if p.name == OWN else peers or op.run is None)]


def jobs(
    ops: list[Op],
    shapes: list[Shape] | None,
    dtypes: list[str],
    modes: list[str],
    device: torch.device,
    peers: bool,
    forms: list[str],
) -> Iterator[Job]:
    """Everything to measure; without `shapes`, those that fit the mode. What a form does not take is no job."""
    for op in ops:
        found = providers(op, device, peers, forms)
        for mode, dtype in product(modes, dtypes):
            for shape in shapes or default_shapes(op, mode, dtype, device):
                for provider in found:
                    job = Job(op, provider, shape, dtype, mode, device)
                    if provider.offers(mode) and not job.is_refused:
                        yield job


def select(names: list[str]) -> list[Op]:
    """Ops by label (`anchored_mlp/16`) or name (`anchored_mlp`: all its grids), in this order; all for an empty list.

    Raises:
        ValueError: for an unknown name.
    """
    known = {*OPS, *(op.name for op in OPS.values())}
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown op {name!r}, the ops are {sorted(known)}.")
    named = {op.label: op for name in names for op in OPS.values() if name in (op.name, op.label)}
    return list(named.values() if names else OPS.values())


HEADER = (
    f"{'op':24}{'by':24}{'shape':16}{'dtype':9}{'mode':13}{'error':>9}"
    f"{'median ms':>11}{'20 %':>9}{'80 %':>9}{'MiB':>9}{'floor ms':>10}{'of it':>7}"
)


def line(job: Job, checked: Check | None, row: Row | None) -> str:
    """What a job found, to be read under `HEADER`."""
    by = f"{job.provider.name} {job.provider.form}"
    error = "-" if checked is None else f"{checked.error:.1e}"
    text = f"{job.op.label:24}{by:24}{str(job.shape):16}{job.dtype:9}{job.mode:13}{error:>9}"
    if row is None:
        return f"{text}  {'not compared' if checked is None else 'right' if checked.passed else 'inexact'}"
    peak = "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"
    text += f"{row.median_ms:11.3g}{row.q20_ms:9.3g}{row.q80_ms:9.3g}{peak:>9}"
    if checked is not None and not checked.passed:
        return f"{text}  inexact"
    floor = floor_of(row)
    return text if floor is None else f"{text}{floor.ms:10.3g}{floor.ms / row.median_ms:7.0%} {floor.bound}"


def floor_of(row: Row) -> floors.Floor | None:
    """Floor of a row, where its card and its op are known (`floors.py`)."""
    gpu = floors.gpu_of(row.device)
    counted = gpu and floors.cost(row.op, Shape.parse(row.shape), row.grid, row.dtype, row.mode)
    return counted and floors.floor(counted, gpu, row.dtype)


def main(
    op: Annotated[list[str] | None, typer.Option(help="Name, or name/grid. Default: all.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="BATCHxTIMExHEADSxWIDTH.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DTYPES)}.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODES)}. Default: all but the last.")] = None,
    form: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(OWN_FORMS)}; compiled needs --peers unless named.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    peers: Annotated[bool, typer.Option("--peers", help="Time what other libraries offer, where installed.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check the ops, time nothing.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="One tiny shape, a few runs; rows are kept only with --output.")
    ] = False,
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
        dtypes = known(dtype or [DEFAULT_DTYPE[on.type]], DTYPES, "dtype")
        modes = known(mode or list(DEFAULT_MODES[on.type]), MODES, "mode")
        if on.type == "cpu" and (graphs := [m for m in modes if m.endswith("-graph")]):
            raise ValueError(f"CUDA graphs need a GPU: {', '.join(graphs)} cannot be measured on {device!r}.")
        forms = known(form or [], OWN_FORMS, "form")
        todo = list(jobs(ops, shapes, dtypes, modes, on, peers, forms))
        if not todo:
            raise ValueError(
                f"Nothing to measure on {device!r}: no form of {', '.join(x.label for x in ops)} that was asked for "
                "takes these shapes, dtypes and modes there. Leave out --form, --shape, --dtype or --mode."
            )
        if check:
            todo = list({(j.op, j.provider, j.shape.width, j.dtype, j.mode): j for j in todo}.values())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    file = output or results_file(on)
    written, wrong = 0, 0
    typer.echo(f"{device_name(on)}\n{HEADER}")
    for job in todo:
        try:
            checked = job.check()
            row = None if check else job.time(checked, seconds)
        except WrongResultError as error:
            wrong += job.provider.name == OWN
            typer.echo(f"wrong: {error}")
        except Exception as error:  # whatever a library raises, the next row may still be filled
            # That a shape does not fit, or that a peer does not take it, is no failure.
            wrong += job.provider.name == OWN and not isinstance(error, torch.OutOfMemoryError)
            what = f"{job.op.label} by {job.provider.name} {job.provider.form}, {job.shape}, {job.mode}"
            said = str(error).strip().partition("\n")[0]
            typer.echo(f"skipped: {what}: {type(error).__name__}: {said}")
        else:
            typer.echo(line(job, checked, row))
            if row and (output or not quick):
                append(row, file)
                written += 1
    if written:
        typer.echo(f"{written} rows appended to {file}")
    if wrong:
        raise typer.Exit(1)


def known(names: list[str], accepted: Iterable[str], what: str) -> list[str]:
    """The names, if all are accepted.

    Raises:
        ValueError: for one that is not.
    """
    for name in names:
        if name not in accepted:
            raise ValueError(f"Unknown {what} {name!r}, use one of {', '.join(accepted)}.")
    return names


if __name__ == "__main__":
    typer.run(main)
