"""The Triton form of `two_pass_slots`: its arithmetic in a process with Triton's interpreter, its plan in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from two_pass_inputs import SlotCase

from hf_memory.kernels.two_pass_slots.plan import blocks, decode_plan, too_large_to_decode


@pytest.mark.parametrize("name", ["two_pass", "two_pass_decode"])
def test_kernels_in_the_interpreter(name: str):
    file = Path(__file__).with_name(f"interpreted_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("slots, width, chunk", [(1, 1, 1), (20, 24, 5), (64, 64, 16), (64, 48, 16)])
def test_blocks_hold_what_they_should(slots, width, chunk):
    cut = blocks(slots, width, chunk, 2)
    for size, block in (("M", "MB"), ("D", "DB"), ("TILE", "BLOCK")):
        assert cut[block] >= max(16, cut[size]) and cut[block] & (cut[block] - 1) == 0


@pytest.mark.parametrize("slots, width", [(1, 1), (20, 24), (64, 64), (128, 64), (64, 256), (128, 128)])
def test_a_decoded_token_holds_its_memories_in_registers(slots: int, width: int):
    assert too_large_to_decode(slots, width) is None
    for programs, processors in ((16, 132), (1024, 132)):
        cut = decode_plan(programs, slots, width, 20, processors)
        assert cut.slots >= max(16, slots) and cut.width >= max(16, width) and cut.rows == 32
        assert cut.num_warps in (4, 8, 16) and cut.slots * cut.width <= 32 * 32 * cut.num_warps
    assert decode_plan(16, 64, 64, 16, 132).num_warps == 2 * decode_plan(1024, 64, 64, 16, 132).num_warps
    assert "not for 128 slots of width 256" in too_large_to_decode(128, 256)


def test_without_a_gpu_the_form_is_refused():
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        SlotCase()("triton")
