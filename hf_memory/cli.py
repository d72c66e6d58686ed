"""The command line: `hf-memory COMMAND`; `--help` lists them.

Exits with 1 if a check failed, 2 on wrong input.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_memory._cli import convert as conversion
from hf_memory._cli import generate as generation
from hf_memory._cli import hub, inspection
from hf_memory._cli import memory as memories
from hf_memory._cli import recipes as recipe_list
from hf_memory._cli.state_size import readable_size


# torch and transformers take seconds to import: only inside the commands.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_memory._cli.state_size import LayerState

app = typer.Typer(
    help="Memory-recurrent language models for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its id on the Hub.")]
DeviceOption = Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.')]
DtypeOption = Annotated[str, typer.Option(help='"float32", "bfloat16", ...; "auto" takes that of the checkpoint.')]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]

_DEBUG = {"on": False}


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    _DEBUG["on"] = debug


def _one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Errors as one sentence on stderr with exit code 2, unless `--debug`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if _DEBUG["on"]:
                raise
            from hf_memory._cli.loading import UserError

            text = " ".join(str(error).split()) or "no message"
            expected = isinstance(error, (UserError, ValueError))
            typer.echo(f"Error: {text}" if expected else f"Error: {type(error).__name__}: {text}", err=True)
            raise typer.Exit(2) from None

    return wrapped


app.command("generate")(_one_sentence(generation.command()))


@app.command()
@_one_sentence
def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CONFIG", help="Folder, Hub id, config.json, or a model type (defaults).")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Show configuration, parameters, state per layer, and how the state grows beside a key/value cache."""
    import torch

    from hf_memory._cli.loading import load_config, resolve_dtype
    from hf_memory._cli.state_size import CONTEXTS, build_without_weights, kv_cache_bytes, layer_states

    with _library_is_quiet():
        config = load_config(model, trust_remote_code)
        chosen = resolve_dtype(dtype)
        if chosen == "auto":
            chosen = config.get_text_config(decoder=True).dtype or torch.float32
        states = layer_states(config, chosen)
        skeleton = build_without_weights(config, chosen)
    growth = {
        tokens: (sum(state.after(tokens) for state in states), kv_cache_bytes(config, chosen, tokens))
        for tokens in CONTEXTS
    }
    embeddings = skeleton.num_parameters() - skeleton.num_parameters(exclude_embeddings=True)
    summary = {
        "model_type": config.model_type,
        "class": type(skeleton).__name__,
        "dtype": str(chosen).removeprefix("torch."),
        "parameters": skeleton.num_parameters(),
        "embedding_parameters": embeddings,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in skeleton.parameters()),
    }
    if as_json:
        layers = [
            {"kind": s.kind, "bytes": s.first, "bytes_per_token": s.per_token, "window": s.window} for s in states
        ]
        rows = [{"tokens": n, "state_bytes": own, "kv_cache_bytes": kv} for n, (own, kv) in growth.items()]
        document = {**summary, "config": config.to_diff_dict(), "layers": layers, "growth": rows}
        typer.echo(json.dumps(document, indent=2, default=str))
        return
    console = _console()
    console.print(_summary_table(config, summary))
    console.print(_layer_table(states))
    console.print(_growth_table(growth))


@app.command()
@_one_sentence
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions and devices, and check every form of every op against the float64 reference."""
    from hf_memory._cli.diagnosis import as_dict, devices, self_checks, versions

    version_list, device_list = versions(), devices()
    checks = self_checks([device["name"] for device in device_list])
    report = as_dict(version_list, device_list, checks)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        raise typer.Exit(0 if report["ok"] else 1)
    console = _console()
    table = Table("package", "installed", "supported", "verdict", title="Versions")
    for entry in version_list:
        style = {"ok": "green", "too old": "red"}.get(entry.verdict, "yellow")
        table.add_row(entry.name, entry.installed or "", entry.supported, f"[{style}]{entry.verdict}[/]")
    console.print(table)
    table = Table("device", "what it is", title="Devices")
    for device in device_list:
        table.add_row(device["name"], device["description"])
    console.print(table)
    table = Table("op", "device", "form", "used", "error against float64", title="Ops")
    for check in checks:
        result = f"{check.error:.1e}" if check.error is not None else escape(check.problem)
        verdict = "[green]ok[/]" if check.ok else "[bold red]fails[/]"
        table.add_row(check.op, check.device, check.form, "by default" if check.default else "", f"{result} {verdict}")
    console.print(table)
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
@_one_sentence
def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id; with --random also a model type or config.json.")
    ],
    random: Annotated[bool, typer.Option("--random", help="Check a tiny random model of that architecture.")] = False,
    budget: Annotated[str, typer.Option(help='"quick" (seconds on a tiny model) or "full" (minutes).')] = "quick",
    property_names: Annotated[
        list[str] | None, typer.Option("--property", metavar="NAME", help="Only this property; may be repeated.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report there.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random inputs.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Check what every causal language model with a cache has to keep: splits, padding, packing, beams, saving."""
    from hf_memory._cli.loading import UserError
    from hf_memory.evaluation import check_model

    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"There is no folder {str(json_file.parent)!r} to write {json_file.name!r} to.")
    console = _console()
    with _library_is_quiet(), console.status("loading") as status:
        subject = _subject(model, random, seed, device, dtype, trust_remote_code)
        report = check_model(
            subject, property_names, budget, seed, on_start=lambda name: status.update(f"checking {name}")
        )
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n", encoding="utf-8")
    console.print(report.table())
    raise typer.Exit(1 if report.failed else 0)


