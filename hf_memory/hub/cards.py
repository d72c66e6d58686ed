"""Model cards: the `README.md` of a model folder, filled from its configuration and from what was measured.

`model_cards/card.md` is the frame, `model_cards/<model_type>.md` has what only an architecture can say. Nothing is
downloaded, and nothing is said that is not in the folder or given.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers.configuration_utils import PreTrainedConfig

import hf_memory
from hf_memory._cli.loading import UserError
from hf_memory._cli.state_size import build_without_weights, kv_cache_bytes, layer_states, readable_size
from hf_memory.memory_file import DOCUMENT


MARK = "<!-- Filled by hf-memory from the files of this folder; a card with this line is replaced by the next one. -->"
"""In every card that we write. One without it was written by hand, and is left alone."""

CONTEXTS = (1024, 32 * 1024, 1024 * 1024)
INHERITED = ("license", "license_name", "license_link", "language")
"""What a model takes over from the card of its teacher."""

KEPT = (*INHERITED, "base_model", "base_model_relation", "datasets", "thumbnail")
"""What a new card takes over from the one that it replaces."""

FRAME = "card.md"
# The kind of a model, by the last part of its class name.
_KINDS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "Model": ("AutoModel", "feature-extraction"),
}


class CardError(ValueError):
    """A sentence for the user: why a card cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """
    How a model came to be.

    Args:
        teacher: the model it was made from, as markdown.
        history: sentences.
        recipe: YAML.
    """

    teacher: str = ""
    history: str = ""
    recipe: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """
    What was measured on a model.

    Args:
        table: markdown.
        notes: sentences below it.
        worse: sentences on everything in which the model is worse than what it was made from.
        results: the same for the Hub's `model-index`.
        picture: a file of the folder, and `picture_text` what it shows.
    """

    table: str = ""
    notes: Sequence[str] = ()
    worse: Sequence[str] = ()
    results: Sequence[EvalResult] = field(default_factory=list)
    picture: str = ""
    picture_text: str = ""


