"""Memory as context (MAC) of Titans, arXiv 2501.00663 eqs. 21-25, without their view of later tokens (README.md)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from hf_memory.cache import memory_layer
from hf_memory.cache_layers import MemorySegmentCacheLayer
from hf_memory.kernels.grid import PackedRows
from hf_memory.layers import MemoryRMSNorm, MemoryRotaryEmbedding, PersistentTokens, takes_additive_mask
from hf_memory.layers.attention import additive_mask, eager_attention_forward, kept_prefix
from hf_memory.layers.norms import at_least_float32
from hf_memory.layers.rotary import rotate

from .configuration_titans import TitansConfig
from .memory import States, TitansMemory


# Names of a segment's states inside a cache layer, beside those of the memory.
SEGMENT_PREFIX = "segment."
KEYS_AND_VALUES = ("keys", "values", "context_keys", "context_values")

# Cosine and sine of rotary positions.
Tables = tuple[Tensor, Tensor]


class Piece(NamedTuple):
    """Tokens of a call that lie in one segment of their rows.

    Attributes:
        columns: which ones, a slice for all rows or `[B, n]` indices, those of each row in order.
        valid: `[B, n]` bool, true where a row has that many; `None` where all have.
        stop: an upper bound of the segment's slots in use behind the piece.
        is_first: whether it holds the first tokens of a new segment in every row.
    """

    columns: slice | Tensor
    valid: Tensor | None
    stop: int
    is_first: bool


class SegmentGrid:
    """Cuts a call `[B, T]` where the segments of its rows end.

    A padded token occupies no slot of a segment, and a row continues on the slot where its last call stopped.

    Args:
        batch, length: shape of the call.
        segment_size: tokens of a segment.
        position: `[B]` int64, slots that the rows have filled of their segment; `None` when these are new rows.
        mask: `[B, T]` bool, true where a token is valid; `None` when all are.
    """

    def __init__(
        self, batch: int, length: int, segment_size: int, position: Tensor | None, mask: Tensor | None
    ) -> None:
        self.batch, self.length, self.size = batch, length, segment_size
        self.mask = mask
        self.index: Tensor | None = None
        if position is None and mask is None:
            starts = range(0, length, segment_size)
            ends = (min(start + segment_size, length) for start in starts)
            self.pieces = [Piece(slice(a, b), None, b - a, True) for a, b in zip(starts, ends)]
        elif length == 1:
            # Nothing is read from the device: one token lies in one segment, whichever that is.
            self.pieces = [Piece(slice(0, 1), mask, segment_size, False)]
        else:
            self._cut(position, mask)

    def _cut(self, position: Tensor | None, mask: Tensor | None) -> None:
        batch, length, size = self.batch, self.length, self.size
        device = (mask if position is None else position).device
        position = torch.zeros(batch, dtype=torch.long, device=device) if position is None else position
        mask = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
        order = torch.argsort(~mask, dim=1, stable=True)
        edges = torch.arange((length + size - 2) // size + 2, device=device)[:, None] * size - position
        edges = torch.minimum(edges.clamp(min=0), mask.sum(1))  # [S + 1, B], counted in valid tokens of the call
        counts = edges.diff(dim=0)
        stops = counts + torch.where(edges[:-1] == 0, position, 0)
        # One wait for the device, before a call of many tokens.
        shortest, longest, stops = torch.stack((counts.amin(1), counts.amax(1), stops.amax(1))).tolist()
        self.pieces = []
        longest[0] = max(longest[0], 1)  # a piece even for a call without any valid token
        for start, count, low, high, stop in zip(edges, counts, shortest, longest, stops):
            if high > 0:
                slots = torch.arange(high, device=device)
                columns = order.gather(1, (start[:, None] + slots).clamp(max=length - 1))
                valid = None if low == high else slots < count[:, None]
                self.pieces.append(Piece(columns, valid, max(stop, 1), False))
        # Where each token's output lies in the pieces behind each other.
        rank = (mask.cumsum(1) - 1).clamp(min=0)
        segment = (position[:, None] + rank) // size
        offsets = torch.tensor([0, *longest], device=device).cumsum(0)
        self.index = offsets[segment] + rank - edges.t().gather(1, segment)

    def take(self, x: Tensor, piece: Piece) -> Tensor:
        """Tokens `[B, n, D]` of a piece from those of the call."""
        if isinstance(piece.columns, slice):
            return x[:, piece.columns]
        return x.gather(1, piece.columns[..., None].expand(-1, -1, x.shape[-1]))

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Outputs of the call `[B, T, D]` from those of its pieces; zero at padded tokens."""
        out = torch.cat(outputs, dim=1)
        if self.index is not None:
            out = out.gather(1, self.index[..., None].expand(-1, -1, out.shape[-1]))
        return out if self.mask is None else out * self.mask[..., None]


