"""What a fresh process waits for: the first forward, backward and decoded token of an op, with empty caches.

As a command it makes these calls for several ops at once and keeps what they compile, so that processes after it start
warm: `python -m hf_memory.kernels.benchmarks.first_call --help`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from .inputs import window
from .timing import Timing, peak_memory


if TYPE_CHECKING:
    from .run import Job

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
"""Environment variables with the folders that compiled code is kept in."""

LIMIT = 600
"""Seconds that one process may take."""


class FirstCallError(RuntimeError):
    """The process that was to make the calls failed."""


def _first_call(job: "Job") -> dict[str, float | None]:
    """Make the calls, in the process that this module runs as."""
    from .registry import COMPILED
    from .run import forward_backward

    inputs = job.inputs()
    # The context and the libraries of the card are everybody's.
    square = torch.ones(256, 256, device=job.device, dtype=inputs["v"].dtype)
    _finish(lambda: square @ square, job)
    step = forward_backward(job.provider.forward, inputs)

    def calls() -> None:
        step()
        if job.provider.decode is not None:
            prompt = min(64, job.shape.time - 1)
            with torch.no_grad():
                job.provider.decode(window(inputs, 0, prompt + 1), prompt)(prompt)

    seconds = _finish(calls, job)
    counted = job.device.type != "cpu" or job.provider.form != COMPILED
    return {"milliseconds": 1e3 * seconds, "peak_mib": peak_memory(calls, job.device) if counted else None}


def _finish(call: Callable[[], object], job: "Job") -> float:
    start = time.perf_counter()
    call()
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)
    return time.perf_counter() - start


def _start(job: "Job", environment: dict[str, str]) -> dict[str, float | None]:
    """The calls of a job in a process of their own.

    Raises:
        FirstCallError: with the last line of what the process said.
    """
    names = {"op": job.op.label, "provider": job.provider.name, "form": job.provider.form}
    what = names | {"shape": str(job.shape), "dtype": job.dtype, "device": str(job.device)}
    command = [sys.executable, "-m", __spec__.name, "--only", json.dumps(what)]
    path = os.pathsep.join(sys.path)
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise FirstCallError(f"first call in a fresh process: {said[-1]}")
    return json.loads(ended.stdout.splitlines()[-1])


def measure_first_call(job: "Job") -> Timing:
    """Time the calls in a fresh process with empty caches.

    Raises:
        FirstCallError: if they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = _start(job, {name: os.path.join(folder, name) for name in CACHES})
    return Timing(*[found["milliseconds"]] * 3, 1, found["milliseconds"], found["peak_mib"])


def _job(what: dict[str, str]) -> "Job":
    from .registry import OPS
    from .run import Job, Shape

    op, device = OPS[what["op"]], torch.device(what["device"])
    provider = next(
        p for p in op.providers(device, peers=True) if (p.name, p.form) == (what["provider"], what["form"])
    )
    return Job(op, provider, Shape.parse(what["shape"]), what["dtype"], "first-call", device)


def main(
    op: Annotated[list[str] | None, typer.Option(help="Name, or name/grid. Default: all.")] = None,
    form: Annotated[list[str] | None, typer.Option(help="Our forms. Default: all but compiled.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="BATCHxTIMExHEADSxWIDTH.")] = None,
    dtype: Annotated[str, typer.Option(help="Of queries, keys and values.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    peers: Annotated[bool, typer.Option("--peers", help="Warm up what other libraries offer, too.")] = False,
    workers: Annotated[int, typer.Option(help="Processes at a time.")] = os.cpu_count() or 1,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compile what ops need for their usual shapes, several at a time, into the caches that everybody uses."""
    if only is not None:
        typer.echo(json.dumps(_first_call(_job(json.loads(only)))))
        return
    from .registry import OWN
    from .run import DTYPES, OWN_FORMS, Shape, jobs, known, select

    on = torch.device(device)
    try:
        shapes = [Shape.parse(text) for text in shape] if shape else None
        dtypes, forms = known([dtype], DTYPES, "dtype"), known(form or [], OWN_FORMS, "form")
        found = jobs(select(op or []), shapes, dtypes, ["first-call", "fwd-graph"], on, peers, forms)
        todo = list({(job.op.label, job.provider.form, job.shape): job for job in found if _compiles(job)}.values())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    def warm_up(job: "Job") -> tuple[str, bool]:
        try:
            return f"{_start(job, {})['milliseconds'] / 1e3:8.1f} s", False
        except (FirstCallError, subprocess.TimeoutExpired) as error:
            return f"failed: {error}", job.provider.name == OWN

    failed = False
    with ThreadPoolExecutor(workers) as pool:
        for job, (outcome, ours) in zip(todo, pool.map(warm_up, todo)):
            by = f"{job.provider.name} {job.provider.form}"
            typer.echo(f"{job.op.label:24}{by:24}{str(job.shape):16}{outcome}")
            failed = failed or ours
    if failed:
        raise typer.Exit(1)


def _compiles(job: "Job") -> bool:
    return job.provider.form not in ("sdpa", "plain PyTorch")


if __name__ == "__main__":
    typer.run(main)
