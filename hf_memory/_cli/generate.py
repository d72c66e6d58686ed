"""The command `hf-memory generate`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_memory._cli import memory as memories
from hf_memory._cli.loading import UserError, load_model, load_tokenizer
from hf_memory._cli.state_size import readable_size


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_memory.compression.cache import CompressedCache
    from hf_memory.compression.compare import Comparison

CACHES = ("polarquant", "subgen")
# Tokens that the comparison predicts, of the continuation and, if that is shorter, of the prompt before it.
_TAIL = 64

_REQUIRED = inspect.Parameter.empty
_PARAMETERS: dict[str, tuple[Any, Any, Any]] = {
    "model": (str, _REQUIRED, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its id on the Hub.")),
    "prompt": (str, _REQUIRED, typer.Argument(help='The text to continue; "-" reads it from standard input.')),
    "max_new_tokens": (int, 128, typer.Option(min=1, help="How many tokens to add at most.")),
    "do_sample": (bool, False, typer.Option("--do-sample", help="Sample instead of taking the likeliest token.")),
    "temperature": (float, 1.0, typer.Option(min=0.0, help="Of sampling.")),
    "top_p": (float, 1.0, typer.Option(min=0.0, max=1.0, help="Of sampling: mass of the tokens kept.")),
    "seed": (int, 0, typer.Option(help="Of sampling.")),
    "memory": (
        str | None,
        None,
        typer.Option("--memory", "-m", help="Memory file or its Hub id; the prompt comes behind it."),
    ),
    "cache": (
        str | None,
        None,
        typer.Option(
            help="For models with attention: polarquant keeps all tokens in 4 bits, subgen a fixed number of them."
        ),
    ),
    "cache_window": (
        int | None,
        None,
        typer.Option(help="Recent tokens that the cache keeps as they are. Default: 128, or half of the budget."),
    ),
    "cache_budget_tokens": (int | None, None, typer.Option(help="Tokens that subgen keeps at most. Default: 1024.")),
    "compare": (
        bool,
        False,
        typer.Option("--compare", help="With --cache: read the text again with the full cache, and show the error."),
    ),
    "device": (str, "auto", typer.Option(help='"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.')),
    "dtype": (str, "auto", typer.Option(help='"float32", "bfloat16", ...; "auto" takes that of the checkpoint.')),
    "trust_remote_code": (
        bool,
        False,
        typer.Option("--trust-remote-code", help="Run code that comes with the model."),
    ),
}


def command() -> Callable[..., None]:
    """The command, with a signature for typer."""

    def generate(**given: Any) -> None:
        """Continue a text, printing it as it comes."""
        run(given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in _PARAMETERS.items()
    ]
    generate.__signature__ = inspect.Signature(parameters)
    generate.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return generate


def run(given: dict[str, Any]) -> None:
    """Continue a text as the options say."""
    from transformers import TextStreamer, set_seed

    _check(given)
    text = sys.stdin.read() if given["prompt"] == "-" else given["prompt"]
    model = load_model(given["model"], given["device"], given["dtype"], given["trust_remote_code"])
    tokenizer = load_tokenizer(given["model"], given["trust_remote_code"])
    # Behind a memory no text begins.
    begins = given["memory"] is None
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=begins).to(
        model.device
    )
    if not inputs["input_ids"].shape[1]:
        raise UserError("The prompt is empty, and the tokenizer adds no token of its own to start from.")
    set_seed(given["seed"])
    settings: dict[str, Any] = {"max_new_tokens": given["max_new_tokens"], "do_sample": given["do_sample"]}
    if given["do_sample"]:
        settings |= {"temperature": given["temperature"], "top_p": given["top_p"], "top_k": 0}
    if model.generation_config.pad_token_id is None and tokenizer.pad_token_id is None:
        # Only to keep transformers from announcing that it does the same.
        settings["pad_token_id"] = tokenizer.eos_token_id
    if given["memory"] is not None:
        settings["past_key_values"] = memories.load_memory(given["memory"], model)
    elif given["cache"] is not None:
        settings["past_key_values"] = _make_cache(model, given)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**inputs, streamer=streamer, **settings)
    if given["cache"] is not None:
        added = ids.shape[1] - inputs["input_ids"].shape[1]
        compared = _compare(model, ids, added, given) if given["compare"] else None
        Console(stderr=True).print(_report(settings["past_key_values"], given["cache"], compared))


def _check(given: dict[str, Any]) -> None:
    kind = given["cache"]
    if kind is None:
        if any(given[name] is not None for name in ("cache_window", "cache_budget_tokens")) or given["compare"]:
            raise UserError(
                f"--cache-window, --cache-budget-tokens and --compare belong to --cache {' or '.join(CACHES)}."
            )
        return
    if kind not in CACHES:
        raise UserError(f"There is no cache {kind!r}: --cache takes {' or '.join(CACHES)}.")
    if given["memory"] is not None:
        raise UserError("--memory goes on from a memory and --cache starts an empty cache: give one of them.")
    if kind == "polarquant" and given["cache_budget_tokens"] is not None:
        raise UserError("polarquant keeps all tokens: --cache-budget-tokens belongs to --cache subgen.")


def _make_cache(model: PreTrainedModel, given: dict[str, Any]) -> CompressedCache:
    from hf_memory.compression.cache import PolarQuantCache, SubGenCache

    settings = {"window": given["cache_window"], "budget": given["cache_budget_tokens"]}
    cache_class = PolarQuantCache if given["cache"] == "polarquant" else SubGenCache
    return cache_class(model.config, **{name: value for name, value in settings.items() if value is not None})


def _compare(model: PreTrainedModel, ids: Tensor, added: int, given: dict[str, Any]) -> Comparison | None:
    from hf_memory.compression.compare import compare_with_full

    length = ids.shape[1]
    # Half of the text at least comes before, where it is that short.
    tail = max(min(length - 1, added), min(length // 2, _TAIL))
    return compare_with_full(model, ids, _make_cache(model, given), tail) if tail else None


def _report(cache: CompressedCache, kind: str, compared: Comparison | None) -> Table:
    table = Table("", "full cache", kind, title=f"Cache behind {cache.seen_tokens:,} tokens")
    share = f" ({cache.nbytes / cache.full_nbytes:.1%})"
    table.add_row("size", readable_size(cache.full_nbytes), readable_size(cache.nbytes) + share)
    if compared is not None:
        table.add_section()
        table.add_row(f"bits per token, last {compared.tokens:,}", f"{compared.full_bits:.4f}", f"{compared.bits:.4f}")
        table.add_row("KL(full ‖ this), bits per token", "", f"{compared.kl:.4f}")
        table.add_row("likeliest token that of the full cache", "", f"{compared.agreement:.1%}")
        milliseconds = (f"{1000 * seconds:.1f}" for seconds in (compared.full_seconds, compared.seconds))
        table.add_row("milliseconds per token", *milliseconds)
    return table


__all__ = ["command", "run"]
