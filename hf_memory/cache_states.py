"""States of one layer of a cache: named tensors, who owns them, and how they are copied, moved and counted."""

from collections.abc import Callable, Iterator
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


States = dict[str, Tensor]


class MemoryStatesMixin(CacheLayerMixin):
    """Named states `[B, ...]` of one layer and the number of tokens they have absorbed."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.states: States = {}
        # Names of those that the layer made itself and that nobody else holds.
        self.own_names: frozenset[str] = frozenset()
        self.has_states = False
        self.is_offloaded = False
        self.seq_length: int | Tensor = 0
        self.device: torch.device | None = None

    slot_dims: ClassVar[dict[str, int]] = {}
    """Dimension of a saved tensor that counts the slots of a window, for those that have one."""

    def get_states(self, overwritten: str | None = None) -> States | None:
        """States after the tokens seen so far; `None` before the first, where the mixer has its learned start.

        Args:
            overwritten: how the names of those begin that the caller will overwrite, without autograd, before it gives
                them to `update_states`. They are copied first if somebody else may hold them.
        """
        if not self.has_states:
            return None
        self.prefetch()
        if overwritten is not None:
            self.states = {
                name: x if not name.startswith(overwritten) or self._owns(name, x) else self._copy(x)
                for name, x in self.states.items()
            }
            self.own_names = frozenset(name for name in self.states if name.startswith(overwritten))
            return self.states
        self.own_names = frozenset()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Autograd refuses tensors that were made in inference mode.
            return {name: x.clone() if x.is_inference() else x for name, x in self.states.items()}
        return self.states

    def __copy__(self) -> Self:
        # Two layers with the same tensors: neither owns them any more.
        twin = object.__new__(type(self))
        self.own_names = frozenset()
        twin.__dict__.update(self.__dict__)
        return twin

    def _owns(self, name: str, state: Tensor) -> bool:
        return name in self.own_names and not is_locked(state)

    @staticmethod
    def _copy(state: Tensor) -> Tensor:
        return state.clone(memory_format=torch.contiguous_format)

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
        before = self.states
        self.states = before | {name: self._replace(before.get(name), new) for name, new in states.items()}
        self.own_names = frozenset(name for name in self.own_names if self.states[name] is before[name])
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

    def saved_tensors(self) -> States:
        """What of the layer a memory file keeps, by name.

        A class that keeps more than states overrides this and `restore`; what follows from the weights is left out.
        """
        return dict(self.states)

    def restore(self, tensors: States, num_tokens: int) -> None:
        """Become the layer that `saved_tensors` described, behind `num_tokens` tokens (padded ones included)."""
        self.update_states(tensors, num_tokens)

    def num_saved_slots(self, num_tokens: int) -> int:
        """Slots that a window has behind `num_tokens` tokens."""
        return 0

    def _replace(self, old: Tensor | None, new: Tensor) -> Tensor:
        # Never copied into `old`: it may belong to the graph of a truncated backward pass or, when it was made in
        # inference mode, refuse to be written outside of it. But a view would keep all rows of a long call alive.
        if torch.compiler.is_compiling() or new.untyped_storage().nbytes() <= new.nbytes:
            return new
        return new.clone()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = {name: self._replace(state, function(state)) for name, state in self.states.items()}
        self.own_names = frozenset()

    def reset(self) -> None:
        """Forget everything: the next token meets the learned start."""
        self.states = {}
        self.own_names = frozenset()
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

    def _owns(self, name: str, state: Tensor) -> bool:
        # A buffer, unless it is on the way of a gradient (`_replace`).
        return not state.requires_grad and not is_locked(state)

    @staticmethod
    def _copy(state: Tensor) -> Tensor:
        return fix_address(MemoryStatesMixin._copy(state))

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
