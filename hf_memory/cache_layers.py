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
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from hf_memory.configuration import MEMORY, MEMORY_SEGMENT, MEMORY_SLIDING, SLIDING


States = dict[str, Tensor]


class MemoryStatesMixin(CacheLayerMixin):
    """Named states `[B, ...]` of one layer and the number of tokens they have absorbed."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.states: States = {}
        self.has_states = False
        self.is_offloaded = False
        self.seq_length: int | Tensor = 0
        self.device: torch.device | None = None

    def get_states(self) -> States | None:
        """States after the tokens seen so far; `None` before the first, where the mixer has its learned start."""
        if not self.has_states:
            return None
        self.prefetch()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Autograd refuses tensors that were made in inference mode.
            return {name: x.clone() if x.is_inference() else x for name, x in self.states.items()}
        return self.states

    def check_rows(self, rows: int) -> None:
        """Raise a `ValueError` unless the layer is empty or holds this many rows."""
        cached = next(self.tensors()).shape[0] if self.has_states else rows
        if cached != rows:
            raise ValueError(
                f"`past_key_values` holds {cached} rows, the input has {rows}: bring it to that number with "
                "`batch_repeat_interleave` or `batch_select_indices`, or start a new cache."
            )

    def update_states(self, states: States, num_tokens: int) -> None:
        """Replace the states (if any) by those after `num_tokens` more tokens (padded ones included)."""
        self.states = self.states | {name: self._replace(self.states.get(name), new) for name, new in states.items()}
        self.device = self._device_of(states)
        self.has_states = self.is_initialized = True
        self._count(num_tokens)

    def _device_of(self, states: States) -> torch.device | None:
        return next((state.device for state in states.values()), self.device)

    def _count(self, num_tokens: int) -> None:
        self.seq_length += num_tokens

    def lazy_initialization(self, *args, **kwargs) -> None:
        """States take their shapes from the first update."""

    def get_seq_length(self) -> int | Tensor:
        """Number of tokens seen, padded ones included."""
        return self.seq_length

    def get_max_length(self) -> int:
        """-1: the states hold any number of tokens."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for this layer would have."""
        return self.seq_length + query_length, 0

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the layer holds."""
        yield from self.states.values()

    @property
    def nbytes(self) -> int:
        """Size of all tensors that the layer holds, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def _replace(self, old: Tensor | None, new: Tensor) -> Tensor:
        # Never copied into `old`: it may belong to the graph of a truncated backward pass or, when it was made in
        # inference mode, refuse to be written outside of it. But a view would keep all rows of a long call alive.
        if torch.compiler.is_compiling() or new.untyped_storage().nbytes() <= new.nbytes:
            return new
        return new.clone()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = {name: self._replace(state, function(state)) for name, state in self.states.items()}

    def reset(self) -> None:
        """Forget everything: the next token meets the learned start."""
        self.states = {}
        self.has_states = self.is_initialized = self.is_offloaded = False
        self.seq_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move the layer to the CPU until it is used again."""
        if self.is_initialized:
            self._map(lambda x: x.to("cpu", non_blocking=True))
            self.is_offloaded = True

    def prefetch(self) -> None:
        """Move an offloaded layer back to its device."""
        if self.is_offloaded:
            self._map(lambda x: x.to(self.device, non_blocking=True))
            self.is_offloaded = False

    def activate_past_recording(self) -> None:
        """Refuse the role of a draft model, whose cache is rolled back after each rejected token."""
        self.crop(-1)

    def crop(self, tokens_to_remove: int) -> None:
        """Accept 0; a recurrent memory cannot forget single tokens."""
        if tokens_to_remove != 0:
            raise ValueError(
                "A recurrent memory cannot take back tokens it has read: decode without an assistant, or keep "
                "`cache.clone()` from before the tokens in question and continue from that."
            )


class StaticStatesMixin(MemoryStatesMixin):
    """States at fixed addresses, counted by a tensor: a compiled decode step meets nothing that changes in Python."""

    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len
        self.seq_length = torch.zeros((), dtype=torch.long)

    def get_seq_length(self) -> int | Tensor:
        """Number of tokens seen, padded ones included."""
        return self.seq_length if self.is_initialized else 0

    def update_states(self, states: States, num_tokens: int) -> None:
        """Write the states after `num_tokens` more tokens into their buffers."""
        if not self.is_initialized:
            self.seq_length = fix_address(self.seq_length.to(self._device_of(states)))
        super().update_states(states, num_tokens)

    def _count(self, num_tokens: int) -> None:
        self.seq_length = self._replace(self.seq_length, self.seq_length + num_tokens)

    def _replace(self, old: Tensor | None, new: Tensor) -> Tensor:
        if new is old or new.requires_grad:
            return new
        if old is None or old.requires_grad or old.shape != new.shape or old.device != new.device or is_locked(old):
            return fix_address(new.clone(memory_format=torch.contiguous_format))
        return old.copy_(new)

    def reset(self) -> None:
        """Forget everything, but keep the buffers."""
        self.has_states = False
        self.seq_length.zero_()


def is_locked(tensor: Tensor) -> bool:
    """Whether inference mode made the tensor and no longer runs: writing it would raise."""
    return not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()


def fix_address(tensor: Tensor) -> Tensor:
    """Promise CUDA graphs that `tensor` stays where it is."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


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
