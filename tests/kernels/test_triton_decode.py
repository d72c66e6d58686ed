"""The decode kernels: their arithmetic in a process with Triton's interpreter, their plans in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from hf_memory.kernels.anchored_linear import triton_decode as linear
from hf_memory.kernels.anchored_mlp import triton_decode as deep


def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_decode.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("width", [1, 24, 64, 100, 128, 256])
@pytest.mark.parametrize("norm", [False, True])
def test_plans_of_a_matrix_memory_cover_it(width: int, norm: bool):
    for batch in (1, 8, 64):
        cut = linear.plan(batch, 16, width, width, 16, norm, 132)
        blocks = cut.programs // (batch * 16)
        assert blocks * cut.block_v >= width > (blocks - 1) * cut.block_v
        assert not norm or blocks == 1
        assert min(cut.block_k, cut.block_v, cut.block_rows) >= 16
        assert cut.block_k * cut.block_v <= 512 * cut.num_warps or cut.block_k == 16


def test_a_small_batch_fills_the_gpu():
    assert linear.plan(1, 16, 128, 128, 16, False, 132).programs == 128
    assert linear.plan(64, 16, 128, 128, 16, False, 132).block_v == 64


@pytest.mark.parametrize("width", [8, 64, 128, 256])
@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_plans_of_a_two_layer_memory_cover_it(width: int, expansion: int):
    cut, alone = (deep.plan(programs, width, width, expansion * width, 16, 132) for programs in (1024, 16))
    assert (cut.num_warps, alone.num_warps) == (4, 8)
    assert min(cut.block_k, cut.block_v) >= max(16, width)
    for plan in (cut, alone):
        assert plan.block_n == 16 or plan.block_n * max(plan.block_k, plan.block_v) <= 512 * plan.num_warps
