"""Convert, push, and load by the name of the repository in a fresh process, with hf-memory and without it."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from hf_memory.cli import app
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


REPO = "tester/hybrid"
PROMPT = "the memory of"

WITH = """
import hf_memory
"""
# As if it was not installed: `find_spec` finds nothing.
WITHOUT = """
import sys

HIDDEN = {"accelerate", "conversion", "datasets", "hf_memory", "kernels", "peft", "rich", "triton", "typer"}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
OPTIONS = {"trust_remote_code": True}
"""
LOAD = """
import json, sys
from transformers import pipeline

generator = pipeline("text-generation", model=REPO, device="cpu", **globals().get("OPTIONS", {}))
text = generator(PROMPT, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
print(json.dumps([text, type(generator.model).__module__, "hf_memory" in sys.modules]))
"""


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    random_model(tiny_config("llama", vocab_size=300, num_hidden_layers=2)).save_pretrained(teacher)
    byte_tokenizer(300).save_pretrained(teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    arguments = ["convert", "--teacher", teacher, "--output", tmp_path / "hybrid", "--stages", "init"]
    arguments += ["--memory-option", "memory_depth=1"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return tmp_path / "hybrid"


def test_convert_push_and_load_by_name(converted, online, run_python, tmp_path):
    result = CliRunner().invoke(app, ["push", str(converted), REPO])
    assert result.exit_code == 0, result.output
    # The card that the conversion wrote is filled again: name, license of the teacher and recipe are what they were.
    [local, remote] = (ModelCard(text) for text in ((converted / "README.md").read_text(), online.card(REPO)))
    assert local.data.to_dict() == remote.data.to_dict() and remote.data.license == "mit"
    assert local.text == remote.text and "recipe.yaml" in online.files(REPO)

    given = f"REPO, PROMPT = {REPO!r}, {PROMPT!r}\n"
    found = {
        name: json.loads(run_python(given + prelude + LOAD, cwd=tmp_path).splitlines()[-1])
        for name, prelude in {"with": WITH, "without": WITHOUT}.items()
    }
    assert found["with"][0] == found["without"][0] != ""
    assert found["with"][1].startswith("hf_memory.") and found["with"][2]
    assert found["without"][1].startswith("transformers_modules.tester.hybrid") and not found["without"][2]
    assert str(tmp_path) not in online.card(REPO) + online.files(REPO)["recipe.yaml"].decode()
