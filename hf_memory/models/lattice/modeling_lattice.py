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
"""Lattice: memory slots that only take in what they do not contain already, arXiv 2504.05646."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring

from hf_memory.cache import MemoryCache, memory_layer
from hf_memory.configuration import MEMORY
from hf_memory.kernels import SphereOptions, sphere_slots
from hf_memory.layers import MemoryGates, MemoryRMSNorm, ShortConvolution, l2_normalize
from hf_memory.modeling import (
    MemoryDecoderMixin,
    MemoryForCausalLMMixin,
    MemoryForSequenceClassificationMixin,
    MemoryGenerationMixin,
    MemoryPreTrainedModel,
)

from .configuration_lattice import LatticeConfig


# Names of the op's states inside a cache layer, beside the tail of the convolution.
OP_PREFIX = "memory."


class LatticeCache(MemoryCache):
    """Cache of a Lattice model: slots of fixed number and width, and the tails of convolutions."""


class InitialSlots(nn.Module):
    """Slots that a memory starts from, orthonormal in a fresh model; only their directions matter.

    Float32 whatever the model's dtype, as the state that starts here.

    Args:
        num_heads: memory heads H.
        num_slots: slots M of each.
        width: width D of a slot.
    """

    def __init__(self, num_heads: int, num_slots: int, width: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(num_heads, num_slots, width, dtype=torch.float32))

    def extra_repr(self) -> str:
        return "{} heads, {} slots of width {}".format(*self.slots.shape)


class LatticeMemory(nn.Module):
    """Slots that each token turns towards what they do not contain yet, before it reads from them.

    Args:
        config: configuration.
        layer_idx: index of the layer in the cache.
    """

    def __init__(self, config: LatticeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.qk_act, self.qk_norm = config.num_attention_heads, config.qk_act, config.qk_norm
        code, content = (self.num_heads * width for width in (config.code_width, config.content_width))
        self.widths = (code, code, content)
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, code, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, code, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, content, bias=bias)
        self.g_proj = nn.Linear(config.hidden_size, content, bias=bias)
        self.o_proj = nn.Linear(content, config.hidden_size, bias=bias)
        # CODEPATH: conv_kernel=0 is the ablation without convolution.
        self.conv = ShortConvolution(sum(self.widths), config.conv_kernel) if config.conv_kernel > 0 else None
        share = config.gamma_init / config.gamma_max
        self.gates = MemoryGates(
            config.hidden_size,
            self.num_heads,
            num_sets=1,
            decay=config.memory_decay,
            momentum=False,
            step_scale=config.gamma_max,
            initial_step=math.log(share / (1 - share)),
        )
        self.initial_memory = InitialSlots(self.num_heads, config.num_slots, config.head_dim)
        self.o_norm = MemoryRMSNorm(config.content_width, config.rms_norm_eps)
        self.gate_act = config.gate_act
        self.gate_fn = ACT2FN[config.gate_act]
        self.options = SphereOptions(config.objective, config.normalization, config.chunk_size)

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Read the tokens into the slots and answer each from the slots behind it.

        Args:
            hidden_states: normalised hidden states `[B, T, D]`.
            padding_mask: `[B, T]` bool, true where a token is valid; others change no state.
            cu_seqlens: `[N + 1]` boundaries of sequences packed into one row, each with slots of its own.
            past_key_values: cache with a memory layer at `layer_idx`.

        Returns:
            `[B, T, D]`.
        """
        layer = memory_layer(past_key_values, self.layer_idx)
        states = (layer.get_states() if layer is not None else None) or {}
        new_states = {}
        mixed = torch.cat([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        if self.conv is not None:
            mixed, new_states["conv"] = self.conv(mixed, states.get("conv"), padding_mask, cu_seqlens)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in mixed.split(self.widths, dim=-1))

        op_states = {n.removeprefix(OP_PREFIX): x for n, x in states.items() if n.startswith(OP_PREFIX)}
        read, op_states = sphere_slots(
            self.code(query),
            self.code(key),
            value,
            self.gates(hidden_states),
            self.initial_memory.slots,
            initial_state=op_states or None,
            output_final_state=layer is not None,
            mask=padding_mask,
            cu_seqlens=cu_seqlens,
            options=self.options,
        )
        if layer is not None:
            new_states |= {OP_PREFIX + name: state for name, state in op_states.items()}
            layer.update_states(new_states, hidden_states.shape[1])
        return self.o_proj(self.o_norm(read).flatten(2) * self.gate_fn(self.g_proj(hidden_states)))

    def code(self, x: Tensor) -> Tensor:
        """Queries and keys `[B, T, H, .]` as the slots take them."""
        # CODEPATH: qk_act and qk_norm are open in the paper; "silu" and "l2" keep `step * ‖k‖²` below 1.
        if self.qk_act == "silu":
            x = nn.functional.silu(x)
        if self.qk_norm == "l2":
            return l2_normalize(x)
        return x if self.qk_norm == "none" else x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))


@auto_docstring
class LatticePreTrainedModel(MemoryPreTrainedModel):
    config: LatticeConfig
    _cache_class = LatticeCache

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InitialSlots):
            # Orthonormal slots; where there are more of them than their width, a frame of orthonormal columns.
            drawn = torch.randn_like(module.slots)
            is_wide = drawn.shape[1] <= drawn.shape[2]
            basis = torch.linalg.qr(drawn.mT if is_wide else drawn)[0]
            init.copy_(module.slots, basis.mT if is_wide else basis)


@auto_docstring
class LatticeModel(MemoryDecoderMixin, LatticePreTrainedModel):
    mixer_classes = {MEMORY: LatticeMemory}


@auto_docstring
class LatticeForCausalLM(MemoryForCausalLMMixin, LatticePreTrainedModel, MemoryGenerationMixin):
    decoder_class = LatticeModel


@auto_docstring
class LatticeForSequenceClassification(MemoryForSequenceClassificationMixin, LatticePreTrainedModel):
    decoder_class = LatticeModel


__all__ = [
    "LatticeCache",
    "LatticeForCausalLM",
    "LatticeForSequenceClassification",
    "LatticeModel",
    "LatticePreTrainedModel",
]
