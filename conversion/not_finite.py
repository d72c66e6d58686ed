"""Where the first number that is not finite comes from, found out after the fact."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(stage: nn.Module, parameters: Mapping[str, nn.Parameter], repeat: Callable[[], None]) -> str:
    """What is not finite first: weights, else the output of a module, else a gradient; empty if none of them.

    Args:
        stage: Has the models as `student` and `teacher`; all their modules are watched.
        parameters: What trains, by name.
        repeat: Does the forward and backward pass of the step again.
    """
    for name, value in parameters.items():
        if not finite(value):
            return f"the weights of {described(name)}"
    outputs: list[str] = []
    gradients: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for value in tensors(output):
                if not finite(value):
                    outputs.append(name)
                if value.requires_grad:
                    value.register_hook(look_back)

        def look_back(gradient: Tensor) -> None:
            if not finite(gradient):
                gradients.append(name)

        return look

    modules = {f"teacher.{name}": module for name, module in stage.teacher.named_modules() if name}
    modules |= dict(stage.student.named_modules())
    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items() if name]
    try:
        repeat()
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return f"the output of {described(outputs[0])}"
    if gradients:
        return f"the gradient at the output of {described(gradients[0])}"
    hit = [name for name, value in parameters.items() if value.grad is not None and not finite(value.grad)]
    return f"the gradient of {described(hit[0])}" if hit else ""


def finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())


def tensors(output: Any) -> Iterator[Tensor]:
    """Tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors(part)
    elif isinstance(output, Mapping):
        yield from tensors(list(output.values()))


def described(name: str) -> str:
    """`"layer 3 (model.layers.3.mlp)"`."""
    layer = re.search(r"\.(\d+)(?=\.|$)", name)
    return name if layer is None else f"layer {layer[1]} ({name})"


__all__ = ["first_not_finite"]
