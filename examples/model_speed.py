"""Speed of whole models: training, prefill and decode of Titans, the gated delta rule and Llama, one row for each.

The models are made, not loaded: about 340 million parameters with the default sizes. Training is a step of AdamW on
float32 weights, under autocast where the dtype is lower; prefill and decode hold their weights in the dtype. What
does not fit is tried again with half the batch. Rows are those of `hf_memory.kernels.benchmarks`: milliseconds of a
call, of a token of each row in decode, and MiB of everything together.

python examples/model_speed.py --output runs/models.jsonl
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from train_comparison import MODELS, memory_rule
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_memory import TitansConfig
from hf_memory.kernels.benchmarks.inputs import Shape
from hf_memory.kernels.benchmarks.rows import Row, append, device_name, results_file, timing_fields, versions
from hf_memory.kernels.benchmarks.run import DEFAULT_DTYPE, DTYPES
from hf_memory.kernels.benchmarks.timing import Timing, measure


MODES = ("train", "prefill", "decode")
VOCABULARY = 32_000
MIN_RUNS, MAX_RUNS = 3, 30


@dataclass(frozen=True)
class Size:
    """Sizes that all models share."""

    hidden: int
    layers: int
    heads: int
    chunk: int
    vocabulary: int = VOCABULARY

    @classmethod
    def parse(cls, text: str, chunk: int, vocabulary: int) -> "Size":
        """Read `HIDDENxLAYERSxHEADS`.

        Raises:
            ValueError: if `text` is not three positive numbers joined by `x`.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"A size is HIDDENxLAYERSxHEADS, for example 1024x24x16, got {text!r}.")
        return cls(*map(int, parts), chunk, vocabulary)


def make_config(name: str, size: Size, context: int) -> PreTrainedConfig:
    """Configuration of one of `MODELS`, with an MLP of 8/3 of the width."""
    shared = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 8 * size.hidden // 3,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": 2 * context,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name == "llama":
        return LlamaConfig(**shared)
    return TitansConfig(**memory_rule(name, size.chunk), **shared)


