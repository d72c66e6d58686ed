"""The sources of Python's standard library as bytes: a text that every machine already has."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np


# Whole packages, so that no held-out file has a sibling in the training text.
HELD_OUT = ("asyncio", "email", "json", "xml")
# Tests and bundled tools are not part of every distribution, and packages of the user none of the library.
LEFT_OUT = {"dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}


def source_files() -> tuple[list[Path], list[Path]]:
    """Files to train on and held-out files, each sorted by their path inside the library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [path for path in files if not LEFT_OUT & set(path.parts)]
    held_out = [path for path in files if path.parts[0] in HELD_OUT]
    return [root / path for path in files if path not in set(held_out)], [root / path for path in held_out]


def read(files: list[Path], limit: int | None = None) -> np.ndarray:
    """First `limit` bytes of the files, one after the other with a zero byte behind each, `[N]` uint8."""
    parts, size = [], 0
    for path in files:
        parts.append(path.read_bytes() + b"\0")
        size += len(parts[-1])
        if limit is not None and size >= limit:
            break
    return np.frombuffer(b"".join(parts)[:limit], dtype=np.uint8)


def fingerprint(text: np.ndarray) -> str:
    """Which text it was: the library differs from version to version."""
    return hashlib.sha256(text.tobytes()).hexdigest()[:16]
