"""The folder in which a conversion works: its lock, its recipe, its log, its checkpoints.

    OUTPUT.converting/
      lock                     held while a process works here
      recipe.yaml              what is being done
      log.jsonl                one line per step
      checkpoints/STAGE-STEP/  state.json, tensors.safetensors
      runs/                    what trackers write, if any do
      result/OUTPUT/           the model while it is put together; renamed to OUTPUT at the end
      published                it has been, or is about to be

A checkpoint is written under another name and renamed when it is complete and on disk: what bears a checkpoint's name
can be continued from, whenever the process was killed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_memory.conversion.recipe import ConversionError, Recipe


T = TypeVar("T")

PARTIAL = ".partial"
NAME = re.compile(r"(?P<stage>[a-z_]+\d*)-(?P<step>\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Where a conversion stands.

    Args:
        stage: Label of the stage.
        step: Steps of the stage that are behind.
        numbers: Anything that JSON holds.
        tensors: By name, on the CPU.
    """

    stage: str
    step: int
    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.step:06}"

    @property
    def ended(self) -> bool:
        """Whether the stage is behind, which `stop_below` may bring about before its last step."""
        return self.numbers.get("ended", False)


class WorkFolder:
    """`OUTPUT.converting`, held by one process; used as a context.

    It disappears when the context ends, unless it holds an unfinished conversion.

    Args:
        output: Where the model shall be.
        restart: Delete what an earlier conversion left.
        holds: False in all processes of a conversion but one: they look, and change nothing.

    Raises:
        ConversionError: The output exists, another process works here, or the folder cannot be made.
    """

    def __init__(self, output: str | Path, restart: bool = False, holds: bool = True) -> None:
        self.output = Path(output).expanduser()
        self.path = self.output.with_name(self.output.name + ".converting")
        self.checkpoints = self.path / "checkpoints"
        # Under its final name already: the card tells it.
        self.model = self.path / "result" / self.output.name
        self.runs = self.path / "runs"
        self.restart, self.holds = restart, holds
        # Written before the output gets its name: beside an output it says that only the clearing away was cut off.
        self.published = self.path / "published"
        self.finished = False

    def __enter__(self) -> "WorkFolder":
        if not self.holds:
            return self
        self._refuse_existing()
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / "lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise ConversionError(
                f"Another process is converting to {str(self.output)!r}: wait for it, or choose another output."
            ) from None
        except OSError as error:
            raise ConversionError(f"The folder {str(self.path)!r} cannot be written: {error.strerror}.") from error
        try:
            # The process that held the lock may have finished meanwhile.
            self._refuse_existing()
            self.finished = self.output.exists()
            if self.restart:
                self._clear()
            self._remove_partial()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if not self.holds:
            return
        if self.finished or not (self.path / "recipe.yaml").exists():
            # The marker goes last: killed before, the same command clears away the rest.
            self._clear()
            shutil.rmtree(self.path, ignore_errors=True)
            for folder in self._made[1:]:
                _remove_if_empty(folder)
        self._lock.release()

    def _refuse_existing(self) -> None:
        there = self.output.exists() or self.output.is_symlink()
        if there and (self.restart or not self.published.exists()):
            raise self._exists()

    def _exists(self) -> ConversionError:
        return ConversionError(f"The output {str(self.output)!r} exists already: remove it, or choose another name.")

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry not in (self.path / "lock", self.published):
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _remove_partial(self) -> None:
        if not self.finished:
            self.published.unlink(missing_ok=True)
        shutil.rmtree(self.model.parent, ignore_errors=True)
        for entry in self.checkpoints.glob("*" + PARTIAL):
            shutil.rmtree(entry, ignore_errors=True)

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe down; from here on the folder outlives an error."""
        if self.holds:
            try:
                write_whole(self.path / "recipe.yaml", recipe.to_yaml())
            except OSError as error:
                raise self.unwritable(error) from error

    def compare(self, recipe: Recipe) -> None:
        """Check that what lies here, if anything, was made by the same recipe.

        Raises:
            ConversionError: It was not.
        """
        file = self.path / "recipe.yaml"
        if not file.exists():
            return
        before, now = read_whole(file, lambda text: dict(yaml.safe_load(text))), recipe.to_dict()
        for name in Recipe.WITHOUT_EFFECT:
            before.pop(name, None), now.pop(name, None)
        if difference := first_difference(before, now):
            if self.finished:
                raise self._exists()
            name, was, given = difference
            raise ConversionError(
                f"{str(self.path)!r} has an unfinished conversion in which `{name}` was {was!r}, now it is {given!r}: "
                "give the old value to continue, or pass --restart (restart=True) to delete it and begin anew."
            )

    def latest(self, stages: list[str]) -> Checkpoint | None:
        """The checkpoint that is furthest in this order of stages; the process that holds the folder removes others.

        Raises:
            ConversionError: It cannot be read.
        """
        found = []
        for entry in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            match = NAME.fullmatch(entry.name)
            if match and match["stage"] in stages:
                found.append((stages.index(match["stage"]), int(match["step"]), entry))
        if not found:
            return None
        *older, (index, step, folder) = sorted(found)
        try:
            numbers = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            checkpoint = Checkpoint(stages[index], step, numbers, load_file(folder / "tensors.safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            raise ConversionError(
                f"The checkpoint {str(folder)!r} cannot be read ({' '.join(str(error).split())}): put it back, or "
                "pass --restart (restart=True) to begin anew."
            ) from error
        for *_, entry in older if self.holds else ():
            shutil.rmtree(entry, ignore_errors=True)
        return checkpoint

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, and remove the others once it is complete.

        Raises:
            ConversionError: It cannot be written; those that were there still are.
        """
        folder = self.checkpoints / checkpoint.name
        beside = folder.with_name(folder.name + PARTIAL)
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()},
                beside / "tensors.safetensors",
            )
            (beside / "state.json").write_text(json.dumps(checkpoint.numbers, indent=2) + "\n", encoding="utf-8")
            for entry in (*beside.iterdir(), beside):
                _flush(entry)
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
            _flush(self.checkpoints)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise self.unwritable(error) from error
        for entry in self.checkpoints.iterdir():
            if entry != folder:
                shutil.rmtree(entry, ignore_errors=True)
        return folder

    def unwritable(self, error: Exception) -> ConversionError:
        """A sentence for an error while writing."""
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        good = self.last_good()
        where = f"the last complete checkpoint, {good}, is intact" if good else "no checkpoint was complete yet"
        return ConversionError(
            f"{str(self.path)!r} cannot be written ({reason.rstrip('.')}); {where}: make room, run it again."
        )

    def last_good(self) -> str | None:
        """Name of the newest complete checkpoint."""
        folders = [entry for entry in self.checkpoints.glob("*") if NAME.fullmatch(entry.name)]
        return max(folders, key=lambda entry: entry.stat().st_mtime_ns).name if folders else None

    def publish(self) -> Path:
        """Give the finished model its name; the rest of the folder goes with the end of the context."""
        for entry in (*self.model.rglob("*"), self.model):
            _flush(entry)
        if self.output.exists() or self.output.is_symlink():
            raise self._exists()
        self.published.touch()
        _flush(self.path)
        self.model.rename(self.output)
        _flush(self.output.parent)
        self.finished = True
        return self.output

    def log(self) -> "Log":
        return Log(self.path / "log.jsonl")


