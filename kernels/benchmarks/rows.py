"""What a measurement leaves behind: one JSON object per line, `results/<device>.jsonl`."""

import importlib.metadata
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import torch

from .timing import Timing


RESULTS = Path(__file__).parent / "results"
RUN = "HF_MEMORY_BENCHMARK_RUN"
"""Environment variable with the name of a run, for one that consists of several processes."""


def now() -> str:
    """UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_STARTED = now()


@dataclass(frozen=True)
class Row:
    """One measurement. Times in milliseconds (per token in decode), memory in MiB.

    Attributes:
        op: name of the function; `"model"` for a whole model.
        provider: whose code.
        form: which of its forms.
        shape: `BATCHxTIMExHEADSxWIDTH`; in decode, time is the length of the context.
        dtype: of queries, keys and values.
        mode: see `correctness.MODES`; of a model `"train"`, `"prefill"` or `"decode"`.
        grid: chunk size of the inner gradients, if there are some.
        options: what else defines the function.
        median_ms, q20_ms, q80_ms: median and the 20 % and 80 % quantiles.
        runs: how many were made.
        first_call_ms: the first call with this shape, behind the check. In the mode `"first-call"` in a fresh process
            with empty caches: forward, backward and one decoded token, everything compiled.
        peak_mib: memory needed beyond the operands; of a model everything, weights and optimizer too. `None` for
            compiled code on a CPU, where it cannot be counted.
        error: relative RMS error of the worst tensor in the correctness check; `None` for a model, and for a peer that
            computes another function.
        allowed: what it was allowed to be.
        device: name of the card or processor.
        threads: CPU threads.
        load: load average of the machine when the row was written, `None` where unknown. A CPU row at a load above its
            threads measures the neighbours, too.
        versions: python, torch, triton and the provider's package.
        time: when, UTC.
        run: what was measured together: the variable `RUN`, else the start of the process. Only rows of one run and
            device are compared.
    """

    op: str
    provider: str
    form: str
    shape: str
    dtype: str
    mode: str
    grid: int | None
    options: str
    median_ms: float
    q20_ms: float
    q80_ms: float
    runs: int
    first_call_ms: float
    peak_mib: float | None
    error: float | None
    allowed: float | None
    device: str
    threads: int = field(default_factory=torch.get_num_threads)
    load: float | None = field(
        default_factory=lambda: round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    )
    versions: dict[str, str] = field(default_factory=dict)
    time: str = field(default_factory=now)
    run: str = field(default_factory=lambda: os.environ.get(RUN, _STARTED))

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """Read a line of a results file.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        values = json.loads(line)
        # The first rows did not name their run; each file held one.
        values.setdefault("run", "")
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"Fields of a row: missing {names - set(values)}, unknown {set(values) - names}.")
        return cls(**values)

    def to_json(self) -> str:
        """One line, numbers rounded to what they are worth."""
        return json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()})


def timing_fields(timing: Timing) -> dict[str, float | int]:
    """The fields of a row that a timing fills."""
    return timing._asdict()


def versions(package: str | None = None) -> dict[str, str]:
    """Versions that decide about speed, those of `package` too."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "hf-memory", *([package] if package else [])):
        try:
            found.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Name of the card, or of the processor with the number of its cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{name}, {cores} cores"


def results_file(device: torch.device) -> Path:
    """Where rows of a device go unless another file is named."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".jsonl")


def append(row: Row, file: Path) -> None:
    """Add a row to a results file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(row.to_json() + "\n")


def read(file: Path) -> list[Row]:
    """All rows of a results file."""
    return [Row.from_json(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
