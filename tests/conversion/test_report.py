"""The report of a conversion as JSON, table, markdown and picture."""

import builtins
import copy
import io
import json
import math

import pytest
import torch
from rich.console import Console

from hf_memory.conversion.report import environment, markdown, markdown_table, measure, notes, rich_table, write_report
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


@pytest.fixture(scope="module")
def measured() -> dict:
    teacher, student = (random_model(tiny_config("llama"), seed=seed) for seed in range(2))
    blocks = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(0))
    models = {"teacher": teacher, "student": student}
    return measure(models, blocks, reference="teacher", bytes_per_token=1.0, speed_contexts=(4,))


@pytest.fixture
def report(measured) -> dict:
    models = copy.deepcopy(measured)
    for size in models["student"]["cache"]:
        size["kv_bytes"] //= 2
        size["memory_bytes"] = 3 * 1024
    curve = {"unit": "bits", "tokens": [10, 20, 30], "loss": [3.0, 0.2, 0.1]}
    return {
        "title": "A tiny conversion",
        "student": "student",
        "reference": "teacher",
        "converted": {"layers": [1], "of": 2, "memory": "titans", "mode": "replace"},
        "models": models,
        "curves": [{"stage": "align", "run": "student", **curve}, {"stage": "distill", "run": "control", **curve}],
        "baselines": {"xz -9e": 1.67},
        "notes": ["One more thing."],
        "environment": environment(),
    }


def printed(report: dict) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(rich_table(report))
    return console.file.getvalue()


def test_files_are_complete(report, tmp_path):
    written = write_report(report, tmp_path / "out")
    assert [file.name for file in written] == ["report.json", "report.md", "report.png"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in written}
    assert json.loads(written[0].read_text()) == report
    assert written[1].read_text() == markdown(report)
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_sentence(report, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    console = Console(width=200, file=io.StringIO())
    assert [file.name for file in write_report(report, tmp_path, console)] == ["report.json", "report.md"]
    assert console.file.getvalue() == (
        "No report.png: matplotlib is not installed (pip install 'hf-memory[plot]' brings it).\n"
    )


def test_what_is_not_finite_is_null(report, tmp_path):
    report["curves"][0]["loss"][1] = math.nan
    document = json.loads(write_report(report, tmp_path)[0].read_text())
    assert document["curves"][0]["loss"] == [3.0, None, 0.1]


def test_table_says_what_was_measured_and_what_still_grows(report):
    quality = report["models"]["student"]["quality"]["whole"]
    for text in (printed(report), markdown(report)):
        flat = " ".join(text.split())
        assert "held-out bits per byte" in flat and f"{quality['bits_per_byte']:.4f}" in flat
        assert f"{quality['agreement']:.1%}" in flat
        # Two tensors, 2 layers, 2 heads of width 16, 4 bytes: 512 bytes for a token, half of it in the student.
        assert "64.0 MiB" in flat and "32.0 MiB" in flat
        sentence = "Layer 0 keeps attention: the student's cache still grows with every token, by 256 bytes, where"
        assert sentence in flat and "the teacher's grows by 512. The memory of layer 1 takes 3.0 KiB" in flat
        assert "xz -9e: 1.6700 bits per byte" in flat and "One more thing." in flat


def test_markdown_is_a_table(report):
    lines = markdown_table(report).splitlines()
    assert lines[0] == "| | teacher | student |" and lines[1] == "|---|---:|---:|"
    assert len({line.count("|") for line in lines}) == 1


def test_missing_measurements_are_left_out(report, tmp_path):
    for model in report["models"].values():
        del model["quality"], model["speed"]
    del report["models"]["student"]["cache"]
    text = printed(report)
    assert "held-out bits" not in text and "decoding" not in text and "KL" not in text
    assert "cache of 16k tokens" in text and "still grows" not in text
    write_report(report, tmp_path / "some")
    write_report({"title": "Nothing", "models": {}}, tmp_path / "none")
    assert (tmp_path / "none" / "report.png").is_file()


def test_bits_per_token_where_bytes_are_unknown(report):
    report["models"]["student"]["quality"]["whole"]["bits_per_byte"] = None
    assert "held-out bits per token" in printed(report)


def test_a_cache_that_does_not_grow_is_said_so(report):
    report["converted"]["layers"] = [0, 1]
    for size in report["models"]["student"]["cache"]:
        size["kv_bytes"] = 0
    assert notes(report)[0] == "The cache does not grow. The memory of layers 0 and 1 takes 3.0 KiB at any length."


def test_no_converted_layer(report):
    report["converted"]["layers"] = []
    assert "The memory of" not in notes(report)[0]
