"""The rate of a big matrix product, which a target of the deep memory is stated in.

`python -m hf_memory.kernels.benchmarks.matmul --help`
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from . import floors
from .correctness import FLOOR, relative_error
from .inputs import Shape
from .rows import Row, append, device_name, results_file, timing_fields, versions
from .run import DTYPES, floor_of
from .timing import measure


SIZE = 8192
CHECKED_ROWS = 16


def rate(row: Row) -> float:
    """Operations per second of a row whose op has a cost."""
    counted = floors.cost(row.op, Shape.parse(row.shape), row.grid, row.dtype, row.mode)
    return counted.operations / (1e-3 * row.median_ms)


def main(
    size: Annotated[int, typer.Option(help="Rows and columns of both matrices.")] = SIZE,
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    seconds: Annotated[float, typer.Option(help="Time for the runs.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="File that the row is appended to.")] = None,
) -> None:
    """Time a square matrix product and append a row for it."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"Unknown dtype {dtype!r}, use one of {', '.join(DTYPES)}.")
    on = torch.device(device)
    generator = torch.Generator(on).manual_seed(0)
    a, b = torch.randn(2, size, size, generator=generator, device=on).to(DTYPES[dtype])
    timing = measure(lambda: a @ b, on, seconds, inference=True)
    rows = a[:CHECKED_ROWS]
    row = Row(
        op="matmul",
        provider="torch",
        form="matmul",
        shape=str(Shape(1, size, 1, size)),
        dtype=dtype,
        mode="fwd",
        grid=None,
        options="",
        **timing_fields(timing),
        error=relative_error(rows @ b, rows.cpu().double() @ b.cpu().double()),
        allowed=FLOOR[DTYPES[dtype]],
        device=device_name(on),
        versions=versions(),
    )
    file = output or results_file(on)
    append(row, file)
    floor = floor_of(row)
    share = "" if floor is None else f", {floor.ms / row.median_ms:.0%} of the peak"
    typer.echo(f"{row.device}: {rate(row) / 1e12:.3g} TFLOP/s in {dtype}{share}; a row appended to {file}")


if __name__ == "__main__":
    typer.run(main)
