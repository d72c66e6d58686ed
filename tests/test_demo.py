"""`make demo` with a tiny teacher: from the surgery to the text that the saved model writes."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECIPE = """
memory: titans
layers: odd
memory_options: {chunk_size: 16}
context: 64
batch_size: 2
held_out_blocks: 4
dtype: float32
stages:
- init
- {name: align, tokens: 256, lr: 1.0e-3}
- {name: distill, tokens: 256, lr: 1.0e-3, trainable: all}
"""


@pytest.fixture(scope="module")
def demo():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("demo")
    patch.setattr(module, "SPEED_CONTEXTS", (32,))
    patch.setattr(module, "NEW_TOKENS", 8)
    yield module
    patch.undo()
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def arguments(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A teacher, a recipe, and where to go; the demo has run there once."""
    from stdlib_text import END, byte_tokenizer

    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "teacher")
    byte_tokenizer(128).save_pretrained(folder / "teacher")
    (folder / "recipe.yaml").write_text(RECIPE)
    lines = [f"the value of entry {number} is {number * number % 97}\n" for number in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    arguments = {"teacher": str(folder / "teacher"), "data": str(folder / "text.txt"), "output": folder / "out"}
    arguments |= {"recipe": folder / "recipe.yaml", "threads": 1, "tokens": None, "restart": False}
    demo.main(**arguments)
    return arguments


def test_report_has_all_models_and_stages(arguments: dict):
    output = arguments["output"]
    assert {path.name for path in output.iterdir()} == {
        "student", "memory_off", "continued", "plan.json", "report.json", "report.md", "report.png",
    }  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "student", "student, memory off", "teacher, continued"]
    assert all(len(model["speed"]) == 1 and model["cache"] for model in report["models"].values())
    assert {(curve["stage"], curve["run"], curve["tokens"][-1]) for curve in report["curves"]} == {
        ("align", "student", 256),
        ("align", "student, memory off", 256),
        ("distill", "student", 256),
        ("distill", "student, memory off", 256),
        ("cross entropy", "teacher, continued", 512),
    }
    assert len(report["continuation"]["text"]) > 0
    assert [stage["stage"] for stage in report["stages"]] == ["init", "align", "distill"]
    # Blocks of 64 bytes have room for one length.
    assert [model["recall"]["lengths"] for model in report["models"].values()] == [[64]] * 4
    text = (output / "report.md").read_text()
    assert "still grows with every token" in text and "xz -9e on all of it at once" in text
    assert "bits than its teacher" in text and "with its memory off" in text


def test_the_card_of_the_student_shows_the_comparison(arguments: dict):
    card = (arguments["output"] / "student" / "README.md").read_text()
    assert "| | teacher | student | student, memory off | teacher, continued |" in card
    assert str(arguments["output"].parent) not in card


def test_the_control_differs_in_its_step_size_alone(arguments: dict):
    student, control = (AutoConfig.from_pretrained(arguments["output"] / name) for name in ("student", "memory_off"))
    assert control.memory == student.memory | {"theta_max": 0}
    assert control.memory_layers == student.memory_layers == [1]
    assert AutoConfig.from_pretrained(arguments["output"] / "continued").memory_layers == []


def test_a_finished_demo_is_shown_again(demo: ModuleType, arguments: dict, capsys, monkeypatch):
    monkeypatch.setattr(demo.Demo, "run", None)
    demo.main(**arguments)
    output = capsys.readouterr().out
    assert "held-out bits per byte" in output and "finished before" in output


def test_an_interrupted_demo_keeps_what_is_done(demo: ModuleType, arguments: dict, monkeypatch):
    before = json.loads((arguments["output"] / "report.json").read_text())
    (arguments["output"] / "report.json").unlink()
    monkeypatch.setattr(demo, "convert", None)
    monkeypatch.setattr(demo, "SPEED_CONTEXTS", ())
    monkeypatch.setattr(demo, "continue_file", lambda folder, prompt: "")
    demo.main(**arguments)
    after = json.loads((arguments["output"] / "report.json").read_text())
    assert [model["quality"] for model in after["models"].values()] == [
        model["quality"] for model in before["models"].values()
    ]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"tokens": 128}, "holds a demo with other settings: pass --restart"),
        ({"output": EXAMPLES}, "holds something that is no demo"),
        ({"output": EXAMPLES, "restart": True}, "holds something that is no demo"),
        ({"recipe": EXAMPLES / "missing.yaml"}, "cannot be read"),
    ],
)
def test_wrong_input_is_one_sentence(demo: ModuleType, arguments: dict, change: dict, sentence: str, capsys):
    with pytest.raises(typer.Exit) as error:
        demo.main(**arguments | change)
    message = capsys.readouterr().err
    assert error.value.exit_code == 2 and message.startswith("Error: ") and message.count("\n") == 1
    assert sentence in message


def test_a_teacher_that_is_not_there_leaves_nothing(demo: ModuleType, arguments: dict, tmp_path: Path, capsys):
    with pytest.raises(typer.Exit):
        demo.main(**arguments | {"teacher": str(tmp_path / "gone"), "output": tmp_path / "out"})
    assert "no file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_library_is_copied_by_whole_packages(demo: ModuleType, tmp_path: Path, monkeypatch):
    stdlib = importlib.import_module("stdlib_text")
    every, kept = stdlib.source_files()
    kept = [path for path in kept if "json" in path.parts]
    monkeypatch.setattr(stdlib, "source_files", lambda packages: (every, kept))
    training, held_out = demo.library_text(tmp_path, tokens=10_000, seed=0)
    assert {path.relative_to(held_out).parts[0] for path in held_out.rglob("*.py")} == {"json"}
    chosen = list(training.rglob("*.py"))
    assert sum(path.stat().st_size for path in chosen) >= 1.5 * 10_000
    assert not {path.relative_to(training).parts[0] for path in chosen} & {"json", "asyncio", "encodings"}
    found = demo.baselines(held_out, None, None)
    assert 1 < found["xz -9e on all files at once"] < found["xz -9e file by file"] < 4


def test_the_recipe_of_the_demo_is_valid(demo: ModuleType, tmp_path: Path):
    recipe = demo.make_recipe(str(demo.TEACHER), None, tmp_path, demo.RECIPE, tokens=600)
    assert sum(stage.tokens for stage in recipe.training_stages.values()) == 600
    made = demo.recipes(recipe)
    assert made[demo.CONTINUED].training_stages["distill"].tokens == 600
    assert len({one.output for one in made.values()}) == 3
