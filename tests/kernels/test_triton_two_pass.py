"""The Triton form of `two_pass_slots`: its arithmetic in a process with Triton's interpreter, its plan in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from two_pass_inputs import SlotCase

from hf_memory.kernels.two_pass_slots.plan import blocks


def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_two_pass.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("slots, width, chunk", [(1, 1, 1), (20, 24, 5), (64, 64, 16), (64, 48, 16)])
def test_blocks_hold_what_they_should(slots, width, chunk):
    cut = blocks(slots, width, chunk, 2)
    for size, block in (("M", "MB"), ("D", "DB"), ("TILE", "BLOCK")):
        assert cut[block] >= max(16, cut[size]) and cut[block] & (cut[block] - 1) == 0


def test_without_a_gpu_the_form_is_refused():
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        SlotCase()("triton")
