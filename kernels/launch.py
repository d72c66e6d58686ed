"""Where Triton kernels meet PyTorch: which tensors they run on, how one is started, and how ops are made of them."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .precision import without_autocast


H200_MULTIPROCESSORS = 132


def _import_triton() -> ModuleType | None:
    try:
        import triton
    except ImportError:
        return None
    return triton


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python on the CPU (`TRITON_INTERPRET=1` when the kernels were imported)."""
    triton = _import_triton()
    return triton is not None and bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def kernels_run_on(device_type: str) -> bool:
    """Whether Triton kernels run on tensors of a device: on GPUs, or on the CPU under Triton's interpreter."""
    if device_type == "cpu":
        return is_interpreted()
    return device_type == "cuda" and _import_triton() is not None


def require_kernels(device_type: str) -> None:
    """Refuse the Triton form where its kernels do not run.

    Raises:
        ValueError: with what is in the way: no Triton, or no GPU.
    """
    if kernels_run_on(device_type):
        return
    if device_type == "cuda":
        raise ValueError("The Triton form needs the package triton, which cannot be imported: use form='chunk'.")
    raise ValueError(
        f"The Triton form needs tensors on a GPU, got {device_type}: use form='chunk', or set "
        "TRITON_INTERPRET=1 before Python starts to try the kernels on the CPU."
    )


@torch.compiler.assume_constant_result
def _is_hip() -> bool:
    return torch.version.hip is not None


def dot_precision(dtype: torch.dtype) -> str:
    """How products that follow operands of a dtype multiply float32 numbers.

    Beside half-precision operands with a mantissa of ten bits; otherwise never: three tensor-core products on NVIDIA,
    plain float32 on AMD.
    """
    if _is_hip():
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def warp_size() -> int:
    """Threads of a warp (a wavefront on AMD's data-centre GPUs)."""
    return 64 if _is_hip() else 32


@torch.compiler.assume_constant_result
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of an H200 for any other device."""
    return (
        _multiprocessors(device.index) if device.type == "cuda" and torch.cuda.is_available() else H200_MULTIPROCESSORS
    )


def launch(kernel: Callable, size: int, *args: object, **constants: object) -> None:
    """Start `size` programs of a kernel.

    One axis only: the others of a CUDA grid end at 65,535. Fused multiply-add is pinned, since Triton is about to
    change its default; a kernel that is being traced is compiled by torch, which decides by itself.

    Args:
        kernel: the function that `triton.jit` returned.
        size: number of programs.
        *args: tensors and numbers, in the kernel's order.
        **constants: its `tl.constexpr` arguments, and `num_warps` and `num_stages`.
    """
    from triton.runtime.jit import JITFunction

    grid = (size,)
    is_traced = any(isinstance(x, FakeTensor | FunctionalTensor) for x in args)
    if not isinstance(kernel, JITFunction):
        # The interpreter reads memory, and a trace has none.
        if not is_traced:
            kernel[grid](*args, **constants)
    elif is_traced:
        torch.library.wrap_triton(kernel)[grid](*args, **constants)
    else:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            kernel[grid](*args, **constants, enable_fp_fusion=True)


def differentiable_op(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    save: Callable[[tuple, tuple], tuple[list[Tensor | None], list]],
    spread: Callable[[tuple, list], tuple],
) -> Callable[..., tuple[Tensor, ...]]:
    """An op that `torch.compile` traces down to its kernels, forward and backward.

    Args:
        name: the ops are `hf_memory::<name>` and `hf_memory::<name>_backward`.
        forward: function of tensors and numbers, annotated as the schema of an op wants it.
        backward: the same for the gradients; takes the cotangents of the outputs, then what `save` returned.
        save: `(inputs, outputs)` to the tensors and the numbers that the backward wants to see again.
        spread: `(results of backward, numbers)` to the gradients of all inputs, `None` for what has none.
    """
    op = torch.library.triton_op(f"hf_memory::{name}", forward, mutates_args=())
    backward_op = torch.library.triton_op(f"hf_memory::{name}_backward", backward, mutates_args=())

    def setup_context(ctx, inputs, output) -> None:
        tensors, ctx.numbers = save(inputs, output)
        ctx.save_for_backward(*tensors)

    def run_backward(ctx, *cotangents):
        # Products beside the kernels would be rounded where a caller runs the backward inside autocast.
        saved = ctx.saved_tensors  # once: under gradient checkpointing each look recomputes
        with without_autocast(saved[0].device):
            return spread(backward_op(*cotangents, *saved, *ctx.numbers), ctx.numbers)

    op.register_autograd(run_backward, setup_context=setup_context)
    return op
