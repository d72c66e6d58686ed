"""Memory files: what a model has read, as one safetensors file.

| in the file | what it is |
|---|---|
| `layers.<i>.<name>` | a tensor of layer i: states `[B, ...]`, keys and values `[B, H, S, D]`, positions `[B, S]` |
| metadata `hf_memory` | JSON: format version, the model (`hf_memory.memory_identity`), tokens, rows, notes, hash |

The hash, `sha256`, is that of the other fields and of names, dtypes, shapes and bytes of all tensors. The same memory
gives the same file.

Nothing in a file is taken as code or as a path, and nothing of it reaches a model before all of it was checked.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from hf_memory.cache_states import MemoryStatesMixin
from hf_memory.memory_identity import HUB_ID, Fingerprint, ModelIdentity, without_adapter_wrapper


logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
FILE_NAME = "memory.safetensors"
"""Name of a memory file inside a folder or a repository."""

DOCUMENT = "hf_memory"
"""Entry of a safetensors file's metadata that makes it a memory file."""

_HASH = "sha256"
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, RecursionError)
_ATTENTION = {"attention.keys": 2, "attention.values": 2}
"""Tensors of a layer of transformers, and their dimension that counts slots."""


@dataclasses.dataclass(frozen=True)
class MemoryInfo:
    """What a memory file says about itself.

    Attributes:
        model: the model that made it.
        tokens: tokens read, per row.
        rows: texts read side by side.
        notes: what the maker of the file wrote down.
        parts: bytes by what they are; `"keys and values"` is what attention keeps beside memories.
        format_version: version of the format.
    """

    model: ModelIdentity
    tokens: int
    rows: int
    notes: dict[str, str]
    parts: dict[str, int]
    format_version: int = FORMAT_VERSION

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(self.parts.values())


class MemoryMismatchError(ValueError):
    """A memory file that was made by another model."""


def memory_path(path: str | os.PathLike) -> Path:
    """The file that a path means: itself, if it is one or has a suffix, else `memory.safetensors` in that folder."""
    path = Path(path)
    return path if path.is_file() or (path.suffix and not path.is_dir()) else path / FILE_NAME


def find_memory_file(
    source: str | os.PathLike, filename: str | None = None, revision: str | None = None, **hub_kwargs: Any
) -> Path:
    """The memory file that a path or the id of a repository means; what is on the Hub is downloaded.

    Raises:
        FileNotFoundError: when there is none.
        ConnectionError: when the Hub breaks off.
    """
    path = Path(source)
    if filename is not None and path.is_dir():
        path = path / filename
    path = memory_path(path)
    if path.is_file():
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(source).exists():
        raise FileNotFoundError(f"There is no memory file {str(path)!r}.")
    wanted = filename or FILE_NAME
    try:
        return Path(hf_hub_download(name, wanted, revision=revision, **hub_kwargs))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no file here and not in the local cache, and the Hub cannot be reached."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a file here nor a repository on the Hub that you can read."
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no memory file {str(path)!r}, and {name!r} is no name for a repository on the Hub."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"The repository {name!r} has no revision {revision!r}.") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"The repository {name!r} has no file {wanted!r}.") from error
    except Exception as error:
        # The client's HTTP library has another name in each major version.
        if not isinstance(error, HfHubHTTPError) and type(error).__module__.split(".")[0] not in ("httpx", "httpx2"):
            raise
        reason = " ".join(str(error).split())
        raise ConnectionError(f"{wanted!r} of {name!r} did not arrive, load it again: {reason}") from error


def memory_info(cache: Cache) -> MemoryInfo:
    """Describe a memory in use.

    Raises:
        ValueError: for a cache that does not know its model, or has read nothing.
    """
    if cache.model_identity is None:
        raise ValueError(
            "This cache does not know which model filled it: make it with `model.read(...)`, or pass `model=` to "
            "`save_pretrained`."
        )
    return _describe(named_tensors(cache), cache.model_identity, int(cache.seen_tokens), dict(cache.notes))


def write_memory(cache: Cache, path: str | os.PathLike) -> Path:
    """Write a memory file, all of it or none.

    Args:
        cache: a `MemoryCache` that knows its model.
        path: file to write; see `memory_path`.

    Returns:
        The file.

    Raises:
        ValueError: for a memory that cannot be saved.
        OSError: when the file cannot be written; nothing is left of it then, and an older file stays as it was.
    """
    info = memory_info(cache)
    if not all(isinstance(text, str) for item in info.notes.items() for text in item):
        raise ValueError(f"The notes of a memory are texts by texts, got {info.notes!r}.")
    tensors = {name: x.detach().to("cpu").contiguous().clone() for name, x in named_tensors(cache).items()}
    for name, tensor in tensors.items():
        if tensor.isnan().any():
            raise ValueError(f"The memory has diverged: {name} holds NaN. It is of no use, so it is not saved.")
    fields = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(info.model) | {"config_hash": info.model.config_hash},
        "tokens": info.tokens,
        "rows": info.rows,
        "notes": info.notes,
    }
    fields[_HASH] = content_digest(fields, tensors)
    path = memory_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _written_beside(path) as beside:
            save_file(tensors, beside, {DOCUMENT: json.dumps(fields, sort_keys=True)})
    except Exception as error:  # safetensors has an error of its own for a full disk, the system others
        raise OSError(f"The memory could not be written to {path}: {error}. Nothing of it is left there.") from error
    return path


