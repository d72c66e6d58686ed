"""Modules that several architectures share."""

from hf_memory.layers.attention import (
    SlidingWindowAttention,
    create_window_mask,
    takes_additive_mask,
    window_mask,
)
from hf_memory.layers.gates import GateProjection, MemoryGates
from hf_memory.layers.initial_memory import InitialMemory
from hf_memory.layers.norms import MemoryRMSNorm, l2_normalize
from hf_memory.layers.persistent import PersistentTokens
from hf_memory.layers.rotary import MemoryRotaryEmbedding
from hf_memory.layers.short_conv import ShortConvolution


__all__ = [
    "GateProjection",
    "InitialMemory",
    "MemoryGates",
    "MemoryRMSNorm",
    "MemoryRotaryEmbedding",
    "PersistentTokens",
    "ShortConvolution",
    "SlidingWindowAttention",
    "create_window_mask",
    "l2_normalize",
    "takes_additive_mask",
    "window_mask",
]
