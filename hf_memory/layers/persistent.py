"""Learned, input-independent tokens in front of every sequence (Titans section 3.3)."""

import torch
from torch import Tensor, nn

from hf_memory.layers.norms import MemoryRMSNorm


class PersistentTokens(nn.Module):
    """`count` learned rows of one layer, normalised like the rows of the text beside which they are read.

    They have a norm of their own, because a mixer gets the text already normalised by its block.

    Args:
        count: number of tokens N.
        hidden_size: width D.
        eps: epsilon of the norm.
    """

    def __init__(self, count: int, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, hidden_size))
        self.norm = MemoryRMSNorm(hidden_size, eps)

    def forward(self) -> Tensor:
        """Normalised rows `[1, N, D]`."""
        return self.norm(self.tokens).unsqueeze(0)
