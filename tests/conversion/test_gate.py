"""Requirements on a conversion: how they are read, what they look at, and what becomes of a run that fails one."""

import json
import math
from pathlib import Path

import pytest
from tiny_conversion import CONTEXT, save_teacher, save_text, tiny_recipe
from typer.testing import CliRunner

from hf_memory.cli import app
from hf_memory.conversion.gate import FIGURES, check, failures, figure, parse, readable
from hf_memory.conversion.recipe import ConversionError, read_recipe


def quality(bits: float, **more: float) -> dict:
    return {"quality": {"whole": {"bits_per_token": bits, "bits_per_byte": bits / 2, **more}}}


@pytest.fixture
def report() -> dict:
    student = quality(2.2, kl_bits_per_token=0.05, agreement=0.9)
    student["cache"] = [{"tokens": n, "kv_bytes": n, "memory_bytes": 1024} for n in (16384, 32768)]
    student["speed"] = [{"context": n, "tokens_per_second": 1000.0 / n} for n in (10, 50, 20)]
    student["recall"] = {"accuracy": [[1.0, 0.5], [0.25, 0.25]]}
    models = {"teacher": quality(2.0), "student": student, "teacher, continued": quality(1.76)}
    names = {"student": "student", "reference": "teacher", "controls": {"continued": "teacher, continued"}}
    return {"title": "", "models": models, **names}


@pytest.mark.parametrize(
    ("text", "name", "operator", "limit"),
    [
        ("kl<0.05", "kl", "<", 0.05),
        (" gap_continued <= 3% ", "gap_continued", "<=", 0.03),
        ("agreement>.97", "agreement", ">", 0.97),
        ("cache_bytes@32768<64MiB", "cache_bytes", "<", 64 * 2**20),
        ("cache_bytes<1.5e6", "cache_bytes", "<", 1.5e6),
        ("gap>=-1%", "gap", ">=", -0.01),
        ("speed > 100", "speed", ">", 100),
    ],
)
def test_a_requirement_is_read(text, name, operator, limit):
    found = parse(text)
    assert (found.name, found.operator, found.limit) == (name, operator, pytest.approx(limit))
    assert found.text == text.strip()
    assert found.tokens == (32768 if "@" in text else 16384)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kl", "takes NAME OPERATOR VALUE, such as kl<0.05"),
        ("kl=0.05", "an operator <, <=, > or >="),
        ("kl<", "takes NAME OPERATOR VALUE"),
        ("kl<small", "takes NAME OPERATOR VALUE"),
        ("kl<1.2.3", "'1.2.3' is no number"),
        ("perplexity<3", "names perplexity, which is not measured: use bits, bits_per_byte, kl,"),
        ("kl<5%", "% does not belong to kl; percentages go with agreement, gap,"),
        ("speed>3MiB", "MiB does not belong to speed"),
        ("kl@100<1", "only cache_bytes takes a length"),
        ("cache_bytes@0<1", "at least 1"),
        ("kl<nan", "takes NAME OPERATOR VALUE"),
        ("cache_bytes<64MB", "MB is no unit: use %, KiB, MiB or GiB"),
        ("kl<5e", "e is no unit"),
        ("agreement>90", "'agreement>90': agreement is a share, from 0 to 1 or from 0% to 100%."),
        ("agreement>101%", "from 0% to 100%"),
        ("recall<-0.1", "recall is a share"),
    ],
)
def test_a_wrong_requirement_is_one_sentence(text, sentence):
    with pytest.raises(ConversionError) as caught:
        parse(text)
    assert sentence in str(caught.value)


def test_figures_are_those_of_the_student(report):
    found = {name: figure(report, name) for name in FIGURES}
    expected = {"bits": 2.2, "bits_per_byte": 1.1, "kl": 0.05, "agreement": 0.9, "gap": 0.1, "gap_continued": 0.25}
    assert found == pytest.approx(expected | {"recall": 0.5, "cache_bytes": 16384 + 1024, "speed": 20.0})
    assert figure(report, "cache_bytes", 32768) == 32768 + 1024
    for name in FIGURES:
        assert figure({"models": {}}, name) is None


