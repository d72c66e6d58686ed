"""One chunk of an anchored memory of any depth: matmul form and its closed-form gradient.

Everything inside a chunk is exact once its gradients are taken at the chunk's starting memory (README.md beside this
file). A plain linear memory is the case of depth 1 without a norm.
"""

from dataclasses import dataclass

from torch import Tensor

from .. import coupling, inner
from ..activations import ACTIVATIONS, Activation
from ..coupling import Coupling
from ..scan import Tensors
from ..types import Norm


FIELDS = len(Coupling._fields)


@dataclass(frozen=True)
class MLPRule:
    """`kernels.scan.Rule` whose tile is one chunk.

    tile: `q, k, v [B, H, n, D]`, then the `Coupling` of every layer. shared: base of every layer (`None` when
    forgetting leads to zero), then the norm's affine `[H, 1, V]` (or two `None`). state: memory offsets, then momenta
    (if any).
    """

    kinds: tuple[str, ...]
    activation: str
    eps: float

    @property
    def depth(self) -> int:
        return len(self.kinds)

    @property
    def act(self) -> Activation:
        return ACTIVATIONS[self.activation]

    def couplings(self, tile: Tensors) -> list[Coupling]:
        return [Coupling(*tile[3 + FIELDS * i : 3 + FIELDS * (i + 1)]) for i in range(self.depth)]

    def norm(self, shared: Tensors) -> Norm | None:
        weight, bias = shared[self.depth :]
        return None if weight is None else Norm(weight, bias)

    def memory(self, shared: Tensors, state: Tensors) -> list[Tensor]:
        """The weights at which the chunk's gradients are taken."""
        pairs = zip(shared[: self.depth], state[: self.depth])
        return [d if base is None else base + d for base, d in pairs]

    def momenta(self, state: Tensors) -> Tensors:
        return state[self.depth :] or (None,) * self.depth

    def write(self, k: Tensor, v: Tensor, memory: list[Tensor], norm: Norm | None) -> tuple[list, list, list]:
        """Pre-activations z, layer inputs x and descent directions u of every layer."""
        z, x = [], [k]
        for i, weight in enumerate(memory):
            z.append(x[-1] @ weight)
            if i + 1 < self.depth:
                x.append(self.act.value(z[-1]))
        u = [inner.descent(z[-1], k, v, norm, self.eps)]
        for i in reversed(range(self.depth - 1)):
            u.insert(0, (u[0] @ memory[i + 1].mT) * self.act.slope(z[i]))
        return z, x, u

    def read(self, q, couplings, x, u, shared: Tensors, state: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs y and pre-activations r of every layer on the reading side."""
        y, r, momenta = [q], [], self.momenta(state)
        for i, c in enumerate(couplings):
            r.append(coupling.read(self.kinds[i], c, y[-1], x[i], u[i], state[i], momenta[i], shared[i]))
            if i + 1 < self.depth:
                y.append(self.act.value(r[-1]))
        return y, r

    def fold(self, couplings, x, u, state: Tensors) -> Tensors:
        momenta = self.momenta(state)
        pairs = [coupling.fold(self.kinds[i], c, x[i], u[i], state[i], momenta[i]) for i, c in enumerate(couplings)]
        return tuple(d for d, _ in pairs) + tuple(s for _, s in pairs if s is not None)

    def forward(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        q, k, v = tile[:3]
        couplings, norm = self.couplings(tile), self.norm(shared)
        _, x, u = self.write(k, v, self.memory(shared, state), norm)
        _, r = self.read(q, couplings, x, u, shared, state)
        return inner.output(q, r[-1], norm, self.eps), self.fold(couplings, x, u, state)

    def replay(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        z, x, u = self.write(tile[1], tile[2], self.memory(shared, state), self.norm(shared))
        return (z, x, u), self.fold(self.couplings(tile), x, u, state)

    def backward(self, tile, shared, state, tape, cot, cot_state) -> tuple[Tensors, Tensors, Tensors]:
        q, k, v = tile[:3]
        z, x, u = tape
        couplings, norm, momenta = self.couplings(tile), self.norm(shared), self.momenta(state)
        memory = self.memory(shared, state)
        cot_momenta = self.momenta(cot_state)
        y, r = self.read(q, couplings, x, u, shared, state)

        folds = [
            coupling.fold_vjp(
                self.kinds[i], couplings[i], x[i], u[i], state[i], momenta[i], cot_state[i], cot_momenta[i]
            )
            for i in range(self.depth)
        ]
        cot_r, cot_q, cot_norm = inner.output_vjp(r[-1], norm, self.eps, cot)
        reads = [None] * self.depth
        for i in reversed(range(self.depth)):
            reads[i] = coupling.read_vjp(
                self.kinds[i], couplings[i], y[i], x[i], u[i], state[i], momenta[i], shared[i], cot_r
            )
            if i > 0:
                cot_r = reads[i].y * self.act.slope(r[i - 1])
        cot_q = inner.add(cot_q, reads[0].y)

        cot_x = [a.x + b.x for a, b in zip(reads, folds)]
        cot_u = [a.u + b.u for a, b in zip(reads, folds)]
        cot_v, cot_k, cot_memory, cot_norm_write = self._write_vjp(k, v, memory, norm, z, x, u, cot_x, cot_u)
        if norm is not None:
            cot_norm = Norm(*(a + b for a, b in zip(cot_norm, cot_norm_write)))

        tile_grads = [cot_q, cot_k, cot_v]
        for a, b in zip(reads, folds):
            tile_grads += [a.beta, a.f, a.grad, b.keep, b.pull, b.carry, b.write, b.write_momentum]
        base_grads = tuple(
            None if base is None else inner.over_batch(a.base + m)
            for base, a, m in zip(shared[: self.depth], reads, cot_memory)
        )
        state_grads = tuple(a.d + b.d + m for a, b, m in zip(reads, folds, cot_memory))
        state_grads += tuple(a.s + b.s for a, b in zip(reads, folds) if a.s is not None)
        return tuple(tile_grads), base_grads + tuple(cot_norm or (None, None)), state_grads

    def _write_vjp(
        self, k, v, memory, norm, z, x, u, cot_x, cot_u
    ) -> tuple[Tensor, Tensor, list[Tensor], Norm | None]:
        """Gradients of `write` for v, k, the memory and the norm: the second-order terms of the outer gradient."""
        depth = self.depth
        cot_memory: list[Tensor | None] = [None] * depth
        cot_z: list[Tensor | None] = [None] * depth
        for i in range(depth - 1):
            back = u[i + 1] @ memory[i + 1].mT
            cot_back = cot_u[i] * self.act.slope(z[i])
            cot_z[i] = cot_u[i] * back * self.act.curvature(z[i])
            cot_u[i + 1] = cot_u[i + 1] + cot_back @ memory[i + 1]
            cot_memory[i + 1] = cot_back.mT @ u[i + 1]
        cot_z[-1], cot_k, cot_v, cot_norm = inner.descent_vjp(z[-1], k, v, norm, self.eps, cot_u[-1])
        for i in reversed(range(depth)):
            back, part = inner.product_vjp(x[i], memory[i], cot_z[i])
            cot_memory[i] = inner.add(cot_memory[i], part)
            total = cot_x[i] + back
            if i > 0:
                cot_z[i - 1] = cot_z[i - 1] + total * self.act.slope(z[i - 1])
        return cot_v, inner.add(cot_k, total), cot_memory, cot_norm
