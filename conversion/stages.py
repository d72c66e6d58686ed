"""What each stage trains and what it minimises.

A stage is a module with `options` (its part of the recipe), `parameters_by_name` (what it trains), `memories` (those
that the teacher does not have), `prepare()`, called before the first step, `finish()`, called behind the last, and
`forward(blocks)`, which gives the loss and figures. The training loop knows nothing else about it, and sets
`step_seed`, the same in every process, before each step.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_memory.conversion.stage_options import AlignStage, DistillStage, TrainingStage
from hf_memory.conversion.surgery import decoder_layers, memory_parameters


Loss = tuple[Tensor, dict[str, float]]
LayerCall = tuple[tuple[Any, ...], dict[str, Any], Tensor]


class Align(nn.Module):
    """Each converted block reads what the teacher's block read, and learns to give what that gave.

    The loss of a layer is the mean over tokens of |student - teacher|, divided by the mean of |teacher - input|: 1 is
    a block that does nothing. The layers are independent of each other; everything but the memories is frozen.

    Args:
        options: The stage's part of the recipe.
        teacher: Frozen, on the student's device.
        student: From `build_student`.
    """

    def __init__(self, options: AlignStage, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        super().__init__()
        self.options, self.teacher, self.student = options, teacher, student
        self.parameters_by_name = self.memories = memory_parameters(student)
        self.layers = sorted(student.config.memory_layers)

    def prepare(self) -> None:
        """Dropout off: the frozen parts shall give what the teacher's give."""
        self.student.eval()

    def finish(self) -> dict[str, nn.Parameter]:
        """What the stage leaves changed, by name."""
        return self.parameters_by_name

    def forward(self, blocks: Tensor) -> Loss:
        """Sum of the layers' losses on `[B, T + 1]` int64; the figures name each layer's."""
        calls = record_layers(self.teacher, blocks[:, :-1], self.layers)
        first_input = layer_input(*calls[self.layers[0]][:2])
        memory_inputs = self.student.memory_inputs(first_input, None)
        total, figures = torch.zeros((), device=first_input.device), {}
        for index in self.layers:
            args, kwargs, expected = calls[index]
            given = output_of(decoder_layers(self.student)[index](*args, **kwargs, memory_inputs=memory_inputs))
            loss = block_l2(given, expected, layer_input(args, kwargs))
            total = total + loss
            figures[f"layer {index}"] = loss.detach().item()
        return total, figures


