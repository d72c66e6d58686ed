"""Finding configurations, models and tokenizers by path, Hub id or model type, with errors of one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class UserError(Exception):
    """A sentence for the user: what was given, and what is accepted."""


def load_config(source: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a folder, a `.json` file, a model type (its defaults), or a Hub id."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not Path(source).exists() and source in CONFIG_MAPPING:
        return AutoConfig.for_model(source)
    return _load(source, "configuration", AutoConfig.from_pretrained, **_origin(trust_remote_code, revision))


def load_model(
    source: str,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **placement: Any,
) -> PreTrainedModel:
    """The causal LM of a folder or a Hub id; with arguments of `from_pretrained` that place it, wherever these say."""
    from transformers import AutoModelForCausalLM

    torch_device = resolve_device(device)
    settings = {"dtype": resolve_dtype(dtype)} | _origin(trust_remote_code, revision) | placement
    model = _load(source, "model", AutoModelForCausalLM.from_pretrained, **settings).eval()
    return model if placement else model.to(torch_device)


def load_tokenizer(
    source: str, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return _load(source, "tokenizer", AutoTokenizer.from_pretrained, **_origin(trust_remote_code, revision))


def resolve_device(name: str) -> Any:
    """`"auto"` is the first CUDA device if there is one, else the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {name!r} is not available here.") from error
    return device


def resolve_dtype(name: str) -> Any:
    import torch

    if name not in DTYPES:
        raise UserError(f"Unknown dtype {name!r}; use one of {', '.join(DTYPES)}.")
    return name if name == "auto" else getattr(torch, name)


def _origin(trust_remote_code: bool, revision: str | None) -> dict[str, Any]:
    return {"trust_remote_code": trust_remote_code} | ({} if revision is None else {"revision": revision})


def _load(source: str, what: str, load: Callable[..., T], **kwargs: Any) -> T:
    from safetensors import SafetensorError

    _check_path(source)
    try:
        return load(source, **kwargs)
    except (OSError, SafetensorError) as error:
        raise UserError(_missing(source, what, str(error))) from error
    except ImportError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{source!r} needs a package that is not installed: {message}") from error
    except ValueError as error:
        message = " ".join(str(error).split())
        if "Unrecognized configuration class" in message:
            raise UserError(f"{source!r} holds no causal language model.") from error
        if "does not recognize this architecture" in message or "Unrecognized model" in message:
            raise UserError(
                f"The model type of {source!r} is unknown to the installed transformers and to hf_memory."
            ) from error
        if what == "tokenizer" and "instantiate the backend tokenizer" in message:
            raise UserError(f"{source!r} holds no tokenizer that can be read.") from error
        if "trust_remote_code" in message:
            raise UserError(f"{source!r} comes with its own code: read it, then pass --trust-remote-code.") from error
        if what == "tokenizer":
            raise UserError(_missing(source, what, message)) from error
        raise


def _check_path(source: str) -> None:
    path = Path(source)
    if path.exists():
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"The folder {source!r} holds no config.json, so it is not a saved model.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(".json"):
        raise UserError(f"There is no file or folder {source!r}.")


def _missing(source: str, what: str, message: str) -> str:
    if Path(source).exists():
        return f"{source!r} holds no {what} that can be read: {' '.join(message.split())[:200]}"
    from transformers import CONFIG_MAPPING

    if source in CONFIG_MAPPING:
        return f"{source!r} is a model type, not a saved model: `check` takes it with --random, `info` as it is."
    if "offline" in message.lower() or "connect" in message.lower():
        return f"{source!r} is no folder here and not in the local cache, and the Hub cannot be reached."
    if "gated" in message.lower():
        return f"{source!r} is gated: ask for access on its page, then log in with `hf auth login`."
    return f"{source!r} is neither a folder here nor a model on the Hub that you can read."
