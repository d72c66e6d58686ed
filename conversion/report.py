"""The report of a conversion: what was measured, as JSON, as a table, and as a picture.

A report is a plain dictionary:

    title       str
    converted   {"layers": [int], "of": int, "memory": str, "mode": str}
    student     name of the converted model in `models`
    reference   name of the model that the others are compared with (the teacher)
    models      {name: {"parameters": int, "quality": ..., "cache": [...], "speed": [...], "recall": ...}}, see
                `measure` and `probe`
    curves      [{"stage": str, "run": str, "unit": str, "tokens": [int], "loss": [float]}]
    controls    {"off": name in `models` of the student with its memories off, "continued": of the teacher trained on}
    stages      [{"stage": str, "blocks": int, "student": {...}, "teacher": {...}}], see `assessment`
    gate        [{"require": str, "measured": float, "passed": bool, ...}], see `gate`
    baselines   {name: bits per byte of something that is not a model}
    notes       [str]
    environment see `environment`

Everything but `title` and `models` may be missing: what was not measured is left out of table and picture.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from hf_memory._cli.state_size import readable_size
from hf_memory.conversion.controls import MemoryOff
from hf_memory.conversion.evaluate import (
    CACHE_CONTEXTS,
    SPEED_CONTEXTS,
    Progress,
    cache_growth,
    decode_speeds,
    evaluate_models,
    paired_difference,
)
from hf_memory.conversion.gate import failures, figure, readable
from hf_memory.conversion.report_plot import plot
from hf_memory.hub.cards import listed


if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = dict[str, Any]

_CURVE_CONTEXTS = tuple(2**power for power in range(8, 21))


def measure(
    models: Mapping[str, PreTrainedModel | MemoryOff],
    blocks: torch.Tensor,
    *,
    reference: str | None = None,
    bytes_per_token: float | None = None,
    speed_contexts: Sequence[int] = SPEED_CONTEXTS,
    cache_contexts: Sequence[int] = (),
    cache_dtype: torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """
    Quality, cache sizes and decoding speed of several models, as the entry `models` of a report.

    Args:
        models: causal language models by name, in the order of the table. Of one with its memories off the quality
            alone is measured: the rest is that of the model itself.
        blocks: held-out text, `[N, T]` int64, without padding. The speed is measured on it too.
        reference: name of the model that the others are compared with. Default: no comparison.
        bytes_per_token: of the held-out text. Default: bits per token only.
        speed_contexts: lengths behind which decoding is timed. Default: 1k and 8k; empty leaves it out.
        cache_contexts: lengths at which the cache is measured beside those of the table and the picture.
        cache_dtype: of the keys and values that are counted. Default: that of each model as it is here.
        on_progress: called as `on_progress(done, N)` while the blocks are read.

    Raises:
        ValueError: what `evaluate_models` refuses.
    """
    qualities = evaluate_models(
        models, blocks, reference=reference, bytes_per_token=bytes_per_token, on_progress=on_progress
    )
    contexts = sorted({*CACHE_CONTEXTS, *_CURVE_CONTEXTS, *cache_contexts})
    whole = {name: model for name, model in models.items() if not isinstance(model, MemoryOff)}
    speeds = decode_speeds(whole, speed_contexts, tokens=blocks.flatten()) if speed_contexts else {}
    measured: dict[str, Any] = {name: {"quality": asdict(quality)} for name, quality in qualities.items()}
    for name, model in whole.items():
        measured[name] = {
            "parameters": model.num_parameters(),
            **measured[name],
            "cache": [asdict(size) for size in cache_growth(model.config, cache_dtype or model.dtype, contexts)],
            "speed": [asdict(speed) for speed in speeds.get(name, [])],
        }
    return measured


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions and device that the figures of a report belong to."""
    import transformers

    import hf_memory

    device = torch.device(device)
    threads = torch.get_num_threads()
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {threads} {'thread' if threads == 1 else 'threads'}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_memory": hf_memory.__version__,
    }


