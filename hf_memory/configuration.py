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
"""What the configurations of all architectures share: the decoder's fields, layer types and checkpoint format."""

from collections.abc import Iterable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


# Words that transformers knows: `Trainer` reads a checkpoint's config back through the base class when it resumes, and
# the base class refuses layer types of our own.
MEMORY = "linear_attention"
"""`layer_types` value of a layer that keeps memory states only."""

MEMORY_SLIDING = "hybrid_sliding"
"""`layer_types` value of a layer that keeps memory states and a sliding window of keys and values."""

SLIDING = "sliding_attention"
"""`layer_types` value of a layer that keeps a sliding window of keys and values only."""

MEMORY_SEGMENT = "hybrid"
"""`layer_types` value of a layer that keeps memory states, and keys and values of one segment of the text."""

LAYER_TYPES = (MEMORY, MEMORY_SLIDING, SLIDING, MEMORY_SEGMENT)


def check_choice(name: str, value: object, accepted: Iterable[object]) -> None:
    """Raise a `ValueError` naming the field unless `value` is one of `accepted`."""
    accepted = tuple(accepted)
    if value not in accepted:
        raise ValueError(f"`{name}` must be one of {accepted}, got {value!r}.")


def check_minimum(name: str, value: float, minimum: float) -> None:
    """Raise a `ValueError` naming the field if `value` is below `minimum`."""
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def drop_local_code(fields: dict[str, Any]) -> None:
    """Take out of a configuration's fields an `auto_map` that names files in the folder of the checkpoint.

    The classes of the package do not copy those files when they save, so that the name would lead nowhere. Code that
    was loaded from such a folder keeps it, since transformers then saves the files too.
    """
    if __name__.startswith("hf_memory."):
        elsewhere = {name: value for name, value in (fields.pop("auto_map", None) or {}).items() if "--" in str(value)}
        if elsewhere:
            fields["auto_map"] = elsewhere


@strict
class MemoryConfig(PreTrainedConfig):
    r"""
    Fields of the shared decoder. An architecture subclasses it, adds its own fields, and overrides `fill_defaults`.

    layer_types (`list[str]`, *optional*):
        What each layer keeps between calls: `"linear_attention"` (states), `"sliding_attention"` (a window of keys and
        values), `"hybrid_sliding"` (both), or `"hybrid"` (states, and keys and values of one segment); derived from
        the architecture's own fields when not given.
    format_version (`int`, *optional*, defaults to 1):
        Format of the checkpoint. A checkpoint of a newer format than the installed package knows is refused.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    supported_format_version: ClassVar[int] = 1
    in_hybrid: ClassVar[dict[str, Any]] = {}
    """Fields that default to something else where the memory stands in a pretrained decoder."""

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    layer_types: list[str] | None = None
    format_version: int = 1

    def __post_init__(self, **kwargs) -> None:
        # First of all: a checkpoint of a newer format may hold values that no other check here knows.
        if self.format_version > self.supported_format_version:
            raise ValueError(
                f"This {self.model_type} checkpoint has format_version {self.format_version}, the installed hf-memory "
                f"reads up to {self.supported_format_version}: upgrade it with `pip install -U hf-memory`."
            )
        drop_local_code(kwargs)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_minimum(name, getattr(self, name), 1)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
                    f"({self.num_attention_heads}): change one of them, or set `head_dim`, which need not divide it."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        check_minimum("head_dim", self.head_dim, 1)
        self.fill_defaults()
        super().__post_init__(**kwargs)

    @property
    def has_window(self) -> bool:
        """Whether some layer attends over a sliding window."""
        return any(layer_type in (MEMORY_SLIDING, SLIDING) for layer_type in self.layer_types or ())

    def fill_defaults(self) -> None:
        """Derive the fields that were left open, `layer_types` among them; each architecture has its own."""

    def validate_layer_type(self) -> None:
        """Part of `@strict`-powered validation: layer types that a mixer exists for, one per layer."""
        for layer_type in self.layer_types or ():
            check_choice("layer_types", layer_type, LAYER_TYPES)
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` names {len(self.layer_types)} layers but `num_hidden_layers` is "
                f"{self.num_hidden_layers}: drop `layer_types`, or name every layer."
            )


__all__ = [
    "LAYER_TYPES",
    "MEMORY",
    "MEMORY_SEGMENT",
    "MEMORY_SLIDING",
    "SLIDING",
    "MemoryConfig",
    "check_choice",
    "check_minimum",
    "drop_local_code",
]
