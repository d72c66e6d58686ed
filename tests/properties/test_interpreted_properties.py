"""The property suite on tiny models whose ops run as Triton kernels, in a process with the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)


@pytest.mark.parametrize(
    "memory", ["linear", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deep", "trellis"))]
)
def test_the_suite_passes_in_the_triton_form(memory: str):
    file = Path(__file__).with_name("interpreted_properties.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", memory]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert result.returncode == 0, result.stdout + result.stderr
