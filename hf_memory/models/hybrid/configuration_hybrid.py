# Copyright 2026 the hf-memory authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of `memory_hybrid`: that of the teacher, and what stands where its attention was."""

import functools
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import auto_docstring

from hf_memory.configuration import (
    MEMORY,
    MEMORY_SLIDING,
    MemoryConfig,
    check_choice,
    check_minimum,
    drop_local_code,
)
from hf_memory.models import ARCHITECTURES


@auto_docstring(
    custom_intro="""
    Configuration of a hybrid: all fields of its teacher, by their own names, and the following.

    `MemoryHybridConfig(base_model_type="llama", ...)` returns an instance of a class that derives from both this one
    and the teacher's configuration, so that everything which knows the teacher knows the hybrid.
    """
)
@strict
class MemoryHybridConfig(PreTrainedConfig):
    r"""
    base_model_type (`str`, *optional*, defaults to `"llama"`):
        `model_type` of the teacher.
    memory_layers (`list[int]`, *optional*):
        Layers that have a memory.
    memory_mode (`str`, *optional*, defaults to `"replace"`):
        `"replace"`: the memory stands where attention was. `"retrofit"`: attention stays, sees a window only, and the
        gated output of the memory is added to its own.
    memory_window (`int`, *optional*):
        Tokens that attention beside a memory sees, itself included; `"retrofit"` only.
    memory (`dict`, *optional*):
        The memory's architecture as `"model_type"`, and fields of its configuration that differ from the defaults.
        Widths and heads are those of the teacher's attention.
    format_version (`int`, *optional*, defaults to 1):
        Format of the checkpoint.
    """

    model_type = "memory_hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]

    base_model_type: str = "llama"
    memory_layers: list[int] | None = None
    memory_mode: str = "replace"
    memory_window: int | None = None
    memory: dict[str, Any] | None = None
    format_version: int = 1

    def __new__(cls, *args, **kwargs) -> "MemoryHybridConfig":
        if cls is MemoryHybridConfig:
            cls = hybrid_config_class(kwargs.get("base_model_type", "llama"))
        return object.__new__(cls)

    def __reduce__(self) -> tuple:
        # The class of an instance is made at run time, under no name that pickle or deepcopy could find.
        return _empty_config, (self.base_model_type,), self.__dict__

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "MemoryHybridConfig":
        """As for any configuration; the class of the result depends on `base_model_type`."""
        if cls is MemoryHybridConfig:
            return hybrid_config_class(config_dict.get("base_model_type", "llama")).from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_teacher(cls, config: PreTrainedConfig, **fields) -> "MemoryHybridConfig":
        """Configuration of a hybrid of the model that `config` belongs to; `fields` are those of the hybrid."""
        values = config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path"):
            values.pop(name, None)
        return cls(base_model_type=config.model_type, **values, **fields)

    def __post_init__(self, **kwargs) -> None:
        if self.format_version > MemoryConfig.supported_format_version:
            raise ValueError(
                f"This {self.model_type} checkpoint has format_version {self.format_version}, the installed hf-memory "
                f"reads up to {MemoryConfig.supported_format_version}: upgrade it with `pip install -U hf-memory`."
            )
        drop_local_code(kwargs)
        self.memory_layers = sorted(set(self.memory_layers or ()))
        self.memory = {"model_type": "titans"} | (self.memory or {})
        super().__post_init__(**kwargs)
        self.make_memory_config()

    def validate_memory(self) -> None:
        """Part of `@strict`-powered validation: layers that exist, and a window where attention stays."""
        check_choice("memory_mode", self.memory_mode, ("replace", "retrofit"))
        count = self.num_hidden_layers
        if outside := [i for i in self.memory_layers or () if not 0 <= i < count]:
            raise ValueError(
                f"`memory_layers` names {outside}, but this {self.base_model_type} model has {count} layers: choose "
                f"from 0 to {count - 1}."
            )
        if self.memory_mode == "replace" and self.memory_window is not None:
            raise ValueError(
                "`memory_window` is the window of attention beside a memory, and with memory_mode='replace' no "
                "attention is left there: drop it, or set memory_mode='retrofit'."
            )
        if self.memory_mode == "retrofit":
            if self.memory_window is None:
                raise ValueError("memory_mode='retrofit' needs `memory_window`, the tokens that attention still sees.")
            check_minimum("memory_window", self.memory_window, 1)
            widths = teacher_windows(self)
            narrow = [i for i in self.memory_layers or () if widths[i] is not None and widths[i] < self.memory_window]
            if narrow:
                raise ValueError(
                    f"`memory_window` is {self.memory_window}, but attention of layer {narrow[0]} sees "
                    f"{widths[narrow[0]]} tokens only: choose at most that."
                )

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Query heads of the teacher's attention, and the width of each."""
        heads = self.num_attention_heads
        return heads, getattr(self, "head_dim", None) or self.hidden_size // heads

    @property
    def memory_layer_types(self) -> list[str | None]:
        """What the cache keeps for each layer; `None` for what the teacher keeps there."""
        kind = MEMORY if self.memory_mode == "replace" else MEMORY_SLIDING
        return [kind if i in self.memory_layers else None for i in range(self.num_hidden_layers)]

    def make_memory_config(self) -> MemoryConfig:
        """Configuration of the memory mixers.

        Raises:
            ValueError: for an unknown architecture, an unknown field, or heads that differ from the teacher's.
        """
        fields = dict(self.memory)
        model_type = fields.pop("model_type")
        if model_type not in ARCHITECTURES:
            raise ValueError(f"There is no memory {model_type!r}: choose one of {', '.join(ARCHITECTURES)}.")
        config_class = ARCHITECTURES[model_type].load("config")
        if unknown := [name for name in fields if name not in config_class.__dataclass_fields__]:
            raise ValueError(f"A {model_type} memory has no option {unknown[0]!r}.")
        heads, head_dim = self.attention_heads
        given = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": heads,
            "head_dim": head_dim,
        }
        for name, value in given.items():
            if fields.get(name, value) != value:
                raise ValueError(
                    f"The memory takes over the projections of attention, so its `{name}` is {value} as in the "
                    f"teacher, not {fields[name]}: leave it out."
                )
        # Biases start at zero, where the teacher has none; that of the output gate starts it open.
        defaults = {"attention_bias": True, "tie_word_embeddings": False} | config_class.in_hybrid
        made = config_class(**(defaults | fields | given))
        if set(made.layer_types) != {MEMORY}:
            raise ValueError(
                f"A hybrid takes memories that stand alone, and layers of this {model_type} memory are of type "
                f"{', '.join(dict.fromkeys(made.layer_types))}: leave `variant` and `layer_types` out. With "
                "memory_mode='retrofit' the teacher's own attention works beside the memory."
            )
        return made


