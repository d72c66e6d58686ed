"""Projections of a teacher's attention, whatever its family calls them and however it packs them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig


Linear = tuple[Tensor, Tensor | None]
Projections = dict[str, Linear]
SEPARATE = ("q_proj", "k_proj", "v_proj")
# Names of the output projection.
OUTPUT = ("o_proj", "out_proj", "dense", "Wo", "c_proj")
QUERY_NORMS, KEY_NORMS = ("q_norm", "q_layernorm", "query_layernorm"), ("k_norm", "k_layernorm", "key_layernorm")


def read_projections(attention: nn.Module, config: MemoryHybridConfig) -> Projections:
    """Weights and biases of an attention module, one set of rows per query head.

    Returns:
        `"q_proj"`, `"k_proj"`, `"v_proj"` (`[H d, D]`, with the scale of their norms), `"o_proj"` (`[D, H d]`).

    Raises:
        ValueError: for a module whose projections have other names or shapes than any that is known.
    """
    heads, head_dim = config.attention_heads
    parts = _separate(attention, heads, head_dim)
    for name, norms in (("q_proj", QUERY_NORMS), ("k_proj", KEY_NORMS)):
        norm = next((getattr(attention, n) for n in norms if getattr(attention, n, None) is not None), None)
        if norm is not None:
            parts[name] = _scaled(parts[name], norm, head_dim)
    for name in ("k_proj", "v_proj"):
        weight, bias = parts[name]
        repeats = heads * head_dim // weight.shape[0]
        parts[name] = _repeat_heads(weight, head_dim, repeats), _repeat_heads(bias, head_dim, repeats)
    for name, (weight, _) in parts.items():
        shape = (config.hidden_size, heads * head_dim) if name == "o_proj" else (heads * head_dim, config.hidden_size)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{type(attention).__name__}.{name} is {tuple(weight.shape)}, and a memory with {heads} heads of "
                f"width {head_dim} needs {shape}: attention with such heads cannot be converted."
            )
    return parts


def _separate(attention: nn.Module, heads: int, head_dim: int) -> Projections:
    names = dict(attention.named_children())
    output = next((name for name in OUTPUT if name in names), None)
    for fused, split in FUSED.items():
        if fused in names:
            parts = split(attention, _linear(names[fused]), heads, head_dim)
            return parts | {"o_proj": _linear(names[output])}
    if "Wq" in names:  # CTRL
        return {
            ours: _linear(names[theirs])
            for ours, theirs in (("q_proj", "Wq"), ("k_proj", "Wk"), ("v_proj", "Wv"), ("o_proj", "dense"))
        }
    if output is not None and all(name in names for name in SEPARATE):
        parts = {name: _linear(names[name]) for name in SEPARATE}
        if parts["q_proj"][0].shape[0] == 2 * heads * head_dim:
            # Qwen3-Next: a gate for what attention gives stands behind the query of each head.
            parts["q_proj"] = _per_head(parts["q_proj"], heads, (head_dim, head_dim))[0]
        if (factor := getattr(attention, "v_scale", 1.0)) != 1.0:  # MiMo-V2
            parts["v_proj"] = tuple(None if part is None else factor * part for part in parts["v_proj"])
        return parts | {"o_proj": _linear(names[output])}
    raise ValueError(
        f"{type(attention).__name__} keeps its projections in a way that is not known here ({', '.join(names)}): its "
        "family is not supported."
    )


def _one_after_another(attention: nn.Module, rows: Linear, heads: int, head_dim: int) -> Projections:
    """All queries, all keys, all values."""
    shared = (rows[0].shape[0] - heads * head_dim) // 2
    return dict(zip(SEPARATE, _split(rows, [heads * head_dim, shared, shared])))


def _head_by_head(attention: nn.Module, rows: Linear, heads: int, head_dim: int) -> Projections:
    """Query, key and value of each head."""
    return dict(zip(SEPARATE, _per_head(rows, heads, (head_dim, head_dim, head_dim))))


def _conv_or_heads(attention: nn.Module, rows: Linear, heads: int, head_dim: int) -> Projections:
    # GPT-BigCode without shared keys packs by head, with them, and GPT-2 always, one after another.
    by_head = getattr(attention, "multi_query", None) is False
    return (_head_by_head if by_head else _one_after_another)(attention, rows, heads, head_dim)


FUSED: dict[str, Callable[[nn.Module, Linear, int, int], Projections]] = {
    "qkv_proj": _one_after_another,  # Phi-3
    "Wqkv": _one_after_another,  # DBRX
    "query_key_value": _head_by_head,  # GPT-NeoX
    "c_attn": _conv_or_heads,  # GPT-2
}


def _split(rows: Linear, sizes: list[int]) -> list[Linear]:
    weight, bias = rows
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return list(zip(weight.split(sizes), biases))


def _per_head(rows: Linear, heads: int, sizes: tuple[int, ...]) -> list[Linear]:
    """Parts of `sizes` rows that repeat for each head, each as one projection."""
    weight, bias = rows
    weights = [part.flatten(0, 1) for part in weight.unflatten(0, (heads, -1)).split(sizes, dim=1)]
    if bias is None:
        return [(part, None) for part in weights]
    return list(zip(weights, (part.flatten() for part in bias.unflatten(0, (heads, -1)).split(sizes, dim=1))))


def _linear(module: nn.Module) -> Linear:
    if isinstance(module, Conv1D):
        return module.weight.detach().T, module.bias.detach()
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ValueError(
            f"A projection of class {type(module).__name__} cannot be inherited: load the teacher unquantised."
        )
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _scaled(rows: Linear, norm: nn.Module, head_dim: int) -> Linear:
    # The division by the length is of no consequence to memories, which bring queries and keys to unit length
    # themselves; what else a norm does, a scale in some convention (w or 1 + w) and in a LayerNorm the removal of the
    # mean, is linear and becomes part of the projection. A shift behind the division has no counterpart.
    weight, bias = rows
    parameters = [value for name, value in norm.named_parameters() if name.endswith("weight")]
    if not parameters:
        return rows
    # StableLM has a norm for each head.
    shape = parameters[0].shape if len(parameters) == 1 else (1, len(parameters), 1, parameters[0].shape[-1])
    probe = torch.ones(shape, dtype=parameters[0].dtype, device=weight.device)
    probe[..., 1::2] = -1
    shift = norm(torch.zeros_like(probe))
    scale = ((norm(probe) - shift) * probe).detach().flatten()
    scale = scale.repeat(weight.shape[0] // scale.shape[0]).to(weight.dtype)
    if _removes_mean(norm):
        groups = weight.shape[0] // shape[-1]
        weight, bias = _centred(weight, groups), None if bias is None else _centred(bias, groups)
    return weight * scale[:, None], None if bias is None else bias * scale


def _removes_mean(norm: nn.Module) -> bool:
    # By name: on tensors without values, as the check before loading has them, no probe could tell.
    return any("LayerNorm" in type(module).__name__ for module in norm.modules())


def _centred(rows: Tensor, groups: int) -> Tensor:
    parts = rows.unflatten(0, (groups, -1))
    return (parts - parts.mean(dim=1, keepdim=True)).flatten(0, 1)


def _repeat_heads(rows: Tensor | None, head_dim: int, repeats: int) -> Tensor | None:
    if rows is None or repeats <= 1:
        return rows
    return rows.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)
