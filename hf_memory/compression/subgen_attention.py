"""Attention that reads what SubGen's sampler has kept, under the name "subgen" for `model.set_attn_implementation`."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_memory.compression.subgen import weighted_attention


SUBGEN = "subgen"


def subgen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """PyTorch's attention, and for keys of a `SamplerLayer` attention over its samples, too.

    Args:
        module: the attention layer.
        query: `[B, H, Q, P]`.
        key: `[B, Hk, S, P]`, as the cache returned it.
        value: `[B, Hk, S, V]`.
        attention_mask: `[B, 1, Q, S]` bool, true where a key is seen; `None`: everything before the query.
        dropout: without samples only.
        scaling: of the logits.

    Returns:
        `[B, Q, H, V]` in the dtype of the query, and no weights.
    """
    stream = getattr(key, "subgen", None)
    state = None if stream is None else stream.read()
    if state is None or not bool(state.counts.any()):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    odd = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if odd:
        raise ValueError(
            f'SubGen\'s mode "sampler" knows plain attention only, and this model passes {", ".join(odd)}: use '
            'mode="kcenter".'
        )
    batch, heads, length, width = query.shape
    groups, slots = heads // key.shape[1], key.shape[2]
    if attention_mask is None:
        positions = torch.arange(slots, device=query.device)
        attention_mask = positions <= positions[slots - length :, None]
    # Not -inf: a padded query may see nothing at all.
    bias = torch.zeros(attention_mask.shape, device=query.device).masked_fill(
        ~attention_mask, torch.finfo(torch.float32).min
    )
    # All query heads of a key head ask the same keys: `[B Hk, G Q, P]`.
    bias = bias.expand(batch, key.shape[1], length, slots).repeat(1, 1, groups, 1).flatten(0, 1)
    exact = (key.flatten(0, 1).float(), value.flatten(0, 1).float(), bias)
    queries = query.unflatten(1, (-1, groups)).flatten(2, 3).flatten(0, 1).float()
    output = weighted_attention(queries, exact, state, width**-0.5 if scaling is None else scaling)
    output = output.view(batch, heads, length, -1).transpose(1, 2)
    return output.to(query.dtype).contiguous(), None


AttentionInterface.register(SUBGEN, subgen_attention)
AttentionMaskInterface.register(SUBGEN, sdpa_mask)