app.command("convert", epilog=conversion.EPILOG)(_one_sentence(conversion.command()))
app.command("recipes")(_one_sentence(recipe_list.recipes))
app.command("card")(_one_sentence(hub.card))
app.command("push")(_one_sentence(hub.push))
app.command("read")(_one_sentence(memories.read))
app.command("inspect")(_one_sentence(inspection.inspect))
memory_app = typer.Typer(help="Memory files: what a model has read.", no_args_is_help=True)
memory_app.command("info")(_one_sentence(memories.info))
app.add_typer(memory_app, name="memory")


def _subject(
    source: str, random: bool, seed: int, device: str, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    from hf_memory._cli.loading import load_config, load_model, resolve_device, resolve_dtype
    from hf_memory.evaluation.properties_tiny import random_model, tiny_config

    if not random:
        return load_model(source, device, dtype, trust_remote_code)
    import torch
    from transformers import CONFIG_MAPPING

    known = not Path(source).exists() and source in CONFIG_MAPPING
    model = random_model(tiny_config(source if known else load_config(source, trust_remote_code)), seed)
    chosen, place = resolve_dtype(dtype), resolve_device(device)
    if place.type == "cpu":
        # Threads only wait for each other on tensors this small.
        torch.set_num_threads(1)
    return model.to(place, None if chosen == "auto" else chosen)


def _console() -> Console:
    # Tables that go to a file or a pipe are not squeezed into the 80 columns that rich assumes there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _library_is_quiet() -> Any:
    from hf_memory.evaluation.properties_subject import quiet

    return quiet()


def _summary_table(config: PreTrainedConfig, summary: dict[str, Any]) -> Table:
    table = Table("", "", title=f"{summary['class']} ({summary['model_type']})", show_header=False)
    table.add_row("parameters", f"{summary['parameters']:,}")
    table.add_row("of these embeddings", f"{summary['embedding_parameters']:,}")
    table.add_row("size", f"{readable_size(summary['parameter_bytes'])} in {summary['dtype']}")
    table.add_section()
    for name, value in sorted(config.get_text_config(decoder=True).to_diff_dict().items()):
        if name not in ("architectures", "transformers_version", "model_type", "dtype"):
            table.add_row(name, escape(_shortened(value)))
    return table


def _layer_table(states: list[LayerState]) -> Table:
    table = Table("layers", "kind", "bytes", "", "grows", title="State per layer and sample, after one token")
    runs: list[list[int]] = []
    for index, state in enumerate(states):
        if runs and states[runs[-1][-1]] == state:
            runs[-1].append(index)
        else:
            runs.append([index])
    for run in runs:
        state = states[run[0]]
        grows = f"{state.per_token:,} bytes a token" if state.per_token else "no"
        until = f", up to {state.window:,} tokens" if state.window is not None else ""
        places = f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}"
        table.add_row(places, state.kind, f"{state.first:,}", readable_size(state.first), grows + until)
    total = sum(state.first for state in states)
    table.add_section()
    table.add_row("all", "", f"{total:,}", readable_size(total), "")
    return table


def _growth_table(growth: dict[int, tuple[int, int]]) -> Table:
    table = Table(
        title="State of one sample by length of the context, beside a key/value cache of the same dimensions"
    )
    for column in ("tokens", "state", "key/value cache", "state / cache"):
        table.add_column(column, justify="right")
    for tokens, (own, cache) in growth.items():
        table.add_row(f"{tokens:,}", readable_size(own), readable_size(cache), f"{own / cache:.3g}")
    return table


def _shortened(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4 and len(set(map(str, value))) == 1:
        return f"{len(value)} x {value[0]}"
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


if __name__ == "__main__":
    app()
