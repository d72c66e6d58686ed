"""`model.read`: let a model read a text once and keep what its memory has become, for `generate` to go on from."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_memory.cache import MemoryCache
from hf_memory.cache_layers import MemorySlidingCacheLayer
from hf_memory.cache_states import MemoryStatesMixin
from hf_memory.memory_file import evaluating, is_growing
from hf_memory.memory_identity import ModelIdentity


_LINES = re.compile(r".*\n(?=\S)", re.DOTALL)
_LINE = re.compile(r".*?\n(?=\S)", re.DOTALL)

Source = str | Tensor | list[int] | Mapping[str, Any] | Iterable[str] | Iterable[int] | Iterable[Tensor]


class ReadingInterruptedError(KeyboardInterrupt):
    """Ctrl-C during `model.read`.

    Attributes:
        memory: memory of all that was read before, whole pieces only.
        tokens: tokens that this call has put into it.
        characters: of a stream of text, how many characters those tokens are; `None` for other sources.
    """

    def __init__(self, memory: MemoryCache, tokens: int, characters: int | None) -> None:
        super().__init__(
            f"Stopped after {tokens:,} tokens. They are in the `memory` of this exception: go on with "
            "`model.read(the_rest, memory=...)`, or save it."
        )
        self.memory, self.tokens, self.characters = memory, tokens, characters


class Piece(NamedTuple):
    """What is read before the next look around.

    Attributes:
        ids: `[B, T]`.
        characters: of the text that they are, where the source is a stream of text.
    """

    ids: Tensor
    characters: int | None = None


class MemoryReaderMixin:
    """`read` for models with memories."""

    def new_memory(self) -> MemoryCache:
        """An empty memory."""
        return getattr(self, "_cache_class", MemoryCache)(self.config)

    @torch.no_grad()
    def read(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase | None = None,
        memory: MemoryCache | None = None,
        piece: int = 4096,
        allow_growth: bool = False,
        progress: bool = True,
    ) -> MemoryCache:
        """
        Read a text, and return what the memory has become.

        The working memory this takes does not depend on the length of the text: the model sees `piece` tokens per
        call, and computes no logits. The text is not kept.

        Args:
            source: a text, a stream of texts (an open file, a generator), token ids (a list, a tensor `[T]` or
                `[B, T]` without padding, what a tokenizer returns), or a stream of ids or tensors of them. A stream
                of text is tokenized in blocks that end where a line ends.
            tokenizer: for text. A text starts with the tokenizer's BOS token where the tokenizer puts one, and no
                other special token is added.
            memory: what to go on from, as an earlier call or a file gave it; it is written to. A new one by default.
            piece: tokens per call. Bigger ones are faster on a GPU and need more working memory.
            allow_growth: read even if some layers of the model keep keys and values of every token.
            progress: show a bar, where standard error is a terminal.

        Returns:
            The memory, a `past_key_values` for `generate` and for the model itself.

        Raises:
            ValueError: for a source of another kind or without a token, ids outside of the vocabulary, a memory of
                another model, or layers that keep every token.
            ReadingInterruptedError: on Ctrl-C. Whatever stops a reading, `memory` then holds whole pieces only.

        Example:

        ```python
        >>> memory = model.read(open("book.txt"), tokenizer)
        >>> memory.save_pretrained("book.memory")
        >>> question = tokenizer(" Who is Ishmael?", add_special_tokens=False, return_tensors="pt")
        >>> model.generate(**question, past_key_values=memory.clone())
        ```
        """
        if piece < 1:
            raise ValueError(f"`piece` must be at least 1 token, got {piece}.")
        identity = ModelIdentity.of(self)
        if memory is None:
            memory = self.new_memory()
        elif not isinstance(memory, MemoryCache):
            raise ValueError(
                f"`memory` must be a MemoryCache of {MemoryCache.__module__}, got a {type(memory).__name__} of "
                f"{type(memory).__module__}. Between two copies of this code a memory goes as a file."
            )
        elif memory.model_identity is not None:
            known = memory.model_identity.weights is not None and identity.weights is not None
            memory.model_identity.refuse_other(identity, self.config.get_text_config(decoder=True), known)
        growing = [index for index, layer in enumerate(memory.layers) if is_growing(layer)]
        if growing and not allow_growth:
            raise ValueError(
                f"Layers {', '.join(map(str, growing))} of this {self.config.model_type} keep keys and values of "
                "every token, so that its memory would grow with the text: convert them, too, choose a teacher whose "
                "attention has a window, or pass `allow_growth=True` (`--allow-growth`)."
            )
        is_new = not memory.layers[0].is_initialized
        pieces, total = _pieces(source, tokenizer, piece, is_new)
        memory.model_identity, memory.takes_new_tokens_only = identity, True
        with (
            evaluating(self),
            logging.tqdm(desc="reading", total=total, unit=" tokens", disable=None if progress else True) as bar,
        ):
            self._read_pieces(pieces, memory, piece, bar)
        if not memory.layers[0].is_initialized:
            raise ValueError("There is nothing to read: the source holds no token.")
        return memory

    def _read_pieces(self, pieces: Iterator[Piece], memory: MemoryCache, length: int, bar: Any) -> None:
        tokens, characters = 0, 0
        # Layers replace their tensors and never write into them, so that the layers themselves are all there is to
        # copy before each piece.
        before = _layers_of(memory)
        vocabulary = self.get_input_embeddings().weight.shape[0]
        try:
            for ids, size in pieces:
                _check_ids(ids, vocabulary)
                for part in ids.split(length, dim=1) if ids.shape[1] else ():
                    self.base_model(input_ids=part.to(self.device), past_key_values=memory, use_cache=True)
                    bar.update(part.shape[1])
                tokens, characters = tokens + ids.shape[1], None if size is None else characters + size
                before = _layers_of(memory)
        except BaseException as error:
            memory.layers = before
            if isinstance(error, KeyboardInterrupt):
                raise ReadingInterruptedError(memory, tokens, characters) from None
            raise


def behind_memory(memory: MemoryCache, tokens: Tensor, mask: Tensor | None, with_positions: bool) -> dict[str, Tensor]:
    """What tells `GenerationMixin.generate` that its tokens come behind a memory, and are all new.

    transformers takes its input for the whole text, and cuts off what the cache has seen, unless the mask is longer.

    Args:
        memory: the memory, with `match_rows` behind it.
        tokens: `[B, T]` ids or `[B, T, D]` embeddings.
        mask: `[B, T]`, or of the whole text; `None` where no token is padded.
        with_positions: give positions, too: those that transformers makes are all that were read, copied in each step.
    """
    rows, length = tokens.shape[:2]
    mask = torch.ones(rows, length, dtype=torch.long, device=tokens.device) if mask is None else mask
    if mask.shape[1] != length:
        return {}
    known = {"attention_mask": torch.cat((mask.new_ones(rows, memory.get_seq_length()), mask), dim=1)}
    if with_positions:
        windows = (layer.key_positions for layer in memory.layers if isinstance(layer, MemorySlidingCacheLayer))
        window = next((positions for positions in windows if positions is not None and positions.shape[1]), None)
        past = memory.get_seq_length()
        if window is not None:
            # The memory has the rows of all beams, the tokens do not yet.
            past = window[:: window.shape[0] // rows].amax(1, keepdim=True).to(mask.device) + 1
        known["position_ids"] = past + (mask.cumsum(1) - 1).clamp(min=0)
    return known


def match_rows(memory: MemoryCache, rows: int, copies: int) -> None:
    """Bring a memory to `rows * copies` rows, from one row or from one for each of `rows` questions.

    Raises:
        ValueError: for a memory of another number of rows.
    """
    layers = (layer for layer in memory.layers if isinstance(layer, MemoryStatesMixin) and layer.has_states)
    layer = next(layers, None)
    held = rows * copies if layer is None else next(layer.tensors()).shape[0]
    if held == 1 and rows * copies > 1:
        memory.batch_repeat_interleave(rows * copies)
    elif held == rows and copies > 1:
        memory.batch_repeat_interleave(copies)
    elif layer is not None:
        layer.check_rows(rows * copies)


def _layers_of(memory: Cache) -> list[Any]:
    return [copy.copy(layer) for layer in memory.layers]


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise ValueError(f"Token ids must be from 0 to {vocabulary - 1}, got {low if low < 0 else high}.")


def _pieces(
    source: Source, tokenizer: PreTrainedTokenizerBase | None, length: int, is_new: bool
) -> tuple[Iterator[Piece], int | None]:
    """Pieces of a source, and its number of tokens where that is known."""
    if isinstance(source, str):
        ids = _as_rows(_tokenize(source, tokenizer, is_new))
        return _split(ids, length), ids.shape[1]
    if isinstance(source, Mapping):
        mask = source.get("attention_mask")
        if mask is not None and not torch.as_tensor(mask).all():
            raise ValueError("A reading has no padding: read texts of different lengths one after the other.")
        if "input_ids" not in source:
            raise ValueError(f"`source` holds no `input_ids`, only {', '.join(map(str, source)) or 'nothing'}.")
        source = source["input_ids"]
    if hasattr(source, "shape") or (isinstance(source, list) and all(isinstance(x, (int, list)) for x in source)):
        ids = _as_rows(source)
        return _split(ids, length), ids.shape[1]
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise ValueError(
            f"`source` must be text, token ids, or a stream of either, got {type(source).__name__}; open a file in "
            "text mode."
        )
    return _stream(iter(source), tokenizer, length, is_new), None


def _as_rows(ids: Any) -> Tensor:
    try:
        rows = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Token ids must be integers [T] or [B, T] with rows of one length, got a {type(ids).__name__} that is "
            "none; open a file of text in text mode."
        ) from error
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not len(rows) or (rows.is_floating_point() and rows.numel()) or rows.dtype == torch.bool:
        raise ValueError(f"Token ids must be integers [T] or [B, T], got {tuple(rows.shape)} {rows.dtype}.")
    return rows.long()


def _split(ids: Tensor, length: int) -> Iterator[Piece]:
    return (Piece(part) for part in ids.split(length, dim=1) if part.shape[1])


def _stream(
    items: Iterator[Any], tokenizer: PreTrainedTokenizerBase | None, length: int, is_new: bool
) -> Iterator[Piece]:
    buffer: list[int] = []
    for item in items:
        if isinstance(item, str):
            yield from _text_stream(chain([item], items), tokenizer, 4 * length, is_new)
            return
        if isinstance(item, int):
            buffer.append(item)
            if len(buffer) == length:
                yield Piece(_as_rows(buffer))
                buffer = []
        else:
            yield from _split(_as_rows(item), length)
    if buffer:
        yield Piece(_as_rows(buffer))


def _text_stream(
    items: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None, block: int, is_new: bool
) -> Iterator[Piece]:
    """Tokenize a stream in blocks of about `block` characters, which do not depend on how the stream is cut."""
    text = ""
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"A stream of text must hold nothing else, got {type(item).__name__}.")
        for start in range(0, len(item), block):
            text += item[start : start + block]
            while (cut := _find_cut(text, block)) is not None:
                yield Piece(_as_rows(_tokenize(text[:cut], tokenizer, is_new)), cut)
                text, is_new = text[cut:], False
    if text:
        yield Piece(_as_rows(_tokenize(text, tokenizer, is_new)), len(text))


def _find_cut(text: str, block: int) -> int | None:
    """Where the last line within `block` characters begins, or the first one behind them; `None` to wait for more.

    Between the end of a line and a letter pre-tokenizers have a boundary, so that no token is cut in two. White space
    at the start of a line may be joined to what is before it.
    """
    if len(text) <= block:
        return None
    longest = 4 * block
    found = _LINES.match(text, 0, block + 1) or _LINE.match(text, 0, longest + 1)
    if found is not None:
        return found.end()
    if len(text) <= longest:
        return None
    space = text.rfind(" ", 1, longest)
    return space if space > 0 else longest


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase | None, is_new: bool) -> list[int]:
    if tokenizer is None:
        raise ValueError("Text needs its tokenizer: `model.read(text, tokenizer=tokenizer)`.")
    # More may follow a text, so that it gets no end; `verbose` would warn of its length.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return (start_of_text(tokenizer) if is_new and ids else []) + ids


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, where the tokenizer puts one in front of a text."""
    first = tokenizer("", verbose=False)["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
