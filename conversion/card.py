"""What a card says of a conversion: teacher, recipe, figures. The card itself is `hf_memory.hub.cards`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_memory._cli.loading import load_config
from hf_memory.conversion.adapters import FOLDER as ADAPTER_FOLDER
from hf_memory.conversion.auto_layers import LABEL as SEARCH
from hf_memory.conversion.data import TEACHER, looks_like_a_path
from hf_memory.conversion.report import Report, markdown_tables, notes, shortcomings
from hf_memory.hub import cards
from hf_memory.hub.remote_code import EXPORTABLE


RECIPE = "recipe.yaml"
# Entries of a recipe that may be paths.
_PATHS = ("teacher", "data", "held_out")
# What is of no use to others.
_OWN = ("output", "checkpoint_seconds", "code", "report_to", "device_map", "stream")
_STAGES = {
    "align": "each converted layer learns to give what the teacher's gives.",
    "on_policy": "the model writes, and learns what the teacher says about each token of it.",
}


def write_card(
    folder: Path | str,
    *,
    config: Any,
    teacher: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    report: Report | None = None,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """
    Write `README.md` of a saved model from what is known of its conversion and of its figures.

    The card names no path of this machine: a teacher or a text that is given as a path goes by the name of its folder
    or file.

    Args:
        folder: where the model was saved. Its `*.py` and `report.png` are mentioned if they are there.
        config: the model's configuration.
        teacher: path or Hub id of the teacher. Its own card's license and language are taken over if it states them
            and is at hand without a download. Default: that of the recipe; a model without one was not converted.
        recipe: plain values of the recipe. Default: left out.
        report: see `hf_memory.conversion.report`. Default: the card says that nothing was measured.
        revision: branch, tag or commit of a teacher on the Hub.
        metadata: entries of the header that win over what is found, see `hf_memory.hub.cards.write_card`.

    Returns:
        The file written.
    """
    folder, report = Path(folder), report or {}
    teacher = teacher or (recipe or {}).get("teacher")
    found, named, title = {}, "", None
    if teacher is not None:
        name, is_hub = teacher_name(teacher)
        found = _inherited(teacher, is_hub, revision)
        if is_hub:
            found |= {"base_model": name, "base_model_relation": "finetune"}
        named = f"[{name}](https://huggingface.co/{name})" if is_hub else f"`{name}`"
        if _is_hybrid(config) and config.memory_layers:
            title = f"{name} with {config.memory['model_type'].capitalize()} memory"
    if datasets := _datasets(recipe):
        found["datasets"] = datasets
    shown = yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True).strip() if recipe else ""
    return cards.write_card(
        folder,
        config,
        title=title,
        metadata=found | {key: value for key, value in (metadata or {}).items() if value},
        made=cards.Made(teacher=named, history=_history(config, recipe, report, folder.name), recipe=shown),
        measured=_measured(folder, report),
    )


def refill_card(folder: Path | str, metadata: Mapping[str, Any] | None = None, replace: bool = False) -> Path:
    """
    Write `README.md` of a saved model from the files in its folder: `config.json`, and where they are `report.json`,
    `recipe.yaml`, and the header of the card that is there.

    Args:
        folder: of the model.
        metadata: entries of the header that win over those of the card that is there.
        replace: whether a card that was written by hand may be replaced.

    Raises:
        UserError: for a folder that holds no model.
        CardError: for a model of another library, a file that cannot be read, or a card that was written by hand.
    """
    folder = Path(folder)
    config = load_config(str(folder))
    if config.model_type not in EXPORTABLE:
        raise cards.CardError(
            f"{str(folder)!r} holds a {config.model_type} model: cards are filled for {', '.join(EXPORTABLE)}."
        )
    readme = folder / "README.md"
    if readme.is_file() and not replace and not cards.is_ours(readme):
        raise cards.CardError(f"{str(readme)!r} was written by hand: pass --force to put a filled card in its place.")
    report, recipe = _read(folder / "report.json", json.loads), _read(folder / RECIPE, yaml.safe_load)
    if report and not isinstance(report.get("models"), dict):
        raise cards.CardError(f"{str(folder / 'report.json')!r} is no report of hf-memory: it has no `models`.")
    return write_card(
        folder, config=config, recipe=recipe, report=report, metadata=cards.read_metadata(readme) | (metadata or {})
    )


def write_recipe(folder: Path | str, recipe: Mapping[str, Any]) -> Path:
    """Write `recipe.yaml` of a converted model, for its card and for whoever wants to do the same."""
    file = Path(folder) / RECIPE
    beside = file.with_name(f".{RECIPE}.partial")
    text = yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)
    return file


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise cards.CardError(f"{str(file)!r} cannot be read: remove it, or put it right.")
    return found


def teacher_name(teacher: str) -> tuple[str, bool]:
    """Name for a card, and whether it is an id on the Hub: of a path only the last folder is told."""
    if not Path(teacher).expanduser().exists():
        try:
            validate_repo_id(teacher)
        except HFValidationError:
            return Path(teacher).name, False
        return teacher, True
    return Path(teacher).expanduser().resolve().name, False


def _inherited(teacher: str, is_hub: bool, revision: str | None) -> dict[str, Any]:
    """License and language as the teacher's card states them."""
    if is_hub:
        found = try_to_load_from_cache(teacher, "README.md", revision=revision)
        file = Path(found) if isinstance(found, str) else None
    else:
        file = Path(teacher).expanduser() / "README.md"
    return cards.read_metadata(file, cards.INHERITED) if file is not None else {}


