"""The plain linear memory in Triton: its arithmetic in a process with the interpreter, its plans in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_inputs import Case

from hf_memory.kernels import dispatch, launch
from hf_memory.kernels.anchored_linear.plan import plan, tile_width


def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_linear.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 36, 48, 64, 96, 128, 256, 1000])
def test_tiles_hold_whole_chunks_or_divide_one(chunk: int, itemsize: int):
    tile = tile_width(chunk, itemsize)
    assert 1 <= tile <= 64 and (tile % chunk == 0 or chunk % tile == 0)


def test_a_chunk_without_a_tile_is_named():
    assert tile_width(67, 2) is None
    with pytest.raises(ValueError, match="chunk_size=67"):
        plan(1, 64, 64, 2, 67)


@pytest.mark.parametrize("width", [8, 32, 100, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_tensor_cores_and_states_fit_registers(width: int, itemsize: int):
    for series in (1, 16, 1024):
        cut = plan(series, width, width, itemsize, 16)
        blocks = (cut.block, cut.key_block, cut.gradient_block, cut.value_block, cut.chain_block)
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
        # Memory and momentum of one program of the chain, float32, over the threads of its warps.
        assert cut.streams or 2 * max(width, 16) * cut.chain_block / cut.threads <= 32


def test_a_short_batch_gets_more_programs():
    assert plan(4, 128, 128, 2, 16).chain_block < plan(1024, 128, 128, 2, 16).chain_block


def test_without_a_gpu_the_kernels_are_not_for_these_tensors():
    assert "triton" not in dispatch.forms("cpu")
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu.*TRITON_INTERPRET=1"):
        Case(depth=1, norm=False, shape=(1, 4, 1, 8), dtype=torch.float32)("triton")


def test_a_gpu_without_triton_is_not_told_to_be_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_import_triton", lambda: None)
    assert dispatch.forms("cuda") == ["chunk", "reference"]
    with pytest.raises(ValueError, match="needs the package triton"):
        launch.require_kernels("cuda")
