"""From a teacher to a hybrid whose memories start from the projections of its attention."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel, set_seed

from hf_memory.conversion.loading import fetched, values
from hf_memory.conversion.projections import Projections, read_projections
from hf_memory.conversion.teachers import attention_of_layers, refuse_unsupported
from hf_memory.layers import InitialMemory
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig, teacher_windows
from hf_memory.models.hybrid.modeling_hybrid import (
    MemoryHybridForCausalLM,
    MemorySlotMixin,
    decoder_layers,
    find_attention,
)


__all__ = ["build_student", "decoder_layers", "find_attention", "memory_parameters", "memory_slots", "new_parameters"]

DEFAULT_WINDOW = 512
# x where the nonlinearity of an output gate is 1: gates start open.
OPEN_GATES = {"silu": 1.278464542761, "gelu": 1.144450718353}
# Attention forgets nothing: a matrix memory in its place starts by forgetting 0.1 % per token, and writes with half of
# its largest step. A deep memory keeps its own start, which is what its conditioning allows.
SLOW_FORGETTING, HALF_STEP = -7.0, 0.0


def build_student(
    teacher: PreTrainedModel,
    *,
    layers: Sequence[int],
    memory: str = "titans",
    memory_options: dict[str, Any] | None = None,
    mode: str = "replace",
    window: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A hybrid with the weights of a teacher, which it leaves alone.

    Everything that is not a memory is a copy, bit for bit. Memories take over the projections of the attention in
    whose place, or beside which, they stand: heads that share keys and values get copies of them, and the scales of
    norms on queries and keys become part of the projections. What attention has no counterpart for starts neutral:
    convolutions as the identity, output gates open, matrix memories that forget little, and with `mode="retrofit"` the
    whole memory adds nothing.

    Args:
        teacher: causal language model of transformers; a part of it may lie on disk.
        layers: indices of the layers that get a memory; none gives the teacher's function under another name.
        memory: model type of the memory's architecture.
        memory_options: fields of that architecture's configuration.
        mode: `"replace"` attention, or `"retrofit"` a memory beside attention over a window.
        window: tokens that attention beside a memory sees; by default 512, or the teacher's window if narrower.
        seed: of what is drawn at random.

    Returns:
        A `MemoryHybridForCausalLM` in the dtype and on the device of the teacher.

    Raises:
        ValueError: for layers that do not exist, options that do not fit, or a teacher built in an unknown way.
    """
    if mode == "retrofit" and window is None:
        known = [width for width in teacher_windows(teacher.config) if width is not None]
        window = min([DEFAULT_WINDOW, *known])
    refuse_unsupported(teacher)
    try:
        config = MemoryHybridConfig.from_teacher(
            teacher.config,
            memory_layers=list(layers),
            memory={"model_type": memory, **(memory_options or {})},
            memory_mode=mode,
            memory_window=window,
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    attentions = attention_of_layers(teacher)
    if bare := [index for index in config.memory_layers if index not in attentions]:
        raise ValueError(
            f"Layer {bare[0]} has no self-attention that a memory could take over: choose among "
            f"{', '.join(map(str, attentions))}."
        )
    projections = {}
    for index in config.memory_layers:
        with fetched(attentions[index]):
            projections[index] = read_projections(attentions[index], config)

    with torch.random.fork_rng():
        set_seed(seed)
        attention = {"attn_implementation": teacher.config._attn_implementation}
        student = MemoryHybridForCausalLM._from_config(config, dtype=teacher.dtype, **attention)
    student.to(teacher.device).train(teacher.training)
    _copy_weights(teacher, student)
    for index, slot in memory_slots(student).items():
        inherit(slot.memory, projections[index])
    if teacher.can_generate():
        student.generation_config = type(teacher.generation_config).from_dict(teacher.generation_config.to_dict())
    return student


def memory_slots(student: PreTrainedModel) -> dict[int, MemorySlotMixin]:
    """Modules with everything that the teacher does not have, by layer."""
    slots = (module for module in student.modules() if isinstance(module, MemorySlotMixin))
    return {slot.memory.layer_idx: slot for slot in slots}


def memory_parameters(student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters that the teacher does not have, by name: those of the memories and of their gates."""
    own = {id(parameter) for slot in memory_slots(student).values() for parameter in slot.parameters()}
    return {name: parameter for name, parameter in student.named_parameters() if id(parameter) in own}


def new_parameters(student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Those of `memory_parameters` that no projection of attention was written into, by name."""
    heads, head_dim = student.config.attention_heads
    rows, width = heads * head_dim, student.config.hidden_size
    inherited: set[int] = set()
    for slot in memory_slots(student).values():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(slot.memory, name)
            if tuple(projection.weight.shape) == ((width, rows) if name == "o_proj" else (rows, width)):
                inherited |= set(map(id, projection.parameters()))
    return {name: value for name, value in memory_parameters(student).items() if id(value) not in inherited}


@torch.no_grad()
def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    ours = student.state_dict()
    wanted = set(ours) - set(memory_parameters(student))
    for name, value in values(teacher):
        if name in wanted and value.shape == ours[name].shape:
            ours[name].copy_(value)
            wanted.remove(name)
    if wanted:
        raise ValueError(
            f"{type(teacher).__name__} has no {min(wanted)} to copy; hybrids of this model are not supported."
        )


@torch.no_grad()
def inherit(memory: nn.Module, projections: Projections) -> None:
    """Write the projections of attention into a memory, and make the rest of it neutral, in place.

    A projection of another width than that of attention, as slots of another number than the width of a head have it,
    keeps what it was initialised with.
    """
    for name, (weight, bias) in projections.items():
        projection = getattr(memory, name)
        if projection.weight.shape != weight.shape:
            continue
        projection.weight.copy_(weight)
        if projection.bias is not None:
            projection.bias.zero_() if bias is None else projection.bias.copy_(bias)
    if getattr(memory, "conv", None) is not None:
        memory.conv.weight.zero_()
        memory.conv.weight[:, -1] = 1
    gates, start = getattr(memory, "gates", None), getattr(memory, "initial_memory", None)
    is_matrix = start is None or (isinstance(start, InitialMemory) and len(start.weights) == 1)
    if gates is not None and is_matrix:
        if gates.decay_proj is not None:
            gates.decay_proj.bias.fill_(SLOW_FORGETTING)
        gates.step_proj.bias.fill_(HALF_STEP)
    if getattr(memory, "g_proj", None) is not None and memory.g_proj.bias is not None:
        memory.g_proj.weight.zero_()
        memory.g_proj.bias.fill_(OPEN_GATES[getattr(memory, "gate_act", "silu")])
