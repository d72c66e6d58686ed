"""A deep memory layer beside titans-pytorch's `NeuralMemory`, forward and backward, in alternating runs.

`python -m hf_memory.kernels.benchmarks.titans_pytorch --help`

Both layers go from hidden states to hidden states, projections, gates and norm included, with a memory of two layers
per head. titans-pytorch has two sizes where we have one. Its `batch_size` is our `chunk_size`: how long gradients are
taken at the same memory. Its `chunk_size` says for how many tokens decay and momentum are evaluated once, and how far
a query lags behind the writes. We do both per token. So does its default, `chunk_size=1`, with which the recurrences
agree to rounding (tests/test_benchmarks.py); larger values compute a coarser function. Both are timed.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from ..dispatch import anchored_mlp
from ..types import AnchoredOptions, Gates
from .correctness import check
from .inputs import Shape, cast
from .registry import OPS
from .rows import Row, append, device_name, results_file, timing_fields, versions
from .run import forward_backward
from .timing import Timing, peak_memory, quantile, time_once


GRID = 64
EXPANSION = 4
OP = OPS[f"anchored_mlp/{GRID}"]


class MemoryLayer(nn.Module):
    """The parts of `NeuralMemory` around `anchored_mlp`: norm, projections, gates, output gate and projection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        heads, width = shape.heads, shape.width
        hidden = heads * width
        self.heads = heads
        self.norm = nn.RMSNorm(hidden)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.step_proj, self.decay_proj, self.momentum_proj = (nn.Linear(hidden, 2 * heads) for _ in range(3))
        self.gate_proj = nn.Linear(hidden, heads, bias=False)
        inner = EXPANSION * width
        self.weight_0 = nn.Parameter(torch.randn(heads, width, inner) * width**-0.5)
        self.weight_1 = nn.Parameter(torch.randn(heads, inner, width) * inner**-0.5)
        self.norm_weight = nn.Parameter(torch.ones(heads, width))
        self.norm_bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states `[B, T, H * D]` to hidden states."""
        x = self.norm(hidden_states)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1))

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        gates = Gates(
            0.1 * split(self.step_proj(x)).sigmoid(),
            functional.logsigmoid(5 - split(self.decay_proj(x))),
            functional.logsigmoid(split(self.momentum_proj(x))),
        )
        out, _ = anchored_mlp(
            functional.normalize(q, dim=-1),
            functional.normalize(k, dim=-1),
            v,
            gates,
            (self.weight_0, self.weight_1),
            (self.norm_weight, self.norm_bias),
            options=AnchoredOptions(chunk_size=GRID, decay_target="init"),
        )
        return self.o_proj((out * self.gate_proj(x).sigmoid().unsqueeze(-1)).flatten(-2))


def peer_layer(shape: Shape, chunk_size: int) -> nn.Module:
    """`NeuralMemory` of the same sizes.

    Raises:
        ImportError: if titans-pytorch is not installed.
    """
    from titans_pytorch import MemoryMLP, NeuralMemory

    return NeuralMemory(
        dim=shape.heads * shape.width,
        heads=shape.heads,
        dim_head=shape.width,
        chunk_size=chunk_size,
        batch_size=GRID,
        model=MemoryMLP(dim=shape.width, depth=2, expansion_factor=EXPANSION),
    )


def layer_call(layer: nn.Module, shape: Shape, device: torch.device) -> Callable[[], None]:
    """Forward and backward of a layer, gradients of its parameters and of its input."""
    layer = layer.to(device)
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.time, shape.heads * shape.width)
    x = torch.randn(size, generator=generator, device=device, requires_grad=True)
    cotangent = torch.randn(size, generator=generator, device=device)
    leaves = [x, *layer.parameters()]

    def call() -> None:
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, cotangent, allow_unused=True)

    return call


def alternate(calls: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Time each call once per round, so that whatever else the machine does meets all of them."""
    first = {name: time_once(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name, call in calls.items():
            times[name].append(time_once(call, device))
            typer.echo(f"round {done + 1}/{rounds}  {name:34} {times[name][-1] / 1e3:9.3f} s")
    return {
        name: Timing(
            statistics.median(runs),
            quantile(runs, 0.2),
            quantile(runs, 0.8),
            rounds,
            first[name],
            peak_memory(calls[name], device),
        )
        for name, runs in times.items()
    }


def main(
    tokens: Annotated[int, typer.Option(help="Length of the sequence.")] = 2048,
    heads: Annotated[int, typer.Option(help="Memory heads.")] = 4,
    width: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    peer_chunk_size: Annotated[list[int] | None, typer.Option(help="Its chunk_size. Default: 1 and 64.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turn.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = torch.get_num_threads(),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    at_least: Annotated[float, typer.Option(help="Fail below this ratio to chunk_size=1.")] = 0.0,
    output: Annotated[Path | None, typer.Option(help="File that the rows are appended to.")] = None,
) -> None:
    """Time a memory layer and titans-pytorch's, float32, and append a row for each."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    on, shape = torch.device(device), Shape(1, tokens, heads, width)
    own = OP.providers(on)[0]
    result = check(OP, own, width, torch.float32, "fwd+bwd", on)
    inputs = cast(OP.make(shape, torch.Generator(on).manual_seed(0)), torch.float32, on)
    calls = {"op": forward_backward(own.forward, inputs), "layer": layer_call(MemoryLayer(shape), shape, on)}
    chunk_sizes = {f"titans-pytorch, chunk_size={size}": size for size in peer_chunk_size or (1, GRID)}
    calls |= {name: layer_call(peer_layer(shape, size), shape, on) for name, size in chunk_sizes.items()}

    timings = alternate(calls, on, rounds)
    file = output or results_file(on)
    shared = {"shape": str(shape), "dtype": "float32", "mode": "fwd+bwd", "grid": GRID, "device": device_name(on)}
    for name, timing in timings.items():
        peer = name in chunk_sizes
        row = Row(
            op=OP.name if name == "op" else "titans_layer",
            provider="titans_pytorch" if peer else own.name,
            form=f"chunk_size={chunk_sizes[name]}" if peer else own.form,
            options=OP.options,
            **timing_fields(timing),
            error=None if peer else result.error,
            allowed=None if peer else result.allowed,
            versions=versions("titans-pytorch" if peer else own.package),
            **shared,
        )
        append(row, file)
        ratio = timing.median_ms / timings["layer"].median_ms
        typer.echo(f"{name:34} {timing.median_ms:10.1f} ms {timing.peak_mib:9.1f} MiB   {ratio:6.2f} x layer")
    typer.echo(f"{len(timings)} rows appended to {file}")
    exact = next((timing for name, timing in timings.items() if chunk_sizes.get(name) == 1), None)
    if exact is not None and exact.median_ms < at_least * timings["layer"].median_ms:
        typer.echo(f"Less than {at_least} times as fast.", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
