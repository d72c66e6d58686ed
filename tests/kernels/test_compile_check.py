"""Every kernel compiles for GPUs that are not there; what would be slow or would not start there is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer


if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from hf_memory.kernels import compile_check, compiled


COMPILE_BROKEN = """
import json, sys
from dataclasses import asdict
sys.path.insert(0, "tests/kernels")
import broken_kernels
from hf_memory.kernels.compiled import TARGETS, check
entries = {entry.name: entry for entry in broken_kernels.compile_entries(TARGETS["sm_90"])}
entries.pop("misspelt")
cheap = ("right", "without matrix instructions")
print(json.dumps([asdict(check(e, t)) for t in TARGETS.values() for e in entries.values()
                  if t.name == "sm_90" or e.name in cheap]))
"""


def run_compiler(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter: one that has imported Triton for its interpreter compiles nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *arguments]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)


def test_kernels_compile_without_spills_within_shared_memory_and_to_matrix_instructions():
    result = run_compiler("-m", "hf_memory.kernels.compile_check", "--fast", "--targets", "sm_90", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(report["problems"] == [] for report in json.loads(result.stdout))


def test_broken_kernels_are_refused_on_every_target():
    result = run_compiler("-c", COMPILE_BROKEN)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    reports = {(r["kernel"], r["target"]): r for r in json.loads(result.stdout)}
    for target in compiled.TARGETS:
        right = reports["right", target]
        assert right["problems"] == [] and sum(right["matrix"].values()) > 0 and right["registers"] > 0
        without = reports["without matrix instructions", target]
        # The CDNA targets have matrix instructions for float32 itself.
        assert without["problems"] == ([] if target == "gfx942" else ["has no matrix instruction"])
    (spills,) = reports["spilling", "sm_90"]["problems"]
    (large,) = reports["too large", "sm_90"]["problems"]
    assert "spills" in spills and "262144 bytes of shared memory of 232448" in large


def test_entries_are_complete(monkeypatch):
    import broken_kernels

    target = compiled.TARGETS["sm_90"]
    misspelt = broken_kernels.compile_entries(target)[-1]
    with pytest.raises(ValueError, match="misspelt.*WIDTH"):
        misspelt.source(target)
    first = compile_check.jobs(["broken_kernels"], [target], fast=True)
    assert first == [("broken_kernels", 0, "sm_90")]
    assert compile_check.entries_of(json, target) == []
    monkeypatch.delattr(broken_kernels, "compile_entries")
    with pytest.raises(ValueError, match="compile_entries.*product_kernel"):
        compile_check.entries_of(broken_kernels, target)


def test_wrong_arguments_are_named(monkeypatch):
    with pytest.raises(typer.BadParameter, match="'sm_70'.*sm_80,sm_90"):
        compile_check.main(targets="sm_90,sm_70")
    with pytest.raises(typer.BadParameter, match="'no such kernel'"):
        compile_check.main(only="no such kernel")
    monkeypatch.setattr(compile_check.knobs.runtime, "interpret", True)
    with pytest.raises(typer.BadParameter, match="TRITON_INTERPRET"):
        compile_check.main()


def test_failures_fail_the_command(monkeypatch, capsys):
    report = compiled.Report("bad", "sm_90", 4, 2, problems=["spills 8 bytes per thread"])
    monkeypatch.setattr(compile_check, "run", lambda job: report)
    monkeypatch.setattr(compile_check, "jobs", lambda *args: [("module", 0, "sm_90")])
    with pytest.raises(typer.Exit) as exit_:
        compile_check.main()
    out, err = capsys.readouterr()
    assert exit_.value.exit_code == 1 and "fails" in out
    assert "bad on sm_90 spills 8 bytes per thread." in err and "1 of 1 fail" in err
