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

from hf_memory.conversion.gate import parse
from hf_memory.conversion.layer_choice import ACCEPTS, is_auto, is_budget, layer_numbers, parse_layers
from hf_memory.conversion.recipe_file import find_recipe, read_yaml
from hf_memory.conversion.schema import (
    ConversionError,
    FileList,
    FileMapping,
    as_number,
    build,
    count,
    not_negative,
    one_of,
    option,
    override,
    place,
    plain,
    positive,
    unknown_key,
)
from hf_memory.conversion.stage_options import (
    REPLACED_ONLY,
    STAGES,
    AlignStage,
    Stage,
    TrainingStage,
    build_stage,
    default_stages,
)
from hf_memory.models import ARCHITECTURES


CONTROLS = ("off", "continued")
# Words that accelerate turns into a placement by the memory that is there.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


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
    memory: str = one_of("titans", tuple(ARCHITECTURES), "Architecture of the memories.")
    memory_options: dict = option({}, "a mapping from fields of the memory's config to values")
    layers: str | int | list[int] = option(
        "odd",
        ACCEPTS,
        lambda value: not isinstance(value, bool),
        help='Layers to convert: "1,3,5", all, odd, even, lower (the first half), none, every:K (attention stays at '
        "every K-th), ratio:R (a share, evenly spread), auto:K (the K that cost least), auto (as many as "
        "--cache-budget needs).",
    )
    cache_budget: str | None = option(
        None,
        "a size in KiB, MiB or GiB and a length in tokens, such as 64MiB@32768",
        is_budget,
        "What the cache of one sequence may take, such as 64MiB@32768; --layers auto finds the layers.",
    )
    auto_tokens: int | None = count(None, "Tokens on which auto aligns all layers; as many as the first align stage.")
    auto_blocks: int = count(8, "Blocks on which auto measures what a layer costs.")
    chosen_layers: list[int] | None = option(None, "what auto found: layer numbers; nothing is measured then")
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
    device_map: str | dict | None = option(
        None,
        "auto, balanced, balanced_low_0, sequential, or a mapping from modules to devices",
        lambda value: value in DEVICE_MAPS if isinstance(value, str) else bool(value),
        "Spread the teacher over devices, the CPU and the disk: auto, balanced, ...; a mapping in a recipe.",
    )
    teacher_bits: int | None = option(
        None, "8 or 4", (8, 4).__contains__, "Hold the teacher in 8 or 4 bits, through bitsandbytes."
    )
    stream: bool = option(
        False, "true or false", help="Read the teacher's layers from disk one at a time, whenever they are called."
    )
    stages: list[Stage] = option(default_stages(), f"a list of {', '.join(STAGES)}")
    checkpoint_seconds: float | int = not_negative(300, "Time between two checkpoints.")
    report_to: list[str] = option(
        [], "a list of trackers", help="Tracker such as tensorboard or wandb, as accelerate names it; repeat for more."
    )
    code: bool = option(True, "true or false")
    require: str | list[str] = option(
        [], "texts such as kl<0.05", help='Fails the run unless it holds: "kl<0.05", "gap<3%", ...; repeat for more.'
    )
    evaluate_stages: bool = option(True, "true or false", help="Measure behind every stage, not at the end only.")
    controls: str | list[str] = option(
        [],
        "off, continued, or a list of these",
        help='Controls: "continued" trains the teacher on with the same text; "off" is always measured.',
    )
    continued_lr: float | int = positive(1e-4, "Learning rate of the teacher that is trained on.")
    recall_samples: int = option(
        8,
        "a whole number of at least 0",
        lambda value: not isinstance(value, bool) and value >= 0,
        "Texts of the recall probe for each length and depth; 0 leaves it out.",
    )

    # These change when or where something is written, not the weights that come out.
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        *("output", "checkpoint_seconds", "code", "report_to", "device_map", "stream"),
        *("require", "evaluate_stages", "controls", "recall_samples"),
    )

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            self.layers = parse_layers(self.layers)
        elif isinstance(self.layers, int):
            self.layers = [self.layers]
        if isinstance(self.data, list) and len(self.data) == 1:
            self.data = self.data[0]
        self.require, self.controls = (
            [value] if isinstance(value, str) else value for value in (self.require, self.controls)
        )

    def validate_layers(self) -> None:
        """Part of `@strict`-powered validation: each layer once."""
        if isinstance(self.layers, list) and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"`layers` names a layer twice: {self.layers}")

    def validate_auto(self) -> None:
        """Part of `@strict`-powered validation: how many layers auto finds is said once, and it has text to read."""
        if not is_auto(self.layers):
            if self.chosen_layers is not None:
                raise ValueError(f"`chosen_layers` belongs to `layers: auto`, not to {self.layers!r}")
            return
        if (self.layers == "auto") == (self.cache_budget is None):
            raise ValueError(
                "`layers` auto:K says how many layers, auto lets `cache_budget` say it: give one of the two, got "
                f"{self.layers!r} and cache_budget {self.cache_budget!r}"
            )
        if self.data is None:
            raise ValueError(f"`data` is missing: `layers` {self.layers} measures on text")

    def validate_window(self) -> None:
        """Part of `@strict`-powered validation: a window exists in retrofit mode only."""
        if self.mode == "replace" and self.window is not None:
            raise ValueError(f"`window` ({self.window}) belongs to mode retrofit: set that mode, or drop the window")

    def validate_placement(self) -> None:
        """Part of `@strict`-powered validation: one way to make the teacher small."""
        given = [name for name in ("device_map", "teacher_bits") if getattr(self, name) is not None]
        if self.stream and given:
            raise ValueError(f"`stream` and `{given[0]}` both say where the teacher lies: leave one of them out")

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

    def validate_require(self) -> None:
        """Part of `@strict`-powered validation: requirements that can be read, on figures that will be measured."""
        for name in self.controls:
            if name not in CONTROLS:
                raise ValueError(f"`controls` must be made of {', '.join(CONTROLS)}, got {name!r}")
        names = {parse(text).name for text in self.require}
        if self.data is None and (names or "continued" in self.controls):
            what = "require" if names else "controls"
            raise ValueError(f"`{what}` needs text to measure on: set `data`, or drop it")
        if "gap_continued" in names and "continued" not in self.controls:
            raise ValueError("`require` names gap_continued, for which `controls` must have continued")
        if "recall" in names and not self.recall_samples:
            raise ValueError("`require` names recall, for which `recall_samples` must be above 0")

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
        """`layers` as numbers, for a teacher of so many layers; with auto, all that it may choose from.

        Raises:
            ConversionError: A layer that the teacher does not have.
        """
        if self.chosen_layers is not None:
            return layer_numbers(self.chosen_layers, num_layers)
        return layer_numbers(self.layers, num_layers)

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


