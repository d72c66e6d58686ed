"""Layers of a memory cache: named states of fixed size, and where attention runs beside a memory, its window.

A memory layer stores named tensors with the batch in front. What they mean is the business of the mixer that wrote
them. Each kind of layer has a static twin that keeps the addresses of its tensors for compiled decoding:

| `layer_types` | keeps |
|---|---|
| `"linear_attention"` | states |
| `"hybrid"` | states, keys and values of one segment of the text among them, and the keys and values of a prefix |
| `"hybrid_sliding"` | states, keys and values of the last `sliding_window - 1` valid tokens, and those of a prefix |
| `"sliding_attention"` | the same without states |
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hf_memory.cache_states import MemoryStatesMixin, States, StaticStatesMixin, fix_address
from hf_memory.configuration import MEMORY, MEMORY_SEGMENT, MEMORY_SLIDING, SLIDING


class MemoryCacheLayer(MemoryStatesMixin, LinearAttentionCacheLayerMixin):
    """Layer that keeps states only (`MEMORY`).

    It counts as a linear-attention layer, so that masks of other layers are never sized by it, but keeps none of their
    numbered states.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """What `Cache.has_previous_state` asks of linear-attention layers."""
        return {0: self.has_states}

    def update(self, *args, **kwargs) -> None:
        """A layer without keys and values refuses them."""
        raise NotImplementedError("A memory layer has no keys and values: use `get_states` and `update_states`.")

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        """States have names here."""
        raise NotImplementedError("States of a memory layer have names: use `get_states` and `update_states`.")

    update_recurrent_state = update_conv_state


class StaticMemoryCacheLayer(StaticStatesMixin, MemoryCacheLayer):
    """Static twin of `MemoryCacheLayer`."""