def held_bytes(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of weights, buffers, and what an optimizer keeps."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class Setting:
    """What one model is measured with."""

    context: int
    dtype: torch.dtype
    device: torch.device
    seconds: float

    def ids(self, config: PreTrainedConfig, batch: int) -> Tensor:
        """Random tokens `[batch, context]`."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = (batch, self.context)
        return torch.randint(config.vocab_size, size, generator=generator, device=self.device)

    def model(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """A model with random weights, made where it runs."""
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def measure(self, call: Callable[[], object], per: int = 1, inference: bool = True) -> Timing:
        """Time a call."""
        return measure(call, self.device, self.seconds, MIN_RUNS, MAX_RUNS, per, inference)


def time_training(config: PreTrainedConfig, batch: int, setting: Setting) -> Timing:
    """A step: forward, loss, backward, optimizer."""
    model = setting.model(config, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=setting.device.type == "cuda")
    ids = setting.ids(config, batch)

    def step() -> None:
        with torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # The optimizer makes its states in the first step.
    timing = setting.measure(step, inference=False)
    return timing._replace(peak_mib=timing.peak_mib + held_bytes(model, optimizer) / 2**20)


def time_prefill(config: PreTrainedConfig, batch: int, setting: Setting) -> Timing:
    """A prompt as long as the context, with a cache."""
    model, ids = setting.model(config, setting.dtype).eval(), setting.ids(config, batch)
    timing = setting.measure(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    return timing._replace(peak_mib=timing.peak_mib + held_bytes(model) / 2**20)


def time_decode(config: PreTrainedConfig, batch: int, setting: Setting) -> Timing:
    """A token behind such a prompt, over as many as a chunk has: memories are folded once in a while."""
    model, ids = setting.model(config, setting.dtype).eval(), setting.ids(config, batch)
    tokens = max(getattr(config, "chunk_size", 1), 16)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def chunk() -> None:
        for token in ids[:, :tokens].split(1, dim=1):
            model(input_ids=token, past_key_values=cache, use_cache=True)

    timing = setting.measure(chunk, per=tokens)
    return timing._replace(peak_mib=timing.peak_mib + held_bytes(model) / 2**20)


TIMERS = dict(zip(MODES, (time_training, time_prefill, time_decode)))


def measure_model(name: str, mode: str, size: Size, batch: int, setting: Setting) -> Row:
    """The row of one model and mode; a batch that does not fit is halved.

    Raises:
        RuntimeError: if one row does not fit either, or something else went wrong.
    """
    config = make_config(name, size, setting.context)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    while True:
        try:
            timing = TIMERS[mode](config, batch, setting)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Outside of the handler, whose traceback holds what did not fit.
        batch //= 2
        torch.cuda.empty_cache()
    return Row(
        op="model",
        provider="transformers" if name == "llama" else "hf_memory",
        form=name,
        shape=str(Shape(batch, setting.context, size.heads, size.hidden // size.heads)),
        dtype=str(setting.dtype).removeprefix("torch."),
        mode=mode,
        grid=getattr(config, "chunk_size", None),
        options=f"{parameters:,} parameters, {size.layers} layers, vocabulary {size.vocabulary:,}",
        **timing_fields(timing),
        error=None,
        allowed=None,
        device=device_name(setting.device),
        versions=versions("transformers"),
    )


def tokens_per_second(row: Row) -> float:
    """Of all rows of the batch together."""
    shape = Shape.parse(row.shape)
    return 1e3 * shape.batch * (1 if row.mode == "decode" else shape.time) / row.median_ms


def main(
    models: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(MODELS),
    modes: Annotated[str, typer.Option(help="What to measure.")] = ",".join(MODES),
    size: Annotated[str, typer.Option(help="HIDDENxLAYERSxHEADS.")] = "1024x24x16",
    chunk: Annotated[int, typer.Option(help="Chunk size of Titans.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(help="Rows in training and prefill.")] = 4,
    decode_batch: Annotated[int, typer.Option(help="Rows in decode.")] = 16,
    dtype: Annotated[str | None, typer.Option(help=f"Of {', '.join(DTYPES)}.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    seconds: Annotated[float, typer.Option(help="Time for the runs of one row.")] = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes.")] = False,
    output: Annotated[Path | None, typer.Option(help="File that the rows are appended to.")] = None,
) -> None:
    """Time whole models and append a row for each model and mode."""
    on = torch.device(device)
    if quick:
        size, chunk, context, batch, decode_batch, seconds = "32x1x2", 16, 64, 2, 2, 0.0
    chosen, kinds, dtype = models.split(","), modes.split(","), dtype or DEFAULT_DTYPE[on.type]
    for names, accepted in ((chosen, MODELS), (kinds, MODES), ([dtype], DTYPES)):
        if unknown := sorted(set(names) - set(accepted)):
            raise typer.BadParameter(f"Unknown {', '.join(unknown)}, known are {', '.join(accepted)}.")
    try:
        sizes = Size.parse(size, chunk, 256 if quick else VOCABULARY)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    setting = Setting(context, DTYPES[dtype], on, seconds)
    file, failed = output or results_file(on), 0
    typer.echo(f"{device_name(on)}\n{'model':18}{'mode':9}{'shape':16}{'ms':>10}{'tokens/s':>12}{'MiB':>10}")
    for mode in kinds:
        for name in chosen:
            try:
                row = measure_model(name, mode, sizes, decode_batch if mode == "decode" else batch, setting)
            except RuntimeError as error:
                failed += 1
                typer.echo(f"{name:18}{mode:9}failed: {error}")
            else:
                append(row, file)
                speed = f"{row.median_ms:10.4g}{tokens_per_second(row):12,.0f}{row.peak_mib:10,.0f}"
                typer.echo(f"{name:18}{mode:9}{row.shape:16}{speed}")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
