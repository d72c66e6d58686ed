"""The fidelity tables name code and tests that exist."""

import importlib
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
READMES = [*sorted(ROOT.glob("hf_memory/models/*/README.md")), ROOT / "hf_memory/compression/README.md"]


def resolve(dotted: str) -> object:
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_names_in_the_table_exist(readme):
    rows = [
        line.split("|")[1:-1] for line in readme.read_text().splitlines() if line.startswith("|") and "::test_" in line
    ]
    assert len(rows) >= 8
    for _, code, test, *_ in rows:
        (name,) = re.findall(r"`([\w.]+)`", code)
        assert resolve(name) is not None
        path, function = re.findall(r"`([\w./]+)::(\w+)`", test)[0]
        assert f"def {function}(" in (ROOT / path).read_text(), f"{path} has no {function}"


def test_every_architecture_has_a_table():
    folders = {path.parent.name for path in READMES}
    models = {path.parent.name for path in ROOT.glob("hf_memory/models/*/modeling_*.py")}
    assert models <= folders