def write_slots(buffer: Tensor, rows: Tensor, slots: Tensor, written: Tensor | None) -> Tensor:
    """A copy of `buffer` with new rows in it.

    Args:
        buffer: `[B, H, S, D]`.
        rows: `[B, H, n, D]`.
        slots: `[B or 1, n]`, where to, all different.
        written: `[B or 1, n]` bool, which of them to write; all when `None`.
    """
    index = slots[:, None, :, None].expand(rows.shape)
    rows = rows.to(buffer.dtype)
    if written is not None:
        rows = torch.where(written[:, None, :, None], rows, buffer.gather(2, index))
    return buffer.scatter(2, index, rows)


class SegmentAttention(nn.Module):
    """Attention inside one segment of C tokens, behind N_p persistent and N memory tokens.

    Text token j of the segment sees all persistent tokens, memory token i from `j = (i + 1) C / N - 1` on, the last of
    the text tokens that it was recalled with, and text tokens up to j. Rotary positions count from the first
    persistent token, so that they say where in its segment a token is, and never how long the text was.

    Args:
        config: configuration.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.segment_size = config.segment_size
        self.num_persistent, self.num_memory = config.num_persistent_tokens, config.num_memory_tokens

        width, bias = config.num_attention_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.rotary_emb = MemoryRotaryEmbedding(config)
        self.persistent = None
        if self.num_persistent > 0:
            self.persistent = PersistentTokens(self.num_persistent, config.hidden_size, config.rms_norm_eps)

    def write_context(self, rows: Tensor, slots: Tensor, written: Tensor, states: States) -> States:
        """Put memory tokens `[B, n, D]` where text tokens can see them."""
        tables = self.rotary_emb(rows, self.num_persistent + slots)
        return self._write("context_", rows, slots, tables, written, states)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        piece: Piece,
        states: States,
        prefix: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, States]:
        """Attend from the tokens of a piece.

        Args:
            hidden_states: `[B, n, D]`.
            positions: `[B or 1, n]`, the slot of each in its segment.
            piece: the piece.
            states: keys and values of the segment, the memory tokens of this piece included.
            prefix: what `project_prefix` returns; `None` without persistent tokens.

        Returns:
            `[B, n, D]`, and the states with the keys and values of the piece.
        """
        first = self.num_persistent + self.num_memory
        slots = positions % self.segment_size  # those of tokens that are not there reach over the end
        tables = self.rotary_emb(hidden_states, first + positions)
        states = self._write("", hidden_states, slots, tables, piece.valid, states)
        query = rotate(self._heads(self.q_proj(hidden_states)), *tables)

        per_token = self.segment_size // self.num_memory
        num_context = piece.stop // per_token
        key, value = (
            torch.cat((states["context_" + name][:, :, :num_context], states[name][:, :, : piece.stop]), dim=2)
            for name in ("keys", "values")
        )
        key, value = key.to(query.dtype), value.to(query.dtype)
        if prefix is not None:
            prefix = (x.to(query.dtype).expand(key.shape[0], -1, -1, -1) for x in prefix)
            key, value = (torch.cat((before, x), dim=2) for before, x in zip(prefix, (key, value)))
        visible_from = (
            torch.zeros(self.num_persistent, dtype=torch.long, device=key.device),
            torch.arange(1, num_context + 1, device=key.device) * per_token - 1,
            torch.arange(piece.stop, device=key.device),
        )
        mask = (torch.cat(visible_from) <= slots[..., None]).unsqueeze(1)
        if takes_additive_mask(self.config):
            mask = additive_mask(mask, query.dtype)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(output.flatten(2)), states

    def project_prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[1, H, N_p, d]` of the persistent tokens."""
        rows = self.persistent()
        positions = torch.arange(self.num_persistent, device=rows.device)[None]
        return self._project(rows, self.rotary_emb(rows, positions))

    def _write(
        self, kind: str, rows: Tensor, slots: Tensor, tables: Tables, written: Tensor | None, states: States
    ) -> States:
        names = (kind + "keys", kind + "values")
        return states | {
            name: write_slots(states[name], new, slots, written)
            for name, new in zip(names, self._project(rows, tables))
        }

    def _project(self, rows: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        return rotate(self._heads(self.k_proj(rows)), *tables), self._heads(self.v_proj(rows))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class TitansContextAttention(nn.Module):
    """Memory as context: attention sees what the memory recalls about a segment, and the memory reads the result.

    Per segment: memory tokens are what the memory, as it was before the segment, answers to the queries of r tokens at
    a time; attention `a` sees them once these r tokens have been read; the memory reads `u = norm(x + a)` token by
    token, `x` being the residual stream, and its running answer `m` gives `W (norm(a) * silu(norm(m)))`.

    Args:
        config: configuration.
        layer_idx: index of the layer in the cache.
    """

    def __init__(self, config: TitansConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.segment_size, self.num_memory = config.segment_size, config.num_memory_tokens
        self.persistent_in_memory = config.persistent_in_memory
        self.attention = SegmentAttention(config)
        self.memory = TitansMemory(config, layer_idx, beside_attention=True, gated=False)
        width = config.hidden_size
        self.context_norm = MemoryRMSNorm(width, config.rms_norm_eps)
        self.inner_norm = MemoryRMSNorm(width, config.rms_norm_eps)
        self.attention_norm = MemoryRMSNorm(width, config.rms_norm_eps)
        self.memory_norm = MemoryRMSNorm(width, config.rms_norm_eps)
        self.o_proj = nn.Linear(width, width, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Read the tokens segment by segment.

        Args:
            hidden_states: normalised hidden states `[B, T, D]`.
            residual: the same in front of their norm.
            padding_mask: `[B, T]` bool, true where a token is valid; others change no state and fill no slot.
            cu_seqlens: `[N + 1]` boundaries of sequences packed into one row.
            past_key_values: cache with a `MemorySegmentCacheLayer` at `layer_idx`.

        Returns:
            `[B, T, D]`.
        """
        if cu_seqlens is not None:
            rows = PackedRows(cu_seqlens, *hidden_states.shape[:2], hidden_states.device)
            return rows.pack(self(rows.unpack(hidden_states), rows.unpack(residual), rows.mask))
        batch, length = hidden_states.shape[:2]
        layer = memory_layer(past_key_values, self.layer_idx, MemorySegmentCacheLayer)
        states = layer.get_states() if layer is not None else None
        prefix = None
        if self.attention.persistent is not None:
            prefix = kept_prefix(layer, self.attention.project_prefix)
        if states is None:
            grid = SegmentGrid(batch, length, self.segment_size, None, padding_mask)
            segment, memory = self._start(hidden_states)
        else:
            segment = {n.removeprefix(SEGMENT_PREFIX): x for n, x in states.items() if n.startswith(SEGMENT_PREFIX)}
            memory = {name: x for name, x in states.items() if not name.startswith(SEGMENT_PREFIX)}
            grid = SegmentGrid(batch, length, self.segment_size, segment["position"], padding_mask)
        outputs = []
        for number, piece in enumerate(grid.pieces):
            is_needed = layer is not None or number + 1 < len(grid.pieces)
            rows, above = grid.take(hidden_states, piece), grid.take(residual, piece)
            output, segment, memory = self._read(rows, above, piece, segment, memory, prefix, is_needed)
            outputs.append(output)
        if layer is not None:
            layer.update_states(memory | {SEGMENT_PREFIX + name: x for name, x in segment.items()}, length)
        return grid.join(outputs)

    def _start(self, hidden_states: Tensor) -> tuple[States, States | None]:
        """States of the segment and of the memory in front of the first token."""
        batch, heads = hidden_states.shape[0], self.attention.config.num_attention_heads
        # CODEPATH: persistent_in_memory=True lets the memory, too, read the persistent tokens first.
        memory = self.memory.start(self.attention.persistent if self.persistent_in_memory else None, batch)
        anchor = self.memory.anchor(memory, batch)
        text = hidden_states.new_zeros(batch, heads, self.segment_size, self.memory.head_dim)
        context = text[:, :, : self.num_memory]
        segment = dict(zip(KEYS_AND_VALUES, (text, text, context, context)))
        segment |= {f"frozen_{i}": weight for i, weight in enumerate(anchor)}
        segment["queries"] = at_least_float32(hidden_states.new_zeros(batch, heads * self.memory.head_dim))
        segment["position"] = torch.zeros(batch, dtype=torch.long, device=hidden_states.device)
        return segment, memory

    def _read(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        piece: Piece,
        segment: States,
        memory: States | None,
        prefix: tuple[Tensor, Tensor] | None,
        is_needed: bool,
    ) -> tuple[Tensor, States, States | None]:
        """Outputs of a piece, and the states behind it if those are needed."""
        length = hidden_states.shape[1]
        positions = torch.arange(length, device=hidden_states.device)[None]
        if not piece.is_first:
            positions = segment["position"][:, None] + positions
        segment = self._recall(hidden_states, positions, piece, segment)
        attended, segment = self.attention(hidden_states, positions, piece, segment, prefix)
        joined = self.inner_norm(residual + attended)
        read, memory = self.memory.memorise(joined, memory, piece.valid, None, is_needed)
        remembered = self.memory_norm(read.flatten(2))
        output = self.o_proj(self.attention_norm(attended) * nn.functional.silu(remembered))
        if is_needed:
            filled = positions[:, 0] + count_tokens(piece.valid, length)
            segment = self._close(segment | {"position": filled.expand(len(output))}, memory)
        return output, segment, memory

    def _recall(self, hidden_states: Tensor, positions: Tensor, piece: Piece, segment: States) -> States:
        """Ask the memory of the segment's start, once for each r tokens, and write the memory tokens.

        What the r tokens have in common is the mean of their queries behind the convolution and in front of its SiLU.
        Fewer than r of them wait for the others as a sum.
        """
        queries, tail = self.memory.q_proj(hidden_states), {}
        if self.memory.conv is not None:
            queries, tail["conv"] = self.memory.conv(queries, segment.get("conv"), piece.valid)
        per_token, length = self.segment_size // self.num_memory, hidden_states.shape[1]
        num_groups = min((length + per_token - 2) // per_token + 1, self.num_memory)

        # Groups of this piece: the first is the one that its first token, of whatever row, falls into.
        inside = positions[:, :1] % per_token
        available = inside + count_tokens(piece.valid, length, keepdim=True)
        source = torch.arange(num_groups * per_token, device=queries.device) - inside
        is_there = (source >= 0) & (source < available - inside)
        index = source.clamp(0, length - 1)[..., None].expand(len(queries), -1, queries.shape[-1])
        rows = at_least_float32(queries).gather(1, index).masked_fill(~is_there[..., None], 0)
        sums = rows.unflatten(1, (num_groups, per_token)).sum(2)
        sums = torch.cat((sums[:, :1] + segment["queries"][:, None], sums[:, 1:]), dim=1)

        frozen = tuple(segment[f"frozen_{i}"] for i in range(self.memory.initial_memory.depth))
        mean = (sums / per_token).to(hidden_states.dtype).unflatten(-1, (-1, self.memory.head_dim))
        recalled = self.context_norm(self.memory.recall(mean, frozen).flatten(2).to(hidden_states.dtype))
        groups = torch.arange(num_groups, device=queries.device)
        slots = (positions[:, :1] // per_token + groups) % self.num_memory
        segment = self.attention.write_context(recalled, slots, (groups + 1) * per_token <= available, segment)

        last = (available // per_token).clamp(max=num_groups - 1)
        waiting = sums.gather(1, last[..., None].expand(len(sums), 1, sums.shape[-1])).squeeze(1)
        return segment | tail | {"queries": waiting.masked_fill(available % per_token == 0, 0)}

    def _close(self, segment: States, memory: States) -> States:
        """Begin a new segment in rows that have filled theirs: no keys and values, and the memory as it is now."""
        ended = segment["position"] == self.segment_size
        # A branch on data would break a compiled graph, and costs a synchronisation off the CPU.
        if not torch.compiler.is_compiling() and ended.device.type == "cpu" and not bool(ended.any()):
            return segment
        ended = ended[:, None, None, None]
        cleared = {name: segment[name].masked_fill(ended, 0) for name in KEYS_AND_VALUES}
        # A segment is a whole number of chunks, so that the memory is at a chunk boundary.
        for i, now in enumerate(self.memory.anchor(memory, len(ended))):
            cleared[f"frozen_{i}"] = torch.where(ended, now, segment[f"frozen_{i}"])
        return segment | cleared | {"position": segment["position"] % self.segment_size}


def count_tokens(valid: Tensor | None, length: int, keepdim: bool = False) -> Tensor | int:
    """Number of valid tokens of each row, `[B]` (`[B, 1]` with `keepdim`)."""
    return length if valid is None else valid.sum(1, keepdim=keepdim)
