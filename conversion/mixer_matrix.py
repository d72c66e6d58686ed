"""The matrix by which the outputs of a memory weigh the values that it was given."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_memory.conversion.schema import ConversionError
from hf_memory.kernels import anchored_linear
from hf_memory.models.titans.memory import TitansMemory


# Values at a time: as many as a head is wide in most models, which is what the kernels are made for.
COLUMNS = 64


def mixer_matrix(memory: nn.Module, hidden_states: Tensor) -> Tensor:
    """What the memory reads is `matrix @ values`, plus what its initial memory alone would give.

    Such a matrix exists where the memory is a matrix itself and no norm stands behind it: the state, and with it what
    is read, is then linear in the values. It is found by giving the memory the unit vectors of the tokens as values,
    some tokens at a time, and computed again in the backward pass, so that no state of all of them is kept.

    Args:
        memory: A mixer without a sequence in it.
        hidden_states: Normalised hidden states, `[B, T, D]`.

    Returns:
        `[B, H, T, T]`, lower triangular: `[t, s]` is the weight of the value of token s after token t.

    Raises:
        ConversionError: For a memory that is not linear in its values.
    """
    check_linear(memory)
    query, key, value, _ = memory.project(hidden_states)
    gates = memory.gates(hidden_states)
    rows, length, heads = key.shape[:3]

    def columns(start: int, query: Tensor, key: Tensor) -> Tensor:
        width = min(COLUMNS, length - start)
        unit = torch.eye(length, width, dtype=value.dtype, device=value.device)
        # Token `start + i` is column i; nothing is read from a token before it is there.
        unit = unit.roll(start, 0)[:, None].expand(rows, length, heads, width)
        return anchored_linear(query, key, unit, gates, options=memory.options)[0]

    parts = [
        checkpoint(columns, start, query, key, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, length, COLUMNS)
    ]
    return torch.cat(parts, dim=-1).transpose(1, 2)


def check_linear(memory: nn.Module) -> None:
    """Refuse a memory that is not linear in its values."""
    linear = isinstance(memory, TitansMemory) and memory.initial_memory.depth == 1
    if not linear or memory.initial_memory.norm is not None or memory.gates.num_sets != 1:
        raise ConversionError(
            "`target` matrix needs a memory that is linear in the values it stores, with one gate per head: titans "
            "with memory_depth 1, no memory_layer_norm and gate_granularity head; use `target` heads, mixer or block "
            "for others."
        )
