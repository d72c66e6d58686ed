"""How many bytes a model keeps per sample while it reads, measured on its own cache without weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_memory._cli.loading import UserError


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONTEXTS = (1024, 16 * 1024, 128 * 1024, 1024 * 1024)
# Beyond this, running a model for real only to see the shape of its cache would take too much memory.
_MAX_REAL_PARAMETERS = 2_000_000_000


@dataclass(frozen=True)
class LayerState:
    """
    What one layer keeps for one sample.

    Args:
        kind: entry of `config.layer_types`, or the class of the cache layer.
        first: bytes after one token.
        per_token: bytes that every further token adds.
        window: tokens after which it stops growing; `None` where it does not stop (or does not grow).
    """

    kind: str
    first: int
    per_token: int
    window: int | None

    def after(self, tokens: int) -> int:
        """Bytes after `tokens` tokens."""
        counted = tokens if self.window is None else min(tokens, self.window)
        return self.first + (counted - 1) * self.per_token


def build_without_weights(config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """The causal LM of a configuration on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UserError(f"{config.model_type!r} has no causal language model.") from error
        raise


def layer_states(config: PreTrainedConfig, dtype: Any) -> list[LayerState]:
    """State of every layer, measured after one and after two tokens."""
    from hf_memory.configuration import MemoryConfig

    text_config = config.get_text_config(decoder=True)
    if not isinstance(text_config, MemoryConfig):
        return _measure(config, dtype)
    # Layers of one type are alike in this library: one of each is enough, and much faster on the meta device.
    kinds = list(dict.fromkeys(text_config.layer_types))
    small = copy.deepcopy(text_config)
    small.num_hidden_layers, small.layer_types = len(kinds), kinds
    measured = dict(zip(kinds, _measure(small, dtype)))
    return [measured[kind] for kind in text_config.layer_types]


def kv_cache_bytes(config: PreTrainedConfig, dtype: Any, tokens: int) -> int:
    """Bytes of the key/value cache of a Transformer with the same layers, heads and widths."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * heads * width * tokens * dtype.itemsize


def readable_size(count: int) -> str:
    """Bytes in the largest binary unit that keeps them above one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count / 1024**power:.1f} {units[power]}" if power else f"{count} B"


def _measure(config: PreTrainedConfig, dtype: Any) -> list[LayerState]:
    model = build_without_weights(config, dtype)
    try:
        once, twice = _caches(model, "meta")
    except Exception as error:
        # Some models read values while they run, which the meta device does not have.
        if model.num_parameters() > _MAX_REAL_PARAMETERS:
            raise UserError(f"{type(model).__name__} cannot run without weights, and is too large to try.") from error
        once, twice = _caches(model.to_empty(device="cpu"), "cpu")
    text_config = config.get_text_config(decoder=True)
    kinds = getattr(text_config, "layer_types", None) or [type(layer).__name__ for layer in once.layers]
    states = []
    for kind, before, after in zip(kinds, once.layers, twice.layers):
        first, second = _bytes(before), _bytes(after)
        window = getattr(before, "sliding_window", None) if getattr(before, "is_sliding", False) else None
        grows = second > first
        states.append(LayerState(kind, first, second - first, window - 1 if window and grows else None))
    return states


def _caches(model: PreTrainedModel, device: str) -> list[Any]:
    import torch

    caches = []
    for length in (1, 2):
        with torch.no_grad():
            tokens = torch.zeros(1, length, dtype=torch.long, device=device)
            outputs = model.eval()(input_ids=tokens, use_cache=True, return_dict=True)
        cache = outputs.get("past_key_values", None) or outputs.get("cache_params", None)
        if cache is None or not hasattr(cache, "layers"):
            raise UserError(
                f"{type(model).__name__} returns no cache made of layers, so its state cannot be measured."
            )
        caches.append(cache)
    return caches


def _bytes(layer: Any) -> int:
    from hf_memory.evaluation.properties_subject import cache_tensors

    return sum(tensor.numel() * tensor.element_size() for tensor in cache_tensors(layer).values())
