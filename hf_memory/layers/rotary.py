"""Rotary position embedding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class MemoryRotaryEmbedding(nn.Module):
    """Cosine and sine tables of the configured RoPE type.

    Args:
        config: configuration with `rope_parameters`, `head_dim` and `max_position_embeddings`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config

        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)

        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, device=None, **kwargs) -> tuple[Tensor, float]:
        """Inverse frequencies `[head_dim / 2]` of the original RoPE, and the factor 1 of its cosine and sine."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return (1.0 / config.rope_parameters["rope_theta"] ** exponents).to(device), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[B or 1, T, head_dim]` in the dtype of `x` for positions `[B or 1, T]`."""
        # Elementwise, hence in float32 also under autocast: in half precision positions above 256 would merge.
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys `[B, H, T, d]` by tables `[B or 1, T, d]`."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads `[B, H, T, d]` by tables `[B or 1, T, d]`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return heads * cos + _rotate_half(heads) * sin


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