def write_report(report: Report, folder: Path | str, console: Console | None = None) -> list[Path]:
    """
    Write `report.json`, `report.md`, and where matplotlib is installed `report.png`, each complete or not at all.

    Args:
        folder: where to; made if it is not there.
        console: where a missing matplotlib is said. Default: standard output.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    written = [
        _replace(folder / "report.json", text.encode()),
        _replace(folder / "report.md", markdown(report).encode()),
    ]
    beside = folder / ".report.part.png"
    try:
        plot(report, beside)
    except ImportError:
        (console or Console()).print(
            "No report.png: matplotlib is not installed (pip install 'hf-memory\\[plot]' brings it)."
        )
    else:
        os.replace(beside, folder / "report.png")
        written.append(folder / "report.png")
    return written


def rows(report: Report) -> list[tuple[str, list[str]]]:
    """Label and one cell per model, as text, of everything that was measured on at least one model."""
    models = list(report["models"].values())
    per_byte = all(_whole(model).get("bits_per_byte") is not None for model in models if _whole(model))
    unit, key = ("byte", "bits_per_byte") if per_byte else ("token", "bits_per_token")
    found = [("parameters", [f"{model['parameters']:,}" if "parameters" in model else "" for model in models])]
    found.append((f"held-out bits per {unit}", [_number(_whole(model).get(key), ".4f") for model in models]))
    parts = max((_parts(model) for model in models), key=len, default=[])
    if len(parts) > 1:
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            label = (
                f"  from token {part['start']:,} on" if last else f"  tokens {part['start']:,} to {part['end'] - 1:,}"
            )
            cells = [_number(_parts(model)[index].get(key), ".4f") if _parts(model) else "" for model in models]
            found.append((label if index else f"  first {part['end']:,} tokens", cells))
    reference = report.get("reference", "teacher")
    found.append(
        (
            f"KL({reference} || model), bits per token",
            [_number(_whole(m).get("kl_bits_per_token"), ".4f") for m in models],
        )
    )
    found.append(
        (f"likeliest token that of the {reference}", [_number(_whole(m).get("agreement"), ".1%") for m in models])
    )
    for tokens in CACHE_CONTEXTS:
        sizes = [_at(model.get("cache", []), "tokens", tokens) for model in models]
        cells = [readable_size(_cache_bytes(size)) if size else "" for size in sizes]
        found.append((f"cache of {tokens // 1024}k tokens", cells))
        found.append(("  of it keys and values", [readable_size(size["kv_bytes"]) if size else "" for size in sizes]))
    for context in sorted({speed["context"] for model in models for speed in model.get("speed", [])}):
        speeds = [_at(model.get("speed", []), "context", context) for model in models]
        cells = [_number(speed.get("tokens_per_second"), ",.0f") for speed in speeds]
        found.append((f"decoding behind {context:,} tokens, tokens/s", cells))
    return [(label, cells) for label, cells in found + _recall_rows(models) if any(cells)]


def _recall_rows(models: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    lengths = sorted({length for model in models for length in model.get("recall", {}).get("lengths", [])})
    found = []
    for length in lengths:
        cells = []
        for model in models:
            recall = model.get("recall", {})
            asked = dict(zip(recall.get("lengths", []), recall.get("accuracy", [])))
            cells.append(f"{sum(asked[length]) / len(asked[length]):.0%}" if length in asked else "")
        found.append((f"recall over {length:,} tokens", cells))
    return found


def notes(report: Report) -> list[str]:
    """Sentences under the table: what keeps growing, what the figures stand beside, and the report's own notes."""
    found = []
    if (growth := _growth_note(report)) is not None:
        found.append(growth)
    found += _control_notes(report)
    if (recall := report["models"].get(report.get("student", "student"), {}).get("recall")) is not None:
        texts = f"{recall['samples']} text{'s' if recall['samples'] > 1 else ''}"
        found.append(
            f"Recall: how often, of {recall['choices']} values, the one that stood once in the text is likeliest when "
            f"asked for; {texts} at each of {len(recall['depths'])} depths. Guessing gets one in {recall['choices']}."
        )
    for name, bits in report.get("baselines", {}).items():
        found.append(f"{name}: {bits:.4f} bits per byte of the same held-out text.")
    found += report.get("notes", [])
    if where := report.get("environment"):
        versions = ", ".join(f"{name} {where[name]}" for name in ("python", "torch", "transformers", "hf_memory"))
        dtype = f" in {where['dtype']}" if "dtype" in where else ""
        found.append(f"Measured{dtype} on {where['device']}; {versions}.")
    return found


