"""A transformers `Cache` whose layers own memory states of fixed size (`hf_memory.cache_layers`)."""

import copy
from collections.abc import Iterator
from typing import Self, TypeVar

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig

from hf_memory.cache_layers import LAYER_CLASSES, STATIC_LAYER_CLASSES, MemoryStatesMixin, fix_address


Layer = TypeVar("Layer", bound=MemoryStatesMixin)


def memory_layer(past_key_values: Cache | None, layer_idx: int, kind: type[Layer] = MemoryStatesMixin) -> Layer | None:
    """Layer of a cache that a mixer may use, or `None` without a cache.

    Raises:
        ValueError: if the cache has no memory layer at this index, or one of another kind.
    """
    if past_key_values is None:
        return None
    layers = past_key_values.layers
    if layer_idx >= len(layers) or not isinstance(layers[layer_idx], MemoryStatesMixin):
        raise ValueError(
            f"Layer {layer_idx} needs a cache with memory states, but `past_key_values` is a "
            f"{type(past_key_values).__name__} without them: pass a `MemoryCache(config)`, or none at all."
        )
    layer = layers[layer_idx]
    if not isinstance(layer, kind):
        raise ValueError(
            f"Layer {layer_idx} needs a {kind.__name__}, `past_key_values` has a {type(layer).__name__} there: a "
            "cache continues only the model that it was made for."
        )
    return layer


class MemoryCacheMixin:
    """What a memory cache offers beyond a transformers `Cache`."""

    def _use_own_layers(self, config: PreTrainedConfig, classes: dict[str, type[MemoryStatesMixin]], **kwargs) -> None:
        # transformers hands the width of the window to a fixed list of its own layer types only. A hybrid keeps the
        # layer types and the window of its teacher, and has names of its own for these two.
        kinds = getattr(config, "memory_layer_types", None) or getattr(config, "layer_types", None)
        window = getattr(config, "memory_window", None) or getattr(config, "sliding_window", None)
        for i, kind in enumerate(kinds or ()):
            if kind in classes:
                self.layers[i] = classes[kind](sliding_window=window, **kwargs)

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers transformers may take a sliding-window mask from; masks of memory layers are never its own."""
        return self._without_memory_layers(super().is_sliding, False)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers transformers must not take a causal mask from."""
        return self._without_memory_layers(super().is_linear, True)

    def _without_memory_layers(self, flags: list[bool], instead: bool) -> list[bool]:
        is_own = [isinstance(layer, MemoryStatesMixin) for layer in self.layers]
        # Where all layers are ours, these flags only say which of them can be offloaded.
        return flags if all(is_own) else [instead if own else flag for own, flag in zip(is_own, flags)]

    @property
    def nbytes(self) -> int:
        """Size of all cached tensors, in bytes; for memory layers it does not depend on the number of tokens read."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def seen_tokens(self) -> int | Tensor:
        """Number of tokens read per row, padded ones included (a tensor in a static cache)."""
        return self.get_seq_length()

    def clone(self) -> Self:
        """Independent copy without autograd history: both can go on reading different texts."""
        memo = {id(tensor): tensor.detach().clone() for tensor in self._tensors()}
        stream = getattr(self, "prefetch_stream", None)  # cannot be copied
        return copy.deepcopy(self, memo | {id(stream): stream})

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, MemoryStatesMixin):
                yield from layer.tensors()
            else:
                yield from (value for value in vars(layer).values() if isinstance(value, Tensor))


class MemoryCache(MemoryCacheMixin, DynamicCache):
    """Cache of a model with memory layers; other layer types get the layers of transformers.

    Args:
        config: the model's configuration; `layer_types` says what each layer keeps.
        offloading: keep windows of keys and values on the CPU between uses. Memory states stay where they are.
        offload_only_non_sliding: see `DynamicCache`.
    """

    # Decoding with a cache that grows or assigns its tensors must never be compiled behind the user's back.
    is_compileable = False

    def __init__(
        self, config: PreTrainedConfig, offloading: bool = False, offload_only_non_sliding: bool = False
    ) -> None:
        config = config.get_text_config(decoder=True)
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self._use_own_layers(config, LAYER_CLASSES)


class StaticMemoryCache(MemoryCacheMixin, StaticCache):
    """Static twin of `MemoryCache`, for compiled decoding.

    Args:
        config: the model's configuration.
        max_cache_len: tokens that layers with keys and values must be able to hold; memory layers hold any number.
        offloading: see `MemoryCache`.
        offload_only_non_sliding: see `StaticCache`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:
        config = config.get_text_config(decoder=True)
        super().__init__(config, max_cache_len, offloading, offload_only_non_sliding)
        self._use_own_layers(config, STATIC_LAYER_CLASSES, max_cache_len=max_cache_len)

    def clone(self) -> Self:
        """Independent copy without autograd history, with fixed addresses of its own."""
        cache = super().clone()
        for tensor in cache._tensors():
            fix_address(tensor)
        return cache
