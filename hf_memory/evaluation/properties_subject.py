"""The model under test, called the way `generate()` calls it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig
from transformers.utils import logging

from hf_memory.evaluation.properties_report import NotApplicableError


# Largest accepted deviation between two computations of the same thing, by the model's dtype. A float32 recurrence
# over some hundred tokens stays around 1e-6; wrong padding or a dropped state shows at 1e-2 and above.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Budget:
    """
    How much work a run does. `"quick"` (seconds on a tiny model) and `"full"` (minutes) are the presets.

    Args:
        splits: number of random splits of the prompt, on top of the fixed ones.
        new_tokens: tokens generated per generation property.
        long_tokens: length of the long input under autocast; the others have an eighth of it.
        walk_steps: steps of the stateful random walk.
        walk_length: largest number of tokens of a row in the walk; the rows start anew beyond it.
    """

    splits: int = 3
    new_tokens: int = 8
    long_tokens: int = 2048
    walk_steps: int = 200
    walk_length: int = 64


BUDGETS = {"quick": Budget(), "full": Budget(splits=20, new_tokens=24, long_tokens=8192, walk_steps=2000)}


class Subject:
    """
    A causal language model under test.

    Args:
        model: any causal LM of transformers (or registered with it) that returns a cache; left as it was found.
        budget: how much work each property may do.
        seed: seed of every random choice.
        tolerance: overrides the tolerance derived from the dtype and the model's conditioning.
    """

    def __init__(
        self, model: PreTrainedModel, budget: Budget = BUDGETS["quick"], seed: int = 0, tolerance: float | None = None
    ):
        self.model = model
        self.budget = budget
        self.config = model.config.get_text_config(decoder=True)
        self.vocab_size = self.config.vocab_size
        self.device = model.device
        self.dtype = model.dtype
        self.random = torch.Generator().manual_seed(seed)
        parameters = inspect.signature(model.forward).parameters
        self.parameters = set(parameters)
        self.takes_any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.cache_argument = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._tolerance = tolerance

    @property
    def chunk_size(self) -> int:
        """Grid on whose edges prompts are cut; 64 (the usual tile of chunked forms) when the config names none."""
        chunk_size = getattr(self.config, "chunk_size", None)
        return chunk_size if isinstance(chunk_size, int) and chunk_size > 0 else 64

    @property
    def segment_size(self) -> int | None:
        """Tokens of a segment, where the model reads its text in such."""
        is_used = "hybrid" in (getattr(self.config, "layer_types", None) or ())
        return getattr(self.config, "segment_size", None) if is_used else None

    @property
    def prompt_length(self) -> int:
        """Long enough to cross two chunk edges, where a chunk is of moderate size, and an edge between segments."""
        edges = 2 if self.chunk_size <= 32 else 1
        return min(max(edges * self.chunk_size + 5, (self.segment_size or 0) + 5, 21), 600)

    @property
    def tolerance(self) -> float:
        """
        Largest accepted deviation: that of the dtype in `TOLERANCES`, or ten times what one rounding of the input
        embeddings does to the logits where that is more (an ill-conditioned recurrence), but at most a hundred times
        the former.
        """
        if self._tolerance is None:
            floor = TOLERANCES.get(self.dtype, 5e-2)
            try:
                noise = self._conditioning()
            except Exception:
                # A model that cannot be called at all: every property reports that.
                noise = 0.0
            self._tolerance = min(max(floor, 10 * noise), 100 * floor, 0.1)
        return self._tolerance

    @property
    def generation_tolerance(self) -> float:
        """`generate()` keeps logits in float32 whatever the model's dtype."""
        return max(self.tolerance, 1e-6)

    @torch.no_grad()
    def _conditioning(self) -> float:
        if "inputs_embeds" not in self.parameters:
            return 0.0
        embeds = self.embed(self.tokens(1, self.prompt_length))
        noise = torch.randn(embeds.shape, generator=self.random).to(embeds)
        reference = self.forward(embeds=embeds)
        return deviation(self.forward(embeds=embeds * (1 + torch.finfo(self.dtype).eps * noise)), reference)

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        """Random token ids `[rows, length]`, without the special ids 0 to 2 where the vocabulary allows."""
        low = 3 if self.vocab_size > 8 else 0
        return torch.randint(low, self.vocab_size, (rows, length), generator=self.random).to(self.device)

    def integer(self, low: int, high: int) -> int:
        """A random integer in `[low, high]`."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def other(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids of the same shape, each different from the given one."""
        low = 3 if self.vocab_size > 8 else 0
        shift = torch.randint(1, self.vocab_size - low, tokens.shape, generator=self.random).to(tokens.device)
        return (tokens - low + shift) % (self.vocab_size - low) + low

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(tokens)

    def call(
        self,
        tokens: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        One forward call. `mask` is `[B, past + T]`; with it, position ids count valid tokens, as in `generate()`.
        """
        inputs = {"input_ids": tokens, "inputs_embeds": embeds, "attention_mask": mask, self.cache_argument: cache}
        inputs.update(kwargs)
        length = (tokens if tokens is not None else embeds).shape[1]
        if mask is not None and "position_ids" in self.parameters and "position_ids" not in kwargs:
            positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
            inputs["position_ids"] = positions[:, -length:]
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return self.model(**inputs, use_cache=use_cache, return_dict=True)

    def forward(self, tokens: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Logits `[B, T, vocab]` of one call without a cache."""
        return self.call(tokens, **kwargs).logits

    def stream(self, masked: bool = False) -> Stream:
        return Stream(self, masked)

    def generate(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`generate()` under a neutral generation config, never stopping early."""
        mask = torch.ones_like(tokens) if mask is None else mask
        kwargs.setdefault("max_new_tokens", self.budget.new_tokens)
        kwargs.setdefault("do_sample", False)
        with neutral_generation_config(self.model):
            return self.model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **kwargs)


class Stream:
    """
    Rows read with a cache over several calls.

    Args:
        masked: pass the 2-D mask of everything read so far on every call, as `generate()` does; otherwise no mask.
    """

    def __init__(self, subject: Subject, masked: bool = False):
        self.subject = subject
        self.masked = masked
        self.cache: Any = None
        self.mask: torch.Tensor | None = None

    def feed(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Reads `tokens` `[B, T]` (`mask` `[B, T]`, 1 = valid) and returns their logits."""
        mask = torch.ones_like(tokens) if mask is None else mask
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        outputs = self.subject.call(tokens, mask=self.mask if self.masked else None, cache=self.cache, use_cache=True)
        returned = getattr(outputs, self.subject.cache_argument, None)
        self.cache = returned if returned is not None else self.cache
        if self.cache is None:
            raise NotApplicableError(f"{type(self.subject.model).__name__} returns no cache")
        return outputs.logits

    def fork(self) -> Stream:
        """An independent copy, by `copy.deepcopy` of the cache."""
        twin = Stream(self.subject, self.masked)
        twin.cache, twin.mask = copy.deepcopy(self.cache), self.mask.clone()
        return twin

    def cache_method(self, name: str) -> Any:
        """A cache method that transformers' own `Cache` offers; caches without it are not checked for it."""
        method = getattr(self.cache, name, None)
        if method is None:
            raise NotApplicableError(f"{type(self.cache).__name__} has no {name}()")
        return method

    def reorder(self, indices: torch.Tensor) -> None:
        self.cache_method("reorder_cache")(indices)
        self.mask = self.mask[indices]

    def repeat(self, repeats: int) -> None:
        self.cache_method("batch_repeat_interleave")(repeats)
        self.mask = self.mask.repeat_interleave(repeats, dim=0)

    def select(self, indices: torch.Tensor) -> None:
        self.cache_method("batch_select_indices")(indices)
        self.mask = self.mask[indices]


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """
    Largest over all positions (all axes but the last) of the RMS of the difference, relative to the RMS of all of
    `expected`. Infinite when the shapes differ or anything is not finite.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.numel():
        return 0.0
    if not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(actual, expected) else float("inf")
    actual, expected = actual.detach().double(), expected.detach().to(actual.device).double()
    difference = torch.atleast_1d(actual - expected).pow(2).mean(-1).sqrt().max()
    value = float(difference / expected.pow(2).mean().sqrt().clamp_min(1e-6))
    return value if value == value else float("inf")


def cache_tensors(cache: Any) -> dict[str, torch.Tensor]:
    """Every tensor a cache holds, by a name that says where; works for any cache class."""
    found: dict[str, torch.Tensor] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{name}.{key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(item, f"{name}.{index}")
        elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)) and not callable(value):
            visit({key: item for key, item in vars(value).items() if not key.startswith("_")}, name)

    visit(vars(cache), type(cache).__name__)
    return found


def state_deviation(actual: Any, expected: Any) -> tuple[float, str]:
    """Largest deviation between two caches over all their tensors, and the name of that tensor."""
    left, right = cache_tensors(actual), cache_tensors(expected)
    if left.keys() != right.keys():
        return float("inf"), "different tensors: " + ", ".join(sorted(left.keys() ^ right.keys()))
    if not left:
        raise NotApplicableError(f"{type(actual).__name__} holds no tensors to compare")
    deviations = {name: deviation(left[name], right[name]) for name in left}
    name = max(deviations, key=deviations.__getitem__)
    return deviations[name], name


@contextmanager
def neutral_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Generation settings without end tokens, penalties or sampling, for the time of a check."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without log lines below errors and without progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
