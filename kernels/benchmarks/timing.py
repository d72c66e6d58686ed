"""Median time, quantiles, first call and peak memory of a call."""

import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


# Written between two runs on a GPU, so that no run finds its operands in the L2 of the last one (50 to 126 MB on the
# largest cards).
FLUSH_BYTES = 256 * 2**20


class Timing(NamedTuple):
    """Times in milliseconds; `peak_mib` is what the call needed beyond what was there before it."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    runs: int
    first_call_ms: float
    peak_mib: float | None


def quantile(times: list[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    times = sorted(times)
    position = q * (len(times) - 1)
    low = int(position)
    high = min(low + 1, len(times) - 1)
    return times[low] + (position - low) * (times[high] - times[low])


def time_once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, everything it started included."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    # Behind a flush that still runs, Python could launch kernels for free.
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operators create, from the first sight of one until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known[storage] = True
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out

    def _free(self, size: int) -> None:
        self.held -= size


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """MiB that a call allocates at its worst moment (on the CPU without the workspaces inside single operators)."""
    if device.type != "cuda":
        with _Allocations() as allocations:
            call()
        return allocations.peak / 2**20
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def captured(make: Callable[[], Callable[[], Tensor | None]], device: torch.device) -> Callable[[], Tensor | None]:
    """A call replayed from a CUDA graph; what it returns is overwritten by the next replay.

    Args:
        make: gives the call to capture; called twice, since warming up may use up what a call works on.
        device: a CUDA device.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        warm_up = make()
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream(device).wait_stream(stream)
    call = make()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor | None:
        graph.replay()
        return out

    return replay


def measure(
    call: Callable[[], object],
    device: torch.device,
    seconds: float = 1.0,
    min_runs: int = 5,
    max_runs: int = 200,
    per: int = 1,
    inference: bool = False,
    memory: bool = True,
) -> Timing:
    """Time a call until `seconds` are over.

    Args:
        call: what to time.
        device: where it runs.
        seconds: time to spend on runs after the first call.
        min_runs: runs that are made even if they take longer.
        max_runs: runs that are enough.
        per: how many units (tokens) one call makes; times are per unit.
        inference: run under `torch.no_grad`.
        memory: whether to count the peak. On the CPU that takes a dispatch mode, beside which nothing is compiled.
    """
    context: AbstractContextManager = torch.no_grad() if inference else nullcontext()
    with context:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        first = 1e3 * (time.perf_counter() - start)
        peak = peak_memory(call, device) if memory else None
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < min_runs or (time.perf_counter() - start < seconds and len(times) < max_runs):
            times.append(time_once(call, device) / per)
    return Timing(statistics.median(times), quantile(times, 0.2), quantile(times, 0.8), len(times), first / per, peak)
