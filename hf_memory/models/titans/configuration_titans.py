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
"""Titans model configuration"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.utils import auto_docstring

from hf_memory.configuration import (
    MEMORY,
    MEMORY_SEGMENT,
    MEMORY_SLIDING,
    SLIDING,
    MemoryConfig,
    check_choice,
    check_minimum,
)


# Layer types that a variant is made of, in the order in which they follow each other.
LAYER_TYPES_OF_VARIANT = {
    "lmm": (MEMORY,),
    "mag": (MEMORY_SLIDING,),
    "mac": (MEMORY_SEGMENT,),
    "mal": (MEMORY, SLIDING),
}


@auto_docstring(
    custom_intro="""
    Configuration of the Titans models. The defaults are those of the paper's 340M model.
    """
)
@strict
class TitansConfig(MemoryConfig):
    r"""
    layer_types (`list[str]`, *optional*):
        What each layer keeps between calls: `"linear_attention"` for every layer of `variant="lmm"`,
        `"hybrid_sliding"` for `"mag"`, `"hybrid"` for `"mac"`. Layers of `"mal"` are memories (`"linear_attention"`)
        and attention (`"sliding_attention"`), one after the other unless another pattern of the two is given.
    variant (`str`, *optional*, defaults to `"lmm"`):
        `"lmm"`: the neural memory replaces attention. `"mag"`: the memory gates sliding-window attention that runs
        beside it. `"mac"`: attention over segments of the text sees what the memory recalls about them, and the memory
        reads what attention made of them. `"mal"`: layers with a memory and layers with sliding-window attention take
        turns.
    memory_depth (`int`, *optional*, defaults to 2):
        Number of layers of the neural memory; 1 is a matrix.
    memory_expansion (`int`, *optional*, defaults to 4):
        Hidden width of a deep memory in units of `head_dim`.
    memory_act (`str`, *optional*, defaults to `"gelu"`):
        Nonlinearity of a deep memory, `"gelu"` or `"gelu_pytorch_tanh"`.
    memory_layer_norm (`bool`, *optional*):
        Whether the memory is `x + LayerNorm(...)` instead of a plain product; a deep memory always is. Defaults to
        `memory_depth >= 2`.
    chunk_size (`int`, *optional*, defaults to 16):
        All inner gradients of a chunk are taken at the memory of the chunk's start. Part of the function, not a tile
        size; 1 is the exact online rule.
    decay_target (`str`, *optional*):
        What forgetting returns to: `"init"`, the learned start (default of a deep memory), or `"zero"`, the rule as
        printed (default of a linear memory; chaotic beyond some hundred tokens in a deep one).
    gate_granularity (`str`, *optional*, defaults to `"head"`):
        `"head"`: one decay, momentum and step size per head, token and memory layer. `"channel"`: one per channel
        (`memory_depth <= 2`).
    theta_max (`float`, *optional*):
        Scale of the inner step size. Defaults to `1 / chunk_size` for a plain linear memory and 0.1 for one behind a
        LayerNorm. A chunk of equal keys takes all its steps from one start: a plain memory diverges on repeated tokens
        once these steps add up to 2. 0 switches learning off: the memory stays as it starts.
    theta_act (`str`, *optional*, defaults to `"sigmoid"`):
        `"sigmoid"` bounds the step size by `theta_max`, `"softplus"` leaves it unbounded.
    theta_norm (`str`, *optional*):
        `"chunk_mean"` divides the step size by `chunk_size`.
    decay_before_grad (`bool`, *optional*, defaults to `False`):
        Take the inner gradient at the decayed memory, as the gated delta rule does (plain linear memory,
        `chunk_size=1`).
    memory_decay (`bool`, *optional*, defaults to `True`):
        Whether the memory forgets.
    memory_momentum (`bool`, *optional*, defaults to `True`):
        Whether inner gradients pass through a momentum buffer.
    conv_kernel (`int`, *optional*, defaults to 4):
        Width of the causal depthwise convolution behind the query, key and value projections; 0 for none.
    sliding_window (`int`, *optional*, defaults to 2048):
        Tokens that attention of `"mag"` and `"mal"` sees, the token itself included.
    segment_size (`int`, *optional*, defaults to 512):
        Tokens of a segment, the reach of attention in `"mac"`; a multiple of `chunk_size` and `num_memory_tokens`.
    num_memory_tokens (`int`, *optional*, defaults to 256):
        What `"mac"` recalls per segment: one memory token for each `segment_size / num_memory_tokens` tokens of text,
        which see it from the last of them on.
    num_persistent_tokens (`int`, *optional*, defaults to 128):
        Learned tokens in front of every sequence (with `"mac"`, of every segment), per layer.
    persistent_in_memory (`bool`, *optional*):
        Whether the memory reads the persistent tokens before the text. Defaults to `True` for `"lmm"` and `False` for
        the others, whose attention always sees them.
    gate (`str`, *optional*, defaults to `"norm_silu"`):
        How `"mag"` joins attention y and memory m: `"norm_silu"` is `norm(y) * silu(norm(m))`, `"additive"` adds the
        normalised memory times a learned vector that starts at zero.
    format_version (`int`, *optional*, defaults to 1):
        Format of the checkpoint. One of a newer format than the installed package knows is refused.

    Example:

    ```python
    >>> from hf_memory import TitansConfig, TitansModel

    >>> configuration = TitansConfig(variant="mag", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> model = TitansModel(configuration)

    >>> # the gated delta rule is a corner of the same model
    >>> configuration = TitansConfig(memory_depth=1, chunk_size=1, memory_momentum=False, decay_before_grad=True)
    ```"""

    model_type = "titans"
    in_hybrid: ClassVar[dict[str, Any]] = {"num_persistent_tokens": 0}

    variant: str = "lmm"
    memory_depth: int = 2
    memory_expansion: int = 4
    memory_act: str = "gelu"
    memory_layer_norm: bool | None = None
    chunk_size: int = 16
    decay_target: str | None = None
    gate_granularity: str = "head"
    theta_max: float | int | None = None
    theta_act: str = "sigmoid"
    theta_norm: str | None = None
    decay_before_grad: bool = False
    memory_decay: bool = True
    memory_momentum: bool = True
    conv_kernel: int = 4
    sliding_window: int = 2048
    segment_size: int = 512
    num_memory_tokens: int = 256
    num_persistent_tokens: int = 128
    persistent_in_memory: bool | None = None
    gate: str = "norm_silu"

    def fill_defaults(self) -> None:
        """Derive the fields that were left open."""
        check_choice("variant", self.variant, LAYER_TYPES_OF_VARIANT)
        if self.layer_types is None:
            pattern = LAYER_TYPES_OF_VARIANT[self.variant]
            self.layer_types = [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]
        if self.memory_layer_norm is None:
            self.memory_layer_norm = self.memory_depth >= 2
        if self.decay_target is None:
            self.decay_target = "init" if self.memory_depth >= 2 else "zero"
        if self.theta_max is None:
            self.theta_max = 0.1 if self.memory_layer_norm else 1 / self.chunk_size
        if self.persistent_in_memory is None:
            self.persistent_in_memory = self.variant == "lmm"

    @property
    def num_gate_sets(self) -> int:
        """Decay, momentum and step-size values per head and token."""
        if self.gate_granularity == "head":
            return self.memory_depth
        return self.head_dim if self.memory_depth == 1 else 2 * self.head_dim

    def validate_variant(self) -> None:
        """Part of `@strict`-powered validation: the block around the memory."""
        check_choice("gate", self.gate, ("norm_silu", "additive"))
        expected = LAYER_TYPES_OF_VARIANT[self.variant]
        if set(self.layer_types) != set(expected):
            raise ValueError(
                f'variant="{self.variant}" is made of layers of type {" and ".join(expected)}, got '
                f"layer_types={self.layer_types}: drop `layer_types`, or change `variant` or `num_hidden_layers`."
            )
        check_minimum("num_persistent_tokens", self.num_persistent_tokens, 0)
        if self.variant == "lmm" and self.num_persistent_tokens > 0 and not self.persistent_in_memory:
            raise ValueError(
                f'With variant="lmm" the memory is all that reads the {self.num_persistent_tokens} persistent tokens: '
                "set persistent_in_memory=True, or num_persistent_tokens=0."
            )
        if self.has_window:
            check_minimum("sliding_window", self.sliding_window, 2)
        if self.variant != "lmm" and self.head_dim % 2:
            raise ValueError(
                f'variant="{self.variant}" rotates pairs of channels: `head_dim` must be even, got {self.head_dim}.'
            )

    def validate_segments(self) -> None:
        """Part of `@strict`-powered validation: segments of `variant="mac"`."""
        if self.variant != "mac":
            return
        for name in ("segment_size", "num_memory_tokens"):
            check_minimum(name, getattr(self, name), 1)
        for name in ("num_memory_tokens", "chunk_size"):
            if self.segment_size % getattr(self, name):
                raise ValueError(
                    f"`segment_size` ({self.segment_size}) must be a multiple of `{name}` ({getattr(self, name)}): "
                    "change one of them."
                )
        if self.persistent_in_memory and self.num_persistent_tokens % self.chunk_size:
            raise ValueError(
                f'With variant="mac" segments end where chunks do, but the {self.num_persistent_tokens} persistent '
                f"tokens that the memory reads first are no multiple of `chunk_size` ({self.chunk_size}): change one "
                "of them, or leave persistent_in_memory unset."
            )
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                'With variant="mac" what the memory recalls stands beside tokens of the text: `num_attention_heads` '
                f"({self.num_attention_heads}) times `head_dim` ({self.head_dim}) must be `hidden_size` "
                f"({self.hidden_size})."
            )
        if self.gate != "norm_silu":
            raise ValueError(f'gate="{self.gate}" is defined for variant="mag" only: drop it.')

    def validate_memory(self) -> None:
        """Part of `@strict`-powered validation: the memory itself."""
        for name in ("memory_depth", "memory_expansion", "chunk_size"):
            check_minimum(name, getattr(self, name), 1)
        check_choice("memory_act", self.memory_act, ("gelu", "gelu_pytorch_tanh"))
        check_choice("decay_target", self.decay_target, ("init", "zero"))
        check_minimum("conv_kernel", self.conv_kernel, 0)
        if self.memory_depth >= 2 and not self.memory_layer_norm:
            raise ValueError(
                f"A memory of depth {self.memory_depth} is defined with its LayerNorm and residual only: "
                "leave memory_layer_norm unset, or set memory_depth=1."
            )

    def validate_gates(self) -> None:
        """Part of `@strict`-powered validation: decay, momentum and step size of the inner optimiser."""
        check_choice("gate_granularity", self.gate_granularity, ("head", "channel"))
        check_choice("theta_act", self.theta_act, ("sigmoid", "softplus"))
        check_choice("theta_norm", self.theta_norm, (None, "chunk_mean"))
        check_minimum("theta_max", self.theta_max, 0)
        if self.gate_granularity == "channel" and self.memory_depth > 2:
            raise ValueError(
                f'gate_granularity="channel" is defined for memory_depth 1 and 2, got {self.memory_depth}: '
                'set gate_granularity="head", or a smaller memory_depth.'
            )
        if not self.decay_before_grad:
            return
        if self.memory_depth != 1 or self.memory_layer_norm or self.chunk_size != 1:
            raise ValueError(
                "decay_before_grad is defined for the plain linear memory on the exact online rule only: set "
                "memory_depth=1, memory_layer_norm=False and chunk_size=1, or drop it (got "
                f"memory_depth={self.memory_depth}, memory_layer_norm={self.memory_layer_norm}, "
                f"chunk_size={self.chunk_size})."
            )
        if not self.memory_decay:
            raise ValueError("decay_before_grad says where decay enters: set memory_decay=True, or drop it.")


__all__ = ["TitansConfig"]
