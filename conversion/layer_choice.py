"""Which layers get a memory: words, patterns, numbers, and a budget of the cache that they have to meet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_memory._cli.state_size import layer_states, readable_size
from hf_memory.conversion.schema import ConversionError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

WORDS = ("all", "odd", "even", "lower", "none")
ACCEPTS = "layer numbers such as 1,3,5, or one of all, odd, even, lower, none, every:K, ratio:R, auto:K, auto"
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
Layers = str | list[int]


def parse_layers(text: str) -> Layers:
    """Layer numbers, or the text itself where it is a word or a pattern.

    `every:K` keeps attention at every K-th layer beginning with the first; `ratio:R` converts a share R, evenly
    spread; `auto:K` converts the K layers that cost the least, `auto` as many of these as a budget of the cache needs.

    Raises:
        ConversionError: It is none of these.
    """
    if text in (*WORDS, "auto"):
        return text
    word, colon, value = text.partition(":")
    if colon and word in ("every", "auto") and value.isdecimal() and int(value) >= (2 if word == "every" else 1):
        return text
    if colon and word == "ratio" and _is_share(value):
        return text
    if colon and word in ("every", "auto", "ratio"):
        takes = {"every": "a whole number of at least 2", "auto": "a whole number of at least 1"}
        takes["ratio"] = "a number from 0 to 1"
        raise ConversionError(f"`layers` {word}:... takes {takes[word]}, got {text!r}.")
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConversionError(f"`layers` must be {ACCEPTS}, got {text!r}.") from None


def is_auto(layers: Layers) -> bool:
    """Whether the layers have to be found by measuring."""
    return isinstance(layers, str) and layers.startswith("auto")


def layer_numbers(layers: Layers, num_layers: int) -> list[int]:
    """Parsed layers as numbers, for a teacher of `num_layers`; those of `auto` are not known yet, and all may be.

    Raises:
        ConversionError: Layers that the teacher does not have.
    """
    everything = list(range(num_layers))
    if isinstance(layers, str):
        word, _, value = layers.partition(":")
        if word == "every":
            return [layer for layer in everything if layer % int(value)]
        if word == "ratio":
            count = round(float(value) * num_layers)
            # The last of each of `count` equal parts: the first layer keeps its attention longest.
            return sorted({(part + 1) * num_layers // count - 1 for part in range(count)})
        if word == "auto":
            if value and int(value) > num_layers:
                raise ConversionError(f"`layers` {layers!r} is more than the {num_layers} layers of the teacher.")
            return everything
        chosen = {
            "all": slice(0, None),
            "odd": slice(1, None, 2),
            "even": slice(0, None, 2),
            "lower": slice(0, num_layers // 2),
            "none": slice(0, 0),
        }
        return everything[chosen[word]]
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConversionError(
                f"Layer {layer} does not exist: the teacher has {num_layers} layers, 0 to {num_layers - 1}."
            )
    return sorted(layers)


@dataclass(frozen=True)
class CacheBudget:
    """Bytes that the cache of one sequence may take at a length in tokens."""

    bytes: int
    tokens: int


def parse_budget(text: str) -> CacheBudget:
    """`"64MiB@32768"`.

    Raises:
        ValueError: It does not look like that.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB)@(\d+)", text.strip())
    if match is None or not int(match[3]) or not float(match[1]):
        raise ValueError(f"no size and length: {text!r}")
    return CacheBudget(int(float(match[1]) * UNITS[match[2]]), int(match[3]))


def is_budget(text: str) -> bool:
    try:
        parse_budget(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class CachePlan:
    """What the cache of one sequence takes by layer at the length of a budget.

    Args:
        budget: Bytes allowed, at a length.
        kept: Bytes of each layer as the teacher has it.
        converted: Bytes of each layer with a memory.
    """

    budget: CacheBudget
    kept: tuple[int, ...]
    converted: tuple[int, ...]

    def total(self, layers: Sequence[int]) -> int:
        """Bytes of the whole cache when these layers have a memory."""
        chosen = set(layers)
        return sum(self.converted[i] if i in chosen else size for i, size in enumerate(self.kept))

    def fits(self, layers: Sequence[int]) -> bool:
        return self.total(layers) <= self.budget.bytes

    @property
    def saving(self) -> list[int]:
        """Layers whose memory is smaller than the keys and values that it replaces."""
        return [i for i, size in enumerate(self.kept) if self.converted[i] < size]

    def needed(self) -> int:
        """How many layers must be converted at least.

        Raises:
            ConversionError: All of them are not enough.
        """
        by_saving = sorted(self.saving, key=lambda i: self.converted[i] - self.kept[i])
        for count in range(len(by_saving) + 1):
            if self.fits(by_saving[:count]):
                return count
        least = self.total(by_saving)
        raise ConversionError(
            f"`cache_budget` {readable_size(self.budget.bytes)} at {self.budget.tokens:,} tokens cannot be met: with "
            f"all {len(by_saving)} layers converted that can save anything the cache takes {readable_size(least)} "
            f"({least:,} bytes), and the teacher's {readable_size(self.total(()))}; allow at least that, or choose a "
            "smaller memory."
        )

    def check_search(self) -> None:
        """Raise a sentence unless there is something to look for."""
        if not self.needed():
            raise ConversionError(
                f"`cache_budget` {readable_size(self.budget.bytes)} at {self.budget.tokens:,} tokens is met by the "
                f"teacher as it is, with {readable_size(self.total(()))}: ask for less, or name `layers`."
            )

    def check(self, layers: Sequence[int]) -> None:
        """Raise a sentence unless these layers are enough."""
        if not self.fits(layers):
            raise ConversionError(
                f"`cache_budget` {readable_size(self.budget.bytes)} at {self.budget.tokens:,} tokens is not met by "
                f"converting the layers {', '.join(map(str, layers)) or 'none'}: the cache then takes "
                f"{readable_size(self.total(layers))}; convert at least {self.needed()} layers, or let `layers: auto` "
                "choose them."
            )


def plan_cache(
    budget: CacheBudget, teacher: PreTrainedConfig, all_converted: PreTrainedConfig, dtype: torch.dtype
) -> CachePlan:
    """Measure the caches of a teacher and of the hybrid in which all of its layers have a memory, without weights.

    Args:
        budget: What has to fit.
        teacher: Its configuration.
        all_converted: Configuration of the hybrid.
        dtype: Of keys and values.
    """
    kept, converted = (
        tuple(state.after(budget.tokens) for state in layer_states(config, dtype))
        for config in (teacher, all_converted)
    )
    return CachePlan(budget, kept, converted)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