def write_card(
    folder: Path | str,
    config: PreTrainedConfig,
    *,
    name: str | None = None,
    title: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    made: Made | None = None,
    measured: Measured | None = None,
) -> Path:
    """
    Write `README.md` of a saved model, in one step.

    Args:
        folder: where the model was saved.
        config: its configuration.
        name: of the model. Default: that of the folder.
        title: heading. Default: the name.
        metadata: entries of the card's header that configuration and measurements do not give: `license`, `language`,
            `base_model`, `base_model_relation`, `datasets`, and more `tags`.
        made: default: nothing is said of it.
        measured: default: the card says that nothing was measured.

    Returns:
        The file.

    Raises:
        CardError: for a model type without a template.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    metadata = {key: value for key, value in (metadata or {}).items() if value}
    measured = measured or Measured()
    text = render(folder, config, name, title or name, card_data(config, name, metadata, measured), made, measured)
    beside = folder / ".README.md.partial"
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, folder / "README.md")
    return folder / "README.md"


def card_data(
    config: PreTrainedConfig, name: str, metadata: Mapping[str, Any], measured: Measured | None = None
) -> ModelCardData:
    """The header of a card: what the Hub reads."""
    inside, metadata = _memory_config(config), dict(metadata)
    tags = ["hf-memory", config.model_type, inside and inside.model_type, getattr(config, "base_model_type", None)]
    tags += ["memory", *(metadata.pop("tags", None) or [])]
    kind = _kind(config)
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=kind[1] if kind else None,
        tags=list(dict.fromkeys(filter(None, tags))),
        eval_results=list(measured.results) or None if measured is not None else None,
        **metadata,
    )


def render(
    folder: Path,
    config: PreTrainedConfig,
    name: str,
    title: str,
    data: ModelCardData,
    made: Made | None,
    measured: Measured,
) -> str:
    """The text of a card."""
    inside = _memory_config(config)
    for model_type in filter(None, (config.model_type, inside and inside.model_type)):
        if not (template_folder() / f"{model_type}.md").is_file():
            raise CardError(f"There is no card for {model_type!r}: model_cards/{model_type}.md is missing.")
    kind, code = _kind(config), [path.name for path in folder.glob("*.py")]
    dtype = _dtype(config)
    text = (
        _environment()
        .get_template(FRAME)
        .render(
            metadata=data.to_yaml(),
            mark=MARK,
            title=title,
            repository=name,
            config=config,
            model_type=config.model_type,
            memory_config=inside,
            memory_type=inside.model_type if inside is not None else None,
            auto_class=kind[0] if kind else "AutoModel",
            pipeline_tag=kind[1] if kind else None,
            has_code=bool(code),
            has_tokenizer=(folder / "tokenizer_config.json").is_file(),
            has_kernels=any("triton" in file for file in code),
            parameters=_count_parameters(folder, config, dtype),
            dtype=str(dtype).removeprefix("torch."),
            states=_states(config, dtype),
            made=made or Made(),
            measured=measured,
        )
    )
    # What a template leaves out takes its blank lines along.
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_metadata(file: Path | str, keys: Iterable[str] = KEPT) -> dict[str, Any]:
    """Entries of the header of a card on this machine; nothing where there is no card or no readable header."""
    file = Path(file)
    if not file.is_file():
        return {}
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        # A card without readable metadata states nothing.
        return {}
    return {key: data[key] for key in keys if data.get(key)}


def is_ours(file: Path | str) -> bool:
    """Whether a card was filled by us, so that the next one may take its place."""
    return MARK in Path(file).read_text(encoding="utf-8", errors="replace")


def template_folder() -> Path:
    """`model_cards`: beside the package in a checkout, inside of it once installed."""
    package = Path(hf_memory.__file__).resolve().parent
    return next(folder for folder in (package / "model_cards", package.parent / "model_cards") if folder.is_dir())


def listed(noun: str, numbers: Iterable[int]) -> str:
    """`"layer 3"`, `"layers 1, 3 and 5"`, and nothing for none."""
    *others, last = [str(number) for number in numbers] or [""]
    return f"{noun}s {', '.join(others)} and {last}" if others else f"{noun} {last}" if last else ""


def _environment() -> Any:
    # Comes with torch.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["listed"] = lambda numbers, noun: listed(noun, numbers)
    return environment


def _memory_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Configuration of the memories inside a hybrid."""
    return config.make_memory_config() if getattr(config, "memory_layers", None) else None


def _count_parameters(folder: Path, config: PreTrainedConfig, dtype: Any) -> int | None:
    """Numbers in the files of weights; without them those of the causal language model, if the folder is for one."""
    if files := sorted(folder.glob("*.safetensors")):
        count = 0
        for file in files:
            with safe_open(file, framework="numpy") as weights:
                if DOCUMENT in (weights.metadata() or {}):
                    # A memory file beside the weights.
                    continue
                count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
        return count
    is_causal_lm = _kind(config) == _KINDS["ForCausalLM"]
    return build_without_weights(config, dtype).num_parameters() if is_causal_lm else None


def _states(config: PreTrainedConfig, dtype: Any) -> list[dict[str, Any]]:
    try:
        layers = layer_states(config, dtype)
    except UserError:
        # A teacher that does not run without weights and is too large to try.
        return []
    return [
        {
            "tokens": tokens,
            "state": readable_size(sum(layer.after(tokens) for layer in layers)),
            "kv": readable_size(kv_cache_bytes(config, dtype, tokens)),
        }
        for tokens in CONTEXTS
    ]


def _kind(config: PreTrainedConfig) -> tuple[str, str] | None:
    name = (config.architectures or ["ForCausalLM"])[0]
    return next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), None)


def _dtype(config: PreTrainedConfig) -> Any:
    import torch

    # A configuration that was not read from a file may hold the name only.
    return getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype or torch.float32
