"""Read a million tokens at constant memory.

A small Titans language model reads the sources of Python's standard library byte by byte on the CPU, some thousand
tokens per call. What it carries from call to call is its cache, whose size is printed at both ends beside that of a
key/value cache. The model is untrained: speed and size do not depend on the weights.

python examples/million_tokens.py --plot million_tokens.png
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stdlib_text import read, source_files

from hf_memory import TitansCache, TitansConfig, TitansForCausalLM


ENDS = 65_536
"""Tokens at either end whose speeds are compared."""


@dataclass
class Reading:
    """What was measured so far.

    Attributes:
        config: of the model that reads.
        lengths, seconds, state_bytes: one entry for each piece: tokens, time, size of the cache behind it.
    """

    config: TitansConfig
    lengths: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def positions(self) -> np.ndarray:
        """Tokens read behind each piece."""
        return np.cumsum(self.lengths)

    @property
    def speeds(self) -> np.ndarray:
        """Tokens per second of each piece."""
        return np.array(self.lengths) / np.array(self.seconds)

    def end_speeds(self) -> tuple[float, float]:
        """Median tokens per second of the pieces in the first and in the last `ENDS` tokens."""
        positions, starts = self.positions, self.positions - self.lengths
        first = self.speeds[positions <= max(ENDS, positions[0])]
        last = self.speeds[starts >= min(self.tokens - ENDS, starts[-1])]
        return statistics.median(first), statistics.median(last)

    def key_value_bytes(self, tokens: int) -> int:
        """Size that a float32 key/value cache of the same layers and widths would have."""
        config = self.config
        return 2 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens


def pieces(tokens: int, length: int) -> Iterator[torch.Tensor]:
    """`tokens` bytes of the library, repeated if need be, in pieces `[1, <= length]`."""
    text = read(sum(source_files(), []), limit=tokens)
    text = np.resize(text, tokens)
    for start in range(0, tokens, length):
        yield torch.from_numpy(text[start : start + length].astype(np.int64))[None]


def read_pieces(model: TitansForCausalLM, tokens: int, length: int, progress: Progress) -> Reading:
    """Feed the text to the model piece by piece, until it ends or somebody presses Ctrl-C."""
    reading, cache = Reading(model.config), TitansCache(model.config)
    task = progress.add_task("reading", total=tokens, speed=0.0)
    try:
        with torch.inference_mode():
            for piece in pieces(tokens, length):
                start = time.perf_counter()
                model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
                reading.seconds.append(time.perf_counter() - start)
                reading.lengths.append(piece.shape[1])
                reading.state_bytes.append(cache.nbytes)
                progress.update(task, advance=piece.shape[1], speed=reading.speeds[-1])
    except KeyboardInterrupt:
        progress.console.print("Stopped; this is what was measured until here.")
    return reading


def report(reading: Reading, console: Console) -> None:
    """Print sizes and speeds."""
    first, last = reading.end_speeds()
    start, end = reading.state_bytes[0], reading.state_bytes[-1]
    console.print(f"tokens read         {reading.tokens:,} in {sum(reading.seconds):.0f} s")
    console.print(f"state, first piece  {start:,} bytes")
    console.print(f"state, last piece   {end:,} bytes ({'equal' if start == end else 'DIFFERENT'})")
    console.print(f"key/value cache     {reading.key_value_bytes(reading.tokens):,} bytes for as many tokens")
    console.print(f"first 64k tokens    {first:,.0f} tokens/s (median)")
    console.print(f"last 64k tokens     {last:,.0f} tokens/s (median), {last / first:.3f} of the first")


def plot(reading: Reading, file: Path) -> None:
    """Speed and memory over the position."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    speed, size = figure.subplots(1, 2)
    speed.plot(reading.positions, reading.speeds, linewidth=1)
    speed.set(xlabel="tokens read", ylabel="tokens per second", ylim=(0, None))
    key_values = [reading.key_value_bytes(tokens) / 2**20 for tokens in reading.positions]
    size.plot(reading.positions, key_values, label="key/value cache of the same widths")
    size.plot(reading.positions, np.array(reading.state_bytes) / 2**20, label="memory states")
    size.set(xlabel="tokens read", ylabel="MiB", yscale="log")
    size.legend()
    for axes in (speed, size):
        axes.xaxis.set_major_formatter(EngFormatter())
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main(
    tokens: Annotated[int, typer.Option(help="How many to read.")] = 1_000_000,
    piece: Annotated[int, typer.Option(help="Tokens per call.")] = 8192,
    depth: Annotated[int, typer.Option(help="Layers of the memory.")] = 2,
    chunk: Annotated[int, typer.Option(help="Chunk size of the inner gradients.")] = 16,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    heads: Annotated[int, typer.Option(help="Memory heads per layer.")] = 4,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = torch.get_num_threads(),
    plot_file: Annotated[Path | None, typer.Option("--plot", help="PNG to write.")] = None,
) -> None:
    """Read many tokens with a small Titans model and show that neither its memory nor its time per token grows."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = TitansConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        memory_depth=depth,
        chunk_size=chunk,
        num_persistent_tokens=16,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = TitansForCausalLM(config).eval()
    console = Console()
    console.print(
        f"Titans: {model.num_parameters():,} parameters, {layers} layers, {heads} heads, memory depth {depth}, "
        f"chunk size {chunk}, {threads} threads"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    speed = TextColumn("{task.fields[speed]:,.0f} tokens/s")
    with Progress(*columns, speed, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        reading = read_pieces(model, tokens, piece, progress)
    if not reading.lengths:
        raise typer.Exit(1)
    report(reading, console)
    if plot_file is not None:
        plot(reading, plot_file)
        console.print(f"plot                {plot_file}")
    if reading.state_bytes[0] != reading.state_bytes[-1]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
