"""The card of a converted model: metadata, no local paths, and nothing claimed that was not measured."""

from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_memory.conversion.card import TEMPLATE, teacher_name, write_card


CONFIG = {
    "model_type": "memory_hybrid",
    "base_model_type": "llama",
    "memory": {"model_type": "titans"},
    "memory_layers": [1, 3],
    "num_hidden_layers": 4,
    "memory_mode": "replace",
    "memory_window": None,
}
SPAN = {"start": 1, "end": 64, "bits_per_token": 2.0, "bits_per_byte": 1.5, "kl_bits_per_token": 0.1, "agreement": 0.9}
REPORT = {
    "title": "t",
    "text": "the held-out packages of the standard library",
    "models": {"student": {"parameters": 12, "quality": {"whole": SPAN, "parts": [SPAN], "curve": []}}},
}


@pytest.fixture
def config() -> SimpleNamespace:
    return SimpleNamespace(**CONFIG)


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
    assert "base_model" not in data
    assert str(tmp_path) not in text and "`my-teacher` with" in text
    assert "Stage `align` (1,000,000 tokens, learning rate 0.001)" in text
    shown = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert shown["teacher"] == "my-teacher" and shown["data"] == ["text.txt", "someone/dataset:train"]
    assert shown["held_out"] == "other.txt" and "output" not in shown


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
    (folder / "modeling_x.py").write_text("")
    (folder / "report.png").write_bytes(b"")
    _, text = make(folder, config, "a/b", report=REPORT)
    assert "trust_remote_code=True" in text and "](report.png)" in text


def test_nothing_measured_and_no_recipe(folder, config):
    _, text = make(folder, config, "a/b")
    assert "Nothing was measured on this model." in text and "```yaml" not in text
    assert "All that was measured" not in text and "2 of 4 layers keep their attention" in text


def test_retrofit_and_no_layer(folder, config):
    config.memory_mode, config.memory_window = "retrofit", 512
    assert (
        "beside the self-attention of layers 1 and 3 of 4 (counted from 0), which sees 512"
        in make(folder, config, "a/b")[1]
    )
    config.memory_layers = []
    assert "no layer is converted" in make(folder, config, "a/b")[1]


def test_python_in_the_card_compiles(folder, config):
    (folder / "modeling_x.py").write_text("")
    _, text = make(folder, config, "a/b", report=REPORT)
    for block in text.split("```python")[1:]:
        compile(block.split("```")[0], "README.md", "exec")


def test_names_of_teachers(tmp_path):
    (tmp_path / "folder").mkdir()
    assert teacher_name(str(tmp_path / "folder") + "/") == ("folder", False)
    assert teacher_name("someone/model") == ("someone/model", True)
    assert teacher_name("/gone/away/model") == ("model", False)


def test_template_is_where_the_card_looks():
    assert TEMPLATE.is_file()
