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
"""Lattice model configuration"""

from huggingface_hub.dataclasses import strict
from transformers.utils import auto_docstring

from hf_memory.configuration import MEMORY, MemoryConfig, check_choice, check_minimum


@auto_docstring(
    custom_intro="""
    Configuration of the Lattice models. Sizes default to a model of the 350M class.
    """
)
@strict
class LatticeConfig(MemoryConfig):
    r"""
    layer_types (`list[str]`, *optional*):
        What each layer keeps between calls: `"linear_attention"` for every layer.
    num_slots (`int`, *optional*):
        Memory slots per head. Defaults to `head_dim`, their width; a quarter of it makes the state four times smaller.
    objective (`str`, *optional*, defaults to `"dec"`):
        Inner loss, with the slots at unit length. `"dec"`: the key decodes the value from the slots,
        ½‖k φ - v‖². `"sim"`: its similarity to the value alone, -⟨k φ, v⟩. `"enc"`: the slots encode the key as the
        value, ½‖φ k - v‖²; keys and queries then have the width of a slot, values one entry per slot.
    normalization (`str`, *optional*, defaults to `"retract"`):
        `"retract"`: slots are brought back to unit length, which is how they forget. `"lazy"`: slots grow, and only
        their direction is used. `"none"`: neither normalisation nor projection, for comparisons: the delta rule
        (`"dec"`) and linear attention (`"sim"`) in the same block.
    chunk_size (`int`, *optional*, defaults to 16):
        The coefficients of a chunk's steps are taken at its start. Part of the function, not a tile size; 1 is the
        exact rule.
    gamma_max (`float`, *optional*, defaults to 1.0):
        Scale of the inner step size, `gamma_max * sigmoid(...)` per head and token. Above 1 unit keys overshoot.
    gamma_init (`float`, *optional*, defaults to 0.1):
        Step size that a fresh model starts with, below `gamma_max`.
    memory_decay (`bool`, *optional*, defaults to `False`):
        Whether slots also decay by a gate per head and token. Not with `"retract"`, where it would change nothing.
    conv_kernel (`int`, *optional*, defaults to 4):
        Width of the causal depthwise convolution behind the query, key and value projections; 0 for none.
    qk_act (`str`, *optional*, defaults to `"silu"`):
        Nonlinearity of queries and keys, `"silu"` or `"none"`.
    qk_norm (`str`, *optional*, defaults to `"l2"`):
        How queries and keys are normalised per head: `"l2"` to unit length, `"softmax"` to weights that add up to 1,
        `"none"` not at all.
    gate_act (`str`, *optional*, defaults to `"silu"`):
        Nonlinearity of the output gate, `"silu"` or `"gelu"`.
    format_version (`int`, *optional*, defaults to 1):
        Format of the checkpoint. One of a newer format than the installed package knows is refused.

    Example:

    ```python
    >>> from hf_memory import LatticeConfig, LatticeModel

    >>> # a quarter of the slots, exact rule
    >>> configuration = LatticeConfig(
    ...     hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_slots=4, chunk_size=1
    ... )
    >>> model = LatticeModel(configuration)
    ```"""

    model_type = "lattice"

    num_slots: int | None = None
    objective: str = "dec"
    normalization: str = "retract"
    chunk_size: int = 16
    gamma_max: float | int = 1.0
    gamma_init: float | int = 0.1
    memory_decay: bool = False
    conv_kernel: int = 4
    qk_act: str = "silu"
    qk_norm: str = "l2"
    gate_act: str = "silu"
    tie_word_embeddings: bool = True

    def fill_defaults(self) -> None:
        """Derive the fields that were left open."""
        if self.layer_types is None:
            self.layer_types = [MEMORY] * self.num_hidden_layers
        if self.num_slots is None:
            self.num_slots = self.head_dim

    @property
    def code_width(self) -> int:
        """Width of queries and keys per head."""
        return self.head_dim if self.objective == "enc" else self.num_slots

    @property
    def content_width(self) -> int:
        """Width of values and outputs per head."""
        return self.num_slots if self.objective == "enc" else self.head_dim

    def validate_memory(self) -> None:
        """Part of `@strict`-powered validation: slots, rule and block."""
        if any(layer_type != MEMORY for layer_type in self.layer_types):
            raise ValueError(
                f'Lattice has layers of type "{MEMORY}" only, got layer_types={self.layer_types}: drop `layer_types`.'
            )
        for name in ("num_slots", "chunk_size"):
            check_minimum(name, getattr(self, name), 1)
        check_minimum("conv_kernel", self.conv_kernel, 0)
        for name, accepted in {
            "objective": ("dec", "sim", "enc"),
            "normalization": ("retract", "lazy", "none"),
            "qk_act": ("silu", "none"),
            "qk_norm": ("l2", "softmax", "none"),
            "gate_act": ("silu", "gelu"),
        }.items():
            check_choice(name, getattr(self, name), accepted)
        if not 0 < self.gamma_init < self.gamma_max:
            raise ValueError(
                f"`gamma_init` must lie between 0 and `gamma_max` ({self.gamma_max}), got {self.gamma_init}."
            )
        if self.memory_decay and self.normalization == "retract":
            raise ValueError(
                'normalization="retract" forgets by bringing slots back to unit length, which undoes any decay: set '
                'memory_decay=False, or normalization="lazy".'
            )


__all__ = ["LatticeConfig"]
