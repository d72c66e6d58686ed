"""The sources of Python's standard library as bytes: a text that every machine already has."""

import hashlib
import shutil
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


# Whole packages, so that no held-out file has a sibling in the training text.
HELD_OUT = ("asyncio", "email", "json", "xml")
# Tests and bundled tools are not part of every distribution, and packages of the user none of the library.
LEFT_OUT = {"dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
END_TOKEN, END = "<|endoftext|>", 255
# Tables of character sets: a tenth of the library, and nothing to learn from.
TABLES = "encodings"
SPARE_TEXT = 1.5
"""Bytes of the library that are put aside for every token that is trained on."""


def source_files(packages: bool = False) -> tuple[list[Path], list[Path]]:
    """Files to train on and held-out files, each sorted by their path inside the library.

    Args:
        packages: Whether the sources of installed packages follow those to train on: tens of megabytes.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _below(root) if not LEFT_OUT & set(path.parts)]
    held_out = [path for path in files if path.parts[0] in HELD_OUT]
    training = [root / path for path in files if path not in set(held_out)]
    if packages:
        root = Path(sysconfig.get_path("purelib"))
        kept = [path for path in _below(root) if not {"test", "tests", *HELD_OUT} & set(path.parts)]
        training += [root / path for path in kept]
    return training, [Path(sysconfig.get_path("stdlib")) / path for path in held_out]


def _below(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*.py") if path.is_file())


def library_text(folder: Path, tokens: int, seed: int, packages: bool = False) -> tuple[Path, Path]:
    """Copies of files of the standard library, in folders of their own to train on and held out.

    To train on there are as many files, chosen at random, as the tokens ask for; with `packages`, of those that are
    installed as well.
    """
    training, held_out = source_files(packages)
    training = [path for path in training if path.parent.name != TABLES]
    chosen, size = [], 0
    for index in np.random.default_rng(seed).permutation(len(training)):
        if size >= SPARE_TEXT * tokens:
            break
        chosen.append(training[index])
        size += training[index].stat().st_size
    roots = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    folders = folder / "training", folder / "held_out"
    for files, target in ((chosen, folders[0]), (held_out, folders[1])):
        # Left from an interrupted run, maybe of another Python.
        shutil.rmtree(target, ignore_errors=True)
        for path in files:
            copy = target / path.relative_to(next(root for root in roots if path.is_relative_to(root)))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    return folders


def read(files: list[Path], limit: int | None = None, end: bytes = b"\0") -> np.ndarray:
    """First `limit` bytes of the files, one after the other with `end` behind each, `[N]` uint8."""
    parts, size = [], 0
    for path in files:
        parts.append(path.read_bytes() + end)
        size += len(parts[-1])
        if limit is not None and size >= limit:
            break
    return np.frombuffer(b"".join(parts)[:limit], dtype=np.uint8)


def fingerprint(text: np.ndarray) -> str:
    """Which text it was: the library differs from version to version."""
    return hashlib.sha256(text.tobytes()).hexdigest()[:16]


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Tokenizer whose ids are the bytes of the UTF-8 text, and 255, which UTF-8 never uses, the end of a text.

    Args:
        context: Longest input that the model was trained on, in tokens.
    """
    characters = bytes_to_unicode()
    tokenizer = Tokenizer(BPE({characters[byte]: byte for byte in range(END)} | {END_TOKEN: END}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
    )
