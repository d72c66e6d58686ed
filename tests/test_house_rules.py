"""The house rules of CONTRIBUTING.md that a machine can check."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("hf_memory", "kernels", "conversion")
FOLDERS = (*LIBRARY, "examples", "tests")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_ARGUMENTS = 11

# Imports run downwards or sideways, never up. A module is ranked by its longest known prefix; whatever is not named
# stands between the models and their users.
RANKS = {
    "hf_memory.kernels": 0,
    "hf_memory.configuration": 1,
    "hf_memory.layers": 2,
    "hf_memory.cache": 2,
    "hf_memory.cache_layers": 2,
    "hf_memory.cache_states": 2,
    "hf_memory.compression": 2,
    "hf_memory.memory_identity": 2,
    "hf_memory.memory_file": 2,
    "hf_memory.reading": 3,
    "hf_memory.modeling": 3,
    "hf_memory.models": 4,
    "hf_memory": 5,
    "hf_memory.conversion": 6,
    "hf_memory._cli.convert": 7,
    "hf_memory._cli.hub": 7,
    "hf_memory._cli.recipes": 7,
    "hf_memory.cli": 7,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("kernels", "conversion"):
        parts = ("hf_memory", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, inside functions too; `from a import b` gives `a.b`."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def rank(module: str) -> int:
    return RANKS[max((prefix for prefix in RANKS if starts_with(module, prefix)), key=len)]


def functions(path: Path) -> Iterator[tuple[Function, bool]]:
    """Every function of a file, and whether it is public: no underscore in its own name or in that of its classes."""

    def visit(node: ast.AST, public: bool) -> Iterator[tuple[Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, public and not child.name.startswith("_")
                yield from visit(child, False)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, public and not child.name.startswith("_"))
            else:
                yield from visit(child, public)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def code_lines(function: Function) -> int:
    """Lines of a function without its docstring: documentation is not what makes a function long."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def is_triton_kernel(function: Function) -> bool:
    """A `@triton.jit` function takes its pointers and strides one by one; the launcher is the entry point."""
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def where(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}" + (f":{node.lineno}" if node is not None else "")


def test_files_stay_below_500_lines():
    too_long = {
        where(path): lines
        for path in python_files(*FOLDERS)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) >= MAX_FILE_LINES
    }
    assert not too_long


def test_functions_stay_below_80_lines():
    too_long = {
        f"{where(path, function)} {function.name}": code_lines(function)
        for path in python_files(*FOLDERS)
        for function, _ in functions(path)
        if code_lines(function) >= MAX_FUNCTION_LINES
    }
    assert not too_long


def test_public_entry_points_take_at_most_11_arguments():
    too_many = {}
    for path in python_files(*LIBRARY):
        for function, public in functions(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            if public and not is_triton_kernel(function) and len(names) > MAX_ARGUMENTS:
                too_many[f"{where(path, function)} {function.name}"] = len(names)
    assert not too_many


@pytest.mark.parametrize("folder", ["kernels", "conversion"])
def test_source_folders_are_namespace_folders(folder: str):
    assert (ROOT / folder / "SOURCE_CHECKOUT").is_file()
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "tests" / folder / "__init__.py").exists()  # pytest puts `tests` on `sys.path`


def test_imports_run_one_way():
    upwards = [
        f"{where(path)}: {imported}"
        for path in python_files(*LIBRARY)
        for imported in imported_modules(path)
        if starts_with(imported, "hf_memory") and rank(imported) > rank(module_name(path))
    ]
    assert not upwards


def test_kernels_know_tensors_only():
    foreign = [
        f"{where(path)}: {imported}"
        for path in python_files("kernels", "hf_memory/kernels")
        for imported in imported_modules(path)
        if starts_with(imported, "transformers")
        or (starts_with(imported, "hf_memory") and not starts_with(imported, "hf_memory.kernels"))
    ]
    assert not foreign


def test_architectures_do_not_import_each_other():
    crossing = []
    for path in python_files("hf_memory/models"):
        name = module_name(path).split(".")
        if len(name) < 3 or name[2] == "hybrid":
            continue
        crossing += [
            f"{where(path)}: {imported}"
            for imported in imported_modules(path)
            if starts_with(imported, "hf_memory.models") and imported.split(".")[2:3] not in ([], [name[2]])
        ]
    assert not crossing


def test_nothing_mentions_the_machine_it_was_written_on():
    machine_path = re.compile(r"(?<![\w./-])/(?:work|root|opt|tmp/\w+)/")
    texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "constraints.txt")]
    texts += python_files(*FOLDERS)
    texts += [path for folder in (*FOLDERS, "docs", "model_cards") for path in sorted((ROOT / folder).rglob("*.md"))]
    mentions = [where(path) for path in texts if machine_path.search(path.read_text(encoding="utf-8"))]
    assert not mentions
