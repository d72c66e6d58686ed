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
"""The neural memory of Titans, arXiv 2501.00663: projections, gates and learned start around an anchored memory."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from hf_memory.cache import memory_layer
from hf_memory.kernels import AnchoredOptions, Norm, anchored_linear, anchored_mlp, overwrites_state
from hf_memory.kernels.activations import ACTIVATIONS
from hf_memory.kernels.inner import output
from hf_memory.kernels.precision import without_autocast
from hf_memory.layers import (
    InitialMemory,
    MemoryGates,
    MemoryRMSNorm,
    PersistentTokens,
    ShortConvolution,
    l2_normalize,
)
from hf_memory.layers.norms import at_least_float32

from .configuration_titans import TitansConfig


States = dict[str, Tensor]

# Names of the op's states inside a cache layer, beside the tail of the convolution.
OP_PREFIX = "memory."


class TitansMemory(nn.Module):
    """Neural memory: a small network per head that each token trains by one step before it reads from it.

    On its own the mixer of `variant="lmm"` and of the memory layers of `"mal"`, beside attention a part of
    `TitansGatedAttention` (`"mag"`) and `TitansContextAttention` (`"mac"`).

    Args:
        config: configuration.
        layer_idx: index of the layer in the cache.
        beside_attention: whether another mixer owns the persistent tokens and, where the gate joins both branches
            before the output projection, that projection too.
        gated: whether what is read passes a norm per head and a gate of its own; not where attention is that gate.
    """

    def __init__(
        self, config: TitansConfig, layer_idx: int, beside_attention: bool = False, gated: bool = True
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.chunk_size = config.chunk_size
        width, bias = config.num_attention_heads * config.head_dim, config.attention_bias

        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        # CODEPATH: in "mac" attention is the gate of what is read.
        self.g_proj = nn.Linear(config.hidden_size, width, bias=bias) if gated else None
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
        self.o_norm = MemoryRMSNorm(config.head_dim, config.rms_norm_eps) if gated else None
        # CODEPATH: beside attention, which always has the persistent tokens, the memory borrows them from there.
        reads_persistent = config.persistent_in_memory and config.num_persistent_tokens > 0
        self.persistent = None
        if reads_persistent and not beside_attention:
            self.persistent = PersistentTokens(config.num_persistent_tokens, config.hidden_size, config.rms_norm_eps)
        self.options = AnchoredOptions(
            chunk_size=config.chunk_size,
            decay_target=config.decay_target,
            activation=config.memory_act,
            decay_before_grad=config.decay_before_grad,
        )
        self.overwriting_options = replace(self.options, overwrite_state=True)

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
        # While generating, a token changes the state where it lies instead of writing a second one.
        can_overwrite = hidden_states.shape[1] == 1 and not torch.is_grad_enabled()
        overwrite = can_overwrite and overwrites_state(hidden_states.device)
        states = layer.get_states(OP_PREFIX if overwrite else None) if layer is not None else None
        if states is None:
            overwrite = False
            rows = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            states = self.start(self.persistent if persistent is None else persistent, rows)
        read, states = self.memorise(hidden_states, states, padding_mask, cu_seqlens, layer is not None, overwrite)
        if layer is not None:
            layer.update_states(states, hidden_states.shape[1])

        output = self.o_norm(read).flatten(2) * nn.functional.silu(self.g_proj(hidden_states))
        return output if self.o_proj is None else self.o_proj(output)

    def start(self, persistent: PersistentTokens | None, rows: int) -> States | None:
        """States of `rows` rows before their first token; `None` for the learned start itself."""
        # Persistent tokens say the same to every sequence: they are read once, whatever the batch.
        if persistent is None:
            return None
        _, states = self.memorise(persistent(), None, None, None, True)
        return {name: state.expand(rows, *state.shape[1:]) for name, state in states.items()}

    def memorise(
        self,
        hidden_states: Tensor,
        states: States | None,
        padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        return_states: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor, States]:
        """Values `[B, T, H, d]` read after each of the tokens `[B, T, D]`, and the states behind the last.

        With `overwrite`, for a single token, the tensors of `states` may become those of the states behind it.
        """
        query, key, value, new_states = self.project(hidden_states, states, padding_mask, cu_seqlens)

        op_states = None
        if states is not None:
            op_states = {n.removeprefix(OP_PREFIX): x for n, x in states.items() if n.startswith(OP_PREFIX)}
        weights = self.initial_memory.weights
        # CODEPATH: memory_depth=1, the matrix memory, has an op of its own.
        op, weights = (anchored_linear, weights[0]) if len(weights) == 1 else (anchored_mlp, weights)
        read, op_states = op(
            query,
            key,
            value,
            self.gates(hidden_states),
            weights,
            self.initial_memory.norm,
            initial_state=op_states,
            output_final_state=return_states,
            mask=padding_mask,
            cu_seqlens=cu_seqlens,
            options=self.overwriting_options if overwrite else self.options,
        )
        return read, new_states | {OP_PREFIX + name: state for name, state in (op_states or {}).items()}

    def project(
        self,
        hidden_states: Tensor,
        states: States | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, States]:
        """Queries, keys (of length 1) and values `[B, T, H, d]` of tokens `[B, T, D]`, and the convolution's state."""
        mixed = torch.cat([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        new_states = {}
        if self.conv is not None:
            tail = None if states is None else states["conv"]
            mixed, new_states["conv"] = self.conv(mixed, tail, padding_mask, cu_seqlens)
        query, key, value = nn.functional.silu(mixed).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        return l2_normalize(query), l2_normalize(key), value, new_states

    def anchor(self, states: States | None, rows: int) -> tuple[Tensor, ...]:
        """The memory at its last chunk boundary as `recall` takes it, `[B, H, in, out]` per memory layer."""
        returns_to_start = self.options.decay_target == "init"
        if states is not None:
            kind = "offset" if returns_to_start else "memory"
            return tuple(states[f"{OP_PREFIX}{kind}_{i}"] for i in range(self.initial_memory.depth))
        weights = (weight.expand(rows, *weight.shape) for weight in self.initial_memory.weights)
        return tuple(torch.zeros_like(weight) if returns_to_start else weight for weight in weights)

    def recall(self, query: Tensor, anchor: tuple[Tensor, ...]) -> Tensor:
        """Answers `[B, T, H, d]` of a memory that stays as it is, to queries `[B, T, H, d]` in front of their SiLU."""
        weights = anchor
        if self.options.decay_target == "init":
            weights = tuple(start + offset for start, offset in zip(self.initial_memory.weights, anchor))
        with without_autocast(query.device):
            key = at_least_float32(l2_normalize(nn.functional.silu(query))).transpose(1, 2)
            # A float64 model keeps its initial memory in float32 as every model does.
            weights = tuple(weight.to(torch.promote_types(weight.dtype, key.dtype)) for weight in weights)
            z = key @ weights[0]
            for weight in weights[1:]:
                z = ACTIVATIONS[self.options.activation].value(z) @ weight
            norm = self.initial_memory.norm
            if norm is not None:
                norm = Norm(*(x.unsqueeze(1) for x in norm))
            return output(key, z, norm, self.options.eps).transpose(1, 2)
