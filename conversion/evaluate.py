"""What a converted model kept of its teacher and what it costs: held-out loss, divergence, cache size, speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_memory._cli.state_size import layer_states


if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Cache, PreTrainedConfig, PreTrainedModel

Progress = Callable[[int, int], None]

EDGES = (1024,)
CURVE_BINS = 16
CACHE_CONTEXTS = (1024, 16 * 1024, 128 * 1024)
SPEED_CONTEXTS = (1024, 8 * 1024)
# Logits of one forward pass, and of one slice of it in float32: 256 MiB and 64 MiB.
_LOGITS_PER_PASS = 2**26
_LOGITS_PER_SLICE = 2**24
_MAX_ROWS = 8
_PREFILL_PIECE = 1024


@dataclass(frozen=True)
class Span:
    """
    Means over the predicted tokens at positions `start <= position < end` of all blocks.

    Args:
        bits_per_token: negative log likelihood, base 2.
        bits_per_byte: the same for a byte of text; `None` where the number of bytes is not known.
        kl_bits_per_token: KL(reference || model) of the next-token distributions, base 2; `None` without a reference.
        agreement: share of positions at which both find the same token likeliest; `None` without a reference.
    """

    start: int
    end: int
    bits_per_token: float
    bits_per_byte: float | None = None
    kl_bits_per_token: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Quality:
    """
    Held-out quality of one model.

    Args:
        tokens: how many tokens were predicted.
        whole: over all positions. The first token of a block is given, not predicted.
        parts: split at the edges asked for, as far as the blocks reach.
        curve: split into short spans of equal length, for a plot.
        block_bits: bits per token of each block in each of `parts`, `[N][parts]`, for paired comparisons.
    """

    tokens: int
    whole: Span
    parts: list[Span]
    curve: list[Span]
    block_bits: list[list[float]]


@dataclass(frozen=True)
class CacheSize:
    """
    Bytes of the cache of one sample after `tokens` tokens.

    Args:
        kv_bytes: keys and values: the part that grows with every token, up to its window where it has one.
        memory_bytes: the part that is the same after every token.
    """

    tokens: int
    kv_bytes: int
    memory_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.memory_bytes


@dataclass(frozen=True)
class DecodeSpeed:
    """
    Speed of single-token steps of one sample behind `context` tokens.

    Args:
        tokens_per_second: median over pieces of equal length.
        steps: how many steps were timed in all.
    """

    context: int
    tokens_per_second: float
    steps: int


def evaluate_models(
    models: Mapping[str, PreTrainedModel],
    blocks: torch.Tensor,
    *,
    reference: str | None = None,
    bytes_per_token: float | None = None,
    edges: Sequence[int] = EDGES,
    bins: int = CURVE_BINS,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Quality]:
    """
    Held-out quality of several models on the same blocks, each block read from an empty cache.

    Needs memory for the logits of one batch of two models, in their own dtype, and for one slice of them in float32.

    Args:
        models: causal language models by name. They are put into eval mode for the time of the call.
        blocks: `[N, T]` int64, N >= 1, T >= 2, without padding.
        reference: name of the model that the others are compared with (KL, top-1 agreement). Default: no comparison.
        bytes_per_token: bytes of the text for each of its tokens, for bits per byte. Default: bits per token only.
        edges: positions at which `Quality.parts` are split; those at or beyond T are left out.
        bins: length of `Quality.curve`, at most T - 1.
        batch_size: rows of one forward pass. Default: at most 8, fewer where the logits would exceed 256 MiB.
        on_progress: called as `on_progress(done, N)` after every batch.

    Raises:
        ValueError: blocks of another shape or dtype, ids outside the vocabulary, an unknown reference, or models whose
            vocabularies differ.
    """
    vocabulary = _check(models, blocks, reference, edges)
    rows, length = blocks.shape
    batch_size = batch_size or max(1, min(_MAX_ROWS, _LOGITS_PER_PASS // (length * vocabulary)))
    order = sorted(models, key=lambda name: name != reference)
    scores = {name: _Scores(rows, length - 1, reference not in (None, name)) for name in models}
    with torch.no_grad(), eval_mode(models.values()):
        for start in range(0, rows, batch_size):
            batch = blocks[start : start + batch_size]
            expected = None
            for name in order:
                model = models[name]
                logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1]
                scores[name].add(start, logits, batch[:, 1:], expected)
                if name == reference:
                    expected = logits
            if on_progress is not None:
                on_progress(min(start + batch_size, rows), rows)
    return {name: scores[name].summary(bytes_per_token, edges, bins) for name in models}


def evaluate_pair(
    teacher: PreTrainedModel, student: PreTrainedModel, blocks: torch.Tensor, **options
) -> dict[str, Quality]:
    """Quality of `"teacher"` and `"student"`, the latter compared with the former; options of `evaluate_models`."""
    return evaluate_models({"teacher": teacher, "student": student}, blocks, reference="teacher", **options)


def evaluate_model(model: PreTrainedModel, blocks: torch.Tensor, **options) -> Quality:
    """Quality of one model alone; options of `evaluate_models`."""
    return evaluate_models({"model": model}, blocks, **options)["model"]


def paired_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], part: int
) -> tuple[float, float]:
    """
    How much less the first of two models needs than the second on the same blocks, and how sure that is.

    Args:
        first, second: `Quality.block_bits` of each, `[N][parts]`.
        part: which of the parts to compare.

    Returns:
        Mean of the difference in bits per token, and its standard error over blocks (NaN for a single block).
    """
    differences = [its[part] - mine[part] for mine, its in zip(first, second)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error


def cache_growth(
    config: PreTrainedConfig, dtype: torch.dtype, contexts: Sequence[int] = CACHE_CONTEXTS
) -> list[CacheSize]:
    """
    Size of the cache of one sample after each of `contexts` tokens, from the cache that a model of this configuration
    makes for one and for two tokens; the longer ones are computed from these two, nothing is prefilled.

    Args:
        config: of a causal language model; its weights are not needed.
        dtype: of the model's weights, which is that of its keys and values.
    """
    states = layer_states(config, dtype)
    sizes = []
    for tokens in contexts:
        fixed = sum(state.first - state.per_token for state in states)
        sizes.append(CacheSize(tokens, sum(state.after(tokens) for state in states) - fixed, fixed))
    return sizes


def decode_speeds(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int] = SPEED_CONTEXTS,
    *,
    tokens: torch.Tensor | None = None,
    pieces: int = 9,
    steps: int = 8,
) -> dict[str, list[DecodeSpeed]]:
    """
    Tokens per second of single-token steps with a cache, one sample, behind contexts of several lengths.

    For every context a fresh cache of each model is filled, and `steps` steps are made, untimed. Then the models take
    turns, `steps` timed steps each, `pieces` times: what else the machine does meets all of them alike. A context may
    be longer than a model was trained for: that says nothing about what it writes, and the work is the same.

    Args:
        models: causal language models by name.
        contexts: lengths in tokens, >= 1.
        tokens: int64 `[N]` to read, repeated where they are too few. Default: random ones, always the same.
        pieces: how many times; the median is what is returned.
        steps: tokens in a piece.
    """
    if tokens is None:
        vocabulary = min(model.config.get_text_config(decoder=True).vocab_size for model in models.values())
        tokens = torch.randint(vocabulary, (4096,), generator=torch.Generator().manual_seed(0))
    needed = max(contexts) + (pieces + 1) * steps
    tokens = tokens.repeat(math.ceil(needed / len(tokens)))[None, :needed]
    speeds: dict[str, list[DecodeSpeed]] = {name: [] for name in models}
    with torch.no_grad(), eval_mode(models.values()):
        for context in contexts:
            caches, seconds = {}, {name: [] for name in models}
            for name, model in models.items():
                for start in range(0, context, _PREFILL_PIECE):
                    piece = tokens[:, start : min(start + _PREFILL_PIECE, context)]
                    caches[name] = _read(model, piece, caches.get(name))
            for first in range(context, context + (pieces + 1) * steps, steps):
                for name, model in models.items():
                    singles = tokens[:, first : first + steps].to(model.device).split(1, dim=1)
                    began = _now(model.device)
                    for single in singles:
                        _read(model, single, caches[name])
                    seconds[name].append(_now(model.device) - began)
            for name, taken in seconds.items():
                # The first piece pays for what happens once only.
                median = statistics.median(taken[1:])
                speeds[name].append(DecodeSpeed(context, steps / median, pieces * steps))
    return speeds


class _Scores:
    """What every token of the blocks was worth to one model, by position."""

    def __init__(self, rows: int, positions: int, compared: bool) -> None:
        self.bits = torch.zeros(rows, positions)
        self.kl = torch.zeros(rows, positions) if compared else None
        self.same = torch.zeros(rows, positions, dtype=torch.bool) if compared else None

    def add(self, row: int, logits: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None) -> None:
        """Logits `[B, T, V]` of the model and of the reference, targets `[B, T]`; rows from `row` on."""
        for index in range(len(logits)):
            step = max(1, _LOGITS_PER_SLICE // logits.shape[-1])
            for start in range(0, logits.shape[1], step):
                place = slice(start, start + step)
                log_p = logits[index, place].float().log_softmax(-1)
                target = targets[index, place, None].to(log_p.device)
                self.bits[row + index, place] = -log_p.gather(-1, target)[:, 0].cpu() / math.log(2)
                if self.kl is None or expected is None:
                    continue
                log_q = expected[index, place].to(log_p.device).float().log_softmax(-1)
                self.same[row + index, place] = (log_p.argmax(-1) == log_q.argmax(-1)).cpu()
                kl = log_p.neg_().add_(log_q).mul_(log_q.exp_()).sum(-1)
                self.kl[row + index, place] = kl.cpu() / math.log(2)

    def summary(self, bytes_per_token: float | None, edges: Sequence[int], bins: int) -> Quality:
        end = self.bits.shape[1] + 1
        inner = sorted(edge for edge in set(edges) if 1 < edge < end)
        bins = min(bins, end - 1)
        cuts = [1 + round(index * (end - 1) / bins) for index in range(bins + 1)]
        parts = list(zip([1, *inner], [*inner, end]))
        of_blocks = [self.bits[:, first - 1 : last - 1].double().mean(1) for first, last in parts]
        return Quality(
            tokens=self.bits.numel(),
            whole=self._span(1, end, bytes_per_token),
            parts=[self._span(*part, bytes_per_token) for part in parts],
            curve=[self._span(first, last, bytes_per_token) for first, last in zip(cuts, cuts[1:])],
            block_bits=torch.stack(of_blocks, dim=1).tolist(),
        )

    def _span(self, start: int, end: int, bytes_per_token: float | None) -> Span:
        bits, kl, same = (
            None if values is None else values[:, start - 1 : end - 1].double().mean().item()
            for values in (self.bits, self.kl, self.same)
        )
        return Span(start, end, bits, None if bytes_per_token is None else bits / bytes_per_token, kl, same)


def _check(
    models: Mapping[str, PreTrainedModel], blocks: torch.Tensor, reference: str | None, edges: Sequence[int]
) -> int:
    if not models:
        raise ValueError("There is no model to evaluate.")
    if blocks.ndim != 2 or blocks.dtype != torch.int64 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise ValueError(
            f"Blocks to evaluate on are int64 [N, T] with N >= 1 and T >= 2, not {blocks.dtype} {list(blocks.shape)}."
        )
    if any(edge < 1 for edge in edges):
        raise ValueError(f"Edges are positions >= 1, not {list(edges)}.")
    if reference is not None and reference not in models:
        raise ValueError(f"The reference {reference!r} is none of the models {', '.join(models)}.")
    sizes = {name: model.get_output_embeddings().weight.shape[0] for name, model in models.items()}
    if reference is not None and len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"Models that are compared need the same vocabulary; these have {found}.")
    if blocks.min() < 0 or blocks.max() >= min(sizes.values()):
        raise ValueError(
            f"Blocks hold ids from {blocks.min()} to {blocks.max()}, the vocabulary ends at {min(sizes.values()) - 1}."
        )
    return max(sizes.values())


@contextmanager
def eval_mode(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    kept = [(model, model.training) for model in models]
    for model, _ in kept:
        model.eval()
    try:
        yield
    finally:
        for model, training in kept:
            model.train(training)


def _read(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache | None) -> Cache:
    """The cache after reading `tokens` `[1, T]` behind it. Logits of the last position only, as in `generate()`."""
    tokens = tokens.to(model.device)
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
