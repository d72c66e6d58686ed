"""Text to blocks of tokens: files, folders and datasets, read with the teacher's tokenizer, in a fixed order."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_memory.conversion.recipe import ConversionError, Recipe


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int | None], None]

# Tokenizers keep several times the text in memory: longer documents go through in pieces, cut behind a line.
PIECE = 2**20
PIECES_AT_ONCE = 64
# A binary file has a zero byte early on, text has none.
SNIFF = 8192
# The source that is text of the teacher's own.
TEACHER = "teacher"
FILE_SUFFIXES = (".csv", ".gz", ".html", ".json", ".jsonl", ".md", ".parquet", ".py", ".text", ".txt", ".xml", ".zip")


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out.

    Args:
        train: `[N]` integers.
        held_out: `[M]` integers.
    """

    train: np.ndarray
    held_out: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Of all tokens; a resumed run must find the same ones."""
        return hashlib.sha256(self.train.tobytes() + b"|" + self.held_out.tobytes()).hexdigest()

    def held_out_blocks(self, context: int, limit: int) -> torch.Tensor:
        """At most `limit` blocks, evenly spread over the held-out text, `[N, context + 1]` int64."""
        return spread_blocks(self.held_out, context, limit)


def bytes_per_token(blocks: torch.Tensor, tokenizer: "PreTrainedTokenizerBase") -> float:
    """UTF-8 bytes of the text of blocks `[N, T]`, without the first token of each, for each of these tokens."""
    texts = tokenizer.batch_decode(blocks[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(len(text.encode("utf-8", "replace")) for text in texts) / blocks[:, 1:].numel()


def num_blocks(tokens: np.ndarray, context: int) -> int:
    """Blocks of `context` tokens that are each followed by one more."""
    return max(0, (len(tokens) - 1) // context)


def block_rows(tokens: np.ndarray, numbers: np.ndarray, context: int) -> torch.Tensor:
    """Blocks by number, each with the token behind it: `[len(numbers), context + 1]` int64."""
    offsets = numbers[:, None] * context + np.arange(context + 1)
    return torch.from_numpy(tokens[offsets].astype(np.int64))


def spread_blocks(tokens: np.ndarray, context: int, limit: int) -> torch.Tensor:
    """At most `limit` blocks, evenly spread over `[N]` tokens, `[blocks, context + 1]` int64."""
    blocks = num_blocks(tokens, context)
    numbers = np.linspace(0, blocks - 1, min(limit, blocks)).round().astype(np.int64)
    return block_rows(tokens, numbers, context)


class Batches:
    """The blocks of every step of a stage: each pass over the text has its own shuffle, which the seeds alone fix.

    Args:
        tokens: `[N]` integers, at least `context + 1`.
        context: Tokens per block.
        batch_size: Blocks per step.
        seeds: Nonnegative integers, such as the run's seed and the stage's number.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seeds: tuple[int, ...]) -> None:
        self.tokens, self.context, self.batch_size, self.seeds = tokens, context, batch_size, seeds
        self.blocks = num_blocks(tokens, context)
        self._shuffled: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, step: int) -> torch.Tensor:
        """The batch of a step, counted from 0: `[B, context + 1]` int64."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        numbers = [self._shuffle(place // self.blocks)[place % self.blocks] for place in places]
        return block_rows(self.tokens, np.array(numbers), self.context)

    def _shuffle(self, epoch: int) -> np.ndarray:
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng((*self.seeds, epoch)).permutation(self.blocks)
        return self._shuffled[1]


def load_corpus(
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    on_progress: Progress | None = None,
    tokens: np.ndarray | None = None,
) -> Corpus:
    """Read, tokenise and split the data of a recipe.

    Files and folders are read whole; of a dataset, a quarter more than the stages train on.

    Args:
        recipe: With `data` set.
        tokenizer: The teacher's; documents are joined by its end-of-text token, if it has one.
        on_progress: Called as `on_progress(tokens, bytes)` while it reads.
        tokens: `[N]` integers in place of the recipe's data.

    Raises:
        ConversionError: Data that cannot be found or read, or is too short.
    """
    sources = recipe.data if isinstance(recipe.data, list) else [recipe.data]
    stages = list(recipe.training_stages.values())
    limit = sum(stage.tokens for stage in stages) * 5 // 4
    if tokens is None:
        tokens = encode(documents(sources, recipe), tokenizer, limit, on_progress)
    name, longest = ", ".join(sources), max([recipe.context, *(recipe.context_of(stage) for stage in stages)])
    if isinstance(recipe.held_out, str):
        train, held_out = tokens, encode(documents([recipe.held_out], recipe), tokenizer, limit, on_progress)
        check_length(recipe.held_out, held_out, recipe.context + 1, "one block")
    else:
        check_length(name, tokens, 2 * recipe.context + 1, "a block to train on and one to hold out")
        train, held_out = split(tokens, recipe.context, recipe.held_out)
    check_length(name, train, longest + 1, "one block", held_out if train is not tokens else ())
    return Corpus(train, held_out)


def check_length(source: str, tokens: Sequence[int], needed: int, what: str, held_out: Sequence[int] = ()) -> None:
    """Raise a sentence unless `tokens` are enough for `what`, which takes `needed` of them."""
    if len(tokens) >= needed:
        return
    amount = f"{len(tokens):,} tokens" if len(tokens) else "no text"
    beside = f" beside {len(held_out):,} that are held out" if len(held_out) else ""
    raise ConversionError(
        f"The data {source!r} holds {amount}{beside}, but {what} of this context takes {needed:,}: give more text, or "
        "a smaller context."
    )


def split(tokens: np.ndarray, context: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The last `share` of two or more blocks, at least one of them, is held out."""
    blocks = num_blocks(tokens, context)
    kept = max(1, round(blocks * share))
    # One token belongs to both parts: it is the last that the first part predicts and the first that the other reads.
    border = (blocks - kept) * context
    return tokens[: border + 1], tokens[border:]