def _datasets(recipe: Mapping[str, Any] | None) -> list[str]:
    """Those texts of a recipe that are data sets on the Hub."""
    sources = (recipe or {}).get("data") or []
    sources = [sources] if isinstance(sources, str) else sources
    return [
        source.split(":")[0]
        for source in sources
        if source != TEACHER and not (looks_like_a_path(source) or Path(source).exists())
    ]


def _measured(folder: Path, report: Report) -> cards.Measured:
    if not report.get("models"):
        return cards.Measured()
    try:
        return cards.Measured(
            table=markdown_tables(report),
            notes=notes(report),
            worse=shortcomings(report),
            results=_results(report),
            picture="report.png" if (folder / "report.png").is_file() else "",
            picture_text="loss of every stage, held-out loss by position, size of the cache, recall",
        )
    except (AttributeError, KeyError, TypeError) as error:
        # A file that somebody changed.
        raise cards.CardError(f"The report in {folder.name!r} does not have the form of a report.") from error


def _results(report: Report) -> list[EvalResult]:
    quality = report.get("models", {}).get(report.get("student", "student"), {}).get("quality", {})
    whole = quality.get("whole", {})
    names = {
        "bits_per_byte": "bits per byte",
        "bits_per_token": "bits per token",
        "kl_bits_per_token": "KL(teacher || model), bits per token",
        "agreement": "agreement with the teacher's likeliest token",
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=report.get("text", "held-out text"),
            metric_type=key,
            metric_name=name,
            metric_value=round(whole[key], 6),
        )
        for key, name in names.items()
        if whole.get(key) is not None
    ]


def _is_hybrid(config: Any) -> bool:
    return config.model_type == "memory_hybrid"


def _history(config: Any, recipe: Mapping[str, Any] | None, report: Report, name: str) -> str:
    sentences = []
    if _is_hybrid(config) and config.memory_layers:
        sentences.append("The memories start from the projections of the attention that they replace or accompany.")
    # Without a curve of it, another conversion made the search and this one took its layers over.
    if searched := [curve for curve in report.get("curves", []) if curve["stage"] == SEARCH]:
        sentences.append(
            "The layers are those that cost the least, measured after an alignment of memories in all layers "
            f"({searched[0]['tokens'][-1]:,} tokens), which the memories here start from."
        )
    for stage in (recipe or {}).get("stages", []):
        sentences += _told(stage, name)
    if text := report.get("text"):
        sentences.append(f"Measured on {text}.")
    return " ".join(sentences)


def _told(stage: Mapping[str, Any], name: str) -> list[str]:
    """What a stage did, for the model called `name`; nothing of a stage that does not train."""
    description = _distilled(stage) if stage.get("name") == "distill" else _STAGES.get(stage.get("name"))
    if description is None:
        return []
    most = "at most " if stage.get("stop_below") else ""
    budget = f" ({most}{stage['tokens']:,} tokens, learning rate {stage['lr']:g})" if stage.get("tokens") else ""
    sentences = [f"Stage `{stage['name']}`{budget}: {description}"]
    if target := stage.get("target"):
        sentences.append(f"Compared was the {target}.")
    if rank := stage.get("lora_rank"):
        sentences.append(
            f"It trained adapters of rank {rank} and merged them into the weights."
            if stage.get("lora_merge")
            else f"It trained adapters of rank {rank}, which lie beside the weights and were at work in all "
            f'measurements: load them with `PeftModel.from_pretrained(model, "{name}", subfolder="{ADAPTER_FOLDER}")`.'
        )
    elif stage.get("trainable") == "all" and stage["name"] == "align":
        sentences.append("All weights of those layers were trained in it.")
    elif stage.get("trainable") == "all":
        sentences.append("All weights were trained in it, the teacher's too.")
    return sentences


def _distilled(stage: Mapping[str, Any]) -> str:
    aims = []
    if stage.get("kl_weight", 1):
        aims.append("the teacher's distribution of the next token")
    if stage.get("ce_weight"):
        aims.append("the next token of the text")
    return f"the model learns {', and '.join(aims)}."


def without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for others: a path is `./` and its last part, and what has no effect on the weights is left out."""
    kept = {key: value for key, value in recipe.items() if key not in _OWN}
    return {key: _named(value) if key in _PATHS else value for key, value in kept.items()}


def _named(value: Any) -> Any:
    """A path by its last part; ids of the Hub and everything else as they are."""
    if isinstance(value, (list, tuple)):
        return [_named(item) for item in value]
    if isinstance(value, str) and (looks_like_a_path(value) or "\\" in value or Path(value).exists()):
        return f"./{Path(value).expanduser().resolve().name}"
    return value
