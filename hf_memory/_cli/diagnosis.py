"""Versions, devices and self-checks, for `hf-memory doctor`."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


# Lowest version that is supported and highest one that is tested.
SUPPORTED = {
    "python": ("3.11", None),
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.17", "5.23"),
    "huggingface_hub": ("1.33", "2.4"),
    "accelerate": (None, None),
    "peft": (None, None),
    "datasets": (None, None),
    "safetensors": (None, None),
    "tokenizers": (None, None),
}
# A float32 form differs from float64 by some 1e-6; a wrong one by far more.
SELF_CHECK_LIMIT = 1e-3


@dataclass(frozen=True)
class Version:
    """An installed package; `verdict` is `"ok"`, `"too old"`, `"newer than tested"` or `"not installed"`."""

    name: str
    installed: str | None
    supported: str
    verdict: str


@dataclass(frozen=True)
class FormCheck:
    """One form of one op on one device; `error` is relative to float64, `None` (see `problem`) if it did not run."""

    op: str
    device: str
    form: str
    default: bool
    error: float | None
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= SELF_CHECK_LIMIT


def versions() -> list[Version]:
    from packaging.version import Version as Parsed

    found = []
    for name, (low, high) in SUPPORTED.items():
        supported = " to ".join(part for part in (low, high) if part) if high else f"{low} and newer" if low else "any"
        try:
            installed = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            found.append(Version(name, None, supported, "not installed"))
            continue
        release = Parsed(installed).release
        too_old = low is not None and release < Parsed(low).release
        # 2.13.1 is still 2.13.
        too_new = high is not None and release[: len(Parsed(high).release)] > Parsed(high).release
        verdict = "too old" if too_old else "newer than tested" if too_new else "ok"
        found.append(Version(name, installed, supported, verdict))
    return found


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA (or ROCm) device, with what they are."""
    import torch

    found = [{"name": "cpu", "description": f"{platform.machine()}, {torch.get_num_threads()} threads"}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append({"name": f"cuda:{index}", "description": f"{properties.name}, {memory}"})
    return found


def self_checks(device_names: list[str]) -> list[FormCheck]:
    """Runs every form of every op on every device against the float64 reference."""
    from hf_memory.kernels.dispatch import OPS

    found = []
    for device in device_names:
        for info in OPS.values():
            for place, form in enumerate(info.forms(device)):
                error, problem = None, ""
                try:
                    error = float(info.self_check(form, device))
                except Exception as exception:
                    problem = f"{type(exception).__name__}: {' '.join(str(exception).split())[:200]}"
                found.append(FormCheck(info.name, device, form, place == 0, error, problem))
    return found


def as_dict(version_list: list[Version], device_list: list[dict[str, Any]], checks: list[FormCheck]) -> dict[str, Any]:
    return {
        "versions": [asdict(entry) for entry in version_list],
        "devices": device_list,
        "ops": [{**asdict(check), "ok": check.ok} for check in checks],
        "ok": all(check.ok for check in checks),
    }
