"""A copy of our code that travels with a model.

transformers runs code from a model folder with `trust_remote_code=True`, and finds the files it needs by looking for
lines `from .file import name`: one dot, no folders. So the modules that a model needs are written side by side, each
one as it is here except for its imports.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_memory import __version__
from hf_memory.models import ARCHITECTURES, Architecture


PACKAGE = "hf_memory"
TABLE = "hf_memory.models"
"""Module that names other modules by strings; all other modules import what they need."""

# A hybrid is built around whatever stands in the table, so it is not in there itself.
EXPORTABLE = ARCHITECTURES | {"memory_hybrid": Architecture(folder="hybrid", prefix="MemoryHybrid")}

# Auto class -> role of the class that it builds. A role that an architecture does not have is left out.
ROLES = {
    "AutoConfig": "config",
    "AutoModel": "base_model",
    "AutoModelForCausalLM": "causal_lm",
    "AutoModelForSequenceClassification": "sequence_classification",
}

GENERATED = "# Generated from hf_memory"
LICENSE_HEADER = re.compile(r"(# Copyright.*\n(#.*\n)*)?")
# Not there on every machine. transformers refuses code that imports what is missing, unless it does so in a `try`.
OPTIONAL = ("triton",)
# Where our ops are registered, once for the whole process. A copy has ops of its own, or it would replace ours.
NAMESPACE = f"{PACKAGE}::"
LINE_LENGTH = 119
# What a module is called when it is imported as a whole: `from . import file` would escape the search of transformers.
THIS_MODULE = "this_module"
MODULE_NAME = re.compile(rf"{PACKAGE}(\.\w+)+")
MODULE_OF_ARCHITECTURE = re.compile(rf"{re.escape(TABLE)}\.{{[^{{}}]+}}\.")


def export_remote_code(model: PreTrainedModel | PreTrainedConfig, folder: str | os.PathLike) -> list[Path]:
    """
    Put a copy of the code that a saved model needs into its folder.

    The folder then loads with `trust_remote_code=True` wherever torch and transformers are installed. Where
    `hf_memory` is imported, its own classes are used and the copy is ignored. A copy that an earlier export left is
    replaced.

    Args:
        model: the model, or its configuration.
        folder: folder that `model.save_pretrained` has written.

    Returns:
        The files of code in the folder.

    Raises:
        ValueError: for a model type that is not ours, or a folder with a model of another type.
        FileNotFoundError: for a folder without `config.json`.

    Example:

    ```python
    >>> model.save_pretrained("my-model")
    >>> export_remote_code(model, "my-model")
    >>> # elsewhere, without hf_memory
    >>> AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)
    ```
    """
    folder, config = Path(folder), getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if model_type not in EXPORTABLE:
        raise ValueError(
            f"A {type(config).__name__} of model type {model_type!r} needs no code of hf_memory: only "
            f"{', '.join(EXPORTABLE)} can be exported."
        )
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: save the model there first.")
    saved = json.loads(config_file.read_text(encoding="utf-8"))
    if saved.get("model_type") != model_type:
        raise ValueError(f"{folder} holds a model of type {saved.get('model_type')!r}, not {model_type!r}.")

    architecture = EXPORTABLE[model_type]
    # A hybrid names the architecture of its memories in its configuration.
    memory = (getattr(config, "memory", None) or {}).get("model_type")
    texts = flat_sources(architecture, [] if memory is None else [ARCHITECTURES[memory]])
    for name, text in texts.items():
        _write(folder / name, text)
    for stale in set(folder.glob("*.py")) - {folder / name for name in texts}:
        if GENERATED in stale.read_text(encoding="utf-8", errors="replace"):
            stale.unlink()
    # Last of all, so that no configuration ever names code that is not there.
    saved["auto_map"] = auto_map(architecture)
    _write(config_file, json.dumps(saved, indent=2, sort_keys=True) + "\n")
    return [folder / name for name in texts]


def auto_map(architecture: Architecture) -> dict[str, str]:
    """Auto class -> `file.Class`, as `config.json` has it."""
    classes = {}
    for auto_class, role in ROLES.items():
        module = architecture.configuration_module if role == "config" else architecture.modeling_module
        name = getattr(architecture, role)
        if hasattr(importlib.import_module(module), name):
            classes[auto_class] = f"{flat_name(module)}.{name}"
    return classes


def flat_sources(architecture: Architecture, memories: Iterable[Architecture] = ()) -> dict[str, str]:
    """File name -> text of every module that an architecture needs; `memories` are those it looks up in the table.

    Raises:
        ValueError: for a module whose imports cannot be written in flat form.
    """
    waiting = [architecture.configuration_module, architecture.modeling_module]
    modules: dict[str, FlatModule] = {}
    while waiting:
        name = waiting.pop()
        if name not in modules:
            modules[name] = FlatModule(name, memories if name == TABLE else ())
            waiting += modules[name].needed
    as_objects = set().union(*(module.as_objects for module in modules.values()))
    digest = hashlib.sha256("".join(modules[name].source.text for name in sorted(modules)).encode()).hexdigest()
    return {
        f"{flat_name(name)}.py": modules[name].text(name in as_objects).replace(NAMESPACE, f"{PACKAGE}_{digest[:8]}::")
        for name in sorted(modules)
    }


def flat_name(module: str) -> str:
    """Name of the file for a module; those that hold the classes of an architecture keep theirs."""
    *_, folder, last = module.split(".")
    return last if last in (f"configuration_{folder}", f"modeling_{folder}") else module.replace(".", "_")


class Source:
    """One of our modules as it is installed."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        self.name = name
        self.is_package = spec.submodule_search_locations is not None
        self.path = Path(spec.origin)
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)

    def imported(self, node: ast.ImportFrom) -> str:
        """Absolute name of the module that an import statement takes names from."""
        if not node.level:
            return node.module
        package = self.name.split(".")[: None if self.is_package else -1]
        base = package[: len(package) - node.level + 1]
        return ".".join([*base, *([node.module] if node.module else [])])