def _control_notes(report: Report) -> list[str]:
    """The student against its teacher, and against both controls."""
    models, student, controls = report["models"], report.get("student", "student"), report.get("controls", {})
    found = []
    against = (
        ("gap", f"its {report.get('reference', 'teacher')}"),
        ("gap_continued", "the teacher that was trained on with as many tokens of the same text"),
    )
    for name, what in against:
        if (gap := figure(report, name)) is not None and controls:
            found.append(f"The {student} needs {abs(gap):.1%} {'more' if gap > 0 else 'less'} bits than {what}.")
    off = models.get(controls.get("off"), {}).get("quality")
    if off and (parts := _parts(models.get(student, {}))):
        where = f"From token {parts[-1]['start']:,} on" if len(parts) > 1 else "Over whole blocks"
        gain, error = paired_difference(models[student]["quality"]["block_bits"], off["block_bits"], part=-1)
        sure = f" (standard error over blocks {error:.4f})" if math.isfinite(error) else ""
        found.append(
            f"{where} the {student} needs {abs(gain):.4f} bits per token {'less' if gain > 0 else 'more'} than with "
            f"its memory off{sure}."
        )
    return found


def shortcomings(report: Report) -> list[str]:
    """Sentences on everything that was measured in which the student is worse than the reference."""
    student, name = report["models"].get(report.get("student", "student")), report.get("reference", "teacher")
    reference = report["models"].get(name)
    if student is None or reference is None or student is reference:
        return []
    found = []
    for key, unit in (("bits_per_byte", "byte"), ("bits_per_token", "token")):
        own, others = _whole(student).get(key), _whole(reference).get(key)
        if own is not None and others is not None:
            found += _loss_shortcomings(student, reference, name, key, unit)
            break
    agreement = _whole(student).get("agreement")
    if agreement is not None and agreement < 1:
        found.append(f"At {1 - agreement:.1%} of the tokens another next token is likeliest than with the {name}.")
    for speed in student.get("speed", []):
        own = speed.get("tokens_per_second")
        others = _at(reference.get("speed", []), "context", speed["context"]).get("tokens_per_second")
        if own is not None and others is not None and own < others:
            found.append(
                f"Behind {speed['context']:,} tokens it decodes {own:,.0f} tokens/s, the {name} {others:,.0f} "
                f"({1 - own / others:.0%} slower)."
            )
    for tokens in CACHE_CONTEXTS:
        own, others = (_cache_bytes(_at(model.get("cache", []), "tokens", tokens)) for model in (student, reference))
        if others and own > others:
            sizes = f"{readable_size(own)} against {readable_size(others)}"
            found.append(f"At {tokens:,} tokens its cache is larger: {sizes}.")
    own, others = student.get("parameters"), reference.get("parameters")
    if own and others and own > others:
        found.append(f"It has {own / others - 1:.0%} more parameters.")
    found += _recall_shortcomings(student, reference, name)
    found += [f"It does not meet the requirement {text}, which its conversion was given." for text in failures(report)]
    return found


def _recall_shortcomings(student: dict, reference: dict, name: str) -> list[str]:
    mine, theirs = (model.get("recall") for model in (student, reference))
    if not mine or not theirs:
        return []
    behind = []
    for length, own, others in zip(mine["lengths"], mine["accuracy"], theirs["accuracy"]):
        if sum(own) < sum(others):
            pair = (f"{sum(row) / len(row):.0%}" for row in (own, others))
            behind.append(f"{' against '.join(pair)} over {length:,} tokens")
    return [f"It recalls less than the {name}: {', '.join(behind)}."] if behind else []


def _loss_shortcomings(student: dict, reference: dict, name: str, key: str, unit: str) -> list[str]:
    own, others = _whole(student)[key], _whole(reference)[key]
    found = []
    if own > others > 0:
        found.append(
            f"It needs {own / others - 1:.1%} more bits than the {name}: {own:.4f} against {others:.4f} per {unit}."
        )
    parts = [pair for pair in zip(_parts(student), _parts(reference)) if None not in (part.get(key) for part in pair)]
    mine, theirs = max(parts, key=lambda pair: pair[0][key] - pair[1][key], default=({key: 0}, {key: 0}))
    # The whole says it already, unless this part is worse than that.
    if mine[key] - theirs[key] > max(own - others, 0):
        where = f"tokens {mine['start']:,} to {mine['end'] - 1:,} of a text"
        found.append(f"It is furthest behind over {where}: {mine[key]:.4f} against {theirs[key]:.4f} bits per {unit}.")
    return found


def rich_table(report: Report) -> Table:
    """The table for a terminal, with the notes as its caption."""
    table = Table("", title=escape(report["title"]), box=SIMPLE, caption_justify="left", title_justify="left")
    table.caption = escape("\n".join(notes(report)))
    for name in report["models"]:
        table.add_column(escape(name), justify="right")
    for label, cells in rows(report):
        table.add_row(escape(label), *cells)
    return table


