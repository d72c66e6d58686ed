"""A recurrence over tiles whose backward keeps √(number of tiles) states and recomputes the rest.

Plain autograd over the loop would keep every intermediate of every tile: gigabytes per layer for a deep memory.
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import without_autocast


Tensors = tuple[Tensor | None, ...]


class Rule(Protocol):
    """One tile of a recurrence: `tile` are its own operands, `shared` those of all tiles, `state` what is carried."""

    def forward(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the tile's output and the state behind it."""

    def replay(self, tile: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        """Returns intermediates that `backward` wants to see again, and the state behind the tile."""

    def backward(
        self, tile: Tensors, shared: Tensors, state: Tensors, tape: Tensors, cot: Tensor, cot_state: Tensors
    ) -> tuple[Tensors, Tensors, Tensors]:
        """Returns the gradients of `tile`, `shared` and `state`."""


def scan(rule: Rule, tiles: Tensors, shared: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
    """Run `rule` over tiles.

    Args:
        rule: the recurrence.
        tiles: operands with a leading axis of tiles, entries may be `None`.
        shared: operands that every tile sees.
        state: start state.
    Returns:
        outputs stacked over tiles, and the final state.
    """
    out, *final = _Scan.apply(rule, (len(tiles), len(shared)), *tiles, *shared, *state)
    return out, tuple(final)


def _at(tiles: Tensors, i: int) -> Tensors:
    return tuple(None if x is None else x[i] for x in tiles)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule, counts, *operands):
        first, second = counts[0], counts[0] + counts[1]
        tiles, shared, state = operands[:first], operands[first:second], operands[second:]
        num_tiles = next(x.shape[0] for x in tiles if x is not None)
        group = max(1, math.isqrt(num_tiles))
        outputs, kept = [], []
        for i in range(num_tiles):
            if i % group == 0:
                kept.extend(state)
            out, state = rule.forward(_at(tiles, i), shared, state)
            outputs.append(out)
        ctx.rule, ctx.group, ctx.num_tiles = rule, group, num_tiles
        ctx.sizes = (len(tiles), len(shared), len(state))
        ctx.save_for_backward(*tiles, *shared, *kept)
        return torch.stack(outputs), *state

    @staticmethod
    @once_differentiable
    def backward(ctx, cot, *cot_state):
        num_operands, num_shared, num_states = ctx.sizes
        saved = ctx.saved_tensors
        tiles, shared = saved[:num_operands], saved[num_operands : num_operands + num_shared]
        kept = saved[num_operands + num_shared :]
        tile_grads = tuple(None if x is None else torch.empty_like(x) for x in tiles)
        shared_grads: list[Tensor | None] = [None] * num_shared
        with without_autocast(cot.device):
            for start in reversed(range(0, ctx.num_tiles, ctx.group)):
                first = start // ctx.group * num_states
                state = kept[first : first + num_states]
                steps = []
                for i in range(start, min(start + ctx.group, ctx.num_tiles)):
                    tape, after = ctx.rule.replay(_at(tiles, i), shared, state)
                    steps.append((i, state, tape))
                    state = after
                while steps:
                    i, state, tape = steps.pop()
                    grads, parts, cot_state = ctx.rule.backward(_at(tiles, i), shared, state, tape, cot[i], cot_state)
                    for total, grad in zip(tile_grads, grads):
                        if total is not None:
                            total[i] = grad
                    shared_grads = [
                        part if total is None else total + part for total, part in zip(shared_grads, parts)
                    ]
        return None, None, *tile_grads, *shared_grads, *cot_state
