"""Rows of valid tokens on the gradient grid.

A padded token occupies no slot of the grid, and a row continues on the slot where its last call stopped. So a call
lays the valid tokens of each row out contiguously, behind the rows that its state has buffered since the last chunk
boundary; the chunk forms see nothing else. Packed sequences become rows first.
"""

import torch
from torch import Tensor
from torch.nn import functional


class RowGrid:
    """Slots for the valid tokens of `[B, T]` calls.

    Args:
        batch, time: shape of the call.
        chunk_size: gradient grid.
        tile: slots come in multiples of it; itself a multiple of `chunk_size`.
        mask: `[B, T]` bool, `None` when every token is valid.
        phase: `[B]` int64, rows buffered since the last chunk boundary, `None` when there are none.
    """

    def __init__(
        self, batch: int, time: int, chunk_size: int, tile: int, mask: Tensor | None, phase: Tensor | None, device
    ) -> None:
        self.batch, self.time, self.chunk_size, self.tile = batch, time, chunk_size, tile
        buffered = 0 if phase is None else chunk_size - 1
        self.num_tiles = max(1, -(-(time + buffered) // tile))
        self.num_slots = self.num_tiles * tile
        self.is_trivial = mask is None and phase is None
        if self.is_trivial:
            self.total = torch.full((batch,), time, dtype=torch.long, device=device)
        else:
            self._place(mask, phase, device)
        self.anchored = self.total // chunk_size * chunk_size
        self.phase = self.total - self.anchored

    def _place(self, mask: Tensor | None, phase: Tensor | None, device) -> None:
        batch, time, chunk = self.batch, self.time, self.chunk_size
        phase = torch.zeros(batch, dtype=torch.long, device=device) if phase is None else phase
        mask = torch.ones(batch, time, dtype=torch.bool, device=device) if mask is None else mask
        self.mask = mask
        self.total = phase + mask.sum(-1)
        # Slot num_slots, and source row chunk + time, stand for "nowhere".
        self.slot = torch.where(mask, phase[:, None] + mask.cumsum(-1) - 1, self.num_slots)
        source = torch.full((batch, self.num_slots + 1), chunk + time, dtype=torch.long, device=device)
        source.scatter_(1, self.slot, torch.arange(chunk, chunk + time, device=device).expand(batch, time))
        slots = torch.arange(self.num_slots, device=device)
        self.source = torch.where(slots < phase[:, None], slots, source[:, :-1])

    def ends(self) -> Tensor | None:
        """`[C, B]`: how many slots of each tile lie before the row's last chunk boundary; `None` when all do."""
        if self.is_trivial and self.time % self.tile == 0:
            return None
        starts = torch.arange(0, self.num_slots, self.tile, device=self.total.device)
        return (self.anchored[None] - starts[:, None]).clamp(0, self.tile)

    def arrange(self, x: Tensor, buffer: Tensor | None = None) -> Tensor:
        """`[B, T, H, D]` tokens and `[B, H, chunk, D]` buffered rows to slots `[B, S, H, D]` (zero: empty).

        S is `num_slots`, or T where nothing has to be moved.
        """
        if self.is_trivial:
            return x
        heads, width = x.shape[2:]
        buffer = x.new_zeros(self.batch, self.chunk_size, heads, width) if buffer is None else buffer.transpose(1, 2)
        rows = torch.cat([buffer.to(x.dtype), x, x.new_zeros(self.batch, 1, heads, width)], dim=1)
        return rows.gather(1, self.source[:, :, None, None].expand(-1, -1, heads, width))

    def tiles(self, slots: Tensor) -> Tensor:
        """Slots `[B, S, H, D]` to tiles `[C, B, H, tile, D]`."""
        slots = functional.pad(slots, (0, 0, 0, 0, 0, self.num_slots - slots.shape[1]))
        batch, _, heads, width = slots.shape
        return slots.view(batch, self.num_tiles, self.tile, heads, width).permute(1, 0, 3, 2, 4).contiguous()

    def collect(self, tiles: Tensor) -> Tensor:
        """Tiles `[C, B, H, tile, D]` back to tokens `[B, T, H, D]`; padded tokens get zero."""
        return self.tokens(tiles.permute(1, 0, 3, 2, 4).flatten(1, 2))

    def tokens(self, slots: Tensor) -> Tensor:
        """Slots `[B, S, H, D]` back to tokens `[B, T, H, D]`; padded tokens get zero."""
        if self.is_trivial:
            return slots[:, : self.time]
        heads, width = slots.shape[2:]
        slots = functional.pad(slots, (0, 0, 0, 0, 0, 1))
        return slots.gather(1, self.slot[:, :, None, None].expand(-1, -1, heads, width))

    def tail(self, slots: Tensor) -> Tensor:
        """Rows since each row's last chunk boundary, `[B, H, chunk, D]`, zero behind `phase`."""
        offsets = torch.arange(self.chunk_size, device=slots.device)
        index = (self.anchored[:, None] + offsets).clamp(max=slots.shape[1] - 1)
        rows = slots.gather(1, index[:, :, None, None].expand(-1, -1, *slots.shape[2:]))
        rows = rows.masked_fill(offsets[None, :, None, None] >= self.phase[:, None, None, None], 0)
        return rows.transpose(1, 2).contiguous()


class PackedRows:
    """Sequences packed in one row, `cu_seqlens [N + 1]`, as the rows of a batch.

    Raises:
        ValueError: when the call is not a single row, or the boundaries do not span it.
    """

    def __init__(self, cu_seqlens: Tensor, batch: int, time: int, device) -> None:
        bounds = cu_seqlens.to(device=device, dtype=torch.long)
        lengths = bounds.diff()
        if batch != 1:
            raise ValueError(f"`cu_seqlens` takes sequences packed in one row, got a batch of {batch}.")
        if bounds[0] != 0 or bounds[-1] != time or (lengths < 0).any():
            raise ValueError(f"`cu_seqlens` must rise from 0 to the number of tokens ({time}), got {bounds.tolist()}.")
        longest = int(lengths.max())
        offsets = torch.arange(longest, device=device)
        self.mask = offsets < lengths[:, None]
        self.index = (bounds[:-1, None] + offsets).clamp(max=max(time - 1, 0))
        tokens = torch.arange(time, device=device)
        self.row = torch.searchsorted(bounds[1:], tokens, right=True)
        self.offset = tokens - bounds[self.row]

    def unpack(self, x: Tensor) -> Tensor:
        """`[1, T, ...]` to `[N, longest, ...]`."""
        return x[0][self.index]

    def pack(self, rows: Tensor) -> Tensor:
        """`[N, longest, ...]` back to `[1, T, ...]`."""
        return rows[self.row, self.offset][None]