def read_recipe(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from a YAML file, flags, or both.

    Args:
        path: YAML file, or the name of a recipe that comes with the package; None for flags only.
        flags: Values by field name; they win over the file. `context` and `batch_size` go to the stages too. Besides
            the fields of `Recipe`: `stages` as text (`"init,align"`) chooses among the stages of the file, or takes
            them with their defaults; `scale` multiplies all budgets of the file; `tokens` and `lr` go to every chosen
            stage that trains; `set` is a list of texts such as `"align.lr=1e-3"`. Another `memory` than that of the
            file leaves the file's `memory_options` out, `layers` or `cache_budget` its `chosen_layers`.

    Raises:
        ConversionError: One sentence about the first thing wrong, with the file and line where it stands.
    """
    values: dict[str, Any] = {} if path is None else read_yaml(find_recipe(path))
    flags = {key: value for key, value in (flags or {}).items() if value is not None}
    stages = _stages_of(values)
    chosen = flags.pop("stages", None)
    if chosen is not None:
        stages = choose_stages(stages, [name.strip() for name in chosen.split(",")])
    if (scale := flags.pop("scale", None)) is not None:
        _scale_budgets(values, stages, scale)
    _override_stages(stages, flags)
    _drop_outdated(values, flags)
    for key, value in flags.items():
        if key == "memory_options" and isinstance(value, dict) and isinstance(values.get(key), dict):
            for name, option_value in value.items():
                override(values[key], name, option_value)
        else:
            override(values, key, value)
    if values.get("cache_budget") is not None:
        values.setdefault("layers", "auto")
    for name in ("teacher", "output"):
        if values.get(name) in (None, ""):
            accepts = Recipe.__dataclass_fields__[name].metadata["accepts"]
            raise ConversionError(f"`{name}` is missing: name {accepts}.")
    values["stages"] = [build_stage(stage) for stage in stages]
    recipe = build(Recipe, values)
    _check_memory(recipe, values.get("memory_options", {}))
    return recipe


def _stages_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a file, or all with their defaults, as mappings with a `name`; anything else is taken for one."""
    given = values.get("stages", [stage.name for stage in default_stages()])
    if not isinstance(given, list):
        raise ConversionError(
            f"{place(values, 'stages')}`stages` must be a list of {', '.join(STAGES)}, got {given!r}."
        )
    stages = []
    for number, stage in enumerate(given):
        if not isinstance(stage, dict) and isinstance(given, FileList):
            line = given.lines[number]
            stage = FileMapping({"name": plain(stage)}, values.file, line, {"name": line})
        stages.append(stage if isinstance(stage, dict) else {"name": stage})
    return stages


def _labels(stages: list[dict[str, Any]]) -> list[str]:
    """`align`, `align2`, ...: names of stages that are different from each other."""
    names = [str(stage.get("name")) for stage in stages]
    return [name + (str(seen + 1) if (seen := names[:i].count(name)) else "") for i, name in enumerate(names)]


def _scale_budgets(values: dict[str, Any], stages: list[dict[str, Any]], scale: Any) -> None:
    """Multiply what the stages, and auto, are to read; what is no number is left to the checks."""
    factor = as_number(scale, float | int)
    if isinstance(factor, (str, bool)) or not 0 < factor < math.inf:
        raise ConversionError(f"`scale` must be a number above 0, got {scale!r}.")

    def scaled(tokens: Any) -> Any:
        tokens = as_number(tokens, int)
        return max(1, round(tokens * factor)) if type(tokens) is int and tokens > 0 else tokens

    for stage in stages:
        kind = STAGES.get(stage.get("name")) if isinstance(stage.get("name"), str) else None
        if kind is not None and issubclass(kind, TrainingStage):
            stage["tokens"] = scaled(stage.get("tokens", kind.__dataclass_fields__["tokens"].default))
    if values.get("auto_tokens") is not None:
        values["auto_tokens"] = scaled(values["auto_tokens"])


def _override_stages(stages: list[dict[str, Any]], flags: dict[str, Any]) -> None:
    """Give the stages what flags say about them; `tokens`, `lr` and `set` are taken out of the flags."""
    for name in ("tokens", "lr"):
        if (value := flags.pop(name, None)) is not None:
            for stage in stages:
                if stage.get("name") != "init":
                    override(stage, name, value)
    for name in ("context", "batch_size"):
        if name in flags:
            for stage in stages:
                stage.pop(name, None)
    for assignment in flags.pop("set", ()):
        target, value = split_assignment(assignment, "set")
        name, _, key = target.partition(".")
        labels = _labels(stages)
        matching = [stage for stage, label in zip(stages, labels) if name in (label, stage.get("name"))]
        if not matching or not key:
            raise ConversionError(
                f"`set` takes STAGE.KEY=VALUE with a stage of this run ({', '.join(labels)}), got {assignment!r}."
            )
        for stage in matching:
            override(stage, key, value)


def _drop_outdated(values: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Take out of a file what belongs to a setting that flags replace."""
    if flags.get("memory") not in (None, values.get("memory", Recipe.memory)):
        values.pop("memory_options", None)
    if "layers" in flags or "cache_budget" in flags:
        values.pop("chosen_layers", None)


def _check_memory(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Names and types of the memory's options, before a model is at hand that could take them.

    Args:
        recipe: Checked.
        given: Its `memory_options`, which may know their lines.
    """
    from hf_memory.configuration import MemoryConfig

    config_class = ARCHITECTURES[recipe.memory].load("config")
    shared = MemoryConfig.__dataclass_fields__
    own = [name for name in config_class.__dataclass_fields__ if name not in shared]
    if (unknown := unknown_key(given, own, "memory_options.", shared)) is not None:
        raise unknown
    for name, value in given.items():
        try:
            for validator in config_class.__validators__.get(name, ()):
                validator(plain(value))
        except (TypeError, ValueError) as error:
            raise ConversionError(
                f"{place(given, name)}`memory_options.{name}` of {recipe.memory} does not take {plain(value)!r}: "
                f"{' '.join(str(error).split())}"
            ) from error


def choose_stages(stages: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """The stages with one of the names or labels, in their own order; a name that none bears gets the defaults."""
    labels = _labels(stages)
    kept = [stage for stage, label in zip(stages, labels) if label in names or stage.get("name") in names]
    present = {*labels, *(str(stage.get("name")) for stage in stages)}
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
