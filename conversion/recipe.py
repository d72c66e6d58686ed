"""What a conversion does: one schema for Python, YAML and the command line.

A `Recipe` names the teacher, the layers and the data, and lists the stages. `read_recipe` puts one together from a
YAML file and flags; every value is checked there, with one sentence that names the key, what was given and what is
accepted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml
from huggingface_hub.dataclasses import strict

from hf_memory.conversion.schema import ConversionError, build, count, not_negative, one_of, option
from hf_memory.conversion.stage_options import (
    REPLACED_ONLY,
    STAGES,
    AlignStage,
    Stage,
    TrainingStage,
    build_stage,
    default_stages,
)


LAYER_WORDS = ("all", "odd", "even", "lower", "none")


@strict
@dataclass(kw_only=True)
class Recipe:
    """Everything that decides what a conversion does.

    `data` may be left out when no stage trains; nothing is evaluated then. `data: teacher`, where no file has that
    name, samples as much text from the teacher as stages and evaluation need, `sampled_tokens` at most. `held_out` is
    the share of the blocks at the end of the data that is kept for evaluation, or a file or folder of its own;
    `held_out_blocks` of them are read. `layers` counts from 0. `seed` fixes the memories' random weights and the order
    of the data.
    """

    teacher: str = option("", "a folder or a Hub id", bool, "Folder of a saved model, or its id on the Hub.")
    output: str = option("", "a folder that does not exist yet", bool, "Folder to write; it must not exist.")
    revision: str | None = option(None, "a branch, tag or commit", bool, "Branch, tag or commit of a Hub teacher.")
    trust_remote_code: bool = option(False, "true or false", help="Run code that comes with the teacher.")
    memory: str = option("titans", "the name of a memory architecture", bool, "Architecture of the memories.")
    memory_options: dict = option({}, "a mapping from fields of the memory's config to values")
    layers: str | list[int] = option(
        "odd",
        "a list of layer numbers, all, odd, even, lower or none",
        help='Layers to convert: "1,3,5", all, odd, even, lower (the first half), none.',
    )
    mode: str = one_of(
        "replace", ("replace", "retrofit"), '"replace" attention, or "retrofit" a memory beside a window of attention.'
    )
    window: int | None = count(None, "Tokens that the attention of a retrofitted layer sees.")
    data: str | list[str] | None = option(
        None,
        "a file, a folder of text files, a dataset id, or teacher",
        bool,
        "Text file, folder, or dataset ID[:SPLIT], repeat for more; teacher: text that it writes.",
    )
    data_config: str | None = option(None, "the name of a configuration", bool, "Configuration of the dataset.")
    text_column: str = option("text", "the name of a column", bool, "Column of the dataset that holds the text.")
    held_out: str | float | int = option(
        0.05,
        "a share between 0 and 1, or a file or folder",
        lambda value: 0 < value < 1 if not isinstance(value, str) else bool(value),
        "Share of the blocks kept for evaluation, or a file of its own.",
    )
    sampled_tokens: int = count(2_000_000, "Most tokens that are sampled for data teacher; more are read again.")
    held_out_blocks: int = count(64, "How many of the held-out blocks are evaluated.")
    context: int = count(2048, "Tokens per block.")
    batch_size: int = count(8, "Blocks per step.")
    seed: int = option(
        0, "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32, "Of everything random."
    )
    dtype: str = one_of(
        "auto",
        ("auto", "float32", "bfloat16"),
        "To compute in; trained weights are kept in float32. auto: by the device.",
    )
    save_dtype: str = one_of("teacher", ("teacher", "float32", "bfloat16"), "Of the saved model; teacher: as stored.")
    device: str = option(
        "auto", "auto, cpu, cuda, cuda:1, ...", bool, '"cpu", "cuda", ...; "auto" takes a GPU if there is one.'
    )
    stages: list[Stage] = option(default_stages(), f"a list of {', '.join(STAGES)}")
    checkpoint_seconds: float | int = not_negative(300, "Time between two checkpoints.")
    report_to: list[str] = option(
        [], "a list of trackers", help="Tracker such as tensorboard or wandb, as accelerate names it; repeat for more."
    )
    code: bool = option(True, "true or false")

    # These change when or where something is written, not the weights that come out.
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ("output", "checkpoint_seconds", "code", "report_to")

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            self.layers = parse_layers(self.layers)
        if isinstance(self.data, list) and len(self.data) == 1:
            self.data = self.data[0]

    def validate_layers(self) -> None:
        """Part of `@strict`-powered validation: each layer once."""
        if isinstance(self.layers, list) and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"`layers` names a layer twice: {self.layers}")

    def validate_window(self) -> None:
        """Part of `@strict`-powered validation: a window exists in retrofit mode only."""
        if self.mode == "replace" and self.window is not None:
            raise ValueError(f"`window` ({self.window}) belongs to mode retrofit: set that mode, or drop the window")

    def validate_stages(self) -> None:
        """Part of `@strict`-powered validation: init once and first, and data if anything trains."""
        if not all(isinstance(stage, Stage) for stage in self.stages):
            raise ValueError(f"`stages` must be a list of stages, got {self.stages!r}")
        names = [stage.name for stage in self.stages]
        if names[:1] != ["init"] or names.count("init") > 1:
            raise ValueError(f"`stages` must begin with init and name it once, got {names}")
        if self.data is None and self.training_stages:
            raise ValueError("`data` is missing: name a text file, a folder or a dataset, or stop with the stage init")
        if not all(stage.lora_merge for stage in [*self.training_stages.values()][:-1]):
            raise ValueError("`lora_merge` false keeps adapters beside the weights: only the last stage can do that")

    def validate_targets(self) -> None:
        """Part of `@strict`-powered validation: what is compared exists."""
        for stage in self.stages:
            if self.mode == "retrofit" and isinstance(stage, AlignStage) and stage.target in REPLACED_ONLY:
                raise ValueError(
                    f"`target` {stage.target} compares a memory with the attention in whose place it stands, and mode "
                    "retrofit keeps that: align with `target` mixer or block"
                )

    @property
    def training_stages(self) -> dict[str, TrainingStage]:
        """The stages that train, by a label of their own: `distill`, `distill2`, ..."""
        labelled: dict[str, TrainingStage] = {}
        for stage in self.stages:
            if isinstance(stage, TrainingStage):
                earlier = sum(other.name == stage.name for other in labelled.values())
                labelled[stage.name + (str(earlier + 1) if earlier else "")] = stage
        return labelled

    def context_of(self, stage: TrainingStage) -> int:
        return stage.context_in(self.context)

    def batch_size_of(self, stage: TrainingStage) -> int:
        return stage.batch_size or self.batch_size

    def steps_of(self, stage: TrainingStage) -> int:
        """Steps that use up the stage's tokens, the last one rounded up."""
        return math.ceil(stage.tokens / (self.context_of(stage) * self.batch_size_of(stage)))

    def layer_numbers(self, num_layers: int) -> list[int]:
        """`layers` as numbers, for a teacher of so many layers.

        Raises:
            ConversionError: A layer that the teacher does not have.
        """
        if isinstance(self.layers, str):
            chosen = {
                "all": slice(0, None),
                "odd": slice(1, None, 2),
                "even": slice(0, None, 2),
                "lower": slice(0, num_layers // 2),
                "none": slice(0, 0),
            }
            return list(range(num_layers))[chosen[self.layers]]
        for layer in self.layers:
            if not 0 <= layer < num_layers:
                raise ConversionError(
                    f"Layer {layer} does not exist: the teacher has {num_layers} layers, 0 to {num_layers - 1}."
                )
        return sorted(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the order of the schema; `read_recipe` takes them back."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["stages"] = [
            {"name": stage.name} | {entry.name: getattr(stage, entry.name) for entry in fields(stage)}
            for stage in self.stages
        ]
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def parse_layers(text: str) -> str | list[int]:
    """`"1,3,5"` as numbers; one of the words, or a sentence."""
    if text in LAYER_WORDS:
        return text
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConversionError(
            f"`layers` must be layer numbers such as 1,3,5, or one of {', '.join(LAYER_WORDS)}, got {text!r}."
        ) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConversionError: The file cannot be read, or holds no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"The recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConversionError(f"The recipe {str(path)!r} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConversionError(f"The recipe {str(path)!r} must be a mapping from keys to values, got {values!r}.")
    return values


def read_recipe(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from a YAML file, flags, or both.

    Args:
        path: YAML file; None for flags only.
        flags: Values by field name; they win over the file. Besides the fields of `Recipe`: `stages` as text
            (`"init,align"`) chooses among the stages of the file, or takes them with their defaults; `tokens` and `lr`
            go to every chosen stage that trains; `set` is a list of texts such as `"align.lr=1e-3"`.

    Raises:
        ConversionError: One sentence about the first thing wrong.
    """
    values, flags = read_yaml(path) if path is not None else {}, dict(flags or {})
    given = values.pop("stages", [stage.name for stage in default_stages()])
    if not isinstance(given, list):
        raise ConversionError(f"`stages` must be a list of {', '.join(STAGES)}, got {given!r}.")
    stages = [dict(stage) if isinstance(stage, Mapping) else {"name": stage} for stage in given]
    chosen = flags.pop("stages", None)
    if chosen is not None:
        stages = choose_stages(stages, [name.strip() for name in chosen.split(",")])
    for name in ("tokens", "lr"):
        if (value := flags.pop(name, None)) is not None:
            for stage in stages:
                if stage.get("name") != "init":
                    stage[name] = value
    for assignment in flags.pop("set", None) or ():
        target, value = split_assignment(assignment, "set")
        name, _, key = target.partition(".")
        matching = [stage for stage in stages if stage.get("name") == name]
        if not matching or not key:
            names = ", ".join(str(stage.get("name")) for stage in stages)
            raise ConversionError(
                f"`set` takes STAGE.KEY=VALUE with a stage of this run ({names}), got {assignment!r}."
            )
        for stage in matching:
            stage[key] = value
    merged = values | {key: value for key, value in flags.items() if value is not None}
    if values.get("memory_options") and isinstance(merged.get("memory_options"), dict):
        merged["memory_options"] = {**values["memory_options"], **merged["memory_options"]}
    for name in ("teacher", "output"):
        if merged.get(name) in (None, ""):
            accepts = Recipe.__dataclass_fields__[name].metadata["accepts"]
            raise ConversionError(f"`{name}` is missing: name {accepts}.")
    return build(Recipe, {**merged, "stages": [build_stage(stage) for stage in stages]})


def choose_stages(stages: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """The stages that bear one of the names, in their own order; a name that none bears gets a stage of defaults."""
    present = {stage.get("name") for stage in stages}
    kept = [stage for stage in stages if stage.get("name") in names]
    return kept + [{"name": name} for name in names if name not in present]


def split_assignment(text: str, flag: str) -> tuple[str, Any]:
    """`"name=value"` as a name and a YAML scalar."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConversionError(f"`{flag}` takes NAME=VALUE, got {text!r}.")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConversionError(f"The value in `{flag}` {text!r} is no YAML scalar.") from None


__all__ = ["ConversionError", "Recipe", "read_recipe"]
