"""Learned start of a memory: what it knows before it reads."""

import torch
from torch import Tensor, nn


class InitialMemory(nn.Module):
    """Weights of a small network per head, and the affine of the LayerNorm behind it.

    Float32 whatever the model's dtype: the state of a memory is its distance from here, or starts here.

    Args:
        num_heads: memory heads H.
        widths: widths of the network from input to output, one more than it has layers.
        layer_norm: whether a LayerNorm follows.
    """

    def __init__(self, num_heads: int, widths: list[int], layer_norm: bool) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
            weight = torch.empty(num_heads, fan_in, fan_out, dtype=torch.float32)
            self.register_parameter(f"weight_{i}", nn.Parameter(weight))
        self.norm_weight = self.norm_bias = None
        if layer_norm:
            self.norm_weight = nn.Parameter(torch.empty(num_heads, widths[-1], dtype=torch.float32))
            self.norm_bias = nn.Parameter(torch.empty(num_heads, widths[-1], dtype=torch.float32))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """`weight_0`, `weight_1`, ...: one `[H, in, out]` per layer of the memory."""
        return tuple(getattr(self, f"weight_{i}") for i in range(self.depth))

    @property
    def norm(self) -> tuple[Tensor, Tensor] | None:
        """Scale and bias `[H, V]` of the LayerNorm, or `None` without one."""
        return None if self.norm_weight is None else (self.norm_weight, self.norm_bias)

    def init_std(self, index: int, initializer_range: float) -> float:
        """Standard deviation that weight `index` starts with.

        Behind a LayerNorm, 1 / sqrt(fan-in): unit keys then give outputs of order one; with 0.02 the backward pass of
        the norm would multiply the first inner gradients by 50 and more. A plain matrix starts near zero, as in linear
        attention, but not at it: the first read would be exactly zero, which gives its query no gradient and the norm
        of the read its largest, 1 / sqrt(eps).
        """
        return initializer_range if self.norm_weight is None else self.weights[index].shape[-2] ** -0.5
