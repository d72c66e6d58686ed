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
"""Trellis: two slot memories in the place of a key/value cache, arXiv 2512.23852."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring

from hf_memory.cache import MemoryCache, memory_layer
from hf_memory.configuration import MEMORY
from hf_memory.kernels import Gates, SlotOptions, overwrites_state, two_pass_slots
from hf_memory.kernels.two_pass_slots.maps import SlotMap
from hf_memory.layers import InitialMemory, MemoryGates, MemoryRMSNorm, ShortConvolution, l2_normalize
from hf_memory.layers.norms import at_least_float32
from hf_memory.modeling import (
    MemoryDecoderMixin,
    MemoryForCausalLMMixin,
    MemoryForSequenceClassificationMixin,
    MemoryGenerationMixin,
    MemoryPreTrainedModel,
)

from .configuration_trellis import TrellisConfig


States = dict[str, Tensor]

# Names of the op's states inside a cache layer, beside the tail of the convolution.
OP_PREFIX = "memory."
# Logits of the gates at initialisation: a tenth of the largest step, and 2 % forgotten per token.
INITIAL_STEP, INITIAL_DECAY = -2.2, -3.9


class TrellisCache(MemoryCache):
    """Cache of a Trellis model: memory states of fixed size."""


class InitialSlots(InitialMemory):
    """Learned start of both memories, `[2 H, m, d]`, those of keys first."""

    def init_std(self, index: int, initializer_range: float) -> float:
        """1, so that unit keys find pre-activations of order one."""
        return 1.0


class TargetProjection(nn.Linear):
    """Linear layer from tokens to target codes, without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


