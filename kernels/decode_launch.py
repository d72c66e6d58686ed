"""What the Python sides of the decode kernels share."""

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from .launch import kernels_run_on
from .types import State


ENTRY_TYPES = {
    **dict.fromkeys(("q", "k", "v", "targets", "out"), "*bf16"),
    **dict.fromkeys(("q_stride", "k_stride", "v_stride", "target_stride", "H"), "i32:16"),
    "mask": "*i1",
    "phase": "*i64",
    "eps": "fp32",
}
"""Types of the parameters that are not float32 tensors, as the compile check wants them."""


def whole_heads(x: Tensor) -> Tensor:
    """`[B, 1, H, D]` as it is where the heads of a row lie next to each other, otherwise a copy."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def can_run(tokens: Tensor, operands: Iterable[Tensor | None], state: State) -> bool:
    """Whether a kernel can take one token `[B, 1, H, D]` with a state, whatever its sizes.

    A kernel has no backward, so nothing of `operands` and state may be watched by autograd.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*operands, *state.values())):
        return False
    return (
        kernels_run_on(tokens.device.type)
        and tokens.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and tokens.shape[1] == 1
        and all(x.dtype == torch.float32 for name, x in state.items() if name != "phase")
    )


def writable(state: State, overwrite: bool) -> State:
    """The state itself, if its tensors are to be overwritten, or a copy.

    Raises:
        ValueError: for a state that is to be overwritten and has tensors that are not contiguous.
    """
    if not overwrite:
        return {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}
    if odd := [name for name, x in state.items() if not x.is_contiguous()]:
        raise ValueError(f"`initial_state[{odd[0]!r}]` is not contiguous: it cannot be overwritten.")
    return state


def in_place_op(name: str, function: Callable[..., Tensor], operands: int) -> Callable[..., Tensor]:
    """An op that overwrites its tensors behind the first `operands`.

    `torch.compile` traces `hf_memory::<name>` down to its kernel; outside of it the function is called as it is.
    """
    parameters = list(inspect.signature(function).parameters.values())[operands:]
    state = [parameter.name for parameter in parameters if parameter.annotation in (Tensor, Tensor | None)]
    op = torch.library.triton_op(f"hf_memory::{name}", function, mutates_args=state)

    def run(*arguments: Tensor | float | None) -> Tensor:
        return (op if torch.compiler.is_compiling() else function)(*arguments)

    return run


def entry_types(kernel: KernelInterface, constants: Iterable[str]) -> dict[str, str]:
    """Types of a kernel's run-time parameters for the compile check."""
    return {name: ENTRY_TYPES.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
