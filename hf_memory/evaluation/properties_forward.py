"""Properties of the forward pass: splits of the prompt, padding, packing, independence of rows, causality."""

from __future__ import annotations

from functools import partial

import torch

from hf_memory.evaluation.properties_report import NotApplicableError, Result, Worst
from hf_memory.evaluation.properties_subject import Subject, deviation, state_deviation


def reads_context(subject: Subject) -> Result:
    """The last logits depend on the first half of the prompt, far above the tolerance (or the rest proves little)."""
    tokens = subject.tokens(2, subject.prompt_length)
    half = subject.prompt_length // 2
    changed = torch.cat([subject.other(tokens[:, :half]), tokens[:, half:]], dim=1)
    effect = deviation(subject.forward(changed)[:, -1], subject.forward(tokens)[:, -1])
    least = 10 * subject.tolerance
    detail = "change of the last logits with the first half of the prompt; the tolerance is the least it must be"
    return Result("", "pass" if effect >= least else "fail", effect, least, detail)


def split_invariance(subject: Subject) -> Result:
    """Any split of the prompt, token by token included, gives the logits and the final cache state of one call."""
    length, chunk = subject.prompt_length, subject.chunk_size
    tokens = subject.tokens(2, length)
    whole = subject.stream()
    logits = whole.feed(tokens)
    worst = Worst(subject.tolerance)
    worst.add(deviation(logits, subject.forward(tokens)), "one call with a cache against one without")

    splits = {"token by token": list(range(1, length)), "first token apart": [1], "last token apart": [length - 1]}
    segment = subject.segment_size or chunk
    for cut in sorted({edge + i for edge in (chunk, segment) for i in (-1, 0, 1)}):
        if 0 < cut < length:
            splits[f"cut at {cut}"] = [cut]
    edges = list(range(chunk, length, chunk))
    if 1 < len(edges) < length - 1:
        splits["cut on every chunk edge"] = edges
    for _ in range(subject.budget.splits):
        cuts = sorted({subject.integer(1, length - 1) for _ in range(subject.integer(1, 5))})
        splits[f"random split, cuts at {cuts}"] = cuts

    for label, cuts in splits.items():
        stream = subject.stream()
        pieces = [stream.feed(piece) for piece in tokens.tensor_split(cuts, dim=1)]
        worst.add(deviation(torch.cat(pieces, dim=1), logits), label)
        value, name = state_deviation(stream.cache, whole.cache)
        worst.add(value, f"{label}, final state {name}")
    with torch.inference_mode():
        stream = subject.stream()
        pieces = [stream.feed(piece) for piece in tokens.tensor_split([length // 2, length - 1], dim=1)]
        worst.add(deviation(torch.cat(pieces, dim=1), logits), "under inference_mode")
    return worst.result()


def left_padding(subject: Subject) -> Result:
    """Rows padded on the left give the logits of the unpadded rows, at once and when continued from the cache."""
    lengths = [subject.prompt_length, subject.prompt_length - 3, max(subject.prompt_length // 2, 1), 2]
    masks = [[0] * (lengths[0] - length) + [1] * length for length in lengths]
    return _padded_rows(subject, torch.tensor(masks)).result()


def right_padding(subject: Subject) -> Result:
    """Rows padded on the right give the logits of the unpadded rows, at once and when continued from the cache."""
    lengths = [subject.prompt_length, subject.prompt_length - 3, max(subject.prompt_length // 2, 1), 2]
    masks = [[1] * length + [0] * (lengths[0] - length) for length in lengths]
    return _padded_rows(subject, torch.tensor(masks)).result()


def middle_padding(subject: Subject) -> Result:
    """Padding anywhere inside a call gives the logits of the unpadded rows, at once and when continued."""
    length = subject.prompt_length
    masks = (torch.rand(4, length, generator=subject.random) < 0.6).long()
    masks[0], masks[1, 0], masks[2, -1] = 1, 0, 0
    masks[:, length // 2] = 1
    masks[3, length // 2 + 1 :] = 0
    return _padded_rows(subject, masks).result()


def _padded_rows(subject: Subject, masks: torch.Tensor) -> Worst:
    """Compares padded rows with their unpadded selves: one call, then two more tokens singly and three at once."""
    masks = masks.to(subject.device)
    rows, length = masks.shape
    tokens = subject.tokens(rows, length)
    extra = subject.tokens(rows, 5)
    # Ids of padded places are random on purpose: nothing may read them.
    expected = [subject.forward(torch.cat([tokens[i][masks[i].bool()], extra[i]])[None])[0] for i in range(rows)]
    counts = masks.sum(1).tolist()
    worst = Worst(subject.tolerance)

    logits = subject.forward(tokens, mask=masks)
    names = [f"row of {count} tokens in {length}" for count in counts]
    for i in range(rows):
        worst.add(deviation(logits[i][masks[i].bool()], expected[i][: counts[i]]), f"without cache, {names[i]}")

    stream = subject.stream(masked=True)
    logits = stream.feed(tokens, masks)
    continued = torch.cat([stream.feed(piece) for piece in extra.tensor_split([1, 2], dim=1)], dim=1)
    for i in range(rows):
        worst.add(deviation(logits[i][masks[i].bool()], expected[i][: counts[i]]), f"with cache, {names[i]}")
        worst.add(deviation(continued[i], expected[i][counts[i] :]), f"continued, {names[i]}")
    return worst


def idle_rows(subject: Subject) -> Result:
    """A call without a valid token in a row (one token long, or several) leaves that row's state as it was."""
    tokens, idle, extra = subject.tokens(2, 12), subject.tokens(2, 6), subject.tokens(2, 3)
    worst = Worst(subject.tolerance)
    expected = [subject.forward(torch.cat([tokens[0], extra[0]])[None])[0]]
    expected.append(subject.forward(torch.cat([tokens[1], idle[1], extra[1]])[None])[0])
    for label, cuts in (("five tokens, then one", [5]), ("one token at a time", [1, 2, 3, 4, 5])):
        stream = subject.stream(masked=True)
        stream.feed(tokens)
        for piece in idle.tensor_split(cuts, dim=1):
            stream.feed(piece, torch.stack([torch.zeros_like(piece[0]), torch.ones_like(piece[1])]))
        logits = stream.feed(extra)
        worst.add(deviation(logits[0], expected[0][-3:]), f"idle row, {label}")
        worst.add(deviation(logits[1], expected[1][-3:]), f"reading row, {label}")
    return worst.result()


def packing_position_ids(subject: Subject) -> Result:
    """Sequences packed into one row and told apart by position ids that start again equal the single sequences."""
    if "position_ids" not in subject.parameters and not subject.takes_any_keyword:
        raise NotApplicableError("forward takes no position_ids")
    lengths, tokens, expected = _sequences(subject)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(subject.device)[None]
    worst = Worst(subject.tolerance)
    worst.attempt("position ids", partial(_packed, subject, tokens, expected, position_ids=positions))
    return worst.result()


def packing_cu_seqlens(subject: Subject) -> Result:
    """Sequences packed into one row, with all that `DataCollatorWithFlattening` can say of them, equal single ones."""
    if not subject.takes_any_keyword:
        raise NotApplicableError("forward takes no further keyword arguments")
    lengths, tokens, expected = _sequences(subject)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(subject.device)[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(subject.device, torch.int32)
    longest = max(lengths)
    keywords = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    keywords["seq_idx"] = numbers.to(subject.device)[None]
    worst = Worst(subject.tolerance)
    worst.attempt(
        "cu_seq_lens_q and seq_idx", partial(_packed, subject, tokens, expected, position_ids=positions, **keywords)
    )
    return worst.result()


def _sequences(subject: Subject) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
    """Three sequences of uneven lengths and the logits each has alone, `[1, sum, vocab]`."""
    lengths = [subject.prompt_length - 4, 1, subject.chunk_size // 2 + 6]
    tokens = [subject.tokens(1, length) for length in lengths]
    return lengths, tokens, torch.cat([subject.forward(sequence) for sequence in tokens], dim=1)


def _packed(subject: Subject, tokens: list[torch.Tensor], expected: torch.Tensor, **keywords) -> float:
    return deviation(subject.forward(torch.cat(tokens, dim=1), **keywords), expected)


def row_independence(subject: Subject) -> Result:
    """Rows of a batch never influence each other: changing one leaves the others, which equal their single selves."""
    tokens = subject.tokens(3, subject.prompt_length)
    changed = tokens.clone()
    changed[1] = subject.other(tokens[1])
    worst = Worst(subject.tolerance)
    half = subject.prompt_length // 2
    results = []
    for rows in (tokens, changed):
        stream = subject.stream()
        pieces = [stream.feed(piece) for piece in rows.tensor_split([half, half + 1], dim=1)]
        results.append((subject.forward(rows), torch.cat(pieces, dim=1)))
    for row in (0, 2):
        for label, before, after in zip(("without cache", "with cache"), *results):
            worst.add(deviation(after[row], before[row]), f"row {row} when row 1 changes, {label}")
        worst.add(deviation(results[0][0][row], subject.forward(tokens[row : row + 1])[0]), f"row {row} alone")
    return worst.result()


def causality(subject: Subject) -> Result:
    """No output depends on later tokens: changing or removing them leaves the logits before."""
    length, chunk = subject.prompt_length, subject.chunk_size
    tokens = subject.tokens(1, length)
    logits = subject.forward(tokens)
    worst = Worst(subject.tolerance)
    places = {1, length // 2, length - 1, min(chunk, length - 1), min(chunk + 1, length - 1)}
    for place in sorted(places):
        changed = tokens.clone()
        changed[:, place] = subject.other(tokens[:, place])
        worst.add(deviation(subject.forward(changed)[:, :place], logits[:, :place]), f"token {place} changed")
    for place in sorted({length // 2, min(chunk + 1, length - 1)}):
        worst.add(deviation(subject.forward(tokens[:, :place]), logits[:, :place]), f"tokens from {place} on removed")
    return worst.result()
