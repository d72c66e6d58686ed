"""Compile every Triton kernel for GPUs that are not there: `python -m hf_memory.kernels.compile_check --help`.

Exits with 1 if a kernel spills, needs more shared memory than a block has, or lacks the matrix instructions that it is
meant to have; with 2 on wrong input.
"""

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table


try:
    from triton import knobs
    from triton.runtime.jit import JITFunction
except ImportError as error:
    raise SystemExit("The compile check needs Triton, which is there for Linux only: pip install triton.") from error

from .. import kernels
from .compiled import TARGETS, KernelEntry, Report, Target, check


Job = tuple[str, int, str]
"""Module, index among its entries, target: what another process needs to find an entry."""


def kernel_modules() -> list[str]:
    """Names of all modules with Triton kernels: `triton*.py` and `*_triton.py`."""
    modules = pkgutil.walk_packages(kernels.__path__, kernels.__name__ + ".")
    names = {module.name: module.name.rpartition(".")[2] for module in modules}
    return sorted(name for name, last in names.items() if last.startswith("triton") or last.endswith("_triton"))


def entries_of(module: ModuleType, target: Target) -> list[KernelEntry]:
    """Kernels that a module lists for a target."""
    return module.compile_entries(target) if hasattr(module, "compile_entries") else []


def unlisted(modules: list[str], targets: list[Target]) -> Iterator[Report]:
    """A failure for every kernel, a jitted function called `*_kernel`, that its module does not list."""
    for name in modules:
        module = importlib.import_module(name)
        own = [x for x in vars(module).values() if isinstance(x, JITFunction) and x.__module__ == name]
        for target in targets:
            listed = {entry.kernel for entry in entries_of(module, target)}
            for kernel in own:
                if kernel.__name__.endswith("_kernel") and kernel not in listed:
                    problem = f"is missing in `{name}.compile_entries`"
                    yield Report(kernel.__name__, target.name, 0, 0, problems=[problem])


def jobs(modules: list[str], targets: list[Target], only: str = "", fast: bool = False) -> list[Job]:
    """What to compile.

    Args:
        modules: names of modules with kernels.
        targets: what to compile for.
        only: keep entries with this in their name.
        fast: keep the first entry of each kernel.
    """
    found = []
    for name in modules:
        for target in targets:
            seen = set()
            for i, entry in enumerate(entries_of(importlib.import_module(name), target)):
                if only in entry.name and not (fast and entry.kernel in seen):
                    found.append((name, i, target.name))
                seen.add(entry.kernel)
    return found


def run(job: Job) -> Report:
    """Compile one entry."""
    module, index, target = job
    return check(entries_of(importlib.import_module(module), TARGETS[target])[index], TARGETS[target])


def reports(todo: list[Job], processes: int) -> Iterator[Report]:
    """Compile all entries, in this process or in several, in the order of `todo`."""
    if processes == 1:
        yield from map(run, todo)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, todo)


def table(rows: list[Report]) -> Table:
    """Reports for people."""
    columns = ("kernel", "target", "warps", "stages", "regs", "spill", "smem KiB", "matrix", "s", "")
    result = Table(*columns, box=None, pad_edge=False)
    for column in result.columns[2:-1]:
        column.justify = "right"
    for row in rows:
        sizes = (row.num_warps, row.num_stages, row.registers, row.spilled_bytes, f"{row.shared_bytes / 1024:.1f}")
        verdict = "[red]fails" if row.problems else "[green]ok"
        cells = (row.kernel, row.target, *sizes, sum(row.matrix.values()), f"{row.seconds:.1f}")
        result.add_row(*map(str, cells), verdict)
    return result


def main(
    targets: Annotated[str, typer.Option(help="Architectures, joined by commas.")] = ",".join(TARGETS),
    only: Annotated[str, typer.Option(help="Only kernels with this in their name.")] = "",
    fast: Annotated[bool, typer.Option("--fast", help="Only the first configuration of each kernel.")] = False,
    processes: Annotated[int, typer.Option("--jobs", min=1, help="Number of processes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Compile every Triton kernel in its default configurations, without a GPU, and read what the code needs.

    What was compiled is kept in Triton's cache (TRITON_CACHE_DIR, by default ~/.triton/cache), also for later runs.
    """
    if knobs.runtime.interpret:
        raise typer.BadParameter("Triton's interpreter compiles nothing: run this without TRITON_INTERPRET.")
    names = targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        raise typer.BadParameter(f"Unknown target {unknown[0]!r}, use some of {','.join(TARGETS)}.")
    modules, chosen = kernel_modules(), [TARGETS[name] for name in names]
    todo = jobs(modules, chosen, only, fast)
    if only and not todo:
        raise typer.BadParameter(f"No kernel has {only!r} in its name.")
    steps = reports(todo, processes)
    rows = list(track(steps, "Compiling", len(todo), console=Console(stderr=True), transient=True))
    rows += [row for row in unlisted(modules, chosen) if only in row.kernel]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        # What goes to a file or a pipe is not cut to the width of a terminal.
        Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    failed = [row for row in rows if row.problems]
    for row in failed:
        typer.echo(f"{row.kernel} on {row.target} {', '.join(row.problems)}.", err=True)
    typer.echo(
        f"{len(failed)} of {len(rows)} fail." if failed else f"All {len(rows)} are as they should be.", err=True
    )
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