@functools.cache
def read_source(name: str) -> Source:
    return Source(name)


def is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def origin(module: str, name: str) -> tuple[str, str | None]:
    """Where `from module import name` has it from in the end: module and name, or a module and `None`.

    Packages that only hand names on are left out this way, and with them the modules that nobody asked for.
    """
    source = read_source(module)
    if not source.is_package:
        return module, name
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and is_ours(base := source.imported(node)):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (base, alias.name) != (module, name):
                    return origin(base, alias.name)
    if importlib.util.find_spec(f"{module}.{name}") is not None:
        return f"{module}.{name}", None
    if module == PACKAGE:
        raise ValueError(f"`{PACKAGE}.{name}` cannot travel with a model: importing {PACKAGE} registers all of it.")
    return module, name


class FlatModule:
    """A module rewritten for a folder where all modules lie side by side.

    Attributes:
        needed: modules of ours that it imports.
        as_objects: those among them that it imports as a whole.
    """

    def __init__(self, name: str, memories: Iterable[Architecture] = ()) -> None:
        self.source = read_source(name)
        self.needed: set[str] = set()
        self.as_objects: set[str] = set()
        self._footer = ""
        self._edits: list[tuple[int, int, str]] = []
        self._lines = self.source.text.encode().splitlines(keepends=True)
        nodes = list(ast.walk(self.source.tree))
        guarded = {part for node in nodes if isinstance(node, ast.Try) for part in ast.walk(node)}
        for node in nodes:
            for block in (getattr(node, name, None) for name in ("body", "orelse")):
                if isinstance(block, list) and node not in guarded:
                    self._guard_imports(block)
            if isinstance(node, ast.ImportFrom):
                self._rewrite_import_from(node)
            elif isinstance(node, ast.Import):
                self._rewrite_import(node)
            elif isinstance(node, ast.JoinedStr):
                self._replace(node, MODULE_OF_ARCHITECTURE.sub("{__package__}.", self._segment(node)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
                raise ValueError(f"{name} names {node.value} by a string: a copy of it would not find that module.")
        self._name_files(memories)

    def text(self, is_object: bool) -> str:
        """The file; `is_object` when some other file imports it as a whole."""
        text = b"".join(self._lines)
        edited = len(text)
        for start, end, new in sorted(self._edits, reverse=True):
            if end > edited:
                raise ValueError(f"{self.source.name} uses what it imports in a way that a copy cannot follow.")
            text, edited = text[:start] + new.encode() + text[end:], start
        text = text.decode() + self._footer
        if is_object:
            text = f"{text}\n\nimport sys\n\n\n{THIS_MODULE} = sys.modules[__name__]\n"
        own_header = LICENSE_HEADER.match(text).group()
        license_header = own_header or LICENSE_HEADER.match(read_source(f"{PACKAGE}.configuration").text).group()
        path = self.source.name.replace(".", "/")
        mark = f"{GENERATED} {__version__}, {path}{'/__init__' if self.source.is_package else ''}.py\n"
        return f"{license_header}#\n{mark}{text[len(own_header) :]}"

    def _name_files(self, memories: Iterable[Architecture]) -> None:
        imports = []
        for architecture in memories:
            for module, name in (
                (architecture.configuration_module, architecture.config),
                (architecture.modeling_module, architecture.base_model),
            ):
                self.needed.add(module)
                imports.append(f"    from .{flat_name(module)} import {name}  # noqa: F401\n")
        if imports:
            self._footer = (
                "\n\ndef _files_that_are_looked_up() -> None:\n"
                '    """Never called: transformers brings the files that it sees imported."""\n' + "".join(imports)
            )

    def _guard_imports(self, statements: list[ast.stmt]) -> None:
        """Put each run of imports of optional packages into a `try`, where it is in none."""
        run: list[ast.Import | ast.ImportFrom] = []
        for statement in (*statements, None):
            if _is_optional_import(statement):
                run.append(statement)
            elif run:
                indent = " " * run[0].col_offset
                names = [alias.asname or alias.name.split(".")[0] for node in run for alias in node.names]
                body = "".join(f"{indent}    {self._segment(node)}\n" for node in run)
                missing = " = ".join(dict.fromkeys(names))
                new = f"try:\n{body}{indent}except ImportError:\n{indent}    {missing} = None"
                self._edits.append((self._span(run[0])[0], self._span(run[-1])[1], new))
                run = []

    def _rewrite_import_from(self, node: ast.ImportFrom) -> None:
        module = self.source.imported(node)
        if not is_ours(module):
            return
        names: dict[str, list[str]] = {}
        for alias in node.names:
            if alias.name == "*":
                raise ValueError(f"{self.source.name} imports all names of {module}: a copy needs to know which.")
            found, name = origin(module, alias.name)
            names.setdefault(found, []).append(self._imported_name(found, name, alias.asname or alias.name))
        self._replace_statement(node, names)

    def _rewrite_import(self, node: ast.Import) -> None:
        ours = [alias for alias in node.names if is_ours(alias.name)]
        if not ours:
            return
        names: dict[str, list[str]] = {}
        for alias in ours:
            local = alias.asname or alias.name.replace(".", "_")
            names[alias.name] = [self._imported_name(alias.name, None, local)]
            if alias.asname is None:
                for use in ast.walk(self.source.tree):
                    if isinstance(use, ast.Attribute) and ast.unparse(use) == alias.name:
                        self._replace(use, local)
        others = [ast.unparse(ast.Import([alias])) for alias in node.names if alias not in ours]
        self._replace_statement(node, names, others)

    def _imported_name(self, module: str, name: str | None, local: str) -> str:
        self.needed.add(module)
        if name is None:
            self.as_objects.add(module)
            name = THIS_MODULE
        return name if name == local else f"{name} as {local}"

    def _replace_statement(self, node: ast.stmt, names: dict[str, list[str]], others: Iterable[str] = ()) -> None:
        indent = " " * node.col_offset
        statements = list(others)
        for module, items in names.items():
            line = f"from .{flat_name(module)} import {', '.join(items)}"
            if len(indent + line) > LINE_LENGTH:
                listed = "".join(f"{indent}    {item},\n" for item in items)
                line = f"from .{flat_name(module)} import (\n{listed}{indent})"
            statements.append(line)
        self._replace(node, f"\n{indent}".join(statements))

    def _replace(self, node: ast.AST, new: str) -> None:
        if new != self._segment(node):
            self._edits.append((*self._span(node), new))

    def _segment(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return b"".join(self._lines)[start:end].decode()

    def _span(self, node: ast.AST) -> tuple[int, int]:
        # Columns of the syntax tree count bytes.
        start = sum(map(len, self._lines[: node.lineno - 1])) + node.col_offset
        end = sum(map(len, self._lines[: node.end_lineno - 1])) + node.end_col_offset
        return start, end


def _is_optional_import(statement: ast.stmt | None) -> bool:
    if isinstance(statement, ast.Import):
        return all(alias.name.split(".")[0] in OPTIONAL for alias in statement.names)
    if isinstance(statement, ast.ImportFrom):
        return not statement.level and statement.module.split(".")[0] in OPTIONAL
    return False


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
