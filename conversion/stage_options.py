"""The options of the stages: what a recipe may say about each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_memory.conversion.schema import (
    ConversionError,
    FileMapping,
    build,
    count,
    nearest,
    not_negative,
    one_of,
    option,
    place,
    plain,
    positive,
    share,
)


# A matrix of all pairs of tokens is compared: what alignment costs grows with the square of the context.
MATRIX_CONTEXT = 256
# Targets that stand for attention itself, which a retrofitted layer still has.
REPLACED_ONLY = ("heads", "matrix")


@strict
@dataclass(kw_only=True)
class Stage:
    """What all stages have in common: a name."""

    name: ClassVar[str]


@strict
@dataclass(kw_only=True)
class InitStage(Stage):
    """Build the student from the teacher. It has no options of its own."""

    name: ClassVar[str] = "init"


@strict
@dataclass(kw_only=True)
class TrainingStage(Stage):
    """Budget, optimiser, schedule and trainable part of a stage that trains.

    AdamW with `betas`; weight decay acts on matrices only. The learning rate rises linearly to `lr` over `warmup` of
    the steps. Then `schedule` leads it to `floor * lr`: along a `cosine`, `linear`ly, or for `wsd` linearly over the
    last `decay` of the steps; `constant` keeps it. `kept_lr` is the learning rate of what the teacher has too
    (default: `lr`). Each batch goes through in `accumulate` parts. The stage ends early when the mean loss of its last
    20 steps is below `stop_below`.

    `trainable` is `new` for what attention has no counterpart for (convolutions, gates, initial memories, and
    projections of another shape than those of attention), `memory` for all that the teacher does not have, `all` for
    everything: of the student, or of the converted layers where only these are compared.

    With `lora_rank` adapters are trained in place of weights: low-rank ones of this rank, scaled by
    `lora_alpha / lora_rank`, on the linear layers named `lora_targets` (default: `q_proj`, `k_proj`, `v_proj` and
    `o_proj`) among what `trainable` says. They are added to the weights at the end of the stage; `lora_merge=False`,
    in the last stage, saves them beside the model in `adapter/` instead.
    """

    tokens: int = count(5_000_000)
    lr: float | int = positive(1e-3)
    kept_lr: float | int | None = positive(None)
    schedule: str = one_of("cosine", ("cosine", "linear", "constant", "wsd"))
    warmup: float | int = share(0.05)
    decay: float | int = share(0.1)
    floor: float | int = share(0.1)
    weight_decay: float | int = not_negative(0.01)
    betas: list[float | int] = option(
        [0.9, 0.95],
        "two numbers of at least 0 and below 1",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    )
    clip: float | int = positive(1.0)
    context: int | None = count(None)
    batch_size: int | None = count(None)
    accumulate: int = count(1)
    trainable: str = one_of("memory", ("new", "memory", "all"))
    stop_below: float | int | None = positive(None)
    lora_rank: int | None = count(None)
    lora_alpha: float | int = positive(16)
    lora_targets: list[str] | None = option(
        None, "a list of names of linear layers", lambda names: names and all(names)
    )
    lora_merge: bool = option(True, "true or false")

    # What the loss is measured in, for the axis of a curve.
    unit: ClassVar[str] = "nats per token"

    def validate_adapters(self) -> None:
        """Part of `@strict`-powered validation: adapters have something to adapt, and are asked for."""
        if self.lora_rank is None and (self.lora_targets is not None or not self.lora_merge):
            raise ValueError("`lora_targets` and `lora_merge` say something about adapters: set `lora_rank` too")
        if self.lora_rank is not None and self.trainable == "new":
            raise ValueError(
                "`lora_rank` adapts weights that exist and `trainable` new has none: set it to memory or all"
            )

    def validate_schedule(self) -> None:
        """Part of `@strict`-powered validation: rise and fall fit into the stage."""
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"`warmup` ({self.warmup}) and `decay` ({self.decay}) are shares of the steps: make them 1 at most"
            )

    def context_in(self, context: int) -> int:
        """Tokens per block of this stage in a recipe whose blocks have `context` tokens."""
        return self.context or context


@strict
@dataclass(kw_only=True)
class AlignStage(TrainingStage):
    """Train converted layers, each to give what the teacher's layer gives.

    `target` says what is compared: the output of the `block`, of the `mixer` (attention and memory), the `heads` in
    front of the output projection, or the `matrix` by which a token's output weighs all values (contexts beyond 256
    only when the stage asks for them; for memories that are linear in the values). With `stream` `teacher` every layer
    reads what the teacher's layer read, and learns apart from the others; with `student` the student reads the text
    itself, and errors run on through its layers.
    """

    name: ClassVar[str] = "align"
    unit: ClassVar[str] = "distance to the teacher, summed over layers"

    target: str = one_of("block", ("block", "mixer", "heads", "matrix"))
    stream: str = one_of("teacher", ("teacher", "student"))

    def context_in(self, context: int) -> int:
        return super().context_in(min(context, MATRIX_CONTEXT) if self.target == "matrix" else context)


@strict
@dataclass(kw_only=True)
class DistillStage(TrainingStage):
    """Train the student end to end towards the teacher's distribution.

    The loss is `kl_weight * temperature**2 * KL(teacher || student) + ce_weight * cross entropy`, per token, and
    `layer_weight` times the loss of `align` with its default target and stream.
    """

    name: ClassVar[str] = "distill"

    tokens: int = count(20_000_000)
    lr: float | int = positive(3e-4)
    temperature: float | int = positive(1.0)
    kl_weight: float | int = not_negative(1.0)
    ce_weight: float | int = not_negative(0.0)
    layer_weight: float | int = not_negative(0.0)

    def validate_weights(self) -> None:
        """Part of `@strict`-powered validation: there is something to learn from."""
        if not self.kl_weight and not self.ce_weight:
            raise ValueError("`kl_weight` and `ce_weight` are both 0: nothing is left to learn from")


@strict
@dataclass(kw_only=True)
class OnPolicyStage(TrainingStage):
    """Train the student on what it writes itself; the teacher judges every token of it.

    The student goes on from the first `prompt_tokens` of a block for `new_tokens`, drawn at `sampling_temperature`
    among the `top_k` likeliest (default: all). On these the loss is `temperature**2` times a divergence of the two
    distributions: `forward`, KL(teacher || student); `reverse`, KL(student || teacher); or `jsd`, the mean of both to
    the even mixture. A block has `prompt_tokens + new_tokens` tokens, which is what `tokens` counts.
    """

    name: ClassVar[str] = "on_policy"

    tokens: int = count(2_000_000)
    lr: float | int = positive(1e-4)
    prompt_tokens: int = count(64)
    new_tokens: int = count(128)
    sampling_temperature: float | int = positive(1.0)
    top_k: int | None = count(None)
    divergence: str = one_of("reverse", ("forward", "reverse", "jsd"))
    temperature: float | int = positive(1.0)

    def validate_context(self) -> None:
        """Part of `@strict`-powered validation: the length of blocks is said once."""
        if self.context is not None and self.context != self.prompt_tokens + self.new_tokens:
            raise ValueError(
                f"`context` is `prompt_tokens` and `new_tokens` together, {self.prompt_tokens + self.new_tokens}, not "
                f"{self.context}: leave it out"
            )

    def context_in(self, context: int) -> int:
        return self.prompt_tokens + self.new_tokens


STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (InitStage, AlignStage, DistillStage, OnPolicyStage)}


def default_stages() -> list[Stage]:
    """`init`, `align`, `distill`."""
    return [InitStage(), AlignStage(), DistillStage()]


def build_stage(given: Any) -> Stage:
    """A stage from its name, or from a mapping with `name` and options."""
    values = given if isinstance(given, Mapping) else {"name": given}
    if not isinstance(values.get("name"), str) or values["name"] not in STAGES:
        line = place(values, "name") or place(values)
        if "name" in values:
            found = plain(values["name"])
            hint = nearest(str(found), STAGES) or "."
        else:
            found = plain(values)
            kind = next((key for key in values if key in STAGES), "align")
            hint = f": write `- name: {kind}`, and the settings of the stage below it."
        raise ConversionError(f"{line}`stages` must be made of {', '.join(STAGES)}, got {found!r}{hint}")
    label = f"{values['name']}."
    if isinstance(values, FileMapping):
        values = FileMapping(values, values.file, values.line, values.lines)
    else:
        values = dict(values)
    return build(STAGES[values.pop("name")], values, label)


__all__ = [
    "REPLACED_ONLY",
    "STAGES",
    "AlignStage",
    "DistillStage",
    "InitStage",
    "OnPolicyStage",
    "Stage",
    "TrainingStage",
    "build_stage",
    "default_stages",
]