def encode(
    texts: Iterator[tuple[str, bool]],
    tokenizer: "PreTrainedTokenizerBase",
    limit: int,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """Tokens of documents, with the end-of-text token behind each, `[N]` uint16 or uint32.

    Args:
        texts: Documents, each with whether reading may stop at `limit` tokens before it.
        tokenizer: Any tokenizer of transformers.
        limit: Where to stop, in tokens.
        on_progress: Called as `on_progress(tokens, bytes)` after every few pieces.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[np.ndarray] = []
    waiting: list[tuple[str, bool]] = []
    size = read = 0

    def flush() -> int:
        encoded = tokenizer(
            [piece for piece, _ in waiting], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for ids, (_, last) in zip(encoded, waiting):
            parts.append(np.array([*ids, *end] if last else ids, dtype=dtype))
        added = sum(len(part) for part in parts[-len(waiting) :])
        waiting.clear()
        return added

    for text, may_stop in texts:
        if may_stop and size >= limit:
            break
        pieces = list(cut(text))
        for index, piece in enumerate(pieces):
            waiting.append((piece, index == len(pieces) - 1))
            read += len(piece)
            if len(waiting) == PIECES_AT_ONCE or len(piece) > PIECE // 2:
                size += flush()
                if on_progress is not None:
                    on_progress(size, read)
    if waiting:
        flush()
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def cut(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, cut behind line ends where possible; none of an empty text."""
    start = 0
    while len(text) - start > PIECE:
        line_end = text.rfind("\n", start, start + PIECE) + 1
        stop = line_end if line_end > start else start + PIECE
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def documents(sources: Sequence[str], recipe: Recipe) -> Iterator[tuple[str, bool]]:
    """The texts of files, folders and datasets, each with whether it is one of many that need not all be read."""
    for source in sources:
        path = Path(source).expanduser()
        try:
            exists = path.exists()
        except OSError as error:  # a folder on the way that may not be entered
            raise unreadable(source, error) from error
        if exists:
            if path.resolve() == Path(recipe.teacher).expanduser().resolve():
                raise ConversionError(
                    f"The data {source!r} is the teacher's own folder, which is no text to learn from: for text that "
                    f"it writes, give `data: {TEACHER}` where nothing has that name."
                )
            for file in text_files(path):
                yield file, False
        elif source == TEACHER:
            raise ConversionError("Text of the teacher's own is read alone: give `data: teacher`, or leave it out.")
        elif looks_like_a_path(source):
            raise ConversionError(f"There is no file or folder {source!r} to read data from.")
        else:
            for text in dataset_texts(source, recipe):
                yield text, True


def text_files(path: Path) -> Iterator[str]:
    """Text of a file, or of all text files in a folder by their path inside it, hidden and binary ones left out.

    Raises:
        ConversionError: A file that cannot be read or is not text, a folder without text.
    """
    if not path.is_dir():
        text = read_text(path)
        if text is None:
            raise ConversionError(f"The data {str(path)!r} is no text file: it has zero bytes in it.")
        yield text
        return
    found = False
    for file in visible_files(path):
        text = read_text(path / file)
        if text is not None:
            found = True
            yield text
    if not found:
        raise ConversionError(f"The folder {str(path)!r} holds no text files.")


def visible_files(folder: Path) -> list[Path]:
    """Files in a folder and its folders, by their path inside it; none that is hidden.

    Raises:
        ConversionError: A folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file.relative_to(folder) for file in found if file.is_file())


def unreadable(source: str | Path, error: OSError) -> ConversionError:
    return ConversionError(f"The data {str(source)!r} cannot be read: {error.strerror}.")


def read_text(file: Path) -> str | None:
    """A file as UTF-8, with the replacement character for what is none; `None` for a binary file."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    return None if b"\0" in content[:SNIFF] else content.decode("utf-8", errors="replace")


def looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in FILE_SUFFIXES


def dataset_texts(source: str, recipe: Recipe) -> Iterator[str]:
    """Texts of a dataset `ID[:SPLIT]` on the Hub, as they stream in.

    Raises:
        ConversionError: No such dataset, split, configuration or column.
    """
    import datasets

    name, _, part = source.partition(":")
    try:
        rows = datasets.load_dataset(name, recipe.data_config, split=part or "train", streaming=True)
        for row in rows:
            if recipe.text_column not in row:
                columns = ", ".join(row)
                raise ConversionError(
                    f"Dataset {name!r} has no column {recipe.text_column!r}: set `text_column`, to one of {columns}."
                )
            text = row[recipe.text_column]
            if not isinstance(text, str):
                raise ConversionError(
                    f"The column {recipe.text_column!r} of {name!r} holds no text but {type(text).__name__}."
                )
            yield text
    except ConversionError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(
            f"The data {source!r} is no file or folder here, nor a dataset that can be read: {reason}"
        ) from error
