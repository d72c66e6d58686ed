"""What a converted model is measured beside: itself with its memories off, and its teacher trained on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_memory.conversion.data import Batches
from hf_memory.conversion.recipe import Recipe
from hf_memory.conversion.stage_options import DistillStage
from hf_memory.kernels import Gates
from hf_memory.layers import MemoryGates


STUDENT, TEACHER = "student", "teacher"
OFF, CONTINUED = "student, memory off", "teacher, continued"
"""Names of the models in a report."""


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """No token changes a memory while this lasts: every step size is 0, and nothing is forgotten.

    The memories answer from their learned start, so that nothing of what was read passes through them. Everything
    else stays: the short convolution in front of a memory (a handful of tokens), the attention over a window beside
    it, and the attention of layers without one. It works for every architecture, since all of them take their steps
    from `MemoryGates`. A copied model that brings its own code does not have these, and is not changed.

    Args:
        model: With memories in some of its layers, or none.
    """
    gates = [module for module in model.modules() if isinstance(module, MemoryGates)]
    handles = [module.register_forward_hook(_still) for module in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _still(module: nn.Module, args: tuple[Any, ...], gates: Gates) -> Gates:
    # The logarithm of what is kept: 0 is all of it.
    kept = None if gates.log_decay is None else torch.zeros_like(gates.log_decay)
    return gates._replace(step=torch.zeros_like(gates.step), log_decay=kept)


class MemoryOff:
    """A model with its memories off, beside the model itself: it shares all weights, and is called the same way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with memory_off(self.model):
            return self.model(*args, **kwargs)


def control_options(recipe: Recipe) -> DistillStage:
    """How the teacher is trained on: with cross entropy, in parts as small as the smallest of the stages."""
    accumulate = max(stage.accumulate for stage in recipe.training_stages.values())
    return DistillStage(lr=recipe.continued_lr, trainable="all", kl_weight=0, ce_weight=1, accumulate=accumulate)


class Chain:
    """The batches of several stages one behind the other, as if they were those of a single stage.

    Args:
        parts: Batches of every stage with its number of steps, in order.
        seeds: Of what is drawn while it trains.
    """

    def __init__(self, parts: Sequence[tuple[Batches, int]], seeds: tuple[int, ...]) -> None:
        self.parts, self.seeds = parts, seeds

    def __len__(self) -> int:
        return sum(steps for _, steps in self.parts)

    def __getitem__(self, step: int) -> torch.Tensor:
        """The batch of a step, counted from 0 over all stages: `[B, context + 1]` int64."""
        for batches, steps in self.parts:
            if step < steps:
                return batches[step]
            step -= steps
        raise IndexError(f"There are {len(self)} steps.")
