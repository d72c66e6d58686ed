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
"""Trellis model configuration"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.utils import auto_docstring

from hf_memory.configuration import MEMORY, MemoryConfig, check_choice, check_minimum


SLOT_MAPS = ("identity", "silu", "l2_silu", "ln_silu")


@auto_docstring(
    custom_intro="""
    Configuration of the Trellis models. The defaults are those of the paper where it gives them.
    """
)
@strict
class TrellisConfig(MemoryConfig):
    r"""
    layer_types (`list[str]`, *optional*):
        What each layer keeps between calls: `"linear_attention"` for every layer.
    num_slots (`int`, *optional*, defaults to 64):
        Slots of each memory, per head.
    chunk_size (`int`, *optional*):
        All inner gradients of a chunk are taken at the memories of the chunk's start. Part of the function, not a tile
        size; 1 is the exact recurrence. Defaults to 1 for `write_map="identity"`, where it costs nothing, else to 16.
    write_map (`str`, *optional*, defaults to `"ln_silu"`):
        Nonlinearity through which a memory answers a key or a value with its target code: `"identity"`, `"silu"`,
        `"l2_silu"` (SiLU, then unit length over the slots) or `"ln_silu"` (SiLU, then a LayerNorm over the slots).
    read_map (`str`, *optional*, defaults to `"ln_silu"`):
        What stands in the place of softmax, between the read of the key memory and that of the value memory: one of
        those, or `"softmax"`.
    output_map (`str`, *optional*, defaults to `"ln_silu"`):
        Nonlinearity over the channels of what a head reads. In a hybrid it defaults to `"identity"`.
    write_eps (`float`, *optional*, defaults to 0.001):
        Epsilon of a normalising `write_map`. Memories start at zero, where its Jacobian is 0.5 / sqrt(write_eps): at
        the default the first chunk writes far more than later ones, which serves recall of it and not text. 1.0 treats
        all chunks alike.
    read_eps (`float`, *optional*, defaults to 1e-06):
        Epsilon of normalising `read_map` and `output_map`.
    refinements (`int`, *optional*, defaults to 0):
        How often the gradients of a chunk are taken again, at the memories that the last ones lead to. After p times
        the first p + 1 tokens of a chunk follow the exact recurrence.
    hypergrad (`float`, *optional*, defaults to 1.0):
        Share of the training gradient that passes through the points where inner gradients are taken: 1 is the
        gradient of the model as it is, 0 a first-order approximation.
    step_max (`float`, *optional*):
        Largest inner step size. Defaults to 1, or to `1 / chunk_size` where `write_map` does not normalise: a chunk
        of equal keys takes all its steps from one start, and diverges once they add up to 2.
    value_step (`str`, *optional*, defaults to `"normalized"`):
        `"normalized"` divides the step of the value memory by the squared length of the value, if that exceeds 1.
        `"shared"` is the rule as printed; it diverges once step size times squared length reaches 2.
    memory_decay (`bool`, *optional*, defaults to `True`):
        Whether the memories forget.
    learn_initial_memory (`bool`, *optional*, defaults to `False`):
        Whether the memories start from learned values instead of zeros.
    conv_kernel (`int`, *optional*, defaults to 4):
        Width of the causal depthwise convolution behind the query and key projections; 0 for none.
    conv_value (`bool`, *optional*, defaults to `False`):
        Whether values pass through that convolution too.
    gate_act (`str`, *optional*, defaults to `"gelu"`):
        Nonlinearity of the output gate, `"gelu"` or `"silu"`.
    format_version (`int`, *optional*, defaults to 1):
        Format of the checkpoint. One of a newer format than the installed package knows is refused.

    Example:

    ```python
    >>> from hf_memory import TrellisConfig, TrellisModel

    >>> configuration = TrellisConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_slots=32)
    >>> model = TrellisModel(configuration)

    >>> # two delta rules, exact on every token, with a nonlinear read between them
    >>> configuration = TrellisConfig(write_map="identity")
    ```"""

    model_type = "trellis"
    in_hybrid: ClassVar[dict[str, Any]] = {"output_map": "identity"}

    num_slots: int = 64
    chunk_size: int | None = None
    write_map: str = "ln_silu"
    read_map: str = "ln_silu"
    output_map: str = "ln_silu"
    write_eps: float = 1e-3
    read_eps: float = 1e-6
    refinements: int = 0
    hypergrad: float | int = 1.0
    step_max: float | int | None = None
    value_step: str = "normalized"
    memory_decay: bool = True
    learn_initial_memory: bool = False
    conv_kernel: int = 4
    conv_value: bool = False
    gate_act: str = "gelu"

    def fill_defaults(self) -> None:
        """Derive the fields that were left open."""
        if self.layer_types is None:
            self.layer_types = [MEMORY] * self.num_hidden_layers
        if self.chunk_size is None:
            self.chunk_size = 1 if self.write_map == "identity" and self.refinements == 0 else 16
        if self.step_max is None:
            self.step_max = 1.0 if self.write_map in ("l2_silu", "ln_silu") else 1 / max(1, self.chunk_size)

    def validate_memory(self) -> None:
        """Part of `@strict`-powered validation: the memories and what they learn."""
        if any(layer_type != MEMORY for layer_type in self.layer_types):
            raise ValueError(
                f'Trellis has layers of type "{MEMORY}" only, got layer_types={self.layer_types}: drop `layer_types`.'
            )
        check_minimum("num_slots", self.num_slots, 1)
        check_minimum("chunk_size", self.chunk_size, 1)
        check_minimum("conv_kernel", self.conv_kernel, 0)
        if self.conv_value and self.conv_kernel == 0:
            raise ValueError("conv_value=True asks for a convolution: set conv_kernel to at least 1, or drop it.")
        for name, accepted in (
            ("write_map", SLOT_MAPS),
            ("read_map", (*SLOT_MAPS, "softmax")),
            ("output_map", SLOT_MAPS),
            ("value_step", ("normalized", "shared")),
            ("gate_act", ("gelu", "silu")),
        ):
            check_choice(name, getattr(self, name), accepted)
        if self.num_slots == 1 and "ln_silu" in (self.write_map, self.read_map):
            raise ValueError(
                "A LayerNorm over one slot is always zero: set num_slots to at least 2, or other maps than `ln_silu`."
            )

    def validate_steps(self) -> None:
        """Part of `@strict`-powered validation: the inner optimiser."""
        check_minimum("step_max", self.step_max, 0)
        for name in ("write_eps", "read_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.hypergrad <= 1:
            raise ValueError(f"`hypergrad` must be between 0 and 1, got {self.hypergrad}.")
        if not 0 <= self.refinements < self.chunk_size:
            raise ValueError(
                f"`refinements` must be at least 0 and below `chunk_size`, got {self.refinements} and "
                f"{self.chunk_size}: chunk_size - 1 of them make every token exact, which chunk_size=1 is too."
            )


__all__ = ["TrellisConfig"]
