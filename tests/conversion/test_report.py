"""The report of a conversion as JSON, table, markdown and picture."""

import builtins
import copy
import io
import json
import math

import pytest
import torch
from rich.console import Console

from hf_memory.conversion.controls import MemoryOff
from hf_memory.conversion.report import (
    environment,
    markdown,
    markdown_table,
    measure,
    notes,
    rich_report,
    shortcomings,
    side_tables,
    write_report,
)
from hf_memory.conversion.report_plot import _bits_required
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
    console.print(rich_report(report))
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


@pytest.fixture
def gated(report) -> dict:
    """A report with everything that a conversion measures."""
    models = report["models"]
    off = {"quality": copy.deepcopy(models["student"]["quality"])}
    off["quality"]["block_bits"] = [[bits + 0.25 for bits in block] for block in off["quality"]["block_bits"]]
    continued = copy.deepcopy(models["teacher"])
    continued["quality"]["whole"]["bits_per_token"] = models["student"]["quality"]["whole"]["bits_per_token"] / 1.25
    models |= {"off": off, "continued": continued}
    for name, share in (("teacher", 0.75), ("student", 0.5), ("off", 0.25)):
        accuracy = [[1.0, share], [share, share]]
        models[name]["recall"] = {
            "lengths": [64, 128], "depths": [0.0, 1.0], "samples": 4, "choices": 8, "accuracy": accuracy,
        }  # fmt: skip

    def stage(name: str, bits: float) -> dict:
        whole = {"bits_per_byte": bits, "bits_per_token": bits, "kl_bits_per_token": bits / 10, "agreement": 0.5}
        return {"stage": name, "blocks": 2, "student": {"whole": whole}, "teacher": {"whole": {"bits_per_byte": 1.0}}}

    return report | {
        "controls": {"off": "off", "continued": "continued"},
        "stages": [stage("init", 3.0), stage("align", 2.0)],
        "gate": [
            {"require": "kl<0.1", "name": "kl", "limit": 0.1, "measured": 0.2, "passed": False, "tokens": 16384},
            {"require": "gap<10%", "name": "gap", "limit": 0.1, "measured": 0.05, "passed": True, "tokens": 16384},
            {"require": "bits_per_byte<9", "name": "bits_per_byte", "limit": 9, "measured": 7.0, "passed": True},
            {"require": "cache_bytes<1KiB", "name": "cache_bytes", "limit": 1024.0, "measured": None,
             "passed": False, "tokens": 16384},
        ],
    }  # fmt: skip


def test_stages_controls_recall_and_requirements_are_shown(gated, tmp_path):
    text = " ".join(printed(gated).split())
    for row in (
        "after init 3.0000 0.3000 50.0%",
        "after align 2.0000 0.2000 50.0%",
        "teacher 1.0000",
        "kl<0.1 0.2 FAILED",
        "gap<10% 5.00% passed",
        "cache_bytes<1KiB not measured FAILED",
        "recall over 64 tokens 88% 75% 62%",
        "recall over 128 tokens 75% 50% 25%",
        "The student needs 25.0% more bits than the teacher that was trained on",
        "the student needs 0.2500 bits per token less than with its memory off",
        "4 texts at each of 2 depths. Guessing gets one in 8.",
    ):
        assert row in text
    written = write_report(gated, tmp_path)
    assert written[2].read_bytes().startswith(b"\x89PNG")
    document = written[1].read_text()
    assert "| after align | 2.0000 | 0.2000 | 50.0% |" in document and "| kl<0.1 | 0.2 | FAILED |" in document


def test_what_is_worse_names_recall_and_what_was_not_met(gated):
    found = " ".join(shortcomings(gated))
    assert (
        "It recalls less than the teacher: 75% against 88% over 64 tokens, 50% against 75% over 128 tokens." in found
    )
    assert "does not meet the requirement kl<0.1," in found and "requirement cache_bytes<1KiB," in found
    assert "requirement gap" not in found


def test_lines_in_the_picture_are_where_the_requirements_are(gated):
    teacher = gated["models"]["teacher"]["quality"]["whole"]
    assert _bits_required(gated, "bits_per_byte") == [
        ("gap<10%", pytest.approx(1.1 * teacher["bits_per_byte"])),
        ("bits_per_byte<9", 9),
    ]
    assert _bits_required(gated, "bits_per_token") == [("gap<10%", pytest.approx(1.1 * teacher["bits_per_token"]))]


def test_a_report_without_stages_and_requirements_has_one_table(report):
    assert side_tables(report) == [] and side_tables(report | {"stages": [], "gate": []}) == []


def test_with_its_memories_off_a_model_is_measured_in_quality_alone():
    model = random_model(tiny_config("llama"))
    blocks = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(0))
    found = measure(
        {"model": model, "off": MemoryOff(model)}, blocks, reference="model", cache_contexts=(7,), speed_contexts=()
    )
    assert set(found["off"]) == {"quality"} and found["off"]["quality"]["whole"]["kl_bits_per_token"] == 0
    assert 7 in [size["tokens"] for size in found["model"]["cache"]]
