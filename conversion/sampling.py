"""Text that a model writes: drawn row by row, so that a row does not depend on those beside it."""

import hashlib

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel


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
    training = model.training
    model.eval()
    try:
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([draw]),
        )
    finally:
        model.train(training)


def _digest(prompt: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(prompt.astype("<i8").tobytes()).digest()[:8], "little")
