"""Which model a memory belongs to: the configuration's fields that change the function, and hashes of the weights.

A memory goes on with

- the same weights under any head, on any device, with any attention implementation: bit for bit where the arithmetic
  is the same;
- the same weights cast between float32 and bfloat16, either way: up to rounding.

Weights that were cast to or from float16, quantised, trained, given an adapter (added, merged or switched), or whose
embedding was resized, are another model.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel


# Fields of configurations that leave what a memory holds as it is. The size of the vocabulary is one of them: the
# weights of the embedding say more about it.
_WITHOUT_EFFECT = re.compile(
    r"vocab_size|initializer_range|use_cache|tie_word_embeddings|pretraining_tp|\w*token_ids?|\w*dropout"
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What a model on the Hub is called: nothing that could be more than a name in a card or a command."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Hashes of the weights that a memory depends on.

    Attributes:
        dtype: of the first floating-point weight, for messages.
        exact: of names, shapes, dtypes and bits.
        rounded: of names, shapes and values rounded to bfloat16, which casts between float32 and bfloat16 leave alone.
    """

    dtype: str
    exact: str
    rounded: str


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """What a memory file says about the model that made it.

    Attributes:
        model_type: of the configuration.
        name: id on the Hub, where the model came from there.
        config: fields that change the function.
        weights: `None` where they cannot be hashed: sharded, offloaded to disk, or packed in a form of their own.
    """

    model_type: str
    name: str | None
    config: dict[str, Any]
    weights: Fingerprint | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The identity of a model; hashing the weights takes about half a second per GB and core."""
        model = without_adapter_wrapper(model)
        config = model.config.get_text_config(decoder=True)
        name = getattr(config, "_name_or_path", None) or ""
        is_on_hub = HUB_ID.fullmatch(name) is not None and not Path(name).exists()
        # As it comes back from a file: lists for tuples, strings for whatever JSON does not know.
        fields = json.loads(json.dumps(functional_fields(config), default=str))
        return cls(config.model_type, name if is_on_hub else None, fields, fingerprint(model))

    @property
    def config_hash(self) -> str:
        """Hash of the configuration's fields."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def refuse_other(self, model: "ModelIdentity", config: PreTrainedConfig, check_weights: bool = True) -> None:
        """Raise a `ValueError` that says why a memory of this identity does not fit a model.

        Args:
            model: identity of the model.
            config: its configuration, for the defaults of fields that one side does not know.
            check_weights: whether the weights must be the same, too.
        """
        if self.model_type != model.model_type:
            raise ValueError(f"The memory was made by a {self.model_type} model, this one is a {model.model_type}.")
        if self.config_hash != model.config_hash and (names := self._differing(model, config)):
            name = names[0]
            raise ValueError(
                f"The memory was made by a model with another configuration: {name} was {_short(self.config, name)}, "
                f"here it is {_short(model.config, name)}"
                + (f"; {', '.join(names[1:])} differ, too." if names[1:] else ".")
            )
        if not check_weights:
            return
        if self.weights is None or model.weights is None:
            raise ValueError(
                "Whether the memory was made by these weights cannot be told, since they are sharded, offloaded or "
                "packed: pass `check_weights=False` if you know that they are the same."
            )
        mine, other = self.weights, model.weights
        is_cast = mine.dtype != other.dtype and mine.rounded == other.rounded
        if mine.exact != other.exact and not is_cast:
            raise ValueError(
                f"The memory was made by a model of the same configuration with other weights ({mine.dtype} with "
                f"fingerprint {mine.exact[:12]}, here {other.dtype} with {other.exact[:12]}). Another training step, "
                "a quantised or float16 copy, an adapter or resized embeddings make another model: read the text "
                "again with this one, or pass `check_weights=False` if you know better."
            )

    def _differing(self, other: "ModelIdentity", config: PreTrainedConfig) -> list[str]:
        # A field that only one side knows was added by another version: it matters unless it has its default.
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        return [
            name
            for name in sorted(self.config.keys() | other.config.keys())
            if self.config.get(name, defaults.get(name)) != other.config.get(name, defaults.get(name))
        ]


def without_adapter_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside a `PeftModel`, adapters included; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def functional_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Declared fields of a configuration that change what its model computes behind the embedding."""
    names = [
        field.name for field in dataclasses.fields(config) if field.name not in PreTrainedConfig.__dataclass_fields__
    ]
    fields = {name: getattr(config, name) for name in names if not _WITHOUT_EFFECT.fullmatch(name)}
    if (fields.get("rope_parameters") or {}).get("rope_type", "default") == "default":
        # The trained length, which only scaled rotary positions depend on.
        fields.pop("max_position_embeddings", None)
    if hasattr(config, "make_memory_config"):
        # A hybrid names the options of its memory that differ from the defaults.
        fields["memory"] = functional_fields(config.make_memory_config())
    return fields


def fingerprint(model: PreTrainedModel) -> Fingerprint | None:
    """Hashes of the weights of a model's body: heads read a memory, they do not write it."""
    weights = model.base_model.state_dict()
    if not all(map(_is_readable, weights.values())):
        return None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        exact = list(pool.map(_hash, weights.values()))
        rounded = list(pool.map(_hash_rounded, weights.values()))
    adapters = list(_adapter_states(model.base_model))
    shapes = [f"{name} {tuple(weight.shape)}" for name, weight in weights.items()]
    dtypes = [str(weight.dtype).removeprefix("torch.") for weight in weights.values()]
    return Fingerprint(
        dtype=next((dtype for dtype in dtypes if "float" in dtype), "none"),
        exact=_hash_lines([*map(" ".join, zip(shapes, dtypes, exact)), *adapters]),
        rounded=_hash_lines([*map(" ".join, zip(shapes, rounded)), *adapters]),
    )


def _is_readable(weight: Any) -> bool:
    is_plain = isinstance(weight, Tensor) and weight.layout == torch.strided and not weight.is_quantized
    return is_plain and weight.device.type != "meta" and not hasattr(weight, "device_mesh")


def _hash(weight: Tensor) -> str:
    data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()


def _hash_rounded(weight: Tensor) -> str:
    return _hash(weight.to(torch.bfloat16) if weight.is_floating_point() else weight)


def _hash_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _adapter_states(body: torch.nn.Module) -> Iterator[str]:
    """Which adapters of peft are at work: switching one changes the function, but no weight."""
    for name, module in body.named_modules():
        # Models of transformers have a method of that name.
        if isinstance(active := getattr(module, "active_adapters", None), list):
            yield f"{name} {active} {module.disable_adapters} {sorted(getattr(module, 'scaling', {}).items())}"


def _short(fields: dict[str, Any], name: str) -> str:
    text = json.dumps(fields[name]) if name in fields else "not known"
    return text if len(text) <= 60 else text[:57] + "..."
