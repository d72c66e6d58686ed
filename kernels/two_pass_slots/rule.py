"""One tile of both memories in matrix products, and its closed-form gradient (README.md beside this file)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import coefficients, coupling
from ..anchored_linear.chunk import anchor_rows
from ..coupling import Coupling
from ..scan import Tensors
from ..types import Gates
from .inputs import SlotOptions
from .maps import SlotMap


FIELDS = len(Coupling._fields)


def earlier_rows(gates: Gates) -> Tensors:
    """`anchor_rows` with which each of the rows `[..., n, 1]` sees the memories of the row before."""
    step, log_decay, _ = (None if gate is None else gate.mT for gate in gates)
    return anchor_rows(coefficients.build(step, log_decay, None), 1, log_decay, False)


def per_memory(c: Coupling) -> tuple[Coupling, Coupling]:
    """Coefficients of the memories of keys and of values."""
    halves = [(None, None) if x is None else x.chunk(2, 1) for x in c]
    return Coupling(*(half[0] for half in halves)), Coupling(*(half[1] for half in halves))


@dataclass(frozen=True)
class SlotRule:
    """`kernels.scan.Rule` of both memories, 2 H heads with those of keys first.

    tile: queries `[B, H, n, D]`, written rows `[B, 2 H, n, D]`, targets `[B, H, n, m]`, the `Coupling`, then
    `anchor_rows` if the rule solves or refines. state: memories `[B, 2 H, m, D]`.

    Args:
        write_map, read_map: φ and f.
        refinements, hypergrad: see `SlotOptions`.
        solves: whether a tile holds several chunks (φ the identity), all directions of which solve one linear system.
    """

    write_map: SlotMap
    read_map: SlotMap
    refinements: int
    hypergrad: float
    solves: bool

    @classmethod
    def of(cls, options: SlotOptions, solves: bool = False) -> "SlotRule":
        return cls(options.write, options.read, options.refinements, options.hypergrad, solves)

    def write(
        self, w: Tensor, targets: Tensor, memory: Tensor, anchors: Tensors, buffered: tuple | None = None
    ) -> tuple[list, list]:
        """Pre-activations and descent directions `[B, 2 H, n, m]`: the first ones, then those of each refinement.

        Args:
            w, targets, anchors: operands of the tile.
            memory: at its start.
            buffered: rows that the refinements of w see in place of its own: as written, and their directions.
        """
        targets, point = torch.cat([targets, targets], 1), w @ memory.mT
        if self.solves:
            beta, _, grad = anchors
            system, rhs = grad * (w @ w.mT), targets - beta * point
            return [], [torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)]
        points, directions = [point], [-self.write_map.code(point, targets)]
        seen, known = (w, directions) if buffered is None else buffered
        for i in range(self.refinements):
            points.append(coupling.read("head", _as_coupling(anchors), w, seen, known[i], memory.mT, None, None))
            directions.append(-self.write_map.code(points[-1], targets))
        return points, directions

    def read(self, c: Coupling, q: Tensor, w: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What the queries find in the memories of keys, `[B, H, n, m]`, and what that finds in those of values."""
        keys, values = per_memory(c)
        (k, v), (u_k, u_v), (key_memory, value_memory) = (x.chunk(2, 1) for x in (w, u, memory))
        found = coupling.read("head", keys, q, k, u_k, key_memory.mT, None, None)
        return found, coupling.read("head", values, self.read_map(found), u_v, v, value_memory, None, None)

    def fold(self, c: Coupling, w: Tensor, u: Tensor, memory: Tensor) -> Tensor:
        """Memories behind the tile."""
        return coupling.fold("head", c, u, w, memory, None)[0]

    def _split(self, tile: Tensors) -> tuple[Tensor, Tensor, Tensor, Coupling, Tensors]:
        return *tile[:3], Coupling(*tile[3 : 3 + FIELDS]), tile[3 + FIELDS :]

    def forward(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        q, w, targets, c, anchors = self._split(tile)
        u = self.write(w, targets, state[0], anchors)[1][-1]
        return self.read(c, q, w, u, state[0])[1], (self.fold(c, w, u, state[0]),)

    def replay(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        _, w, targets, c, anchors = self._split(tile)
        tape = self.write(w, targets, state[0], anchors)
        return tape, (self.fold(c, w, tape[1][-1], state[0]),)

    def backward(self, tile, shared, state, tape, cot, cot_state) -> tuple[Tensors, Tensors, Tensors]:
        q, w, targets, c, anchors = self._split(tile)
        (memory,), u = state, tape[1][-1]
        keys, values = per_memory(c)
        (k, v), (u_k, u_v), (key_memory, value_memory) = (x.chunk(2, 1) for x in (w, u, memory))
        found, _ = self.read(c, q, w, u, memory)
        second = coupling.read_vjp("head", values, self.read_map(found), u_v, v, value_memory, None, None, cot)
        cot_found = self.read_map.vjp(found, second.y)
        first = coupling.read_vjp("head", keys, q, k, u_k, key_memory.mT, None, None, cot_found)
        folded = coupling.fold_vjp("head", c, u, w, memory, None, cot_state[0], None)

        cot_u = folded.x + torch.cat([first.u, second.x], 1)
        cot_beta, cot_grad = torch.cat([first.beta, second.beta], 1), torch.cat([first.grad, second.grad], 1)
        cot_coupling = Coupling(cot_beta, None, cot_grad, folded.keep, None, None, folded.write, None)
        cot_w, cot_targets, cot_memory, cot_anchors = self._write_vjp(w, targets, memory, anchors, tape, cot_u)
        cot_w = cot_w + folded.u + torch.cat([first.x, second.u], 1)
        cot_memory = cot_memory + folded.d + torch.cat([first.d.mT, second.d], 1)
        cot_targets = cot_targets.unflatten(1, (2, -1)).sum(1)
        return (first.y, cot_w, cot_targets, *cot_coupling, *cot_anchors), (), (cot_memory,)

    def _write_vjp(self, w, targets, memory, anchors, tape, cot) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        """Gradients of `write` for w, targets, memory and anchors: the second-order terms of the outer gradient."""
        points, directions = tape
        if self.solves:
            return self._solve_vjp(w, memory, anchors, directions[0], cot)
        targets = torch.cat([targets, targets], 1)
        cot_point, cot_targets = self.write_map.code_vjp(points[-1], targets, -cot)
        cot_w = cot_memory = cot_beta = cot_grad = 0
        for point, u in zip(points[-2::-1], directions[-2::-1]):
            r = coupling.read_vjp(
                "head", _as_coupling(anchors), w, w, u, memory.mT, None, None, self.hypergrad * cot_point
            )
            cot_w, cot_memory = cot_w + r.y + r.x, cot_memory + r.d.mT
            cot_beta, cot_grad = cot_beta + r.beta, cot_grad + r.grad
            cot_point, part = self.write_map.code_vjp(point, targets, -r.u)
            cot_targets = cot_targets + part
        cot_point = self.hypergrad * cot_point
        cot_anchors = (cot_beta, None, cot_grad) if anchors else ()
        return cot_w + cot_point @ memory, cot_targets, cot_memory + cot_point.mT @ w, cot_anchors

    def _solve_vjp(self, w, memory, anchors, u, cot) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        beta, _, grad = anchors
        gram = w @ w.mT
        system = self.hypergrad * (grad * gram).mT
        cot_rhs = torch.linalg.solve_triangular(system, cot, upper=True, unitriangular=True)
        cot_point = -self.hypergrad * cot_rhs
        cot_system = cot_point @ u.mT
        cot_gram = cot_system * grad
        cot_beta, cot_w, cot_memory = coupling.scaled_product_vjp("head", beta, w, memory.mT, cot_point)
        cot_w = cot_w + (cot_gram + cot_gram.mT) @ w
        return cot_w, cot_rhs, cot_memory.mT, (cot_beta, None, cot_system * gram)


def _as_coupling(anchors: Tensors) -> Coupling:
    beta, _, grad = anchors
    return Coupling(beta, None, grad, None, None, None, None, None)
