"""The chunk form: coefficients at the chunk's start, a gated linear recurrence inside it, and their gradients.

Everything is slot-major: coefficients are `[B, H, M, n]`, M slots by n tokens. README.md has the derivation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..grid import RowGrid
from ..scan import Tensors, scan
from ..types import State
from .types import EPS, SphereInputs, SphereOptions, carried, lengths, make_state, normalise


class Coefficients(NamedTuple):
    """What one token does to every slot, `s_t = keep s_{t-1} + write h_t + pull start`, and what it follows from.

    Attributes:
        h: `[B, H, n, D]`, the content that all slots are offered.
        keep, write, pull: `[B, H, M, n]`; `pull` is `None` without a projection.
        phi: `[B, H, M, D]`, the slots at which the loss is taken.
        length: `[B, H, M, 1]`, length of the start (`lazy`).
        wanted, step: write strength before and the step size, `[B, H, M, n]` (or one row of steps).
        overlap: `[B, H, M, n]`, φ · h.
        across: `[B, H, M, n]`, ‖h‖² - overlap² (`retract`).
        norm: `[B, H, M, n]`, length of the slot after the step, before it is retracted (`retract`).
        taken: `[B, H, M, n]`, how much of a slot the step takes away.
    """

    h: Tensor
    keep: Tensor
    write: Tensor
    pull: Tensor | None
    phi: Tensor
    length: Tensor | None
    wanted: Tensor
    step: Tensor
    overlap: Tensor | None = None
    across: Tensor | None = None
    norm: Tensor | None = None
    taken: Tensor | None = None


class Running(NamedTuple):
    """The slots behind every token of a chunk, `s_t = kept_t slots + pulled_t start + Σ_s written[t, s] h_s`.

    Attributes:
        slots, start: `[B, H, M, D]`.
        h: `[B, H, n, D]`.
        decay: `[B, H, M, n, n]`, `decay[t, s]` is what the tokens behind s up to t leave of what s has written.
        kept, pulled: `[B, H, M, n]`; `pulled` is `None` without a projection.
        written: `[B, H, M, n, n]`.
    """

    slots: Tensor
    start: Tensor
    h: Tensor
    decay: Tensor
    kept: Tensor
    pulled: Tensor | None
    written: Tensor

    def along(self, rows: Tensor) -> Tensor:
        """`s_t · rows_t` for `rows [B, H, n, D]`, `[B, H, M, n]`."""
        out = self.kept * (self.slots @ rows.mT)
        if self.pulled is not None:
            out = out + self.pulled * (self.start @ rows.mT)
        return out + (self.written * (rows @ self.h.mT).unsqueeze(-3)).sum(-1)

    def combine(self, weights: Tensor) -> Tensor:
        """`Σ_i weights_{t,i} s_{t,i}` for `weights [B, H, M, n]`, `[B, H, n, D]`."""
        out = (weights * self.kept).mT @ self.slots
        if self.pulled is not None:
            out = out + (weights * self.pulled).mT @ self.start
        return out + (weights.unsqueeze(-1) * self.written).sum(-3) @ self.h

    def final(self) -> Tensor:
        """Slots behind the last token, `[B, H, M, D]`."""
        out = self.kept[..., -1:] * self.slots + self.written[..., -1, :] @ self.h
        return out if self.pulled is None else out + self.pulled[..., -1:] * self.start

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """`s_t` times slots and start, `[B, H, M, n]` each, and times every h, `[B, H, M, n, n]`."""
        along_slots, along_start = ((x @ self.h.mT).unsqueeze(-2) for x in (self.slots, self.start))
        gram = (self.h @ self.h.mT).unsqueeze(-3)
        squares = [(a * b).sum(-1, keepdim=True) for a in (self.slots, self.start) for b in (self.slots, self.start)]
        by_slots = self.kept * squares[0] + self.pulled * squares[2] + (self.written * along_slots).sum(-1)
        by_start = self.kept * squares[1] + self.pulled * squares[3] + (self.written * along_start).sum(-1)
        by_h = self.kept.unsqueeze(-1) * along_slots + self.pulled.unsqueeze(-1) * along_start + self.written @ gram
        return by_slots, by_start, by_h

    def lengths(self, products: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """`‖s_t‖`, `[B, H, M, n]`."""
        by_slots, by_start, by_h = products
        square = self.kept * by_slots + self.pulled * by_start + (self.written * by_h).sum(-1)
        return square.clamp(min=EPS**2).sqrt()


def decays(keep: Tensor) -> Tensor:
    """`Π_{s < j <= t} keep_j` for s <= t, zero above, `[..., n] -> [..., n, n]`.

    Products of segments, not ratios of products: factors may be zero.
    """
    n = keep.shape[-1]
    lower = torch.ones(n, n, dtype=keep.dtype, device=keep.device).tril()
    behind = lower.tril(-1)
    return torch.addcmul(1 - behind, keep.unsqueeze(-1), behind).cumprod(-2) * lower


def decays_vjp(decay: Tensor, kept: Tensor, cot_decay: Tensor, cot_kept: Tensor) -> Tensor:
    """Gradient of `decays` and of `kept = keep.cumprod(-1)` for `keep`.

    No division by a factor, which may be zero: `decay[t, s] = decay[t, j] keep_j decay[j-1, s]` for s < j <= t.
    """
    up_to = cot_decay @ decay.mT + cot_kept.unsqueeze(-1) * kept.unsqueeze(-2)
    first = (decay[..., 0] * cot_kept).sum(-1, keepdim=True)
    return torch.cat([first, (decay[..., 1:] * up_to[..., :-1]).sum(-2)], -1)


@dataclass(frozen=True)
class SphereRule:
    """`kernels.scan.Rule` whose tile is one chunk.

    tile: `q, k, v [B, H, n, .]`, `step [B, H, n, 1 or M]`, `decay` factor `[B, H, n, 1]` or `None`, and which rows
    complete the chunk, `[B, 1, 1, 1]` of zeros and ones, `None` when all do. shared: nothing. state: slots at the
    chunk's start, and running slots.
    """

    options: SphereOptions

    def coefficients(self, k: Tensor, v: Tensor, step: Tensor, keep: Tensor | None, start: Tensor) -> Coefficients:
        """Coefficients of the tokens at `start [B, H, M, D]`; `keep [B, H, n, 1]`."""
        objective, mode = self.options.objective, self.options.normalization
        length = lengths(start) if mode == "lazy" else None
        phi = start if length is None else start / length
        step = step.mT
        keep = step.new_ones(()) if keep is None else keep.mT
        overlap = None
        if objective == "enc":
            h, overlap = k, phi @ k.mT
            wanted = v.mT - overlap
        else:
            h = v - k @ phi if objective == "dec" else v
            wanted = k.mT
        weight = step * wanted
        if mode == "none":
            return Coefficients(h, keep * torch.ones_like(weight), weight, None, phi, None, wanted, step)
        overlap = phi @ h.mT if overlap is None else overlap
        across = norm = None
        taken = weight * overlap
        if mode == "lazy":
            taken, weight = taken / length.square(), weight / length
        # The part that would make the running slot grow or turn over acts on the start instead (README.md).
        on_running = taken.clamp(min=-1 / self.options.chunk_size).minimum(keep)
        kept, pull = keep - on_running, on_running - taken
        if mode == "retract":
            across = (h.square().sum(-1).unsqueeze(-2) - overlap.square()).clamp(min=0)
            norm = (1 + weight.square() * across).sqrt()
            kept, weight, pull = kept / norm, weight / norm, pull / norm
        return Coefficients(h, kept, weight, pull, phi, length, wanted, step, overlap, across, norm, taken)

    def run(self, c: Coefficients, start: Tensor, slots: Tensor) -> Running:
        """The recurrence inside the chunk."""
        decay = decays(c.keep)
        pulled = None if c.pull is None else (decay @ c.pull.unsqueeze(-1)).squeeze(-1)
        return Running(slots, start, c.h, decay, c.keep.cumprod(-1), pulled, decay * c.write.unsqueeze(-2))

    def read(self, q: Tensor, r: Running) -> Tensor:
        """Answers `[B, H, n, .]` from the slots behind each token."""
        scale = 1 / r.lengths(r.products()) if self.options.normalization == "lazy" else None
        if self.options.objective == "enc":
            along = r.along(q)
            return (along if scale is None else scale * along).mT
        return r.combine(q.mT if scale is None else scale * q.mT)

    def boundary(self, start: Tensor, slots: Tensor, complete: Tensor | None) -> Tensors:
        """Start and running slots behind the chunk."""
        after = normalise(slots) if self.options.normalization == "retract" else slots
        if complete is None:
            return after, after
        return torch.where(complete > 0, after, start), torch.where(complete > 0, after, slots)

    def forward(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        (_, running), after = self.replay(tile, shared, state)
        return self.read(tile[0], running), after

    def replay(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        _, k, v, step, keep, complete = tile
        start, slots = state
        c = self.coefficients(k, v, step, keep, start)
        running = self.run(c, start, slots)
        return (c, running), self.boundary(start, running.final(), complete)

    def backward(self, tile, shared, state, tape, cot, cot_state) -> tuple[Tensors, Tensors, Tensors]:
        q, k, _, step, keep, complete = tile
        c, r = tape
        cot_start, cot_final = self._boundary_vjp(r, complete, cot_state)

        weights, rows, cot_q, along = self._read_vjp(q, r, cot)
        cot_kept = weights * (r.slots @ rows.mT)
        cot_pulled = None if r.pulled is None else weights * (r.start @ rows.mT)
        cot_written = weights.unsqueeze(-1) * (rows @ r.h.mT).unsqueeze(-3)
        cot_slots = (weights * r.kept) @ rows
        cot_h = (weights.unsqueeze(-1) * r.written).sum(-3).mT @ rows
        if r.pulled is not None:
            cot_start = cot_start + (weights * r.pulled) @ rows
        if along is not None:
            parts = _along_vjp(r, *along)
            cot_kept, cot_pulled, cot_written = cot_kept + parts[0], cot_pulled + parts[1], cot_written + parts[2]
            cot_slots, cot_start, cot_h = cot_slots + parts[3], cot_start + parts[4], cot_h + parts[5]

        cot_kept[..., -1] += (cot_final * r.slots).sum(-1)
        cot_written[..., -1, :] += cot_final @ r.h.mT
        cot_slots = cot_slots + r.kept[..., -1:] * cot_final
        cot_h = cot_h + r.written[..., -1, :].mT @ cot_final
        cot_decay = cot_written * c.write.unsqueeze(-2)
        cot_write, cot_pull = (cot_written * r.decay).sum(-2), None
        if r.pulled is not None:
            cot_pulled[..., -1] += (cot_final * r.start).sum(-1)
            cot_start = cot_start + r.pulled[..., -1:] * cot_final
            cot_decay = cot_decay + cot_pulled.unsqueeze(-1) * c.pull.unsqueeze(-2)
            cot_pull = (cot_pulled.unsqueeze(-1) * r.decay).sum(-2)
        cot_keep = decays_vjp(r.decay, r.kept, cot_decay, cot_kept)

        cot_k, cot_v, cot_step, cot_decay_factor, cot_at = self._coefficients_vjp(
            c, k, keep, cot_keep, cot_write, cot_pull, cot_h
        )
        cot_step = cot_step if step.shape[-1] > 1 else cot_step.sum(-1, keepdim=True)
        done = None if complete is None else torch.zeros_like(complete)
        return (cot_q, cot_k, cot_v, cot_step, cot_decay_factor, done), (), (cot_start + cot_at, cot_slots)

    def _boundary_vjp(self, r: Running, complete: Tensor | None, cot_state: Tensors) -> tuple[Tensor, Tensor]:
        """Gradients of `boundary` for the start and for the slots behind the last token."""
        cot_start, cot_slots = cot_state
        cot_after = cot_start + cot_slots
        if self.options.normalization == "retract":
            final = r.final()
            length = lengths(final)
            unit = final / length
            cot_after = (cot_after - unit * (unit * cot_after).sum(-1, keepdim=True)) / length
        if complete is None:
            return torch.zeros_like(cot_start), cot_after
        return cot_start.masked_fill(complete > 0, 0), torch.where(complete > 0, cot_after, cot_slots)

    def _read_vjp(self, q: Tensor, r: Running, cot: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple | None]:
        """The cotangent of s_t is `weights_t rows_t`, and in `lazy` mode some of s_t itself.

        Returns:
            weights `[B, H, M, n]`, rows `[B, H, n, D]`, the gradient of q, and for `lazy` the share `[B, H, M, n]` of
            s_t with the products that its gradient needs.
        """
        is_lazy, is_enc = self.options.normalization == "lazy", self.options.objective == "enc"
        rows, other = (q, cot) if is_enc else (cot, q)
        if not is_lazy:
            weights = other.mT
            return weights, rows, r.combine(weights) if is_enc else r.along(rows).mT, None
        products = r.products()
        scale = 1 / r.lengths(products)
        weights, cosine = scale * other.mT, scale * r.along(rows)
        cot_q = r.combine(weights) if is_enc else cosine.mT
        return weights, rows, cot_q, (-weights * cosine * scale, products)

    def _coefficients_vjp(self, c: Coefficients, k, keep, cot_keep, cot_write, cot_pull, cot_h) -> Tensors:
        """Gradients of `coefficients` for k, v, step `[B, H, n, M]`, the decay factor, and the start."""
        mode, objective = self.options.normalization, self.options.objective
        cot_weight, cot_overlap, cot_length, cot_factor = cot_write, None, None, None
        if mode == "none":
            cot_factor = cot_keep
        else:
            bound = 1.0 if keep is None else keep.mT
            inside = (c.taken >= -1 / self.options.chunk_size) & (c.taken <= bound)
            norm = 1.0 if c.norm is None else c.norm
            cot_on_running = (cot_pull - cot_keep) / norm
            cot_factor = cot_keep / norm + cot_on_running.masked_fill(c.taken <= bound, 0)
            cot_taken = cot_on_running.masked_fill(~inside, 0) - cot_pull / norm
            weight = c.step * c.wanted
            scale = 1.0 if c.length is None else 1 / c.length
            cot_weight = cot_write * (scale / norm) + cot_taken * c.overlap * scale**2
            cot_overlap = cot_taken * weight * scale**2
            if mode == "lazy":
                cot_length = -(cot_write * weight * scale**2 + 2 * cot_taken * c.taken * scale).sum(-1, keepdim=True)
            else:
                cot_norm = -(cot_keep * c.keep + cot_write * c.write + cot_pull * c.pull) / norm
                cot_weight = cot_weight + cot_norm * weight * c.across / norm
                cot_across = (0.5 * cot_norm * weight.square() / norm).masked_fill(c.across <= 0, 0)
                cot_overlap = cot_overlap - 2 * cot_across * c.overlap
                cot_h = cot_h + 2 * cot_across.sum(-2).unsqueeze(-1) * c.h
        cot_wanted, cot_step = c.step * cot_weight, (c.wanted * cot_weight).mT
        cot_factor = None if keep is None else cot_factor.sum(-2).unsqueeze(-1)

        cot_phi = torch.zeros_like(c.phi)
        if objective == "enc":
            cot_overlap = -cot_wanted if cot_overlap is None else cot_overlap - cot_wanted
        if cot_overlap is not None:
            cot_h = cot_h + cot_overlap.mT @ c.phi
            cot_phi = cot_phi + cot_overlap @ c.h
        if objective == "enc":
            cot_k, cot_v = cot_h, cot_wanted.mT
        else:
            cot_k, cot_v = cot_wanted.mT, cot_h
        if objective == "dec":
            cot_k = cot_k - cot_h @ c.phi.mT
            cot_phi = cot_phi - k.mT @ cot_h
        if c.length is not None:
            radial = (c.phi * cot_phi).sum(-1, keepdim=True)
            cot_phi = (cot_phi - c.phi * radial) / c.length + c.phi * cot_length
        return cot_k, cot_v, cot_step, cot_factor, cot_phi


def _along_vjp(r: Running, share: Tensor, products: tuple[Tensor, Tensor, Tensor]) -> Tensors:
    """Gradients for `kept, pulled, written, slots, start, h` where the cotangent of s_t is `share_t s_t`."""
    by_slots, by_start, by_h = products
    kept, pulled = share * r.kept, share * r.pulled
    written = share.unsqueeze(-1) * r.written
    to_slots = (kept.unsqueeze(-1) * r.written).sum(-2)
    to_start = (pulled.unsqueeze(-1) * r.written).sum(-2)
    both = (kept * r.pulled).sum(-1, keepdim=True)
    return (
        share * by_slots,
        share * by_start,
        share.unsqueeze(-1) * by_h,
        (kept * r.kept).sum(-1, keepdim=True) * r.slots + both * r.start + to_slots @ r.h,
        both * r.slots + (pulled * r.pulled).sum(-1, keepdim=True) * r.start + to_start @ r.h,
        to_slots.mT @ r.slots + to_start.mT @ r.start + (written.mT @ r.written).sum(-3) @ r.h,
    )


def chunk_form(inputs: SphereInputs, state: State | None, output_final_state: bool) -> tuple[Tensor, State | None]:
    """Run a call of any length in matmul form.

    Args:
        inputs: checked operands.
        state: state to continue from.
        output_final_state: whether to return the state behind the call.
    Returns:
        outputs `[B, T, H, D]` (`[B, T, H, M]` for `enc`) in the working precision, and the final state.
    """
    options, (batch, time) = inputs.options, inputs.q.shape[:2]
    chunk = options.chunk_size
    phase = None if state is None or chunk == 1 else state["phase"]
    grid = RowGrid(batch, time, chunk, chunk, inputs.mask, phase, inputs.q.device)
    # An empty slot of the grid has step 0 and decay 1: it changes nothing.
    tokens = (inputs.q, inputs.k, inputs.v, inputs.gates.step)
    tiles = [grid.tiles(grid.arrange(x)) for x in tokens]
    decay = inputs.gates.log_decay
    ends = grid.ends()
    complete = None if ends is None else (ends == chunk).to(inputs.q.dtype)[..., None, None, None]
    tiles += [None if decay is None else grid.tiles(grid.arrange(decay)).exp(), complete]
    out, (start, slots) = scan(SphereRule(options), tuple(tiles), (), carried(inputs, state))
    final = make_state(options, start, slots, grid.phase) if output_final_state else None
    return grid.collect(out), final
