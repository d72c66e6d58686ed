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
"""Titans: neural long-term memory alone (LMM) and as a gate of sliding-window attention (MAG), arXiv 2501.00663."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring

from hf_memory.cache import MemoryCache, memory_layer
from hf_memory.configuration import MEMORY, MEMORY_SLIDING
from hf_memory.kernels import AnchoredOptions, anchored_linear, anchored_mlp
from hf_memory.layers import (
    InitialMemory,
    MemoryGates,
    MemoryRMSNorm,
    PersistentTokens,
    ShortConvolution,
    SlidingWindowAttention,
    l2_normalize,
)
from hf_memory.modeling import (
    MemoryDecoderMixin,
    MemoryForCausalLMMixin,
    MemoryForSequenceClassificationMixin,
    MemoryGenerationMixin,
    MemoryPreTrainedModel,
)

from .configuration_titans import TitansConfig


States = dict[str, Tensor]

# Names of the op's states inside a cache layer, beside the tail of the convolution.
OP_PREFIX = "memory."


class TitansCache(MemoryCache):
    """Cache of a Titans model: memory states of fixed size, and with `variant="mag"` a window of keys and values."""


class TitansMemory(nn.Module):
    """Neural memory: a small network per head that each token trains by one step before it reads from it.

    On its own the mixer of `variant="lmm"`, beside attention a part of `TitansGatedAttention`.

    Args:
        config: configuration.
        layer_idx: index of the layer in the cache.
        beside_attention: whether another mixer owns the persistent tokens and, where the gate joins both branches
            before the output projection, that projection too.
    """

    def __init__(self, config: TitansConfig, layer_idx: int, beside_attention: bool = False) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.chunk_size = config.chunk_size
        width, bias = config.num_attention_heads * config.head_dim, config.attention_bias

        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=bias)
        # CODEPATH: "norm_silu" joins the branches before a projection that belongs to both.
        shares_output = beside_attention and config.gate == "norm_silu"
        self.o_proj = None if shares_output else nn.Linear(width, config.hidden_size, bias=bias)
        # CODEPATH: conv_kernel=0 is the ablation without convolution.
        self.conv = ShortConvolution(3 * width, config.conv_kernel) if config.conv_kernel > 0 else None
        # CODEPATH: theta_norm="chunk_mean" averages over a chunk, as TTT does, instead of adding up.
        divisor = config.chunk_size if config.theta_norm == "chunk_mean" else 1
        self.gates = MemoryGates(
            config.hidden_size,
            config.num_attention_heads,
            config.num_gate_sets,
            decay=config.memory_decay,
            momentum=config.memory_momentum,
            step_scale=config.theta_max / divisor,
            step_act=config.theta_act,
        )
        hidden = [config.memory_expansion * config.head_dim] * (config.memory_depth - 1)
        self.initial_memory = InitialMemory(
            config.num_attention_heads, [config.head_dim, *hidden, config.head_dim], config.memory_layer_norm
        )
        self.o_norm = MemoryRMSNorm(config.head_dim, config.rms_norm_eps)
        # CODEPATH: beside attention, which always has the persistent tokens, the memory borrows them from there.
        owns_persistent = not beside_attention and config.num_persistent_tokens > 0
        self.persistent = None
        if owns_persistent:
            self.persistent = PersistentTokens(config.num_persistent_tokens, config.hidden_size, config.rms_norm_eps)
        self.options = AnchoredOptions(
            chunk_size=config.chunk_size,
            decay_target=config.decay_target,
            activation=config.memory_act,
            decay_before_grad=config.decay_before_grad,
        )

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        persistent: PersistentTokens | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Read the tokens into the memory and answer each from the memory after it.

        Args:
            hidden_states: normalised hidden states `[B, T, D]`.
            padding_mask: `[B, T]` bool, true where a token is valid; others change no state.
            cu_seqlens: `[N + 1]` boundaries of sequences packed into one row, each with a memory of its own.
            past_key_values: cache with a memory layer at `layer_idx`.
            persistent: tokens to read before every sequence; the memory's own ones by default.

        Returns:
            `[B, T, D]`, or the concatenated heads `[B, T, H d]` without `o_proj`.
        """
        layer = memory_layer(past_key_values, self.layer_idx)
        states = layer.get_states() if layer is not None else None
        if states is None:
            rows = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            states = self._start(self.persistent if persistent is None else persistent, rows)
        read, states = self._memorise(hidden_states, states, padding_mask, cu_seqlens, layer is not None)
        if layer is not None:
            layer.update_states(states, hidden_states.shape[1])

        output = self.o_norm(read).flatten(2) * nn.functional.silu(self.g_proj(hidden_states))
        return output if self.o_proj is None else self.o_proj(output)

    def _start(self, persistent: PersistentTokens | None, rows: int) -> States | None:
        # Persistent tokens say the same to every sequence: they are read once, whatever the batch.
        if persistent is None:
            return None
        _, states = self._memorise(persistent(), None, None, None, True)
        return {name: state.expand(rows, *state.shape[1:]) for name, state in states.items()}

    def _memorise(
        self,
        hidden_states: Tensor,
        states: States | None,
        padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        return_states: bool,
    ) -> tuple[Tensor, States]:
        mixed = torch.cat([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        new_states = {}
        if self.conv is not None:
            tail = None if states is None else states["conv"]
            mixed, new_states["conv"] = self.conv(mixed, tail, padding_mask, cu_seqlens)
        query, key, value = nn.functional.silu(mixed).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)

        op_states = None
        if states is not None:
            op_states = {n.removeprefix(OP_PREFIX): x for n, x in states.items() if n.startswith(OP_PREFIX)}
        weights = self.initial_memory.weights
        # CODEPATH: memory_depth=1, the matrix memory, has an op of its own.
        op, weights = (anchored_linear, weights[0]) if len(weights) == 1 else (anchored_mlp, weights)
        read, op_states = op(
            l2_normalize(query),
            l2_normalize(key),
            value,
            self.gates(hidden_states),
            weights,
            self.initial_memory.norm,
            initial_state=op_states,
            output_final_state=return_states,
            mask=padding_mask,
            cu_seqlens=cu_seqlens,
            options=self.options,
        )
        return read, new_states | {OP_PREFIX + name: state for name, state in (op_states or {}).items()}


class TitansGatedAttention(nn.Module):
    """Memory as gate (MAG, eqs. 26-28): sliding-window attention and memory read the same tokens side by side.

    Args:
        config: configuration.
        layer_idx: index of the layer in the cache.
    """

    def __init__(self, config: TitansConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        # CODEPATH: "norm_silu" is the architecture trained from scratch, "additive" adds a memory to an attention
        # layer that is already trained.
        self.is_additive = config.gate == "additive"
        self.persistent_in_memory = config.persistent_in_memory
        self.attention = SlidingWindowAttention(config, layer_idx, project_output=self.is_additive)
        self.memory = TitansMemory(config, layer_idx, beside_attention=True)
        width = config.num_attention_heads * config.head_dim
        self.memory_norm = MemoryRMSNorm(config.hidden_size if self.is_additive else width, config.rms_norm_eps)
        if self.is_additive:
            self.memory_scale = nn.Parameter(torch.zeros(config.hidden_size))
        else:
            self.attention_norm = MemoryRMSNorm(width, config.rms_norm_eps)
            self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Mix `[B, T, D]`; arguments as those of `SlidingWindowAttention` and `TitansMemory`."""
        attended, _ = self.attention(
            hidden_states, position_embeddings, attention_mask, padding_mask, past_key_values, **kwargs
        )
        persistent = self.attention.persistent if self.persistent_in_memory else None
        remembered = self.memory(hidden_states, padding_mask, cu_seqlens, past_key_values, persistent)
        remembered = self.memory_norm(remembered)
        if self.is_additive:
            return attended + self.memory_scale * remembered
        return self.o_proj(self.attention_norm(attended) * nn.functional.silu(remembered))


@auto_docstring
class TitansPreTrainedModel(MemoryPreTrainedModel):
    config: TitansConfig
    _cache_class = TitansCache

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TitansGatedAttention) and module.is_additive:
            init.zeros_(module.memory_scale)


@auto_docstring
class TitansModel(MemoryDecoderMixin, TitansPreTrainedModel):
    mixer_classes = {MEMORY: TitansMemory, MEMORY_SLIDING: TitansGatedAttention}


@auto_docstring
class TitansForCausalLM(MemoryForCausalLMMixin, TitansPreTrainedModel, MemoryGenerationMixin):
    decoder_class = TitansModel


@auto_docstring
class TitansForSequenceClassification(MemoryForSequenceClassificationMixin, TitansPreTrainedModel):
    decoder_class = TitansModel


__all__ = [
    "TitansCache",
    "TitansForCausalLM",
    "TitansForSequenceClassification",
    "TitansModel",
    "TitansPreTrainedModel",
]