def read_info(path: str | os.PathLike) -> MemoryInfo:
    """What a memory file says about itself, without the model, after its hash was checked.

    Raises:
        ValueError: for anything that is no memory file, or a damaged one.
    """
    return _open(path)[0]


def read_memory(path: str | os.PathLike, fit: "ModelFit", check_weights: bool = True) -> Cache:
    """Read a memory file into a cache for a model.

    Args:
        path: the file, or a folder with `memory.safetensors`.
        fit: what a memory of the model looks like.
        check_weights: whether to refuse a memory that other weights of the same configuration have made.

    Raises:
        FileNotFoundError: when there is no such file.
        MemoryMismatchError: for a memory of another model.
        ValueError: for a file that is no memory, is truncated or altered, or has a newer format.
    """
    info, tensors = _open(path)
    try:
        info.model.refuse_other(fit.identity, fit.config, check_weights)
    except ValueError as error:
        raise MemoryMismatchError(f"{path}: {error}") from None
    if check_weights and info.model.weights.dtype != fit.identity.weights.dtype:
        logger.warning(
            f"The memory was read in {info.model.weights.dtype} and goes on in {fit.identity.weights.dtype}: what "
            "follows agrees up to rounding only."
        )
    cache = fit.restore(info, tensors)
    # Whoever waives the check says that the memory is this model's.
    cache.model_identity = info.model if check_weights else fit.identity
    cache.notes, cache.takes_new_tokens_only = info.notes, True
    return cache


class ModelFit:
    """What a memory of a model looks like: names, shapes, dtypes and devices of its tensors, found by reading a token.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model = without_adapter_wrapper(model)
        self.identity = ModelIdentity.of(model)
        self.config = model.config.get_text_config(decoder=True)
        memory_config = self.config.make_memory_config() if hasattr(self.config, "make_memory_config") else self.config
        # Integer states that count rows of a chunk or tokens of a segment, by the end of their name.
        self._counted = {
            end: getattr(memory_config, field, None)
            for end, field in (("phase", "chunk_size"), ("position", "segment_size"))
        }
        self._new_cache = model.new_memory
        probe = model.new_memory()
        with evaluating(model), torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            model.base_model(input_ids=token, past_key_values=probe, use_cache=True)
        self._layers = probe.layers
        self._expected = named_tensors(probe)

    def restore(self, info: MemoryInfo, tensors: dict[str, Tensor]) -> Cache:
        """The cache with these tensors, after each was checked."""
        if odd := sorted(tensors.keys() ^ self._expected.keys()):
            what = "is missing" if odd[0] in self._expected else "has no place in this model"
            raise ValueError(f"The memory does not fit the model: its tensor {odd[0]!r} {what}.")
        placed: list[dict[str, Tensor]] = [{} for _ in self._layers]
        for name, tensor in tensors.items():
            _, index, inner = name.split(".", 2)
            expected = self._expected[name]
            shape = [info.rows, *expected.shape[1:]]
            slot_dim = _slot_dims(self._layers[int(index)]).get(inner)
            if slot_dim is not None:
                shape[slot_dim] = _num_slots(self._layers[int(index)], info.tokens)
            is_cast = tensor.is_floating_point() and expected.is_floating_point()
            if list(tensor.shape) != shape or not (is_cast or tensor.dtype == expected.dtype):
                raise ValueError(
                    f"The memory does not fit the model: its tensor {name!r} is {list(tensor.shape)} {tensor.dtype}, "
                    f"expected {shape} {expected.dtype}."
                )
            self._check_values(name, tensor, info.tokens)
            placed[int(index)][inner] = tensor.to(expected.device, expected.dtype)
        cache = self._new_cache()
        for layer, named in zip(cache.layers, placed):
            _restore_layer(layer, named, info.tokens)
        return cache

    def _check_values(self, name: str, tensor: Tensor, tokens: int) -> None:
        if tensor.is_floating_point():
            if tensor.isnan().any():
                raise ValueError(f"The memory has diverged: its tensor {name!r} holds NaN.")
            return
        # Integers are positions of tokens, or say how much of a chunk or segment is filled. Others would lead kernels
        # out of their tensors.
        limit = self._counted.get(name.rsplit(".", 1)[-1])
        low, high = (-1, tokens) if limit is None else (0, limit - 1)
        if tensor.numel() and not low <= int(tensor.min()) <= int(tensor.max()) <= high:
            raise ValueError(f"The memory does not fit the model: its tensor {name!r} leaves {low} to {high}.")


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """`model.eval()` for the time of a `with` block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_growing(layer: Any) -> bool:
    """Whether a layer of a cache keeps keys and values of every token."""
    return isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)


