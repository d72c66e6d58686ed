"""What the layers of compressed caches share."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class CompressedLayer(CacheLayerMixin):
    """A layer that keeps something else than all keys and values, in tensors `[B, ...]` that it names.

    Layers replace their tensors and never write into them.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    tensor_names: ClassVar[tuple[str, ...]] = ("keys", "values")

    def __init__(self) -> None:
        super().__init__()
        self.seen_tokens = 0
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self._clear()

    def _clear(self) -> None:
        for name in self.tensor_names:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, rows and heads from the first keys and values `[B, H, T, P]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the layer holds."""
        yield from (tensor for name in self.tensor_names if (tensor := getattr(self, name)) is not None)

    @property
    def nbytes(self) -> int:
        """Size of all tensors that the layer holds, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def full_nbytes(self) -> int:
        """Size that keys and values of all tokens seen would have, in bytes."""
        if not self.is_initialized:
            return 0
        vectors = self.keys.shape[0] * self.keys.shape[1] * self.seen_tokens
        return vectors * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def get_seq_length(self) -> int:
        """Number of tokens seen, padded ones included; not the number of those kept."""
        return self.seen_tokens

    def get_max_length(self) -> int:
        """-1: the layer takes any number of tokens."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._clear()
        self.seen_tokens = 0
        self.is_initialized = False

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in self.tensor_names:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))

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
        """Move the layer to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move an offloaded layer back to its device."""
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))


def as_own(part: Tensor) -> Tensor:
    """A part of a tensor as a tensor of its own: a view would keep all of it alive."""
    return part.clone(memory_format=torch.contiguous_format)
