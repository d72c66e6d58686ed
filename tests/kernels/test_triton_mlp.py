"""Deep memories in Triton: the arithmetic in a process with the interpreter, plans in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_memory.kernels.anchored_mlp.plan import (
    H200,
    KERNELS,
    Memory,
    cut,
    group_of,
    kept_bytes,
    padded,
    scratch_bytes,
    state_bytes,
    unsupported,
)


def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_mlp.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr


def test_groups_are_the_root_rounded_up():
    assert [group_of(n) for n in (1, 2, 4, 5, 9, 10, 100, 101)] == [1, 2, 2, 3, 3, 4, 10, 11]


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_fit_tensor_cores_and_operands_fit_shared_memory(kernel: str):
    """Of the products of a kernel, two operands of the widest kind are in shared memory at a time."""
    for depth, width, hidden in ((1, 16, 16), (1, 256, 256), (2, 32, 32), (2, 64, 256), (2, 128, 512)):
        for tile in (1, 16, 33, 64):
            for itemsize in (2, 4):
                plan = cut(kernel, Memory(depth, width, hidden, tile, itemsize), H200)
                block = plan.BLOCK_J
                assert block >= 16 and block & (block - 1) == 0 and block <= padded(hidden)
                assert 2 * itemsize * padded(width) * max(block, padded(tile)) <= H200.shared_memory


def test_memory_grows_with_the_root_of_the_length():
    memory = Memory(depth=2, width=64, hidden=256, tile=16)
    assert state_bytes(memory, True) == 256 * 1024
    # 4,096 tokens, 16 heads: sixteen states of 256 KiB per head are kept, seventeen are on hand.
    assert kept_bytes(memory, 16, 256, True) == 16 * 16 * 256 * 1024
    assert scratch_bytes(memory, 16, 256, True, False) == 16 * (17 * 256 * 1024 + 16 * 16 * 2 * (3 * 256 + 64))
    for backward in (False, True):
        short, long = (scratch_bytes(memory, 1, tiles, True, backward) for tiles in (256, 4 * 256))
        assert 1.9 < long / short < 2.0


def test_what_the_kernels_are_not_made_for_is_said():
    assert unsupported(2, 128, 128, 64, True) is unsupported(1, 256, 256, 1, True) is None
    assert "two layers, not for 3" in unsupported(3, 64, 64, 16, True)
    assert "LayerNorm" in unsupported(1, 64, 64, 16, False)
    assert "64 and 32" in unsupported(2, 64, 32, 16, False)
    assert "128 at depth 2, not for 256" in unsupported(2, 256, 256, 16, True)
    assert "not for 65" in unsupported(2, 64, 64, 65, True)