def teacher_windows(config: PreTrainedConfig) -> list[int | None]:
    """Tokens that attention of each layer of a teacher sees; `None` for all."""
    width = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [width if kind == "sliding_attention" else None for kind in kinds]


@functools.cache
def hybrid_config_class(base_model_type: str) -> type[MemoryHybridConfig]:
    """Class of the configurations of hybrids with teachers of this type.

    Raises:
        ValueError: for a type that the installed transformers does not know.
    """
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(f"The installed transformers has no model type {base_model_type!r} to build a hybrid from.")
    base = CONFIG_MAPPING[base_model_type]
    namespace = {"__module__": __name__, "__annotations__": {}, "model_type": MemoryHybridConfig.model_type}
    # The teacher comes first, so that its defaults win over those of the base class of all configurations.
    made = strict(type(MemoryHybridConfig.__name__, (base, MemoryHybridConfig), namespace))
    _register_with_auto_classes(made)
    return made


def _register_with_auto_classes(config_class: type[MemoryHybridConfig]) -> None:
    # They look a configuration up by its exact class.
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    for auto_class in (AutoModel, AutoModelForCausalLM):
        model_class = auto_class._model_mapping.get(MemoryHybridConfig, None)
        if model_class is not None:
            auto_class.register(config_class, model_class, exist_ok=True)


def _empty_config(base_model_type: str) -> MemoryHybridConfig:
    return object.__new__(hybrid_config_class(base_model_type))


__all__ = ["MemoryHybridConfig"]