def _saved_tensors(layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, MemoryStatesMixin):
        saved = layer.saved_tensors()
        # Keys and values of a learned prefix follow from the weights.
        known = {id(tensor) for tensor in (*saved.values(), *(getattr(layer, "prefix", None) or ()))}
        if layer.is_compileable or any(id(tensor) not in known for tensor in layer.tensors()):
            raise ValueError(
                f"A {type(layer).__name__} cannot be saved: memory files are made from what `model.read` returns."
            )
        return saved
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(f"A {type(layer).__name__} cannot be saved in a memory file.")
    return dict(zip(_ATTENTION, (layer.keys, layer.values))) if layer.is_initialized else {}


def named_tensors(cache: Cache) -> dict[str, Tensor]:
    named = {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(cache.layers)
        for name, tensor in _saved_tensors(layer).items()
    }
    if not named:
        raise ValueError("The memory is empty: let the model read something first.")
    return named


def _slot_dims(layer: Any) -> dict[str, int]:
    return layer.slot_dims if isinstance(layer, MemoryStatesMixin) else _ATTENTION


def _num_slots(layer: Any, tokens: int) -> int:
    if isinstance(layer, MemoryStatesMixin):
        return layer.num_saved_slots(tokens)
    return tokens if is_growing(layer) else min(tokens, layer.sliding_window - 1)


def _restore_layer(layer: Any, tensors: dict[str, Tensor], tokens: int) -> None:
    if isinstance(layer, MemoryStatesMixin):
        layer.restore(tensors, tokens)
        return
    layer.update(*(tensors[name] for name in _ATTENTION))
    if not is_growing(layer):
        layer.cumulative_length = tokens


def _describe(tensors: dict[str, Tensor], model: ModelIdentity, tokens: int, notes: dict[str, str]) -> MemoryInfo:
    parts = {"memory": 0, "keys and values": 0}
    for name, tensor in tensors.items():
        is_attention = name.split(".")[2:3] in (["window"], ["attention"])
        parts["keys and values" if is_attention else "memory"] += tensor.nbytes
    rows = next(iter(tensors.values())).shape[0]
    return MemoryInfo(model, tokens, rows, notes, {what: size for what, size in parts.items() if size})


def content_digest(fields: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash of what a memory file says about itself and of all of its tensors."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _written_beside(path: Path) -> Iterator[str]:
    """Name of a file that takes the place of `path` when the block ends, and goes away when it fails."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _open(path: str | os.PathLike) -> tuple[MemoryInfo, dict[str, Tensor]]:
    path = memory_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no memory file {str(path)!r}.")
    while True:
        before = _stamp(path)
        try:
            return _open_once(path)
        except ValueError:
            # safetensors opens a file twice, and another process may have put a new one in place meanwhile.
            if _stamp(path) == before:
                raise


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _open_once(path: Path) -> tuple[MemoryInfo, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            document = metadata.get(DOCUMENT)
            # Not one byte of the tensors of a file that is something else.
            names = [] if document is None else file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except Exception as error:  # of damage safetensors says so in errors of many kinds
        raise ValueError(f"{path} is no safetensors file, or a truncated or altered one: {error}.") from error
    if document is None:
        raise ValueError(f"{path} is a safetensors file, but holds no memory: it lacks the metadata of one.")
    try:
        fields = json.loads(document)
        version, digest = fields["format_version"], fields.pop(_HASH)
    except _UNREADABLE as error:
        raise ValueError(f"{path} was altered or damaged: it does not say what it holds.") from error
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, the installed hf-memory reads up to {FORMAT_VERSION}: upgrade it "
            "with `pip install -U hf-memory`."
        )
    if digest != content_digest(fields, tensors):
        raise ValueError(f"{path} was altered or damaged after it was written: its hash is another one.")
    try:
        return _parse(fields, tensors), tensors
    except _UNREADABLE as error:
        raise ValueError(f"{path} describes itself in a way that no memory file does: {error!r}.") from error


def _parse(fields: dict[str, Any], tensors: dict[str, Tensor]) -> MemoryInfo:
    tokens, rows, model, notes = (fields[name] for name in ("tokens", "rows", "model", "notes"))
    if fields["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {fields['format_version']!r}")
    if type(tokens) is not int or type(rows) is not int or not (0 < tokens < 2**62 and 0 < rows < 2**31):
        raise ValueError(f"{rows!r} rows of {tokens!r} tokens")
    if not all(isinstance(text, str) for item in notes.items() for text in item):
        raise ValueError("notes that are no text")
    weights = None if model["weights"] is None else Fingerprint(**model["weights"])
    if model["name"] is not None and not HUB_ID.fullmatch(model["name"]):
        # It comes to stand in cards.
        raise ValueError(f"{model['name']!r} as the id of a model")
    texts = [model["model_type"], model["name"] or "", *(dataclasses.astuple(weights) if weights else ())]
    if not all(isinstance(text, str) for text in texts) or not isinstance(model["config"], dict):
        raise ValueError("a model without a type or a configuration")
    identity = ModelIdentity(model["model_type"], model["name"], model["config"], weights)
    if identity.config_hash != model["config_hash"]:
        raise ValueError("a configuration with another hash")
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            raise ValueError(f"tensor {name!r} without {rows} rows")
    return _describe(tensors, identity, tokens, notes)