class TrellisMemory(nn.Module):
    """Two memories of m slots per head, of keys and of values, that each token trains by one step.

    The query reads the first, what it finds there, through a nonlinearity, reads the second.

    Args:
        config: configuration.
        layer_idx: index of the layer in the cache.
    """

    def __init__(self, config: TrellisConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width, bias = config.num_attention_heads * config.head_dim, config.attention_bias

        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.target_proj = TargetProjection(config.hidden_size, config.num_attention_heads * config.num_slots)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.conv_value = config.conv_value
        # CODEPATH: the paper leaves open whether values are convolved too.
        channels = (3 if config.conv_value else 2) * width
        # CODEPATH: conv_kernel=0 is the ablation without convolution.
        self.conv = ShortConvolution(channels, config.conv_kernel) if config.conv_kernel > 0 else None
        self.gates = MemoryGates(
            config.hidden_size,
            config.num_attention_heads,
            1,
            decay=config.memory_decay,
            momentum=False,
            step_scale=config.step_max,
            initial_step=INITIAL_STEP,
            initial_decay=INITIAL_DECAY,
        )
        self.initial_memory = None
        # CODEPATH: memories that start at zero have nothing to learn there.
        if config.learn_initial_memory:
            self.initial_memory = InitialSlots(2 * self.num_heads, [config.num_slots, config.head_dim], False)
        self.normalizes_value_step = config.value_step == "normalized"
        self.output_map = SlotMap(config.output_map, config.read_eps)
        self.o_norm = MemoryRMSNorm(width, config.rms_norm_eps)
        self.gate_act = config.gate_act
        self.gate_fn = ACT2FN[config.gate_act]
        self.options = SlotOptions(
            chunk_size=config.chunk_size,
            write_map=config.write_map,
            read_map=config.read_map,
            write_eps=config.write_eps,
            read_eps=config.read_eps,
            refinements=config.refinements,
            hypergrad=config.hypergrad,
        )
        self.overwriting_options = replace(self.options, overwrite_state=True)

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Write the tokens into the memories and answer each from the memories after it.

        Args:
            hidden_states: normalised hidden states `[B, T, D]`.
            padding_mask: `[B, T]` bool, true where a token is valid; others change no state.
            cu_seqlens: `[N + 1]` boundaries of sequences packed into one row, each with memories of its own.
            past_key_values: cache with a memory layer at `layer_idx`.

        Returns:
            `[B, T, D]`.
        """
        layer = memory_layer(past_key_values, self.layer_idx)
        # While generating, a token changes the state where it lies instead of writing a second one.
        can_overwrite = hidden_states.shape[1] == 1 and not torch.is_grad_enabled()
        overwrite = can_overwrite and overwrites_state(hidden_states.device)
        states = layer.get_states(OP_PREFIX if overwrite else None) if layer is not None else None
        read, states = self._memorise(
            hidden_states, states or {}, padding_mask, cu_seqlens, layer is not None, overwrite
        )
        if layer is not None:
            layer.update_states(states, hidden_states.shape[1])

        read = self.output_map(at_least_float32(read)).to(read.dtype)
        return self.o_proj(self.o_norm(read.flatten(2)) * self.gate_fn(self.g_proj(hidden_states)))

    def _memorise(
        self,
        hidden_states: Tensor,
        states: States,
        padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        return_states: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor, States]:
        query, key, value, tail = self._project(hidden_states, states.get("conv"), padding_mask, cu_seqlens)
        new_states = {} if tail is None else {"conv": tail}
        op_states = {n.removeprefix(OP_PREFIX): x for n, x in states.items() if n.startswith(OP_PREFIX)}
        read, op_states = two_pass_slots(
            l2_normalize(query),
            l2_normalize(key),
            value,
            self.target_proj(hidden_states).unflatten(-1, (self.num_heads, -1)),
            self._gates(hidden_states, value),
            None if self.initial_memory is None else self.initial_memory.weights[0],
            initial_state=op_states or None,
            output_final_state=return_states,
            mask=padding_mask,
            cu_seqlens=cu_seqlens,
            options=self.overwriting_options if overwrite else self.options,
        )
        return read, new_states | {OP_PREFIX + name: state for name, state in (op_states or {}).items()}

    def _project(
        self, hidden_states: Tensor, tail: Tensor | None, padding_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values `[B, T, H, d]`, and the new tail of the convolution."""
        parts = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if self.conv is not None:
            convolved = parts if self.conv_value else parts[:2]
            mixed, tail = self.conv(torch.cat(convolved, dim=-1), tail, padding_mask, cu_seqlens)
            parts[: len(convolved)] = mixed.chunk(len(convolved), dim=-1)
        query, key, value = (nn.functional.silu(part).unflatten(-1, (-1, self.head_dim)) for part in parts)
        return query, key, value, tail

    def _gates(self, hidden_states: Tensor, value: Tensor) -> Gates:
        gates = self.gates(hidden_states)
        # CODEPATH: value_step="shared" is the rule as printed.
        if not self.normalizes_value_step:
            return gates
        squares = at_least_float32(value).square().sum(-1, keepdim=True)
        return gates._replace(step=torch.cat([gates.step, gates.step / squares.clamp(min=1)], dim=-1))


@auto_docstring
class TrellisPreTrainedModel(MemoryPreTrainedModel):
    config: TrellisConfig
    _cache_class = TrellisCache

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TargetProjection):
            # Targets of variance one, which is that of what a LayerNorm can answer.
            init.normal_(module.weight, std=module.in_features**-0.5)
        else:
            super()._init_weights(module)


@auto_docstring
class TrellisModel(MemoryDecoderMixin, TrellisPreTrainedModel):
    mixer_classes = {MEMORY: TrellisMemory}


@auto_docstring
class TrellisForCausalLM(MemoryForCausalLMMixin, TrellisPreTrainedModel, MemoryGenerationMixin):
    decoder_class = TrellisModel


@auto_docstring
class TrellisForSequenceClassification(MemoryForSequenceClassificationMixin, TrellisPreTrainedModel):
    decoder_class = TrellisModel


__all__ = [
    "TrellisCache",
    "TrellisForCausalLM",
    "TrellisForSequenceClassification",
    "TrellisModel",
    "TrellisPreTrainedModel",
]
