"""Compile a Triton kernel ahead of time, without a GPU, and read from its machine code what it needs.

A module with kernels lists them for `compile_check` in a function `compile_entries(target) -> list[KernelEntry]`.
"""

import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Attributes:
        name: as given on the command line.
        backend: Triton's name of the compiler, `"cuda"` or `"hip"`.
        arch: Triton's name of the architecture.
        warp_size: threads of a warp.
        shared_bytes: shared memory that one block may use.
        processors: streaming multiprocessors (compute units) of the common part.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    processors: int

    @property
    def precision(self) -> str:
        """`input_precision` of float32 products."""
        return "tf32x3" if self.backend == "cuda" else "ieee"


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 108),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 132),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 148),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 304),
    )
}


@dataclass(frozen=True)
class KernelEntry:
    """A kernel as it is launched in practice.

    Attributes:
        name: op, kernel and what distinguishes this configuration, such as width and dtype.
        kernel: function under `@triton.jit`.
        types: Triton type of every run-time parameter: `"*bf16"`, `"*fp32"`, `"i32"`, `"fp32"`, ... Pointers are taken
            to be aligned to 16 bytes, as those of tensors are; `"i32:16"` is an integer that divides by 16.
        constexprs: value of every other parameter, `None` for an absent tensor. A parameter `PRECISION` that is not
            among them gets the target's.
        num_warps: warps of a block.
        num_stages: stages of its software pipeline.
        has_product: whether it must contain matrix instructions.
    """

    name: str
    kernel: JITFunction
    types: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    has_product: bool = True

    def source(self, target: Target) -> ASTSource:
        """The kernel with its signature.

        Raises:
            ValueError: unless `types` and `constexprs` name each parameter once.
        """
        names = self.kernel.arg_names
        constexprs = dict(self.constexprs)
        if "PRECISION" in names:
            constexprs.setdefault("PRECISION", target.precision)
        if odd := {*names} ^ {*self.types, *constexprs} | {*self.types} & {*constexprs}:
            raise ValueError(f"Kernel entry {self.name!r} should name each parameter once, see {sorted(odd)}.")
        signature = {n: self.types[n].split(":")[0] if n in self.types else "constexpr" for n in names}
        aligned = [n for n, kind in self.types.items() if kind.startswith("*") or kind.endswith(":16")]
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        return ASTSource(self.kernel, signature, constexprs, attributes)


@dataclass
class Report:
    """What a kernel needs on a target.

    Attributes:
        kernel: name of the entry.
        target: name of the target.
        num_warps, num_stages: configuration.
        seconds: time of the compilation; next to nothing when Triton's cache has it.
        registers: per thread.
        spilled_bytes: per thread, in local memory.
        shared_bytes: per block.
        matrix: matrix instructions in the code, by mnemonic.
        problems: why the entry fails; empty if it does not.
    """

    kernel: str
    target: str
    num_warps: int
    num_stages: int
    seconds: float = 0.0
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check(entry: KernelEntry, target: Target) -> Report:
    """Compile an entry for a target and say what is wrong with the result."""
    report = Report(entry.name, target.name, entry.num_warps, entry.num_stages)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, "enable_fp_fusion": True}
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    start = time.perf_counter()
    try:
        compiled = triton_compile(entry.source(target), gpu, options)
    except Exception as error:  # each stage of each backend has exceptions of its own
        report.problems.append(f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-200:]}")
        return report
    report.seconds = time.perf_counter() - start
    report.shared_bytes = compiled.metadata.shared
    if target.backend == "cuda":
        _read_cubin(compiled.asm["cubin"], report)
    else:
        _read_amdgcn(compiled.asm["amdgcn"], report)
    if report.spilled_bytes:
        report.problems.append(f"spills {report.spilled_bytes} bytes per thread")
    if report.shared_bytes > target.shared_bytes:
        report.problems.append(f"needs {report.shared_bytes} bytes of shared memory of {target.shared_bytes}")
    if entry.has_product and not report.matrix:
        report.problems.append("has no matrix instruction")
    return report


def _read_cubin(cubin: bytes, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = _cuobjdump("--dump-resource-usage", file), _cuobjdump("--dump-sass", file)
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    report.registers = int(fields["REG"])
    report.spilled_bytes = int(fields["STACK"]) + int(fields["LOCAL"])
    report.matrix = dict(Counter(re.findall(r"\b(?:[HIDQ]|HG|IG|QG|UTC\w)MMA\b", code)))


def _cuobjdump(option: str, file: Path) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_amdgcn(code: str, report: Report) -> None:
    fields = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code))
    report.registers = int(fields["vgpr_count"])
    report.spilled_bytes = int(fields["private_segment_fixed_size"])
    report.matrix = dict(Counter(re.findall(r"\bv_s?mfmac?_\w+", code)))
