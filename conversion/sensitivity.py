"""What converting each layer costs: a greedy search by the divergence from the teacher that every choice adds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_memory.conversion.checkpoints import read_whole, write_whole
from hf_memory.conversion.losses import logit_kl
from hf_memory.conversion.surgery import decoder_layers


if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.table import Table
    from transformers import PreTrainedModel

# Logits of one forward pass in float32: 256 MiB.
_LOGITS_PER_PASS = 2**26


@dataclass(frozen=True)
class Choice:
    """One step of the search.

    Args:
        costs: KL(teacher || student), in bits per token, with each layer converted that was still free, on top of
            those chosen before.
        layer: The cheapest of them.
    """

    costs: dict[int, float]
    layer: int


def measurements(candidates: int, count: int) -> int:
    """How often a search for `count` of so many layers measures a student."""
    return sum(candidates - step for step in range(count))


def parts_of(blocks: Tensor, teacher: PreTrainedModel, accelerator: Accelerator) -> tuple[Tensor, ...]:
    """The blocks that this process reads, in parts that go through a model together."""
    rows = max(1, _LOGITS_PER_PASS // (blocks.shape[1] * teacher.get_output_embeddings().weight.shape[0]))
    own = blocks[accelerator.process_index :: accelerator.num_processes]
    return own.split(rows) if len(own) else ()


@contextmanager
def converted(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """A student with memories in all layers has them in these only; the other layers are the teacher's own modules."""
    places = decoder_layers(student)
    own = list(places)
    for index, layer in enumerate(decoder_layers(teacher)):
        if index not in layers:
            places[index] = layer
    try:
        yield
    finally:
        for index, layer in enumerate(own):
            places[index] = layer


@torch.no_grad()
def search_layers(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    blocks: Tensor,
    candidates: Sequence[int],
    enough: Callable[[list[int]], bool],
    *,
    known: Sequence[Choice] = (),
    accelerator: Accelerator,
    on_forward: Callable[[], None] = lambda: None,
    on_choice: Callable[[list[Choice]], None] = lambda choices: None,
) -> list[Choice]:
    """Convert one layer after the other, always the one that then costs least; a tie goes to the lower layer.

    Args:
        teacher: In evaluation mode.
        student: The same with a memory in each layer, aligned.
        blocks: `[N, T]` int64 to measure on; processes share them.
        candidates: Layers to choose from.
        enough: Whether the layers chosen so far, in the order of their choice, are enough. It must come true.
        known: Choices of a search that was cut off.
        accelerator: Precision, and the other processes.
        on_forward: Called after each forward pass of the student.
        on_choice: Called after each choice with all of them.
    """
    student.eval()
    choices = list(known)
    parts = parts_of(blocks, teacher, accelerator)
    while not enough(chosen := [choice.layer for choice in choices]):
        free = [layer for layer in candidates if layer not in chosen]
        sums = torch.zeros(len(free), dtype=torch.float64)
        for part in parts:
            part = part.to(teacher.device)
            with accelerator.autocast():
                expected = teacher(input_ids=part, use_cache=False).logits
                for place, layer in enumerate(free):
                    with converted(student, teacher, [*chosen, layer]):
                        given = student(input_ids=part, use_cache=False).logits
                    sums[place] += len(part) * logit_kl(given, expected).item() / math.log(2)
                    on_forward()
        # One sum for all processes: they must choose the same layer.
        costs = (accelerator.reduce(sums.to(accelerator.device, torch.float32), "sum") / len(blocks)).tolist()
        choices.append(Choice(dict(zip(free, costs)), free[costs.index(min(costs))]))
        on_choice(choices)
    return choices


def write_choices(choices: Sequence[Choice], file: Path, tokens: int) -> None:
    """Write a search as JSON, in one step.

    Args:
        choices: As far as it has come.
        file: Where to.
        tokens: How many it measures on.
    """
    steps = [{"layer": choice.layer, "costs": choice.costs} for choice in choices]
    document = {
        "unit": "KL(teacher || student), bits per token",
        "tokens": tokens,
        "layers": sorted(choice.layer for choice in choices),
        "steps": steps,
    }
    write_whole(file, json.dumps(document, indent=2) + "\n")


def read_choices(file: Path) -> list[Choice]:
    """What `write_choices` wrote; nothing where there is no file."""
    if not file.exists():
        return []
    steps = read_whole(file, json.loads)["steps"]
    return [Choice({int(layer): cost for layer, cost in step["costs"].items()}, step["layer"]) for step in steps]


def sensitivity_table(choices: Sequence[Choice]) -> Table:
    """Each layer's cost alone, and for those chosen when, and what all up to it cost together."""
    from rich.table import Table

    table = Table(title="What converting a layer costs: KL from the teacher, bits per token")
    for name in ("layer", "alone", "chosen as", "together with those before"):
        table.add_column(name, justify="right")
    order = {choice.layer: number for number, choice in enumerate(choices)}
    for layer, cost in sorted(choices[0].costs.items()):
        number = order.get(layer)
        together = "" if number is None else f"{choices[number].costs[layer]:.4f}"
        style = None if number is None else "bold"
        table.add_row(str(layer), f"{cost:.4f}", "" if number is None else str(number + 1), together, style=style)
    return table


def plot_choices(choices: Sequence[Choice], file: Path | str, title: str) -> None:
    """Draw what each layer costs alone, and the sum of what was chosen.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    alone, together = figure.subplots(1, 2)
    chosen = {choice.layer for choice in choices}
    for label, color, wanted in (("converted", "#0072B2", True), ("keeps attention", "#BBBBBB", False)):
        bars = {layer: cost for layer, cost in choices[0].costs.items() if (layer in chosen) == wanted}
        alone.bar(list(bars), list(bars.values()), color=color, label=label)
    alone.set(title="one layer converted", xlabel="layer", ylabel="KL from the teacher, bits per token")
    alone.legend()
    costs = [choice.costs[choice.layer] for choice in choices]
    together.plot(range(1, len(choices) + 1), costs, color="#0072B2", marker="o")
    for number, (choice, cost) in enumerate(zip(choices, costs), 1):
        together.annotate(
            str(choice.layer), (number, cost), textcoords="offset points", xytext=(0, 7), ha="center", fontsize="small"
        )
    together.set(title="the cheapest so far (labels: layers)", xlabel="layers converted")
    together.margins(y=0.15)
    for axes in (alone, together):
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(file, dpi=150)
