"""The model card (README.md) of a converted model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_memory.conversion.report import Report, listed, markdown_table, notes


# In a checkout the folder `model_cards` lies beside `conversion`, in a wheel beside `hf_memory/conversion`.
TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "memory_hybrid.md"
_INHERITED = ("license", "license_name", "license_link", "language")
# Entries of a recipe that may be paths.
_PATHS = ("teacher", "data", "held_out")
_STAGES = {
    "align": "each converted block learns to give the teacher's output for the teacher's own input.",
    "distill": "the model learns the teacher's distribution of the next token.",
}


def write_card(
    folder: Path | str,
    *,
    config: Any,
    teacher: str,
    recipe: Mapping[str, Any] | None = None,
    report: Report | None = None,
    revision: str | None = None,
) -> Path:
    """
    Write `README.md` of a saved model.

    The card names no path of this machine: a teacher or a text that is given as a path goes by the name of its folder
    or file.

    Args:
        folder: where the model was saved. Its `*.py` and `report.png` are mentioned if they are there.
        config: the model's `MemoryHybridConfig`.
        teacher: path or Hub id of the teacher. Its own card's license and language are taken over if it states them
            and is at hand without a download.
        recipe: plain values of the recipe. Default: left out.
        report: see `hf_memory.conversion.report`. Default: the card says that nothing was measured.
        revision: branch, tag or commit of a teacher on the Hub.

    Returns:
        The file written.
    """
    folder = Path(folder)
    name, is_hub = teacher_name(teacher)
    report = report or {}
    data = _metadata(folder.name, name, is_hub, _inherited(teacher, is_hub, revision), config, report)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=f"{name} with {_memory_name(config)} memory",
        summary=_summary(name, is_hub, config),
        repository=folder.name,
        has_code=any(folder.glob("*.py")),
        history=_history(recipe, report),
        recipe=yaml.safe_dump(_without_paths(recipe), sort_keys=False, allow_unicode=True).strip() if recipe else "",
        table=markdown_table(report) if report.get("models") else "",
        notes=notes(report) if report.get("models") else [],
        picture=(folder / "report.png").is_file(),
        picture_text="loss of every stage, held-out loss by position, size of the cache",
        limits=_limits(config, report),
    )
    beside = folder / ".README.md.part"
    beside.write_text(str(card), encoding="utf-8")
    os.replace(beside, folder / "README.md")
    return folder / "README.md"


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
    if file is None or not file.is_file():
        return {}
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        # A card without readable metadata states nothing.
        return {}
    return {key: data[key] for key in _INHERITED if data.get(key)}


def _metadata(
    model_name: str, teacher: str, is_hub: bool, inherited: dict[str, Any], config: Any, report: Report
) -> ModelCardData:
    base = {"base_model": teacher, "base_model_relation": "finetune"} if is_hub else {}
    return ModelCardData(
        model_name=model_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-memory", config.model_type, config.memory["model_type"], config.base_model_type, "memory"],
        eval_results=_results(report) or None,
        **base,
        **inherited,
    )


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


def _memory_name(config: Any) -> str:
    return config.memory["model_type"].capitalize()


def _summary(teacher: str, is_hub: bool, config: Any) -> str:
    named = f"[{teacher}](https://huggingface.co/{teacher})" if is_hub else f"`{teacher}`"
    layers, count = config.memory_layers, config.num_hidden_layers
    if not layers:
        return f"{named} as a hybrid model of which no layer is converted: the same function under another name."
    memory = f"a {_memory_name(config)} memory"
    where = f"{listed('layer', layers)} of {count} (counted from 0)"
    if config.memory_mode == "replace":
        return (
            f"{named} with {memory} in place of the self-attention of {where}. Everything else is built as in the "
            "teacher."
        )
    return (
        f"{named} with {memory} beside the self-attention of {where}, which sees {config.memory_window:,} tokens "
        "only. Everything else is built as in the teacher."
    )


def _history(recipe: Mapping[str, Any] | None, report: Report) -> str:
    sentences = ["The memories start from the projections of the attention that they replace or accompany."]
    for stage in (recipe or {}).get("stages", []):
        if description := _STAGES.get(stage.get("name")):
            budget = f" ({stage['tokens']:,} tokens, learning rate {stage['lr']:g})" if stage.get("tokens") else ""
            sentences.append(f"Stage `{stage['name']}`{budget}: {description}")
            if stage.get("trainable") == "all":
                sentences.append("All weights were trained in it, the teacher's too.")
    if text := report.get("text"):
        sentences.append(f"Measured on {text}.")
    return " ".join(sentences)


def _limits(config: Any, report: Report) -> list[str]:
    kept = config.num_hidden_layers - len(config.memory_layers)
    limits = []
    if kept:
        limits.append(
            f"{kept} of {config.num_hidden_layers} layers keep their attention: their key/value cache grows with "
            "every token, and so does the work per token."
        )
    if report.get("models"):
        limits.append(
            "The figures above are all that was measured. Nothing is claimed about other text or longer context."
        )
    limits.append("What the teacher is unfit for, this model is unfit for too; its license and terms go on to apply.")
    return limits


def _without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _named(value) if key in _PATHS else value for key, value in recipe.items() if key != "output"}


def _named(value: Any) -> Any:
    """A path by its last part; ids of the Hub and everything else as they are."""
    if isinstance(value, (list, tuple)):
        return [_named(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", ".", "~")) or "\\" in value or Path(value).exists()):
        return Path(value).expanduser().resolve().name
    return value
