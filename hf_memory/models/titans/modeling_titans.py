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
"""Titans, arXiv 2501.00663: neural memory alone (LMM), as a gate (MAG), as context (MAC) and as a layer (MAL)."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring

from hf_memory.cache import MemoryCache, memory_layer
from hf_memory.configuration import MEMORY, MEMORY_SEGMENT, MEMORY_SLIDING, SLIDING
from hf_memory.layers import MemoryRMSNorm, SlidingWindowAttention
from hf_memory.modeling import (
    MemoryDecoderMixin,
    MemoryForCausalLMMixin,
    MemoryForSequenceClassificationMixin,
    MemoryGenerationMixin,
    MemoryPreTrainedModel,
)

from .configuration_titans import TitansConfig
from .context import TitansContextAttention
from .memory import TitansMemory


class TitansCache(MemoryCache):
    """Cache of a Titans model: memory states of fixed size, and what attention beside or between them keeps."""


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


class TitansSlidingAttention(nn.Module):
    """Sliding-window attention between memories (MAL, eqs. 29-31): the mixer of every other layer.

    Args:
        config: configuration.
        layer_idx: index of the layer in the cache.
    """

    def __init__(self, config: TitansConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.attention = SlidingWindowAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Mix `[B, T, D]`; arguments as those of `SlidingWindowAttention`."""
        attended, _ = self.attention(
            hidden_states, position_embeddings, attention_mask, padding_mask, past_key_values, **kwargs
        )
        if past_key_values is not None:
            memory_layer(past_key_values, self.layer_idx).update_states({}, hidden_states.shape[1])
        return attended


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
    mixer_classes = {
        MEMORY: TitansMemory,
        MEMORY_SEGMENT: TitansContextAttention,
        MEMORY_SLIDING: TitansGatedAttention,
        SLIDING: TitansSlidingAttention,
    }


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