def rich_report(report: Report) -> Group:
    """The table of the models, with the notes, and below it those of the stages and of the requirements."""
    tables = [rich_table(report)]
    for title, header, lines in side_tables(report):
        table = Table(*header, title=title, box=SIMPLE, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for line in lines:
            table.add_row(*map(escape, line))
        tables.append(table)
    return Group(*tables)


def side_tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of the tables beside that of the models: the stages and the requirements."""
    found = []
    if stages := report.get("stages"):
        per_byte = stages[0]["student"]["whole"].get("bits_per_byte") is not None
        unit, key = ("byte", "bits_per_byte") if per_byte else ("token", "bits_per_token")
        header = ["", f"bits per {unit}", "KL, bits per token", "agreement"]
        lines = [[f"after {stage['stage']}", *_stage_cells(stage["student"]["whole"], key)] for stage in stages]
        lines.append(["teacher", *_stage_cells(stages[0]["teacher"]["whole"], key)])
        blocks = stages[0]["blocks"]
        found.append((f"Stage by stage, on {blocks} held-out block{'s' if blocks > 1 else ''}", header, lines))
    if gate := report.get("gate"):
        lines = [
            [entry["require"], readable(entry["name"], entry["measured"]), "passed" if entry["passed"] else "FAILED"]
            for entry in gate
        ]
        found.append(("Requirements", ["required", "measured", "result"], lines))
    return found


def _stage_cells(whole: dict[str, Any], key: str) -> list[str]:
    return [
        _number(whole.get(key), ".4f"),
        _number(whole.get("kl_bits_per_token"), ".4f"),
        _number(whole.get("agreement"), ".1%"),
    ]


def markdown_table(report: Report) -> str:
    """The table of the models in GitHub's markdown."""
    lines = []
    for label, cells in rows(report):
        name = "\u2003" + label.strip() if label.startswith(" ") else label
        lines.append([name.replace("||", "‖"), *cells])
    return _markdown(["", *report["models"]], lines)


def markdown_tables(report: Report) -> str:
    """That table, and those of the stages and of the requirements."""
    others = [f"{title}:\n\n{_markdown(header, lines)}" for title, header, lines in side_tables(report)]
    return "\n\n".join([markdown_table(report), *others])


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    written = ["| " + " | ".join(header).lstrip() + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*written, *("| " + " | ".join(line) + " |" for line in lines)])


def markdown(report: Report) -> str:
    """Title, tables and notes."""
    sentences = "\n".join(f"- {note}" for note in notes(report))
    return f"## {report['title']}\n\n{markdown_tables(report)}\n" + (f"\n{sentences}\n" if sentences else "")


def _growth_note(report: Report) -> str | None:
    """How fast the cache of the student still grows, and which layers are the reason."""
    models, converted = report["models"], report.get("converted")
    student, reference = report.get("student", "student"), report.get("reference", "teacher")
    if not converted or not models.get(student, {}).get("cache"):
        return None
    kept = [layer for layer in range(converted["of"]) if layer not in converted["layers"]]
    rate, memory = _bytes_per_token(models[student]), models[student]["cache"][-1]["memory_bytes"]
    layers = listed("layer", converted["layers"])
    fixed = f" The memory of {layers} takes {readable_size(memory)} at any length." if layers else ""
    if not rate:
        return f"The cache does not grow.{fixed}"
    compared = ""
    if models.get(reference, {}).get("cache"):
        compared = f", where the {reference}'s grows by {_bytes_per_token(models[reference]):,}"
    reason = f"{listed('Layer', kept)} keep{'s' if len(kept) == 1 else ''} attention" if kept else "Attention is kept"
    return f"{reason}: the {student}'s cache still grows with every token, by {rate:,} bytes{compared}.{fixed}"


def _bytes_per_token(model: dict[str, Any]) -> int:
    """Growth between the two longest contexts: what a window bounds has stopped growing there."""
    before, last = sorted(model["cache"], key=lambda size: size["tokens"])[-2:]
    return (last["kv_bytes"] - before["kv_bytes"]) // (last["tokens"] - before["tokens"])


def _whole(model: dict[str, Any]) -> dict[str, Any]:
    return model.get("quality", {}).get("whole", {})


def _parts(model: dict[str, Any]) -> list[dict[str, Any]]:
    return model.get("quality", {}).get("parts", [])


def _cache_bytes(size: dict[str, Any]) -> int:
    return size.get("kv_bytes", 0) + size.get("memory_bytes", 0)


def _at(entries: list[dict[str, Any]], key: str, value: int) -> dict[str, Any]:
    return next((entry for entry in entries if entry[key] == value), {})


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(file: Path, content: bytes) -> Path:
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(content)
    os.replace(beside, file)
    return file
