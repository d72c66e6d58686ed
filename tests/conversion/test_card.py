"""The card of a converted model: metadata, no local paths, and nothing claimed that was not measured."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_memory.conversion.card import refill_card, teacher_name, write_card, write_recipe
from hf_memory.conversion.report import shortcomings
from hf_memory.evaluation.properties_tiny import tiny_config
from hf_memory.hub.cards import CardError
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig


SPAN = {"start": 1, "end": 64, "bits_per_token": 2.0, "bits_per_byte": 1.5, "kl_bits_per_token": 0.1, "agreement": 0.9}
REPORT = {
    "title": "t",
    "text": "the held-out packages of the standard library",
    "models": {"student": {"parameters": 12, "quality": {"whole": SPAN, "parts": [SPAN], "curve": []}}},
}


def hybrid(**fields) -> MemoryHybridConfig:
    teacher = tiny_config("llama", num_hidden_layers=4)
    return MemoryHybridConfig.from_teacher(teacher, memory={"memory_depth": 1}, **{"memory_layers": [1, 3]} | fields)


@pytest.fixture
def config() -> MemoryHybridConfig:
    return hybrid()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-hybrid"
    path.mkdir()
    return path


def make(folder, config, teacher: str, **options) -> tuple[ModelCard, str]:
    file = write_card(folder, config=config, teacher=teacher, **options)
    assert [path.name for path in folder.glob("*.md")] == ["README.md"] and not list(folder.glob(".*"))
    return ModelCard.load(file), file.read_text(encoding="utf-8")


def test_metadata_of_a_teacher_on_the_hub(folder, config):
    card, text = make(folder, config, "someone/teacher-1b", report=REPORT)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "someone/teacher-1b" and data["base_model_relation"] == "finetune"
    assert {"hf-memory", "memory_hybrid", "titans", "llama"} <= set(data["tags"])
    assert "license" not in data
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"bits_per_byte": 1.5, "bits_per_token": 2.0, "kl_bits_per_token": 0.1, "agreement": 0.9}
    assert "in place of the self-attention of layers 1 and 3 of 4" in text
    assert "| held-out bits per byte | 1.5000 |" in text
    assert "Measured on the held-out packages" in text


def test_a_teacher_in_a_folder_gives_its_name_and_license(folder, config, tmp_path):
    teacher = tmp_path / "my-teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [secret]\n---\n# Teacher\n")
    recipe = {
        "teacher": str(teacher),
        "output": str(folder),
        "data": [str(tmp_path / "a" / "text.txt"), "someone/dataset:train"],
        "held_out": str(tmp_path / "b" / "other.txt"),
        "stages": [{"name": "init"}, {"name": "align", "tokens": 1_000_000, "lr": 1e-3}],
    }
    card, text = make(folder, config, str(teacher), recipe=recipe, report=REPORT)
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["language"] == "en" and "secret" not in data["tags"]
    assert "base_model" not in data and data["datasets"] == ["someone/dataset"]
    assert str(tmp_path) not in text and "`my-teacher` with" in text
    assert "Stage `align` (1,000,000 tokens, learning rate 0.001)" in text
    shown = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert shown["teacher"] == "./my-teacher" and shown["data"] == ["./text.txt", "someone/dataset:train"]
    assert shown["held_out"] == "./other.txt" and "output" not in shown


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_are_told_of(folder, config, merge):
    stage = {"name": "distill", "tokens": 5, "lr": 1e-3, "trainable": "all", "lora_rank": 4, "lora_merge": merge}
    card, text = make(folder, config, "t", recipe={"data": "teacher", "stages": [stage]})
    assert "datasets" not in card.data.to_dict()
    assert "It trained adapters of rank 4" in text and "All weights were trained" not in text
    assert ('`PeftModel.from_pretrained(model, "my-hybrid", subfolder="adapter")`' in text) != merge


@pytest.mark.parametrize("readme", ["no metadata at all\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_a_teacher_whose_card_says_nothing(folder, config, tmp_path, readme):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text(readme)
    card, _ = make(folder, config, str(tmp_path / "teacher"))
    assert "license" not in card.data.to_dict()


def test_code_and_picture_are_mentioned_where_they_are(folder, config):
    _, without = make(folder, config, "a/b", report=REPORT)
    assert "trust_remote_code" not in without and "It comes without code of its own" in without
    assert "report.png" not in without
    for name in ("modeling_x.py", "report.png", "tokenizer_config.json"):
        (folder / name).write_bytes(b"")
    _, text = make(folder, config, "a/b", report=REPORT)
    assert "trust_remote_code=True" in text and "](report.png)" in text and "AutoTokenizer" in text
    for block in text.split("```python")[1:]:
        compile(block.split("```")[0], "README.md", "exec")


def test_nothing_measured_and_no_recipe(folder, config):
    _, text = make(folder, config, "a/b")
    assert "Nothing was measured on this model." in text and "```yaml" not in text
    assert "all that was measured" not in text and "2 of 4 layers keep their attention" in text


def test_retrofit_and_no_layer(folder):
    retrofit = hybrid(memory_mode="retrofit", memory_window=512)
    _, text = make(folder, retrofit, "a/b")
    assert "beside the self-attention of layers 1 and 3 of 4 (counted from 0), which sees\n512 tokens only" in text
    _, text = make(folder, hybrid(memory_layers=[]), "a/b")
    assert "no layer is converted" in text and "The memory of a head" not in text and "# my-hybrid" in text


def model(bits: float, first: float, speed: float, cache: int, parameters: int) -> dict:
    spans = [{"start": 1, "end": 64, "bits_per_byte": first}, {"start": 64, "end": 128, "bits_per_byte": bits}]
    return {
        "parameters": parameters,
        "quality": {"whole": {"bits_per_byte": bits, "agreement": 0.9}, "parts": spans},
        "speed": [{"context": 1024, "tokens_per_second": speed}],
        "cache": [{"tokens": 1024, "kv_bytes": cache, "memory_bytes": 0}],
    }


def test_every_figure_in_which_a_student_is_worse_has_a_sentence():
    report = {"models": {"teacher": model(1.0, 1.0, 100.0, 1024, 100), "student": model(1.1, 1.3, 60.0, 2048, 130)}}
    assert shortcomings(report) == [
        "It needs 10.0% more bits than the teacher: 1.1000 against 1.0000 per byte.",
        "It is furthest behind over tokens 1 to 63 of a text: 1.3000 against 1.0000 bits per byte.",
        "At 10.0% of the tokens another next token is likeliest than with the teacher.",
        "Behind 1,024 tokens it decodes 60 tokens/s, the teacher 100 (40% slower).",
        "At 1,024 tokens its cache is larger: 2.0 KiB against 1.0 KiB.",
        "It has 30% more parameters.",
    ]
    better = {"models": {"teacher": report["models"]["student"], "student": report["models"]["teacher"]}}
    assert shortcomings(better) == ["At 10.0% of the tokens another next token is likeliest than with the teacher."]
    assert shortcomings({"models": {"student": report["models"]["student"]}}) == []


def test_a_card_is_filled_again_from_the_files_beside_it(folder, config):
    config.save_pretrained(folder)
    (folder / "report.json").write_text(json.dumps(REPORT))
    write_recipe(folder, {"teacher": "/somewhere/my-teacher", "data": "someone/dataset:train", "stages": []})
    assert "/somewhere" not in (folder / "recipe.yaml").read_text()
    refill_card(folder, {"license": "mit", "language": ["en"]})
    card = ModelCard.load(refill_card(folder))
    assert card.data.license == "mit" and card.data.language == ["en"] and card.data.datasets == ["someone/dataset"]
    assert "# my-teacher with Titans memory" in card.text and "| held-out bits per byte | 1.5000 |" in card.text
    (folder / "report.json").unlink()
    assert "Nothing was measured" in refill_card(folder, {"license": "apache-2.0"}).read_text()
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"


def test_what_cannot_be_filled_stays_as_it_is(folder, config):
    config.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nby hand\n")
    with pytest.raises(CardError, match="was written by hand"):
        refill_card(folder)
    assert "by hand" in (folder / "README.md").read_text()
    assert ModelCard.load(refill_card(folder, replace=True)).data.license == "mit"
    for name, text in {"report.json": "{", "recipe.yaml": "- a list"}.items():
        (folder / name).write_text(text)
        with pytest.raises(CardError, match=f"{name}.* cannot be read"):
            refill_card(folder)
        (folder / name).unlink()
    (folder / "report.json").write_text('{"other": 1}')
    with pytest.raises(CardError, match="is no report of hf-memory"):
        refill_card(folder)
    for models in ({"student": 1}, {"student": {"quality": {"whole": "much"}}}, {"student": {"speed": [{}]}}):
        (folder / "report.json").write_text(json.dumps({"models": models}))
        with pytest.raises(CardError, match="does not have the form of a report"):
            refill_card(folder)
    tiny_config("llama").save_pretrained(folder)
    with pytest.raises(CardError, match="holds a llama model"):
        refill_card(folder)


def test_names_of_teachers(tmp_path):
    (tmp_path / "folder").mkdir()
    assert teacher_name(str(tmp_path / "folder") + "/") == ("folder", False)
    assert teacher_name("someone/model") == ("someone/model", True)
    assert teacher_name("/gone/away/model") == ("model", False)


@pytest.mark.parametrize(
    ("stage", "said", "unsaid"),
    [
        (
            {"name": "distill", "kl_weight": 1.0, "ce_weight": 0.0},
            "learns the teacher's distribution",
            "cross entropy",
        ),
        ({"name": "distill", "kl_weight": 0, "ce_weight": 1.0}, "learns the next token of the text", "distribution"),
        (
            {"name": "distill", "kl_weight": 0.1, "ce_weight": 1.0},
            "learns the teacher's distribution of the next token, and the next token of the text",
            "All weights",
        ),
        ({"name": "align", "target": "block", "trainable": "all"}, "All weights of those layers", "the teacher's too"),
        ({"name": "distill", "trainable": "all"}, "All weights were trained in it, the teacher's too", "those layers"),
        (
            {"name": "align", "tokens": 5000, "lr": 1.0, "stop_below": 0.1},
            "Stage `align` (at most 5,000 tokens, learning rate 1)",
            "(5,000",
        ),
    ],
)
def test_a_stage_is_told_as_it_was(folder, config, stage, said, unsaid):
    _, text = make(folder, config, "t", recipe={"stages": [stage]})
    told = text.split("## How it was made")[1].split("<details>")[0]
    assert said in told and unsaid not in told


def test_a_search_for_layers_is_told_where_there_was_one(folder, config):
    recipe = {"layers": "auto:2", "chosen_layers": [1, 3], "stages": []}
    report = REPORT | {"curves": [{"stage": "auto", "run": "student", "unit": "", "tokens": [32, 64], "loss": [2, 1]}]}
    _, text = make(folder, config, "t", recipe=recipe, report=report)
    assert "after an alignment of memories in all layers (64 tokens), which the memories here start from" in text
    _, text = make(folder, config, "t", recipe=recipe, report=REPORT)
    assert "an alignment of memories in all layers" not in text
