"""Code in a model folder: it loads where hf_memory is not installed and computes the same bits."""

import ast
import compileall
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import hf_memory.kernels
from hf_memory import TitansConfig
from hf_memory.evaluation.properties_tiny import random_model, tiny_config
from hf_memory.hub import export_remote_code
from hf_memory.hub.remote_code import EXPORTABLE, flat_sources, read_source
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig


# What `pip install torch transformers` brings; triton is not among it on every machine.
INSTALLED = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}

COMMIT = "0123456789abcdef" * 2 + "01234567"

# The test program starts like this. Packages disappear as if they were not installed: `find_spec` finds nothing.
PRELUDE = """
import os, sys
os.environ["HF_MODULES_CACHE"], os.environ["HF_HUB_CACHE"] = MODULES, HUB
HIDDEN = {"accelerate", "conversion", "datasets", "hf_memory", "kernels", "peft", "rich", "triton", "typer"}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import json, shutil
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

def load(folder, auto_class=AutoModelForCausalLM, **kwargs):
    return auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs)

def check(model, folder):
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
        padded = model(expected["ids"], attention_mask=expected["mask"]).logits
        assert torch.equal(padded, expected["padded"]), folder
    tokens = model.generate(expected["ids"], max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(tokens, expected["tokens"]), folder
    return expected
"""

ALONE = """
for kind, folder in folders.items():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = load(folder)
    assert type(config).__name__ == type(model.config).__name__
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(AutoModelForCausalLM.from_config(config, trust_remote_code=True)).__name__ == type(model).__name__
    expected = check(model, folder)
    if "AutoModelForSequenceClassification" in config.auto_map:
        # Before `AutoModel` has met this configuration class, which a head must not depend on.
        head = load(folder, AutoModelForSequenceClassification, num_labels=3)
        assert head(expected["ids"]).logits.shape == (2, 3)
    with torch.no_grad():
        assert torch.equal(load(folder, AutoModel)(expected["ids"])[0], expected["hidden"])

    again = folder + "-again"
    model.save_pretrained(again)
    code = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    assert code == sorted(name for name in os.listdir(again) if name.endswith(".py")), again
    assert load(again).config.auto_map == config.auto_map
    shutil.copy(folder + "/expected.pt", again)
    check(load(again), again)

# From the Hub every file is fetched by itself, and all end up in one folder.
for kind in ("mag", "llama"):
    model = load(f"someone/{kind}")
    check(model, folders[kind])
    assert type(model).__module__.startswith("transformers_modules.someone."), type(model)
generator = pipeline("text-generation", model=folders["llama"], trust_remote_code=True)
text = generator("3 4 5 6", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
tokens = generator.model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=4, do_sample=False)
assert [int(word) for word in text.split()] == tokens[0, 4:].tolist()
assert not [name for name in sys.modules if name.split(".")[0] in HIDDEN]
"""

BESIDE = """
copies = {kind: load(folder) for kind, folder in folders.items()}
HIDDEN.clear()
sys.path.insert(0, ROOT)
import hf_memory
from transformers.dynamic_module_utils import get_class_from_dynamic_module

for kind, folder in folders.items():
    # As transformers decides: with the package imported, its classes win.
    own = load(folder)
    assert type(own).__module__.startswith("hf_memory."), type(own)
    assert type(own.config).__module__.startswith("hf_memory."), type(own.config)
    check(own, folder)
    check(AutoModelForCausalLM.from_pretrained(folder), folder)
    check(copies[kind], folder)
    # What it saves elsewhere does not name code that is not there.
    own.save_pretrained(folder + "-own")
    with open(folder + "-own/config.json") as saved, open(folder + "/config.json") as original:
        assert "auto_map" not in json.load(saved)
        reference = json.load(original)["auto_map"]["AutoModelForCausalLM"]
    # The copy once more, under another name and behind the package.
    moved = shutil.copytree(folder, folder + "-moved")
    copy = get_class_from_dynamic_module(reference, moved)
    assert copy is not type(copies[kind])
    check(copy.from_pretrained(moved), moved)
"""


def titans(variant: str) -> PreTrainedModel:
    return random_model(tiny_config("titans", variant=variant, chunk_size=4))


def hybrid(base: str, layers: list[int], **fields) -> PreTrainedModel:
    memory = {"memory_expansion": 2, "chunk_size": 4}
    teacher = tiny_config(base, num_hidden_layers=3, pad_token_id=None)
    return random_model(MemoryHybridConfig.from_teacher(teacher, memory_layers=layers, memory=memory, **fields))


