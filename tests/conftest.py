"""What every test stands on: no network, one thread, fixed seeds, and NaN wherever nobody has written yet."""

import os


# The libraries read these when they are imported; subprocesses inherit them. Tiny tensors are faster on one thread,
# and sums then do not depend on the number of cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN (the largest value for integers), so an element that nobody writes fails its test."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout that is tested."""
    return ROOT


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run a piece of Python in a fresh interpreter; its standard output, or a failure with everything it printed."""

    def run(code: str, cwd: Path | str = ROOT, executable: Path | str = sys.executable, stderr: bool = False) -> str:
        # PYTHONPATH of the caller would put the checkout in front of what a test has installed elsewhere.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(
            [str(executable), "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr if stderr else result.stdout

    return run
