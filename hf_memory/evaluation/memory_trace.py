"""What happens in a memory while it reads: surprise, gates and size of the states, token by token."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from hf_memory.cache import MemoryCache
from hf_memory.cache_states import MemoryStatesMixin
from hf_memory.kernels import Gates
from hf_memory.layers import MemoryGates
from hf_memory.memory_file import evaluating
from hf_memory.memory_identity import without_adapter_wrapper


# Names that the ops give to the weights of a memory; beside them a layer keeps buffers, momenta and tails.
_WEIGHTS = re.compile(r"(.*\.)?(memory|offset|slots)(_\d+)?")


@dataclass
class MemoryTrace:
    """What was seen while a text was read.

    Attributes:
        labels: the T tokens as text.
        surprise: `[T]` -log2 of the probability that the model gave each token before it came, in bits; NaN for a
            first token, which nothing was said about.
        layers: the L layers with memories that have gates.
        write: `[T, L, H]` step size of each memory head, averaged over its gate sets.
        forget: `[T, L, H]` share of the memory that each token makes it forget, 1 - decay; 0 where it never forgets.
        norm_layers: the layers whose states were measured.
        norms: `[T, len(norm_layers)]` root of the sum of squares of the memory's weights behind each token, or of the
            distance from their learned start where that is what the state holds. They change where a chunk ends.
    """

    labels: list[str]
    surprise: Tensor
    layers: list[int]
    write: Tensor
    forget: Tensor
    norm_layers: list[int]
    norms: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def trace_memory(
    model: PreTrainedModel, ids: list[int], labels: list[str], memory: MemoryCache | None = None
) -> MemoryTrace:
    """Let a causal language model read tokens one by one, and look at its memory behind each.

    Args:
        model: a causal language model with memories.
        ids: T token ids.
        labels: what to call them.
        memory: what comes before them; it is written to.

    Raises:
        ValueError: for a model without memories, or no token.
    """
    model = without_adapter_wrapper(model)
    if not ids or not hasattr(model, "new_memory"):
        raise ValueError("There is nothing to look at: give a model with memories and at least one token.")
    memory = model.new_memory() if memory is None else memory
    surprise, norms, expected = [], [], None
    with evaluating(model), _watched_gates(model) as seen:
        for token in ids:
            surprise.append(math.nan if expected is None else -float(expected[token]) / math.log(2))
            step = torch.tensor([[token]], device=model.device)
            logits = model(input_ids=step, past_key_values=memory, use_cache=True).logits
            expected = logits[0, -1].float().log_softmax(0)
            norms.append(_norms(memory))
    layers = sorted(seen)
    write = [torch.stack([write for write, _ in seen[layer]]) for layer in layers]
    forget = [torch.stack([forget for _, forget in seen[layer]]) for layer in layers]
    return MemoryTrace(
        labels=labels,
        surprise=torch.tensor(surprise),
        layers=layers,
        write=_beside_each_other(write, len(ids)),
        forget=_beside_each_other(forget, len(ids)),
        norm_layers=sorted(norms[0]),
        norms=torch.tensor([[row[layer] for layer in sorted(row)] for row in norms]),
    )


def tokenize_with_labels(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[str]]:
    """Ids of a text without special tokens, and the piece of text that each one stands for.

    A character that takes several tokens is shown at the first one of them.
    """
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels, end = [], 0
    for start, stop in encoded["offset_mapping"]:
        labels.append(text[max(start, end) : stop])
        end = max(end, stop)
    return encoded["input_ids"], labels


def _beside_each_other(layers: list[Tensor], tokens: int) -> Tensor:
    """`[T, L, H]` of L times `[T, h]`; heads that a layer does not have are NaN."""
    heads = max((layer.shape[1] for layer in layers), default=0)
    return (
        torch.stack([nn.functional.pad(layer, (0, heads - layer.shape[1]), value=math.nan) for layer in layers], dim=1)
        if layers
        else torch.zeros(tokens, 0, 0)
    )


def _norms(memory: Cache) -> dict[int, float]:
    found = {}
    for index, layer in enumerate(memory.layers):
        if isinstance(layer, MemoryStatesMixin) and layer.has_states:
            weights = [x for name, x in layer.get_states().items() if _WEIGHTS.fullmatch(name)]
            weights = weights or [x for x in layer.get_states().values() if x.is_floating_point()]
            found[index] = float(sum(x.float().square().sum() for x in weights)) ** 0.5
    return found


@contextmanager
def _watched_gates(model: nn.Module) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Step size and forgetting `[H]` of the last token of each call, by layer."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    latest: dict[int, tuple[Tensor, Tensor]] = {}

    def note(layer: int, gates: Gates) -> None:
        # The first call reads persistent tokens too, before the token: what counts is the last word of each gate.
        write = gates.step[-1, -1].float().mean(-1).cpu()
        kept = torch.zeros_like(write) if gates.log_decay is None else gates.log_decay[-1, -1].float().cpu()
        latest[layer] = write, -kept.expm1().reshape(len(write), -1).mean(-1)

    def collect(*args: object) -> None:
        for layer, gates in latest.items():
            seen.setdefault(layer, []).append(gates)

    handles = [model.register_forward_hook(collect)]
    for name, module in model.named_modules():
        if isinstance(module, MemoryGates) and (number := re.search(r"\.(\d+)\.", name)):
            hook = partial(lambda layer, module, inputs, gates: note(layer, gates), int(number[1]))
            handles.append(module.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
