"""The Triton form of `sphere_slots`: in the interpreter, which needs a process of its own, and how a call is cut."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from hf_memory.kernels.sphere_slots.plan import LARGEST_STATE, plan


HERE = Path(__file__).parent


def test_kernels_equal_the_reference_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "interpreted_sphere.py"]
    result = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("slots", [1, 4, 16, 64])
@pytest.mark.parametrize("width", [16, 60, 64])
def test_every_plan_holds_its_state_in_registers(slots, width):
    cut = plan(slots, width)
    assert cut.slots >= slots and cut.width >= width and cut.slots * cut.width <= LARGEST_STATE
    numbers_per_thread = cut.slots * cut.width / (32 * cut.warps)
    assert cut.warps in (1, 2, 4, 8) and numbers_per_thread <= 16
