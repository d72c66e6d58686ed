"""What fixed states remember: associative recall against state size, and a passkey in inputs of growing length.

Models of equal size (within 2 % of parameters) learn two synthetic tasks from scratch, each with several seeds and the
same learning rates. A run takes at most `--seconds`; each that ends is a row of `--output`, and none is made twice, so
that the script can be stopped and started at will.

- `recall`: pairs of a key and a value, then every key once more, in another order; the model has to name the values
  (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927).
- `passkey`: four digits behind a marker, somewhere in noise; behind the marker at the end they are asked for. Trained
  at 512 tokens, asked at up to 16,384.

python examples/recall.py --output runs/recall.jsonl
python examples/recall.py --preset gpu --device cuda --output runs/recall-gpu.jsonl
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from recall_report import plot, table
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

import hf_memory


TITANS = {"num_persistent_tokens": 0}
GATED_DELTA_RULE = {"memory_depth": 1, "chunk_size": 1, "memory_momentum": False, "decay_before_grad": True}
MODELS: dict[str, tuple[str, dict]] = {
    "softmax attention": ("llama", {}),
    "gated delta rule": ("titans", TITANS | GATED_DELTA_RULE),
    "Titans, matrix": ("titans", TITANS | {"memory_depth": 1, "chunk_size": 1}),
    "Titans, two layers": ("titans", TITANS | {"memory_depth": 2, "memory_expansion": 2, "chunk_size": 8}),
    "Lattice, m = d": ("lattice", {}),
    "Lattice, m = d/4": ("lattice", {"num_slots": 4}),
    "Trellis": ("trellis", {"num_slots": 16}),
    "sliding window": ("mistral", {"sliding_window": 128}),
}
TASKS = {
    "recall": [name for name in MODELS if name != "sliding window"],
    "passkey": ["gated delta rule", "Titans, matrix", "Titans, two layers", "sliding window"],
}
REFERENCE = "Titans, two layers"
TOLERANCE = 0.02


@dataclass(frozen=True)
class Sizes:
    """Sizes of models and tasks.

    Attributes:
        hidden, layers, heads: of the models.
        pairs: of a key and a value in a row of `recall`.
        symbols: keys, and values, to choose from.
        context: tokens of a row of `passkey` in training.
        lengths: tokens at which it is asked.
        batch: tokens per step.
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    pairs: int = 16
    symbols: int = 64
    context: int = 512
    lengths: tuple[int, ...] = (512, 2048, 8192, 16384)
    batch: int = 2048


PRESETS = {
    "cpu": Sizes(),
    "gpu": Sizes(hidden=128, heads=4, pairs=64, symbols=512, batch=32768),
}
DIGITS, NOISE, MARKER = 10, 32, 42
"""Passkey tokens: digits 0 to 9, noise 10 to 41, and the marker."""
KEY_LENGTH = 4
IGNORED = -100


