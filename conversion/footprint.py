"""How much memory a conversion needs: by count before it starts, and measured when it is over."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_memory._cli.state_size import readable_size
from hf_memory.conversion.controls import control_options
from hf_memory.conversion.stage_options import AlignStage, TrainingStage
from hf_memory.conversion.surgery import decoder_layers, memory_parameters, new_parameters


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_memory.conversion.recipe import Recipe

MASTER = GRADIENT = 4
ADAM = 8
MEMORY_KEEPS, LOGITS_KEPT = 45, 5
# What the libraries themselves take when they first compute.
LIBRARIES = 40 * 2**20


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for, of the moment that needs most.

    Args:
        when: The stage, or what else is done then.
        parts: By name.
    """

    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable_size(size)}" for name, size in self.parts.items() if size)
        return f"{readable_size(self.total)} in {self.when} ({parts})"


def weights(model: PreTrainedModel, bits: int | None = None) -> int:
    """Bytes of a model's parameters and buffers, with its linear layers in so many bits."""
    size = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    if bits is not None:
        for module in model.modules():
            # bitsandbytes leaves the output embedding as it is.
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                size -= module.weight.numel() * module.weight.element_size() - module.weight.numel() * bits // 8
    return size


def stage_footprint(
    label: str,
    options: TrainingStage,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokens: int,
    bits: int | None = None,
    streamed: bool = False,
) -> Footprint:
    """What a stage needs, counted on models without values.

    Args:
        label: Of the stage.
        options: Its part of the recipe.
        teacher: On the meta device, in the dtype it is computed with.
        student: The same.
        tokens: That go through at once.
        bits: That the teacher's linear layers are held in.
        streamed: Whether the teacher's layers lie on disk, all but the one at work.
    """
    reached = {"all": lambda model: dict(model.named_parameters()), "new": new_parameters, "memory": memory_parameters}
    trained = list(reached[options.trainable](student).values())
    count = sum(value.numel() for value in trained)
    if options.lora_rank is not None:
        raised, count = 0, 0  # adapters are small beside all else
    else:
        raised = sum(value.numel() * (MASTER - value.element_size()) for value in trained)
    floats = activations(student, options) * tokens
    return Footprint(
        f"stage {label}",
        {
            "teacher": weights(teacher, bits) - (waiting(teacher) if streamed else 0),
            "student": weights(student) + raised,
            "gradients": GRADIENT * count,
            "moments of Adam": ADAM * count,
            "activations": floats * max(2, student.dtype.itemsize),
        },
    )


def control_footprint(teacher: PreTrainedModel, student: PreTrainedModel, tokens: int) -> Footprint:
    """What the teacher takes that is trained on as a control, alone and whole; arguments as of `stage_footprint`."""
    count = sum(value.numel() for value in teacher.parameters())
    config = student.config
    floats = config.num_hidden_layers * passed_through(config, True) + LOGITS_KEPT * config.vocab_size
    return Footprint(
        "the control",
        {
            "teacher": weights(teacher) + sum(p.numel() * (MASTER - p.element_size()) for p in teacher.parameters()),
            "gradients": GRADIENT * count,
            "moments of Adam": ADAM * count,
            "activations": floats * tokens * max(2, teacher.dtype.itemsize),
        },
    )


def waiting(teacher: PreTrainedModel) -> int:
    """Bytes of all decoder layers but the largest."""
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(teacher)]
    return sum(sizes) - max(sizes)


def activations(student: PreTrainedModel, options: TrainingStage) -> int:
    """Numbers kept per token for the backward pass.

    The factors are what the demo's teacher takes with a deep Titans memory, on a CPU in float32: in the width of a
    layer, 59 for one with a memory and a feed-forward part of twice the width, 27 and 9 for another one that is
    trained or only passed through, and five times the vocabulary for the loss.
    """
    config = student.config
    heads, head_dim = config.attention_heads
    width, inner = config.hidden_size, feed_forward(config)
    with_memory = MEMORY_KEEPS * heads * head_dim + 6 * width + 4 * inner
    layers = config.memory_layers
    total = len(layers) * with_memory
    if isinstance(options, AlignStage) or not layers:
        return total
    trains_all = options.trainable == "all"
    others = (
        config.num_hidden_layers - len(layers) if trains_all else config.num_hidden_layers - layers[0] - len(layers)
    )
    return total + max(0, others) * passed_through(config, trains_all) + LOGITS_KEPT * config.vocab_size


def passed_through(config: PreTrainedConfig, trained: bool) -> int:
    """Numbers kept per token of a layer without a memory, `trained` or not."""
    width, inner = config.hidden_size, feed_forward(config)
    return 15 * width + 6 * inner if trained else 5 * width + 2 * inner


def feed_forward(config: PreTrainedConfig) -> int:
    """Channels between the two halves of a layer's feed-forward part that a token passes."""
    experts = getattr(config, "num_experts_per_tok", None)
    inner = getattr(config, "moe_intermediate_size", None) if experts else None
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        inner = inner or getattr(config, name, None)
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner or 4 * config.hidden_size
    return inner * (experts or 1)


def expected_peak(
    recipe: Recipe,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    device: torch.device,
    processes: int = 1,
) -> Footprint:
    """Of the moment of a conversion that needs most memory on its device.

    Args:
        recipe: What to do.
        teacher: On the meta device, in the dtype it is computed with.
        student: The same.
        device: Where training happens; on a CPU the same memory holds what is built and written.
        processes: That share each batch.
    """
    waits = waiting(teacher) if recipe.stream else 0
    kept = {"teacher": weights(teacher, recipe.teacher_bits) - waits, "student": weights(student)}
    found = [Footprint("evaluation", kept)]
    if device.type == "cpu" or not recipe.training_stages:
        found.append(Footprint("building", kept | {"teacher": weights(teacher) - waits}))
    for label, options in recipe.training_stages.items():
        rows = math.ceil(recipe.batch_size_of(options) / options.accumulate / processes)
        tokens = rows * recipe.context_of(options)
        where = (teacher, student, tokens, recipe.teacher_bits, recipe.stream)
        found.append(stage_footprint(label, options, *where))
    if "continued" in recipe.controls and recipe.training_stages:
        parts = control_options(recipe).accumulate * processes
        stages = recipe.training_stages.values()
        most_tokens = max(
            math.ceil(recipe.batch_size_of(stage) / parts) * recipe.context_of(stage) for stage in stages
        )
        found.append(control_footprint(teacher, student, most_tokens))
    most = max(found, key=lambda footprint: footprint.total)
    return Footprint(most.when, most.parts | {"libraries": LIBRARIES if device.type == "cpu" else 0})


class PeakMeter:
    """The most memory that a process held since this was made, beyond what it held then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device)
            return
        try:
            # Linux forgets the highest mark so far.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        self.base = _status("VmRSS") or _highest()

    def measure(self) -> int | None:
        """Bytes; `None` where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        highest = _highest()
        return None if highest is None else max(0, highest - self.base)


def _highest() -> int | None:
    if (highest := _status("VmHWM")) is not None:
        return highest
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), None)
