"""Properties of `generate()` and `pipeline()`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hf_memory.evaluation.properties_report import NotApplicableError, Result, Worst
from hf_memory.evaluation.properties_subject import Subject, deviation, neutral_generation_config


# A chosen token may fall short of the best one by the deviation of two logits, and that of one logit may be some times
# the RMS deviation that the tolerance speaks of.
_PEAK = 10


def _require_generate(subject: Subject) -> None:
    if not subject.model.can_generate():
        raise NotApplicableError(f"{type(subject.model).__name__} cannot generate")


def _recomputed(subject: Subject, sequence: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Logits `[N, new, vocab]` that chose the last `new_tokens` of `sequence` `[N, T]`, computed without a cache."""
    return subject.forward(sequence)[:, -new_tokens - 1 : -1]


def _shortfall(logits: torch.Tensor, chosen: torch.Tensor) -> float:
    """By how much the chosen tokens fall short of the largest logits, relative to the logits' RMS (0 = argmax)."""
    best = logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]
    return float(best.max() / logits.pow(2).mean().sqrt())


def _compare_greedy(subject: Subject, outputs: Any, sequences: torch.Tensor, worst: Worst, label: str) -> None:
    """Checks generated `sequences` (unpadded, `[N, T]`), and the logits that came along, against recomputation."""
    new_tokens = subject.budget.new_tokens
    logits = _recomputed(subject, sequences, new_tokens)
    worst.add(_shortfall(logits, sequences[:, -new_tokens:]) / _PEAK, f"argmax of recomputation, {label}")
    if getattr(outputs, "logits", None) is not None:
        worst.add(deviation(torch.stack(outputs.logits, dim=1), logits), f"logits, {label}")


def greedy(subject: Subject) -> Result:
    """Greedy `generate()` is the argmax of recomputation without a cache, logits included."""
    _require_generate(subject)
    worst = Worst(subject.generation_tolerance)
    for length in (1, subject.chunk_size if subject.chunk_size <= 64 else 8, 13):
        outputs = subject.generate(subject.tokens(1, length), output_logits=True)
        _compare_greedy(subject, outputs, outputs.sequences, worst, f"prompt of {length}")
    return worst.result()


def sampling(subject: Subject) -> Result:
    """Sampling with a seed is reproducible, and draws from the logits that recomputation gives."""
    _require_generate(subject)
    prompt, runs = subject.tokens(2, 9), []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(subject.generate(prompt, do_sample=True, top_k=0, output_logits=True))
    worst = Worst(subject.generation_tolerance)
    worst.add(0.0 if torch.equal(runs[0].sequences, runs[1].sequences) else float("inf"), "same seed, other tokens")
    logits = _recomputed(subject, runs[0].sequences, subject.budget.new_tokens)
    worst.add(deviation(torch.stack(runs[0].logits, dim=1), logits), "logits against recomputation")
    return worst.result()


def beam_search(subject: Subject) -> Result:
    """Beam search with a cache finds the beams, and the scores, of beam search without one."""
    _require_generate(subject)
    worst = Worst(subject.generation_tolerance * _PEAK)
    prompt = subject.tokens(2, 11)
    settings = {"num_beams": 4, "num_return_sequences": 2, "output_scores": True, "length_penalty": 1.0}
    cached = subject.generate(prompt, **settings)
    fresh = subject.generate(prompt, use_cache=False, **settings)
    size = fresh.sequences_scores.abs().mean()
    worst.add(float((cached.sequences_scores - fresh.sequences_scores).abs().max() / size), "scores")
    # Beams of equal score may change places: it is the score of the cached beams that must be the best one.
    if not torch.equal(cached.sequences, fresh.sequences):
        logprobs = _recomputed(subject, cached.sequences, subject.budget.new_tokens).log_softmax(-1)
        total = logprobs.gather(-1, cached.sequences[:, -subject.budget.new_tokens :, None])[..., 0].mean(-1)
        worst.add(float((total - fresh.sequences_scores).abs().max() / size), "other beams")
    return worst.result()


