"""Causal depthwise convolution over the valid tokens of each row."""

import torch
from torch import Tensor, nn

from hf_memory.layers.norms import at_least_float32


class ShortConvolution(nn.Module):
    """Each channel is convolved over the last `kernel_size` valid tokens of its row.

    Padded tokens take no tap and shift no window, so a row gives the same outputs however it is padded. What a later
    call needs is the tail: the last `kernel_size - 1` valid input rows (zeros in front of the first token).

    Args:
        channels: number of channels C.
        kernel_size: taps per channel, at least 1.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))

    def forward(
        self, x: Tensor, tail: Tensor | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve and return the next tail.

        Args:
            x: inputs `[B, T, C]`, or those of the first few channels.
            tail: tail of an earlier call, `[B, kernel_size - 1, C]`, or `[N, kernel_size - 1, C]` for N packed
                sequences; zeros when `None`.
            mask: `[B, T]` bool, true where a token is valid.
            cu_seqlens: `[N + 1]` boundaries of sequences packed into one row.

        Returns:
            Outputs `[B, T, C]` in the dtype of `x` (zero at padded tokens), and the new tail in the shape of `tail`.
        """
        if tail is None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            tail = x.new_zeros(rows, self.kernel_size - 1, x.shape[-1])
        tail = tail.to(x.dtype)
        if cu_seqlens is not None:
            return self._packed(x, tail, cu_seqlens)
        if mask is not None:
            return self._masked(x, tail, mask)
        window = torch.cat((tail, x), dim=1)
        return self._taps(window), window[:, x.shape[1] :]

    def _taps(self, window: Tensor) -> Tensor:
        weight = self.weight[: window.shape[-1]]
        if window.shape[1] == self.kernel_size:
            # One token: 18 us instead of the 300 us that `conv1d` takes for it (768 channels, one CPU core).
            taps = at_least_float32(window) * at_least_float32(weight).t()
            return taps.sum(1, keepdim=True).to(window.dtype)
        weight = weight.to(window.dtype).unsqueeze(1)
        return nn.functional.conv1d(window.transpose(1, 2), weight, groups=weight.shape[0]).transpose(1, 2)

    def _masked(self, x: Tensor, tail: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # Move the valid tokens of each row to its front, convolve, and move the outputs back.
        channels = x.shape[-1]
        order = torch.argsort(~mask, dim=1, stable=True)
        rank = (mask.cumsum(1) - 1).clamp(min=0)
        window = torch.cat((tail, x.gather(1, order[..., None].expand(-1, -1, channels))), dim=1)
        out = self._taps(window).gather(1, rank[..., None].expand(-1, -1, channels))
        last = mask.sum(1, keepdim=True) + torch.arange(self.kernel_size - 1, device=x.device)
        return out * mask[..., None], window.gather(1, last[..., None].expand(-1, -1, channels))

    def _packed(self, x: Tensor, tails: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        # One row [tail 0, sequence 0, tail 1, sequence 1, ...]: no tap reaches over a boundary.
        width, count = self.kernel_size - 1, tails.shape[0]
        bounds = cu_seqlens.to(x.device, torch.long)
        token = torch.arange(x.shape[1], device=x.device)
        sequence = torch.searchsorted(bounds[1:], token, right=True)
        number = torch.arange(count, device=x.device)[:, None]
        head = bounds[:-1, None] + number * width + torch.arange(width, device=x.device)
        window = x.new_zeros(x.shape[1] + count * width, x.shape[-1])
        window = window.index_copy(0, head.flatten(), tails.flatten(0, 1))
        window = window.index_copy(0, token + (sequence + 1) * width, x[0])
        out = self._taps(window[None])[:, token + sequence * width]
        end = bounds[1:, None] + number * width + torch.arange(width, device=x.device)
        return out, window[end]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={self.kernel_size}"
