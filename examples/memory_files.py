"""What a memory file is good for: a text is read once, and never again.

First a byte-level Titans model reads a megabyte of Python's standard library into a memory file, goes on from it in a
model loaded anew, and another model refuses it. Then one prompt is read once and forked for several questions: time to
the first token from a fork, after reading the prompt again, and from the key/value prefix of a Llama of the same
widths. The models are untrained: times and sizes do not depend on the weights.

python examples/memory_files.py --output runs/memory_files
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from stdlib_text import read as read_library
from stdlib_text import source_files
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_memory import MemoryCache, TitansConfig, TitansForCausalLM


Clock = Callable[[], float]

QUESTION = 64
"""Tokens of a question."""


def build(kind: str, hidden: int, layers: int, heads: int, depth: int, seed: int = 0) -> PreTrainedModel:
    """An untrained Titans or Llama over bytes."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "num_hidden_layers": layers,
        "num_attention_heads": heads, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=1 << 20)).eval()
    return TitansForCausalLM(TitansConfig(**sizes, memory_depth=depth, num_persistent_tokens=16)).eval()


def seconds(call: Callable[[], Any], clock: Clock) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    start = clock()
    result = call()
    return clock() - start, result


def library_ids(tokens: int) -> torch.Tensor:
    """Bytes of the standard library, repeated if need be, `[1, tokens]`."""
    text = torch.from_numpy(read_library(sum(source_files(), []), limit=tokens).copy()).long()
    return text.repeat(-(-tokens // len(text)))[None, :tokens]


def keep_a_text(
    model: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor, folder: Path, clock: Clock
) -> dict[str, Any]:
    """Read a text into a file, go on from it in a model that was loaded anew, and show it to another model."""
    reading, memory = seconds(lambda: model.read(ids), clock)
    file = folder / "library.memory"
    saving, _ = seconds(lambda: memory.save_pretrained(file), clock)
    model.save_pretrained(folder / "model")
    again = type(model).from_pretrained(folder / "model")
    loading, loaded = seconds(lambda: MemoryCache.from_pretrained(file, model=again), clock)
    more = library_ids(4096)[:, -256:]
    with torch.no_grad():
        identical = torch.equal(model(more, past_key_values=memory).logits, again(more, past_key_values=loaded).logits)
    try:
        MemoryCache.from_pretrained(file, model=other)
        refusal = ""
    except ValueError as error:
        refusal = str(error).replace(str(file), file.name)
    return {
        "tokens": ids.shape[1],
        "read_seconds": reading,
        "file_bytes": file.stat().st_size,
        "save_seconds": saving,
        "load_seconds": loading,
        "identical_continuation": identical,
        "refusal": refusal,
    }


def first_token(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> int:
    """The likeliest token behind `ids`."""
    with torch.no_grad():
        return int(model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())


def ask(
    model: PreTrainedModel, llama: PreTrainedModel, prompt: torch.Tensor, forks: int, clock: Clock
) -> list[dict[str, Any]]:
    """Time to the first token of several questions about one prompt, by four ways to have read it."""
    text = library_ids(prompt.shape[1] + forks * QUESTION)
    questions = list(text[:, prompt.shape[1] :].split(QUESTION, dim=1))
    reading, memory = seconds(lambda: model.read(prompt), clock)
    whole = [torch.cat((prompt, question), dim=1) for question in questions]

    def prefill() -> DynamicCache:
        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(prompt, past_key_values=cache, logits_to_keep=1)
        return cache

    prefilling, prefix = seconds(prefill, clock)
    prefix_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.layers)

    def re_read(ids: torch.Tensor) -> int:
        return first_token(model, ids[:, -QUESTION:], model.read(ids[:, :-QUESTION]))

    ways: dict[str, tuple[float, int, list[Callable[[], int]]]] = {
        "Titans, fork of a memory": (
            reading, memory.nbytes, [lambda q=q: first_token(model, q, memory.clone()) for q in questions]
        ),
        "Titans, reading again": (0.0, memory.nbytes, [lambda ids=ids: re_read(ids) for ids in whole[:2]]),
        "Llama, key/value prefix": (
            prefilling, prefix_bytes, [lambda q=q: first_token(llama, q, copy.deepcopy(prefix)) for q in questions]
        ),
        "Llama, reading again": (0.0, prefix_bytes, [lambda ids=ids: first_token(llama, ids) for ids in whole[:2]]),
    }  # fmt: skip
    rows, answers = [], {}
    for way, (once, size, calls) in ways.items():
        if once:
            calls[0]()  # the first short call of a kind pays for what later ones find ready
        times, answers[way] = zip(*(seconds(call, clock) for call in calls))
        rows.append({
            "way": way, "prompt_tokens": prompt.shape[1], "once_seconds": once,
            "first_token_seconds": statistics.median(times), "slowest_seconds": max(times), "questions": len(times),
            "bytes_per_fork": size,
        })  # fmt: skip
    for fork, again in (list(ways)[:2], list(ways)[2:]):
        if any(a != b for a, b in zip(answers[fork], answers[again])):
            raise SystemExit(f"{fork} and {again} disagree about the first token.")
    return rows


def report(kept: dict[str, Any], rows: list[dict[str, Any]], console: Console) -> None:
    """Print what was measured."""
    speed = kept["tokens"] / kept["read_seconds"]
    console.print(f"read            {kept['tokens']:,} tokens in {kept['read_seconds']:.1f} s, {speed:,.0f} tokens/s")
    console.print(f"file            {kept['file_bytes']:,} bytes, written in {1000 * kept['save_seconds']:.0f} ms")
    console.print(f"loaded          in {1000 * kept['load_seconds']:.0f} ms, the weights' fingerprint included")
    console.print(f"continuation    {'identical to the bit' if kept['identical_continuation'] else 'DIFFERENT'}")
    console.print(f"another model   {kept['refusal'] or 'ACCEPTED'}\n")
    table = Table("", title=f"Questions of {QUESTION} tokens behind a prompt of {rows[0]['prompt_tokens']:,}")
    for column in ("prompt, once", "first token, median", "slowest", "questions", "bytes per fork"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['once_seconds']:.1f} s" if row["once_seconds"] else "",
            *(f"{1000 * row[name]:,.0f} ms" for name in ("first_token_seconds", "slowest_seconds")),
            str(row["questions"]),
            f"{row['bytes_per_fork']:,}",
        )
    console.print(table)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the memory file, the model and the rows.")],
    tokens: Annotated[int, typer.Option(help="Length of the text that becomes a file.")] = 1_048_576,
    prompt: Annotated[int, typer.Option(help="Length of the prompt that is forked.")] = 32_768,
    forks: Annotated[int, typer.Option(help="Questions about it.")] = 8,
    hidden: Annotated[int, typer.Option(help="Width of the models.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers of the models.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads per layer.")] = 4,
    depth: Annotated[int, typer.Option(help="Layers of the memory.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = torch.get_num_threads(),
    processor_time: Annotated[
        bool, typer.Option("--processor-time", help="For a busy machine and one thread: leave out the time of others.")
    ] = False,
) -> None:
    """Read once, keep a file, fork it: sizes and times beside reading again and a key/value prefix."""
    torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    sizes = (hidden, layers, heads, depth)
    model, llama = build("titans", *sizes), build("llama", *sizes)
    console.print(f"Titans {model.num_parameters():,} parameters, Llama {llama.num_parameters():,}, {threads} threads")
    clock = time.process_time if processor_time else time.perf_counter
    kept = keep_a_text(model, build("titans", *sizes, seed=1), library_ids(tokens), output, clock)
    rows = ask(model, llama, library_ids(prompt), forks, clock)
    report(kept, rows, console)
    document = {
        "sizes": dict(zip(("hidden", "layers", "heads", "depth"), sizes)),
        "threads": threads, "clock": clock.__name__, "torch": torch.__version__, "file": kept, "reuse": rows,
    }  # fmt: skip
    (output / "memory_files.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if not kept["identical_continuation"] or not kept["refusal"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