def batched_generation(subject: Subject) -> Result:
    """Generation for a batch padded on the left equals generation for each row alone."""
    _require_generate(subject)
    lengths = [11, 4, 1, min(subject.prompt_length, 40)]
    tokens = subject.tokens(len(lengths), max(lengths))
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths], device=subject.device)
    outputs = subject.generate(tokens, mask, output_logits=True)
    new_tokens, worst = subject.budget.new_tokens, Worst(subject.generation_tolerance)
    logits = torch.stack(outputs.logits, dim=1)
    for row, length in enumerate(lengths):
        sequence = outputs.sequences[row : row + 1, max(lengths) - length :]
        expected = _recomputed(subject, sequence, new_tokens)
        worst.add(_shortfall(expected, sequence[:, -new_tokens:]) / _PEAK, f"argmax of recomputation, row of {length}")
        worst.add(deviation(logits[row : row + 1], expected), f"logits, row of {length}")
    return worst.result()


def assisted_decoding(subject: Subject) -> Result:
    """Assisted decoding (prompt lookup, or the model as its own assistant) equals greedy, or is refused."""
    _require_generate(subject)
    prompt = subject.tokens(1, 6).repeat(1, 4)
    worst = Worst(subject.generation_tolerance)

    def run(**settings: Any) -> float:
        sequences = subject.generate(prompt, **settings).sequences
        logits = _recomputed(subject, sequences, subject.budget.new_tokens)
        return _shortfall(logits, sequences[:, -subject.budget.new_tokens :]) / _PEAK

    worst.attempt("prompt lookup", partial(run, prompt_lookup_num_tokens=3))
    worst.attempt("assistant model", partial(run, assistant_model=subject.model))
    return worst.result()


def static_cache(subject: Subject) -> Result:
    """`generate(cache_implementation="static")` equals recomputation, left padding included, or is refused."""
    _require_generate(subject)
    tokens = subject.tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    worst = Worst(subject.generation_tolerance)

    def run(first: int) -> float:
        settings = {"cache_implementation": "static", "disable_compile": True, "output_logits": True}
        outputs = subject.generate(tokens[first:], mask[first:], **settings)
        logits, deviations = torch.stack(outputs.logits, dim=1), []
        for row in range(2 - first):
            sequence = outputs.sequences[row : row + 1, int((mask[first + row] == 0).sum()) :]
            expected = _recomputed(subject, sequence, subject.budget.new_tokens)
            deviations.append(deviation(logits[row : row + 1], expected))
        return max(deviations)

    worst.attempt("batch of two", partial(run, 0))
    worst.attempt("one padded row", partial(run, 1))
    return worst.result()


def text_pipeline(subject: Subject) -> Result:
    """`pipeline("text-generation")` gives the text of greedy `generate()`, for one prompt and for a padded batch."""
    from transformers import pipeline

    _require_generate(subject)
    tokenizer = byte_tokenizer(subject.vocab_size)
    prompts = ["abacabad", "cab", "decade of bad ideas"[: 4 + subject.budget.new_tokens]]
    new_tokens, mismatched = subject.budget.new_tokens, []
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(subject.device)
        sequence = subject.generate(ids).sequences[0]
        expected.append(tokenizer.decode(sequence, skip_special_tokens=True))
    with neutral_generation_config(subject.model):
        pipe = pipeline("text-generation", model=subject.model, tokenizer=tokenizer, device=subject.device)
        settings = {"max_new_tokens": new_tokens, "do_sample": False}
        alone = [pipe(prompt, **settings)[0]["generated_text"] for prompt in prompts]
        batch = [outputs[0]["generated_text"] for outputs in pipe(prompts, batch_size=len(prompts), **settings)]
    for label, texts in (("one prompt", alone), ("padded batch", batch)):
        mismatched += [f"{label} {prompts[i]!r}" for i in range(len(prompts)) if texts[i] != expected[i]]
    detail = "other text for " + ", ".join(mismatched) if mismatched else f"{2 * len(prompts)} texts equal"
    return Result("", "fail" if mismatched else "pass", float(len(mismatched)), 0.0, detail)


def byte_tokenizer(vocab_size: int) -> Any:
    """
    A byte-level tokenizer without merges, padding on the left, for models that have none: one id per byte, the letters
    first, so that a vocabulary of a few dozen ids still holds them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    alphabet = letters + sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    vocab = {token: index for index, token in enumerate(["<pad>", "<unk>", *alphabet][:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
