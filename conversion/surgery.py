"""From a teacher to a hybrid whose memories start from the projections of its attention."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from hf_memory.layers import InitialMemory
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig, teacher_windows
from hf_memory.models.hybrid.modeling_hybrid import (
    MemoryHybridForCausalLM,
    MemorySlotMixin,
    decoder_layers,
    find_attention,
)


__all__ = ["build_student", "decoder_layers", "memory_parameters", "memory_slots", "new_parameters"]

DEFAULT_WINDOW = 512
# x where the nonlinearity of an output gate is 1: gates start open.
OPEN_GATES = {"silu": 1.278464542761, "gelu": 1.144450718353}
# Attention forgets nothing: a matrix memory in its place starts by forgetting 0.1 % per token, and writes with half of
# its largest step. A deep memory keeps its own start, which is what its conditioning allows.
SLOW_FORGETTING, HALF_STEP = -7.0, 0.0
Projections = dict[str, tuple[Tensor, Tensor | None]]


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
        teacher: causal language model of transformers.
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
    attentions = [find_attention(layer)[1] for layer in decoder_layers(teacher)]
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
    projections = {index: read_projections(attentions[index], config) for index in config.memory_layers}

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
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name in set(ours) - set(memory_parameters(student)):
        if name not in theirs or theirs[name].shape != ours[name].shape:
            raise ValueError(
                f"{type(teacher).__name__} has no {name} to copy; hybrids of this model are not supported."
            )
        ours[name].copy_(theirs[name])


def read_projections(attention: nn.Module, config: MemoryHybridConfig) -> Projections:
    """Weights and biases of an attention module, one set of rows per query head.

    Returns:
        `"q_proj"`, `"k_proj"`, `"v_proj"` (`[H d, D]`, with the scale of their norms), `"o_proj"` (`[D, H d]`).

    Raises:
        ValueError: for a module whose projections have other names or shapes than any that is known.
    """
    heads, head_dim = config.attention_heads
    parts = _separate(attention, config, heads, head_dim)
    for name, norm_name in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
        norm = getattr(attention, norm_name, None)
        if norm is not None:
            parts[name] = _scaled(parts[name], norm)
    for name in ("k_proj", "v_proj"):
        weight, bias = parts[name]
        repeats = heads * head_dim // weight.shape[0]
        parts[name] = _repeat_heads(weight, head_dim, repeats), _repeat_heads(bias, head_dim, repeats)
    for name, (weight, _) in parts.items():
        shape = (config.hidden_size, heads * head_dim) if name == "o_proj" else (heads * head_dim, config.hidden_size)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{type(attention).__name__}.{name} is {tuple(weight.shape)}, and a memory with {heads} heads of "
                f"width {head_dim} needs {shape}: attention with such heads cannot be converted."
            )
    return parts


def _separate(attention: nn.Module, config: MemoryHybridConfig, heads: int, head_dim: int) -> Projections:
    if all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        return {name: _linear(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    if hasattr(attention, "qkv_proj") and hasattr(attention, "o_proj"):  # Phi-3: all queries, all keys, all values
        shared = getattr(config, "num_key_value_heads", None) or heads
        sizes = [heads * head_dim, shared * head_dim, shared * head_dim]
        weight, bias = _linear(attention.qkv_proj)
        biases = (None, None, None) if bias is None else bias.split(sizes)
        rows = zip(weight.split(sizes), biases)
        return dict(zip(("q_proj", "k_proj", "v_proj"), rows)) | {"o_proj": _linear(attention.o_proj)}
    if hasattr(attention, "query_key_value") and hasattr(
        attention, "dense"
    ):  # GPT-NeoX: query, key, value of each head
        weight, bias = _linear(attention.query_key_value)
        weights = weight.unflatten(0, (heads, 3, head_dim)).unbind(1)
        biases = (None, None, None) if bias is None else bias.unflatten(0, (heads, 3, head_dim)).unbind(1)
        rows = ((w.flatten(0, 1), None if b is None else b.flatten()) for w, b in zip(weights, biases))
        return dict(zip(("q_proj", "k_proj", "v_proj"), rows)) | {"o_proj": _linear(attention.dense)}
    names = ", ".join(name for name, _ in attention.named_children())
    raise ValueError(
        f"{type(attention).__name__} keeps its projections in a way that is not known here ({names}): its family "
        "is not supported."
    )


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"A projection of class {type(module).__name__} cannot be inherited: load the teacher unquantised."
        )
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _scaled(rows: tuple[Tensor, Tensor | None], norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    # Whatever the norm's convention (w or 1 + w), it maps ones to its scale. Its division by the length is of no
    # consequence to memories, which bring queries and keys to unit length themselves.
    weight, bias = rows
    parameter = next(norm.parameters(), None)
    if parameter is None:
        return rows
    scale = norm(torch.ones_like(parameter)).detach()
    scale = scale.repeat(weight.shape[0] // scale.shape[0]).to(weight.dtype)
    return weight * scale[:, None], None if bias is None else bias * scale


def _repeat_heads(rows: Tensor | None, head_dim: int, repeats: int) -> Tensor | None:
    if rows is None or repeats <= 1:
        return rows
    return rows.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)


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
