"""What compressed caches cost the demo's teacher: held-out bits per byte and bytes, beside the full cache."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from stdlib_text import read, source_files
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from hf_memory import PolarQuantCache, SubGenCache


TEACHER = Path(__file__).parent / "demo_teacher"


def caches(model: PreTrainedModel, length: int, rows: int) -> dict[str, Callable[[], Cache]]:
    """Caches to compare, by what the table calls them; budgets are shares of the text."""
    config, mask = model.config, torch.ones(rows, length)

    def subgen(budget: int, window: int, **kwargs) -> Callable[[], SubGenCache]:
        return lambda: SubGenCache(config, budget, window, padding_mask=mask, **kwargs)

    made: dict[str, Callable[[], Cache]] = {
        "full cache": lambda: DynamicCache(config=config),
        "PolarQuant, window 128": lambda: PolarQuantCache(config),
        "PolarQuant, no window": lambda: PolarQuantCache(config, window=0),
    }
    for share in (2, 4):
        budget = length // share
        made[f"SubGen, {budget} tokens, window {budget // 2}"] = subgen(budget, budget // 2)
        made[f"SubGen, {budget} tokens, window {budget // 8}"] = subgen(budget, budget // 8)
        # One token of room is the least that the cache takes.
        made[f"window of {budget} tokens and sinks"] = subgen(budget, budget - 5)
    budget, window = length // 2, length // 4
    made[f"SubGen's sampler, {budget} tokens, window {window}"] = subgen(budget, window, mode="sampler")
    return made


@torch.no_grad()
def measure(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, piece: int) -> dict[str, float]:
    """Read rows of bytes in pieces; bits per byte of the two halves and of all, bytes of one row, and time."""
    losses, start = [], time.perf_counter()
    for begin in range(0, ids.shape[1] - 1, piece):
        part = ids[:, begin : begin + piece]
        targets = ids[:, begin + 1 : begin + 1 + piece]
        logits = model(part, past_key_values=cache, use_cache=True).logits[:, : targets.shape[1]]
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none"))
    seconds = time.perf_counter() - start
    bits = torch.cat([loss.view(len(ids), -1) for loss in losses], dim=1) / math.log(2)
    first, beyond = bits[:, : ids.shape[1] // 2], bits[:, ids.shape[1] // 2 :]
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    size = getattr(cache, "nbytes", None) or sum(x.numel() * x.element_size() for x in tensors)
    return {
        "bits": float(bits.mean()),
        "bits_first_half": float(first.mean()),
        "bits_second_half": float(beyond.mean()),
        "bytes": size // len(ids),
        "seconds": seconds,
    }


def main(
    blocks: Annotated[int, typer.Option(help="Held-out blocks, read side by side.")] = 8,
    length: Annotated[int, typer.Option(help="Bytes of each block.")] = 2048,
    piece: Annotated[int, typer.Option(help="Bytes of each call of the model.")] = 64,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
) -> None:
    """Measure all caches on the same held-out text, and print a table."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype="auto").eval()
    text = torch.from_numpy(read(source_files()[1]).astype("int64"))
    starts = torch.linspace(0, len(text) - length, blocks).long()
    ids = torch.stack([text[start : start + length] for start in starts])
    console, rows = Console(width=None if sys.stdout.isatty() else 120), []
    table = Table(title=f"{blocks} blocks of {length:,} held-out bytes, {piece} at a time, {model.dtype}")
    for column in ("cache", "bits per byte", "first half", "second half", "bytes of a block", "seconds"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for name, make in caches(model, length, blocks).items():
        model.set_attn_implementation("subgen" if "sampler" in name else "sdpa")
        row = {"cache": name, **measure(model, ids, make(), piece)}
        rows.append(row)
        table.add_row(
            name,
            *(f"{row[key]:.4f}" for key in ("bits", "bits_first_half", "bits_second_half")),
            f"{row['bytes']:,}",
            f"{row['seconds']:.1f}",
        )
        console.print(f"{name}: {row['bits']:.4f}")
    console.print(table)
    if output is not None:
        about = {"blocks": blocks, "length": length, "piece": piece, "threads": threads, "torch": torch.__version__}
        output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
