"""Text that a model writes: drawn row by row, so that a row does not depend on those beside it."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_memory.conversion.data import TEACHER
from hf_memory.conversion.recipe import Recipe


class _Draw(LogitsProcessor):
    """Leaves the drawn token alone likely: inverse of the distribution function at one given number per row.

    Args:
        numbers: `[B, N]` float64, uniform from 0 to 1, one per token to come.
        prompt: Tokens in front of the first that is drawn.
        temperature: The logits are divided by it.
        top_k: Draw among so many; None for all.
        vocabulary: Draw among the first so many entries; None for all.
    """

    def __init__(
        self, numbers: Tensor, prompt: int, temperature: float, top_k: int | None, vocabulary: int | None
    ) -> None:
        self.numbers, self.prompt, self.temperature = numbers, prompt, temperature
        self.top_k, self.vocabulary = top_k, vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        likely = scores[:, : self.vocabulary].double() / self.temperature
        if self.top_k is not None and self.top_k < likely.shape[-1]:
            likely = likely.masked_fill(likely < likely.topk(self.top_k)[0][:, -1:], -torch.inf)
        reached = likely.softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt, None].to(reached.device) * reached[:, -1:]
        drawn = torch.searchsorted(reached, number, right=True).clamp_max(reached.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


@torch.no_grad()
def continue_rows(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocabulary: int | None = None,
    rows: np.ndarray | None = None,
) -> Tensor:
    """Prompts and what a model writes behind them.

    A row is drawn from numbers that its own prompt and the seed fix: it is the same beside whatever other rows. The
    model writes on behind an end-of-text token, as texts follow each other in the data that it is trained on.

    Args:
        model: Causal language model, its mode left as it is.
        prompts: `[B, T]` int64.
        new_tokens: Tokens N per row.
        seed: Of all rows.
        temperature: Of the distribution that is drawn from. Default: 1.
        top_k: Draw among so many tokens. Default: all.
        vocabulary: Draw among the first so many tokens. Default: all.
        rows: `[B]` integers that tell rows apart in place of their prompts.

    Returns:
        `[B, T + N]` int64.
    """
    keys = [_digest(prompt) for prompt in prompts.cpu().numpy()] if rows is None else [int(row) for row in rows]
    numbers = np.stack([np.random.default_rng((seed, key)).random(new_tokens) for key in keys])
    draw = _Draw(torch.from_numpy(numbers), prompts.shape[1], temperature, top_k, vocabulary)
    training, habits = model.training, model.generation_config
    # What a model came with, such as a penalty on repetition or an end, would fill in what is left open here.
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([draw]),
        )
    finally:
        model.generation_config = habits
        model.train(training)


def _digest(prompt: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(prompt.astype("<i8").tobytes()).digest()[:8], "little")


def is_teacher(data: str | list[str] | None) -> bool:
    """Whether `data` of a recipe means text of the teacher's own, not a file of that name."""
    return data == TEACHER and not Path(TEACHER).exists()


def sampled_size(recipe: Recipe) -> tuple[int, int]:
    """Texts, and tokens in each, that a recipe reads of its teacher.

    A text is as long as the longest block. Together they are enough to train on, up to `sampled_tokens`, and for the
    blocks that are held out.
    """
    stages = recipe.training_stages.values()
    length = max([recipe.context, *map(recipe.context_of, stages)])
    tokens = sum(stage.tokens for stage in stages)
    if not isinstance(recipe.held_out, str):
        tokens /= 1 - recipe.held_out
    # Two blocks at least, one of them held out, and the token behind the last.
    return max(3, math.ceil(min(tokens, recipe.sampled_tokens) / length)), length


class SampledText:
    """Texts of a teacher in a file, which grows by whole batches of them.

    Args:
        file: To write, or that an interrupted run has begun.
        texts: How many there are in the end.
        length: Tokens of each.
    """

    DTYPE = np.dtype("<u4")

    def __init__(self, file: Path, texts: int, length: int) -> None:
        self.file, self.texts, self.length = file, texts, length

    @property
    def size(self) -> int:
        """Tokens in the end."""
        return self.texts * self.length

    @property
    def written(self) -> int:
        """Texts that are complete."""
        return self.file.stat().st_size // (self.length * self.DTYPE.itemsize) if self.file.exists() else 0

    @property
    def missing(self) -> int:
        """Tokens still to be sampled."""
        return (self.texts - self.written) * self.length

    def write(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        on_progress: Callable[[int], None],
    ) -> None:
        """Sample what is missing; every text is fixed by the seed and its number.

        Args:
            teacher: Causal language model.
            tokenizer: Its tokenizer; without a token that begins a text, a random one does.
            batch_size: Texts at once.
            seed: Of all texts.
            on_progress: Called with the number of tokens that are there.
        """
        vocabulary = min(len(tokenizer), teacher.config.get_text_config(decoder=True).vocab_size)
        ordinary = np.setdiff1d(np.arange(vocabulary), tokenizer.all_special_ids)

        def first_token(number: int) -> int:
            if tokenizer.bos_token_id is not None:
                return tokenizer.bos_token_id
            return int(np.random.default_rng((seed, number, 1)).choice(ordinary))

        with self.file.open("ab") as file:
            file.truncate(self.written * self.length * self.DTYPE.itemsize)
            while self.missing:
                numbers = range(self.written, min(self.written + batch_size, self.texts))
                prompts = torch.tensor([[first_token(number)] for number in numbers], device=teacher.device)
                texts = continue_rows(
                    teacher,
                    prompts,
                    self.length - 1,
                    seed=seed,
                    vocabulary=vocabulary,
                    rows=np.array(numbers),
                )
                file.write(texts.cpu().numpy().astype(self.DTYPE).tobytes())
                file.flush()
                on_progress(self.written * self.length)

    def read(self) -> np.ndarray:
        """All tokens, one text behind the other, `[N]` uint32."""
        return np.fromfile(self.file, self.DTYPE, count=self.size)
