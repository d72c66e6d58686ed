"""A recall probe: a value is hidden in held-out text, at some depth of some length, and asked for at the end.

A line `KEY = value` stands somewhere in the text, the text ends with `KEY = `, and of a handful of values the model
has to find the right one likeliest. It needs no instruction: a small language model can do it, since it copies. Only
the token in which the values differ first is judged, which one forward pass per text gives for any tokenizer.
"""

from __future__ import annotations

import math
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_memory.conversion.evaluate import eval_mode


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# No two begin with the same letter: a tokenizer of bytes tells them apart by their first token too.
VALUES = ("amber", "basil", "cedar", "denim", "ember", "fjord", "grape", "hazel")
KEY_LETTERS = 6
LINE, QUESTION = "\n{key} = {value}\n", "\n{key} = {value}"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARES_OF_CONTEXT = (0.125, 0.25, 0.5, 1.0)
SECONDS = 60.0


@dataclass(frozen=True)
class Recall:
    """
    What one model recalled.

    Args:
        lengths: tokens of a text, hidden line and question included.
        depths: where the line stood: 0 is the start of the text, 1 right in front of the question.
        accuracy: share of texts in which the right value was the likeliest, `[lengths][depths]`.
        gain_bits: log likelihood of the right value beyond the mean of the others, base 2; 0 is what a model without
            any recall has on average.
        samples: texts for each length and depth.
        choices: values to choose from; guessing gets one of them right.
    """

    lengths: list[int]
    depths: list[float]
    accuracy: list[list[float]]
    gain_bits: list[list[float]]
    samples: int
    choices: int


class Probe:
    """
    The texts of a probe; the same for every model, and the same again for the same seed.

    Args:
        tokenizer: of the models; any of transformers.
        filler: `[N]` integers, held-out tokens that the line is hidden in, repeated where they are too few.
        lengths: tokens of the texts. Those too short for a line and a question are left out.
        samples: texts for each length and depth.
        depths: between 0 and 1.
        seed: of keys, values and filler.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        filler: np.ndarray,
        lengths: Sequence[int],
        samples: int,
        *,
        depths: Sequence[float] = DEPTHS,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.filler, self.samples = tokenizer, filler.astype(np.int64), samples
        self.depths, self.seed = list(depths), seed
        needed = max(
            len(line) + len(question)
            for line, question, _ in (self._words("W" * KEY_LETTERS, i) for i in range(len(VALUES)))
        )
        # Twice the line and the question, so that there is something to hide the line in.
        self.lengths = sorted({length for length in lengths if length >= 2 * needed})

    def texts(self, length: int, sample: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One text per depth.

        Returns:
            Tokens `[depths, length]`, those that begin the values `[depths, values]`, and which of these is right
            `[depths]`, all int64.
        """
        rows, choices, right = [], [], []
        for number, depth in enumerate(self.depths):
            random = np.random.default_rng((self.seed, length, sample, number))
            key = "".join(random.choice(list(string.ascii_uppercase), KEY_LETTERS))
            value = int(random.integers(len(VALUES)))
            line, question, firsts = self._words(key, value)
            room = length - len(line) - len(question)
            start = int(random.integers(len(self.filler)))
            filler = np.take(self.filler, range(start, start + room), mode="wrap").tolist()
            cut = round(depth * room)
            rows.append([*filler[:cut], *line, *filler[cut:], *question])
            choices.append(firsts)
            right.append(value)
        return tuple(torch.tensor(entries) for entries in (rows, choices, right))

    def _words(self, key: str, value: int) -> tuple[list[int], list[int], list[int]]:
        """Tokens of the line, of the question up to where the values part, and of every value there."""
        line = self._encode(LINE.format(key=key, value=VALUES[value]))
        answers = [self._encode(QUESTION.format(key=key, value=word)) for word in VALUES]
        parted = next(place for place, tokens in enumerate(zip(*answers)) if len(set(tokens)) > 1)
        return line, answers[0][:parted], [answer[parted] for answer in answers]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    @torch.no_grad()
    def run(
        self,
        models: Mapping[str, PreTrainedModel],
        *,
        seconds: float = SECONDS,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Recall]:
        """
        What each of several models recalls of the same texts.

        Args:
            models: causal language models by name, in the vocabulary of the tokenizer.
            seconds: no further sample is begun when it would end later than this; the first one is made in any case.
                `Recall.samples` says how many were.
            on_progress: called as `on_progress(done, samples)` behind every sample.

        Returns:
            One `Recall` per model; nothing where no length is long enough.
        """
        if not self.lengths or not models or self.samples < 1:
            return {}
        shape = len(self.lengths), len(self.depths)
        hits, gains = ({name: torch.zeros(shape, dtype=torch.float64) for name in models} for _ in range(2))
        began, done = time.monotonic(), 0
        with eval_mode(models.values()):
            while done < self.samples and (not done or (time.monotonic() - began) * (done + 1) / done <= seconds):
                for row, length in enumerate(self.lengths):
                    tokens, choices, right = self.texts(length, done)
                    for name, model in models.items():
                        logits = model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=1).logits
                        scores = logits[:, -1].double().log_softmax(-1).cpu().gather(1, choices) / math.log(2)
                        hits[name][row] += scores.argmax(1) == right
                        gains[name][row] += _gain(scores, right)
                done += 1
                if on_progress is not None:
                    on_progress(done, self.samples)
        return {
            name: Recall(
                self.lengths,
                self.depths,
                (hits[name] / done).tolist(),
                (gains[name] / done).tolist(),
                done,
                len(VALUES),
            )
            for name in models
        }


def _gain(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    own = scores.gather(1, right[:, None])[:, 0]
    return own - (scores.sum(1) - own) / (scores.shape[1] - 1)


def probe_lengths(context: int) -> list[int]:
    """An eighth, a quarter, a half and the whole of a context."""
    return [round(context * share) for share in SHARES_OF_CONTEXT]


__all__ = ["Probe", "Recall", "probe_lengths"]
