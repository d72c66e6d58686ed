"""What each stage trains and what it minimises.

A stage is a module with `options` (its part of the recipe), `parameters_by_name` (what it trains), `memories` (the
names that the teacher does not have), `prepare()`, called before the first step, `finish()`, called behind the last,
and a forward pass from blocks of tokens to the loss. The training loop knows nothing else about it, and sets
`step_seed`, the same in every process, before each step.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_memory.conversion.adapters import LORA, Adapters, plain_name
from hf_memory.conversion.layer_targets import LayerTarget, teacher_layers
from hf_memory.conversion.losses import DIVERGENCES, cross_entropy, logit_kl
from hf_memory.conversion.sampling import continue_rows
from hf_memory.conversion.stage_options import AlignStage, DistillStage, OnPolicyStage, TrainingStage
from hf_memory.conversion.surgery import memory_parameters, new_parameters


Loss = tuple[Tensor, dict[str, Tensor]]


class StageModule(nn.Module):
    """What all stages share: the student inside, the teacher beside it, and what of the student trains.

    The teacher is no part of the module: it trains nothing and need not be sent to other processes.

    Args:
        options: The stage's part of the recipe.
        teacher: Frozen.
        student: From `build_student`; with `lora_rank` its linear layers are wrapped here.
        seed: Of what the stage draws at random.

    Raises:
        ConversionError: For options that this student does not allow.
    """

    def __init__(
        self, options: TrainingStage, teacher: PreTrainedModel, student: PreTrainedModel, seed: int = 0
    ) -> None:
        super().__init__()
        self.options, self.student, self.seed, self.step_seed = options, student, seed, 0
        self._beside = (teacher,)
        scope = {plain_name(name): value for name, value in self.scope().items()}
        self.adapters = Adapters(student, options, scope, seed) if options.lora_rank is not None else None
        self.parameters_by_name = scope if self.adapters is None else self.adapters.parameters
        self.memories = {plain_name(name): value for name, value in memory_parameters(student).items()}

    @property
    def teacher(self) -> PreTrainedModel:
        return self._beside[0]

    def scope(self) -> dict[str, nn.Parameter]:
        """What `trainable` names in the student."""
        if self.options.trainable == "all":
            return dict(self.student.named_parameters())
        return (new_parameters if self.options.trainable == "new" else memory_parameters)(self.student)

    def prepare(self) -> None:
        """The teacher's own dropout, if its configuration has any."""
        self.student.train()

    def finish(self) -> dict[str, nn.Parameter]:
        """Merge adapters that are not kept; what the stage leaves changed, by name."""
        if self.adapters is not None and self.options.lora_merge:
            return self.adapters.merge()
        return self.parameters_by_name


class Align(StageModule):
    """Each converted layer learns to give what the teacher's layer gives (`LayerTarget`); the loss is their sum."""

    def __init__(self, options: AlignStage, teacher: PreTrainedModel, student: PreTrainedModel, seed: int = 0) -> None:
        self.layer_target = LayerTarget(options.target, teacher, student)
        super().__init__(options, teacher, student, seed)

    def scope(self) -> dict[str, nn.Parameter]:
        """Of what `trainable` names, the part inside the layers that are compared."""
        reached = self.layer_target.reached()
        return {name: value for name, value in super().scope().items() if id(value) in reached}

    def prepare(self) -> None:
        """Dropout off: the frozen parts shall give what the teacher's give."""
        self.student.eval()

    def forward(self, blocks: Tensor) -> Loss:
        """Sum of the layers' losses on `[B, T + 1]` int64; the figures name each layer's."""
        inputs, target = blocks[:, :-1], self.layer_target
        expected = teacher_layers(target, inputs)
        if self.options.stream == "teacher":
            return target.losses(target.run_on(expected), expected)
        with target.student_calls() as given:
            self.student.base_model(input_ids=inputs, use_cache=False)
        return target.losses(given, expected)


class Distill(StageModule):
    """The student reads text and learns the teacher's distribution of the next token."""

    def __init__(
        self, options: DistillStage, teacher: PreTrainedModel, student: PreTrainedModel, seed: int = 0
    ) -> None:
        self.layer_target = LayerTarget("block", teacher, student)
        super().__init__(options, teacher, student, seed)

    def forward(self, blocks: Tensor) -> Loss:
        """Weighted sum of divergence, cross entropy and layers' losses on `[B, T + 1]` int64."""
        options, target = self.options, self.layer_target
        inputs, targets = blocks[:, :-1], blocks[:, 1:]
        compares_layers = options.layer_weight > 0 and len(target.layers) > 0
        expected = None
        with target.teacher_calls() if compares_layers else nullcontext() as calls:
            if options.kl_weight or compares_layers:
                with torch.no_grad():
                    expected = self.teacher(input_ids=inputs, use_cache=False).logits
        logits = self.student(input_ids=inputs, use_cache=False).logits
        total, figures = torch.zeros((), device=logits.device), {}
        if options.kl_weight:
            divergence = logit_kl(logits, expected, options.temperature)
            total = total + options.kl_weight * divergence
            figures["kl"] = divergence.detach()
        if options.ce_weight:
            surprise = cross_entropy(logits, targets)
            total = total + options.ce_weight * surprise
            figures["ce"] = surprise.detach()
        if compares_layers:
            distance, by_layer = target.losses(target.run_on(calls), calls)
            total = total + options.layer_weight * distance
            figures |= by_layer
        return total, figures


class OnPolicy(StageModule):
    """The student goes on from the text's first tokens, and learns what the teacher says about each new token."""

    def forward(self, blocks: Tensor) -> Loss:
        """Divergence in nats per new token; of `[B, T + 1]` int64 only the first `prompt_tokens` are read."""
        options = self.options
        prompts = blocks[:, : options.prompt_tokens]
        written = continue_rows(
            self.student,
            prompts,
            options.new_tokens,
            seed=self.step_seed,
            temperature=options.sampling_temperature,
            top_k=options.top_k,
        )
        inputs = written[:, :-1]
        with torch.no_grad():
            expected = self.teacher(input_ids=inputs, use_cache=False).logits
        given = self.student(input_ids=inputs, use_cache=False).logits
        new = slice(options.prompt_tokens - 1, None)
        loss = DIVERGENCES[options.divergence](given[:, new], expected[:, new], options.temperature)
        return loss, {options.divergence: loss.detach()}


STAGE_CLASSES: dict[type[TrainingStage], type[StageModule]] = {
    AlignStage: Align,
    DistillStage: Distill,
    OnPolicyStage: OnPolicy,
}


def make_stage(
    options: TrainingStage, teacher: PreTrainedModel, student: PreTrainedModel, seed: int = 0
) -> StageModule:
    """The stage that belongs to a part of the recipe; arguments as of `StageModule`."""
    return STAGE_CLASSES[type(options)](options, teacher, student, seed)


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
    trained = {id(value) for value in parameters.values()}
    frozen = {plain_name(name): value for name, value in model.named_parameters() if id(value) not in trained}
    trainable = "trainable adapters" if any(LORA in name for name in parameters) else "trainable"
    for title, group in ((trainable, parameters), ("frozen", frozen)):
        lines.append(f"{title}: {sum(value.numel() for value in group.values()):,} parameters")
        lines += [f"  {pattern}: {numel:,}" for pattern, numel in patterns(group).items()]
    return lines


def patterns(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements by the names of their modules; layers, and modules side by side, share a line where they can."""
    layers: dict[str, set[int]] = defaultdict(set)
    sizes: dict[str, int] = defaultdict(int)
    for name, value in parameters.items():
        module = name.rpartition(".")[0].partition(LORA)[0]
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