MODELS = {
    "lmm": lambda: titans("lmm"),
    "mag": lambda: titans("mag"),
    "mac": lambda: titans("mac"),
    "mal": lambda: titans("mal"),
    "trellis": lambda: random_model(tiny_config("trellis", chunk_size=4)),
    "llama": lambda: hybrid("llama", [0, 2]),
    "gpt_neox": lambda: hybrid("gpt_neox", [1], memory_mode="retrofit", memory_window=8),
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {kind: make().eval() for kind, make in MODELS.items()}


@pytest.fixture(scope="module")
def saved(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models with their code and with what they compute; a copy of each in the layout of the Hub's cache."""
    path = tmp_path_factory.mktemp("saved")
    for kind, model in models.items():
        folder = save(model, path / f"model-{kind}")
        repository = path / "hub" / f"models--someone--{kind}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(COMMIT)
    return path


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    export_remote_code(model, folder)
    words = {"<unk>": 0, **{str(i): i for i in range(1, model.config.vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    ids = torch.randint(3, model.config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = {
            "ids": ids,
            "mask": mask,
            "logits": model(ids).logits,
            "padded": model(ids, attention_mask=mask).logits,
            "hidden": model.base_model(ids).last_hidden_state,
            "tokens": model.generate(ids, max_new_tokens=8, do_sample=False),
        }
    torch.save(expected, folder / "expected.pt")
    return folder


def test_a_folder_loads_by_the_code_in_it(saved: Path, tmp_path: Path, root: Path, run_python):
    folders = {kind: str(saved / f"model-{kind}") for kind in MODELS}
    given = f"MODULES, HUB, ROOT = {[str(path) for path in (tmp_path, saved / 'hub', root)]}; folders = {folders}\n"
    printed = run_python(given + PRELUDE + ALONE + BESIDE, cwd=tmp_path, stderr=True)
    assert "Traceback" not in printed and "ERROR" not in printed
    assert "not initialized" not in printed, printed


def exported(model: PreTrainedModel, folder: Path) -> list[Path]:
    model.config.save_pretrained(folder)
    return export_remote_code(model, folder)


def unguarded_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        yield from unguarded_imports(node)


@pytest.mark.parametrize("kind", MODELS)
def test_files_are_few_and_clean(kind: str, models: dict[str, PreTrainedModel], tmp_path: Path):
    files = exported(models[kind], tmp_path)
    names = {path.stem for path in files}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", *(path.name for path in files)])
    unneeded = ("benchmarks", "cli", "conversion", "evaluation", "hub", "presets", "registration")
    assert not [name for name in names if any(part in name for part in unneeded)]
    assert not names & {"hf_memory", "hf_memory_kernels", "hf_memory_layers"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# Copyright 2026 the hf-memory authors\n#\n# Licensed under the Apache License")
        assert text.count("# Copyright") == 1 and "# Generated from hf_memory 0." in text
        imported = {name.split(".")[0] for name in unguarded_imports(ast.parse(text))}
        assert imported <= INSTALLED | sys.stdlib_module_names, (path.name, imported)
    assert compileall.compile_dir(tmp_path, quiet=1)
    if importlib.util.find_spec("ruff"):
        ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", str(tmp_path)]
        result = subprocess.run(ruff, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_files_keep_license_and_auto_map(models: dict[str, PreTrainedModel], tmp_path: Path):
    exported(models["lmm"], tmp_path)
    lines = (tmp_path / "modeling_titans.py").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Copyright 2026 the hf-memory authors"
    assert lines[14].startswith(f"# Generated from hf_memory {hf_memory.__version__}, hf_memory/models/titans/")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {
        "AutoConfig": "configuration_titans.TitansConfig",
        "AutoModel": "modeling_titans.TitansModel",
        "AutoModelForCausalLM": "modeling_titans.TitansForCausalLM",
        "AutoModelForSequenceClassification": "modeling_titans.TitansForSequenceClassification",
    }
    assert config["hidden_size"] == models["lmm"].config.hidden_size


def test_a_second_export_replaces_the_first(models: dict[str, PreTrainedModel], tmp_path: Path):
    files = exported(models["lmm"], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "hf_memory_gone.py").write_text("# Generated from hf_memory 0.0.1, hf_memory/gone.py (Apache-2.0)\n")
    (tmp_path / "handler.py").write_text("# written by somebody else\n")
    files[0].write_text("half a fi")
    export_remote_code(models["lmm"].config, tmp_path)
    (tmp_path / "handler.py").unlink()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_architecture_can_be_exported(models: dict[str, PreTrainedModel]):
    assert {model.config.model_type for model in models.values()} == set(EXPORTABLE)
    for architecture in EXPORTABLE.values():
        assert f"modeling_{architecture.folder}.py" in flat_sources(architecture)


def test_what_cannot_be_exported_says_so(models: dict[str, PreTrainedModel], tmp_path: Path):
    with pytest.raises(ValueError, match="'llama' needs no code of hf_memory: only titans"):
        export_remote_code(LlamaConfig(), tmp_path)
    with pytest.raises(FileNotFoundError, match="has no config.json: save the model there first"):
        export_remote_code(models["lmm"], tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'llama', not 'titans'"):
        export_remote_code(TitansConfig(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# All ways to import that the rewriting knows, in a module `hf_memory.kernels.sample`.
SAMPLE = '''
"""Spelled with an umlaut, ü, as the columns of a syntax tree count bytes."""

from typing import TYPE_CHECKING

import hf_memory.kernels.parts.two
import math, hf_memory.kernels.parts.two as second
from hf_memory.kernels.parts import TWICE, one
from . import parts
from .parts import LISTED, two as third

if TYPE_CHECKING:
    from .parts.two import Kind


def value(kind: "Kind | None" = None) -> list:
    from hf_memory.kernels.parts.two import TWO as zwei, one_of_a_long_list_of_names, another_of_a_long_list_of_names
    ü = hf_memory.kernels.parts.two.TWO, second.TWO, third.TWO, zwei, TWICE
    return [*ü, math.floor(one.ONE), parts.LISTED is LISTED, one_of_a_long_list_of_names]
'''.lstrip()
PARTS = {
    "sample.py": SAMPLE,
    "parts/__init__.py": "from .two import TWO as TWICE\n\nLISTED = object()\n",
    "parts/one.py": "from .two import TWO\n\nONE = TWO - 1\n",
    "parts/two.py": "TWO = 2\none_of_a_long_list_of_names = another_of_a_long_list_of_names = Kind = int\n",
    "parts/unneeded.py": "import torch\n",
}


class SampleRow:
    configuration_module = "hf_memory.kernels.parts.two"
    modeling_module = "hf_memory.kernels.sample"


def add_to_kernels(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    read_source.cache_clear()
    monkeypatch.setattr(hf_memory.kernels, "__path__", [*hf_memory.kernels.__path__, str(folder)])


def test_every_form_of_import_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python):
    for name, text in PARTS.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    add_to_kernels(monkeypatch, tmp_path / "source")
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, text in flat_sources(SampleRow).items():
        assert "hf_memory." not in text.replace("hf_memory 0.", "")
        (flat / name).write_text(text, encoding="utf-8")
    prefix = "hf_memory_kernels_"
    assert {path.stem.removeprefix(prefix) for path in flat.iterdir()} == {"sample", "parts", "parts_one", "parts_two"}
    printed = run_python(f"from flat.{prefix}sample import value; print(value())", cwd=tmp_path)
    assert printed == "[2, 2, 2, 2, 2, 1, True, <class 'int'>]\n"


# What a kernel module looks like: Triton at its top, an op of its own, and callers that import it when they need it.
FAST = """
import triton, triton.language as tl
import torch
from triton.runtime.jit import JITFunction

try:
    import triton.tools
except ImportError:
    pass


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


op = torch.library.custom_op("hf_memory::sample", double, mutates_args=())
"""
SLOW = """
import torch


def doubled(x: torch.Tensor, fast: bool) -> torch.Tensor:
    if fast:
        from triton import knobs
        from .fast import op
        return op(x)
    return 2 * x
"""
BOTH_COPIES = """
import sys, types
sys.path.insert(0, ROOT)
import torch
x = torch.ones(1)
sys.modules["triton"] = None
from flat.hf_memory_kernels_slow import doubled
assert doubled(x, False) == 2
del sys.modules["triton"]
assert doubled(x, True) == 2
# Without the architectures, which take seconds.
sys.modules["hf_memory.registration"] = types.SimpleNamespace(register_architectures=lambda: None)
import hf_memory.kernels
hf_memory.kernels.__path__.append(SOURCE)
from hf_memory.kernels.slow import doubled as own
assert own(x, True) == 2 and doubled(x, True) == 2
print(sorted(name for name in torch._C._dispatch_get_all_op_names() if name.endswith("::sample")))
"""


class KernelRow:
    configuration_module = "hf_memory.kernels.slow"
    modeling_module = "hf_memory.kernels.fast"


def test_kernels_travel_and_neither_need_triton_nor_replace_our_ops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, run_python
):
    for name, text in {"source/slow.py": SLOW, "source/fast.py": FAST}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    add_to_kernels(monkeypatch, tmp_path / "source")
    (tmp_path / "flat").mkdir()
    for name, text in flat_sources(KernelRow).items():
        assert set(unguarded_imports(ast.parse(text))) == {"torch"}
        (tmp_path / "flat" / name).write_text(text)
    given = f"ROOT, SOURCE = {str(root)!r}, {str(tmp_path / 'source')!r}\n"
    printed = run_python(given + BOTH_COPIES, cwd=tmp_path)
    assert re.fullmatch(r"\['hf_memory::sample', 'hf_memory_[0-9a-f]{8}::sample'\]\n", printed)


@pytest.mark.parametrize(
    "line, message",
    [
        ("from hf_memory.kernels import *", "imports all names of hf_memory.kernels"),
        ("NAME = 'hf_memory.kernels.types'", "names hf_memory.kernels.types by a string"),
        ("from hf_memory import __version__", "`hf_memory.__version__` cannot travel with a model"),
    ],
)
def test_an_import_that_cannot_be_rewritten_says_so(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sample.py").write_text(line + "\n")
    add_to_kernels(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=message):
        flat_sources(SampleRow)
