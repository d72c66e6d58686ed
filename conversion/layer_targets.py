"""What is compared in a layer, on both sides: where it is found, how it is recorded, and by which loss."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_memory.conversion.losses import head_mse, matrix_frobenius, relative_l2
from hf_memory.conversion.mixer_matrix import check_linear, mixer_matrix
from hf_memory.conversion.projections import OUTPUT
from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.surgery import decoder_layers, find_attention, memory_slots


# The published factor of the heads' squared error, which is small beside the epsilon of Adam otherwise.
HEAD_SCALE = 1000.0


@dataclass
class LayerCall:
    """One call of a module inside a model.

    Args:
        args: What it was called with.
        kwargs: And by name.
        value: What is compared: `[B, T, D]`, or the mixer's matrix `[B, H, T, T]`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor | None = None

    @property
    def hidden_states(self) -> Tensor:
        """`[B, T, D]` among the arguments."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


class LayerTarget:
    """What a stage compares in the converted layers.

    Args:
        target: `"block"`, `"mixer"`, `"heads"` or `"matrix"`.
        teacher: Of the student.
        student: From `build_student`.

    Raises:
        ConversionError: Memories for which this target is not defined.
    """

    def __init__(self, target: str, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        self.target, self.teacher, self.student = target, teacher, student
        self.slots = memory_slots(student)
        self.layers = sorted(self.slots)
        self._check()

    def _check(self) -> None:
        if self.target in ("block", "mixer"):
            return
        for index in self.layers:
            if self.slots[index].scale is not None:
                raise ConversionError(
                    f"`target` {self.target} compares a memory with the attention in whose place it stands, and mode "
                    "retrofit keeps that: use `target` mixer or block."
                )
            if self.target == "matrix":
                check_linear(self.slots[index].memory)
        if self.target == "heads" and self.layers:
            index = self.layers[0]
            theirs = width_in(output_projection(self.module(self.teacher, index)))
            ours = self.slots[index].memory.o_proj.in_features
            if ours != theirs:
                raise ConversionError(
                    f"`target` heads compares what goes into the output projections, {theirs} channels of the teacher "
                    f"and {ours} of this memory: use `target` mixer or block."
                )

    def module(self, model: PreTrainedModel, index: int) -> nn.Module:
        """The part of a layer whose inputs decide what is compared: its attention, or all of it."""
        layer = decoder_layers(model)[index]
        return layer if self.target == "block" else find_attention(layer)[1]

    def student_module(self, index: int) -> nn.Module:
        """`module` of the student: a memory may stand in the place of its attention, under the same name."""
        layer = decoder_layers(self.student)[index]
        if self.target == "block":
            return layer
        return layer.get_submodule(find_attention(decoder_layers(self.teacher)[index])[0])

    @contextmanager
    def teacher_calls(self) -> Iterator[dict[int, LayerCall]]:
        """Calls by layer, filled by the teacher's forward passes inside the context."""
        with ExitStack() as stack:
            if self.target == "matrix":
                stack.enter_context(eager_attention(self.teacher))
            yield stack.enter_context(self._recorded({i: self.module(self.teacher, i) for i in self.layers}))

    @contextmanager
    def student_calls(self) -> Iterator[dict[int, LayerCall]]:
        """Calls by layer, filled by the student's forward passes inside the context."""
        with self._recorded({i: self.student_module(i) for i in self.layers}) as calls:
            yield calls

    @contextmanager
    def _recorded(self, modules: Mapping[int, nn.Module]) -> Iterator[dict[int, LayerCall]]:
        calls: dict[int, LayerCall] = {}

        def enter(index: int):
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                calls[index] = LayerCall(args, kwargs)

            return hook

        def leave(index: int):
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                calls[index].value = self._result(module, calls[index], output)

            return hook

        def project(index: int):
            def hook(module: nn.Module, args: tuple) -> None:
                calls[index].value = args[0]

            return hook

        handles = []
        for index, module in modules.items():
            handles.append(module.register_forward_pre_hook(enter(index), with_kwargs=True))
            if self.target == "heads":
                inner = getattr(module, "memory", module)
                handles.append(output_projection(inner).register_forward_pre_hook(project(index)))
            else:
                handles.append(module.register_forward_hook(leave(index)))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _result(self, module: nn.Module, call: LayerCall, output: Any) -> Tensor:
        if self.target != "matrix":
            return output[0] if isinstance(output, tuple) else output
        memory = getattr(module, "memory", None)
        if memory is not None:
            return mixer_matrix(memory, call.hidden_states)
        if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            raise ConversionError(
                f"{type(module).__name__} returns no attention weights, which `target` matrix compares: use another."
            )
        return output[1]

    def run_on(self, calls: Mapping[int, LayerCall]) -> dict[int, LayerCall]:
        """The student's calls when each of its modules reads what the teacher's module read."""
        memory_inputs = self.student.memory_inputs(calls[self.layers[0]].hidden_states, None)
        with self.student_calls() as given:
            for index in self.layers:
                self.student_module(index)(*calls[index].args, **calls[index].kwargs, memory_inputs=memory_inputs)
        return given

    def loss(self, given: LayerCall, expected: LayerCall) -> Tensor:
        """Of one layer."""
        if self.target == "block":
            return relative_l2(given.value, expected.value, expected.hidden_states)
        if self.target == "mixer":
            return relative_l2(given.value, expected.value)
        if self.target == "heads":
            return HEAD_SCALE * head_mse(given.value, expected.value)
        return matrix_frobenius(given.value, expected.value)

    def losses(
        self, given: Mapping[int, LayerCall], expected: Mapping[int, LayerCall]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the layers, and each layer's as a figure."""
        by_layer = {index: self.loss(given[index], expected[index]) for index in self.layers}
        # Layers of a large model may lie on several devices.
        first = by_layer[self.layers[0]].device
        total = torch.stack([loss.to(first) for loss in by_layer.values()]).sum()
        return total, {f"layer {index}": loss.detach() for index, loss in by_layer.items()}

    def reached(self) -> set[int]:
        """Ids of the student's parameters that the compared values depend on, when each layer stands for itself."""
        found: set[int] = set()
        for index in self.layers:
            parameters = set(map(id, self.student_module(index).parameters()))
            memory = self.slots[index].memory
            if self.target == "heads":
                parameters -= set(map(id, memory.o_proj.parameters()))
            elif self.target == "matrix":
                inside = (memory.q_proj, memory.k_proj, memory.conv, memory.gates)
                parameters = {id(value) for part in inside if part is not None for value in part.parameters()}
            found |= parameters
        return found


def output_projection(attention: nn.Module) -> nn.Module:
    """The projection behind the heads of an attention module or of a memory.

    Raises:
        ConversionError: It has another name than those that are known.
    """
    for name in OUTPUT:
        if hasattr(attention, name):
            return getattr(attention, name)
    raise ConversionError(
        f"{type(attention).__name__} has no output projection called {', '.join(OUTPUT)}, so its heads "
        "cannot be told apart: use `target` mixer or block."
    )


def width_in(projection: nn.Module) -> int:
    """Channels that a projection reads; GPT-2's is transposed."""
    return projection.weight.shape[0] if isinstance(projection, Conv1D) else projection.in_features


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """The form of attention that knows its own weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def teacher_layers(layer_target: LayerTarget, input_ids: Tensor) -> dict[int, LayerCall]:
    """The teacher's calls by layer on `[B, T]` int64."""
    with layer_target.teacher_calls() as calls:
        layer_target.teacher.base_model(input_ids=input_ids, use_cache=False)
    # The layers of a large teacher may lie on several devices.
    for call in calls.values():
        call.args, call.kwargs, call.value = send_to_device((call.args, call.kwargs, call.value), input_ids.device)
    return calls