class Distill(nn.Module):
    """The student reads text and learns the teacher's distribution of the next token.

    Args:
        options: The stage's part of the recipe.
        teacher: Frozen, on the student's device.
        student: From `build_student`.
    """

    def __init__(self, options: DistillStage, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        super().__init__()
        self.options, self.teacher, self.student = options, teacher, student
        self.memories = memory_parameters(student)
        self.parameters_by_name = dict(student.named_parameters()) if options.trainable == "all" else self.memories

    def prepare(self) -> None:
        """The teacher's own dropout, if its configuration has any."""
        self.student.train()

    def finish(self) -> dict[str, nn.Parameter]:
        """What the stage leaves changed, by name."""
        return self.parameters_by_name

    def forward(self, blocks: Tensor) -> Loss:
        """Weighted sum of divergence and cross entropy in nats per token on `[B, T + 1]` int64."""
        inputs, targets = blocks[:, :-1], blocks[:, 1:]
        logits = self.student(input_ids=inputs, use_cache=False).logits
        total, figures = torch.zeros((), device=logits.device), {}
        if self.options.kl_weight:
            with torch.no_grad():
                expected = self.teacher(input_ids=inputs, use_cache=False).logits
            divergence = logit_kl(logits, expected, self.options.temperature)
            total = total + self.options.kl_weight * divergence
            figures["kl"] = divergence.detach().item()
        if self.options.ce_weight:
            cross_entropy = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            total = total + self.options.ce_weight * cross_entropy
            figures["ce"] = cross_entropy.detach().item()
        return total, figures


STAGE_CLASSES: dict[type[TrainingStage], type] = {AlignStage: Align, DistillStage: Distill}


def make_stage(options: TrainingStage, teacher: PreTrainedModel, student: PreTrainedModel) -> Align | Distill:
    """The stage that belongs to a part of the recipe."""
    return STAGE_CLASSES[type(options)](options, teacher, student)


def block_l2(given: Tensor, expected: Tensor, block_input: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean length of the error of a block's output, in units of the mean length of what it should add; mean over rows.

    Args:
        given: Output of the student's block, `[B, T, D]`.
        expected: Output of the teacher's, `[B, T, D]`.
        block_input: What both read, `[B, T, D]`.
        valid: `[B, T]` bool, true where a token counts. Default: all do.
    """
    error = torch.linalg.vector_norm(given.float() - expected.float(), dim=-1)
    update = torch.linalg.vector_norm(expected.float() - block_input.float(), dim=-1).detach()
    if valid is not None:
        error, update = error.where(valid, 0), update.where(valid, 0)
    # A teacher's block that adds nothing at all is possible, in a model of zeros.
    return (error.sum(-1) / update.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def logit_kl(given: Tensor, expected: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """`temperature**2 * KL(expected || given)` of softened distributions, mean over tokens, in nats.

    Args:
        given: The student's logits, `[B, T, V]`.
        expected: The teacher's, `[B, T, V]`.
        temperature: Both are divided by it. Default: 1.
        valid: `[B, T]` bool, true where a token counts. Default: all do.
    """
    given, expected = given.flatten(0, -2), expected.flatten(0, -2)
    if valid is not None:
        given, expected = given[valid.flatten()], expected[valid.flatten()]
    log_given = (given.float() / temperature).log_softmax(-1)
    log_expected = (expected.float() / temperature).log_softmax(-1)
    divergence = functional.kl_div(log_given, log_expected, log_target=True, reduction="sum")
    return divergence * temperature**2 / given.shape[0]


@torch.no_grad()
def record_layers(teacher: PreTrainedModel, input_ids: Tensor, layers: Iterable[int]) -> dict[int, LayerCall]:
    """Arguments, keyword arguments and output hidden states of the teacher's decoder layers on `[B, T]` int64."""
    calls: dict[int, LayerCall] = {}

    def record(index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            calls[index] = args, kwargs, output_of(output)

        return hook

    handles = [decoder_layers(teacher)[i].register_forward_hook(record(i), with_kwargs=True) for i in layers]
    try:
        teacher.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def output_of(result: Any) -> Tensor:
    """Hidden states among what a decoder layer returns."""
    return result[0] if isinstance(result, tuple) else result


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Hidden states among what a decoder layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def only_these_train(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters and for no others."""
    chosen = {id(parameter) for parameter in parameters.values()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def what_trains(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Lines on what is trainable and what is frozen: names by pattern, with their counts."""
    lines = []
    frozen = {name: value for name, value in model.named_parameters() if name not in parameters}
    for title, group in (("trainable", parameters), ("frozen", frozen)):
        lines.append(f"{title}: {sum(value.numel() for value in group.values()):,} parameters")
        lines += [f"  {pattern}: {numel:,}" for pattern, numel in patterns(group).items()]
    return lines


def patterns(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements by the names of their modules; layers, and modules side by side, share a line where they can."""
    layers: dict[str, set[int]] = defaultdict(set)
    sizes: dict[str, int] = defaultdict(int)
    for name, value in parameters.items():
        module = name.rpartition(".")[0]
        match = re.search(r"(?<=\.)\d+(?=\.|$)", module)
        pattern = module if match is None else f"{module[: match.start()]}#{module[match.end() :]}"
        layers[pattern] |= set() if match is None else {int(match[0])}
        sizes[pattern] += value.numel()
    siblings: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pattern in sizes:
        siblings[pattern.rpartition(".")[0], runs(layers[pattern])].append(pattern)
    lines = {}
    for (parent, numbers), members in siblings.items():
        leaves = [member.removeprefix(f"{parent}.") for member in members]
        shared = leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
        line = f"{parent}.{shared}" if parent else shared
        lines[line.replace("#", numbers)] = sum(sizes[member] for member in members)
    return lines


def runs(numbers: Iterable[int]) -> str:
    """`"{0-3,5}"` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return "{" + ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) + "}"
