"""Properties of the cache: reordering, repeating, selecting and resetting rows, independent copies, cropping."""

from __future__ import annotations

from functools import partial

import torch

from hf_memory.evaluation.properties_report import Result, Worst
from hf_memory.evaluation.properties_subject import Stream, Subject, deviation


def _read(subject: Subject, tokens: torch.Tensor, masked: bool = False) -> Stream:
    """A stream that has read `tokens`, the last few one at a time, so that decode forms have written the state too."""
    stream = subject.stream(masked)
    for piece in tokens.tensor_split([tokens.shape[1] - 3, tokens.shape[1] - 2, tokens.shape[1] - 1], dim=1):
        stream.feed(piece)
    return stream


def _continued(subject: Subject, stream: Stream, history: torch.Tensor) -> float:
    """Deviation of continuing `stream` (one token, then four) from reading `history` `[B, T]` anew."""
    extra = subject.tokens(len(history), 5)
    logits = torch.cat([stream.feed(piece) for piece in extra.tensor_split([1], dim=1)], dim=1)
    return deviation(logits, subject.forward(torch.cat([history, extra], dim=1))[:, -5:])


def _length(subject: Subject) -> int:
    """Ends inside a chunk, so that partially filled buffers take part."""
    return subject.prompt_length - 2


def _on_rows(subject: Subject, operation: str, **cases: list[int]) -> Result:
    """Continues a batch of three rows after `Stream.<operation>`; each case lists the row every new row comes from."""
    worst = Worst(subject.tolerance)
    for masked, (label, origin) in enumerate(cases.items()):
        tokens = subject.tokens(3, _length(subject))
        stream = _read(subject, tokens, bool(masked))
        argument = len(origin) // 3 if operation == "repeat" else torch.tensor(origin, device=subject.device)
        getattr(stream, operation)(argument)
        worst.add(_continued(subject, stream, tokens[origin]), label.replace("_", " "))
    return worst.result()


def cache_reorder(subject: Subject) -> Result:
    """After `reorder_cache` (beam search) every row continues the row it was taken from."""
    return _on_rows(subject, "reorder", permuted=[2, 0, 1], beams=[1, 1, 0])


def cache_repeat(subject: Subject) -> Result:
    """After `batch_repeat_interleave` every copy continues its row."""
    return _on_rows(subject, "repeat", twice=[0, 0, 1, 1, 2, 2])


def cache_select(subject: Subject) -> Result:
    """After `batch_select_indices` the rows kept continue."""
    return _on_rows(subject, "select", two_rows=[2, 0], one_row=[1])


def cache_reset(subject: Subject) -> Result:
    """After `reset` the same cache object reads another prompt as a new one would."""
    first, second = subject.tokens(2, _length(subject)), subject.tokens(2, _length(subject))
    worst = Worst(subject.tolerance)
    stream = _read(subject, first)
    for cuts in ([1], [_length(subject) // 2], []):
        stream.cache_method("reset")()
        stream.mask = None
        logits = torch.cat([stream.feed(piece) for piece in second.tensor_split(cuts, dim=1)], dim=1)
        worst.add(deviation(logits, subject.forward(second)), f"read again with cuts at {cuts}")
    return worst.result()


def cache_fork(subject: Subject) -> Result:
    """Copies of a cache (`copy.deepcopy`) continue independently of the original and of each other."""
    tokens = subject.tokens(2, _length(subject))
    worst = Worst(subject.tolerance)
    stream = _read(subject, tokens)
    twins = [stream.fork(), stream.fork()]
    for index, branch in enumerate([twins[0], stream, twins[1]]):
        worst.add(_continued(subject, branch, tokens), f"branch {index}")
    return worst.result()


def cache_crop(subject: Subject) -> Result:
    """`crop(-n)` continues as if the last n tokens had not been read, or is refused; `crop(0)` changes nothing."""
    tokens = subject.tokens(2, _length(subject))
    worst = Worst(subject.tolerance)

    def run(removed: int) -> float:
        stream = _read(subject, tokens)
        stream.cache_method("crop")(-removed)
        kept = tokens[:, : tokens.shape[1] - removed]
        stream.mask = stream.mask[:, : kept.shape[1]]
        return _continued(subject, stream, kept)

    for removed in (0, 1, 5):
        worst.attempt(f"crop({-removed})", partial(run, removed))
    return worst.result()
