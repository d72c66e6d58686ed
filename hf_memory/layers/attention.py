"""Sliding-window attention with a learned prefix that every token sees."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from hf_memory.cache import memory_layer
from hf_memory.cache_layers import MemorySlidingCacheLayer, PrefixMixin, window_positions
from hf_memory.layers.norms import at_least_float32
from hf_memory.layers.persistent import PersistentTokens
from hf_memory.layers.rotary import apply_rotary_pos_emb


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Attention spelled out; the only implementation that returns its weights."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(at_least_float32(weights), dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SlidingWindowAttention(nn.Module):
    """Token i attends to valid tokens i - w + 1 ... i of its row and to all persistent tokens.

    Persistent tokens go through the layer's key and value projections without rotation: they have no order, all of
    them stand where the text begins.

    Args:
        config: configuration; `sliding_window` is w, `num_persistent_tokens` the length of the prefix.
        layer_idx: index of the layer in the cache.
        project_output: whether to apply `o_proj`; without it the concatenated heads are returned.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, project_output: bool = True) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        width, bias = config.num_attention_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias) if project_output else None
        self.persistent = None
        if config.num_persistent_tokens > 0:
            self.persistent = PersistentTokens(config.num_persistent_tokens, config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: `[B, T, D]`.
            position_embeddings: cosine and sine of the tokens' positions.
            attention_mask: what `create_window_mask` returns.
            padding_mask: `[B, T]` bool, true where a token is valid.
            past_key_values: cache with a `MemorySlidingCacheLayer` at `layer_idx`.

        Returns:
            Outputs `[B, T, D]` (or `[B, T, H d]` without `o_proj`) and, from the eager implementation, weights.
        """
        query, key, value = (self._heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        layer = memory_layer(past_key_values, self.layer_idx, MemorySlidingCacheLayer)
        if layer is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, padding_mask=padding_mask)
        if self.persistent is not None:
            prefix = (x.expand(key.shape[0], -1, -1, -1) for x in kept_prefix(layer, self._project_prefix))
            key, value = (torch.cat((before, x), dim=2) for before, x in zip(prefix, (key, value)))

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.flatten(2)
        return (output if self.o_proj is None else self.o_proj(output)), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _project_prefix(self) -> tuple[Tensor, Tensor]:
        rows = self.persistent()
        return self._heads(self.k_proj(rows)), self._heads(self.v_proj(rows))


def kept_prefix(layer: PrefixMixin | None, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, H, N, d]` of a learned prefix.

    Projecting the prefix costs as much as projecting that many tokens, so that decoding keeps the result. Training
    needs a graph of its own in every call.
    """
    if layer is not None and layer.has_prefix and not torch.is_grad_enabled():
        return layer.prefix
    prefix = project()
    if layer is not None:
        layer.set_prefix(*prefix)
    return prefix


def create_window_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    layer: MemorySlidingCacheLayer | None = None,
    padding_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor | None:
    """Mask of `SlidingWindowAttention`, once for all layers.

    The masks of transformers count slots of the cache; this one counts valid tokens of a row, so that padding between
    two tokens does not bring the end of the window closer.

    Args:
        config: configuration.
        inputs_embeds: `[B, T, ...]`, for its shape, dtype and device.
        layer: cache layer of any sliding layer; all have read the same tokens.
        padding_mask: `[B, T]` bool, true where a token is valid.
        sequence_ids: `[T]`, which of the packed sequences each token belongs to.

    Returns:
        `[B or 1, 1, T, N + S + T]` for N prefix keys and S slots of the window: bool (true is visible), or additive
        for the eager implementation. `None` where `is_causal` says it all.
    """
    return window_mask(
        inputs_embeds,
        config.sliding_window,
        config.num_persistent_tokens,
        takes_additive_mask(config),
        layer,
        padding_mask,
        sequence_ids,
    )


def takes_additive_mask(config: PreTrainedConfig) -> bool:
    """Whether the attention implementation adds its mask to the scores instead of selecting by it."""
    return config._attn_implementation == "eager"


def window_mask(
    inputs_embeds: Tensor,
    window: int,
    prefix: int,
    eager: bool,
    layer: MemorySlidingCacheLayer | None = None,
    padding_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor | None:
    """`create_window_mask` for a window of `window` tokens behind `prefix` keys that everybody sees."""
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    queries, keys = window_positions(layer, length, padding_mask, device)
    if not eager and not prefix and padding_mask is None and sequence_ids is None:
        if keys.shape[1] == length and 1 < length <= window:
            return None

    queries, keys = queries[:, :, None], keys[:, None, :]
    visible = (keys <= queries) & (keys > queries - window) & (keys >= 0)
    if sequence_ids is not None:
        visible = visible & (sequence_ids[:, None] == sequence_ids)
    if padding_mask is not None:
        # A padded token sees itself: a row of a softmax without any key is NaN, and NaN times zero stays NaN.
        visible[:, :, -length:] |= torch.eye(length, dtype=torch.bool, device=device)
    mask = torch.cat((visible.new_ones(*visible.shape[:2], prefix), visible), dim=2).unsqueeze(1)
    return additive_mask(mask, inputs_embeds.dtype) if eager else mask


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What the eager implementation adds to its scores for a bool mask that is true where a key is visible."""
    return torch.where(visible, torch.zeros((), dtype=dtype, device=visible.device), torch.finfo(dtype).min)
