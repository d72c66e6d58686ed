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
    place,
    plain,
    positive,
    share,
)


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
    """Budget, optimiser and schedule of a stage that trains.

    AdamW with betas (0.9, 0.95); the learning rate rises linearly over `warmup` of the steps, then falls along a
    cosine to `floor` times `lr`. Weight decay acts on matrices only. Each batch goes through in `accumulate` parts.
    """

    tokens: int = count(5_000_000)
    lr: float | int = positive(1e-3)
    warmup: float | int = share(0.05)
    floor: float | int = share(0.1)
    weight_decay: float | int = not_negative(0.01)
    clip: float | int = positive(1.0)
    context: int | None = count(None)
    batch_size: int | None = count(None)
    accumulate: int = count(1)


@strict
@dataclass(kw_only=True)
class AlignStage(TrainingStage):
    """Train the memories so that each converted block, on the teacher's own input, gives the teacher's output."""

    name: ClassVar[str] = "align"


@strict
@dataclass(kw_only=True)
class DistillStage(TrainingStage):
    """Train the student end to end towards the teacher's distribution.

    The loss is `kl_weight * temperature**2 * KL(teacher || student) + ce_weight * cross entropy`, per token.
    `trainable` is `"memory"` or `"all"`; `kept_lr` is the learning rate of what the teacher has too (default: `lr`).
    """

    name: ClassVar[str] = "distill"

    tokens: int = count(20_000_000)
    lr: float | int = positive(3e-4)
    kept_lr: float | int | None = positive(None)
    temperature: float | int = positive(1.0)
    trainable: str = one_of("memory", ("memory", "all"))
    kl_weight: float | int = not_negative(1.0)
    ce_weight: float | int = not_negative(0.0)

    def validate_weights(self) -> None:
        """Part of `@strict`-powered validation: there is something to learn from."""
        if not self.kl_weight and not self.ce_weight:
            raise ValueError("`kl_weight` and `ce_weight` are both 0: nothing is left to learn from")


STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (InitStage, AlignStage, DistillStage)}


def default_stages() -> list[Stage]:
    return [stage() for stage in STAGES.values()]


def build_stage(given: Any) -> Stage:
    """A stage from its name, or from a mapping with `name` and options."""
    values = {"name": given} if isinstance(given, str) else given
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str) or values["name"] not in STAGES:
        name = plain(values.get("name") if isinstance(values, Mapping) else given)
        line = (place(values, "name") or place(values)) if isinstance(values, Mapping) else ""
        raise ConversionError(
            f"{line}`stages` must be made of {', '.join(STAGES)}, got {name!r}{nearest(str(name), STAGES) or '.'}"
        )
    label = f"{values['name']}."
    if isinstance(values, FileMapping):
        values = FileMapping(values, values.file, values.line, values.lines)
    else:
        values = dict(values)
    return build(STAGES[values.pop("name")], values, label)


__all__ = [
    "STAGES",
    "AlignStage",
    "DistillStage",
    "InitStage",
    "Stage",
    "TrainingStage",
    "build_stage",
    "default_stages",
]