def recall_batch(sizes: Sizes, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[rows, 4 pairs]`, and labels that ask for the values of the second half only."""
    shape = rows, sizes.pairs
    keys = torch.rand(rows, sizes.symbols, generator=generator).argsort(1)[:, : sizes.pairs]
    values = sizes.symbols + torch.randint(sizes.symbols, shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    ids = torch.cat([torch.stack([keys, values], 2).flatten(1), asked], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 2 * sizes.pairs + 1 :: 2] = asked[:, 1::2]
    return ids, labels


def passkey_batch(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[rows, length]`, and labels that ask for the digits at the end only."""
    ids = DIGITS + torch.randint(NOISE, (rows, length), generator=generator)
    digits = torch.randint(DIGITS, (rows, KEY_LENGTH), generator=generator)
    shown = torch.cat([torch.full((rows, 1), MARKER), digits], 1)
    ids[:, -KEY_LENGTH - 1 :] = shown
    start = torch.randint(length - 2 * (KEY_LENGTH + 1), (rows, 1), generator=generator)
    ids.scatter_(1, start + torch.arange(KEY_LENGTH + 1), shown)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -KEY_LENGTH:] = digits
    return ids, labels


def batch_of(task: str, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch to train on."""
    if task == "recall":
        return recall_batch(sizes, sizes.batch // (4 * sizes.pairs), generator)
    return passkey_batch(sizes.context, sizes.batch // sizes.context, generator)


def make_config(name: str, task: str, sizes: Sizes, intermediate: int) -> PreTrainedConfig:
    """Configuration of one of `MODELS` for a task."""
    model_type, fields = MODELS[name]
    return AutoConfig.for_model(
        model_type,
        vocab_size=2 * sizes.symbols if task == "recall" else MARKER + 1,
        hidden_size=sizes.hidden,
        intermediate_size=intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        head_dim=sizes.hidden // sizes.heads,
        max_position_embeddings=max(sizes.lengths),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **({"num_key_value_heads": sizes.heads} if model_type in ("llama", "mistral") else {}),
        **fields,
    )


def matched_config(name: str, task: str, sizes: Sizes) -> PreTrainedConfig:
    """The configuration whose MLP makes the number of parameters that of `REFERENCE`, within 2 %."""

    def count(model: str, width: int) -> int:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(make_config(model, task, sizes, width)).num_parameters()

    target = count(REFERENCE, 2 * sizes.hidden)
    low, high = count(name, 8), count(name, 16)
    width = 8 + round((target - low) / ((high - low) / 8))
    off = count(name, width) / target - 1
    if abs(off) > TOLERANCE:
        raise ValueError(f"No MLP width gives {name} {target} parameters, the closest is {off:+.1%} off.")
    return make_config(name, task, sizes, width)


@torch.no_grad()
def accuracy(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> float:
    """Share of the asked tokens that are the likeliest."""
    guesses = torch.cat([model(input_ids=part).logits[:, :-1].argmax(-1) for part in ids.split(16)])
    asked = labels[:, 1:] != IGNORED
    return float((guesses == labels[:, 1:])[asked].float().mean())


def evaluate(model: PreTrainedModel, task: str, sizes: Sizes) -> dict[str, float]:
    """Accuracy at every length that a task is asked at, on inputs that no run was trained on."""
    generator = torch.Generator().manual_seed(2**31)
    device = model.device
    if task == "recall":
        ids, labels = recall_batch(sizes, 128, generator)
        return {str(ids.shape[1]): accuracy(model, ids.to(device), labels.to(device))}
    found = {}
    for length in sizes.lengths:
        ids, labels = passkey_batch(length, 32 if length <= 2048 else 8, generator)
        found[str(length)] = accuracy(model, ids.to(device), labels.to(device))
    return found


@torch.no_grad()
def state_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Size of the cache of one row behind `tokens` tokens."""
    cache = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=True)
    cache = cache.past_key_values
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def train(run: dict, sizes: Sizes, steps: int, seconds: float, device: str) -> dict:
    """Train one model; the row that it leaves."""
    task, lr = run["task"], run["lr"]
    set_seed(run["seed"])
    model = AutoModelForCausalLM.from_config(matched_config(run["model"], task, sizes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(run["seed"])
    start, done, losses = time.perf_counter(), 0, []
    while done < steps and time.perf_counter() - start < seconds:
        ids, labels = (x.to(device) for x in batch_of(task, sizes, generator))
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        done += 1
    taken = time.perf_counter() - start
    model.eval()
    tokens = 4 * sizes.pairs if task == "recall" else sizes.context
    return run | {
        "accuracy": evaluate(model, task, sizes),
        "loss": sum(losses[-10:]) / len(losses[-10:]),
        "steps": done,
        "of_steps": steps,
        "seconds": round(taken, 1),
        "parameters": model.num_parameters(),
        "state_bytes": state_bytes(model, tokens),
        "sizes": asdict(sizes),
        "torch": torch.__version__,
        "hf_memory": hf_memory.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }


def runs(tasks: list[str], models: list[str], lrs: list[float], seeds: int) -> Iterator[dict]:
    """Everything that is to be trained, one seed of everything before the next."""
    for seed in range(seeds):
        for task in tasks:
            for lr in lrs:
                for name in TASKS[task]:
                    if not models or name in models:
                        yield {"task": task, "model": name, "lr": lr, "seed": seed}


def read_rows(file: Path) -> list[dict]:
    """Rows of finished runs."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def main(
    output: Annotated[Path, typer.Option(help="File of rows.")] = Path("runs/recall.jsonl"),
    preset: Annotated[str, typer.Option(help=f"Sizes: {', '.join(PRESETS)}.")] = "cpu",
    tasks: Annotated[str, typer.Option(help="Which tasks.")] = ",".join(TASKS),
    models: Annotated[list[str] | None, typer.Option(help="Which models; all by default.")] = None,
    lrs: Annotated[str, typer.Option(help="Peak learning rates; every model gets each.")] = "3e-3,1e-2",
    seeds: Annotated[int, typer.Option(help="Seeds per model and learning rate.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 600,
    seconds: Annotated[float, typer.Option(help="A run stops here, wherever it is.")] = 90,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = torch.get_num_threads(),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train what is missing in the output file, then print and plot all of it."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"Unknown preset {preset!r}, use one of {', '.join(PRESETS)}.")
    for name in (*tasks.split(","), *(models or [])):
        if name not in TASKS and name not in MODELS:
            raise typer.BadParameter(f"Unknown name {name!r}; tasks: {', '.join(TASKS)}; models: {', '.join(MODELS)}.")
    torch.set_num_threads(threads)
    sizes, console = PRESETS[preset], Console()
    known = ("task", "model", "lr", "seed")
    finished = {tuple(row[name] for name in known) for row in read_rows(output)}
    wanted = list(runs(tasks.split(","), models or [], [float(lr) for lr in lrs.split(",")], seeds))
    missing = [run for run in wanted if tuple(run[name] for name in known) not in finished]
    output.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as progress:
        for run in progress.track(missing, description=f"{len(finished)} rows are there"):
            row = train(run, sizes, steps, seconds, device)
            with output.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            shown = "  ".join(f"{length}: {share:.0%}" for length, share in row["accuracy"].items())
            console.print(f"{run['task']:8} {run['model']:18} {run['lr']:g} seed {run['seed']}  {shown}")
    rows = read_rows(output)
    for task in tasks.split(","):
        console.print(table([row for row in rows if row["task"] == task]))
    picture = output.with_suffix(".png")
    plot(rows, picture)
    console.print(f"{output} has the rows, {picture} the picture.")


if __name__ == "__main__":
    typer.run(main)