class Log:
    """One JSON object per line and step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a killed process may have left half of one."""
        if not self.path.exists():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return lines

    def rewind(self, stages: list[str], done: Checkpoint | None) -> None:
        """Drop what comes after a checkpoint: it is about to be done, and written, again."""
        reached = (-1, 0) if done is None else (stages.index(done.stage), done.step)
        kept = [line for line in self.read() if (stages.index(line["stage"]), line["step"]) <= reached]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first thing in which two nests of mappings and lists differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(f"{name}.{key}" if name else key, before.get(key), now.get(key)) for key in {**before, **now}]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now) and name == "stages":
        pairs = [(str(new.get("name")), old, new) for old, new in zip(before, now)]
    else:
        return None if before == now else (name, before, now)
    return next((found for key, old, new in pairs if (found := first_difference(old, new, key))), None)


def write_whole(file: Path, text: str) -> None:
    """Write a text under another name, and rename it when it is on disk: a reader finds all of the old or the new."""
    beside = file.with_name(file.name + PARTIAL)
    beside.write_text(text, encoding="utf-8")
    _flush(beside)
    beside.replace(file)


def read_whole(file: Path, parse: Callable[[str], T]) -> T:
    """What `write_whole` wrote, parsed.

    Raises:
        ConversionError: It cannot be read or parsed.
    """
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConversionError(
            f"The file {str(file)!r} cannot be read ({' '.join(str(error).split())}): put it back, or pass --restart "
            "(restart=True) to begin anew."
        ) from error


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
