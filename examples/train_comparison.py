"""Train Titans, the gated delta rule and Llama from scratch on the same bytes, and compare what they learn.

Text: the sources of Python's standard library, byte by byte; whole packages are held out. Every model sees the same
blocks in the same order, has the same number of parameters within 2 %, and gets the same schedule. Results go to the
output folder: results.json, comparison.png, and a checkpoint for each run, from which `--resume` continues.

python examples/train_comparison.py --minutes 16 --output runs/comparison
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from comparison_report import plot, table
from rich.console import Console
from stdlib_text import fingerprint, read, source_files
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_memory import LatticeConfig, TitansConfig


MODELS = ("titans-depth-2", "titans-depth-1", "gated-delta-rule", "llama")
LATTICE = {"lattice": 1, "lattice-quarter": 4}
"""Models that are trained when they are asked for; their slots are the width of a head divided by this."""
TOLERANCE = 0.02
VOCABULARY = 256
Texts = tuple[np.ndarray, np.ndarray]
"""To train on, and held out."""

BEYOND = 256
"""Position from which a byte counts as having a long context."""
CURVE_POINTS = 20


@dataclass(frozen=True)
class Plan:
    """Everything that decides about the results; saved beside them and read again by `--resume`."""

    models: list[str]
    hidden: int
    layers: int
    heads: int
    chunk: int
    context: int
    batch: int
    tokens: int
    lrs: list[float]
    seed: int
    device: str
    bf16: bool
    eval_blocks: int

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.batch * self.context)))

    @property
    def bytes_read(self) -> int:
        return self.steps * self.batch * self.context

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        return cls(**json.loads((folder / "plan.json").read_text()))


def memory_rule(name: str, chunk: int) -> dict[str, int | bool]:
    """Fields of `TitansConfig` that make one of `MODELS` out of it."""
    rules = {
        "titans-depth-2": {"memory_depth": 2, "chunk_size": chunk},
        "titans-depth-1": {"memory_depth": 1, "chunk_size": chunk},
        "gated-delta-rule": {
            "memory_depth": 1,
            "chunk_size": 1,
            "memory_momentum": False,
            "decay_before_grad": True,
        },
    }
    return rules[name]


def make_config(name: str, plan: Plan, intermediate: int) -> PreTrainedConfig:
    """Configuration of one of `MODELS` or `LATTICE`."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": plan.hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads,
        "max_position_embeddings": plan.context,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    if name == "llama":
        return LlamaConfig(**shared)
    if name in LATTICE:
        slots = plan.hidden // plan.heads // LATTICE[name]
        return LatticeConfig(num_slots=slots, chunk_size=plan.chunk, **shared)
    return TitansConfig(num_persistent_tokens=16, **memory_rule(name, plan.chunk), **shared)


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model, without making it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def matched_configs(plan: Plan) -> dict[str, PreTrainedConfig]:
    """Configurations with equal numbers of parameters: those of `MODELS[0]` with an MLP of 8/3 of the width."""
    target = count_parameters(make_config(MODELS[0], plan, 8 * plan.hidden // 3))
    configs = {}
    for name in plan.models:
        low, high = (count_parameters(make_config(name, plan, width)) for width in (8, 16))
        width = 8 + round((target - low) / ((high - low) / 8))
        configs[name] = make_config(name, plan, width)
        off = count_parameters(configs[name]) / target - 1
        if abs(off) > TOLERANCE:
            raise ValueError(f"No MLP width gives {name} {target} parameters, the closest is {off:+.1%} off.")
    return configs


class Blocks(Dataset):
    """Blocks of `context` bytes, in a fixed random order."""

    def __init__(self, text: np.ndarray, context: int, seed: int | None = None, limit: int | None = None) -> None:
        blocks = text[: len(text) // context * context].reshape(-1, context)
        order = np.arange(len(blocks)) if seed is None else np.random.default_rng(seed).permutation(len(blocks))
        self.blocks = blocks[order[:limit]]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": block, "labels": block}


class Clock(TrainerCallback):
    """Adds up the time of the training steps, evaluation and checkpoints left out, and prints bits per byte."""

    def __init__(self, console: Console, tokens_per_step: int) -> None:
        self.console, self.tokens_per_step = console, tokens_per_step
        self.seconds = self.started = 0.0
        self.training_bits = math.nan

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        logged = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.seconds = logged[-1] if logged else 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds += self._now() - self.started

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        if "loss" in logs:
            self.training_bits = logs["loss"] / math.log(2)
        if "eval_loss" in logs:
            tokens, end = (step * self.tokens_per_step for step in (state.global_step, state.max_steps))
            bits = logs["eval_loss"] / math.log(2)
            losses = f"training {self.training_bits:.3f}  held out {bits:.3f}"
            self.console.print(f"{tokens:>11,}/{end:,} bytes {self.seconds:8.1f} s  {losses}")

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class TimedTrainer(Trainer):
    """A `Trainer` that writes the time of the training steps into its log."""

    def __init__(self, *args, clock: Clock, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.clock = clock
        self.add_callback(clock)
        self.remove_callback(PrinterCallback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | {"seconds": self.clock.seconds}, start_time)


def arguments(plan: Plan, lr: float, folder: Path) -> TrainingArguments:
    """The same arguments for every model."""
    every = math.ceil(plan.steps / CURVE_POINTS)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        per_device_eval_batch_size=plan.batch,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=plan.bf16,
        train_sampling_strategy="sequential",
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=1,
        use_cpu=plan.device == "cpu",
        report_to="none",
        disable_tqdm=True,
        seed=plan.seed,
    )


@torch.no_grad()
def bits_by_position(model: PreTrainedModel, data: Blocks, batch: int) -> np.ndarray:
    """Mean bits for the byte behind each position of a block, `[context - 1]`."""
    model.eval()
    total = torch.zeros(data.blocks.shape[1] - 1, dtype=torch.float64)
    for start in range(0, len(data), batch):
        block = torch.from_numpy(data.blocks[start : start + batch].astype(np.int64)).to(model.device)
        logits = model(input_ids=block).logits[:, :-1].float()
        total += functional.cross_entropy(logits.mT, block[:, 1:], reduction="none").double().sum(0).cpu()
    return (total / len(data) / math.log(2)).numpy()


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Size of the cache of one row after `tokens` tokens."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def curve(history: list[dict], plan: Plan) -> list[dict]:
    """Loss in bits per byte over tokens and seconds."""
    points = []
    for entry in history:
        for name, key in (("train", "loss"), ("held_out", "eval_loss")):
            if key in entry:
                tokens = entry["step"] * plan.batch * plan.context
                bits = entry[key] / math.log(2)
                points.append({"split": name, "tokens": tokens, "seconds": entry["seconds"], "bits": bits})
    return points


def train(name: str, config: PreTrainedConfig, lr: float, plan: Plan, text: Texts, folder: Path) -> dict:
    """Train one model, or continue; what came of it, also as `result.json` in its folder."""
    result_file = folder / "result.json"
    if result_file.is_file():
        return json.loads(result_file.read_text())
    training, held_out = (Blocks(part, plan.context, seed) for part, seed in zip(text, (plan.seed, 0)))
    watched = Blocks(text[1], plan.context, seed=0, limit=max(plan.batch, plan.eval_blocks // 8))
    set_seed(plan.seed)
    model = AutoModelForCausalLM.from_config(config)
    clock = Clock(Console(), plan.batch * plan.context)
    args = arguments(plan, lr, folder)
    trainer = TimedTrainer(model, args, clock=clock, train_dataset=training, eval_dataset=watched)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))

    held_out.blocks = held_out.blocks[: plan.eval_blocks]
    bits = bits_by_position(trainer.model, held_out, plan.batch)
    result = {
        "model": name,
        "lr": lr,
        "parameters": model.num_parameters(),
        "tokens": plan.bytes_read,
        "seconds": clock.seconds,
        "bits_per_byte": float(bits.mean()),
        "bits_per_byte_early": float(bits[: BEYOND - 1].mean()),
        "bits_per_byte_late": float(bits[BEYOND - 1 :].mean()) if plan.context > BEYOND else None,
        "bits_by_position": [float(part.mean()) for part in np.array_split(bits, min(32, len(bits)))],
        "cache_bytes": cache_bytes(trainer.model, plan.context),
        "curve": curve(trainer.state.log_history, plan),
    }
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def seconds_per_token(config: PreTrainedConfig, plan: Plan) -> float:
    """Time of a training step after a first one, per token."""
    model = AutoModelForCausalLM.from_config(config).to(plan.device)
    ids = torch.randint(VOCABULARY, (plan.batch, plan.context), device=plan.device)
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(plan.device, torch.bfloat16, enabled=plan.bf16):
            model(input_ids=ids, labels=ids).loss.backward()
        if plan.device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / ids.numel()


def affordable_tokens(configs: dict[str, PreTrainedConfig], plan: Plan, minutes: float) -> int:
    """How many tokens every model can have, if all runs together may take `minutes`."""
    start = time.perf_counter()
    cost = sum(seconds_per_token(config, plan) for config in configs.values()) * len(plan.lrs)
    # A fifth for evaluation, checkpoints and the optimizer's own steps.
    left = 0.8 * (60 * minutes - (time.perf_counter() - start))
    return max(plan.batch * plan.context, int(left / cost))


def run(plan: Plan, output: Path, console: Console) -> dict:
    """Train and compare everything in a plan; the content of results.json."""
    configs = matched_configs(plan)
    files = source_files()
    text = tuple(read(part) for part in files)
    for name, config in configs.items():
        console.print(f"{name:18} {count_parameters(config):,} parameters, MLP width {config.intermediate_size}")
    console.print(
        f"{len(text[0]):,} bytes to train on in {len(files[0])} files, {len(text[1]):,} held out in {len(files[1])}; "
        f"each run reads {plan.bytes_read:,} of them in {plan.steps} steps"
    )
    results = {
        "plan": asdict(plan),
        "text": {"training": fingerprint(text[0]), "held_out": fingerprint(text[1])},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "runs": [],
    }
    for lr in plan.lrs:
        for name, config in configs.items():
            console.rule(f"{name}, learning rate {lr:g}")
            results["runs"].append(train(name, config, lr, plan, text, output / f"{name}-{lr:g}"))
            (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def main(
    output: Annotated[Path, typer.Option(help="Folder for results and checkpoints.")] = Path("runs/comparison"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue with the plan in the output folder.")] = False,
    minutes: Annotated[float, typer.Option(help="Time for all runs together; decides the tokens of each.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each run, instead of a time.")] = 0,
    models: Annotated[str, typer.Option(help="Which to train; also lattice, lattice-quarter.")] = ",".join(MODELS),
    lrs: Annotated[str, typer.Option(help="Peak learning rates; each model is trained with each.")] = "2e-3",
    size: Annotated[str, typer.Option(help="Width x layers x heads.")] = "192x2x6",
    chunk: Annotated[int, typer.Option(help="Chunk size of Titans.")] = 16,
    context: Annotated[int, typer.Option(help="Bytes per block.")] = 512,
    batch: Annotated[int, typer.Option(help="Blocks per step.")] = 4,
    eval_blocks: Annotated[int, typer.Option(help="Held-out blocks.")] = 256,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = torch.get_num_threads(),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
) -> None:
    """Train models of equal size on the same bytes and compare their losses on held-out packages."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    console = Console()
    if resume:
        plan = Plan.load(output)
    else:
        chosen = models.split(",")
        unknown = set(chosen) - {*MODELS, *LATTICE}
        if unknown:
            known = ", ".join((*MODELS, *LATTICE))
            raise typer.BadParameter(f"Unknown models {sorted(unknown)}, known are {known}.")
        if (output / "plan.json").exists():
            raise typer.BadParameter(f"{output} holds a comparison: pass --resume, or another --output.")
        hidden, layers, heads = map(int, size.split("x"))
        rates = [float(rate) for rate in lrs.split(",")]
        plan = Plan(
            chosen, hidden, layers, heads, chunk, context, batch, tokens, rates, seed, device, bf16, eval_blocks
        )
        if not tokens:
            affordable = affordable_tokens(matched_configs(plan), plan, minutes)
            plan = Plan(**asdict(plan) | {"tokens": affordable})
        plan.save(output)
    results = run(plan, output, console)
    console.print(table(results))
    plot(results, output / "comparison.png")
    console.print(f"Wrote {output / 'results.json'} and {output / 'comparison.png'}")


if __name__ == "__main__":
    typer.run(main)