class PrefixMixin(MemoryStatesMixin):
    """Keys and values `[1, H, N, D]` of a learned prefix, kept because they cost as much to project as N tokens."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.has_prefix = False

    def set_prefix(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values of the prefix for the next call."""
        old_keys, old_values = self.prefix or (None, None)
        self.prefix = (self._replace(old_keys, keys), self._replace(old_values, values))
        self.has_prefix = True

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the layer holds."""
        yield from super().tensors()
        yield from self.prefix or ()

    def reset(self) -> None:
        """Forget everything: the next token meets the learned start."""
        super().reset()
        self.prefix = None
        self.has_prefix = False


class MemorySegmentCacheLayer(PrefixMixin, MemoryCacheLayer):
    """Layer of a mixer that reads its text in segments (`MEMORY_SEGMENT`).

    Keys and values of a segment are states like any other: they have their full size from the first token on, each row
    fills them at its own pace, and they are cleared when the row's segment ends.
    """


class StaticMemorySegmentCacheLayer(StaticStatesMixin, MemorySegmentCacheLayer):
    """Static twin of `MemorySegmentCacheLayer`."""

    def reset(self) -> None:
        """Forget everything, but keep the buffers."""
        super().reset()
        self.has_prefix = False


class MemorySlidingCacheLayer(PrefixMixin):
    """Layer that keeps a window of keys and values, beside states (`MEMORY_SLIDING`) or alone (`SLIDING`).

    The window holds the last `sliding_window - 1` *valid* tokens of each row: a padded token takes no slot, so that no
    padding, wherever it is, shortens what a row can attend to. Rows may therefore hold tokens from different columns
    of the input; `key_positions` says which token of its row each key is.

    Keys and values are `[B, H, S, D]`, positions `[B, S]` int64 (-1 for an empty slot).
    """

    is_compileable = False
    is_sliding = True
    slot_dims = {"window.keys": 2, "window.values": 2, "window.positions": 1}

    def __init__(self, sliding_window: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.sliding_window = sliding_window
        self.num_slots = 0 if sliding_window is None else sliding_window - 1
        self.num_initial_slots = 0
        self.key_positions: Tensor | None = None

    def slots(self, device: torch.device) -> Tensor:
        """Positions of the cached keys, `[B or 1, S]`, -1 for an empty slot."""
        if self.key_positions is not None:
            return self.key_positions.to(device)
        if self.sliding_window is None:
            raise ValueError(
                "This cache was made without the width of the window, as transformers makes caches for layer types of "
                "its own: pass a `MemoryCache(config)` as `past_key_values`, or none at all."
            )
        return torch.full((1, self.num_initial_slots), -1, device=device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, padding_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, H, T, D]`.

        Args:
            key_states: new keys.
            value_states: new values.
            padding_mask: `[B, T]` bool, true where a token is valid.

        Returns:
            Keys and values `[B, H, S + T, D]`, the window before the call followed by the new ones; `window_positions`
            describes them.
        """
        self.prefetch()
        if self.keys is None:
            self._start_window(key_states, value_states)
        _, positions = window_positions(self, key_states.shape[2], padding_mask, key_states.device)
        positions = positions.expand(key_states.shape[0], -1)
        keys = torch.cat((self.keys, key_states), dim=2)
        values = torch.cat((self.values, value_states), dim=2)
        if padding_mask is None:
            self._store(keys, values, positions)
        else:
            order = torch.argsort((positions >= 0).long(), dim=1, stable=True)
            rows = order[:, None, :, None]
            kept_keys = keys.gather(2, rows.expand_as(keys))
            kept_values = values.gather(2, rows.expand_as(values))
            self._store(kept_keys, kept_values, positions.gather(1, order))
        return keys, values

    def _start_window(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        batch, heads, _, _ = key_states.shape
        empty = (batch, heads, self.num_initial_slots)
        self.keys = key_states.new_zeros(*empty, key_states.shape[3])
        self.values = value_states.new_zeros(*empty, value_states.shape[3])
        self.key_positions = self.slots(self.device).expand(batch, -1)

    def _store(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        first = max(keys.shape[2] - self.num_slots, 0)
        # Contiguous, as a view would keep all keys of a long call alive.
        self.keys = self._replace(self.keys, keys[:, :, first:].contiguous())
        self.values = self._replace(self.values, values[:, :, first:].contiguous())
        self.key_positions = self._replace(self.key_positions, positions[:, first:].contiguous())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for this layer would have."""
        slots = 0 if self.keys is None else self.keys.shape[2]
        return slots + query_length, self.seq_length - slots

    def get_max_length(self) -> int:
        """Width of the window."""
        return -1 if self.sliding_window is None else self.sliding_window

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the layer holds."""
        yield from self.states.values()
        if self.keys is not None:
            yield from (self.keys, self.values, self.key_positions)
        yield from self.prefix or ()

    def saved_tensors(self) -> States:
        """States and window; keys and values of the learned prefix follow from the weights."""
        window = zip(self.slot_dims, (self.keys, self.values, self.key_positions))
        return super().saved_tensors() | {name: tensor for name, tensor in window if tensor is not None}

    def restore(self, tensors: States, num_tokens: int) -> None:
        """See `MemoryStatesMixin.restore`."""
        self.keys, self.values, self.key_positions = (tensors[name] for name in self.slot_dims)
        super().restore({name: x for name, x in tensors.items() if name not in self.slot_dims}, num_tokens)

    def num_saved_slots(self, num_tokens: int) -> int:
        """Slots that the window has behind `num_tokens` tokens."""
        return min(num_tokens, self.num_slots)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map(function)
        if self.keys is not None:
            self._store(function(self.keys), function(self.values), function(self.key_positions))

    def reset(self) -> None:
        """Forget everything: the next token meets the learned start and an empty window."""
        super().reset()
        self.keys = self.values = self.key_positions = None


class StaticMemorySlidingCacheLayer(StaticStatesMixin, MemorySlidingCacheLayer):
    """Static twin of `MemorySlidingCacheLayer`: all slots exist from the start, empty ones have position -1."""

    def __init__(self, max_cache_len: int, **kwargs) -> None:
        super().__init__(max_cache_len, **kwargs)
        # The whole window, also where `max_cache_len` is shorter: reading on would narrow it without a word.
        self.num_slots = self.num_initial_slots = max(self.num_slots, 1)
        self._spare: tuple[Tensor, Tensor, Tensor] | None = None

    def _start_window(self, key_states: Tensor, value_states: Tensor) -> None:
        if self._spare is None or self._spare[0].shape[0] != key_states.shape[0]:
            super()._start_window(key_states, value_states)
            self._spare = tuple(fix_address(x.contiguous()) for x in (self.keys, self.values, self.key_positions))
        self.keys, self.values, self.key_positions = self._spare
        self.key_positions.fill_(-1)

    def reset(self) -> None:
        """Forget everything, but keep the buffers."""
        StaticStatesMixin.reset(self)
        self.has_prefix = False
        if self.keys is not None:
            self._spare = (self.keys, self.values, self.key_positions)
            self.keys = self.values = self.key_positions = None


LAYER_CLASSES = {
    MEMORY: MemoryCacheLayer,
    MEMORY_SEGMENT: MemorySegmentCacheLayer,
    MEMORY_SLIDING: MemorySlidingCacheLayer,
    SLIDING: MemorySlidingCacheLayer,
}
STATIC_LAYER_CLASSES = {
    MEMORY: StaticMemoryCacheLayer,
    MEMORY_SEGMENT: StaticMemorySegmentCacheLayer,
    MEMORY_SLIDING: StaticMemorySlidingCacheLayer,
    SLIDING: StaticMemorySlidingCacheLayer,
}


def window_positions(
    layer: MemorySlidingCacheLayer | None, length: int, padding_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Number the tokens of each row, valid ones only.

    Args:
        layer: what the row has read before; `None` for nothing.
        length: number T of new tokens.
        padding_mask: `[B, T]` bool, true where a new token is valid.
        device: device of the results.

    Returns:
        Positions of the new tokens, `[B or 1, T]`, and of the S slots of the window followed by the new tokens,
        `[B or 1, S + T]`, where -1 marks keys that nobody may see.
    """
    cached = torch.empty(1, 0, dtype=torch.long, device=device) if layer is None else layer.slots(device)
    start = cached.amax(1, keepdim=True) + 1 if cached.shape[1] else 0
    if padding_mask is None:
        queries = start + torch.arange(length, device=device)[None]
        new = queries
    else:
        queries = (start + padding_mask.cumsum(1) - 1).clamp(min=0)
        new = torch.where(padding_mask, queries, -1)
    rows = max(cached.shape[0], new.shape[0])
    return queries, torch.cat((cached.expand(rows, -1), new.expand(rows, -1)), dim=1)
