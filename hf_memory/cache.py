"""A transformers `Cache` whose layers own memory states of fixed size (`hf_memory.cache_layers`)."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_memory.cache_layers import LAYER_CLASSES, STATIC_LAYER_CLASSES
from hf_memory.cache_states import MemoryStatesMixin, fix_address
from hf_memory.memory_file import MemoryInfo, ModelFit, find_memory_file, memory_info, read_memory, write_memory
from hf_memory.memory_identity import ModelIdentity


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

    takes_new_tokens_only = False
    """Whether `generate` gets new tokens only, as behind `model.read`: nobody has the ids of what was read."""

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

    model_identity: ModelIdentity | None = None
    """The model that filled the cache, as `model.read` and memory files know it."""

    def __init__(
        self, config: PreTrainedConfig, offloading: bool = False, offload_only_non_sliding: bool = False
    ) -> None:
        config = config.get_text_config(decoder=True)
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self._use_own_layers(config, LAYER_CLASSES)
        self.notes: dict[str, str] = {}

    @property
    def info(self) -> MemoryInfo:
        """What a file of this memory would say about itself: tokens, rows, bytes, model, notes."""
        return memory_info(self)

    def fork(self, count: int) -> list[Self]:
        """Independent copies, to go on from the same point in several ways; this memory stays as it is."""
        if count < 1:
            raise ValueError(f"`fork` makes one copy or more, got {count}.")
        return [self.clone() for _ in range(count)]

    def save_pretrained(self, path: str | os.PathLike, model: PreTrainedModel | None = None) -> Path:
        """Write a memory file, all of it or none (`hf_memory.memory_file`).

        Args:
            path: the file, such as `"book.memory"`; a path without a suffix or an existing folder gets a
                `memory.safetensors`.
            model: the model that filled the cache, where it was not `model.read`.

        Returns:
            The file.

        Raises:
            ValueError: for an empty memory, one with NaN, or one that does not know its model.
            OSError: when the file cannot be written. An older one stays as it was.
        """
        if model is not None:
            self.model_identity = ModelIdentity.of(model)
        return write_memory(self, path)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        model: PreTrainedModel,
        check_weights: bool = True,
        filename: str | None = None,
        revision: str | None = None,
        **hub_kwargs,
    ) -> "MemoryCache":
        """Read a memory file.

        Args:
            source: the file, a folder with a `memory.safetensors`, or the id of a repository on the Hub.
            model: the model that goes on from the memory.
            check_weights: refuse a memory that other weights of the same configuration have made.
            filename: name of the file inside the folder or repository.
            revision: of the repository.
            hub_kwargs: what else `huggingface_hub.hf_hub_download` takes (`token`, `cache_dir`, ...).

        Returns:
            The memory, on the devices of the model's layers.

        Raises:
            FileNotFoundError: when there is no such file or repository.
            hf_memory.memory_file.MemoryMismatchError: for a memory of another model, with the reason.
            ValueError: for a file that is no memory, is truncated or altered, or has a newer format.
        """
        path = find_memory_file(source, filename, revision, **hub_kwargs)
        return read_memory(path, ModelFit(model), check_weights)


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

    def save_pretrained(self, path: str | os.PathLike, model: PreTrainedModel | None = None) -> Path:
        """Refused: the buffers of a static cache have the size of a compiled program, not of what was read."""
        raise ValueError("A static cache cannot be saved: let `model.read` fill a memory, and save that.")

    def clone(self) -> Self:
        """Independent copy without autograd history, with fixed addresses of its own."""
        cache = super().clone()
        for tensor in cache._tensors():
            fix_address(tensor)
        return cache
