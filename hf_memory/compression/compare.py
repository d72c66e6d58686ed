"""What a compressed cache costs: the model with it beside the same model with all keys and values."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_memory.compression.cache import CompressedCache


@dataclass(frozen=True)
class Comparison:
    """Two caches at the same text, over its last tokens, read one at a time.

    Attributes:
        tokens: how many tokens were predicted.
        kl: KL(full || compressed), bits per token.
        agreement: share of tokens at which both have the same likeliest token.
        bits: bits per token with the compressed cache.
        full_bits: bits per token with the full one.
        seconds: per token, with the compressed cache.
        full_seconds: per token, with the full one.
    """

    tokens: int
    kl: float
    agreement: float
    bits: float
    full_bits: float
    seconds: float
    full_seconds: float


@torch.no_grad()
def compare_with_full(model: PreTrainedModel, ids: Tensor, cache: CompressedCache, tail: int) -> Comparison:
    """Read a text with a compressed cache and with the model's own: all but its tail in one call, the tail in steps.

    Args:
        model: a causal language model.
        ids: `[B, T]` token ids without padding.
        cache: an empty cache; it has read all but the last token afterwards.
        tail: tokens to predict, at least 1 and at most T - 1.

    Raises:
        ValueError: for a tail that the text does not have.
    """
    if not 1 <= tail < ids.shape[1]:
        raise ValueError(f"A text of {ids.shape[1]} tokens has 1 to {ids.shape[1] - 1} to compare at, not {tail}.")
    full, full_seconds = _read(model, ids, None, tail)
    own, seconds = _read(model, ids, cache, tail)
    targets = ids[:, -tail:].flatten()
    return Comparison(
        tokens=targets.numel(),
        kl=float(F.kl_div(own, full, reduction="batchmean", log_target=True)) / math.log(2),
        agreement=float((own.argmax(-1) == full.argmax(-1)).float().mean()),
        bits=float(F.nll_loss(own, targets)) / math.log(2),
        full_bits=float(F.nll_loss(full, targets)) / math.log(2),
        seconds=seconds,
        full_seconds=full_seconds,
    )


def _read(model: PreTrainedModel, ids: Tensor, cache: Cache | None, tail: int) -> tuple[Tensor, float]:
    """Log probabilities `[B tail, vocabulary]` float32 of the last tokens, and seconds per step."""
    begin = ids.shape[1] - 1 - tail
    if begin:
        cache = model.base_model(input_ids=ids[:, :begin], past_key_values=cache, use_cache=True).past_key_values
    logits = []
    start = time.perf_counter()
    for token in ids[:, begin:-1].split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    # `item` waits for a GPU.
    logits[-1].sum().item()
    seconds = (time.perf_counter() - start) / tail
    return torch.cat(logits, dim=1).flatten(0, 1).float().log_softmax(-1), seconds