@pytest.mark.parametrize(
    ("text", "passed"),
    [("kl<0.05", False), ("kl<=0.05", True), ("gap<10.1%", True), ("gap<9.9%", False), ("speed>=20", True)]
    + [("cache_bytes@32768>33KiB", False), ("cache_bytes@32768>=33KiB", True), ("cache_bytes@999<1GiB", False)],
)
def test_a_requirement_is_checked(report, text, passed):
    (entry,) = check(report, [text])
    assert entry["passed"] is passed
    assert failures({"gate": [entry]}) == ([] if passed else [text])
    assert json.loads(json.dumps(entry)) == entry


def test_what_is_not_finite_never_passes(report):
    for value in (math.nan, math.inf, -math.inf, None):
        report["models"]["student"]["quality"]["whole"]["kl_bits_per_token"] = value
        assert [entry["passed"] for entry in check(report, ["kl<1", "kl>1"])] == [False, False]
        assert readable("kl", value) == "not measured"


def test_values_are_readable():
    assert readable("gap", 0.0312) == "3.12%"
    assert readable("cache_bytes", 1536.0) == "1.5 KiB"
    assert readable("kl", 0.0123421) == "0.01234"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_a_failed_requirement_fails_the_command_and_keeps_the_model(teacher, text, tmp_path):
    recipe = tiny_recipe(teacher, text, tmp_path / "out", tokens=32, recall_samples=0)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    arguments = ["convert", "--recipe", str(tmp_path / "recipe.yaml")]
    arguments += ["--require", "kl<1e-9", "--require", "speed>0", "--controls", "off"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "Not met: kl<1e-9. The model and its report are kept." in result.stderr
    for cells in (("kl<1e-9", "FAILED"), ("speed>0", "passed")):
        assert any(all(cell in line for cell in cells) for line in result.stdout.splitlines())
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [(entry["require"], entry["passed"]) for entry in report["gate"]] == [("kl<1e-9", False), ("speed>0", True)]
    assert report["gate"][0]["measured"] == report["models"]["student"]["quality"]["whole"]["kl_bits_per_token"] > 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| kl<1e-9 |" in card and "does not meet the requirement kl<1e-9" in card


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"require": ["kl<"]}, "`require` takes NAME OPERATOR VALUE"),
        ({"require": ["gap_continued<3%"]}, "gap_continued, for which `controls` must have continued"),
        ({"require": ["recall>0.5"], "recall_samples": 0}, "for which `recall_samples` must be above 0"),
        ({"require": ["kl<1"], "data": None, "stages": "init"}, "`require` needs text to measure on"),
        ({"controls": ["continued"], "data": None, "stages": "init"}, "`controls` needs text to measure on"),
        ({"controls": ["on"]}, "`controls` must be made of off, continued, got 'on'"),
        ({"recall_samples": -1}, "`recall_samples` must be a whole number of at least 0"),
    ],
)
def test_a_recipe_that_cannot_be_measured_is_refused_before_anything_loads(flags, sentence):
    values = {"teacher": "nowhere", "output": "out", "data": "text.txt"} | flags
    with pytest.raises(ConversionError) as caught:
        read_recipe(flags=values)
    assert sentence in str(caught.value)


def test_recall_cannot_be_required_of_blocks_that_are_too_short(teacher, text, tmp_path):
    from hf_memory.conversion.run import convert

    with pytest.raises(ConversionError, match=f"blocks of {CONTEXT} tokens are too short to hide a line in"):
        convert(tiny_recipe(teacher, text, tmp_path / "out", require="recall>0.1"))
    assert list(tmp_path.iterdir()) == []


def test_caches_are_those_of_the_saved_model(tmp_path):
    """Keys and values of a model in bfloat16 take half as much as those that it is measured with on a CPU."""
    import torch
    from transformers import AutoConfig

    from hf_memory._cli.state_size import layer_states
    from hf_memory.conversion.run import convert, read_report

    teacher = save_teacher(tmp_path / "teacher", torch.bfloat16)
    recipe = tiny_recipe(teacher, save_text(tmp_path / "text.txt"), tmp_path / "out", stages="init", recall_samples=0)
    folder = convert(recipe)
    report = read_report(folder)
    for name, config in (("teacher", teacher), ("student", folder)):
        states = layer_states(AutoConfig.from_pretrained(config), torch.bfloat16)
        found = {size["tokens"]: size["kv_bytes"] + size["memory_bytes"] for size in report["models"][name]["cache"]}
        assert found[1024] == sum(state.after(1024) for state in states)
    assert report["environment"]["dtype"] == "float32"
